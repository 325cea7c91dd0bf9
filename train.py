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
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, Union

import jax
import tyro
from flax import nnx

from data import arithmetic, commandline, packing
from selfspan_jax import checkpoint, runs, training, training_benchmark
from selfspan_jax.config import PRESETS, ModelConfig, TrainConfig
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab

# What a corpus is to training: settings with `name`, `description`, `task`, `stream` and `check_rows`, as arithmetic.Corpus has them.
CORPORA = {
    "arithmetic-tiny": arithmetic.Corpus(min_ops=2, max_ops=12),
    "arithmetic-small": arithmetic.Corpus(min_ops=2, max_ops=22, names_first_step=True),
    "arithmetic-base": arithmetic.Corpus(min_ops=2, max_ops=22, names_first_step=True),
}
Corpus = TypeVar("Corpus")


@dataclasses.dataclass(frozen=True)
class Run(Generic[Corpus]):
    """One training run. Defaults are those of the preset."""

    run_dir: Path
    """Where checkpoints, metrics and the finished model go; resumed when it holds a checkpoint."""
    model: ModelConfig
    training: TrainConfig
    corpus: Corpus
    data: Path | None = None
    """A corpus directory written by `python -m data`; by default examples are generated as they are needed."""
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


def batches(run: Run, task: Any) -> tuple[Callable[[int], Iterator[packing.Batch]], Any]:
    """The training data from any example on, and the task that it is of: the one given, or a corpus directory's own."""
    seed = run.training.seed
    if run.data is None:
        run.corpus.check_rows(task, run.training.sequence_tokens)
        stream: Callable[..., Iterator] = functools.partial(run.corpus.stream, task, seed=seed, split="train", num_workers=run.workers)
    else:
        from data import corpus  # the datasets library takes seconds to import

        stored = corpus.load(run.data)
        stream, task = functools.partial(stored.stream, seed=seed), stored.task
    batches_from = packing.batches_from(
        stream,
        task.vocab,
        num_workers=run.workers,
        batch_size=run.training.batch_size,
        sequence_tokens=run.training.sequence_tokens,
        gap_scales=run.training.gap_scales,
        gap_seed=seed,
        gap_ids=task.step_ids,
    )
    return batches_from, task


def main() -> None:
    command = Union[  # noqa: UP007 (a subcommand for each preset)
        tuple(
            Annotated[
                Run[type(corpus)],  # type: ignore[misc]
                tyro.conf.subcommand(name, default=Run(tyro.MISSING, PRESETS[name].model, PRESETS[name].training, corpus)),
            ]
            for name, corpus in CORPORA.items()
        )
    ]
    run: Run = commandline.parse(command, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    preset = sys.argv[1]
    with commandline.errors_for_people():
        batches_from, task = batches(run, run.corpus.task)
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
        scores: dict[str, float] = {}

        def evaluation(model: Decoder) -> dict[str, float]:
            fresh = run.corpus.stream(task, seed=run.training.seed, split="test")
            scores.update(runs.score(model, task, list(itertools.islice(fresh, run.training.eval_examples))))
            return scores

        evaluates = evaluation if run.training.eval_examples else None
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
        card = runs.card(preset, model, run.training, run.corpus.description, scores, run.identity())
        checkpoint.save_model(run.run_dir / "model", model, task.to_json(), card)
        print(f"finished: {run.run_dir / 'model'}")


if __name__ == "__main__":
    main()
