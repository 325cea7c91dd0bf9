"""Low-rank adapters (LoRA, 2106.09685): a large model is fine-tuned by few parameters, which are kept apart from it.

`adapt` freezes a decoder and gives its maps adapters: a map's output W x becomes W x + (alpha / rank) B A x, with A `[rank, D]`
drawn at random and B `[M, rank]` zero, so that nothing changes at first (section 4.1). Maps that the decoder computes as one
have one adapter. The rows of tokens that were added to the vocabulary are trained whole, apart from the frozen ones. `merged`
gives a plain decoder again, which decodes at the speed of any other.

An adapter is a directory:

    adapter.json           architecture and attention, rank, scale and targets, ids of the structural tokens, and the base: its
                           name and the SHA-256 of its weights
    adapter.safetensors    A, B and the new rows, in the type that the model computes in
    vocab.json             the task: how text becomes ids
    README.md              the card: how it was trained and what it scores
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from pallas_kernels import fused_linear, silu_and_mul
from selfspan_jax.config import LinearImplementation, LoraConfig, ModelConfig, from_json
from selfspan_jax.model import Decoder, Embedding, Frozen, Linear, RMSNorm
from selfspan_jax.spans import SpanVocab
from selfspan_jax.weights import huggingface
from selfspan_jax.weights.checkpoints import new_directory, read_json

_FORMAT = {"format": "selfspan adapter", "version": 1}
_FILES = ("adapter.json", "adapter.safetensors", "vocab.json")


class AdaptedLinear(nnx.Module):
    """A frozen linear map with an adapter. The adapter adds to the product, before the gate and the residual."""

    def __init__(self, linear: Linear, config: LoraConfig, rngs: nnx.Rngs):
        out_size, in_size = linear.weight.shape
        if config.rank > min(out_size, in_size):
            raise ValueError(f"rank is {config.rank}; allowed: up to {min(out_size, in_size)}, the smaller side of the smallest map")
        self.weight = Frozen(linear.weight[...])
        self.bias = nnx.data(None if linear.bias is None else Frozen(linear.bias[...]))
        self.lora_a = nnx.Param(nnx.initializers.normal(1 / math.sqrt(in_size))(rngs.params(), (config.rank, in_size), jnp.float32))
        self.lora_b = nnx.Param(jnp.zeros((out_size, config.rank), jnp.float32))
        self.scale = config.alpha / config.rank

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        norm: RMSNorm | None = None,
        residual: Float[Array, "B T M"] | None = None,
        gated: bool = False,
        implementation: LinearImplementation | None = "xla",
    ) -> Float[Array, "B T M"]:
        rows = x if norm is None else norm(x)
        out = fused_linear(rows, self.weight[...], implementation=implementation)
        low = fused_linear(rows, self.lora_a[...], implementation=implementation)
        out += self.scale * fused_linear(low, self.lora_b[...], implementation=implementation)
        if self.bias is not None:
            out += self.bias[...].astype(out.dtype)[None, None, :]
        if gated:
            out = silu_and_mul(out.reshape(-1, out.shape[-1])).reshape(*out.shape[:-1], -1)
        return out if residual is None else out + residual

    def merged(self) -> Float[Array, "M D"]:
        """W + (alpha / rank) B A: of A and B as they are in products, summed in float32, rounded as W is."""
        dtype = self.weight[...].dtype
        a, b = (matrix[...].astype(dtype).astype(jnp.float32) for matrix in (self.lora_a, self.lora_b))
        product = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
        return (self.weight[...].astype(jnp.float32) + self.scale * product).astype(dtype)


class GrownRows(nnx.Module):
    """A row for each token: frozen those of the old ones, trained those from id `first` on."""

    def __init__(self, rows: Float[Array, "V D"], first: int):
        self.rows = Frozen(rows[:first])
        self.new_rows = nnx.Param(rows[first:].astype(jnp.float32))
        self.first = first

    def scores(self, hidden: Float[Array, "*batch D"], linear: LinearImplementation | None) -> Float[Array, "*batch V"]:
        parts = (fused_linear(hidden, rows[...], out_dtype=jnp.float32, implementation=linear) for rows in (self.rows, self.new_rows))
        return jnp.concatenate([*parts], axis=-1)

    def merged(self) -> Float[Array, "V D"]:
        return jnp.concatenate([self.rows[...], self.new_rows[...].astype(self.rows[...].dtype)])


class GrownEmbedding(GrownRows):
    def __call__(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        old = self.rows[...][jnp.minimum(token_ids, self.first - 1)].astype(jnp.float32)
        new = self.new_rows[...][jnp.maximum(token_ids - self.first, 0)]
        return jnp.where((token_ids >= self.first)[:, :, None], new, old)


class GrownHead(GrownRows):
    """The output layer of a model whose embeddings are not tied."""

    def __call__(
        self, hidden: Float[Array, "*batch D"], *, out_dtype: Any, implementation: LinearImplementation | None
    ) -> Float[Array, "*batch V"]:
        return self.scores(hidden, implementation)


# --------------------------------------------------------------------------------------------------- adapting and merging


def first_new_id(vocab: SpanVocab) -> int:
    """The first of the ids that were added: `<solve>`, or the first of the other structural tokens that stand right before it."""
    first = vocab.solve_id
    while first > 1 and first - 1 in (vocab.pad_id, vocab.bos_id, vocab.eos_id):
        first -= 1
    return first


def adapt(model: Decoder, config: LoraConfig, *, seed: int = 0) -> Decoder:
    """Freezes a decoder, in place, and gives it adapters and trainable rows for the tokens that were added.

    Frozen parameters are in the compute dtype, trainable ones float32.

    Args:
      seed: of the matrices A.

    Raises: ValueError for a rank beyond the size of a map, or a model that is adapted already.
    """
    if is_adapted(model):
        raise ValueError("the model has adapters already: merge them first")
    rngs = nnx.Rngs(seed)
    first, dtype = first_new_id(model.vocab), model.config.compute_dtype
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model, nnx.Param)))
    adapted: list[tuple[Any, str, AdaptedLinear]] = []
    for layer in model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name in config.targets:
                if hasattr(owner, name):
                    adapted.append((owner, name, AdaptedLinear(getattr(owner, name), config, rngs)))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        owner = _at(model, path[:-1])
        if not isinstance(owner, Embedding):
            setattr(owner, str(path[-1]), Frozen(leaf[...]))
    grown: Any = model  # whose parts change their types from here on
    for owner, target, linear in adapted:
        setattr(owner, target, linear)
    grown.embed_tokens = GrownEmbedding(grown.embed_tokens.embedding[...], first)
    if grown.lm_head is not None:
        grown.lm_head = GrownHead(grown.lm_head.weight[...], first)
    return model


def unfrozen(model: Decoder) -> Decoder:
    """A decoder with all its parameters float32, in place, as they are when all are trained."""
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model, nnx.Param)))
    return model


def is_adapted(model: Decoder) -> bool:
    return isinstance(model.embed_tokens, GrownRows)


def merged(model: Decoder) -> Decoder:
    """A plain decoder, its parameters in the compute dtype, that computes what an adapted one does, up to their rounding.

    Raises: ValueError for a model without adapters: a second merge would be a mistake.
    """
    if not is_adapted(model):
        raise ValueError("the model has no adapters: they are merged already, or it never had any")
    abstract = nnx.eval_shape(lambda: Decoder(model.config, vocab=model.vocab, vocab_size=model.vocab_size, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(abstract, nnx.Param)
    flat = []
    for path, _ in nnx.to_flat_state(params):
        owner, leaf = _at(model, path[:-1]), str(path[-1])
        whole = isinstance(owner, GrownRows) or (isinstance(owner, AdaptedLinear) and leaf == "weight")
        flat.append((path, nnx.Param(owner.merged() if whole else getattr(owner, leaf)[...])))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def plain(model: Decoder) -> Decoder:
    """The model, merged if it is adapted."""
    return merged(model) if is_adapted(model) else model


def _at(model: Decoder, path: tuple[Any, ...]) -> Any:
    owner: Any = model
    for key in path:
        owner = owner[key] if isinstance(key, int) else getattr(owner, key)
    return owner


def fingerprint(model: Decoder) -> str:
    """SHA-256 of the frozen parameters, which are the base's (of all, in a model without adapters): names, shapes and bits."""
    digest = hashlib.sha256()
    for path, leaf in sorted(
        (_name(path), leaf) for path, leaf in nnx.to_flat_state(nnx.state(model, Frozen if is_adapted(model) else nnx.Param))
    ):
        array = np.asarray(leaf[...])
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


# -------------------------------------------------------------------------------------------------------------------- files


def save_adapter(directory: Path, model: Decoder, config: LoraConfig, base_name: str, task: dict[str, Any], card: str) -> None:
    """Writes the adapter of an adapted model, whole or not at all.

    Args:
      base_name: of the base, for people.
      task: what `vocab.json` is to say.
      card: Markdown for people.

    Raises: FileExistsError if the directory exists.
    """
    fields = {
        **_FORMAT,
        "base": {"name": base_name, "sha256": fingerprint(model)},
        "lora": dataclasses.asdict(config),
        "model": dataclasses.asdict(model.config),
        "vocab_size": model.vocab_size,
        "span_vocab": dataclasses.asdict(model.vocab),
    }
    dtype = model.config.compute_dtype
    arrays = {_name(path): leaf[...].astype(dtype) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    with new_directory(directory) as partial:
        save_file(arrays, partial / "adapter.safetensors")
        (partial / "adapter.safetensors").chmod(0o644)
        (partial / "adapter.json").write_text(json.dumps(fields, indent=2) + "\n")
        (partial / "vocab.json").write_text(json.dumps(task, indent=2) + "\n")
        (partial / "README.md").write_text(card)


def is_adapter(directory: Path) -> bool:
    return (directory / "adapter.json").is_file()


def load_adapter(directory: Path, base: Path | None) -> tuple[Decoder, dict[str, Any]]:
    """An adapter merged into its base, and what its `vocab.json` says.

    Args:
      base: the Hugging Face directory or GGUF file that it was trained on.

    Raises:
      FileNotFoundError: no such directory, or a file of it or of the base is missing.
      ValueError: a file that is not what it should be, arrays that do not fit, no base, or another base.
    """
    for file in _FILES:
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory}: not an adapter, {file} is missing")
    fields, task = read_json(directory / "adapter.json"), read_json(directory / "vocab.json")
    where = directory / "adapter.json"
    if {key: fields.get(key) for key in _FORMAT} != _FORMAT:
        raise ValueError(f"{where}: expected format {_FORMAT['format']!r} version {_FORMAT['version']}")
    if missing := {"base", "lora", "model", "vocab_size", "span_vocab"} - fields.keys():
        raise ValueError(f"{where}: {', '.join(sorted(missing))} missing")
    try:
        name, expected = fields["base"]["name"], fields["base"]["sha256"]
        config, vocab = from_json(LoraConfig, fields["lora"]), from_json(SpanVocab, fields["span_vocab"])
        model_config = from_json(ModelConfig, fields["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    if base is None:
        raise ValueError(f"{directory} is an adapter of {name}: it needs that model too (--base)")
    model = huggingface.load_decoder(base, vocab, **_changes(model_config))
    if model.config != model_config or model.vocab_size != fields["vocab_size"]:
        raise ValueError(f"{base}: another architecture than that of {name}, which {directory} is an adapter of")
    model = adapt(model, config)
    if fingerprint(model) != expected:
        raise ValueError(f"{base}: other weights than those of {name}, which {directory} is an adapter of")
    nnx.update(model, _read(directory / "adapter.safetensors", nnx.state(model, nnx.Param), model.config.compute_dtype))
    return merged(model), task


def _changes(config: ModelConfig) -> dict[str, Any]:
    """What of a config is the fine-tuning's choice and not the file's."""
    names = ("mask", "header_view", "prompt_view", "prompt_window_tokens", "remat", "compute_dtype")
    return {name: getattr(config, name) for name in names}


def _read(file: Path, like: nnx.State, dtype: str) -> nnx.State:
    wanted = {_name(path): leaf.shape for path, leaf in nnx.to_flat_state(like)}
    try:
        with safe_open(file, "flax") as found:
            names = set(found.keys())
            if wrong := sorted(wanted.keys() ^ names):
                raise ValueError(f"{file}: {wrong[0]} is {'missing' if wrong[0] in wanted else 'not of this adapter'}")
            for name, shape in wanted.items():
                slice = found.get_slice(name)
                if tuple(slice.get_shape()) != shape:
                    raise ValueError(f"{file}: {name} is {list(slice.get_shape())}, expected {list(shape)}")
            arrays = {name: found.get_tensor(name).astype(dtype).astype(jnp.float32) for name in wanted}
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file ({error})") from error
    return nnx.from_flat_state((path, nnx.Param(arrays[_name(path)])) for path, _ in nnx.to_flat_state(like))
