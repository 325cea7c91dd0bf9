"""SpanLM: a model and its task in one object, for notebooks and command lines."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from selfspan_jax.attention.policies import Policy, get_policy
from selfspan_jax.attention.sequences import attend_under
from selfspan_jax.config import COMPUTE_DTYPES, DecodeConfig, Dtype, Implementation, Sampling, Weights
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.state import DecodeState
from selfspan_jax.errors import UserError
from selfspan_jax.model import Decoder
from selfspan_jax.parallel.mesh import make_mesh, num_data_shards
from selfspan_jax.task import Task, end_ids, installed_tasks
from selfspan_jax.viewing.output import Output
from selfspan_jax.viewing.reading import Reading, Step, attention_mask
from selfspan_jax.weights import hub, importing, lora, models

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Output", "SpanLM", "Step", "Task", "installed_tasks"]

_DEFAULT_NEW_TOKENS = 1024


class SpanLM:
    """Decode with a model, in the words of the task that it was trained for."""

    def __init__(self, model: Decoder, task: Task, *, weights: Weights = "bf16", mesh: str | None = None):
        """Copy a model for decoding; options as for `load`."""
        _check_weights(weights)
        self.model = model.for_decoding(weights=weights)
        self.engine = Engine(self.model, make_mesh(mesh) if mesh else None)
        self.task = task

    @classmethod
    def load(
        cls,
        directory: str | Path,
        tasks: Mapping[str, type[Task]] | None = None,
        *,
        base: str | Path | None = None,
        dtype: Dtype | None = None,
        weights: Weights = "bf16",
        mesh: str | None = None,
    ) -> SpanLM:
        """Load a model.

        Args:
          directory: as `train.py` writes it, adapters included; a Hugging Face directory, or an id of the Hub; or a GGUF file.
          tasks: task classes by the name that a checkpoint has for them; by default the installed ones.
          base: for an adapter, the pretrained model that it was trained on.
          dtype: "bf16", "f32" or "f16", what activations and products are computed in; by default as the model was trained, or,
            pretrained, float32 where its config or its file says so and bfloat16 elsewhere.
          weights: "bf16", the model's own compute dtype, or "int8", half the bytes of bfloat16.
          mesh: decode on several devices, for example `data=2,tensor=2`: `data` divides sequences, `tensor` kv heads.

        Raises: FileNotFoundError, UserError with one line that says what is wrong with the directory.
        """
        if dtype not in (None, *COMPUTE_DTYPES):
            raise UserError(f"dtype is {dtype!r}; allowed: {', '.join(COMPUTE_DTYPES)}")
        if not (tasks is None or isinstance(tasks, Mapping)):
            raise UserError(f"tasks is {tasks!r}; expected a mapping from names to task classes")
        _check_weights(weights)
        path = hub.locate(directory)
        computed: dict[str, Any] = {} if dtype is None else {"compute_dtype": COMPUTE_DTYPES[dtype]}
        is_adapter = lora.is_adapter(path)
        if base is not None and not is_adapter:
            raise UserError(f"{directory} is no adapter, so it takes no base")
        if importing.is_pretrained(path):
            return cls(*importing.load(path, **computed), weights=weights, mesh=mesh)
        model, fields = lora.load_adapter(path, base) if is_adapter else models.load_model(path)
        model.config = dataclasses.replace(model.config, **computed)
        tasks = installed_tasks() if tasks is None else tasks
        if (name := str(fields.get("task"))) not in tasks:
            known = f"known are {', '.join(sorted(tasks))}" if tasks else "none is installed: pip install -e . installs this project's"
            raise UserError(f"{directory}: of task {name!r}; {known}")
        return cls(model, tasks[name].from_json(fields), weights=weights, mesh=mesh)

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
        attention: str | Policy | None = None,
        max_new_tokens: int | None = None,
        chat: bool = False,
        seed: int = 0,
        implementation: Implementation | None = None,
        **sampling: Any,
    ) -> Output | list[Output] | list[list[Output]]:
        """Decode a response to a prompt, or to each of several in one batch.

        Args:
          prompts: text of the task (for arithmetic: expressions).
          num_samples: responses to each prompt, which share its cache rows; a prompt's result is then a list of that length.
          attention: a policy of `selfspan_jax.attention.policies` or its name: "span" reads what the model names, "dense"
            everything, "window" the first and the most recent tokens; by default what the model was trained with.
          max_new_tokens: at most as many as the model's context leaves; by default that, up to 1,024.
          chat: write each prompt as a user's message, by the chat template of a pretrained model's tokenizer.
          seed: of what is drawn at a temperature above 0.
          implementation: of the decode attention kernel; by default the best that the device has.
          sampling: `temperature` (0, the default, takes the most likely token) and `top_p`, see `Sampling`.

        Returns: an Output; for several prompts a list of them in order.

        Raises: UserError for a prompt that the task cannot read, or that is too long for the model's context.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            return []
        ids = [self._encode(text, chat) for text in texts]
        samples = 1 if num_samples is None else num_samples
        arguments = self._arguments(ids, attention, max_new_tokens, seed, implementation, **sampling)
        state = self.engine.generate(*arguments, num_samples=samples)
        order = [number for number in range(len(texts)) for _ in range(samples)]
        flat = self.outputs([texts[i] for i in order], [ids[i] for i in order], state, self._policy(attention))
        outputs = flat if num_samples is None else [flat[i : i + samples] for i in range(0, len(flat), samples)]
        return outputs[0] if isinstance(prompts, str) else outputs

    def stream(self, prompt: str, *, chunk_tokens: int = 8, chat: bool = False, **options: Any) -> Iterator[str]:
        """Yield the text of one response while it is decoded, `chunk_tokens` tokens at a time; options as for `generate`."""
        arguments = self._arguments([self._encode(prompt, chat)], **options)
        for chunk in self.engine.stream(*arguments, chunk_tokens=chunk_tokens):
            yield self.task.decode(_written(chunk.tokens[0], self.end_ids))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a response, the vocabulary's `<eos>` first."""
        return end_ids(self.task, self.model.vocab)

    def _encode(self, prompt: str, chat: bool) -> Int[np.ndarray, "T"]:
        if not chat:
            return self.task.encode_prompt(prompt)
        if (encode_chat := getattr(self.task, "encode_chat", None)) is None:
            raise UserError("chat is for pretrained models: this model's task writes its prompts itself")
        return encode_chat(prompt)

    def _arguments(self, ids, attention=None, max_new_tokens=None, seed=0, implementation=None, **sampling) -> tuple:
        """Return what an engine's `generate` and `stream` take for prompts and the options of `generate`."""
        token_ids, lengths = self.pad(ids)
        if max_new_tokens is None:
            left = self.model.config.max_context_tokens - int(lengths.max())
            max_new_tokens = min(left if left < 64 else left // 64 * 64, _DEFAULT_NEW_TOKENS)  # few sizes, so that few are compiled
        options: dict[str, Any] = {"implementation": implementation, "stop_ids": self.end_ids[1:]}
        config = DecodeConfig(self._policy(attention), max_new_tokens, Sampling(**sampling), **options)
        return token_ids, lengths, config, jax.random.key(seed)

    def logits(self, token_ids: Int[np.ndarray, "T"], attention: str | Policy | None = None) -> Float[np.ndarray, "T V"]:
        """Score the token after each token, in float32, in one forward pass under the mask of a policy."""
        token_ids = self._check_ids(token_ids)
        return np.asarray(_forward(*nnx.split(self.model), jnp.asarray(token_ids)[None], self._policy(attention))[0])

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
        context = self.model.config.max_context_tokens
        if lengths.max() >= context:
            raise UserError(f"the prompt is {lengths.max()} tokens long, but the model's context is {context}, response included")
        token_ids = np.full((len(prompts), lengths.max()), self.model.vocab.pad_id, np.int32)
        for row, prompt in zip(token_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        return token_ids, lengths

    def outputs(
        self, prompts: Sequence[str], prompt_ids: Sequence[Int[np.ndarray, "T"]], state: DecodeState, policy: Policy
    ) -> list[Output]:
        """Read back what was decoded for each prompt; sequences of the batch beyond the prompts are left out."""
        model, outputs = self.model, []
        for prompt, ids, tokens, attended in zip(prompts, prompt_ids, np.asarray(state.new_tokens), np.asarray(state.num_attended)):
            token_ids = np.concatenate([ids, _written(tokens, self.end_ids)])
            read = attended[: len(token_ids) - len(ids)]
            outputs.append(Output(self.task, token_ids, len(ids), read, policy, model.config, model.vocab, prompt))
        return outputs

    def _check_ids(self, token_ids: Int[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
        token_ids = np.asarray(token_ids, np.int32)
        context = self.model.config.max_context_tokens
        if token_ids.ndim != 1 or not 0 < len(token_ids) <= context:
            raise UserError(f"token ids of shape {token_ids.shape}; expected [T] with T from 1 to the model's context of {context}")
        self.engine.check_ids(token_ids)
        return token_ids

    def _policy(self, attention: str | Policy | None) -> Policy:
        return get_policy(self.model.config.mask if attention is None else attention)


def _check_weights(weights: Weights) -> None:
    if weights not in get_args(Weights):
        raise UserError(f"weights is {weights!r}; allowed: {', '.join(get_args(Weights))}")


def _written(tokens: Int[np.ndarray, "M"], end_ids: tuple[int, ...]) -> Int[np.ndarray, "R"]:
    """Cut tokens after the first that ends a response."""
    ends = np.flatnonzero(np.isin(tokens, end_ids))
    return tokens[: int(ends[0]) + 1] if len(ends) else tokens


@functools.partial(jax.jit, static_argnames=("graph", "policy"))
def _forward(graph: nnx.GraphDef, params: nnx.State, token_ids: Int[Array, "B T"], policy: Policy) -> Float[Array, "B T V"]:
    model = nnx.merge(graph, params)
    mask = policy.mask(token_ids, model.vocab, model.config)
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
    hidden, _ = model(token_ids, positions, attend_under(mask))
    return model.logits(hidden)
