"""Configs of models, training, fine-tuning and decoding as frozen dataclasses, and the presets."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, cast, get_args

import jax.numpy as jnp

from selfspan_jax import spans
from selfspan_jax.attention.selectors import get_selector
from selfspan_jax.errors import UserError

T = TypeVar("T")
Implementation = Literal["reference", "xla", "triton", "mosaic", "jax_triton"]  # of the decode attention kernel
ComputeDtype = Literal["bfloat16", "float32", "float16"]
Dtype = Literal["bf16", "f32", "f16"]
COMPUTE_DTYPES: dict[Dtype, ComputeDtype] = {"bf16": "bfloat16", "f32": "float32", "f16": "float16"}  # what options call them
Mask = Literal["span", "dense", "window", "memory"]
KvMemory = Literal["device", "host"]  # where keys and values of prompts lie
WORKING_SET_TOKENS = 4096  # of each prompt, whose keys and values are on the device while all of them are in host memory
Weights = Literal["bf16", "int8"]  # precision of a decoding model: its own compute dtype, or int8 with a scale for each output
LinearImplementation = Literal["reference", "xla", "triton", "jax_triton"]  # of the linear maps
LoraTarget = Literal["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20  # likely tokens whose log-probabilities a request to a server may ask for
_MAX_INT = 2**31 - 1  # steps, positions and sizes are int32 on devices


def _require(condition: bool, config: Any, field: str, allowed: str) -> None:
    if not condition:
        raise UserError(f"{field} is {getattr(config, field)!r}; allowed: {allowed}")


def _require_number(config: Any, field: str, allows: Callable[[float], bool], allowed: str) -> None:
    value = getattr(config, field)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    _require(is_number and value <= sys.float_info.max and allows(value), config, field, allowed)  # a longer integer is no float


def _require_positive(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if isinstance(value, float):
            _require(0 < value < math.inf, config, field, "numbers above 0")
        else:
            _require(0 < value <= _MAX_INT, config, field, f"numbers above 0, up to {_MAX_INT:,}")


def _require_within(config: Any, low: int, high: int, *fields: str) -> None:
    for field in fields:
        _require(low <= getattr(config, field) <= high, config, field, f"{low} to {high:,}")


def check_kv_memory(places: Collection[KvMemory], working_set_tokens: int, mesh: str | None) -> None:
    """Raise UserError for options of decoding that do not go with where keys and values lie; a benchmark has several places."""
    if mesh and "host" in places:
        raise UserError(f"mesh is {mesh!r}, but kv_memory is 'host', which is for one device: give one of them")
    if "host" not in places and working_set_tokens != WORKING_SET_TOKENS:
        raise UserError(f"working_set_tokens is {working_set_tokens}, but kv_memory is 'device', which has no working sets: leave it out")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies (The Llama 3 Herd of Models, 2407.21783; as in its reference code).

    Wavelengths above `original_context_tokens / low_freq_factor` are stretched by `factor`, those below
    `original_context_tokens / high_freq_factor` stay, and those between are blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int

    def __post_init__(self):
        _require_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_context_tokens")
        _require(self.high_freq_factor > self.low_freq_factor, self, "high_freq_factor", f"above low_freq_factor={self.low_freq_factor}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionViews:
    """What tokens attend to in training, and in decoding by their own spans."""

    mask: Mask = "span"
    """Mask of training: what the model's own span tokens name, everything before (dense), first and recent tokens (window), or a
    segment's tokens and a memory of the segments before (memory: Infini-attention)."""
    header_view: spans.HeaderView = "span"
    """What span tokens of the response see: no more than other tokens (span), also every `<seg>` (labels), also the prompt, or all."""
    prompt_view: spans.PromptView = "local"
    """What prompt tokens see: their label, the sink and a window (local), or everything before (causal)."""
    prompt_window_tokens: int = 16
    """Width of the local prompt window, in tokens."""
    name_share: float = 1.0
    """Decoding: a step that has named a label names the first higher one with at least this share of the likeliest token's probability."""

    names_new: bool = False
    """Decoding: the first label that a step names is one that no step before it has named, so that what was read is not written again."""
    max_step_tokens: int = 0
    """Decoding: after so many tokens of a step, its sources counted, only a `<seg>` or `<eos>` may follow; 0: no limit."""

    def __post_init__(self):
        _require_number(self, "name_share", lambda value: 0 < value <= 1, "numbers above 0, up to 1")
        _require(self.mask in get_args(Mask), self, "mask", ", ".join(get_args(Mask)))
        spans.check_views(self.header_view, self.prompt_view, self.prompt_window_tokens)
        _require_within(self, 1, _MAX_INT, "prompt_window_tokens")
        _require_within(self, 0, _MAX_INT, "max_step_tokens")


@dataclasses.dataclass(frozen=True)
class ModelConfig(AttentionViews):
    """A Llama-like decoder and the attention it is trained with."""

    hidden_size: int
    """D, width of the residual stream."""
    intermediate_size: int
    """F, width of the feed-forward layer."""
    num_layers: int
    """Blocks of attention and feed-forward layer."""
    num_heads: int
    """N, query heads."""
    num_kv_heads: int
    """K, key and value heads; a divisor of num_heads."""
    head_size: int = 64
    """H, features of each head."""
    max_context_tokens: int = 2048
    """Longest sequence, prompt and response together, that decoding accepts."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square that an RMSNorm divides by the root of."""
    rope_scaling: RopeScaling | None = None
    """None, or Llama 3's scaling of the rotary frequencies."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen 2)."""
    output_bias: bool = False
    """A bias on the attention's output projection."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys before their rotation (Qwen 3)."""
    tie_embeddings: bool = True
    """Share the input embedding with the output layer."""
    compute_dtype: ComputeDtype = "bfloat16"
    """Type of activations and matrix products; parameters are float32."""
    remat: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about 30% more time."""
    attention_memory: Literal["delta", "linear"] = "delta"
    """With --mask memory: a segment adds what its keys do not recall yet (delta), or its values as they are (linear)."""
    memory_segment_tokens: int = 128
    """With --mask memory: tokens of a segment, which attend to each other and recall the segments before."""

    def __post_init__(self):
        _require_positive(self, "memory_segment_tokens")
        _require(self.attention_memory in ("delta", "linear"), self, "attention_memory", "delta, linear")
        _require_positive(self, "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_size")
        _require_positive(self, "max_context_tokens", "rope_theta", "rms_norm_eps")
        _require(self.num_heads % self.num_kv_heads == 0, self, "num_kv_heads", f"divisors of num_heads={self.num_heads}")
        _require(self.head_size % 2 == 0, self, "head_size", "even numbers (rotary positions turn pairs)")
        _require(self.compute_dtype in get_args(ComputeDtype), self, "compute_dtype", ", ".join(get_args(ComputeDtype)))
        super().__post_init__()

    @property
    def row_bytes(self) -> int:
        """Bytes that keys and values of a token take in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * jnp.dtype(self.compute_dtype).itemsize


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of training: AdamW, linear warm-up and cosine decay, gradients clipped by their global norm."""

    steps: int
    """Optimizer steps of the whole run. May change when a run goes on; the learning rate then follows the new schedule."""
    seed: int = 0
    """Seed of the initial parameters, the data order and the position gaps, 0 to 2^63 - 1."""
    batch_size: int = 64
    """Rows of an optimizer step, over all accumulation steps and devices."""
    sequence_tokens: int = 512
    """T, tokens of a row, into which several examples are packed."""
    accumulation_steps: int = 1
    """Parts of a batch, computed one after the other: less memory, the same gradient."""
    data_parts: int = 1
    """Parts of a batch's rows, each packed from examples of its own: a multiple of the hosts, each of which reads its parts."""
    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises to its peak; in a run shorter than twice that, a tenth of its steps."""
    final_learning_rate_fraction: float = 0.02
    """Learning rate of the last step, as a fraction of the peak."""
    weight_decay: float = 0.05
    """Weight decay of the layers' matrices; norms and embeddings are not decayed."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients, a step."""
    beta2: float = 0.98
    """AdamW's decay of the mean of squared gradients, a step."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    source_weight: float = 1.0
    """How many times the choice among sources (<ref:k>) counts: where responses are mostly text, choosing is learnt from few tokens."""
    end_weight: float = 1.0
    """How many times the loss of the end (<eos>) counts: above 1, responses end where they might as well go on."""
    gap_scales: tuple[int, ...] = (0, 1, 4, 16, 64)
    """Where a piece of the text begins (<seg>) its rotary position jumps by up to twice one of these scales; 0 alone for no gaps."""
    checkpoint_every_steps: int = 1000
    """Steps between checkpoints; the last step and an interrupted one are saved too."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept, the latest ones."""
    eval_every_steps: int = 1000
    """Steps between evaluations; the last step is evaluated too."""
    eval_examples: int = 128
    """Held-out examples decoded and scored at each evaluation; 0 for no evaluation."""
    log_every_steps: int = 20
    """Steps between lines of the log, which has the loss of one step and the speed of all since the last line."""

    CHANGEABLE: ClassVar = ("steps", "checkpoint_every_steps", "keep_checkpoints", "eval_every_steps", "eval_examples", "log_every_steps")
    """What may change when a run goes on; everything else decides its result, and is part of what a run is."""

    def __post_init__(self):
        _require_positive(self, "steps", "batch_size", "sequence_tokens", "accumulation_steps", "data_parts", "learning_rate", "clip_norm")
        _require_positive(self, "source_weight", "end_weight")
        _require_positive(self, "checkpoint_every_steps", "keep_checkpoints", "eval_every_steps", "log_every_steps")
        _require_within(self, 0, MAX_SEED, "seed")
        _require_within(self, 0, _MAX_INT, "eval_examples", "warmup_steps")
        _require(self.batch_size % self.accumulation_steps == 0, self, "accumulation_steps", f"divisors of batch_size={self.batch_size}")
        _require(self.batch_size % self.data_parts == 0, self, "data_parts", f"divisors of batch_size={self.batch_size}")
        _require(0 <= self.final_learning_rate_fraction <= 1, self, "final_learning_rate_fraction", "0 to 1")
        _require(0 <= self.beta1 < 1, self, "beta1", "0 to below 1")
        _require(0 <= self.beta2 < 1, self, "beta2", "0 to below 1")
        _require(0 <= self.weight_decay < math.inf, self, "weight_decay", "0 and above")
        _require(bool(self.gap_scales), self, "gap_scales", "one or more numbers, 0 for no gaps")
        _require(all(0 <= scale <= 2**20 for scale in self.gap_scales), self, "gap_scales", f"numbers from 0 to {2**20:,}")

    @property
    def warmup(self) -> int:
        """The steps of warm-up that a run of this length has."""
        return self.warmup_steps if 2 * self.warmup_steps <= self.steps else self.steps // 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedAttention(AttentionViews):
    """The attention that an imported model is fine-tuned with, and decodes with from then on."""

    prompt_view: spans.PromptView = "causal"
    """What prompt tokens see: everything before, as in pretraining (causal), or their label, the sink and a window (local)."""
    remat: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about 30% more time."""

    def __post_init__(self):
        super().__post_init__()
        _require(self.mask != "memory", self, "mask", "span, dense, window: a pretrained model's layers have no memory")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, 2106.09685): to each map's product W x they add (alpha / rank) B A x."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """Scale of the adapters, times the rank."""
    targets: tuple[LoraTarget, ...] = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    """Linear maps that get an adapter. Query, key and value are one map with one adapter; so are gate and up."""

    def __post_init__(self):
        _require(type(self.rank) is int and 0 < self.rank <= _MAX_INT, self, "rank", "whole numbers above 0")
        _require_positive(self, "alpha")
        known = get_args(LoraTarget)
        _require(bool(self.targets) and set(self.targets) <= {*known}, self, "targets", f"one or more of {', '.join(known)}")
        _require(len(self.targets) == len(set(self.targets)), self, "targets", "each once")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen; each as `transformers` defines it, and in its order: penalty, temperature, top_k, top_p, min_p."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the most likely tokens whose probabilities add up to this; at least from the most likely one."""
    top_k: int = 0
    """Draw from so many of the most likely tokens, and from those as likely as the last of them; 0: from all."""
    min_p: float = 0.0
    """Draw from the tokens that are at least this times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that stand in the prompt or response, and multiplies negative ones. Above 1: fewer repetitions.
    Span tokens (<seg>, <ref>) are exempt, because naming a label again is how a response reads it again."""

    def __post_init__(self):
        _require_number(self, "temperature", lambda value: 0 <= value < math.inf, "numbers from 0")
        _require(type(self.top_k) is int and self.top_k >= 0, self, "top_k", "whole numbers from 0")
        _require_number(self, "top_p", lambda value: 0 < value <= 1, "numbers above 0, up to 1")
        _require_number(self, "min_p", lambda value: 0 <= value <= 1, "numbers from 0 to 1")
        _require_number(self, "repetition_penalty", lambda value: 0 < value < math.inf, "numbers above 0")


class SamplingFields(NamedTuple):
    """The fields of `Sampling`, of `top_p` what it leaves out: numbers that float32 has, or an array [B] of each sequence's own.

    None where none asks for it.
    """

    temperature: Any  # 0 takes the most likely token
    outside: Any
    top_k: Any
    min_p: Any
    repetition_penalty: Any

    @classmethod
    def of(cls, sampling: Sampling | SamplingFields) -> SamplingFields:
        """Write settings as numbers; fields stay as they are."""
        if isinstance(sampling, SamplingFields):
            return sampling
        penalty = None if sampling.repetition_penalty == 1 else normal_float32(sampling.repetition_penalty)
        if sampling.temperature == 0:
            return cls(None, None, None, None, penalty)
        outside = 1 - sampling.top_p or None
        return cls(normal_float32(sampling.temperature), outside, min(sampling.top_k, 2**31 - 1) or None, sampling.min_p or None, penalty)

    def columns(self) -> SamplingFields:
        """Return arrays [B or 1, 1], beside which logits [B, V] fit."""
        dtypes = SamplingFields(jnp.float32, jnp.float32, jnp.int32, jnp.float32, jnp.float32)
        return SamplingFields(*(x if x is None else jnp.asarray(x, dtype).reshape(-1, 1) for x, dtype in zip(self, dtypes)))


def normal_float32(number: float) -> float:
    """Bound a positive number so that it and its reciprocal are normal in float32: others would count as 0 or as infinite."""
    smallest = float(jnp.finfo(jnp.float32).tiny)
    return min(max(number, smallest), 1 / smallest)


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How an engine decodes."""

    attention: str | Hashable = "span"
    """A policy (`selfspan_jax.attention.policies`) or its name."""
    max_new_tokens: int = 256
    """M, tokens that there is room for after each prompt."""
    sampling: Sampling = Sampling()
    prefill_tokens: int = 16_384
    """Prompt tokens, over the batch, that go through the model at once, or the next more that divide the prompts; at least 128 of each."""
    prefill: str | Hashable = "dense"
    """Of causal prompts: "dense", "sample", "blocks", or a selector of the tiles to read (`selfspan_jax.attention.selectors`)."""
    implementation: Implementation | None = None
    """Of the decode attention kernel; None chooses the best that the device has."""
    linear: LinearImplementation | None = None
    """Of a decode step's linear maps; None chooses the fastest that the device has for the batch size. Prefill uses "xla"."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end a sequence beside the vocabulary's `<eos>`: a pretrained model may have several ends of text."""

    @property
    def bookkeeping(self) -> Literal["jax_triton"] | None:
        """Return the implementation of `pallas_kernels.per_sequence`: that of the attention if it is Triton's own, else the fastest."""
        return "jax_triton" if self.implementation == "jax_triton" else None

    def __post_init__(self):
        _require_positive(self, "max_new_tokens", "prefill_tokens")
        get_selector(self.prefill)


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """How many requests share one running decode state, and its memory."""

    num_sequences: int = 64
    """Sequences that decode at the same time; more wait."""
    context_tokens: int | None = None
    """Of each sequence, prompt and response; by default the model's context."""
    page_tokens: int = 64
    """Rows of the cache that a sequence gets, shares and gives back at once; a multiple of 8."""
    num_pages: int | None = None
    """Pages of the cache; by default as many as fit into memory, at most those of all sequences at full length."""
    chunk_tokens: int = 32
    """Decode steps between two looks of the host: what a stream waits for, and how long a cancelled sequence goes on."""
    prefill_tokens: int = 1024
    """Most prompt tokens that are read between two chunks of decode steps, which is how long a new prompt holds up the others."""
    min_read_tokens: int = 64
    """Fewest tokens that are read of one prompt at once. More need fewer programs, and let fewer short prompts be read together."""
    reads_per_chunk: int | None = 1
    """Times that so many are read between two chunks; None: all of several that are admitted at once, where nobody watches a stream."""
    max_queue: int = 256
    """Requests that wait, beside those that have a place; more are refused."""

    def __post_init__(self):
        _require_positive(self, "num_sequences", "page_tokens", "chunk_tokens", "prefill_tokens", "min_read_tokens", "max_queue")
        for name in ("context_tokens", "num_pages", "reads_per_chunk"):
            if getattr(self, name) is not None:
                _require_positive(self, name)
        _require(self.page_tokens % 8 == 0, self, "page_tokens", "multiples of 8")
        for name in ("prefill_tokens", "min_read_tokens"):
            _require(getattr(self, name) % 64 == 0, self, name, "multiples of 64")

    @property
    def max_requests(self) -> int:
        """Requests that are there at once, those that have a place and those that wait; more are refused."""
        return self.num_sequences + self.max_queue


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Where a server listens, whom it lets in, and how much it takes on at once."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is all of the machine's."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    api_key: str | None = None
    """What requests to /v1 must bear; by default what SELFSPAN_API_KEY says, which other users of the machine do not see."""
    model_name: str | None = None
    """What clients call the model; by default the name of the checkpoint."""
    slots: int | None = None
    """Sequences that decode at the same time; more wait. Default: 64, on a CPU 2."""
    context_tokens: int | None = None
    """Of each sequence, prompt and response; by default the model's context."""
    num_pages: int | None = None
    """Pages of the cache, of 64 tokens, with rows in host memory an eighth of --prefill-tokens; by default as many as fit into memory."""
    chunk_tokens: int | None = None
    """Decode steps between two looks of the host: text comes so many tokens at a time. Default: 32, for long steps, as on a CPU, 4."""
    prefill_tokens: int | None = None
    """Most prompt tokens that are read between two chunks of steps: so long it holds up the others. Default: 1024, on a CPU 256."""
    max_queue: int = ServingConfig.max_queue
    """Requests that wait, beside those that have a slot; more are refused with status 429."""

    def __post_init__(self):
        _require_within(self, 0, 65535, "port")
        _require(self.api_key is None or bool(self.api_key.strip()), self, "api_key", "text that is not blank")
        if self.slots is not None:
            _require_positive(self, "slots")
        self.serving  # noqa: B018  # raises for what is wrong with it

    @property
    def serving(self) -> ServingConfig:
        """What the scheduler needs."""
        return self._on(ServingConfig())

    @property
    def serving_on_cpu(self) -> ServingConfig:
        """The same for a CPU: it computes prompts that are read together one after the other, so one number of tokens is compiled."""
        config = self._on(ServingConfig(num_sequences=2, chunk_tokens=4, prefill_tokens=256))
        return dataclasses.replace(config, min_read_tokens=config.prefill_tokens)

    def _on(self, defaults: ServingConfig) -> ServingConfig:
        names = ("context_tokens", "num_pages", "chunk_tokens", "prefill_tokens", "max_queue")
        given = {"num_sequences": self.slots, **{name: getattr(self, name) for name in names}}
        return dataclasses.replace(defaults, **{name: value for name, value in given.items() if value is not None})


def from_json(config_type: type[T], values: dict) -> T:
    """Build a config from the JSON of its `dataclasses.asdict`.

    Raises: UserError for unknown or missing keys, or values that the config does not allow.
    """
    name = config_type.__name__
    if not isinstance(values, dict):
        raise UserError(f"{name}: expected an object, found {type(values).__name__}")
    fields = {field.name for field in dataclasses.fields(cast(Any, config_type))}
    if unknown := sorted(values.keys() - fields):
        raise UserError(f"{name}: unknown {', '.join(unknown)}; known are {', '.join(sorted(fields))}")
    if missing := sorted(fields - values.keys()):
        raise UserError(f"{name}: {', '.join(missing)} missing")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if isinstance(values.get("rope_scaling"), dict):
        values["rope_scaling"] = from_json(RopeScaling, values["rope_scaling"])
    try:
        return config_type(**values)
    except TypeError as error:
        raise UserError(f"{name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model, its training, and the task and corpus that it is trained on."""

    task: str
    """Name of the task."""
    corpus: Mapping[str, Any]
    """Settings of the task's corpus that differ from its defaults."""
    model: ModelConfig
    training: TrainConfig


@dataclasses.dataclass(frozen=True)
class TuningPreset:
    """How an imported model is fine-tuned on a task."""

    corpus: Mapping[str, Any]
    """Settings of the task's corpus that differ from its defaults."""
    attention: TunedAttention
    training: TrainConfig


# Positions of the arithmetic presets reach 4,000 by way of the gaps: the length of 200 operators, nine times that of their rows.
_FAR = (0, 1, 4, 16, 64, 512)
_SMALL = ModelConfig(hidden_size=512, intermediate_size=1536, num_layers=8, num_heads=8, num_kv_heads=4)

PRESETS = {
    "arithmetic-tiny": Preset(
        "arithmetic",
        {"max_ops": 12},
        ModelConfig(hidden_size=256, intermediate_size=512, num_layers=8, num_heads=4, num_kv_heads=2),
        TrainConfig(steps=8_000, batch_size=64, learning_rate=2e-3, gap_scales=_FAR, eval_every_steps=4_000),
    ),
    "arithmetic-small": Preset(
        "arithmetic",
        {},
        dataclasses.replace(_SMALL, max_context_tokens=8192),
        TrainConfig(steps=5_000, batch_size=128, learning_rate=1e-3, gap_scales=_FAR, eval_every_steps=2_500),
    ),
    "arithmetic-base": Preset(
        "arithmetic",
        {},
        ModelConfig(hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12, num_kv_heads=12, max_context_tokens=8192),
        TrainConfig(steps=6_000, batch_size=256, learning_rate=6e-4, warmup_steps=500, gap_scales=_FAR, eval_every_steps=2_000),
    ),
    # For several devices, fsdp say: the sizes of Llama 3.2 1B (its config.json) but for the vocabulary. Not trained yet.
    "arithmetic-1b": Preset(
        "arithmetic",
        {},
        ModelConfig(
            hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8, max_context_tokens=8192, remat=True
        ),
        TrainConfig(steps=6_000, batch_size=512, learning_rate=3e-4, warmup_steps=1_000, gap_scales=_FAR, eval_every_steps=2_000),
    ),
    # Choosing sources reads the whole article, and articles are read causally, so positions need no gaps.
    "news-small": Preset(
        "news",
        {},
        dataclasses.replace(_SMALL, header_view="all", prompt_view="causal"),
        TrainConfig(steps=6_000, batch_size=64, sequence_tokens=1024, gap_scales=(0,), eval_every_steps=2_000),
    ),
}

# Without position gaps: the rotary positions of an imported model are trained far beyond its rows here.
_TUNING = TrainConfig(steps=1_500, learning_rate=2e-4, warmup_steps=100, gap_scales=(0,), eval_every_steps=500)

# Long documents: sources are chosen by a table of contents, and rows have room for most documents.
_LONG = TuningPreset({}, TunedAttention(header_view="labels"), dataclasses.replace(_TUNING, sequence_tokens=8192, batch_size=8))

TUNING_PRESETS = {
    "arithmetic": TuningPreset({"num_labels": 64, "label_jumps": 0, "jumps_at": "any"}, TunedAttention(), _TUNING),
    # Articles are longer, and choosing sources reads all of them.
    "news": TuningPreset({}, TunedAttention(header_view="all"), dataclasses.replace(_TUNING, sequence_tokens=1024, batch_size=32)),
    **dict.fromkeys(("documents", "papers", "verdicts", "stories", "tools"), _LONG),
}


def tuning_preset(task: str, *, adapters: bool) -> TuningPreset:
    """Return how a model is fine-tuned on a task; adapters take a higher learning rate than all parameters, and do not decay."""
    preset = TUNING_PRESETS.get(task, TuningPreset({}, TunedAttention(), _TUNING))
    if not adapters:
        return preset
    return dataclasses.replace(preset, training=dataclasses.replace(preset.training, learning_rate=1e-3, weight_decay=0.0))
