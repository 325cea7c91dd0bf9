"""Train a span model: data, model, optimizer, restore, training.

    python train.py arithmetic-tiny --run-dir runs/tiny
    python train.py custom --data corpora/mine --run-dir runs/mine
    python train.py finetune-lora --init SmolLM2.gguf --corpus arithmetic --run-dir runs/lora

A run directory that holds a checkpoint is resumed; a run that was killed ends bit-identical to one that was not. The finished model
is in RUN_DIR/model, an adapter in RUN_DIR/adapter, metrics in RUN_DIR/metrics.jsonl and RUN_DIR/tensorboard.
"""

if __name__ == "__main__":
    import data.interrupts  # noqa: F401  # before what takes seconds

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from flax import nnx

from benchmarks import training as training_benchmark
from data import commandline
from data.errors import check_range
from data.examples import TrainingExamples, open_stored, unread
from data.streams import GeneratedCorpus
from data.tasks import TASKS
from data.vocab import TokenizerVocab
from selfspan_jax import evaluation, training
from selfspan_jax.config import (
    COMPUTE_DTYPES,
    PRESETS,
    TUNING_PRESETS,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    TunedAttention,
    TuningPreset,
    tuning_preset,
)
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import distributed
from selfspan_jax.parallel.mesh import describe, process_parts, training_mesh
from selfspan_jax.spans import SpanVocab
from selfspan_jax.training import runs
from selfspan_jax.weights import importing, lora, models

CorpusName = Annotated[str, tyro.conf.arg(name="corpus", metavar=f"{{{','.join(TASKS)}}}")]
stored_corpus = functools.cache(functools.partial(open_stored, tasks=TASKS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A command line: what all runs have in common."""

    name: tyro.conf.Suppress[str]
    task: tyro.conf.Suppress[str]
    run_dir: Path
    """Where checkpoints, metrics and the finished model go; resumed when it holds a checkpoint."""
    training: TrainConfig
    data: Path | None = None
    """A corpus directory written by `python -m data`, with its own settings; by default examples are generated as they are needed."""
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
        check_range(self, "workers", "time_steps", *([] if self.stop_after_seconds is None else ["stop_after_seconds"]), low=0)

    def examples(self, vocab: Any = None) -> TrainingExamples:
        return TrainingExamples.of(TASKS[self.task], self.corpus, stored_corpus(self.data), vocab, self.workers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewModel(Run):
    """Train a model from random parameters."""

    model: ModelConfig

    def prepare(self) -> tuple[Decoder, TrainingExamples, dict[str, Any]]:
        """Return the model, the examples, and what decides the result beside them."""
        examples = self.examples()
        vocab, rngs = examples.task.vocab, nnx.Rngs(self.training.seed)
        model = Decoder(self.model, vocab=SpanVocab(**vocab.span_ids()), vocab_size=vocab.size, rngs=rngs)
        return model, examples, {"model": dataclasses.asdict(self.model)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CustomModel(NewModel):
    """Train a model from random parameters on any task, one of your own among them."""

    corpus_name: CorpusName
    """The task whose examples are generated; with --data that of the directory. Its options are among these."""
    like: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(PRESETS)}}}")]
    """The preset whose model and training are the defaults of these options."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning(Run):
    """Fine-tune an imported language model: all parameters, or adapters and the embeddings of the span tokens."""

    init: Path
    """A Hugging Face directory with its tokenizer, an id of its Hub (owner/name), a GGUF file, or RUN_DIR/model of another run."""
    dtype: Literal["bf16", "f32"] | None = None
    """What activations and products are computed in. Default: f32 where the model is stored so, else bf16."""
    corpus_name: CorpusName
    """What it is fine-tuned on, in the words of its own tokenizer; with --data that of the directory. Its options are among these."""
    attention: TunedAttention
    adapters: LoraConfig | None
    adapter: Path | None = None
    """With finetune-lora: an adapter of the same base, rank and scale that training goes on from."""

    def prepare(self) -> tuple[Decoder, TrainingExamples, dict[str, Any]]:
        """Return the model, the examples, and what decides the result beside them."""
        if self.adapter is not None and self.adapters is None:
            raise UserError("--adapter: all parameters are trained; allowed with finetune-lora")
        seed, attention = self.training.seed, dataclasses.asdict(self.attention)
        labels: dict[str, Any] = {"num_labels": self.corpus.num_labels, "fewer_labels": self.data is not None, "labels_as_words": True}
        computed: dict[str, Any] = {} if self.dtype is None else {"compute_dtype": COMPUTE_DTYPES[self.dtype]}
        model, text = importing.load(self.init, seed=seed, **labels, **attention, **computed)
        if (context := model.config.max_context_tokens) < (row := self.training.sequence_tokens):
            raise UserError(f"--sequence-tokens is {row}: the context of {self.init} is {context}")
        examples = self.examples(TokenizerVocab.of(text.tokenizer_json, dataclasses.asdict(model.vocab), model.vocab_size))
        model = model.astype("float32") if self.adapters is None else lora.adapt(model, self.adapters, seed=seed)
        init = self.init.absolute()
        name = init.name if init.name != "model" else f"{init.parent.name}/model"
        identity: dict[str, Any] = {"attention": attention, "base": {"name": name, "sha256": lora.fingerprint(model)}}
        identity |= {} if self.dtype is None else {"dtype": self.dtype}
        identity |= {} if self.adapters is None else {"lora": dataclasses.asdict(self.adapters)}
        identity |= {} if self.adapter is None else {"adapter": lora.begin_with(model, self.adapter)}
        return model, examples, identity


def parse() -> NewModel | FineTuning:
    """Parse the command line: a sub-command, whose options depend on its corpus."""
    kinds = {name: f"Train a model from random parameters: {preset.task}." for name, preset in PRESETS.items()}
    kinds["custom"] = "Train a model from random parameters: any task, one of your own among them."
    kinds["finetune-lora"] = "Fine-tune a pretrained model: low-rank adapters and the embeddings of the span tokens."
    kinds["finetune-full"] = "Fine-tune a pretrained model: all parameters."
    name, words = commandline.choose(kinds, __doc__ or "")
    data, like = commandline.look_ahead(words, "--data"), name
    stored = stored_corpus(Path(data)) if data else None
    if name == "custom":
        like = commandline.look_ahead(words, "--like", PRESETS) or "arithmetic-tiny"
    chosen = PRESETS[name].task if name in PRESETS else commandline.look_ahead(words, "--corpus", TASKS)
    task = chosen or (stored.task.name if stored else "arithmetic")
    if stored and stored.task.name != task:
        how = "`custom --data` trains on any" if name in PRESETS else f"leave --corpus {task} out"
        commandline.fail(f"--data: {stored.path} is a corpus of {stored.task.name}, not of {task}: {how}")
    preset = PRESETS.get(like) or tuning_preset(task, adapters=name == "finetune-lora")
    settings = preset.corpus if isinstance(preset, TuningPreset) or preset.task == task else {}
    corpus = stored.corpus if stored else TASKS[task].Corpus(**settings)
    run: dict[str, Any] = {"name": name, "task": task, "run_dir": tyro.MISSING, "corpus": corpus, "training": preset.training}
    if isinstance(preset, TuningPreset):
        adapters, attention = LoraConfig() if name == "finetune-lora" else None, preset.attention
        if attention.header_view == "labels" and not getattr(corpus, "closed_pieces", True):
            attention = dataclasses.replace(attention, header_view="all")
        defaults: Any = FineTuning(corpus_name=task, init=tyro.MISSING, attention=attention, adapters=adapters, **run)
        kinds[name] += f" {help_on_defaults(task)}"
    else:
        custom: dict[str, Any] = {"corpus_name": task, "like": like} if name == "custom" else {}
        defaults = (CustomModel if custom else NewModel)(model=preset.model, **custom, **run)
    return commandline.parse(defaults, name, words, description=kinds[name], user_error=UserError)


def help_on_defaults(task: str) -> str:
    """Say which corpus the defaults of fine-tuning are for, and what they are for documents."""

    def said(name: str) -> str:
        config, view = (preset := tuning_preset(name, adapters=True)).training, preset.attention.header_view
        return f"{config.batch_size} rows of {config.sequence_tokens:,} tokens, --header-view {view}"

    long = [name for name, preset in TUNING_PRESETS.items() if preset is TUNING_PRESETS["documents"]]
    others = f" For {', '.join(long)}: {said('documents')}; --corpus NAME --help and --data DIR --help have all of them."
    return f"Defaults are those of the corpus, here {task}: {said(task)}.{'' if task in long else others}"


def train(run: NewModel | FineTuning, interrupts: training.Interrupts) -> None:
    """Train the model of a run, or go on with it, and write what there is at its end."""
    config, mesh = run.training, training_mesh(run.mesh)
    model, examples, identity = run.prepare()
    training.check_mesh(model, config, mesh)
    identity = json.loads(json.dumps(identity | {"training": dataclasses.asdict(config)} | examples.identity()))
    identity = runs.check(run.run_dir, identity)
    if not run.time_steps and identity.get("finished_steps") == config.steps:
        return distributed.log_once(f"this run is finished, more --steps go on with it: {run.run_dir / 'model'}")
    sizes: dict[str, Any] = {name: getattr(config, name) for name in ("seed", "batch_size", "sequence_tokens", "gap_scales")}
    shards: dict[str, Any] = {"num_shards": config.data_parts, "shards": process_parts(config.data_parts, mesh)}
    batches_from = examples.batches_from(**sizes, **shards)
    held_out, left_out = examples.held_out(config.eval_examples, seed=config.seed) if config.eval_examples else ([], None)
    runs.claim(run.run_dir, identity)
    distributed.log_once(f"{run.name}: {training.describe(model)}, {config.steps:,} steps on {describe(mesh)}; data: {examples.trained_on}")
    if run.time_steps:
        return training_benchmark.run(model, config, batches_from(0), run.run_dir / "throughput.json", steps=run.time_steps, mesh=mesh)
    often = examples.warning(config.steps * config.batch_size * config.sequence_tokens)
    distributed.log_once(*unread(run.corpus, model.config), runs.schedule_note(identity), examples.left_out, left_out, often)

    def evaluate(model: Decoder) -> dict[str, float]:
        lm = SpanLM(lora.plain(model), examples.task)
        return evaluation.evaluate(lm, held_out, progress=distributed.is_first_process()).scores

    options: dict[str, Any] = {"run_dir": run.run_dir, "mesh": mesh, "stop_after_seconds": run.stop_after_seconds, "interrupts": interrupts}
    options |= {"evaluate": evaluate if held_out else None, "progress": True}
    with interrupts.deferred():
        try:
            model = training.train(model, config, batches_from=batches_from, **options)
        except training.Stopped as stop:
            distributed.log_once(f"{stop} of {config.steps:,}, a checkpoint is saved: the same command goes on")
            if stop.signal:
                raise SystemExit(128 + stop.signal) from None
            return
        card = models.card(run.name, model, identity, training.read_scores(run.run_dir, config.steps), **examples.texts())
        adapters = run.adapters if isinstance(run, FineTuning) else None
        counted = {"left_out_examples": count} if (count := examples.num_left_out) else {}
        runs.finish(run.run_dir, identity | counted, model, examples.task.to_json(), card, adapters)
    distributed.log_once(f"finished: {run.run_dir / 'model'}")


def main() -> None:
    with commandline.exit_on_user_error(UserError, NotImplementedError), training.Interrupts() as interrupts:
        run = parse()
        with distributed.barrier():
            distributed.initialize(run.hosts, command=repr(dataclasses.replace(run, hosts=None, workers=0)))
            with runs.hold(run.run_dir):
                train(run, interrupts)


if __name__ == "__main__":
    main()
