"""SpanLM: a model and its task in one object, for notebooks and command lines."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pallas_kernels.prompt_attention import Selector
from selfspan_jax.attention.policies import Policy, get_policy
from selfspan_jax.attention.sequences import attend_under
from selfspan_jax.config import (
    COMPUTE_DTYPES,
    MAX_SEED,
    WORKING_SET_TOKENS,
    DecodeConfig,
    Dtype,
    Implementation,
    KvMemory,
    ModelConfig,
    Sampling,
    Weights,
    check_kv_memory,
)
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.sampling import sequence_keys
from selfspan_jax.decoding.state import DecodeState
from selfspan_jax.errors import UserError
from selfspan_jax.files import well_formed
from selfspan_jax.model import Decoder
from selfspan_jax.neighbours.memory import check_policy, with_memory
from selfspan_jax.parallel.engine import make_engine
from selfspan_jax.parallel.mesh import make_mesh, num_data_shards
from selfspan_jax.serving.requests import Request
from selfspan_jax.serving.throughput import is_faster, run_together, shared_beginning, throughput_scheduler
from selfspan_jax.spans import SpanVocab
from selfspan_jax.task import Task, end_ids, installed_tasks, read_by
from selfspan_jax.tiers.cache import TieredCache
from selfspan_jax.tiers.engine import HostEngine
from selfspan_jax.viewing import retention
from selfspan_jax.viewing.detokenize import Response, check_stop_strings
from selfspan_jax.viewing.output import Output, prompt_warnings
from selfspan_jax.viewing.reading import Reading, Step, attention_mask, attention_warning
from selfspan_jax.weights import hub, importing, lora, models

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Output", "SpanLM", "Step", "Task", "installed_tasks"]

_FIRST_ROOM = 1024  # new tokens that memory is taken for at first, where no limit is given
_CPU_PREFILL_TOKENS = 1024
_STOP_CHUNK_TOKENS = 32  # between two looks for stop strings
_SHOWN_CHARACTERS = 40
_OPTIONS = ("attention", "max_new_tokens", "chat", "seed", "stop", "prefill", "implementation")
_SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))


class Reader:
    """Encode prompts in the words of a task, and read responses back: what needs a model's configuration, and none of its parameters."""

    def __init__(self, task: Task, config: ModelConfig, vocab: SpanVocab):
        self.task, self.config, self.vocab = task, config, vocab

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a response, the vocabulary's `<eos>` first."""
        return end_ids(self.task, self.vocab)

    def encode(
        self, prompts: str | Sequence[str], chat: bool = False, prompt_names: Sequence[str] = ()
    ) -> tuple[list[str], list[Int[np.ndarray, "T"]]]:
        """Return prompts as a list, and the ids of each. Raises UserError, which of several prompts names the one."""
        if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
            raise UserError(f"prompts are {prompts!r}: expected text, or a list of texts")
        encode = getattr(self.task, "encode_chat", None) if chat else self.task.encode_prompt
        if encode is None:
            raise UserError("chat is for pretrained models: this model's task writes its prompts itself")
        texts, found = [prompts] if isinstance(prompts, str) else list(prompts), []
        if prompt_names and len(prompt_names) != len(texts):
            raise UserError(f"prompt_names has {len(prompt_names)} names; expected one for each of {len(texts)} prompts")
        for number, text in enumerate(texts, 1):
            try:
                if not isinstance(text, str):
                    raise UserError(f"expected text, found {type(text).__name__}")
                texts[number - 1] = text = well_formed(text)
                ids = encode(text)
                self._check_length(len(ids))
                prompt_warnings(self.task, text)  # which may find that it cannot be judged
            except ValueError as error:  # what tasks raise
                if isinstance(prompts, str):
                    raise
                shown = f"{text[:_SHOWN_CHARACTERS]}..." if isinstance(text, str) and len(text) > _SHOWN_CHARACTERS else text
                name = prompt_names[number - 1] if prompt_names else f"prompt {number}"
                raise UserError(f"{name}, {shown!r}: {error}") from error
            found.append(ids)
        return texts, found

    def read_tokens(self, prompt: str, ids, tokens: Int[np.ndarray, "M"], attended: Int[np.ndarray, "M"], policy: Policy) -> Output:
        """Read back the tokens of one response up to its end, if it has one, and what they attended to, decoded under a policy."""
        ends = np.flatnonzero(np.isin(tokens, self.end_ids))
        return self._output(prompt, ids, tokens[: int(ends[0]) + 1] if len(ends) else tokens, attended, policy)

    def read_response(self, prompt: str, ids, response: Response, attended, policy: Policy) -> Output:
        """Read back one response that came in chunks, decoded under a policy, and what its tokens attended to, at least as many."""
        response.finish()
        stopped = {"stopped_by": response.stopped_by, "surplus": response.surplus}
        return self._output(prompt, ids, response.token_ids, attended, policy, **stopped)

    def _output(self, prompt: str, ids, tokens, attended, policy: Policy, **stopped: Any) -> Output:
        token_ids = np.concatenate([ids, np.asarray(tokens, np.int32)])
        read = attended[: len(tokens)]
        return Output(self.task, token_ids, len(ids), read, policy, self.config, self.vocab, prompt, **stopped)

    def _check_length(self, prompt_tokens: int) -> None:
        if prompt_tokens >= (context := self.config.max_context_tokens):
            raise UserError(f"the prompt is {prompt_tokens} tokens long, but the model's context is {context}, response included")


def prefill_tokens(longest: int) -> int:
    """Choose how many prompt tokens go through a model at once: few of long prompts on a CPU, which keeps each pair's score."""
    few = jax.default_backend() == "cpu" and longest > _CPU_PREFILL_TOKENS
    return _CPU_PREFILL_TOKENS if few else DecodeConfig.prefill_tokens


class SpanLM(Reader):
    """Decode with a model, in the words of the task that it was trained for."""

    def __init__(
        self,
        model: Decoder,
        task: Task,
        *,
        weights: Weights = "bf16",
        mesh: str | None = None,
        kv_memory: KvMemory = "device",
        working_set_tokens: int = WORKING_SET_TOKENS,
    ):
        """Copy a model for decoding; options as for `load`."""
        _check_named("weights", weights, Weights)
        _check_named("kv_memory", kv_memory, KvMemory)
        check_kv_memory([kv_memory], working_set_tokens, mesh)
        self.model = model.for_decoding(weights=weights)
        self.engine: Engine
        if kv_memory == "host":
            self.engine = HostEngine(self.model, working_set_tokens=working_set_tokens)
        else:
            self.engine = make_engine(self.model, make_mesh(mesh) if mesh else None)
        super().__init__(task, self.model.config, self.model.vocab)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        tasks: Mapping[str, type[Task]] | None = None,
        *,
        base: str | Path | None = None,
        task: str | None = None,
        dtype: Dtype | None = None,
        weights: Weights = "bf16",
        mesh: str | None = None,
        kv_memory: KvMemory = "device",
        working_set_tokens: int = WORKING_SET_TOKENS,
    ) -> SpanLM:
        """Load a model.

        Args:
          directory: as `train.py` writes it, adapters included; a Hugging Face directory, or an id of the Hub; or a GGUF file.
          tasks: task classes by the name that a checkpoint has for them; by default the installed ones.
          base: for an adapter, the pretrained model that it was trained on.
          task: the name of a task that prompts are read by, of a model of several corpora of documents; by default its own.
          dtype: "bf16", "f32" or "f16", what activations and products are computed in; by default as the model was trained, or,
            pretrained, float32 where its config or its file says so and bfloat16 elsewhere.
          weights: "bf16", the model's own compute dtype, or "int8", half the bytes of bfloat16.
          mesh: decode on several devices, for example `data=2,tensor=2`: `data` divides sequences, `tensor` kv heads,
            `context` the rows of each sequence's cache.
          kv_memory: where keys and values of prompts lie: "device", or "host" for contexts that the device cannot hold, with those of at
            most `working_set_tokens` of each prompt on the device (`selfspan_jax.tiers.engine`); on one device.

        Raises: FileNotFoundError, UserError with one line that says what is wrong with the directory.
        """
        if dtype not in (None, *COMPUTE_DTYPES):
            raise UserError(f"dtype is {dtype!r}; allowed: {', '.join(COMPUTE_DTYPES)}")
        if not (tasks is None or isinstance(tasks, Mapping)):
            raise UserError(f"tasks is {tasks!r}; expected a mapping from names to task classes")
        _check_named("weights", weights, Weights)
        placed: dict[str, Any] = {"mesh": mesh, "kv_memory": kv_memory, "working_set_tokens": working_set_tokens}
        path = hub.locate(directory)
        computed: dict[str, Any] = {} if dtype is None else {"compute_dtype": COMPUTE_DTYPES[dtype]}
        is_adapter = lora.is_adapter(path)
        if base is not None and not is_adapter and path.exists():
            raise UserError(f"{directory} is no adapter, so it takes no base")
        if importing.is_pretrained(path):
            if task is not None:
                raise UserError(f"task is {task!r}: {directory} is a pretrained model, which has no tasks")
            return cls(*importing.load(path, **computed), weights=weights, **placed)
        model, fields = lora.load_adapter(path, base) if is_adapter else models.load_model(path)
        model.config = dataclasses.replace(model.config, **computed)
        tasks = installed_tasks() if tasks is None else tasks
        if (name := str(fields.get("task"))) not in tasks:
            known = (
                f"known are {', '.join(sorted(tasks))}"
                if tasks
                else "no installed one can be loaded: pip install -e . installs this project's"
            )
            raise UserError(f"{directory}: of task {name!r}; {known}")
        own = tasks[name].from_json(fields)
        return cls(model, own if task is None else read_by(own, task, tasks), weights=weights, **placed)

    def __repr__(self) -> str:
        config, task = self.model.config, getattr(self.task, "name", type(self.task).__name__)
        size = f"{self.model.num_parameters:,} parameters, computed in {config.compute_dtype}"
        return f"SpanLM({task}: {size}, attention {config.mask}, context {config.max_context_tokens:,} tokens)"

    @overload
    def generate(self, prompts: str, *, num_samples: None = None, **options: Any) -> Output: ...
    @overload
    def generate(self, prompts: str, *, num_samples: int, **options: Any) -> list[Output]: ...
    @overload
    def generate(self, prompts: Sequence[str], *, num_samples: None = None, **options: Any) -> list[Output]: ...
    @overload
    def generate(self, prompts: Sequence[str], *, num_samples: int, **options: Any) -> list[list[Output]]: ...

    def generate(  # type: ignore[misc]  # the overloads do not spell the options out again
        self,
        prompts: str | Sequence[str],
        *,
        num_samples: int | None = None,
        batch_size: int | None = None,
        chat: bool = False,
        prompt_names: Sequence[str] = (),
        **options: Any,
    ) -> Output | list[Output] | list[list[Output]]:
        """Decode a response to a prompt, or to each of several in one batch.

        Args:
          prompts: text of the task (for arithmetic: expressions). Halves of surrogate pairs in it are read as U+FFFD.
          num_samples: responses to each prompt, which share its cache rows; a prompt's result is then a list of that length.
          batch_size: of many prompts, how many are decoded together; by default all. On a GPU prompts of mixed lengths that are several
            batches go through a `Scheduler` with the cache of one, if that promises to be faster; tokens are the same.
          attention: a policy of `selfspan_jax.attention.policies` or its name: "span" reads what the model names, "dense"
            everything, "window" the first and the most recent tokens; by default what the model was trained with.
          max_new_tokens: at most as many as the model's context leaves; by default that.
          chat: write each prompt as a user's message, by the chat template of a pretrained model's tokenizer.
          prompt_names: of several prompts, what an error calls each of them, as in "prompts.txt: line 3"; by default "prompt 3".
          seed: of what is drawn at a temperature above 0: 0 to 2**63 - 1.
          stop: a text or several, before the first of which a response ends; span tokens are text too, as written: "<seg:3>".
          prefill: how causal prompts are read: "dense"; "sample" or "blocks", of whose tiles each head reads some; or a selector of
            `pallas_kernels.prompt_attention`. Prompts below its `dense_below_tokens` are read densely. See `measure_prefill`.
          implementation: of the decode attention kernel; by default the best that the device has.
          sampling: fields of `Sampling`: `temperature` (0, the default, takes the most likely token), `top_k`, `top_p`, `min_p`,
            `repetition_penalty`.

        Returns: an Output; for several prompts a list of them in order. `out.warnings` says what to know before one believes it.

        Raises: UserError for a prompt that the task cannot read, or that is too long for the model's context; of several prompts
          it names which. UserError for options that there are not, or that cannot be.
        """
        texts, ids = self.encode(prompts, chat, prompt_names)
        if not texts:
            return []
        samples = 1 if num_samples is None else _count("num_samples", num_samples)
        step = len(texts) if batch_size is None else _count("batch_size", batch_size)
        if samples > (most := _MAX_ROWS // (self.model.config.max_context_tokens * min(step, len(texts)))) > 0:
            raise UserError(f"num_samples is {samples}; allowed: 1 to {most}, as rows of the cache are counted in 32 bits")
        batches = [slice(start, start + step) for start in range(0, len(texts), step)]
        calls = [self._call(ids[batch], samples, batch.start * samples, **options) for batch in batches]
        rows = [len(own) for own in ids for _ in range(samples)]  # responses are taken to be as long as prompts
        if not calls[0].stop and is_faster(self.engine, calls[0].arguments[2], rows, rows, step * samples, shared_beginning(ids)):
            flat = self._decode_together(texts, ids, samples, step, calls)
        else:
            flat = [out for batch, call in zip(batches, calls) for out in self._decode(texts[batch], ids[batch], samples, call)]
        outputs = flat if num_samples is None else [flat[i : i + samples] for i in range(0, len(flat), samples)]
        return outputs[0] if isinstance(prompts, str) else outputs

    def _decode_together(
        self, texts: list[str], ids: list[Int[np.ndarray, "T"]], samples: int, step: int, calls: list[_Call]
    ) -> list[Output]:
        """Decode all batches of `step` prompts in one running state, on the rows of cache of one of them, to the same tokens."""
        config, context = calls[0].arguments[2], max(call.limit_tokens + int(call.arguments[1].max()) for call in calls)
        scheduler = throughput_scheduler(self.engine, config, step * samples, max(map(len, ids)), context)
        requests = [
            Request(ids[i // samples], calls[i // samples // step].limit_tokens, config.sampling, calls[0].seed, sample=i)
            for i in range(len(ids) * samples)
        ]
        found = run_together(scheduler, requests)
        return [self.read_tokens(texts[i // samples], ids[i // samples], *found[i][:2], calls[0].policy) for i in range(len(found))]

    def _decode(self, texts: list[str], ids: list[Int[np.ndarray, "T"]], samples: int, call: _Call) -> list[Output]:
        """Decode one batch; samples of a prompt are next to each other."""
        order = [number for number in range(len(texts)) for _ in range(samples)]
        if call.stop:
            responses, chunks = [self._response(call) for _ in order], []
            for chunk in self.engine.stream(
                *call.arguments, num_samples=samples, limit_tokens=call.limit_tokens, chunk_tokens=_STOP_CHUNK_TOKENS
            ):
                chunks.append(chunk.num_attended)
                for response, tokens in zip(responses, chunk.tokens):
                    response.push(tokens)
                if all(response.done for response in responses):
                    break
            attended = np.concatenate(chunks, axis=1)
            ended = zip(order, responses, attended)
            return [self.read_response(texts[i], ids[i], response, read, call.policy) for i, response, read in ended]
        state = self.engine.generate(*call.arguments, num_samples=samples, limit_tokens=call.limit_tokens)
        return self.outputs([texts[i] for i in order], [ids[i] for i in order], state, call.policy)

    def early_warnings(
        self, prompts: str | Sequence[str], *, chat: bool = False, prompt_names: Sequence[str] = (), **options: Any
    ) -> list[str]:
        """Return what can be said before decoding: of one prompt, what its task says; that spans were trained and are not decoded.

        Options and errors are those of `generate`. Of several prompts the first alone is encoded, as `generate` encodes them all.
        """
        texts, ids = self.encode(prompts if isinstance(prompts, str) else prompts[:1], chat, prompt_names[:1])
        if not texts:
            return []
        found = prompt_warnings(self.task, texts[0]) if isinstance(prompts, str) else []
        attention, mask = self._call(ids, **options).policy.name, self.config.mask
        return found + ([attention_warning(attention, mask)] if mask == "span" and attention != mask else [])

    def stream(self, prompt: str, *, chunk_tokens: int = 8, chat: bool = False, **options: Any) -> Stream:
        """Decode one response and give its text meanwhile, `chunk_tokens` tokens at a time; options and errors as for `generate`.

        Returns: an iterator of pieces of text. Joined they are `Output.text`, and its `output` is that Output once it has ended.
          No piece ends within a character, or has a part of a stop string.
        """
        if not isinstance(prompt, str):
            raise UserError(f"a prompt is {prompt!r}: expected text")
        (prompt,), (ids,) = self.encode(prompt, chat)
        return Stream(self._pieces(prompt, ids, self._call([ids], **options), _count("chunk_tokens", chunk_tokens)))

    def _pieces(self, prompt: str, ids: Int[np.ndarray, "T"], call: _Call, chunk_tokens: int) -> Generator[str, None, Output]:
        """Yield the pieces of a stream that are not empty; return its Output."""
        response, chunks = self._response(call), []
        for chunk in self.engine.stream(*call.arguments, limit_tokens=call.limit_tokens, chunk_tokens=chunk_tokens):
            chunks.append(chunk.num_attended[0])
            if piece := response.push(chunk.tokens[0]):
                yield piece
            if response.done:
                break
        if piece := response.finish():
            yield piece
        return self.read_response(prompt, ids, response, np.concatenate(chunks), call.policy)

    def _call(
        self,
        ids: Sequence[Int[np.ndarray, "T"]],
        num_samples: int = 1,
        first_sequence: int = 0,
        /,
        *,
        attention: str | Policy | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        prefill: str | Selector = "dense",
        implementation: Implementation | None = None,
        **sampling: Any,
    ) -> _Call:
        """Check the options of `generate`; sequences are numbered over all batches, so that none draws what another does."""
        if unknown := sorted(sampling.keys() - {*_SAMPLING}):
            known = ", ".join([*_OPTIONS, *_SAMPLING])
            raise UserError(f"there is no option {unknown[0]!r}; there are {known}, and for generate num_samples and batch_size")
        if implementation is not None and implementation not in get_args(Implementation):
            raise UserError(f"implementation is {implementation!r}; allowed: {', '.join(get_args(Implementation))}")
        token_ids, lengths = self.pad(ids)
        if max_new_tokens is None:
            limit = self.model.config.max_context_tokens - int(lengths.max())
            room = min(limit if limit < 64 else limit // 64 * 64, _FIRST_ROOM)  # few sizes, so that few are compiled
        else:
            limit = room = _count("max_new_tokens", max_new_tokens)
        policy = self._policy(attention)
        options: dict[str, Any] = {"prefill": prefill, "implementation": implementation, "stop_ids": self.end_ids[1:]}
        config = DecodeConfig(policy, room, Sampling(**sampling), prefill_tokens=prefill_tokens(int(lengths.max())), **options)
        keys = sequence_keys(_key(seed), len(lengths) * num_samples, first_sequence)
        return _Call((token_ids, lengths, config, keys), limit, policy, check_stop_strings(stop), seed)

    def logits(self, token_ids: Int[np.ndarray, "T"], attention: str | Policy | None = None) -> Float[np.ndarray, "T V"]:
        """Score the token after each token, in float32, in one forward pass under the mask of a policy."""
        token_ids = self._check_ids(token_ids)
        return np.asarray(_forward(*nnx.split(self.model), jnp.asarray(token_ids)[None], self._policy(attention))[0])

    def measure_prefill(
        self, prompts: str | Sequence[str], prefill: str | Selector, *, attention: str | Policy | None = None, chat: bool = False
    ) -> dict[str, Any]:
        """Read prompts once more, and say how much of their dense attention a sparse prefill keeps.

        Returns: the least and the mean retained mass, the softmax probability that the tiles read hold of a query, and the share of
          the tiles that are read; in all, and by layer and head. Every query is measured up to 4,095 tokens, above that one of each
          `measured_every`.
        """
        token_ids, lengths = self.pad(self.encode(prompts, chat)[1])
        config = DecodeConfig(self._policy(attention), max_new_tokens=1, prefill=prefill)
        return retention.to_json(retention.measured_prefill(self.engine, token_ids, lengths, config)[1])

    def mask(self, token_ids: Int[np.ndarray, "T"], attention: str | Policy | None = None) -> np.ndarray:
        """Compute which token attends to which under a policy: bool [T, T], True where it does."""
        return attention_mask(self._check_ids(token_ids), self.model.vocab, self.model.config, self._policy(attention))

    def plot_mask(self, token_ids: Int[np.ndarray, "T"], attention: str | Policy | None = None) -> Figure:
        """Draw `mask` as a matplotlib figure, the prompt (up to the first `<solve>`) in another colour than the response."""
        from selfspan_jax.viewing import plots

        token_ids, model = self._check_ids(token_ids), self.model
        solves = np.flatnonzero(token_ids == model.vocab.solve_id)
        prompt_tokens = int(solves[0]) + 1 if len(solves) else len(token_ids)
        attended = self.mask(token_ids, attention)[prompt_tokens:].sum(axis=1)
        return plots.plot_mask(Reading(self.task, token_ids, prompt_tokens, attended, self._policy(attention), model.config, model.vocab))

    def pad(self, prompts: Sequence[Int[np.ndarray, "T"]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
        """Put prompts of different lengths into one array; on a mesh the first is repeated until it divides the batch.

        Raises: UserError for a prompt beyond the context.
        """
        if self.engine.mesh is not None:
            prompts = [*prompts, *[prompts[0]] * (-len(prompts) % num_data_shards(self.engine.mesh))]
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        self._check_length(int(lengths.max()))
        token_ids = np.full((len(prompts), lengths.max()), self.model.vocab.pad_id, np.int32)
        for row, prompt in zip(token_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        return token_ids, lengths

    def outputs(
        self, prompts: Sequence[str], prompt_ids: Sequence[Int[np.ndarray, "T"]], state: DecodeState, policy: Policy
    ) -> list[Output]:
        """Read back what was decoded for each prompt; sequences of the batch beyond the prompts are left out."""
        decoded = zip(prompts, prompt_ids, np.asarray(state.new_tokens)[:, : int(state.num_steps)], np.asarray(state.num_attended))
        outputs = [self.read_tokens(prompt, ids, tokens, attended, policy) for prompt, ids, tokens, attended in decoded]
        if isinstance(state.cache, TieredCache):
            return [dataclasses.replace(out, misses=int(rows)) for out, rows in zip(outputs, np.asarray(state.cache.misses))]
        return outputs

    def _response(self, call: _Call) -> Response:
        return Response(self.task.decode, call.stop, self.end_ids)

    def _check_ids(self, token_ids: Int[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
        token_ids = np.asarray(token_ids, np.int32)
        context = self.model.config.max_context_tokens
        if token_ids.ndim != 1 or not 0 < len(token_ids) <= context:
            raise UserError(f"token ids of shape {token_ids.shape}; expected [T] with T from 1 to the model's context of {context}")
        self.engine.check_ids(token_ids)
        return token_ids

    def _policy(self, attention: str | Policy | None) -> Policy:
        policy = get_policy(self.model.config.mask if attention is None else attention)
        check_policy(policy.name, self.model.config)
        return policy


class Stream:
    """Iterate over the text of one response while it is decoded; `output` is the whole of it once that has ended."""

    def __init__(self, pieces: Generator[str, None, Output]):
        self._pieces = pieces
        self._output: Output | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._output = self._output or end.value
            raise

    @property
    def output(self) -> Output:
        """Return what `generate` returns, without decoding again. Raises UserError before the stream has ended."""
        if self._output is None:
            raise UserError("the stream has not ended: there is no output yet")
        return self._output


@dataclasses.dataclass(frozen=True)
class _Call:
    """Options of `generate`, checked."""

    arguments: tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"], DecodeConfig, PRNGKeyArray]  # of the engine's `generate` and `stream`
    limit_tokens: int
    policy: Policy
    stop: tuple[str, ...]
    seed: int


def _check_named(name: str, value: Any, names: Any) -> None:
    if value not in get_args(names):
        raise UserError(f"{name} is {value!r}; allowed: {', '.join(get_args(names))}")


_MAX_ROWS = 2**31 - 1  # of the pools of keys and values, which slots number in int32


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}; allowed: whole numbers from 1")
    return int(value)


def _key(seed: int) -> PRNGKeyArray:
    """Make a key of all bits of a seed; JAX itself reads 32 of them, unless told otherwise."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed!r}; allowed: whole numbers from 0 to 2**63 - 1")
    high, low = divmod(int(seed), 2**32)
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key


@functools.partial(jax.jit, static_argnames=("graph", "policy"))
def _forward(graph: nnx.GraphDef, params: nnx.State, token_ids: Int[Array, "B T"], policy: Policy) -> Float[Array, "B T V"]:
    model = nnx.merge(graph, params)
    mask = policy.mask(token_ids, model.vocab, model.config)
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
    hidden, _ = model(token_ids, positions, with_memory(attend_under(mask), model.config))
    return model.logits(hidden)
