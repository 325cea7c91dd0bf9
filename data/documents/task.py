"""The task of documents: pieces in, token ids out, and steps that name the pieces that they rest on back."""

import dataclasses
import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from data import scoring, spans, task
from data.documents import card, corpus, own
from data.documents.corpus import MARK, Document, Evidence, Example, Step, split_pieces
from data.errors import UserError
from data.pieces import Part, PiecesTask, Written, encode_prompt, style, without_span_tokens
from data.retrieval import BM25

Sources = Literal["order", "gold", "bm25", "random", "recent"]
"""What a response's steps name where the model does not choose all of it; see `DocumentTask.headers`."""


@dataclasses.dataclass(frozen=True)
class DocumentTask(corpus.Style, PiecesTask):
    """Turn documents into ids, and responses into steps; for corpora of JSONL files, and the base of tasks on real text.

    Attributes:
      source: the file or directory that the corpus was read from.
      trained_tasks: The tasks whose prompts the model was trained on; none: those of this task, or it is not known.
    """

    source: str = ""
    trained_tasks: tuple[str, ...] = ()

    name: ClassVar[str] = "documents"
    version: ClassVar[int] = 1
    unit: ClassVar[str] = "responses"
    about: ClassVar[str] = "INSTRUCTION"
    """What a prompt's first paragraph begins with that is for all steps, as in "TITLE: ..."."""
    score_kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "ROUGE": ("rouge1", "rouge2", "rougeL"),
        "sources": ("span_precision", "span_recall"),
    }
    Corpus: ClassVar[type[corpus.Corpus]] = corpus.Corpus
    WriteCommand: ClassVar[type[own.WriteCommand]] = own.WriteCommand
    Statistics: ClassVar[type[card.Statistics]] = card.Statistics
    columns: ClassVar[Mapping[str, Any]] = {
        "about": "string",
        "pieces": ["string"],
        "steps": [{"text": "string", "sources": ["int32"], "answers": ["string"], "kind": "string"}],
        "evidence": [{"pieces": ["int32"], "steps": ["int32"]}],
        "first_label": "int32",
        "prompt_tokens": "int32",
        "token_ids": ["int32"],
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_example_tokens", "piece_sentences"):
            if type(value := getattr(self, name)) is not int:
                raise UserError(f"{name} is {value!r}; allowed: whole numbers")
        if not isinstance(self.trained_tasks, tuple) or not all(isinstance(name, str) for name in self.trained_tasks):
            raise UserError(f"trained_tasks is {self.trained_tasks!r}; allowed: a list of names of tasks")
        self.check_style()

    @property
    def is_generated(self) -> bool:
        return False

    @property
    def instruction(self) -> str:
        """What all prompts begin with."""
        return self.WriteCommand.instruction

    @property
    def divided_into(self) -> str:
        return {0: "paragraphs", 1: "sentences"}.get(self.piece_sentences, f"pieces of {self.piece_sentences} sentences")

    def split_prompt(self, text: str) -> tuple[str, Sequence[str]]:
        """Cut a prompt's text into what it is about and pieces; those of a corpus are marked and stay as they are."""
        if MARK in text:
            about, *pieces = (part.strip() for part in text.split(MARK))
            return about, pieces
        head = re.match(rf"\s*{self.about}:(.*?)(?:\n\s*\n|\Z)", text, re.DOTALL)
        return ("", self.cut(text)) if head is None else (" ".join(head[1].split()), self.cut(text[head.end() :]))

    def cut(self, text: str) -> Sequence[str]:
        """Cut a text into pieces."""
        return split_pieces(text, self.piece_sentences)

    def encode_prompt(self, text: str) -> npt.NDArray[np.int32]:
        """Write a prompt, int32 [n], labels from 1 on, cut at the end of a piece. UserError: it has no piece, or more than labels."""
        ids = np.array(self._prompt(text)[0], np.int32)
        return without_span_tokens(ids, len(ids), self.vocab)[0] if self.labelling == "plain" else ids

    def _prompt(self, text: str) -> tuple[list[int], int, Sequence[str]]:
        about, pieces = self.split_prompt(text)
        if not pieces:
            after = f' after its first paragraph, "{self.about}: ..."' if about else ""
            raise UserError(f"the text has no {'sentence' if self.piece_sentences else 'paragraph'}{after}")
        options = style(self, "closed_sentences", "late_instruction", "divided_into")
        return *encode_prompt(corpus.sink(self.instruction, about), pieces, self.vocab, **options), pieces

    def warnings(self, text: str) -> list[str]:
        """Say that a text does not ask for anything, or for what the model was not trained on, and how much of it is cut.

        UserError: see `encode_prompt`.
        """
        _, kept, pieces = self._prompt(text)
        absent = self.lacks(self.split_prompt(text)[0], pieces)
        is_first = absent == f"{self.about}:"
        where, place = ("The text does not begin", "after") if is_first else ("No paragraph of the text begins", "before")
        said = f'{where} with "{absent}" (capitals as here, a blank line {place} the paragraph): do not trust the answer.'
        return [*self.foreign(), *([said] if absent else []), *self.cut_warning(kept, pieces, whole="text")]

    def foreign(self) -> list[str]:
        if not self.trained_tasks or self.name in self.trained_tasks:
            return []
        return [f"The model was trained on {', '.join(self.trained_tasks)}, not on {self.name}: do not trust its answers."]

    def lacks(self, about: str, pieces: Sequence[str]) -> str | None:
        """Return what the paragraph begins with that asks for a response, where a prompt needs one and has none."""
        return None

    def steps(self, response_ids: Iterable[int]) -> list[Written]:
        """Read the steps of a response, labels from 1 on; those of plain text are numbered and name nothing."""
        if self.labelling != "plain":
            return super().steps(response_ids)
        before, _, _ = spans.read_steps(response_ids, self.vocab)
        parts = [list(own) for is_end, own in itertools.groupby(before, self.vocab.solve_id.__eq__) if not is_end]
        texts = (self.vocab.decode(i for i in own if i not in self.vocab.structural).strip() for own in parts)
        return [Written(number, frozenset(), text) for number, text in enumerate(texts, 1)]

    def scores(self, examples: Sequence[Example], responses: Sequence[Iterable[int]]) -> dict[str, float]:
        """Score responses to the examples' prompts, labels from 1 on."""
        return scoring.ratios(map(self.counts, examples, responses))

    def counts(self, example: Example, response: Iterable[int]) -> scoring.Counts:
        """Score one response: ROUGE, and the sources of each step against the gold one's."""
        written, gold = self.steps(response), example.document.steps
        spans = scoring.span_counts([step.sources for step in gold], [step.named for step in written])
        return {**scoring.rouge_counts([step.text for step in gold], [step.text for step in written]), **spans}

    def headers(self, example: Example, sources: Sources) -> list[list[int]]:
        """Choose what each step of the gold response is to name in place of what a model names: labels, in the order of naming.

        "order" is what the order of the steps says: the question that each answers, and nothing where there are none: the model
        chooses what else is named. "gold" is the gold sources; of the others, "bm25" the pieces with the best BM25 scores for what
        `query` says, "random" the same ones for every model, "recent" those nearest to the response, each as many as the gold step has.
        """
        if self.labelling == "plain":
            raise UserError(f"sources are {sources!r}, but plain text names none; allowed: model")
        document = example.document
        drawn, rankings = random.Random(document.prompt), dict[Sequence[int], BM25]()
        found = []
        for number in range(len(document.steps)):
            pools, first = self.pools(document, number), self.parts(document, number, None)[0][0]
            named = [piece for piece in first if not any(piece in pool for pool in pools)]
            for pool in pools:
                gold = [piece for piece in first if piece in pool]
                own: Sequence[int] = gold
                if sources == "order":
                    own = []
                elif sources == "bm25":
                    ranking = rankings.get(pool) or rankings.setdefault(pool, BM25([document.pieces[piece] for piece in pool]))
                    own = sorted(pool[i] for i in ranking.rank(self.query(document, number))[: len(gold)])
                elif sources == "random":
                    own = sorted(drawn.sample(pool, len(gold)))
                elif sources == "recent":
                    own = pool[len(pool) - len(gold) :]
                named += own
            found.append([1 + piece for piece in dict.fromkeys(named)])
        return found if any(found) else []

    def opens(self, example: Example, sources: Sources) -> tuple[range, bool, int]:
        """Return what of the steps' labels follows from the prompt, as `selfspan_jax.evaluation.forcing.Order` has it.

        Steps open the labels after the pieces'. With "order" those that answer questions are as many as these are.
        """
        num_steps = len(self.headers(example, "order")) if sources == "order" else 0
        return range(1 + len(example.document.pieces), self.vocab.num_labels), self.closed_steps, num_steps

    def pools(self, document: Document, number: int) -> Sequence[Sequence[int]]:
        """Return the pieces that a step may rest on, in parts: sources are chosen in each part by itself.

        A source in no part, such as the question that a step answers, is named whatever is chosen.
        """
        return [range(len(document.pieces))]

    def query(self, document: Document, number: int) -> str:
        """Return what is known before a step is written: what all steps need, and the gold text of the step before."""
        return " ".join((document.about, *(step.text for step in document.steps[max(number - 1, 0) : number])))

    def held_out(self, num_examples: int, *, seed: int) -> dict[str, list[Example]]:
        """Raise UserError: nothing like the documents of a file can be drawn."""
        raise UserError(f"trained on {self.source or 'a file'}, like which nothing can be drawn: give a corpus (--data DIR --split test)")

    def renumber(self, example: Example, uniform: float | None = None) -> Example | None:
        """Write an example again, labels from 1 on, or from where `uniform` says; None where the vocabulary has no room for it."""
        try:
            options = style(self, "max_example_tokens", *corpus.STYLE)
            return corpus.encode(example.document, self.instruction, self.vocab, uniform=uniform, parts=self.parts, **options)
        except UserError:
            return None

    def parts(self, document: Document, number: int, uniform: float | None) -> list[Part]:
        """Return what a step names and writes, in turn; see `corpus.Corpus.parts`."""
        return corpus.whole(document.steps[number])

    def on(self, other: task.Task) -> task.Task:
        """Return the task of other documents as a model of this task reads it: by their instruction, in its own words and style."""
        if other.name == self.name or not isinstance(other, DocumentTask):
            return super().on(other)
        trained = self.trained_tasks or (() if type(self) is DocumentTask else (self.name,))
        own = {name: getattr(self, name) for name in ("vocab", "closed_pieces", *corpus.STYLE)}
        return dataclasses.replace(other, trained_tasks=trained, **own)

    def to_row(self, example: Example) -> dict[str, Any]:
        """Return the columns of an example in a corpus directory."""
        document = example.document
        named = {name: [item._asdict() for item in getattr(document, name)] for name in ("steps", "evidence")}
        return {**vars(document), **named, "first_label": example.first_label}

    def from_row(self, row: Mapping[str, Any]) -> Example:
        """Read what `to_row` returned."""
        steps = (Step(s["text"], tuple(s["sources"]), tuple(s["answers"]), s["kind"]) for s in row["steps"])
        evidence = (Evidence(tuple(own["pieces"]), tuple(own["steps"])) for own in row["evidence"])
        document = Document(row["about"], tuple(row["pieces"]), tuple(steps), tuple(evidence))
        ids, prompt_tokens = row["token_ids"], row["prompt_tokens"]
        return Example(ids, prompt_tokens, document, row["first_label"], corpus.predictable(ids, prompt_tokens, self.vocab))

    def statistics(self) -> card.Statistics:
        """Return the empty statistics of a corpus."""
        return self.Statistics(self.vocab, header_view=self.header_view)
