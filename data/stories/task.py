"""The task of stories: sections and questions in; answers out, each of which names its question and the sections it was read in."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from data import scoring
from data.documents import Document, DocumentTask, Example
from data.stories import card, source
from data.stories.source import QUESTION

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

    def scores(self, examples: Sequence[Example], responses: Sequence[Iterable[int]]) -> dict[str, float]:
        """Score answers, each question's by the first step that names the question; one that no step names has an empty answer.

        ROUGE-L is the F1 against the better of the people's answers (and against the first of them), in all and by kind, a mean
        over questions; of the sections: how often a gold one is named, and precision and recall of all that are named.
        """
        golds: list[tuple[str, Sequence[str]]] = []
        texts: list[str] = []
        tally = scoring.Shares()
        for example, response in zip(examples, responses, strict=True):
            document = example.document
            answered = {question_of(document, sorted(step.named)): step for step in reversed(self.steps(response))}
            for gold in document.steps:
                question = question_of(document, gold.sources)
                step = answered.get(question)
                wanted = {*gold.sources} - {question}
                named = {piece for piece in (step.named if step else ()) if piece != question}
                golds.append((gold.kind, (gold.text, *gold.answers)))
                texts.append(step.text if step else "")
                tally.add("questions_answered", [step] if step else [], [gold])
                tally.add("section_named", [gold] if named & wanted else [], [gold])
                tally.add("section_precision", named & wanted, named)
                tally.add("section_recall", named & wanted, wanted)
        best = scoring.rouge_l([answers for _, answers in golds], texts)
        first = scoring.rouge_l([answers[:1] for _, answers in golds], texts)
        scores = {"rougeL": _mean(best), "rougeL_first_answer": _mean(first)}
        for kind in KINDS:
            if own := [score for score, (known, _) in zip(best, golds, strict=True) if known == kind]:
                scores[f"rougeL_{kind}"] = _mean(own)
        return scores | tally.shares()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
