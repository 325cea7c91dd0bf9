"""Trains a span model: data, model, optimizer, restore, loop.

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
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, Union

import jax
import tyro
from flax import nnx

from benchmarks import training as training_benchmark
from data import arithmetic, commandline, files, news, packing
from data.tasks import TASKS
from data.vocab import TokenizerVocab
from selfspan_jax import training
from selfspan_jax.config import PRESETS, LoraConfig, ModelConfig, TrainConfig, TunedAttention, fine_tuning
from selfspan_jax.errors import UserError
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import distributed
from selfspan_jax.parallel.mesh import describe, process_parts, training_mesh
from selfspan_jax.spans import SpanVocab
from selfspan_jax.training import runs
from selfspan_jax.weights import checkpoints as checkpoint
from selfspan_jax.weights import huggingface, lora

EXPRESSIONS = arithmetic.Corpus(min_ops=2, max_ops=22, names_first_step=True, label_jumps=3, jumps_at="leaves")
# What a corpus is to training: settings with `description`, `num_labels`, `task`, `task_in`, `stream` and `check_rows`.
CORPORA = {
    "arithmetic-tiny": dataclasses.replace(EXPRESSIONS, max_ops=12),
    **dict.fromkeys(("arithmetic-small", "arithmetic-base", "arithmetic-1b"), EXPRESSIONS),
    "news-small": news.Corpus(),
}
TUNING_CORPORA: dict[str, Any] = {
    "arithmetic": arithmetic.Corpus(min_ops=2, max_ops=22, names_first_step=True, num_labels=64),
    "news": news.Corpus(),
}
TASK_OF = {task.Corpus: task for task in TASKS.values()}
Corpus = TypeVar("Corpus", bound=Any)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Generic[Corpus]):
    run_dir: Path
    """Where checkpoints, metrics and the finished model go; resumed when it holds a checkpoint."""
    training: TrainConfig
    corpus: Corpus
    adapters: ClassVar[LoraConfig | None] = None
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

    def __post_init__(self):
        commandline.check_at_least(0, self, "workers", "time_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewModel(Run[Corpus]):
    """Train a model from random parameters. Defaults are those of the preset."""

    model: ModelConfig
    data: Path | None = None
    """A corpus directory written by `python -m data`; by default examples are generated as they are needed."""

    def prepare(self) -> tuple[Decoder, Any, Callable[..., Iterator], dict[str, Any]]:
        """The model, the task, the examples from any number on, and what decides the result."""
        if self.data is None:
            task = TASK_OF[type(self.corpus)].of(self.corpus)
            stream = generated(self, task)
        else:
            from data import dataset as corpus

            stored = corpus.load(self.data, TASKS)
            task, stream = stored.task, functools.partial(stored.stream, seed=self.training.seed)
        span_vocab, rngs = SpanVocab(**task.vocab.span_ids()), nnx.Rngs(self.training.seed)
        model = Decoder(self.model, vocab=span_vocab, vocab_size=task.vocab.size, rngs=rngs)
        return model, task, stream, {"model": dataclasses.asdict(self.model), "data": str(self.data.absolute()) if self.data else None}

    def finish(self, model: Decoder, task: Any, card: str) -> None:
        checkpoint.save_model(self.run_dir / "model", model, task.to_json(), card)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning(Run[Corpus]):
    """Fine-tune all parameters of a language model of others."""

    init: Path
    """A Hugging Face directory, with its tokenizer, or a GGUF file."""
    corpus_name: Annotated[Literal[tuple(TUNING_CORPORA)], tyro.conf.arg(name="corpus")] = "arithmetic"  # type: ignore
    """What it is fine-tuned on, in the words of its own tokenizer; the corpus's options are among these."""
    attention: TunedAttention = dataclasses.field(default_factory=TunedAttention)

    def prepare(self) -> tuple[Decoder, Any, Callable[..., Iterator], dict[str, Any]]:
        seed, attention = self.training.seed, dataclasses.asdict(self.attention)
        model, text = huggingface.load(self.init, num_labels=self.corpus.num_labels, seed=seed, **attention)
        if (context := model.config.max_context_tokens) < self.training.sequence_tokens:
            raise ValueError(f"rows of {self.training.sequence_tokens} tokens, but the context of {self.init} is {context}")
        vocab = TokenizerVocab.of(text.tokenizer_json, dataclasses.asdict(model.vocab), model.vocab_size)
        task = TASK_OF[type(self.corpus)].of(self.corpus, vocab)
        stream = generated(self, task)
        model = lora.unfrozen(model) if self.adapters is None else lora.adapt(model, self.adapters, seed=seed)
        identity = {"attention": attention, "base": {"name": self.init.name, "sha256": lora.fingerprint(model)}}
        return model, task, stream, identity | ({} if self.adapters is None else {"lora": dataclasses.asdict(self.adapters)})

    def finish(self, model: Decoder, task: Any, card: str) -> None:
        if self.adapters and not lora.is_adapter(self.run_dir / "adapter"):
            lora.save_adapter(self.run_dir / "adapter", model, self.adapters, self.init.name, task.to_json(), card)
        checkpoint.save_model(self.run_dir / "model", lora.plain(model), task.to_json(), card)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraTuning(FineTuning[Corpus]):
    """Fine-tune a language model of others by low-rank adapters and the embeddings of the span tokens."""

    adapters: LoraConfig = dataclasses.field(default_factory=LoraConfig)  # type: ignore[misc]


def generated(run: Run, task: Any) -> Callable[..., Iterator]:
    run.corpus.check_sequence_tokens(run.training.sequence_tokens, task.vocab)
    workers = -(-run.workers * jax.process_count() // run.training.data_parts)  # for each part that is packed here
    return functools.partial(run.corpus.stream, vocab=task.vocab, seed=run.training.seed, split="train", num_workers=workers)


def commands() -> Any:
    """A subcommand for each preset and each way of fine-tuning, of the corpus that the command line names."""
    words = " ".join(sys.argv[1:]).replace("=", " ").split()
    named = words[words.index("--corpus") + 1] if "--corpus" in words[:-1] else ""
    corpus_name = named if named in TUNING_CORPORA else "arithmetic"
    runs: dict[str, Run] = {
        name: NewModel(run_dir=tyro.MISSING, model=PRESETS[name].model, training=PRESETS[name].training, corpus=corpus)
        for name, corpus in CORPORA.items()
    }
    for name, kind in {"lora": LoraTuning, "full": FineTuning}.items():
        attention, config = fine_tuning(corpus_name, adapters=kind is LoraTuning)
        tuned: dict[str, Any] = {"training": config, "attention": attention, "corpus": TUNING_CORPORA[corpus_name]}
        runs[f"finetune-{name}"] = kind(run_dir=tyro.MISSING, init=tyro.MISSING, **tuned)
    kinds = (Annotated[type(run)[type(run.corpus)], tyro.conf.subcommand(name, default=run)] for name, run in runs.items())  # type: ignore
    return Union[tuple(kinds)]  # noqa: UP007


def main() -> None:
    preset = sys.argv[1] if len(sys.argv) > 1 else ""
    with commandline.exit_on_user_error(ValueError, NotImplementedError), distributed.barrier():
        run = commandline.parse(tyro.cli, commands(), description=__doc__, config=(tyro.conf.OmitArgPrefixes,), user_error=UserError)
        config = run.training
        distributed.initialize(run.hosts, command=repr(dataclasses.replace(run, hosts=None, workers=0)))
        mesh = training_mesh(run.mesh)
        model, task, stream, identity = run.prepare()
        training.check_mesh(model, config, mesh)
        data_parts = process_parts(config.data_parts, mesh)
        identity |= {"training": config.identity, "corpus": dataclasses.asdict(run.corpus)}
        identity = json.loads(json.dumps(identity))
        runs.claim(run.run_dir, identity)
        rows = {"batch_size": config.batch_size, "sequence_tokens": config.sequence_tokens, "num_parts": config.data_parts}
        gaps = {"gap_ids": task.step_ids, "gap_scales": config.gap_scales, "gap_seed": config.seed}
        packed = {"num_workers": run.workers, "parts": data_parts, **rows, **gaps}
        batches_from = packing.batches_from(stream, task.vocab, **packed)
        trained = "" if run.adapters is None else f", {training.num_trained(model):,} of them trained"
        distributed.log_once(f"{preset}: {model.num_parameters:,} parameters{trained}, {config.steps:,} steps on {describe(mesh)}")
        if (run.run_dir / "model").exists():
            distributed.log_once(f"this run is finished: {run.run_dir / 'model'}")
            return
        if run.time_steps:
            figures = training_benchmark.measure(model, config, batches_from(0), steps=run.time_steps, mesh=mesh)
            if distributed.is_first_process():
                files.write_json(run.run_dir / "throughput.json", figures)
            distributed.log_once(training_benchmark.table(figures))
            return
        scores: dict[str, float] = {}

        def evaluation(model: Decoder) -> dict[str, float]:
            fresh = run.corpus.stream(vocab=task.vocab, seed=config.seed, split="test")
            scores.update(runs.score(lora.plain(model), task, list(itertools.islice(fresh, config.eval_examples))))
            return scores

        evaluates = evaluation if config.eval_examples else None
        options = {"mesh": mesh, "evaluate": evaluates, "stop_after_seconds": run.stop_after_seconds}
        try:
            model = training.train(model, config, batches_from=batches_from, run_dir=run.run_dir, **options)
        except training.Stopped as stop:
            distributed.log_once(f"{stop} of {config.steps:,}: the same command goes on")
            return
        if evaluates and not scores:  # resumed after its last step
            evaluation(model)
        if distributed.is_first_process():
            run.finish(model, task, runs.card(preset, model, config, run.corpus.description, scores, identity))
        distributed.log_once(f"finished: {run.run_dir / 'model'}")


if __name__ == "__main__":
    main()
