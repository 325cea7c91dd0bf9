"""One evaluation for all tasks: the task's own scores, attended tokens, throughput."""

from selfspan_jax.evaluation.results import Evaluation, NotRun, first_error, report, wilson
from selfspan_jax.evaluation.running import MARGIN_TOKENS, evaluate, evaluate_all
