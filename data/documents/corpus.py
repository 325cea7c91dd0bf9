"""Documents in pieces, and responses whose steps name the pieces that they rest on, as token ids.

<bos> instruction, what it is about<seg:1> piece 1<seg:1><seg:2> piece 2<seg:2> ...<solve><seg:m+1><ref:a><ref:b> step ...<eos>
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from data import spans, streams
from data.alignment import Alignment, readable, split_sentences
from data.errors import UserError, check_choice, check_range
from data.pieces import MIN_PROMPT_TOKENS, Part, encode_prompt, encode_steps, without_span_tokens
from data.sources import Unusable
from data.streams import GeneratedCorpus
from data.vocab import MAX_TOKENIZER_TOKENS, MIN_TOKENIZER_TOKENS, TokenizerVocab, Vocab

QUESTION = "Question:"
"""What a piece begins with that is asked, not read: no `<solve>` names it."""
MARK = "\x1e"  # ASCII's record separator: text has none
BREAK = f"\n\n{MARK}"

UNKNOWN = (-1,)  # the sources that alignment is to find

TooLong = Literal["drop", "cut"]
Labelling = Literal["pieces", "plain"]
_BLANK_LINES = re.compile(r"\n\s*\n")
_MIN_OVERLAP = 8  # characters: marked text begins and ends a little beyond its sentences


class Step(NamedTuple):
    """What a step writes, and the pieces that it rests on, in the order in which it names them; UNKNOWN before they are aligned.

    `answers` are other texts that people gave in its place, `kind` is what scores tell apart.
    """

    text: str
    sources: tuple[int, ...]
    answers: tuple[str, ...] = ()
    kind: str = ""


class Evidence(NamedTuple):
    """Pieces that people marked as saying one thing, ascending, and the steps that they marked as saying it too."""

    pieces: tuple[int, ...]
    steps: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Document:
    """What all steps need (a title, a question), the pieces of a text, the steps of the response, and what people marked in both."""

    about: str
    pieces: tuple[str, ...]
    steps: tuple[Step, ...]
    evidence: tuple[Evidence, ...] = ()

    @property
    def prompt(self) -> str:
        """The text that the task's `encode_prompt` takes: it keeps the pieces as they are."""
        return BREAK.join((self.about, *self.pieces))


@dataclasses.dataclass(frozen=True, eq=False)
class Example(streams.Example):
    """A document as token ids."""

    document: Document
    first_label: int
    predictable: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    """Positions of the prompt's tokens that are to be predicted as well: each `<seg:k>` that follows on the end of a closed piece."""

    @property
    def prompt(self) -> str:
        return self.document.prompt

    @property
    def text(self) -> str:
        """What it is known by in another split: the pieces, whatever is asked of them."""
        return "".join(self.document.pieces)


@dataclasses.dataclass(frozen=True)
class Style:
    """How prompts and responses are written: what corpora of documents and their tasks set alike.

    Attributes:
      max_prompt_tokens: Documents with longer prompts are dropped, or cut.
      max_example_tokens: Documents that are longer with their response are dropped: what a row of training has room for.
      piece_sentences: Sentences to a piece (label), within a paragraph; 0: whole paragraphs.
      closed_pieces: End each piece with its `<seg:k>` once more: for header_view="labels".
      closed_sentences: End each sentence of a piece with the piece's `<seg:k>`, not the last one alone.
      closed_steps: End each step with its `<seg:k>` once more, so that later span tokens know what was written.
      solve_names: Name the first step's first source before the step as well: then `<solve>`, which has read all of the prompt, chooses it.
      late_instruction: Write the instruction once more before `<solve>`, for all steps to see: there it has read all pieces.
      labelling: "pieces" have labels, which steps name; "plain" is the same text without span tokens, steps told apart by `<solve>`.
    """

    max_prompt_tokens: int = 7680
    max_example_tokens: int = 8192
    piece_sentences: int = 1
    closed_pieces: bool = True
    closed_sentences: bool = False
    closed_steps: bool = False
    solve_names: bool = False
    late_instruction: bool = False
    labelling: Labelling = "pieces"

    def check_style(self) -> None:
        """Raise UserError for what cannot be written so."""
        check_choice("labelling", self.labelling, Labelling)
        check_range(self, "max_prompt_tokens", "max_example_tokens", low=MIN_PROMPT_TOKENS)
        check_range(self, "piece_sentences", low=0)
        if self.closed_sentences and not self.closed_pieces:
            raise UserError("closed_sentences is True where closed_pieces is False; allowed: both, as the last sentence ends the piece")


STYLE = ("closed_sentences", "labelling", "closed_steps", "solve_names", "late_instruction")
"""What of a style tells how text is written, beside what all tasks on pieces set."""


@dataclasses.dataclass(frozen=True)
class Corpus(Style, GeneratedCorpus[Example]):
    """How documents are read and written.

    Attributes:
      vocab_tokens: Entries of the byte-pair vocabulary, at most.
      num_labels: Labels of the vocabulary; each piece and each step takes one.
      too_long: drop them, or cut them at the end of a piece: then steps rest on what is left.
    """

    vocab_tokens: int = 8192
    num_labels: int = 512
    too_long: TooLong = "drop"

    chunk_examples: ClassVar[int] = 1

    def __post_init__(self) -> None:
        Vocab(self.num_labels)
        self.check_style()
        check_choice("too_long", self.too_long, TooLong)
        check_range(self, "vocab_tokens", low=MIN_TOKENIZER_TOKENS, high=MAX_TOKENIZER_TOKENS)

    def parts(self, document: Document, number: int, uniform: float | None) -> list[Part]:
        """Return what a step names and writes, in turn."""
        return whole(document.steps[number])

    @property
    def vocab(self) -> TokenizerVocab:
        raise _not_generated()

    @property
    def description(self) -> str:
        return "documents"

    def largest(self) -> "Corpus":
        return self

    def chunk(self, vocab: Any, seed: int, split: streams.Split, number: int) -> list[Example]:
        raise _not_generated()


def whole(step: Step) -> list[Part]:
    """Return a step as one part, which names all of its sources."""
    return [(tuple(dict.fromkeys(step.sources)), step.text)]


def _not_generated() -> UserError:
    return UserError("documents are not drawn: give a corpus directory with --data; python -m data writes one of a --source")


def sink(instruction: str, about: str) -> str:
    """Return what all steps see: it stands before the first piece. Rows that were written by a task begin with its instruction."""
    return " ".join(filter(None, (instruction, about.removeprefix(instruction).lstrip())))


def encode(
    document: Document,
    instruction: str,
    vocab: TokenizerVocab,
    *,
    alignment: Alignment | None = None,
    max_example_tokens: int,
    labelling: Labelling,
    closed_steps: bool,
    solve_names: bool,
    parts: Callable[[Document, int, float | None], Sequence[Part]],
    too_long: TooLong = "drop",
    uniform: float | None = None,
    **style: Any,
) -> Example:
    """Write a document; steps that rest on no piece are left out.

    Args:
      alignment: finds the sources of steps that have none yet.
      parts: returns what a step names and writes, in turn, with sources that may be drawn by `uniform`.
      style: `max_prompt_tokens`, `closed_pieces`, `closed_sentences` and `late_instruction`.

    Raises:
      Unusable: it is too long, or no step rests on anything.
    """
    prompt, kept = encode_prompt(sink(instruction, document.about), document.pieces, vocab, num_steps=len(document.steps), **style)
    if kept < len(document.pieces):
        if too_long == "drop":
            raise Unusable(f"longer than {style['max_prompt_tokens']} tokens of prompt", "longer than max_prompt_tokens")
        document = cut(document, kept)
    if alignment is not None:
        document = align(document, alignment)
    document = without_unfounded(document)
    if not document.steps:
        raise Unusable("no step rests on a piece", "without a step that rests on a piece")
    first = document.steps[0].sources
    named = next((i for i in first if not document.pieces[i].startswith(QUESTION)), first[0]) if solve_names else None
    steps = [parts(document, number, uniform) for number in range(len(document.steps))]
    token_ids, first_label = encode_steps(prompt, kept, steps, vocab, uniform, closed=closed_steps, named=named)
    if len(token_ids) > max_example_tokens:
        raise Unusable(f"{len(token_ids)} tokens, more than {max_example_tokens}", "longer than max_example_tokens")
    if labelling == "plain":
        return Example(*without_span_tokens(token_ids, len(prompt), vocab), document, first_label)
    return Example(token_ids, len(prompt), document, first_label, predictable(token_ids, len(prompt), vocab))


def predictable(token_ids: npt.NDArray[np.int32], prompt_tokens: int, vocab: Vocab) -> npt.NDArray[np.int64]:
    """Find the `<seg:k>` tokens of a prompt before which the piece before is closed: which label follows on which is learnt there."""
    tags = spans.is_label(token_ids[:prompt_tokens], vocab.seg_base, vocab) & (token_ids[:prompt_tokens] > vocab.seg_base)
    return np.flatnonzero(tags[1:] & tags[:-1]) + 1


def cut(document: Document, kept: int) -> Document:
    """Leave out all pieces but the first ones, as sources and as evidence too."""

    def within(members: Iterable[int]) -> tuple[int, ...]:
        return tuple(i for i in members if i < kept)

    steps = (step if step.sources == UNKNOWN else step._replace(sources=within(step.sources)) for step in document.steps)
    marked = (Evidence(within(own.pieces), own.steps) for own in document.evidence)
    evidence = tuple(own for own in marked if own.pieces)
    return dataclasses.replace(document, pieces=document.pieces[:kept], steps=tuple(steps), evidence=evidence)


def without_unfounded(document: Document) -> Document:
    """Leave out the steps that rest on no piece."""
    numbers = [number for number, step in enumerate(document.steps) if step.sources]
    evidence = (own._replace(steps=tuple(map(numbers.index, filter(numbers.__contains__, own.steps)))) for own in document.evidence)
    return dataclasses.replace(document, steps=tuple(document.steps[number] for number in numbers), evidence=tuple(evidence))


def align(document: Document, alignment: Alignment) -> Document:
    """Find the sources of the steps whose sources are not known."""
    numbers = [number for number, step in enumerate(document.steps) if step.sources == UNKNOWN]
    if not numbers:
        return document
    found = dict(zip(numbers, alignment.align(document.pieces, [document.steps[number].text for number in numbers]), strict=True))
    steps = (step._replace(sources=found.get(number, step.sources)) for number, step in enumerate(document.steps))
    return dataclasses.replace(document, steps=tuple(steps))


def split_pieces(text: str, piece_sentences: int) -> list[str]:
    """Cut a text into pieces of so many sentences each, within its paragraphs; 0: its paragraphs, each in one line."""
    return [" ".join(sentences) for sentences in group_sentences(text, piece_sentences)]


def group_sentences(text: str, piece_sentences: int) -> list[list[str]]:
    """Cut a text into the pieces of `split_pieces`, each as the list of its sentences; 0: as a list of its paragraph alone."""
    if not piece_sentences:
        return [[piece] for paragraph in _BLANK_LINES.split(readable(text)) if (piece := " ".join(paragraph.split()))]
    paragraphs = map(split_sentences, _BLANK_LINES.split(text))
    return [own[i : i + piece_sentences] for own in paragraphs for i in range(0, len(own), piece_sentences)]


def squeezed(text: str) -> str:
    """Return a text without white space: so a text and its sentences, which are laid out anew, say the same."""
    return "".join(readable(text).split())


def places(text: str, pieces: Iterable[Sequence[str]]) -> list[tuple[int, int]]:
    """Find where the pieces of a text, lists of sentences, stand in it: (start, end) of each, in characters of `squeezed(text)`.

    A piece ends with its last sentence, and holds what stands between two of them and belongs to none, see `split_sentences`.
    """
    whole, end, found = squeezed(text), 0, []
    for piece in pieces:
        starts = []
        for sentence in map(squeezed, piece):
            starts.append(whole.index(sentence, end))
            end = starts[-1] + len(sentence)
        found.append((starts[0], end))
    return found


def shared_characters(ranges: Iterable[tuple[int, int]], start: int, end: int) -> list[int]:
    """Count the characters of each range that lie in [start, end); 0 and below: none."""
    return [min(end, own_end) - max(start, own_start) for own_start, own_end in ranges]


def overlapping(ranges: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, ...]:
    """Return the indices of the ranges of which more than a few characters lie in [start, end)."""
    shared = shared_characters(ranges, start, end)
    return tuple(i for i, (own, (a, b)) in enumerate(zip(shared, ranges)) if own >= min(_MIN_OVERLAP, b - a, end - start) > 0)
