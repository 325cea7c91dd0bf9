"""Hugging Face directories: opened as a source of a pretrained model, and exported.

No PyTorch, no pickle, no remote code: safetensors (single or sharded) and JSON are read as data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from selfspan_jax.config import ModelConfig, RopeScaling
from selfspan_jax.errors import UserError
from selfspan_jax.files import new_directory, read_json, write_json
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab
from selfspan_jax.weights.models import METADATA, Tensors, open_safetensors, save_safetensors, to_llama
from selfspan_jax.weights.tokenizers import (
    TextTask,
    from_vocabulary,
    is_tokenizer,
    load_tokenizer,
    switch_runtime_state_off,
    wrong_span_token,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selfspan_jax.task import Task

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
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Known values of `model_type` (SmolLM and many others are llama), and what `transformers` takes for a field that the file does not name.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        **{"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        **{"head_dim": 128},
    },
}
_ROPE_THETA = 10_000.0
_WEIGHTS = "model.safetensors"
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Source:
    """A pretrained model in files, of which only names and shapes have been read."""

    config: ModelConfig
    vocab_size: int
    """Rows of its embedding."""
    tensors: Tensors
    """Under Llama's names and layout."""
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    eos_ids: tuple[int, ...] = ()
    """Ids that end a text, as far as the model's config knows them; the tokenizer names one too."""
    vocab: SpanVocab | None = None
    """Ids of the structural tokens, for a finished model of this project."""

    @classmethod
    def of(
        cls, fields: Mapping[str, Any], tensors: Tensors, load_tokenizer: Callable[[], PreTrainedTokenizerBase], eos_ids: Iterable[int] = ()
    ) -> Source:
        """Make a source from the fields of a Hugging Face config.

        Raises: UserError for fields that `model_config` refuses, and for a file without an output layer whose config does not say
          that it is the embedding: by default it is not.
        """
        fields = dict(fields)
        try:
            model_config(fields)  # as they are, before the file has its say
            if _HEAD in tensors.shapes and not (fields.get("tie_word_embeddings") and _is_tied(tensors)):
                fields["tie_word_embeddings"] = False  # the file has a head of its own, whatever the config says
            elif fields.get("tie_word_embeddings") is None:
                kind = fields["model_type"]
                raise UserError(f"tie_word_embeddings is missing, for {kind} false by default, but the file has no {_HEAD}")
            if fields.get("dtype", fields.get("torch_dtype")) is None and tensors.main_dtype == "F32":
                fields["dtype"] = "float32"
            config = model_config(fields)
        except UserError as error:
            where = tensors.where / "config.json" if tensors.where.is_dir() else tensors.where
            raise UserError(f"{where}: {error}") from error
        return cls(config, fields["vocab_size"], tensors, load_tokenizer, tuple(eos_ids))


def _is_tied(tensors: Tensors) -> bool:
    """Return whether a file's output layer is its embedding, bit by bit."""
    shapes = tensors.shapes
    if shapes[_HEAD] != shapes.get(_EMBEDDING):
        return False
    return np.array_equal(np.asarray(tensors.read(_EMBEDDING)), np.asarray(tensors.read(_HEAD)))


def open_source(path: Path) -> Source:
    """Open a Hugging Face directory.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: a malformed file, or an architecture that the decoder does not have.
    """
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json")
    fields, generation = read_json(path / "config.json"), path / "generation_config.json"
    if quantized := fields.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(f'{path}: its weights are quantised ({method}): take the model they were made from, and weights="int8"')
    if (named := fields.get("transformers_weights")) not in (None, _WEIGHTS):
        raise UserError(f"{path / 'config.json'}: transformers_weights is {named!r}; known is {_WEIGHTS}")
    configs = {path / "config.json": fields, **({generation: read_json(generation)} if generation.is_file() else {})}
    ends = [_eos_ids(file, config.get("eos_token_id")) for file, config in configs.items()]
    return Source.of(fields, _open_shards(path), lambda: load_tokenizer(path), dict.fromkeys(sum(ends, [])))


def _eos_ids(file: Path, value: Any) -> list[int]:
    """Read an `eos_token_id`: none, one, or a list of them."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{file}: eos_token_id is {value!r}; expected an id or a list of ids")
    return ids


def _open_shards(directory: Path) -> Tensors:
    single, index = _WEIGHTS, directory / f"{_WEIGHTS}.index.json"
    names, by_name = [single], None
    if index.is_file():
        by_name = read_json(index).get("weight_map")
        if not isinstance(by_name, dict) or not all(isinstance(name, str) for name in by_name.values()):
            raise UserError(f"{index}: weight_map is missing, or no map from tensors to files")
        names = sorted(set(by_name.values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: shard {name!r} lies outside the directory")
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory}: {name} is missing")
    if single not in names and (directory / single).exists():
        raise UserError(f"{directory}: has {single} and an index of other files ({names[0]}): remove one of the two models")
    tensors = open_safetensors(directory, [directory / name for name in names])
    if by_name is not None and (absent := sorted(by_name.keys() - tensors.shapes.keys())):
        raise UserError(f"{index}: {len(absent)} tensors are in no shard, {absent[0]} among them")
    return tensors


def export(directory: str | Path, model: Decoder, tokenizer: PreTrainedTokenizerBase | Task | None = None) -> None:
    """Write a Hugging Face directory that `AutoModelForCausalLM.from_pretrained` loads, atomically.

    `transformers` attends densely: it ignores spans, and structural tokens are special tokens like any other.

    Args:
      tokenizer: with the structural tokens, or the model's task: of an imported model, or of a fine-tuned one, whose vocabulary is
        a tokenizer too (what its prompts mean is not written: the directory loads as a model of text). Without one, no
        tokenizer is written. Its truncation and padding are switched off. The ends of a text are those of the model and the task.

    Raises: FileExistsError if the directory exists; UserError for an architecture that Hugging Face has no name for, a quantised
      or adapted model, or a tokenizer without the model's structural tokens.
    """
    if not isinstance(directory, str | Path):
        raise UserError(f"directory is {directory!r}; expected a path")
    if not isinstance(model, Decoder):
        raise UserError(f"expected a Decoder to export, found {type(model).__name__}: of a SpanLM give its model")
    end_ids = [model.vocab.eos_id, *model.stop_ids]
    words: Any = tokenizer
    if isinstance(words, TextTask):
        words, end_ids = words.tokenizer, list(dict.fromkeys([*end_ids, *words.stop_ids]))
    elif hasattr(words, "to_json") and not is_tokenizer(words):
        named = Path(f"the task {getattr(words, 'name', type(words).__name__)}")
        words = from_vocabulary(named, words.to_json().get("vocab", {}), model.vocab)
    if not (words is None or is_tokenizer(words)):
        raise UserError(f"expected a tokenizer of transformers or the model's task, found {type(words).__name__}")
    if words is not None and (wrong := wrong_span_token(words, model.vocab)):
        raise UserError(f"the tokenizer has no {wrong}, or with another id than the model: give the model's task in its place")
    fields, arrays = to_hugging_face(model.config, model.vocab, model.vocab_size), to_llama(model)
    if len(end_ids) > 1:
        fields["eos_token_id"] = end_ids
    with new_directory(Path(directory)) as partial:
        save_safetensors(partial / _WEIGHTS, arrays, METADATA)
        write_json(partial / "config.json", fields)
        if words is not None:
            switch_runtime_state_off(words)
            words.save_pretrained(partial)


def model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Convert a Hugging Face `config.json` to the architecture it describes, attending densely.

    Raises: UserError for an architecture, an activation or a scaling of rotary positions that the decoder does not have, or a
      field that is missing or of another type.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise UserError(f"model_type is {kind!r}; known are {', '.join(_DEFAULTS)}")
    fields = {name: value for name, value in {**_DEFAULTS[kind], **fields}.items() if value is not None}
    if missing := [name for name in _REQUIRED if name not in fields]:
        raise UserError(f"{', '.join(sorted(missing))} missing")
    for name in (*_REQUIRED, *_SIZES, "sliding_window", "max_window_layers"):
        _check_number(fields, name, whole=name != "rms_norm_eps")
    for name in _FLAGS:
        if not isinstance(value := fields.get(name, False), bool):
            raise UserError(f"{name} is {value!r}; expected true or false")
    if (activation := fields.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UserError(f"hidden_act is {activation!r}; known is silu")
    if fields.get("mlp_bias"):
        raise UserError("mlp_bias is true; the feed-forward layers here have none")
    biased = fields.get("attention_bias", False)
    num_heads = fields["num_attention_heads"]
    if num_heads < 1:
        raise UserError(f"num_attention_heads is {num_heads}; allowed: 1 and above")
    fields = {"num_key_value_heads": num_heads, "head_dim": fields["hidden_size"] // num_heads, "rms_norm_eps": 1e-6, **fields}
    rope = _rope(fields)
    if (dtype := fields.get("dtype", fields.get("torch_dtype"))) not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {dtype!r}; allowed: float32, bfloat16, float16")
    sizes = {ours: fields[theirs] for theirs, ours in _SIZES.items()}
    if (window := _sliding_window(kind, fields)) is not None:  # within it attention is dense
        sizes["max_context_tokens"] = min(sizes["max_context_tokens"], window)
    return ModelConfig(
        **sizes,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope),
        qkv_bias=biased or kind == "qwen2",
        output_bias=biased and kind != "qwen2",
        qk_norm=kind == "qwen3",
        tie_embeddings=fields.get("tie_word_embeddings", False),
        compute_dtype="float32" if dtype == "float32" else "bfloat16",
        mask="dense",
        header_view="all",
        prompt_view="causal",
    )


def _check_number(fields: Mapping[str, Any], name: str, *, whole: bool = False) -> None:
    value = fields.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int if whole else int | float)):
        raise UserError(f"{name} is {value!r}; expected a {'whole ' if whole else ''}number")


def _sliding_window(kind: str, fields: Mapping[str, Any]) -> int | None:
    """Return the window of the layers that have one, None where all attend to everything."""
    types, known = fields.get("layer_types") or [], ["full_attention", "sliding_attention"]
    if not isinstance(types, list) or any(layer not in known for layer in types):
        raise UserError(f"layer_types is {str(types)[:80]}; known are {', '.join(known)}")
    if kind == "mistral":
        return fields.get("sliding_window")
    if kind == "llama" or not fields.get("use_sliding_window"):
        return None
    slides = "sliding_attention" in types if types else fields["max_window_layers"] < fields["num_hidden_layers"]
    return fields.get("sliding_window") if slides else None


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the settings of rotary positions.

    They have stood in three places: `rope_parameters` (transformers 5), `rope_scaling`, and fields of the config itself. As in
    transformers what stands in a dict comes before the config's field, and where layers have types (Qwen), the dict may have one
    part for each.
    """
    dicts = {name: fields[name] for name in ("rope_parameters", "rope_scaling") if name in fields}
    for name, value in dicts.items():
        if not isinstance(value, dict):
            raise UserError(f"{name} is {value!r}; expected an object")
    found = []
    for name, rope in dicts.items():
        if not rope:
            continue
        nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
        used = fields.get("layer_types", [])
        if nested and not (used and fields["model_type"] in ("qwen2", "qwen3")):
            raise UserError(f"{name} has settings for layers of type {min(nested)}; known are those of a qwen2 or qwen3 with layer_types")
        if nested and (alone := [key for key in rope if key not in nested]):
            raise UserError(f"{name} has {alone[0]} beside settings for types of layers")
        if nested and (missing := sorted({*used} - nested.keys())):
            raise UserError(f"{name} has no settings for layers of type {missing[0]}")
        parts = {f"{name}.{key}": nested[key] for key in sorted({*used})} if nested else {name: rope}
        found += [(part, settings, _rope_of(settings, fields)) for part, settings in parts.items()]
    if not found:
        return _rope_of({}, fields)
    (_, _, first), *others = found
    for other in others:
        if different := sorted(key for key in first.keys() | other[2].keys() if first.get(key) != other[2].get(key)):
            key = different[0]
            values = [
                f"{rope.get(key)!r} {'in' if key in settings else 'for'} {part}{'' if key in settings else ', which does not name it'}"
                for part, settings, rope in (found[0], other)
            ]
            raise UserError(f"{key} is {values[0]}, and {values[1]}; known is one value")
    return first


def _rope_of(rope: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Complete one dict of rotary settings from the config's own fields."""
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = rope.pop("type", None)
    if rope.setdefault("rope_type", kind) is None:
        rope["rope_type"] = "default"
        if rope.get("factor", 1) != 1:
            raise UserError(f"rope scaling has a factor of {rope['factor']!r}, but no type; known are default and llama3")
    rope.setdefault("rope_theta", fields.get("rope_theta", _ROPE_THETA))
    rope.setdefault("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if rope["partial_rotary_factor"] != 1:
        raise UserError(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; known is 1: all of a head is turned")
    if rope["rope_type"] == "llama3":
        name = "original_max_position_embeddings"
        if name in fields and rope.get(name) != fields[name]:  # which transformers takes, but older versions of it did not
            wrong = f"but is {rope[name]!r} among them" if name in rope else "but belongs among them"
            raise UserError(f"{name}, {fields[name]!r}, stands beside the settings of rotary positions, {wrong}")
        rope.setdefault(name, fields["max_position_embeddings"])
    for name in ("rope_theta", *_LLAMA3):
        _check_number(rope, name)
    return rope


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    if (kind := rope["rope_type"]) == "default":
        return None
    if kind != "llama3":
        raise UserError(f"rope scaling is of type {kind!r}; known are default and llama3")
    if missing := [name for name in _LLAMA3 if name not in rope]:
        raise UserError(f"rope scaling of type llama3: {', '.join(missing)} missing")
    factor, low, high, original = (rope[name] for name in _LLAMA3)
    return RopeScaling(float(factor), float(low), float(high), int(original))


def to_hugging_face(config: ModelConfig, vocab: SpanVocab, vocab_size: int) -> dict[str, Any]:
    """Convert a config to the `config.json` from which `transformers` builds the same decoder, attending densely."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias and not config.output_bias else "llama"
    if config.qk_norm and config.qkv_bias != config.output_bias:
        raise UserError("no known architecture has q and k norms and a bias on one of the attention's projections only")
    if config.mask == "memory":
        raise UserError("no known architecture has a memory in its layers")
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
