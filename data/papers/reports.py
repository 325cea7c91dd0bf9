"""Reports of clinical trials, and doctors' questions about them, as jayded/evidence-inference has them (Lehman et al. 2019; DeYoung
et al. 2020): `annotations/txt_files/PMC*.txt`, `annotations/splits/`, `prompts_merged.csv` and `v2_annotations.csv`.
"""

import collections
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data import rows
from data.alignment import readable
from data.documents.corpus import group_sentences, places, squeezed
from data.errors import UserError

REPOSITORY = "jayded/evidence-inference"
_HEADING = re.compile(r"^[ \t]*(ABSTRACT|BODY)(?:[.:](.*))?$", re.MULTILINE)
_SENTENCE = re.compile(r"\s|.*(?::\s+\S|\s.*[.!?]\s*$)")  # after a space, after a colon and a space, or ends as one
_TITLE = re.compile(r"\s*TITLE:\s*(?!\s*(?:ABSTRACT|BODY))(.*)")  # in the same line, or in the next one
_PROMPT_COLUMNS = ("PromptID", "PMCID", "Outcome", "Intervention", "Comparator")
_ANNOTATION_COLUMNS = ("PromptID", "Valid Label", "Valid Reasoning", "Label Code", "Evidence Start", "Evidence End")


class Passage(NamedTuple):
    """A part of a report under one heading, and where it begins in the text."""

    heading: str
    text: str
    start: int


class Report(NamedTuple):
    """What `parse` finds in a text."""

    text: str
    title: str
    abstract: tuple[Passage, ...]
    body: tuple[Passage, ...]


class Pieces(NamedTuple):
    """Passages in pieces, and where each stands in `squeezed(report.text)`."""

    texts: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]


class Annotation(NamedTuple):
    """A person's answer to a question, and the text that shows it, [start, end); another person has judged both.

    `code` is -1 for decreased, 1 for increased, 0 for no difference.
    """

    is_right: bool
    is_shown: bool
    code: int
    start: int
    end: int


class Question(NamedTuple):
    """What became of an outcome with the intervention, compared to the comparator?"""

    number: int
    outcome: str
    intervention: str
    comparator: str
    annotations: tuple[Annotation, ...]


class Paper(NamedTuple):
    """A record of the repository: its number in PubMed Central, split, text and questions."""

    number: int
    split: str
    text: str
    questions: tuple[Question, ...]

    @property
    def where(self) -> str:
        return f"PMC{self.number}"

    @property
    def texts(self) -> list[str]:
        """What a vocabulary is trained on."""
        return [readable(self.text)]


def part(source: str, split: str) -> Path:
    """Return the file that lists the papers of a split."""
    return Path(source) / "annotations" / "splits" / f"{split}_article_ids.txt"


def read(source: str, split: str) -> Iterator[Paper]:
    """Yield the papers of a split, in the order of its list.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: a file is not what it should be.
    """
    annotations = Path(source) / "annotations"
    questions = _questions(annotations)
    for word in part(source, split).read_text(encoding="utf-8").split():
        if not word.isdigit():
            raise UserError(f"{part(source, split)}: {word!r} is no number of a paper")
        file = annotations / "txt_files" / f"PMC{word}.txt"
        yield Paper(int(word), split, file.read_bytes().decode("utf-8", "replace"), tuple(questions.get(word, ())))


def _questions(annotations: Path) -> dict[str, list[Question]]:
    """Read the doctors' questions by paper."""
    answers: dict[str, list[Annotation]] = collections.defaultdict(list)
    file = annotations / "v2_annotations.csv"
    for row, (prompt, right, shown, *numbers) in enumerate(rows.csv_rows(file, rows.named(file, *_ANNOTATION_COLUMNS)), 1):
        try:
            number, code, start, end = map(int, (prompt, *numbers))
        except ValueError:
            raise UserError(f"{file}: row {row}: expected whole numbers, not {', '.join((prompt, *numbers))}") from None
        if code not in (-1, 0, 1):
            raise UserError(f"{file}: row {row}: Label Code is {code}; allowed: -1, 0, 1")
        answers[str(number)].append(Annotation(right == "True", shown == "True", code, start, end))
    found: dict[str, list[Question]] = collections.defaultdict(list)
    file = annotations / "prompts_merged.csv"
    for prompt, paper, *words in rows.csv_rows(file, rows.named(file, *_PROMPT_COLUMNS)):
        if prompt in answers:
            outcome, intervention, comparator = map(_line, words)
            found[paper].append(Question(int(prompt), outcome, intervention, comparator, tuple(answers[prompt])))
    return found


def parse(text: str) -> Report:
    """Find the title, and the passages of abstract and body; a text without such headings is all body."""
    title = _TITLE.match(text)
    headings = list(_HEADING.finditer(text))
    begin = title.end() if title else 0
    if not headings:
        return Report(text, _line(title[1]) if title else "", (), (Passage("", text[begin:], begin),))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    passages: dict[str, list[Passage]] = {"ABSTRACT": [], "BODY": []}
    for heading, end in zip(headings, ends, strict=True):
        own = _heading(heading[2] or "")
        start = heading.start(2) + len(own) if heading[2] else heading.end()
        passages[heading[1]].append(Passage(_line(own.strip(" .:").replace(".", ", ")), text[start:end], start))
    return Report(text, _line(title[1]) if title else "", tuple(passages["ABSTRACT"]), tuple(passages["BODY"]))


def _heading(line: str) -> str:
    """Return what of a heading's line is the heading: it is in capitals, as far as its last colon at least, and no sentence follows."""
    other = next((i for i, char in enumerate(line) if char.isalpha() and not char.isupper()), len(line))
    colon = line.rfind(":", 0, other) + 1
    rest = line[colon:]
    is_text = other < len(line) and (_SENTENCE.match(rest) or (not colon and ". " in rest))
    return line[:colon] if is_text else line


def _line(text: str) -> str:
    return " ".join(readable(text).split())


def pieces(report: Report, passages: Iterable[Passage], piece_sentences: int, *, headings: bool = True) -> Pieces:
    """Cut passages into pieces, see `split_pieces`; the first of each passage begins with its heading, if wanted."""
    texts: list[str] = []
    ranges: list[tuple[int, int]] = []
    for passage in passages:
        own = group_sentences(passage.text, piece_sentences)
        before = len(squeezed(report.text[: passage.start]))
        ranges += [(before + start, before + end) for start, end in places(passage.text, own)]
        heads = [f"{passage.heading.capitalize()}: " if headings and passage.heading else "", *[""] * len(own)]
        texts += [head + " ".join(sentences) for head, sentences in zip(heads, own)]
    return Pieces(tuple(texts), tuple(ranges))


def marked(report: Report, annotation: Annotation) -> tuple[int, int]:
    """Return where the text stands that an annotation points at, as `Pieces.ranges` count."""
    return len(squeezed(report.text[: annotation.start])), len(squeezed(report.text[: annotation.end]))
