"""Report the news experiments: stored results in, tables and plots of a page out.

    python -m experiments.news docs/news

`--take DIR` first adds, reduced, what train.py and decode.py eval left in DIR under the names of `experiments.results`
(metrics.jsonl becomes the curve). The evaluation of span-0 is span-0.eval.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from experiments import pages
from experiments.pages import Plot, Tally, by_variant, evaluations, judge, markdown_table, score_cell
from experiments.results import Run
from experiments.variants import Experiment

CONTROLS = {"span": "dense", "prompt": "dense", "labels": "dense", "smollm2": "smollm2_dense"}
_SCORES = {
    **{"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"},
    **{"fact_accuracy": "fact accuracy", "fact_recall": "fact recall", "all_facts_right": "all facts right"},
    **{"span_precision": "span precision", "span_recall": "span recall", "finished_fraction": "finished"},
}
_SPEEDS = dict.fromkeys(("batch_size", "summaries_per_second", "response_tokens_per_second"))
EXPERIMENT = Experiment(
    "news",
    evaluations={"eval": "scores, reading and speed"},
    evaluation_fields={
        **dict.fromkeys(("seed", "attention", "device", "jax", "num_parameters", "num_examples", *_SCORES, *pages.READING)),
        "by_batch_size": [_SPEEDS],
    },
)


def scores_table(frame: pd.DataFrame, **more: str) -> str:
    """Write a row for each variant; `more` are further columns by the names of their scores."""
    columns, rows = _SCORES | more, []
    for variant, own in by_variant(frame):
        right = Tally.of(own, "all_facts_right")
        cells = [f"{right.right:,}" if key == "all_facts_right" else score_cell(own, key) for key in columns]
        rows.append((f"`{variant}`", f"{right.num_examples:,}", *cells, *right.bounds))
    return markdown_table(("variant", "summaries", *columns.values(), *(f"all facts right, {bound}" for bound in pages.BOUNDS)), rows)


def targets(evaluated: pd.DataFrame, own: pd.DataFrame) -> str:
    rows = []
    for variant in ("span", "smollm2"):
        control = CONTROLS[variant]
        target = f"`{variant}`: ROUGE-L less than 0.5 below that of `{control}`"
        rouge = judge(target)
        for frame in (own, evaluated):  # the larger evaluation counts where both variants have it
            found = dict(by_variant(frame))
            if {variant, control} <= found.keys():
                span, dense = (100 * found[name]["rougeL"].mean() for name in (variant, control))
                rouge = judge(target, f"{dense - 0.5:.2f}", f"{span:.2f}", reached=dense - span < 0.5)
        read, target = evaluated[evaluated["variant"] == variant], f"`{variant}`: of the context, body tokens attend to less than"
        share = None if read.empty else read["attended_fraction_body"].mean()
        reading = judge(target, "25%") if share is None else judge(target, "25%", f"{share:.1%}", reached=share < 0.25)
        rows += [rouge, reading]
    return markdown_table(pages.TARGETS, rows)


_MARKS = {
    "rougeL": ("ROUGE-L", {"marker": "o", "markersize": 7}),
    "fact_accuracy": ("right facts, of those stated", {"marker": "s", "markersize": 7}),
    "attended_fraction": ("context read by response tokens", {"marker": "|", "markersize": 14}),
}


def _plot_scores(axes: Axes, runs: Sequence[Run]) -> None:
    """Plot each variant on its line: the scores that its run found, and how much it read for them."""
    variants = dict(by_variant(evaluations(runs, "own")))
    for place, (variant, own) in enumerate(variants.items()):
        for key, (words, mark) in _MARKS.items():
            style: dict[str, Any] = {"linestyle": "", "fillstyle": "none", "markeredgewidth": 2, **mark}
            style |= {"color": pages.color(EXPERIMENT, variant), "label": words if place == 0 else None}
            axes.plot(100 * own[key].astype(float).mean(), place, **style)
    axes.set(xlim=(-3, 103), xlabel="%")
    axes.set_yticks(range(len(variants)), [*variants])
    axes.margins(y=0.5)
    axes.invert_yaxis()


PLOTS = {"scores": Plot("ROUGE-L, fact accuracy and the share of the context that was read", "own", _plot_scores)}


def sections(runs: Sequence[Run], plots: dict[str, str]) -> dict[str, str]:
    """Write the sections of the page beside those that every report has."""
    evaluated, own = evaluations(runs, "eval"), evaluations(runs, "own")
    return {
        "targets": targets(evaluated, own),
        "scores": scores_table(evaluated),
        "own": scores_table(own, attended_fraction="attended, of the context") + plots["scores"],
        "reading": pages.reading_table(evaluated),
        "speed": pages.speed_table(evaluated, "summaries", CONTROLS),
    }


def main(argv: Sequence[str] | None = None) -> None:
    pages.run_command(pages.report(EXPERIMENT, PLOTS, sections), argv)


if __name__ == "__main__":
    main()
