"""Train a span model: data, model, optimizer, restore, training.

    python train.py arithmetic-tiny --run-dir runs/tiny
    python train.py finetune-lora --init SmolLM2.gguf --corpus arithmetic --run-dir runs/lora

A run directory that holds a checkpoint is resumed; a run that was killed ends bit-identical to one that was not.
The finished model is in RUN_DIR/model, an adapter in RUN_DIR/adapter, metrics in RUN_DIR/metrics.jsonl and RUN_DIR/tensorboard.
"""

import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from flax import nnx

from benchmarks import training as training_benchmark
from data import commandline, packing
from data.errors import check_range
from data.streams import GeneratedCorpus
from data.tasks import TASKS
from data.vocab import TokenizerVocab
from selfspan_jax import evaluation, files, training
from selfspan_jax.config import PRESETS, LoraConfig, ModelConfig, TrainConfig, TunedAttention, tuning_preset
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import distributed
from selfspan_jax.parallel.mesh import describe, process_parts, training_mesh
from selfspan_jax.spans import SpanVocab
from selfspan_jax.training import runs
from selfspan_jax.weights import importing, lora, models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A command line: what all runs have in common."""

    name: tyro.conf.Suppress[str]
    task: tyro.conf.Suppress[str]
    run_dir: Path
    """Where checkpoints, metrics and the finished model go; resumed when it holds a checkpoint."""
    training: TrainConfig
    corpus: GeneratedCorpus[Any]
    workers: int = max(1, min(16, (os.cpu_count() or 2) - 1))
    """Processes on this host that generate examples, beside one that packs them; 0 for none. The data does not depend on it."""
    mesh: str | None = None
    """Devices, as in data=2,fsdp=4: data and fsdp divide rows, fsdp also parameters, tensor heads and features. By default one."""
    hosts: str | None = None
    """One of several processes: "auto" under SLURM, or HOST:PORT,N,I, the first one's address, how many, this one's number."""
    stop_after_seconds: float | None = None
    """Save a checkpoint and stop after so many seconds of training."""
    time_steps: int = 0
    """Do not train: time so many steps, three times over, and write RUN_DIR/throughput.json; 0 to train."""

    def __post_init__(self) -> None:
        check_range(self, "workers", "time_steps", low=0)

    def generate(self, vocab: Any) -> Callable[..., Iterator[Any]]:
        """Return the function that generates the training examples from any number on."""
        if (longest := self.corpus.likely_longest_tokens(vocab)) > self.training.sequence_tokens:
            raise UserError(f"{self.corpus.description} take up to {longest} tokens, a row only {self.training.sequence_tokens}")
        workers = -(-self.workers * jax.process_count() // self.training.data_parts)  # for each shard that is packed here
        return functools.partial(self.corpus.stream, vocab=vocab, seed=self.training.seed, num_workers=workers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewModel(Run):
    """Train a model from random parameters."""

    model: ModelConfig
    data: Path | None = None
    """A corpus directory written by `python -m data`; by default examples are generated as they are needed."""

    def prepare(self) -> tuple[Decoder, Any, Callable[..., Iterator[Any]], dict[str, Any]]:
        """Return the model, the task, the examples from any number on, and what decides the result."""
        if self.data is None:
            task = TASKS[self.task].of(self.corpus)
            stream = self.generate(task.vocab)
        else:
            from data import dataset  # which takes a second to import

            stored = dataset.load(self.data, TASKS)
            if stored.task.name != self.task:
                raise UserError(f"{self.data} is a corpus of {stored.task.name}: expected one of {self.task}")
            task, stream = stored.task, functools.partial(stored.stream, seed=self.training.seed)
        span_vocab, rngs = SpanVocab(**task.vocab.span_ids()), nnx.Rngs(self.training.seed)
        model = Decoder(self.model, vocab=span_vocab, vocab_size=task.vocab.size, rngs=rngs)
        return model, task, stream, {"model": dataclasses.asdict(self.model), "data": str(self.data.absolute()) if self.data else None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning(Run):
    """Fine-tune an imported language model: all parameters, or adapters and the embeddings of the span tokens."""

    init: Path
    """A Hugging Face directory, with its tokenizer, or a GGUF file."""
    corpus_name: Annotated[str, tyro.conf.arg(name="corpus", metavar=f"{{{','.join(TASKS)}}}")]
    """What it is fine-tuned on, in the words of its own tokenizer; the corpus's options are among these."""
    attention: TunedAttention
    adapters: LoraConfig | None

    def prepare(self) -> tuple[Decoder, Any, Callable[..., Iterator[Any]], dict[str, Any]]:
        """Return the model, the task, the examples from any number on, and what decides the result."""
        seed, attention = self.training.seed, dataclasses.asdict(self.attention)
        model, text = importing.load(self.init, num_labels=self.corpus.num_labels, seed=seed, **attention)
        if (context := model.config.max_context_tokens) < self.training.sequence_tokens:
            raise UserError(f"rows of {self.training.sequence_tokens} tokens, but the context of {self.init} is {context}")
        vocab = TokenizerVocab.of(text.tokenizer_json, dataclasses.asdict(model.vocab), model.vocab_size)
        stream = self.generate(vocab)
        model = model.astype("float32") if self.adapters is None else lora.adapt(model, self.adapters, seed=seed)
        identity = {"attention": attention, "base": {"name": self.init.name, "sha256": lora.fingerprint(model)}}
        identity |= {} if self.adapters is None else {"lora": dataclasses.asdict(self.adapters)}
        return model, TASKS[self.task].of(self.corpus, vocab), stream, identity


def parse() -> NewModel | FineTuning:
    """Parse the command line: a sub-command for each preset and each way of fine-tuning, whose options depend on --corpus."""
    task = commandline.look_ahead(sys.argv[1:], "--corpus", TASKS, "arithmetic")
    runs: dict[str, tuple[str, NewModel | FineTuning]] = {}
    for name, preset in PRESETS.items():
        corpus = TASKS[preset.task].Corpus(**preset.corpus)
        configs: dict[str, Any] = {"corpus": corpus, "model": preset.model, "training": preset.training}
        run = NewModel(name=name, task=preset.task, run_dir=tyro.MISSING, **configs)
        runs[name] = f"Train a model from random parameters on {corpus.description}.", run
    for kind, parts in {"lora": "low-rank adapters and the embeddings of the span tokens", "full": "all parameters"}.items():
        tuning, name = tuning_preset(task, adapters=kind == "lora"), f"finetune-{kind}"
        configs = {"corpus": TASKS[task].Corpus(**tuning.corpus), "attention": tuning.attention, "training": tuning.training}
        configs["adapters"] = LoraConfig() if kind == "lora" else None
        tuned = FineTuning(name=name, task=task, corpus_name=task, run_dir=tyro.MISSING, init=tyro.MISSING, **configs)
        runs[name] = f"Fine-tune an imported language model: {parts}.", tuned
    name, words = commandline.choose({name: summary for name, (summary, _) in runs.items()}, __doc__ or "")
    summary, defaults = runs[name]
    return commandline.parse(defaults, name, words, description=summary, user_error=UserError)


def train(run: NewModel | FineTuning) -> None:
    """Train the model of a run, or go on with it, and write what there is at its end."""
    config, mesh = run.training, training_mesh(run.mesh)
    model, task, stream, identity = run.prepare()
    training.check_mesh(model, config, mesh)
    identity = json.loads(json.dumps(identity | {"training": config.identity, "corpus": dataclasses.asdict(run.corpus)}))
    runs.claim(run.run_dir, identity)
    sizes: dict[str, Any] = {"batch_size": config.batch_size, "sequence_tokens": config.sequence_tokens, "num_workers": run.workers}
    gaps: dict[str, Any] = {"gap_scales": config.gap_scales, "gap_ids": task.step_ids, "gap_seed": config.seed}
    shards: dict[str, Any] = {"num_shards": config.data_parts, "shards": process_parts(config.data_parts, mesh)}
    batches_from = packing.batches_from(stream, task.vocab, **sizes, **gaps, **shards)
    trained = f", {training.num_trained(model):,} of them trained" if training.num_trained(model) < model.num_parameters else ""
    distributed.log_once(f"{run.name}: {model.num_parameters:,} parameters{trained}, {config.steps:,} steps on {describe(mesh)}")
    if (run.run_dir / "model").exists():
        return distributed.log_once(f"this run is finished: {run.run_dir / 'model'}")
    if run.time_steps:
        figures = training_benchmark.measure(model, config, batches_from(0), steps=run.time_steps, mesh=mesh)
        if distributed.is_first_process():
            files.write_json(run.run_dir / "throughput.json", figures)
        return distributed.log_once(training_benchmark.table(figures))
    scores: dict[str, float] = {}

    def evaluate(model: Decoder) -> dict[str, float]:
        fresh = list(itertools.islice(run.corpus.stream(vocab=task.vocab, seed=config.seed, split="test"), config.eval_examples))
        scores.update(evaluation.evaluate(SpanLM(lora.plain(model), task), fresh, progress=distributed.is_first_process()).scores)
        return scores

    options: dict[str, Any] = {"evaluate": evaluate if config.eval_examples else None, "stop_after_seconds": run.stop_after_seconds}
    try:
        model = training.train(model, config, batches_from=batches_from, run_dir=run.run_dir, mesh=mesh, **options)
    except training.Stopped as stop:
        return distributed.log_once(f"{stop} of {config.steps:,}: the same command goes on")
    if config.eval_examples and not scores:  # resumed after its last step
        evaluate(model)
    if distributed.is_first_process():
        card = runs.card(run.name, model, config, run.corpus.description, scores, identity)
        if isinstance(run, FineTuning) and run.adapters and not lora.is_adapter(run.run_dir / "adapter"):
            lora.save_adapter(run.run_dir / "adapter", model, run.adapters, run.init.name, task.to_json(), card)
        models.save_model(run.run_dir / "model", lora.plain(model), task.to_json(), card)
    distributed.log_once(f"finished: {run.run_dir / 'model'}")


def main() -> None:
    with commandline.exit_on_user_error(UserError, NotImplementedError):
        run = parse()
        with distributed.barrier():
            distributed.initialize(run.hosts, command=repr(dataclasses.replace(run, hosts=None, workers=0)))
            train(run)


if __name__ == "__main__":
    main()
