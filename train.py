"""Trains a span model: data, model, optimizer, restore, loop.

    python train.py arithmetic-tiny --run-dir runs/tiny

A run directory that holds a checkpoint is resumed; a run that was killed ends bit-identical to one that was not.
The finished model is in RUN_DIR/model, metrics are in RUN_DIR/metrics.jsonl and RUN_DIR/tensorboard.
"""

import dataclasses
import functools
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import tyro
from flax import nnx

from data import arithmetic, commandline, packing, workers
from selfspan_jax import checkpoint, runs, training, training_benchmark
from selfspan_jax.config import PRESETS, ModelConfig, TrainConfig
from selfspan_jax.evaluation import Scores, evaluate
from selfspan_jax.lm import SpanLM
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab

CORPORA = {
    "arithmetic-tiny": arithmetic.Corpus(min_ops=2, max_ops=12),
    "arithmetic-small": arithmetic.Corpus(min_ops=2, max_ops=22, names_first_step=True),
    "arithmetic-base": arithmetic.Corpus(min_ops=2, max_ops=22, names_first_step=True),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run. Defaults are those of the preset."""

    run_dir: Path
    """Where checkpoints, metrics and the finished model go; resumed when it holds a checkpoint."""
    model: ModelConfig
    training: TrainConfig
    corpus: arithmetic.Corpus
    data: Path | None = None
    """A corpus directory written by `python -m data arithmetic`; by default examples are generated as they are needed."""
    workers: int = max(1, min(16, (os.cpu_count() or 2) - 1))
    """Processes that generate examples, beside one that packs them; 0 for none. The data does not depend on it."""

    resume_from: Path | None = None
    """A directory RUN_DIR/export of the same run, from another machine: go on from it where this RUN_DIR has no checkpoint."""
    stop_after_seconds: float | None = None
    """Stop after so many seconds of training with everything written, at the next export where there are any."""
    time_steps: int = 0
    """Do not train: time so many steps, three times over, and write RUN_DIR/throughput.json; 0 to train."""

    def __post_init__(self):
        for name in ("workers", "time_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 and above")

    def identity(self) -> dict:
        """What decides the result: a run directory is resumed only by the same."""
        values = dataclasses.asdict(self)
        data = str(self.data.absolute()) if self.data else None
        return json.loads(json.dumps({name: values[name] for name in ("model", "training", "corpus")} | {"data": data}))


def batches(run: Run) -> tuple[Callable[[int], Iterator[packing.Batch]], arithmetic.ArithmeticTask]:
    """The training data from any example on, and the task that it is of."""
    if run.data is None:
        task, rows = run.corpus.task, run.training.sequence_tokens
        if (longest := arithmetic.likely_longest_tokens(run.corpus)) > rows:
            raise ValueError(f"expressions of {run.corpus.max_ops} operators take up to {longest} tokens, a row only {rows}")
        stream: Callable[..., Iterator] = functools.partial(
            arithmetic.stream, run.corpus, seed=run.training.seed, split="train", num_workers=run.workers
        )
    else:
        from data import corpus  # the datasets library takes seconds to import

        stored = corpus.load(run.data)
        task = stored.task
        stream = functools.partial(stored.stream, seed=run.training.seed)
    make = functools.partial(
        packing.pack_stream,
        stream,
        task.vocab,
        batch_size=run.training.batch_size,
        sequence_tokens=run.training.sequence_tokens,
        gap_scales=run.training.gap_scales,
        gap_seed=run.training.seed,
        gap_ids=task.step_ids,
    )

    def batches_from(start: int) -> Iterator[packing.Batch]:
        return workers.remote(functools.partial(make, start=start)) if run.workers else make(start=start)

    return batches_from, task


def score(model: Decoder, task: arithmetic.ArithmeticTask, run: Run, num_examples: int) -> dict[str, float]:
    """Decodes fresh expressions of the test stream and verifies the responses."""
    stream = arithmetic.stream(run.corpus, seed=run.training.seed, split="test")
    examples = list(itertools.islice(stream, num_examples))
    evaluation = evaluate(
        SpanLM(model, task),
        [example.expression.text for example in examples],
        verify=task.verify,
        attention=model.config.mask,
        max_new_tokens=max(len(example.response_ids) for example in examples) + 16,
        batch_size=128,
        progress=True,
    )
    return dataclasses.asdict(Scores.of(evaluation.results))


def card(run: Run, model: Decoder, preset: str, scores: dict[str, float]) -> str:
    """The README of a finished model."""
    lines = [f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in scores.items()]
    device = jax.devices()[0].device_kind
    return (
        f"# {preset}\n\nA span model of {model.num_parameters:,} parameters, trained by `train.py` of selfspan.\n\n"
        f"```\npython train.py {shlex.join(shown_arguments(sys.argv[1:]))}\n```\n\n"
        f"{run.training.steps:,} steps of {run.training.batch_size} x {run.training.sequence_tokens} tokens, "
        f"jax {jax.__version__} on {device}.\n\n"
        f"Scores on fresh expressions of {run.corpus.min_ops} to {run.corpus.max_ops} operators, decoded greedily by the model itself "
        f"(attention: {run.model.mask}):\n\n" + "\n".join(lines) + "\n\n"
        "`config.json` has the architecture, `vocab.json` the task.\n\n"
        f"```json\n{json.dumps(run.identity(), indent=2)}\n```\n"
    )


def shown_arguments(arguments: list[str]) -> list[str]:
    """The command line without this machine's paths."""
    return [Path(word).name if Path(word).is_absolute() else word for word in arguments]


def main() -> None:
    defaults = {
        name: Run(run_dir=tyro.MISSING, model=preset.model, training=preset.training, corpus=CORPORA[name])
        for name, preset in PRESETS.items()
    }
    command = tyro.extras.subcommand_type_from_defaults(defaults, prefix_names=False)
    run: Run = commandline.parse(command, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    preset = sys.argv[1]
    with commandline.errors_for_people():
        batches_from, task = batches(run)
        runs.claim(run.run_dir, run.identity(), run.resume_from)
        model = Decoder(
            run.model,
            vocab=SpanVocab(**task.vocab.span_ids()),
            vocab_size=task.vocab.size,
            rngs=nnx.Rngs(run.training.seed),
        )
        print(f"{preset}: {model.num_parameters:,} parameters on {jax.devices()[0].device_kind}, {run.training.steps:,} steps")
        if (run.run_dir / "model").exists():
            print(f"this run is finished: {run.run_dir / 'model'}")
            return
        if run.time_steps:
            figures = training_benchmark.measure(model, run.training, batches_from(0), steps=run.time_steps)
            commandline.write_json(run.run_dir / "throughput.json", figures)
            print(training_benchmark.table(figures))
            return
        num_examples = run.training.eval_examples
        scores: dict[str, float] = {}

        def evaluation(model: Decoder) -> dict[str, float]:
            scores.update(score(model, task, run, num_examples))
            return scores

        evaluates = evaluation if num_examples else None
        try:
            model = training.train(
                model,
                run.training,
                batches_from=batches_from,
                run_dir=run.run_dir,
                evaluate=evaluates,
                resume_from=run.resume_from,
                stop_after_seconds=run.stop_after_seconds,
            )
        except training.Stopped as stop:
            print(f"{stop} of {run.training.steps:,}: {runs.how_to_go_on(run.run_dir)}")
            return
        if evaluates and not scores:  # resumed after its last step
            evaluation(model)
        checkpoint.save_model(run.run_dir / "model", model, task.to_json(), card(run, model, preset, scores))
        print(f"finished: {run.run_dir / 'model'}")


if __name__ == "__main__":
    main()
