"""Decodes with a trained span model: one expression step by step, many to see how often it is right, or to see how fast.

python decode.py generate checkpoints/arithmetic-tiny "((51+75)-(95*3))"
python decode.py generate runs/news/model --article article.txt
python decode.py eval checkpoints/arithmetic-tiny --num-examples 1000
python decode.py bench --shape llama2-7b --batch-size 1,32 --context 2048
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Annotated, Any, get_args

from tyro.conf import OmitArgPrefixes, Positional

from benchmarks import decoding as benchmark
from benchmarks import peers as benchmark_peers
from benchmarks import report as benchmark_report
from benchmarks import workloads as replay
from data import arithmetic, commandline, news
from selfspan_jax import evaluation, summaries
from selfspan_jax.config import Attention, Sampling
from selfspan_jax.lm import SpanLM, Weights
from selfspan_jax.spans import SpanVocab


def load(checkpoint: Path, **options: Any) -> SpanLM:
    return SpanLM.load(checkpoint, {task.name: task for task in (arithmetic.ArithmeticTask, news.NewsTask)}, **options)


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
    sampling: OmitArgPrefixes[Sampling] = dataclasses.field(default_factory=Sampling)
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
        prompt = commandline.read_text(self.article) if self.article else str(self.prompt)
        lm, options = load(self.checkpoint, base=self.base, weights=self.weights, mesh=self.mesh), vars(self.sampling)
        if self.stream:
            for text in lm.stream(prompt, **options):
                print(text, end="", flush=True)
            print()
        out = lm.generate(prompt, **options)
        print(summaries.sources_table(out) if isinstance(lm.task, news.NewsTask) else evaluation.response_table(out, out.verdict))
        if self.json:
            commandline.write_json(self.json, {"checkpoint": self.checkpoint.name, **out.to_json()})
        if self.html:
            commandline.write_text(self.html, out.to_html())
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
    attention: Attention | None = None
    """span: what the model names; dense: everything before; window: first and recent tokens. Default: as it was trained."""
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
        commandline.check_least(1, self, "num_examples", "batch_size", "passes")

    def run(self) -> None:
        lm = load(self.checkpoint, base=self.base, mesh=self.mesh)
        settings = {**{k: v for k, v in vars(self).items() if k not in ("base", "data", "json")}, "checkpoint": self.checkpoint.name}
        options: dict[str, Any] = {"attention": self.attention or lm.model.config.mask, "passes": self.passes}
        if isinstance(task := lm.task, news.NewsTask):
            examples = news.held_out(task, self.num_examples, seed=self.seed, directory=self.data)
            results = summaries.report(lm, examples, scores=task.scores, batch_sizes=self.batch_size, settings=settings, **options)
            print(summaries.table(results))
        elif isinstance(task, arithmetic.ArithmeticTask):
            bounds = [(n, n) for n in self.ops] or [(self.min_ops, self.max_ops)]
            sets = arithmetic.held_out(task, bounds, self.num_examples, seed=self.seed)
            found = evaluation.evaluate_all(lm, sets, task.verify, task.gold, batch_sizes=self.batch_size, progress=True, **options)
            results = evaluation.report(lm, found, gold=task.gold, keys=lambda text: arithmetic.parse(text).num_ops, settings=settings)
            print(evaluation.evaluation_table(results))
        else:
            raise ValueError(f"{self.checkpoint}: was trained neither on expressions nor on news, so there is nothing to verify")
        if self.json:
            commandline.write_json(self.json, results)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Times decode steps against the bytes that they must move: of a checkpoint, or of a shape with random weights.

    Whole sequences are made for it and replayed, so that automaton and mask do what they do for a trained model of that size.
    """

    checkpoint: Positional[Path | None] = None
    """Directory of a finished model; or give --shape."""
    shape: benchmark.ShapeName | None = None
    """A model's sizes, filled with random weights."""
    batch_size: Annotated[tuple[int, ...], commandline.commas(int)] = (1, 8, 32)
    """Sequences decoded together; several with commas."""
    context: Annotated[tuple[int, ...], commandline.commas(int)] = ()
    """Tokens of context, the mean over the timed steps; several with commas. Default: 2048, or what a checkpoint has room for."""
    attention: Annotated[tuple[Attention, ...], commandline.commas(*get_args(Attention))] = ("dense", "span", "window")
    """dense: everything before; span: what the tokens name; window: first and recent tokens; several with commas."""
    steps: int = 64
    """Timed steps of every sequence, an even number."""
    int8: bool = False
    """Measure every configuration once more, with int8 weights."""
    peers: Annotated[tuple[benchmark_peers.Name, ...], commandline.commas(*get_args(benchmark_peers.Name))] = ()
    """Time Hugging Face's step with a static cache on the same shape, where PyTorch is installed; several with commas."""
    workload: benchmark.WorkloadName | None = None
    """arithmetic: oracle responses; segments: steps that name pieces of a long prompt. Default: as the vocabulary is."""
    attended_fraction: float = 0.1
    """Of "segments": share of its context that a response token attends to, on average."""
    num_samples: int = 1
    """Above 1, two rows more: so many sequences that share their prompt, and as many that do not."""
    stream_check: bool = False
    """One row more: the first span configuration streamed, against one loop."""
    profile: bool = False
    """Run every configuration once more under the profiler: the device's time by kind of operation, in --json."""
    mesh: str | None = None
    """Devices, as in data=2,tensor=4; by default one. Bytes and floor are then those of one device."""
    seed: int = 0
    """Of weights and tokens."""
    json: Path | None = None
    """Write the rows into this file, after each of them."""
    plot: Path | None = None
    """Draw milliseconds per step and their floors into this file (PNG, SVG or PDF)."""

    def __post_init__(self):
        commandline.check_picture(self.plot)
        if (self.checkpoint is None) == (self.shape is None):
            raise ValueError("give either a checkpoint or --shape")
        self.plan()

    def plan(self) -> benchmark.Plan:
        return benchmark.Plan(**{field.name: getattr(self, field.name) for field in dataclasses.fields(benchmark.Plan)})

    def run(self) -> None:
        if self.peers:  # they share the device with this process
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        lm = load(self.checkpoint) if self.checkpoint else None
        task = lm.task if lm and isinstance(lm.task, arithmetic.ArithmeticTask) else arithmetic.ArithmeticTask()
        name = self.checkpoint.name if self.checkpoint else str(self.shape)
        draw = functools.partial(replay.tokens, task, seed=self.seed)
        save = functools.partial(commandline.write_json, self.json) if self.json else None
        results = benchmark_report.run(self.plan(), name, lm, SpanVocab(**task.vocab.span_ids()), draw, save, self.plot)
        print(benchmark_report.table(results["rows"]))


def main() -> None:
    command = commandline.parse(Generate | Eval | Bench, description=__doc__)
    with commandline.errors_for_people():
        command.run()


if __name__ == "__main__":
    main()
