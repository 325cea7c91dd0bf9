"""Prompts in labelled pieces, and responses whose steps name the pieces that they rest on: what tasks on text share."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from data import spans, task
from data.alignment import split_sentences
from data.errors import UserError
from data.sources import Unusable
from data.vocab import TokenizerVocab, Vocab, translation

MIN_PROMPT_TOKENS = 16


def style(settings: Any, *names: str) -> dict[str, Any]:
    """Return how a corpus or a task writes, as arguments of `encode_prompt` and `encode`: what all set, and what is named."""
    return {name: getattr(settings, name) for name in ("max_prompt_tokens", "closed_pieces", *names)}


def encode_prompt(
    instruction: str,
    pieces: Sequence[str],
    vocab: TokenizerVocab,
    *,
    max_prompt_tokens: int,
    closed_pieces: bool,
    closed_sentences: bool = False,
    late_instruction: bool = False,
    num_steps: int = 1,
    divided_into: str = "pieces",
) -> tuple[list[int], int]:
    """Write a prompt, labels from 1 on, cut at the end of a piece: (ids, pieces that were kept).

    Args:
      closed_sentences: open a piece's label again between its sentences, so that each of them has a row of the table of contents.
      late_instruction: the instruction stands once more at the end, in label 0: there it has read all pieces, and all steps see it.
      divided_into: what errors call the pieces.

    Raises:
      Unusable: a first piece that does not fit, or more pieces and steps than labels.
    """
    told = vocab.plain_text_ids(" " + instruction) if instruction else []
    token_ids, end = [vocab.bos_id, *told], [*([vocab.seg_base, *told] if late_instruction else []), vocab.solve_id]
    kept = 0
    for number, text in enumerate(pieces):
        label = min(1 + number, vocab.num_labels - 1)
        sentences = (split_sentences(text) if closed_sentences else []) or [text]
        own = [i for sentence in sentences for i in (vocab.seg_base + label, *_text_ids(vocab, sentence))]
        ids = spans.piece(label, own[1:], vocab, closed=closed_pieces)
        if len(token_ids) + len(ids) + len(end) > max_prompt_tokens:
            break
        token_ids += ids
        kept += 1
    if not kept:
        message = f"the first of the text's {divided_into} does not fit into {max_prompt_tokens:,} tokens of prompt"
        raise Unusable(f"{message}; blank lines divide them", "with a first piece longer than max_prompt_tokens")
    if kept > (room := vocab.num_labels - 1 - num_steps):
        message = f"the text has {len(pieces):,} {divided_into}, but the model has room for {room:,}"
        raise Unusable(f"{message}: each takes a label, as a step of the response does", "with more pieces and steps than num_labels")
    return [*token_ids, *end], kept


@functools.lru_cache(maxsize=1024)
def _text_ids(vocab: TokenizerVocab, text: str) -> tuple[int, ...]:
    """Encode the text of a piece: catalogues, and what was said before a turn, have the same ones again."""
    return tuple(vocab.plain_text_ids(" " + text))


Part = tuple[Sequence[int], str]
"""Pieces that a step names, and the text that follows."""


def encode_steps(
    prompt: Sequence[int],
    kept: int,
    steps: Sequence[Sequence[Part]],
    vocab: TokenizerVocab,
    uniform: float | None,
    *,
    closed: bool = False,
    named: int | None = None,
) -> tuple[npt.NDArray[np.int32], int]:
    """Write the response after a prompt of `kept` pieces, each step in parts: (ids of both, int32 [n], the first label).

    Parts after a step's first begin with its own label's `<ref:k>`, which names nothing new: it is a header, and chooses what follows.

    Args:
      uniform: in [0, 1), where the labels begin among the places that there are; None for label 1.
      closed: end each step with its `<seg:k>` once more, which has read it: so later span tokens know what was named and written.
      named: a piece that is named before the first step: `<solve>`, which has read all of the prompt, chooses it.
    """
    token_ids, first_label = [*prompt], 1
    if uniform is not None:
        first_label = vocab.first_label(kept + len(steps), uniform)
        tags = range(vocab.seg_base + 1, vocab.seg_base + vocab.num_labels)
        token_ids = [i + first_label - 1 if i in tags else i for i in token_ids]
    if named is not None:
        token_ids.append(vocab.ref_base + first_label + named)
    for number, parts in enumerate(steps):
        own = first_label + kept + number
        for place, (sources, text) in enumerate(parts):
            token_ids.append(vocab.ref_base + own if place else vocab.seg_base + own)
            token_ids += [vocab.ref_base + first_label + i for i in sources]
            token_ids += vocab.plain_text_ids(" " + text)
        token_ids += [vocab.seg_base + own] if closed else []
    return np.array([*token_ids, vocab.eos_id], np.int32), first_label


def without_span_tokens(token_ids: npt.NDArray[np.int32], prompt_tokens: int, vocab: Vocab) -> tuple[npt.NDArray[np.int32], int]:
    """Take the span tokens out of an example: (ids, tokens of the prompt). Steps after the first begin with `<solve>`."""
    segs, refs = (spans.is_label(token_ids, base, vocab) for base in (vocab.seg_base, vocab.ref_base))
    later = np.cumsum(segs & (np.arange(len(token_ids)) >= prompt_tokens)) > 1  # the prompt's `<solve>` opens the first step
    kept = ~refs & (~segs | later)
    return np.where(segs, np.int32(vocab.solve_id), token_ids)[kept], int(kept[:prompt_tokens].sum())


class Written(NamedTuple):
    """A step of a response: its label, the pieces of the prompt that it names, from 0 on, and its text."""

    label: int
    named: frozenset[int]
    text: str


@dataclasses.dataclass(frozen=True)
class PiecesTask(task.Task):
    """Read the steps of responses to prompts in pieces; the base of tasks on text.

    Attributes:
      vocab: trained by `data.vocab.train_vocab`, or a language model's own with structural tokens added.
      max_prompt_tokens: Longer prompts are cut at the end of a piece.
      closed_pieces: Each piece ends with its `<seg:k>` once more.
      source: what the corpus was read from.
    """

    vocab: TokenizerVocab
    max_prompt_tokens: int
    closed_pieces: bool
    source: str

    view: ClassVar[str] = "sources"

    def __post_init__(self) -> None:
        if not isinstance(self.vocab, TokenizerVocab):
            raise UserError(f"the vocabulary is not that of a tokenizer: {self.name} cannot be written with it")
        if type(self.max_prompt_tokens) is not int or self.max_prompt_tokens < MIN_PROMPT_TOKENS:
            raise UserError(f"max_prompt_tokens is {self.max_prompt_tokens!r}; allowed: whole numbers from {MIN_PROMPT_TOKENS}")

    @property
    def header_view(self) -> spans.HeaderView:
        """What span tokens of responses are meant to see."""
        return "labels" if self.closed_pieces else "all"

    def steps(self, response_ids: Iterable[int]) -> list[Written]:
        """Read the steps of a response, labels from 1 on; what stands before the first one is left out, and what closes one."""
        _, found, _ = spans.read_steps(response_ids, self.vocab)
        steps = [own for own, before in zip(found, (None, *found)) if not own.closes(before)]
        text = [self.vocab.decode(i for i in step.body if i not in self.vocab.structural).strip() for step in steps]
        return [Written(step.label, frozenset(label - 1 for label in step.named - {step.label}), own) for step, own in zip(steps, text)]

    def answer(self, response_ids: Iterable[int]) -> str | None:
        """Read the text without span tokens; None where no step was opened."""
        return " ".join(step.text for step in self.steps(response_ids)) or None

    def rewrite(self, example: Any, uniform: float, vocab: Vocab) -> Any:
        """Write an example again as `renumber` does; where its vocabulary writes text as this one does, without its text."""
        ids, tags = example.token_ids, spans.is_label(example.token_ids, vocab.seg_base, vocab)
        table, used = translation(vocab, self.vocab), int(ids[tags].max(initial=vocab.seg_base)) - vocab.seg_base - example.first_label + 1
        if table is None or used >= self.vocab.num_labels:
            return self.renumber(example, uniform)
        first = self.vocab.first_label(used, uniform)
        moved = table[ids]
        for base, own in ((vocab.seg_base, self.vocab.seg_base), (vocab.ref_base, self.vocab.ref_base)):
            tags = spans.is_label(ids, base, vocab)
            moved[tags] = ids[tags] + (own - base) + (ids[tags] > base) * (first - example.first_label)
        is_whole = moved.min() >= 0  # no text of it is structural here
        return dataclasses.replace(example, token_ids=moved, first_label=first) if is_whole else self.renumber(example, uniform)

    @property
    def divided_into(self) -> str:
        """What the pieces of a prompt's text are, in the plural; blank lines divide them too."""
        return "sentences"

    def cut_warning(self, kept: int, pieces: Sequence[str], *, whole: str) -> list[str]:
        """Say how many pieces of a text a prompt has, where that is not all."""
        if kept == len(pieces):
            return []
        share = sum(map(len, pieces[:kept])) / sum(map(len, pieces))
        limit = f"its prompts have at most {self.max_prompt_tokens} tokens"
        return [f"The model reads the first {kept} of {len(pieces)} {self.divided_into}, {share:.0%} of the {whole}: {limit}."]
