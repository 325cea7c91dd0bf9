"""The task of stories: sections and questions in; answers out, each of which names its question and the sections it was read in."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from data import scoring
from data.documents import Document, DocumentTask, Example
from data.documents.corpus import QUESTION
from data.stories import card, source

KINDS = ("explicit", "implicit")


def question_of(document: Document, sources: Iterable[int]) -> int | None:
    """Return the first piece among sources that is a question; None where there is none."""
    pieces = document.pieces
    return next((piece for piece in sources if piece < len(pieces) and pieces[piece].startswith(QUESTION)), None)


@dataclasses.dataclass(frozen=True)
class StoryTask(DocumentTask):
    """Turn stories with questions into ids and responses into answers; see `DocumentTask`.

    A prompt's paragraphs are its pieces; those that begin with "Question:" are asked.
    """

    name: ClassVar[str] = "stories"
    unit: ClassVar[str] = "responses"
    score_kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "ROUGE-L": ("rougeL", "rougeL_explicit", "rougeL_implicit", "rougeL_first_answer"),
        "questions": ("questions_answered",),
        "sections": ("section_named", "section_precision", "section_recall"),
    }
    Corpus: ClassVar[type[source.Corpus]] = source.Corpus
    WriteCommand: ClassVar[type[source.WriteCommand]] = source.WriteCommand
    Statistics: ClassVar[type[card.Statistics]] = card.Statistics
    piece_sentences: int = 0

    def lacks(self, about: str, pieces: Sequence[str]) -> str | None:
        return None if any(piece.startswith(QUESTION) for piece in pieces) else QUESTION

    def warnings(self, text: str) -> list[str]:
        """Say, beside what holds of all documents, that questions do not stand after a story."""
        found, asked = super().warnings(text), [piece.startswith(QUESTION) for piece in self.split_prompt(text)[1]]
        if all(asked):
            found.append("The text has a question and no story before it: do not trust the answer.")
        elif asked != sorted(asked):
            found.append("A question stands before a section of the story: questions stand after all of it, do not trust the answer.")
        return found

    def pools(self, document: Document, number: int) -> list[Sequence[int]]:
        """Return the sections; questions are no sources."""
        return [tuple(piece for piece, text in enumerate(document.pieces) if not text.startswith(QUESTION))]

    def query(self, document: Document, number: int) -> str:
        """Return the question that an answer is to."""
        question = question_of(document, document.steps[number].sources)
        return "" if question is None else document.pieces[question]

    def counts(self, example: Example, response: Iterable[int]) -> scoring.Counts:
        """Score answers, each question's by the first step that names the question; one that no step names has an empty answer.

        ROUGE-L is the F1 against the better of the people's answers (and against the first of them), in all and by kind, a mean
        over questions; of the sections: how often a gold one is named, and precision and recall of all that are named.
        """
        document, written, tally = example.document, self.steps(response), scoring.Shares(*self.score_kinds["sections"])
        asked = [question_of(document, gold.sources) for gold in document.steps]
        if self.labelling == "plain":  # answers stand in the order of the questions
            answered = dict(zip(asked, written))
        else:
            answered = {question_of(document, sorted(step.named)): step for step in reversed(written)}
        texts = []
        for gold, question in zip(document.steps, asked, strict=True):
            step = answered.get(question)
            wanted = {*gold.sources} - {question}
            named = {piece for piece in (step.named if step else ()) if piece != question}
            texts.append(step.text if step else "")
            tally.add("questions_answered", [step] if step else [], [gold])
            tally.add("section_named", [gold] if named & wanted else [], [gold])
            tally.add("section_precision", named & wanted, named)
            tally.add("section_recall", named & wanted, wanted)
        best = scoring.rouge_l([(gold.text, *gold.answers) for gold in document.steps], texts)
        first = scoring.rouge_l([(gold.text,) for gold in document.steps], texts)
        counts = {"rougeL": (sum(best), len(best)), "rougeL_first_answer": (sum(first), len(first))}
        for kind in {gold.kind for gold in document.steps} & {*KINDS}:
            own = [score for score, gold in zip(best, document.steps, strict=True) if gold.kind == kind]
            counts[f"rougeL_{kind}"] = sum(own), len(own)
        return {**counts, **tally.counts()}
