"""Low-rank adapters (LoRA, 2106.09685): fine-tune a large model by few parameters, which are stored apart from it.

`adapt` freezes a decoder and adds adapters to its linear maps: W x becomes W x + (alpha / rank) B A x, with A `[rank, D]` random
and B `[M, rank]` zero, so that nothing changes at first (section 4.1). Fused maps have one adapter. The embeddings of tokens that
were added to the vocabulary are trained in full, apart from the frozen ones. `merged` returns a plain decoder, which decodes at
the speed of any other.

An adapter is a directory:

    adapter.json           architecture and attention, rank, scale and targets, ids of the structural tokens, and the base: its
                           name and the SHA-256 of its weights
    adapter.safetensors    A, B and the new rows, in the compute dtype
    vocab.json.gz          the task: how text becomes ids
    README.md              the card: how it was trained and what it scores
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import fused_linear, look_up, silu_and_mul
from selfspan_jax.config import LinearImplementation, LoraConfig, ModelConfig, TunedAttention, from_json
from selfspan_jax.errors import UserError
from selfspan_jax.model import Decoder, Frozen, Linear, RMSNorm
from selfspan_jax.weights.importing import load_decoder
from selfspan_jax.weights.models import Format, Tensors, abstract_decoder


class AdaptedLinear(nnx.Module):
    """A frozen linear map with an adapter, which is added to the product, before the gate and the residual."""

    def __init__(self, linear: Linear, config: LoraConfig, rngs: nnx.Rngs):
        out_size, in_size = linear.weight.shape
        if config.rank > min(out_size, in_size):
            raise UserError(f"rank is {config.rank}; allowed: up to {min(out_size, in_size)}, the smaller side of the smallest map")
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
        next_norm: RMSNorm | None = None,  # of no use here
        residual: Float[Array, "B T M"] | None = None,
        gated: bool = False,
        early: Literal[False] = False,  # what reads the result may be a kernel of XLA
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
        """Compute W + (alpha / rank) B A, with A and B rounded as in products, summed in float32, rounded to W's dtype."""
        dtype = self.weight[...].dtype
        a, b = (matrix[...].astype(dtype).astype(jnp.float32) for matrix in (self.lora_a, self.lora_b))
        product = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
        return (self.weight[...].astype(jnp.float32) + self.scale * product).astype(dtype)


class ExtendedRows(nnx.Module):
    """An embedding or output layer: frozen rows of the old tokens, trained ones from id `first` on."""

    def __init__(self, rows: Float[Array, "V D"], first: int):
        self.rows = Frozen(rows[:first])
        self.new_rows = nnx.Param(rows[first:].astype(jnp.float32))
        self.first = first

    def look_up(self, token_ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """Look tokens up, rounded to `dtype`."""
        old = self.rows[...][jnp.minimum(token_ids, self.first - 1)].astype(dtype)
        new = look_up(self.new_rows[...], jnp.maximum(token_ids - self.first, 0), jnp.dtype(dtype))
        return jnp.where((token_ids >= self.first)[:, :, None], new, old)

    def scores(self, hidden: Float[Array, "*batch D"], linear: LinearImplementation | None) -> Float[Array, "*batch V"]:
        """Compute logits, float32."""
        parts = (fused_linear(hidden, rows[...], out_dtype=jnp.float32, implementation=linear) for rows in (self.rows, self.new_rows))
        return jnp.concatenate([*parts], axis=-1)

    def merged(self) -> Float[Array, "V D"]:
        """Join old and new rows, in the dtype of the old ones."""
        return jnp.concatenate([self.rows[...], self.new_rows[...].astype(self.rows[...].dtype)])


def adapt(model: Decoder, config: LoraConfig, *, seed: int = 0) -> Decoder:
    """Return a copy of a decoder with its parameters frozen, and with adapters and trainable rows for the added tokens.

    Frozen parameters are in the compute dtype, trainable ones float32. The first added token is `<solve>`, or the first of the
    structural tokens right before it.

    Args:
      seed: seed of the matrices A.

    Raises: UserError for a rank beyond the size of a map, or a model that is adapted already, or int8.
    """
    first, vocab = model.vocab.solve_id, model.vocab
    while first > 1 and first - 1 in (vocab.pad_id, vocab.bos_id, vocab.eos_id):
        first -= 1
    adapted: Any = model.astype(model.config.compute_dtype)  # its modules change their types from here on
    adapted.adapters = config
    rngs = nnx.Rngs(seed)
    for layer in adapted.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name in config.targets:
                if hasattr(owner, name):
                    setattr(owner, name, AdaptedLinear(getattr(owner, name), config, rngs))
    adapted.embed_tokens = ExtendedRows(adapted.embed_tokens.embedding[...], first)
    if adapted.lm_head is not None:
        adapted.lm_head = ExtendedRows(adapted.lm_head.weight[...], first)
    for path, leaf in nnx.to_flat_state(nnx.state(adapted, nnx.Param)):
        if path[-1] not in ("lora_a", "lora_b", "new_rows"):
            setattr(_at(adapted, path[:-1]), str(path[-1]), Frozen(leaf[...]))
    return adapted


def merged(model: Decoder) -> Decoder:
    """Merge the adapters: return a plain decoder, its parameters in the compute dtype, that differs by their rounding only.

    Raises: UserError for a model without adapters: a second merge would be a mistake.
    """
    _check_adapted(model)
    graph, params = nnx.split(abstract_decoder(model.config, model.vocab, model.vocab_size), nnx.Param)
    flat = []
    for path, _ in nnx.to_flat_state(params):
        owner, leaf = _at(model, path[:-1]), str(path[-1])
        changed = isinstance(owner, ExtendedRows) or (isinstance(owner, AdaptedLinear) and leaf == "weight")
        flat.append((path, nnx.Param(owner.merged() if changed else getattr(owner, leaf)[...])))
    whole = nnx.merge(graph, nnx.from_flat_state(flat))
    whole.stop_ids = model.stop_ids
    return whole


def _check_adapted(model: Decoder) -> None:
    if model.adapters is None:
        raise UserError("the model has no adapters: they are merged already, or it never had any")


def plain(model: Decoder) -> Decoder:
    """Merge a model if it is adapted."""
    return model if model.adapters is None else merged(model)


def _at(model: Decoder, path: tuple[Any, ...]) -> Any:
    owner: Any = model
    for key in path:
        owner = owner[key] if isinstance(key, int) else getattr(owner, key)
    return owner


def fingerprint(model: Decoder) -> str:
    """Compute the SHA-256 of the base's parameters: names, shapes and bits of the frozen ones, or of all if there are no adapters."""
    digest = hashlib.sha256()
    for name, leaf in sorted(_named(model, nnx.Param if model.adapters is None else Frozen).items()):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _named(model: Decoder, kind: type[nnx.Variable]) -> dict[str, Array]:
    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, kind))}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


_ADAPTER = Format("selfspan adapter", "adapter.json", "adapter.safetensors")


def _rounded(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a config, numbers as float32 has them: a GGUF file keeps no more of them than that."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(inner) for name, inner in value.items()}
        return float(np.float32(value)) if isinstance(value, float) else value

    return rounded(dataclasses.asdict(config))


def save_adapter(
    directory: str | Path, model: Decoder, config: LoraConfig, base_name: str, task: dict[str, Any], card: str, *, replace: bool = False
) -> None:
    """Write the adapter of an adapted model, atomically; see `models.save_model`.

    Args:
      config: that which the model was adapted with.
      base_name: name of the base, shown to users.

    Raises: FileExistsError; UserError for a model without adapters, or with others than those of `config`.
    """
    _check_adapted(model)
    own, given = dataclasses.asdict(model.adapters), dataclasses.asdict(config)  # type: ignore[arg-type]  # checked
    if different := [name for name in own if own[name] != given[name]]:
        raise UserError(f"{different[0]} is {given[different[0]]!r}, but the model was adapted with {own[different[0]]!r}")
    arrays = {name: leaf.astype(model.config.compute_dtype) for name, leaf in _named(model, nnx.Param).items()}
    base = {"name": base_name, "sha256": fingerprint(model)}
    _ADAPTER.write(Path(directory), model, arrays, task, card, replace=replace, base=base, lora=dataclasses.asdict(config))


def is_adapter(directory: Path) -> bool:
    """Return whether this is the directory of an adapter."""
    return (directory / "adapter.json").is_file()


def load_adapter(directory: Path, base: str | Path | None) -> tuple[Decoder, dict[str, Any]]:
    """Load an adapter, merged into its base, and its `vocab.json`.

    Args:
      base: the model that it was trained on: a Hugging Face directory or hub id, a GGUF file, or a finished model.

    Raises:
      FileNotFoundError: no such directory, or a file of it or of the base is missing.
      UserError: a malformed file, tensors that do not fit, no base, or another base.
    """
    stored, tensors, task, name, expected, config = _open(directory)
    wanted = stored.config
    if base is None:
        raise UserError(f"{directory} is an adapter of {name}: it needs that model too (--base)")
    tuned = ("compute_dtype", *(field.name for field in dataclasses.fields(TunedAttention)))  # what fine-tuning chose, not the base
    model = load_decoder(base, stored.vocab, **{name: getattr(wanted, name) for name in tuned})
    if _rounded(model.config) != _rounded(wanted):
        raise UserError(f"{base}: another architecture than that of {name}, which {directory} is an adapter of")
    if model.vocab_size != stored.vocab_size:
        sizes = f"{model.vocab_size} tokens with those of the adapter, {name} {stored.vocab_size}"
        raise UserError(f"{base}: {sizes}; an export has the span tokens as rows of its own and is no base: give the model that it is of")
    model = adapt(model, config)
    if fingerprint(model) != expected:
        raise UserError(f"{base}: other weights than those of {name}, which {directory} is an adapter of")
    _read(model, tensors, wanted.compute_dtype)
    return merged(model), task


def begin_with(model: Decoder, directory: Path) -> dict[str, str]:
    """Give an adapted decoder the matrices and rows of an adapter, and return its name and the SHA-256 of its tensors' file.

    Raises:
      FileNotFoundError: no such directory, or a file of it is missing.
      UserError: a malformed file, an adapter of another base, rank, scale, targets or labels, or a model without adapters.
    """
    _check_adapted(model)
    stored, tensors, _, name, expected, config = _open(directory)
    if config != model.adapters:
        differ = {name: value for name, value in dataclasses.asdict(config).items() if value != getattr(model.adapters, name)}
        options = (f"--{name} {' '.join(value) if isinstance(value, tuple) else f'{value:g}'}" for name, value in differ.items())
        raise UserError(f"{directory}: its adapters are not like those to train: give {' '.join(options)}")
    if stored.vocab != model.vocab or fingerprint(model) != expected:
        raise UserError(f"{directory}: an adapter of {name} with {stored.vocab.num_labels} labels, not of the model that is trained")
    _read(model, tensors, stored.config.compute_dtype)
    return {"name": directory.name, "sha256": hashlib.sha256((directory / _ADAPTER.tensors).read_bytes()).hexdigest()}


def _open(directory: Path) -> tuple[Decoder, Tensors, dict[str, Any], str, str, LoraConfig]:
    """Open an adapter: what `Format.open` returns, and the name of its base, the SHA-256 of that one's weights, and its config."""
    stored, tensors, task, fields = _ADAPTER.open(directory, "base", "lora")
    try:
        return stored, tensors, task, fields["base"]["name"], fields["base"]["sha256"], from_json(LoraConfig, fields["lora"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / _ADAPTER.description}: {error}") from error


def _read(model: Decoder, tensors: Tensors, dtype: str) -> None:
    """Read the trainable parameters of an adapted decoder, rounded as they are stored."""
    tensors.check(_named(model, nnx.Param))

    def read(path: tuple[Any, ...], leaf: nnx.Variable) -> nnx.Variable:
        return leaf.replace(tensors.read(_name(path)).astype(dtype).astype(jnp.float32))

    nnx.update(model, nnx.map_state(read, nnx.state(model, nnx.Param)))
