"""SpanLM: a model and its task behind one face, for notebooks and command lines."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from selfspan_jax.attention.sequences import attend_under, sequence_mask
from selfspan_jax.config import Attention, DecodeConfig, Implementation
from selfspan_jax.decoding import engine as decoding
from selfspan_jax.model import Decoder
from selfspan_jax.parallel.mesh import make_mesh, num_data_shards
from selfspan_jax.spans import TokenRoles, token_roles
from selfspan_jax.weights import checkpoints as checkpoint
from selfspan_jax.weights import huggingface, lora

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DEFAULT_NEW_TOKENS = 1024


class Task(Protocol):
    """How a corpus turns text into ids and back. Packages offer theirs under the entry point `selfspan.tasks`."""

    def encode_prompt(self, text: str) -> Int[np.ndarray, "T"]:
        """Ids up to and including `<solve>`. Raises ValueError for text that is no prompt."""

    def decode(self, token_ids: Iterable[int]) -> str: ...

    def answer(self, response_ids: Iterable[int]) -> str | None: ...

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Task: ...


def installed_tasks() -> dict[str, type[Task]]:
    """The tasks that installed packages offer, this project among them (`pip install -e .`)."""
    return {entry.name: entry.load() for entry in metadata.entry_points(group="selfspan.tasks")}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a response: the label that it opens, the labels that it names, and what it writes."""

    label: int
    refs: tuple[int, ...]
    text: str
    attended_tokens: float
    """Tokens that the step's own tokens attended to, on average."""

    def __str__(self) -> str:
        return f"<seg:{self.label}>{''.join(f'<ref:{ref}>' for ref in self.refs)}{self.text}"


@dataclasses.dataclass(frozen=True)
class Output:
    """A response, what it says and what each of its tokens read."""

    prompt: str
    text: str
    """The response as written, span tokens included."""
    answer: str | None
    """What the task reads as the response's answer; None where it has none."""
    steps: tuple[Step, ...]
    token_ids: Int[np.ndarray, "T"]
    """Prompt and response."""
    prompt_tokens: int
    num_attended: Int[np.ndarray, "R"]
    """For each response token, how many tokens it attended to, itself included."""
    attention: Attention
    finished: bool
    """False where decoding stopped at the token limit instead of `<eos>`."""
    unresolved_refs: int
    """`<ref:k>` tokens that named a label which no token carried."""
    lm: SpanLM = dataclasses.field(repr=False)

    @property
    def response_ids(self) -> Int[np.ndarray, "R"]:
        return self.token_ids[self.prompt_tokens :]

    @property
    def attended_fraction(self) -> float:
        """Mean over response tokens of |attended| / (t + 1); dense decoding has 1."""
        return float(np.mean(self.num_attended / np.arange(self.prompt_tokens + 1, len(self.token_ids) + 1)))

    def plot(self) -> Figure:
        """A matplotlib figure: the mask under which this was decoded, tokens attended to by position, KV rows read per step."""
        from selfspan_jax.viewing import html as page
        from selfspan_jax.viewing import plots as viz

        mask, texts = self.lm.mask(self.token_ids, self.attention), self.lm.token_texts(self.token_ids)
        return viz.plot_reading(mask, texts, self.prompt_tokens, [step.indices for step in page.read_steps(self)])

    def save_plot(self, file: Path) -> None:
        """Draws `plot` into a PNG, SVG or PDF file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self.plot().savefig(file, dpi=100)

    def to_html(self) -> str:
        """A page of its own, without network or other files, that shows what each step read and what named it."""
        from selfspan_jax.viewing import html as page

        return page.document(self)

    def _repr_html_(self) -> str:
        from selfspan_jax.viewing import html as page

        return page.fragment(self)


class SpanLM:
    """A decoder, as `Decoder.for_decoding` makes it of the one given, and the task that it was trained for."""

    def __init__(self, model: Decoder, task: Task, *, int8: bool = False, mesh: str | None = None):
        self.model = model.for_decoding(int8=int8)
        self.frozen = decoding.FrozenDecoder.of(self.model, make_mesh(mesh) if mesh else None)
        self.task = task

    @classmethod
    def load(
        cls,
        directory: str | Path,
        tasks: Mapping[str, type[Task]] | None = None,
        *,
        base: str | Path | None = None,
        int8: bool = False,
        mesh: str | None = None,
    ) -> SpanLM:
        """Loads a finished model.

        Args:
          directory: as `train.py` writes it, an adapter included; or a model of others, see `huggingface.load`: a Hugging Face
            directory or a GGUF file.
          tasks: what can turn text into ids, by the name that a checkpoint has for it; by default the installed ones.
          base: of an adapter, the model of others that it was trained on.
          int8: compute with int8 weights, half the bytes of bfloat16 ones.
          mesh: decode on several devices, `data=2,tensor=2` say: sequences are divided over `data`, kv heads over `tensor`.

        Raises: FileNotFoundError, ValueError with one line that says what is wrong with the directory.
        """
        if base is not None and not lora.is_adapter(Path(directory)):
            raise ValueError(f"{directory} is no adapter, so it takes no base")
        if huggingface.is_foreign(Path(directory)):
            return cls(*huggingface.load(directory), int8=int8, mesh=mesh)
        if lora.is_adapter(Path(directory)):
            model, fields = lora.load_adapter(Path(directory), None if base is None else Path(base))
        else:
            model, fields = checkpoint.load_model(Path(directory))
        tasks = installed_tasks() if tasks is None else tasks
        if (name := str(fields.get("task"))) not in tasks:
            known = f"known are {', '.join(sorted(tasks))}" if tasks else "none is installed: pip install -e . installs this project's"
            raise ValueError(f"{directory}: of task {name!r}; {known}")
        return cls(model, tasks[name].from_json(fields), int8=int8, mesh=mesh)

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
        attention: Attention | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        implementation: Implementation | None = None,
    ) -> Output | list[Output] | list[list[Output]]:
        """Decodes a prompt, or several in one batch.

        Args:
          prompts: text of the task (for arithmetic: expressions).
          num_samples: responses to each prompt; they share its cache rows. A prompt's result is then a list of so many.
          attention: "span" reads what the model names, "dense" everything, "window" first and recent tokens; by default
            what the model was trained with.
          max_new_tokens: default: what the model's context leaves, 1,024 at the most.
          temperature, top_p, seed: 0 is greedy; see DecodeConfig.

        Raises: ValueError for a prompt that the task cannot read, or that is too long for the model's context.
        """
        attention = self._trained(attention)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            return []
        ids = [self.task.encode_prompt(text) for text in texts]
        token_ids, lengths = self.padded(ids)
        config = DecodeConfig(
            attention=attention,
            max_new_tokens=self._room(lengths) if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            implementation=implementation,
        )
        samples = 1 if num_samples is None else num_samples
        state = decoding.generate(self.frozen, token_ids, lengths, config, jax.random.key(seed), num_samples=samples)
        flat = self.outputs([text for text in texts for _ in range(samples)], [i for i in ids for _ in range(samples)], state, attention)
        outputs = flat if num_samples is None else [flat[i : i + samples] for i in range(0, len(flat), samples)]
        return outputs[0] if isinstance(prompts, str) else outputs

    def stream(self, prompt: str, *, chunk_tokens: int = 8, **options: Any) -> Iterator[str]:
        """The text of one response as it is decoded. Options as for `generate`."""
        token_ids, lengths = self.padded([self.task.encode_prompt(prompt)])
        seed = options.pop("seed", 0)
        options["attention"] = self._trained(options.get("attention"))
        if options.get("max_new_tokens") is None:
            options["max_new_tokens"] = self._room(lengths)
        chunks = decoding.stream(self.frozen, token_ids, lengths, DecodeConfig(**options), jax.random.key(seed), chunk_tokens=chunk_tokens)
        for chunk in chunks:
            yield self.task.decode(chunk.tokens[0, : _num_written(chunk.tokens[0], self.model.vocab.eos_id)])

    def logits(self, token_ids: Int[np.ndarray, "T"], attention: Attention | None = None) -> Float[np.ndarray, "T V"]:
        """Scores of the next token after each token, float32, in one forward under the mask of a policy."""
        token_ids = self._checked(token_ids)
        return np.asarray(_forward(*nnx.split(self.model), jnp.asarray(token_ids)[None], self._trained(attention))[0])

    def mask(self, token_ids: Int[np.ndarray, "T"], attention: Attention | None = None) -> np.ndarray:
        """bool [T, T]: which token attends to which."""
        ids = self._checked(token_ids)
        mask = _mask(self._rounded(ids), self.model.vocab, self.model.config, self._trained(attention))
        return np.asarray(mask[0, : len(ids), : len(ids)])

    def roles(self, token_ids: Int[np.ndarray, "T"]) -> TokenRoles:
        """What the automaton makes of each token, as numpy arrays [T]."""
        ids = self._checked(token_ids)
        return jax.tree.map(lambda role: np.asarray(role)[0, : len(ids)], _roles(self._rounded(ids), self.model.vocab))

    def plot_mask(self, token_ids: Int[np.ndarray, "T"], attention: Attention | None = None) -> Figure:
        """A matplotlib figure of `mask`, the prompt (up to the first `<solve>`) told apart from the response."""
        from selfspan_jax.viewing import plots as viz

        solves = np.flatnonzero(np.asarray(token_ids) == self.model.vocab.solve_id)
        prompt_tokens = int(solves[0]) + 1 if len(solves) else len(token_ids)
        return viz.plot_mask(self.mask(token_ids, attention), self.token_texts(token_ids), prompt_tokens)

    def token_texts(self, token_ids: Int[np.ndarray, "T"]) -> list[str]:
        """The written form of each token."""
        return [self.task.decode([int(token)]) for token in token_ids]

    def padded(self, prompts: Sequence[Int[np.ndarray, "T"]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
        """Prompts of different lengths as one array and their lengths; on a mesh the first once more until they divide evenly.

        Raises: ValueError for a prompt beyond the context.
        """
        if self.frozen.mesh is not None:
            prompts = [*prompts, *[prompts[0]] * (-len(prompts) % num_data_shards(self.frozen.mesh))]
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        context = self.model.config.max_context_tokens
        if lengths.max() >= context:
            raise ValueError(f"the prompt is {lengths.max()} tokens long, but the model's context is {context}, response included")
        token_ids = np.full((len(prompts), lengths.max()), self.model.vocab.pad_id, np.int32)
        for row, prompt in zip(token_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        return token_ids, lengths

    def _room(self, lengths: Int[np.ndarray, "B"]) -> int:
        left = self.model.config.max_context_tokens - int(lengths.max())
        return min(left if left < 64 else left // 64 * 64, _DEFAULT_NEW_TOKENS)  # few sizes, so that few are compiled

    def _rounded(self, token_ids: Int[np.ndarray, "T"]) -> Int[Array, "1 R"]:
        """One sequence in one of few lengths, so that few are compiled: what follows a token changes nothing about it."""
        padding = -len(token_ids) % 128
        return jnp.asarray(np.pad(token_ids, (0, padding), constant_values=self.model.vocab.pad_id))[None]

    def _checked(self, token_ids: Int[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
        token_ids = np.asarray(token_ids, np.int32)
        context = self.model.config.max_context_tokens
        if token_ids.ndim != 1 or not 0 < len(token_ids) <= context:
            raise ValueError(f"token ids of shape {token_ids.shape}; expected [T] with T from 1 to the model's context of {context}")
        decoding.check_ids(self.model, token_ids)
        return token_ids

    def _trained(self, attention: Attention | None) -> Attention:
        return self.model.config.mask if attention is None else attention

    def outputs(
        self, prompts: Sequence[str], prompt_ids: Sequence[Int[np.ndarray, "T"]], state: decoding.DecodeState, attention: Attention
    ) -> list[Output]:
        """What was decoded for each prompt; sequences of the batch beyond the prompts are left out."""
        tokens, attended = np.asarray(state.new_tokens), np.asarray(state.num_attended)
        unresolved = np.asarray(state.span.unresolved_refs)
        rows = np.full(state.cache.table.shape, self.model.vocab.pad_id, np.int32)  # one shape for all batches that decode alike
        for row, ids, new in zip(rows, prompt_ids, tokens):
            row[: len(ids) + len(new)] = np.concatenate([ids, new])
        roles = jax.tree.map(np.asarray, _roles(jnp.asarray(rows), self.model.vocab))
        return [
            self._output(prompt, ids, tokens[b], attended[b], jax.tree.map(operator.itemgetter(b), roles), attention, int(unresolved[b]))
            for b, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
        ]

    def _output(
        self,
        prompt: str,
        prompt_ids: Int[np.ndarray, "T"],
        new_tokens: Int[np.ndarray, "M"],
        num_attended: Int[np.ndarray, "M"],
        roles: TokenRoles,
        attention: Attention,
        unresolved_refs: int,
    ) -> Output:
        eos_id = self.model.vocab.eos_id
        written = _num_written(new_tokens, eos_id)
        response = new_tokens[:written]
        token_ids = np.concatenate([prompt_ids, response])
        return Output(
            prompt=prompt,
            text=self.task.decode(response),
            answer=self.task.answer(response),
            steps=self._steps(token_ids, len(prompt_ids), num_attended[:written], roles),
            token_ids=token_ids,
            prompt_tokens=len(prompt_ids),
            num_attended=num_attended[:written],
            attention=attention,
            finished=bool(written and response[-1] == eos_id),
            unresolved_refs=unresolved_refs,
            lm=self,
        )

    def _steps(self, token_ids, prompt_tokens: int, num_attended, roles: TokenRoles) -> tuple[Step, ...]:
        response = roles.step_index[prompt_tokens : len(token_ids)]
        steps = []
        for start in np.unique(response):
            indices = prompt_tokens + np.flatnonzero(response == start)
            if roles.is_header[start]:
                body = [token_ids[i] for i in indices if not roles.is_header[i] and token_ids[i] != self.model.vocab.eos_id]
                steps.append(
                    Step(
                        label=int(roles.labels[start]),
                        refs=tuple(int(name) for name in roles.names[indices] if name >= 0),
                        text=self.task.decode(body),
                        attended_tokens=float(np.mean(num_attended[indices - prompt_tokens])),
                    )
                )
        return tuple(steps)


def _num_written(new_tokens: Int[np.ndarray, "M"], eos_id: int) -> int:
    """Tokens up to and including the first `<eos>`."""
    ends = np.flatnonzero(new_tokens == eos_id)
    return int(ends[0]) + 1 if len(ends) else len(new_tokens)


_mask = jax.jit(sequence_mask, static_argnames=("vocab", "config", "attention"))
_roles = jax.jit(token_roles, static_argnames=("vocab",))


@functools.partial(jax.jit, static_argnames=("graph", "attention"))
def _forward(graph: nnx.GraphDef, params: nnx.State, token_ids: Int[Array, "B T"], attention: Attention) -> Float[Array, "B T V"]:
    model = nnx.merge(graph, params)
    mask = sequence_mask(token_ids, model.vocab, model.config, attention)
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
    hidden, _ = model(token_ids, positions, attend_under(mask))
    return model.logits(hidden)
