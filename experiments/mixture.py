"""Write a mixture of corpora of documents as JSONL, with questions of its own making: what one model of all of them trains on.

    python -m experiments.mixture corpora/papers corpora/verdicts corpora/stories --out rows
    python -m data documents --source rows --out corpora/mixture

A model that is trained on it reads the prompts of each corpus, by their instructions: `decode.py eval MODEL --data corpora/stories`.

Each example of the corpora becomes a row of `train.jsonl` or `validation.jsonl` (the test parts are left alone). Beside it stands a
row for finding passages: sentences are taken out of the sections of the same text (of some they stay), their first words are the
questions, their last words the answers, which name the question and the section. So a text gives tens of choices of a source, which
nobody had to mark (the inverse cloze task: Lee et al., *Latent Retrieval for Weakly Supervised Open Domain Question Answering*, ACL 2019).
Steps that rest on nothing but what earlier steps of the response rest on are left out: a model would learn to repeat itself.
With `--kept 1 --words 10` the sentences stay, and a question is some of their words: what has to be found is where these stand together.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from data import dataset, writing
from data.alignment import split_sentences
from data.documents.corpus import QUESTION, Document, Step, sink
from data.documents.task import DocumentTask
from data.errors import UserError, check_range
from data.tasks import TASKS
from experiments import pages

INSTRUCTION = "Complete the sentences:"
_SPLITS = ("train", "validation")
_MIN_WORDS = 8  # of a sentence that is asked for
_MAX_ANSWER_WORDS = 6
_MAX_SENTENCES = 6  # of a section that is made of pieces
_MIN_WINDOW = 3  # pieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Write a mixture of corpora of documents as JSONL."""

    corpora: Positional[tuple[Path, ...]]
    """Directories that python -m data wrote, of papers, verdicts, stories or documents."""
    out: Path
    """New directory of the files."""
    texts: float = 0.25
    """Share of the texts that questions are made about."""
    questions: int = 24
    """Most self-made questions about a text."""
    kept: float = 0.1
    """Share of the sentences asked for that stay in their section."""
    words: int = 0
    """Most words of a self-made question, drawn from the sentence's beginning; 0: all of it."""
    rows: int = 1
    """Most rows of self-made questions about a text, as far as the corpora have it so often."""
    windows: int = 0
    """Beside each example, so many parts of it: pieces in a row, and the steps, and their questions, that rest on these alone."""
    asked: int = 0
    """Most questions that a row of an example, or of a part of it, asks, drawn from its own; 0: all."""
    seed: int = 0
    """Seed of what is asked."""

    def __post_init__(self) -> None:
        if not self.corpora:
            raise UserError("no corpora are given: name directories that python -m data wrote")
        check_range(self, "questions", "rows", low=1)
        check_range(self, "seed", "windows", "words", "asked", low=0)
        for name in ("texts", "kept"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"{name} is {value}; allowed: 0 to 1")

    def run(self) -> None:
        for path in self.corpora:
            if {*_SPLITS}.isdisjoint(there := dataset.splits(path)):
                raise UserError(f"{path} has no {' and no '.join(_SPLITS)} split, only {', '.join(there)}")
        with writing.new_directory(self.out) as directory:
            for split in _SPLITS:
                if found := list(rows(self, split)):
                    text = "".join(f"{json.dumps(fields)}\n" for _, fields in found)
                    (directory / f"{split}.jsonl").write_text(text, encoding="utf-8")
                    counts = collections.Counter(name for name, _ in found)
                    print(f"{split}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")


def row(task: DocumentTask, document: Document) -> dict[str, Any]:
    """Write a document with the instruction of its task: of each step first the sources that no step has named, without which none is."""
    steps, named = [], set[int]()
    for step in document.steps:
        if not named.issuperset(step.sources):
            steps.append({"text": step.text, "sources": sorted(step.sources, key=named.__contains__)})
        named.update(step.sources)
    return {"instruction": sink(task.instruction, document.about), "document": list(document.pieces), "steps": steps}


def sections_of(document: Document, draw: random.Random) -> list[list[str]]:
    """Cut a document into sections, each a list of sentences: neighbouring pieces of one sentence are joined at random."""
    texts = [split_sentences(piece) for piece in document.pieces if not piece.startswith(QUESTION)]
    found: list[list[str]] = []
    room = 0
    for sentences in texts:
        if len(sentences) > 1 or room < 1:
            found.append([])
            room = draw.randint(1, _MAX_SENTENCES)
        found[-1] += sentences
        room -= len(sentences)
    return [sentences for sentences in found if sentences]


def cloze(document: Document, draw: random.Random, *, questions: int, kept: float, words: int = 0) -> dict[str, Any] | None:
    """Ask for sentences of a document; None where it has none that is long enough beside another one of its section."""
    sections = sections_of(document, draw)
    able = [(i, j) for i, own in enumerate(sections) for j, text in enumerate(own) if len(text.split()) >= _MIN_WORDS]
    shuffled = draw.sample(able, len(able))
    room = [len(own) // 2 for own in sections]  # sentences that may be asked for
    asked: list[tuple[int, int]] = []
    for i, j in shuffled:
        if room[i] and len(asked) < questions:
            room[i] -= 1
            asked.append((i, j))
    if not asked:
        return None
    steps: list[dict[str, Any]] = []
    prompts: list[str] = []
    for i, j in asked:
        own = sections[i][j].split()
        cut = len(own) - draw.randint(3, min(len(own) // 2, _MAX_ANSWER_WORDS))
        chosen = sorted(draw.sample(range(cut), min(cut, draw.randint(3, max(3, words))))) if words else range(cut)
        prompts.append(f"{QUESTION} {' '.join(own[place] for place in chosen)}")
        steps.append({"text": " ".join(own[cut:]), "sources": [len(sections) + len(steps), i]})
    removed = {(i, j) for i, j in asked if draw.random() >= kept}
    texts = [" ".join(text for j, text in enumerate(own) if (i, j) not in removed) for i, own in enumerate(sections)]
    return {"instruction": INSTRUCTION, "document": texts + prompts, "steps": steps}


def window(document: Document, draw: random.Random) -> Document:
    """Take pieces in a row around those of one step, as many as drawn evenly by their logarithm, and the steps that these alone answer."""
    sections = [i for i, piece in enumerate(document.pieces) if not piece.startswith(QUESTION)]
    sources = [i for i in draw.choice(document.steps).sources if i < len(sections)]
    size = round(_MIN_WINDOW * (len(sections) / _MIN_WINDOW) ** draw.random())
    size = min(len(sections), max(size, 1 + max(sources) - min(sources)))
    start = draw.randint(max(0, 1 + max(sources) - size), min(*sources, len(sections) - size))
    kept = sections[start : start + size]
    answers = [step for step in document.steps if all(i in kept or i >= len(sections) for i in step.sources)]
    return _only(document, [*kept, *(i for step in answers for i in step.sources if i >= len(sections))], answers)


def asking(document: Document, draw: random.Random, most: int) -> Document:
    """Keep at most so many of the steps, and the questions that these answer; all where most is 0, or the pieces have no question."""
    questions = {i for i, piece in enumerate(document.pieces) if piece.startswith(QUESTION)}
    if not (questions and most) or len(document.steps) <= most:
        return document
    answers = [document.steps[i] for i in sorted(draw.sample(range(len(document.steps)), most))]
    kept = [i for i in range(len(document.pieces)) if i not in questions or any(i in step.sources for step in answers)]
    return _only(document, kept, answers)


def _only(document: Document, kept: Sequence[int], answers: Iterable[Step]) -> Document:
    places = {i: place for place, i in enumerate(kept)}
    steps = tuple(step._replace(sources=tuple(places[i] for i in step.sources)) for step in answers)
    return dataclasses.replace(document, pieces=tuple(document.pieces[i] for i in kept), steps=steps)


def rows(mixture: Mixture, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a split, each with the corpus that it comes from."""
    seen = collections.Counter[Sequence[str]]()
    for path in mixture.corpora:
        if split not in dataset.splits(path):
            continue
        stored = dataset.load(path, TASKS, split)
        if not isinstance(stored.task, DocumentTask):
            raise UserError(f"{path} is a corpus of {stored.task.name}; allowed: corpora of documents")
        for example in stored:
            document = example.document
            for number in range(-1, mixture.windows):
                draw = random.Random(f"window/{mixture.seed}/{number}/{document.prompt}")
                own = document if number < 0 else window(document, draw)
                yield "windows of " * (number >= 0) + stored.task.name, row(stored.task, asking(own, draw, mixture.asked))
            pieces = tuple(piece for piece in document.pieces if not piece.startswith(QUESTION))
            draw = random.Random(f"cloze/{mixture.seed}/{seen[pieces] or ''}{' '.join(pieces)}")
            if seen[pieces] >= mixture.rows or draw.random() >= mixture.texts:
                continue
            seen[pieces] += 1
            if (made := cloze(document, draw, questions=mixture.questions, kept=mixture.kept, words=mixture.words)) is not None:
                yield f"cloze of {stored.task.name}", made


def main(arguments: Sequence[str] | None = None) -> None:
    pages.run_command(Mixture, arguments)


if __name__ == "__main__":
    main()
