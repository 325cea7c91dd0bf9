"""Hugging Face directories: opened as a source of a pretrained model, and exported.

No PyTorch, no pickle, no remote code: safetensors (single or sharded) and JSON are read as data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfspan_jax.config import ModelConfig, RopeScaling
from selfspan_jax.errors import UserError
from selfspan_jax.files import new_directory, read_json, write_json
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab
from selfspan_jax.weights.models import METADATA, Tensors, open_safetensors, save_safetensors, to_llama
from selfspan_jax.weights.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # known values of `model_type`; SmolLM and many others are llama
_SIZES = {  # fields of `config.json`, and what ModelConfig calls them
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_size",
    "max_position_embeddings": "max_context_tokens",
    "rms_norm_eps": "rms_norm_eps",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A pretrained model in files, of which only names and shapes have been read."""

    config: ModelConfig
    vocab_size: int
    """Rows of its embedding."""
    tensors: Tensors
    """Under Llama's names and layout."""
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]

    @classmethod
    def of(cls, fields: Mapping[str, Any], tensors: Tensors, load_tokenizer: Callable[[], PreTrainedTokenizerBase]) -> Source:
        """Make a source from the fields of a Hugging Face config. Raises UserError for fields that `model_config` refuses."""
        try:
            config = model_config({"tie_word_embeddings": "lm_head.weight" not in tensors.shapes, **fields})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{tensors.where}: {error}") from error
        return cls(config, fields["vocab_size"], tensors, load_tokenizer)


def open_source(path: Path) -> Source:
    """Open a Hugging Face directory.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: a malformed file, or an architecture that the decoder does not have.
    """
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json")
    return Source.of(read_json(path / "config.json"), _open_shards(path), lambda: load_tokenizer(path))


def _open_shards(directory: Path) -> Tensors:
    index, names = directory / "model.safetensors.index.json", ["model.safetensors"]
    by_name: dict[str, str] | None = None
    if index.is_file():
        by_name = read_json(index).get("weight_map")
        if not isinstance(by_name, dict):
            raise UserError(f"{index}: weight_map missing")
        names = sorted(set(by_name.values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: shard {name!r} lies outside the directory")
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory}: {name} is missing")
    tensors = open_safetensors(directory, [directory / name for name in names])
    if by_name is not None and (absent := sorted(by_name.keys() - tensors.shapes.keys())):
        raise UserError(f"{index}: {len(absent)} tensors are in no shard, {absent[0]} among them")
    return tensors


def export(directory: str | Path, model: Decoder, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a Hugging Face directory that `AutoModelForCausalLM.from_pretrained` loads, atomically.

    `transformers` attends densely: it ignores spans, and structural tokens are special tokens like any other.

    Raises: FileExistsError if the directory exists; UserError for an architecture that Hugging Face has no name for, or a
      quantised or adapted model.
    """
    fields, arrays = to_hugging_face(model.config, model.vocab, model.vocab_size), to_llama(model)
    with new_directory(Path(directory)) as partial:
        save_safetensors(partial / "model.safetensors", arrays, METADATA)
        write_json(partial / "config.json", fields)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Convert a Hugging Face `config.json` to the architecture it describes, attending densely.

    Raises: UserError for an architecture, an activation or a scaling of rotary positions that the decoder does not have.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    kind = fields.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"model_type is {kind!r}; known are {', '.join(MODEL_TYPES)}")
    if missing := {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"} - fields.keys():
        raise UserError(f"{', '.join(sorted(missing))} missing")
    if (activation := fields.get("hidden_act", "silu")) != "silu":
        raise UserError(f"hidden_act is {activation!r}; known is silu")
    if fields.get("mlp_bias"):
        raise UserError("mlp_bias is true; the feed-forward layers here have none")
    rope = fields.get("rope_parameters") or {**(fields.get("rope_scaling") or {}), "rope_theta": fields.get("rope_theta")}
    biased = bool(fields.get("attention_bias"))
    num_heads = fields["num_attention_heads"]
    defaults = {"num_key_value_heads": num_heads, "head_dim": fields["hidden_size"] // num_heads}
    fields = {**defaults, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, **fields}
    sizes = {ours: fields[theirs] for theirs, ours in _SIZES.items()}
    if kind == "mistral" or fields.get("use_sliding_window"):  # within the window attention is dense
        sizes["max_context_tokens"] = min(sizes["max_context_tokens"], fields.get("sliding_window") or sizes["max_context_tokens"])
    return ModelConfig(
        **sizes,
        rope_theta=float(rope.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope),
        qkv_bias=biased or kind == "qwen2",
        output_bias=biased and kind != "qwen2",
        qk_norm=kind == "qwen3",
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        compute_dtype="float32" if fields.get("dtype", fields.get("torch_dtype")) == "float32" else "bfloat16",
        mask="dense",
        header_view="all",
        prompt_view="causal",
    )


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"rope scaling is of type {kind!r}; known are default and llama3")
    original = rope["original_max_position_embeddings"]
    return RopeScaling(float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), int(original))


def to_hugging_face(config: ModelConfig, vocab: SpanVocab, vocab_size: int) -> dict[str, Any]:
    """Convert a config to the `config.json` from which `transformers` builds the same decoder, attending densely."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias and not config.output_bias else "llama"
    if config.qk_norm and config.qkv_bias != config.output_bias:
        raise UserError("no known architecture has q and k norms and a bias on one of the attention's projections only")
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor}
        rope |= {"high_freq_factor": scaling.high_freq_factor, "original_max_position_embeddings": scaling.original_context_tokens}
    fields = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "hidden_act": "silu",
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,  # for transformers 4, as the next
        "rope_scaling": None if config.rope_scaling is None else rope,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": vocab_size,
        "dtype": config.compute_dtype,
        "pad_token_id": vocab.pad_id,
        "bos_token_id": vocab.bos_id,
        "eos_token_id": vocab.eos_id,
    }
    return fields if kind == "qwen2" else {**fields, "attention_bias": config.output_bias}
