"""Decodes with a trained span model: one expression step by step, many to see how often it is right, or to see how fast.

python decode.py generate checkpoints/arithmetic-tiny "((51+75)-(95*3))"
python decode.py generate runs/news/model --article article.txt
python decode.py eval checkpoints/arithmetic-tiny --num-examples 1000
python decode.py bench --shape llama2-7b --batch-size 1,32 --context 2048
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg
from tyro.extras import literal_type_from_choices

from benchmarks.sweep import Bench
from data import arithmetic, commandline, files, news
from data.tasks import TASKS
from selfspan_jax import evaluation, summaries
from selfspan_jax.attention.policies import POLICIES, policy_help
from selfspan_jax.config import Sampling, Weights
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM

PolicyName = literal_type_from_choices(tuple(POLICIES))


def load(checkpoint: Path, **options: Any) -> SpanLM:
    return SpanLM.load(checkpoint, TASKS, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    checkpoint: Positional[Path]
    """Directory of a finished model or an adapter, a Hugging Face directory or a GGUF file."""
    base: Path | None = None
    """Of an adapter: the Hugging Face directory or GGUF file that it was trained on."""
    mesh: str | None = None
    """Devices, as in data=2,tensor=4: sequences are divided over data, kv heads over tensor. By default one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Model):
    """Evaluates an expression, or sums up an article, and shows each step with what it read; or continues a text."""

    prompt: Positional[str | None] = None
    """An expression: whole numbers, + - * and parentheses; or text."""
    article: Path | None = None
    """A text file in place of the prompt, for a model that sums up news."""
    attention: Annotated[PolicyName | None, arg(help=f"{policy_help()}. Default: as it was trained.")] = None
    max_new_tokens: int | None = None
    """Stop after so many tokens; by default what the model's context leaves, 1024 at most."""
    sampling: OmitArgPrefixes[Sampling] = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    """Of the draws."""
    weights: Weights = "bf16"
    """bf16: the model's own compute dtype; int8: half the bytes of bfloat16."""
    stream: bool = False
    """Print tokens as they are decoded."""
    json: Path | None = None
    """Write the response, its steps and what each token attended to into this file."""
    html: Path | None = None
    """Write a page that shows what each step read into this file."""
    plot: Path | None = None
    """Draw what the response read into this file (PNG, SVG or PDF)."""

    def __post_init__(self):
        commandline.check_picture(self.plot)
        if (self.prompt is None) == (self.article is None):
            raise ValueError("give either a prompt or --article")

    def run(self) -> None:
        prompt = files.read_text(self.article) if self.article else str(self.prompt)
        lm = load(self.checkpoint, base=self.base, weights=self.weights, mesh=self.mesh)
        options = {"attention": self.attention, "max_new_tokens": self.max_new_tokens, "seed": self.seed, **vars(self.sampling)}
        if self.stream:
            for text in lm.stream(prompt, **options):
                print(text, end="", flush=True)
            print()
        out = lm.generate(prompt, **options)
        print(summaries.sources_table(out) if isinstance(lm.task, news.NewsTask) else evaluation.response_table(out, out.verdict))
        if self.json:
            files.write_json(self.json, {"checkpoint": self.checkpoint.name, **out.to_json()})
        if self.html:
            files.write_text(self.html, out.to_html())
        if self.plot:
            out.save_plot(self.plot)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Model):
    """Decodes fresh expressions of the test stream, verifies every step, counts right answers per second; or scores summaries."""

    num_examples: int = 1000
    """Expressions, of each number of operators that --ops has."""
    ops: Annotated[tuple[int, ...], commandline.commas(int)] = ()
    """Operators of every expression; several with commas are decoded and timed one after the other."""
    min_ops: int = 2
    """Without --ops: fewest operators; their number is uniform between the bounds."""
    max_ops: int = 12
    """Without --ops: most operators."""
    attention: Annotated[PolicyName | None, arg(help=f"{policy_help()}. Default: as it was trained.")] = None
    batch_size: Annotated[tuple[int, ...], commandline.commas(int)] = (128,)
    """Sequences decoded together; of several with commas, the fastest counts."""
    passes: int = 1
    """Times that each batch is decoded; the median counts. The first time has what happens once, such as loading kernels."""
    seed: int = 1
    """Of the expressions or articles."""
    data: Path | None = None
    """Of a model that sums up news: a corpus directory; by default fresh synthetic articles."""
    json: Path | None = None
    """Write the scores, in all and by number of operators, into this file."""

    def __post_init__(self):
        commandline.check_at_least(1, self, "num_examples", "batch_size", "passes")

    def run(self) -> None:
        lm = load(self.checkpoint, base=self.base, mesh=self.mesh)
        settings = {**{k: v for k, v in vars(self).items() if k not in ("base", "data", "json")}, "checkpoint": self.checkpoint.name}
        options: dict[str, Any] = {"attention": self.attention or lm.model.config.mask, "passes": self.passes}
        if isinstance(task := lm.task, news.NewsTask):
            if self.data:
                from data import dataset  # which imports Hugging Face's datasets

                stored = (example.story for example in dataset.load(self.data, TASKS))
                examples = list(itertools.islice(filter(None, map(task.encode, stored)), self.num_examples))
            else:
                ((_, examples),) = task.held_out(self.num_examples, seed=self.seed).items()
            results = summaries.report(lm, examples, scores=task.scores, batch_sizes=self.batch_size, settings=settings, **options)
            print(summaries.table(results))
        elif isinstance(task, arithmetic.ArithmeticTask):
            bounds = [(n, n) for n in self.ops] or [(self.min_ops, self.max_ops)]
            held_out = task.held_out(self.num_examples, seed=self.seed, ops=bounds)
            sets = {name: [example.prompt for example in own] for name, own in held_out.items()}
            found = evaluation.evaluate_all(lm, sets, task.verify, task.gold, batch_sizes=self.batch_size, progress=True, **options)
            results = evaluation.report(lm, found, gold=task.gold, keys=lambda text: arithmetic.parse(text).num_ops, settings=settings)
            print(evaluation.evaluation_table(results))
        else:
            raise ValueError(f"{self.checkpoint}: was trained neither on expressions nor on news, so there is nothing to verify")
        if self.json:
            files.write_json(self.json, results)


def main() -> None:
    with commandline.exit_on_user_error(ValueError, NotImplementedError):
        commandline.parse(tyro.cli, Generate | Eval | Bench, description=__doc__, user_error=UserError).run()


if __name__ == "__main__":
    main()
