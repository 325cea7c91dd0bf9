"""Decodes with a trained span model: one expression step by step, or many to see how often it is right.

python decode.py generate checkpoints/arithmetic-tiny "((51+75)-(95*3))"
python decode.py eval checkpoints/arithmetic-tiny --num-examples 1000
"""

import dataclasses
import itertools
from pathlib import Path
from typing import cast

import jax
from tyro.conf import Positional

from data import arithmetic, commandline
from selfspan_jax.config import Attention
from selfspan_jax.evaluation import Evaluation, Scores, evaluate
from selfspan_jax.lm import Output, SpanLM


def load(checkpoint: Path) -> tuple[SpanLM, arithmetic.ArithmeticTask]:
    lm = SpanLM.load(checkpoint, {arithmetic.ArithmeticTask.name: arithmetic.ArithmeticTask})
    return lm, cast(arithmetic.ArithmeticTask, lm.task)


@dataclasses.dataclass(frozen=True)
class Generate:
    """Evaluates one expression and shows each step with what it read."""

    checkpoint: Positional[Path]
    """Directory of a finished model."""
    prompt: Positional[str]
    """An expression: whole numbers, + - * and parentheses."""
    attention: Attention | None = None
    """span: what the model names; dense: everything before; window: first and recent tokens. Default: as it was trained."""
    stream: bool = False
    """Print tokens as they are decoded."""
    max_new_tokens: int | None = None
    """Stop after so many tokens; by default what the model's context leaves, 1024 at most."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the most likely tokens whose probabilities add up to this."""
    seed: int = 0
    """Of the draws."""
    json: Path | None = None
    """Write the response, its steps and what each token attended to into this file."""
    plot: Path | None = None
    """Draw the mask under which the response was decoded into this file (PNG, SVG or PDF)."""

    def __post_init__(self):
        if self.plot and self.plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"plot is {self.plot}; allowed: names that end in .png, .svg or .pdf")

    def run(self) -> None:
        lm, task = load(self.checkpoint)
        options = {name: getattr(self, name) for name in ("attention", "max_new_tokens", "temperature", "top_p", "seed")}
        if self.stream:
            for text in lm.stream(self.prompt, **options):
                print(text, end="", flush=True)
            print()
        out = lm.generate(self.prompt, **options)
        print(shown(out, task.verify(self.prompt, out.response_ids)))
        if self.json:
            commandline.write_json(self.json, {"checkpoint": self.checkpoint.name, **described(out)})
        if self.plot:
            self.plot.parent.mkdir(parents=True, exist_ok=True)
            out.plot().savefig(self.plot, dpi=100)


def described(out: Output) -> dict:
    values = {field.name: getattr(out, field.name) for field in dataclasses.fields(out) if field.name != "lm"}
    values |= {"steps": [dataclasses.asdict(step) for step in out.steps], "attended_fraction": out.attended_fraction}
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}


def shown(out: Output, verdict: arithmetic.Verdict) -> str:
    """The response as a table of its steps, the answer, and how much of the context was read."""
    head = ("step", "reads", "writes", "attended tokens")
    rows = [(f"<{s.label}>", " ".join(f"<{ref}>" for ref in s.refs) or "-", s.text, f"{s.attended_tokens:.1f}") for s in out.steps]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)]
    mean_context = (out.prompt_tokens + 1 + len(out.token_ids)) / 2
    lines += [
        "",
        f"{out.prompt} = {out.answer}   ({verdict.message})",
        f"attended: {out.num_attended.mean():.1f} tokens, {out.attended_fraction:.1%} of the context"
        f"   dense decoding: {mean_context:.1f} tokens, 100%",
    ]
    if not out.finished:
        lines.append(f"stopped after {len(out.response_ids)} new tokens, before the response had ended")
    if out.unresolved_refs:
        lines.append(f"{out.unresolved_refs} span tokens named a label that nothing carried")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Eval:
    """Decodes fresh expressions of the test stream, verifies every step, and counts right answers per second."""

    checkpoint: Positional[Path]
    """Directory of a finished model."""
    num_examples: int = 1000
    """Expressions."""
    ops: int | None = None
    """Operators of every expression; sets both bounds below."""
    min_ops: int = 2
    """Fewest operators; their number is uniform between the bounds."""
    max_ops: int = 12
    """Most operators."""
    attention: Attention | None = None
    """span: what the model names; dense: everything before; window: first and recent tokens. Default: as it was trained."""
    batch_size: int = 128
    """Sequences decoded together."""
    seed: int = 1
    """Of the expressions."""
    json: Path | None = None
    """Write the scores, in all and by number of operators, into this file."""

    def __post_init__(self):
        for name in ("num_examples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 and above")

    def run(self) -> None:
        lm, task = load(self.checkpoint)
        attention = self.attention or lm.model.config.mask
        bounds = (self.ops, self.ops) if self.ops is not None else (self.min_ops, self.max_ops)
        labels = lm.model.vocab.num_labels
        corpus = arithmetic.Corpus(min_ops=bounds[0], max_ops=bounds[1], labelling=task.labelling, num_labels=labels)
        examples = list(itertools.islice(arithmetic.stream(corpus, seed=self.seed, split="test"), self.num_examples))
        evaluation = evaluate(
            lm,
            [example.expression.text for example in examples],
            verify=task.verify,
            attention=attention,
            max_new_tokens=max(len(example.response_ids) for example in examples) + 16,
            batch_size=self.batch_size,
            progress=True,
        )
        by_ops = {
            num_ops: Scores.of([r for r, example in zip(evaluation.results, examples) if example.expression.num_ops == num_ops])
            for num_ops in sorted({example.expression.num_ops for example in examples})
        }
        print(table({**{str(num_ops): scores for num_ops, scores in by_ops.items()}, "all": Scores.of(evaluation.results)}))
        print(f"{evaluation.problems_per_second:.1f} right answers per second of decoding, batch {min(self.batch_size, len(examples))}")
        if wrong := next((r for r in evaluation.results if not r.verdict.steps_right), None):
            print(f"first wrong: {wrong.output.prompt}: {wrong.verdict.message}")
        if self.json:
            commandline.write_json(self.json, self.report(evaluation, by_ops))

    def report(self, evaluation: Evaluation, by_ops: dict[int, Scores]) -> dict:
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "json"}
        return {
            **settings,
            "attention": evaluation.results[0].output.attention,
            "checkpoint": self.checkpoint.name,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            **evaluation.to_json(),
            "by_ops": {str(num_ops): dataclasses.asdict(scores) for num_ops, scores in by_ops.items()},
        }


def table(rows: dict[str, Scores]) -> str:
    columns = ("answer_accuracy", "step_accuracy", "span_accuracy", "attended_fraction", "attended_tokens")
    lines = ["operators  examples  answers  steps   spans   attended  tokens"]
    for name, scores in rows.items():
        answer, step, span, fraction, tokens = (getattr(scores, column) for column in columns)
        lines.append(f"{name:>9}  {scores.num_examples:>8}  {answer:7.1%} {step:7.1%} {span:7.1%}  {fraction:7.1%}  {tokens:7.1f}")
    return "\n".join(lines)


def main() -> None:
    command = commandline.parse(Generate | Eval, description=__doc__)
    with commandline.errors_for_people():
        command.run()


if __name__ == "__main__":
    main()
