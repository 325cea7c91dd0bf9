"""Score what a model of documents chooses next, by kind of token, on gold responses: which of it is learnt, and what is not.

    python -m experiments.choices runs/labels-0/model --data corpora/stories --split validation --json results/choices.json

Each token is predicted after the gold ones before it, so that one wrong choice spoils no other: what `<solve>` names, what
opens a step, the question that it answers, its first source, further ones, where naming stops, text, what closes it, and the end.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from tyro.conf import Positional

from data import examples, spans
from data.documents.corpus import QUESTION
from data.documents.task import DocumentTask
from data.tasks import TASKS
from experiments import pages
from selfspan_jax import files
from selfspan_jax.attention.sequences import attend_in_training
from selfspan_jax.lm import SpanLM
from selfspan_jax.model import Decoder

_MULTIPLE = 128  # that lengths are padded to
_FAMILIES = dict.fromkeys(("first label", "next label", "closes"), 0) | dict.fromkeys(
    ("<solve>'s", "question", "first source", "more sources"), 1
)  # 0: <seg:k>, 1: <ref:k>


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """Score what a model of documents chooses next, by kind of token, on gold responses."""

    checkpoint: Positional[Path]
    """A finished model."""
    data: Path
    """A corpus directory that python -m data wrote."""
    split: Literal["train", "validation", "test"] = "validation"
    """Its part."""
    num_examples: int = 64
    """Examples, at most."""
    json: Path | None = None
    """Write the table into this file; - is standard output."""

    def run(self) -> None:
        lm = SpanLM.load(self.checkpoint, TASKS)
        task, sets, _ = examples.stored(self.data, lm.task, TASKS, self.num_examples, self.split)
        found = choices(lm.model, task, *sets.values())
        for kind, own in found.items():
            shares = f"right {own['right']:6.1%}  within its family {own['right_within_family']:6.1%}  loss {own['loss']:.3f}"
            print(f"{kind:13}{own['tokens']:8,} tokens  {shares}")
        if self.json:
            files.write_json(self.json, {"checkpoint": self.checkpoint.name, "data": self.data.name, "kinds": found})


def kinds(ids: np.ndarray, prompt_tokens: int, task: DocumentTask) -> Iterator[tuple[str, set[int]]]:
    """Yield the kind of each token of a response, and the ids that are right in its place: any source of the step not yet named is."""
    vocab, label = task.vocab, None
    questions = _questions(ids[:prompt_tokens], task)
    response = ids[prompt_tokens:].tolist()
    segs, refs = (range(base, base + vocab.num_labels) for base in (vocab.seg_base, vocab.ref_base))
    named = 0
    for place, token in enumerate(response):
        if token in segs:
            yield ("closes" if token == label else "first label" if label is None else "next label"), {token}
            label, named = token, 0
        elif token in refs and label is None:
            yield "<solve>'s", {token}
        elif token in refs and token - vocab.ref_base in questions:
            yield "question", {token}
        elif token in refs:
            rest = set()
            for later in response[place:]:
                if later not in refs:
                    break
                rest.add(later)
            yield ("more sources" if named else "first source"), rest
            named += 1
        elif token == vocab.eos_id:
            yield "end", {token}
        else:
            yield ("text" if response[place - 1] not in refs else "first text"), {token}


def _questions(prompt: np.ndarray, task: DocumentTask) -> set[int]:
    """Return the labels of the pieces that are questions."""
    begins = task.vocab.plain_text_ids(f" {QUESTION}")
    windows = np.lib.stride_tricks.sliding_window_view(prompt, 1 + len(begins))
    found = windows[(windows[:, 1:] == begins).all(axis=1) & spans.is_label(windows[:, 0], task.vocab.seg_base, task.vocab), 0]
    return set((found - task.vocab.seg_base).tolist())


def choices(model: Decoder, task: DocumentTask, chosen: Iterable[Any]) -> dict[str, dict[str, float]]:
    """Score a model's next tokens on examples: of each kind the tokens, how many are predicted right, and right within their family.

    The family of a `<seg:k>` or `<ref:k>` are all of its kind: whether it is one of them is a choice of its own.
    """
    own = [(np.asarray(example.token_ids), example.prompt_tokens) for example in chosen]
    size, room = (-(-most // _MULTIPLE) * _MULTIPLE for most in (max(len(ids) for ids, _ in own), max(len(ids) - n for ids, n in own)))
    sums: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(4))
    graph, state = nnx.split(model)
    for ids, begin in own:
        found, count = list(kinds(ids, begin, task)), len(ids) - begin
        padded = np.pad(ids, (0, size - len(ids)), constant_values=task.vocab.pad_id)  # what follows a token changes nothing about it
        places, targets = (np.pad(x, (0, room - count)) for x in (np.arange(begin - 1, len(ids) - 1), ids[begin:]))
        best, *families, losses = (np.asarray(x) for x in _predict(graph, state, padded[None], places, targets))
        for place, (kind, right) in enumerate(found):
            family = families[_FAMILIES[kind]] if kind in _FAMILIES else best
            sums[kind] += (1, int(best[place]) in right, int(family[place]) in right, losses[place])
    names = ("right", "right_within_family", "loss")
    return {kind: {"tokens": int(total[0]), **dict(zip(names, (total[1:] / total[0]).round(4).tolist()))} for kind, total in sums.items()}


@functools.partial(jax.jit, static_argnames=("graph",))
def _predict(
    graph: nnx.GraphDef, state: nnx.State, token_ids: Int[Array, "1 T"], rows: Int[Array, "R"], targets: Int[Array, "R"]
) -> tuple[Int[Array, "R"], Int[Array, "R"], Int[Array, "R"], Float[Array, "R"]]:
    """Return the most likely token after some tokens of a sequence, of all, of `<seg:k>` and of `<ref:k>`, and the target's loss."""
    model = nnx.merge(graph, state)
    attend, _ = attend_in_training(token_ids, model.vocab, model.config)
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
    hidden, _ = model(token_ids, positions, attend)
    logits, vocab = model.logits(hidden[:, rows])[0], model.vocab
    families = (logits[:, base : base + vocab.num_labels] for base in (vocab.seg_base, vocab.ref_base))
    of_segs, of_refs = (jnp.argmax(own, axis=1) + base for own, base in zip(families, (vocab.seg_base, vocab.ref_base)))
    losses = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jnp.argmax(logits, axis=1), of_segs, of_refs, losses


def main(arguments: Sequence[str] | None = None) -> None:
    pages.run_command(Choices, "experiments.choices", arguments)


if __name__ == "__main__":
    main()
