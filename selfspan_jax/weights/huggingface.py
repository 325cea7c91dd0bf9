"""Llama-like language models of others: import from Hugging Face directories and GGUF files, export to Hugging Face directories.

No PyTorch, no pickle, no remote code: safetensors (single or sharded), JSON and GGUF are read as data. Every shape is compared
with the config before a tensor is read, and tensors are read one parameter at a time, so that memory stays near the model's size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError, safe_open

from selfspan_jax.config import ModelConfig, RopeScaling
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab
from selfspan_jax.weights.checkpoints import from_llama, new_model_directory, read_json, to_llama

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerBase

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # what `model_type` may say; SmolLM and many others call themselves llama
_NUM_LABELS = 256  # that are added, unless told otherwise
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_IGNORED = ("rotary_emb.inv_freq",)  # tensors of old files that follow from the config


# ---------------------------------------------------------------------------------------------------------- architecture


def model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a Hugging Face `config.json` describes, dense and with Llama's numerics.

    Raises: ValueError for an architecture, an activation or a scaling of rotary positions that the decoder does not have.
    """
    kind = fields.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type is {kind!r}; known are {', '.join(MODEL_TYPES)}")
    if missing := {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"} - fields.keys():
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    if (activation := fields.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act is {activation!r}; known is silu")
    if fields.get("mlp_bias"):
        raise ValueError("mlp_bias is true; the feed-forward layers here have none")
    rope = fields.get("rope_parameters") or {**(fields.get("rope_scaling") or {}), "rope_theta": fields.get("rope_theta")}
    biased = bool(fields.get("attention_bias"))
    context = fields.get("max_position_embeddings", 2048)
    if kind == "mistral" or fields.get("use_sliding_window"):
        context = min(context, fields.get("sliding_window") or context)  # within the window a sliding window is dense attention
    return ModelConfig(
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
        head_size=fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"],
        max_context_tokens=context,
        rope_theta=float(rope.get("rope_theta") or 10000.0),
        rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
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
        raise ValueError(f"rope scaling is of type {kind!r}; known are default and llama3")
    original = rope["original_max_position_embeddings"]
    return RopeScaling(float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), int(original))


def hugging_face_config(config: ModelConfig, vocab: SpanVocab, vocab_size: int) -> dict[str, Any]:
    """The `config.json` under which `transformers` builds the same decoder, attending densely."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias and not config.output_bias else "llama"
    if config.qk_norm and config.qkv_bias != config.output_bias:
        raise ValueError("no known architecture has q and k norms and a bias on one of the attention's projections only")
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor}
        rope |= {"high_freq_factor": scaling.high_freq_factor, "original_max_position_embeddings": scaling.original_context_tokens}
    fields = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context_tokens,
        "rms_norm_eps": config.rms_norm_eps,
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


# --------------------------------------------------------------------------------------------------------------- tensors


class _Tensors(Mapping[str, Array]):
    """Tensors by Llama's names, each read when it is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Array]):
        self.shapes = dict(shapes)
        self._read = read

    def __getitem__(self, name: str) -> Array:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _safetensors(directory: Path) -> _Tensors:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        by_name = read_json(index).get("weight_map")
        if not isinstance(by_name, dict):
            raise ValueError(f"{index}: weight_map missing")
    else:
        by_name = None
    names = sorted(set(by_name.values())) if by_name is not None else ["model.safetensors"]
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} lies outside the directory")
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory}: {name} is missing")
    shapes, file_of = {}, {}
    for name in names:
        try:
            with safe_open(directory / name, "flax") as shard:
                for key in shard.keys():  # noqa: SIM118  # no mapping
                    shapes[key], file_of[key] = tuple(shard.get_slice(key).get_shape()), name
        except SafetensorError as error:
            raise ValueError(f"{directory / name}: not a safetensors file ({error})") from error
    if by_name is not None and (absent := sorted(by_name.keys() - shapes.keys())):
        raise ValueError(f"{index}: {len(absent)} tensors are in no shard, {absent[0]} among them")

    def read(key: str) -> Array:
        with safe_open(directory / file_of[key], "flax") as shard:
            return shard.get_tensor(key)

    return _Tensors(shapes, read)


def _decoder(config: ModelConfig, vocab: SpanVocab, old_size: int, tensors: _Tensors, source: Path, seed: int) -> Decoder:
    """A decoder of the tensors, with rows for the ids of `vocab` beyond the file's vocabulary.

    A new row is the mean of the old ones plus a hundredth of their spread: the mean leaves the probabilities of the old tokens
    nearly as they were (a new token scores like an average one), the noise tells the new tokens apart.
    """
    new_size = max(old_size, vocab.min_vocab_size)
    abstract = nnx.eval_shape(lambda: Decoder(config, vocab=vocab, vocab_size=new_size, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(abstract, nnx.Param)
    wanted = {name: tensor.shape for name, tensor in jax.eval_shape(functools.partial(to_llama, config), params).items()}
    wanted = {name: (old_size, *shape[1:]) if name in _EMBEDDINGS else shape for name, shape in wanted.items()}
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    found = {name for name in tensors.shapes if not name.endswith(_IGNORED)} - ignored
    if absent := sorted(wanted.keys() - found):
        raise ValueError(f"{source}: {len(absent)} tensors missing, {absent[0]} among them")
    if extra := sorted(found - wanted.keys()):
        raise ValueError(f"{source}: {len(extra)} tensors that the config does not know, {extra[0]} among them")
    for name, shape in wanted.items():
        if tensors.shapes[name] != shape:
            raise ValueError(f"{source}: {name} is {list(tensors.shapes[name])}, but the config asks for {list(shape)}")

    def read(name: str) -> Array:
        array = tensors[name].astype(config.compute_dtype)
        return _extended(array, new_size, jax.random.key(seed)) if name in _EMBEDDINGS else array

    return nnx.merge(graph, from_llama(config, params, _Tensors(wanted, read)))


def _extended(rows: Float[Array, "V D"], size: int, key: Array) -> Float[Array, "V2 D"]:
    wide = rows.astype(jnp.float32)
    noise = jax.random.normal(key, (size - rows.shape[0], rows.shape[1]), jnp.float32)
    new = jnp.mean(wide, axis=0, keepdims=True) + 0.01 * jnp.std(wide, axis=0, keepdims=True) * noise
    return jnp.concatenate([rows, new.astype(rows.dtype)])


# ------------------------------------------------------------------------------------------------------------ tokenizers


def span_vocab(tokenizer: PreTrainedTokenizerBase, num_labels: int) -> SpanVocab:
    """Adds the structural tokens to a tokenizer, as special tokens with ids next to each other.

    `<pad>` and `<bos>` are added too where the tokenizer has none of its own, or none apart from its end of text.

    Raises: ValueError if the tokenizer has no end of text, or has tokens of these names already.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no end of text")
    bos, pad = tokenizer.bos_token, tokenizer.pad_token
    bos = bos if bos is not None and bos != tokenizer.eos_token else "<bos>"
    pad = pad if pad is not None and pad not in (tokenizer.eos_token, bos) else "<pad>"
    labels = range(num_labels)
    new = ["<solve>", *(f"<seg:{k}>" for k in labels), *(f"<ref:{k}>" for k in labels)]
    known = tokenizer.get_vocab()
    if taken := [token for token in new if token in known]:
        raise ValueError(f"the tokenizer has {taken[0]} already")
    tokenizer.add_special_tokens({"bos_token": bos, "pad_token": pad, "additional_special_tokens": new})
    known = tokenizer.get_vocab()
    ids = [known[token] for token in (pad, bos, *new)]
    if ids[2:] != list(range(ids[2], ids[2] + len(new))):
        raise ValueError("the tokenizer gave the span tokens ids that are not next to each other")
    return SpanVocab(
        pad_id=ids[0],
        bos_id=ids[1],
        eos_id=tokenizer.eos_token_id,
        solve_id=ids[2],
        seg_base=ids[3],
        ref_base=ids[3] + num_labels,
        num_labels=num_labels,
    )


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Plain text, as the model's own tokenizer reads and writes it."""

    tokenizer: PreTrainedTokenizerBase

    def encode_prompt(self, text: str) -> Int[np.ndarray, "T"]:
        """Ids as the tokenizer makes them, its own beginning of text included. Raises ValueError for no text."""
        if not (ids := self.tokenizer(text)["input_ids"]):
            raise ValueError("the prompt is empty")
        return np.array(ids, np.int32)

    def decode(self, token_ids: Iterable[int]) -> str:
        return str(self.tokenizer.decode(list(map(int, token_ids)), clean_up_tokenization_spaces=False))

    def answer(self, response_ids: Iterable[int]) -> str:
        """The text without structural tokens."""
        return str(self.tokenizer.decode(list(map(int, response_ids)), skip_special_tokens=True))

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as the library `tokenizers` writes it. Raises ValueError for one that is not of that library."""
        if (backend := getattr(self.tokenizer, "backend_tokenizer", None)) is None:
            raise ValueError("the tokenizer is not one of the library tokenizers (tokenizer.json)")
        return str(backend.to_str())

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError("a text task is kept in its tokenizer's own files: see huggingface.export")

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TextTask:
        raise NotImplementedError("a text task is kept in its tokenizer's own files: see huggingface.load")


# ---------------------------------------------------------------------------------------------------- import and export


def is_foreign(path: Path) -> bool:
    """Whether this is a GGUF file, or a directory whose config is one of Hugging Face's."""
    if path.suffix == ".gguf":
        return True
    return (path / "config.json").is_file() and "model_type" in read_json(path / "config.json")


def load_decoder(path: str | Path, vocab: SpanVocab | None = None, *, seed: int = 0, **changes: Any) -> Decoder:
    """The decoder of a Hugging Face directory or a GGUF file, its parameters in the compute dtype.

    Args:
      vocab: ids of the structural tokens; by default after the file's vocabulary, with 256 labels.
      seed: of the noise of new embeddings.
      changes: fields of ModelConfig in place of the file's: compute_dtype, mask, header_view, prompt_view and so on.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an architecture that the decoder does not have, or tensors that do not fit the config.
    """
    path = Path(path)
    config, old_size, tensors = _source(path, changes, _gguf_reader(path))
    return _decoder(config, vocab or SpanVocab.consecutive(old_size, _NUM_LABELS), old_size, tensors, path, seed)


def _source(path: Path, changes: Mapping[str, Any], reader: GGUFReader | None) -> tuple[ModelConfig, int, _Tensors]:
    """The architecture, the size of the vocabulary and the tensors, none of which is read yet."""
    if reader is not None:
        fields, tensors = _gguf(path, reader)
    elif not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json")
    else:
        fields, tensors = read_json(path / "config.json"), _safetensors(path)
    try:
        config = model_config({"tie_word_embeddings": "lm_head.weight" not in tensors.shapes, **fields})
        config = dataclasses.replace(config, **changes)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config, fields["vocab_size"], tensors


def load(path: str | Path, *, num_labels: int = _NUM_LABELS, seed: int = 0, **changes: Any) -> tuple[Decoder, TextTask]:
    """A language model and its tokenizer, both with the structural tokens of `num_labels` labels added.

    Arguments as for `load_decoder`. Raises: as `load_decoder`, and ValueError for a tokenizer that does not fit.
    """
    path = Path(path)
    reader = _gguf_reader(path)
    config, old_size, tensors = _source(path, changes, reader)  # first: the tokenizer's library reads the config too
    tokenizer = _tokenizer(path) if reader is None else _gguf_tokenizer(path, reader)
    if len(tokenizer) > old_size:
        raise ValueError(f"{path}: the tokenizer has {len(tokenizer):,} tokens, the model's embedding {old_size:,} rows: not of one model")
    try:
        vocab = span_vocab(tokenizer, num_labels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _decoder(config, vocab, old_size, tensors, path, seed), TextTask(tokenizer)


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # takes seconds to import, and only those who import models need it

    if not any((directory / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"{directory}: tokenizer.json is missing")
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def export(directory: str | Path, model: Decoder, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Writes a Hugging Face directory that `AutoModelForCausalLM.from_pretrained` loads, whole or not at all.

    `transformers` attends densely: what the spans name is not read there, the tokens are plain special tokens.

    Raises: FileExistsError if the directory exists; ValueError for an architecture that Hugging Face has no name for.
    """
    fields = hugging_face_config(model.config, model.vocab, model.vocab_size)
    with new_model_directory(Path(directory), model, fields) as partial:
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


# ------------------------------------------------------------------------------------------------------------------ GGUF

_GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_OUTER = {"token_embd.weight": _EMBEDDINGS[0], "output.weight": _EMBEDDINGS[1], "output_norm.weight": "model.norm.weight"}
# How a tokenizer of byte-pair encoding cuts text before it merges, by the GGUF's name for it.
_DIGITS_APART = {"smollm": True, "gpt-2": False, "default": False}


def _gguf_reader(path: Path) -> GGUFReader | None:
    """None for what is no GGUF file by its name."""
    if path.suffix != ".gguf":
        return None
    from gguf import GGUFReader  # only those who read such files need it

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: not a GGUF file ({error})") from error


def _gguf(path: Path, reader: GGUFReader) -> tuple[dict[str, Any], _Tensors]:
    """A GGUF file as a Hugging Face config and tensors, dequantized when they are read."""
    from gguf.quants import dequantize

    def value(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    if (kind := value("general.architecture")) != "llama":
        raise ValueError(f"{path}: architecture is {kind!r}; known is llama")
    if value("llama.rope.scaling.type", "none") != "none":
        raise ValueError(f"{path}: rope scaling is of type {value('llama.rope.scaling.type')!r}; known from GGUF is none")
    num_heads = value("llama.attention.head_count")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "rope_freqs.weight" in tensors:
        raise ValueError(f"{path}: has scaled rotary frequencies, which are known from Hugging Face directories only")
    names = {}
    for name in tensors:
        prefix, _, rest = name.partition(".")
        layer, _, part = rest.partition(".")
        owner, _, leaf = part.partition(".")
        known = prefix == "blk" and owner in _GGUF_NAMES
        names[f"model.layers.{layer}.{_GGUF_NAMES[owner]}.{leaf}" if known else _GGUF_OUTER.get(name, name)] = name
    fields = {
        "model_type": "llama",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": value("llama.attention.head_count_kv", num_heads),
        "head_dim": value("llama.attention.key_length", value("llama.rope.dimension_count")),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": value("llama.rope.freq_base", 10000.0),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0,
    }

    def read(name: str) -> Array:
        tensor = tensors[names[name]]
        array = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # GGUF keeps the two of a rotary pair next to each other; here they are H / 2 apart.
            heads = fields["num_key_value_heads" if "k_proj" in name else "num_attention_heads"]
            array = array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        return jnp.asarray(array)

    return fields, _Tensors({name: tuple(int(n) for n in reversed(tensors[own].shape)) for name, own in names.items()}, read)


def _gguf_tokenizer(path: Path, reader: GGUFReader) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def value(key: str, default: Any = None) -> Any:
        field = reader.get_field(f"tokenizer.ggml.{key}")
        return default if field is None else field.contents()

    if (kind := value("model")) != "gpt2":
        raise ValueError(f"{path}: the tokenizer is of type {kind!r}; known is gpt2 (byte-pair encoding)")
    if (cut := value("pre", "default")) not in _DIGITS_APART:
        raise ValueError(f"{path}: the tokenizer cuts text as {cut!r}; known are {', '.join(_DIGITS_APART)}")
    tokens, merges = value("tokens"), [tuple(merge.split(" ", 1)) for merge in value("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _DIGITS_APART[cut] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the type of tokens that are no text
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, type in zip(tokens, value("token_type", [])) if type == control])

    def token(name: str) -> str | None:
        return None if (index := value(f"{name}_token_id")) is None else tokens[index]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=token("bos"), eos_token=token("eos"), pad_token=token("padding"), unk_token=token("unknown")
    )
