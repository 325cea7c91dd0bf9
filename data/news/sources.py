"""Read articles and summaries from files and Hugging Face datasets, and make labelled examples of them."""

import dataclasses
import functools
import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

from data import rows, sources, task
from data.alignment import Alignment, readable, split_sentences
from data.errors import UserError
from data.news.corpus import SYNTHETIC_SETTINGS, Corpus, encode
from data.news.synthetic import Story
from data.pieces import style
from data.sources import Made, Unusable, written
from data.streams import Split, divided_split_of
from data.vocab import TokenizerVocab

ARTICLE_COLUMNS = ("article", "document", "text", "content", "body")
SUMMARY_COLUMNS = ("summary", "highlights", "abstract", "headline")


class Pair(NamedTuple):
    """A row: its number from 0 on, its split, and its article and summary, None where there is something other than text."""

    number: int
    split: str
    article: str | None
    summary: str | None

    @property
    def where(self) -> str:
        return f"row {self.number + 1}"


def read_pairs(
    source: str, split: str | None = None, article_column: str | None = None, summary_column: str | None = None
) -> Iterator[Pair]:
    """Yield the rows of a split, or all; text that is missing is empty.

    The splits of a file are told apart by a hash of the article (`streams.divided_split_of`), white space aside, so that an
    article that occurs twice is in one of them. What has splits of its own keeps them.

    Args:
      source: as for `rows.read`.
      split: "train", "validation" or "test"; "all" or None reads all; of a Hugging Face dataset also another of its own.
      article_column, summary_column: by default the first that there is of ARTICLE_COLUMNS and SUMMARY_COLUMNS.

    Raises: as `rows.read`; UserError also where there is no such column.
    """
    choose = functools.partial(_columns, source, article_column, summary_column)
    for number, (own, (article, summary)) in enumerate(rows.read(source, choose, split=split)):
        texts = [None if not isinstance(text, str | None) else text or "" for text in (article, summary)]
        found = own or divided_split_of(" ".join(readable(texts[0] or "").split()))
        if split in (None, "all", found):
            yield Pair(number, found, *texts)


def _columns(source: str, article: str | None, summary: str | None, names: Collection[str]) -> tuple[str, str]:
    """Choose the columns of articles and summaries. UserError: there is none, or two of that name."""
    chosen = []
    for what, named, known in (("article", article, ARTICLE_COLUMNS), ("summary", summary, SUMMARY_COLUMNS)):
        wanted = known if named is None else (named,)
        found = next((name for name in wanted if name in names), None)
        if found is None:
            there = ", ".join(map(str, names)) or "none"
            hint = "its columns are to be separated by commas" if len(names) == 1 and re.search("[;\t|]", there) else ""
            raise UserError(f"{source}: no column {' or '.join(wanted)}; there are {there}: {hint or f'name one with --{what}-column'}")
        if list(names).count(found) > 1:
            raise UserError(f"{source}: there are two columns {found}")
        chosen.append(found)
    return chosen[0], chosen[1]


def example(vocab: TokenizerVocab, style: Mapping[str, Any], alignment: Alignment, seed: int, pair: Pair) -> list[Made]:
    """Write the example of an article, or say why it is dropped.

    Lines of the summary may be sentences without a full stop; summary sentences without sources are left out.
    """
    number, split, text, lines = pair
    if text is None or lines is None:
        return [Made(split, None, ("with something other than text",))]
    article = split_sentences(text)
    summary = [sentence for line in lines.splitlines() for sentence in split_sentences(line)]
    if not article:
        return [Made(split, None, ("without a sentence",))]
    if not summary:
        return [Made(split, None, ("without a summary",))]
    found = [(sentence, own) for sentence, own in zip(summary, alignment.align(article, summary), strict=True) if own]
    if not found:
        return [Made(split, None, ("without a usable alignment",))]
    uniform = random.Random(f"news/{seed}/labels/{number}").random()
    sentences, owns = zip(*found)
    story = Story(tuple(article), sentences, owns, ())
    try:
        made = encode(story, vocab, uniform=uniform, **style)
    except Unusable as error:
        return [Made(split, None, (error.kind,))]
    if made is None:
        return [Made(split, None, ("with all sources beyond the cut",))]
    also = {
        "cut to max_prompt_tokens": made.cut_sentences > 0,
        "with summary sentences left out that have no source": len(made.story.summary) < len(summary),
        "with unreadable characters replaced": readable(text + lines) != text + lines,
    }
    return [written(split, made, **also)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand(sources.WriteCommand):
    """Write examples of news (articles and gold summaries with the sources of each sentence) as a datasets.load_from_disk directory.

    Attributes:
      source: "synthetic", a file (.jsonl, .csv, .parquet), a directory of some, or a Hugging Face data set (NAME or
        NAME:CONFIGURATION).
      num_examples: How many examples, at most. Default: 1000 of synthetic news, otherwise all.
      split: train, validation or test: that part alone, by a hash of the article (80%, 10%, 10%) where no file or split is named after
        validation (val, valid, dev) or test; all: everything, undivided. Default: of synthetic news train, otherwise the three beside
        each other.
      article_column: Column of the articles; by default article, document, text, content or body.
      summary_column: Column of the summaries; by default summary, highlights, abstract or headline.
      alignment: Of files and data sets: which sentences a summary sentence was written from.
    """

    source: str = "synthetic"
    article_column: str | None = None
    summary_column: str | None = None
    corpus: Corpus = dataclasses.field(default_factory=Corpus)

    unit: ClassVar[str] = "articles"

    def __post_init__(self) -> None:
        if self.is_synthetic:
            for name in ("num_examples", "split"):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, getattr(task.WriteCommand, name))
        super().__post_init__()

    @property
    def is_synthetic(self) -> bool:
        return self.source == "synthetic"

    def settings(self) -> dict[str, Any]:
        columns = {"article_column": self.article_column, "summary_column": self.summary_column}
        named = {name: value for name, value in columns.items() if value is not None}
        return named | super().settings()

    def unused(self) -> dict[str, str]:
        of_files = ("article_column", "summary_column", *sources.ALIGNING)
        names, use = (of_files, "files and data sets") if self.is_synthetic else (SYNTHETIC_SETTINGS, "synthetic news")
        return super().unused() | dict.fromkeys(names, f"it is for {use}")

    def make_task(self, kind: type[task.Task], vocab: Any) -> Any:
        made = super().make_task(kind, vocab)
        is_file = made.source == "synthetic" and not self.is_synthetic
        return dataclasses.replace(made, source="./synthetic") if is_file else made

    @property
    def is_divided_here(self) -> bool:
        return not self.is_synthetic and Path(self.source).exists()

    def found(self) -> dict[str, Any]:
        return {} if self.is_synthetic else self.division("article")

    def read(self, split: str | None) -> Iterator[Pair]:
        return read_pairs(self.source, split, self.article_column, self.summary_column)

    def texts(self, record: Pair) -> Iterable[str]:
        return [readable(text) for text in (record.article, record.summary) if text]

    def maker(self, vocab: TokenizerVocab) -> sources.Make:
        return functools.partial(example, vocab, style(self.corpus), self.alignment, self.seed)

    def vocabulary(self) -> TokenizerVocab:
        return self.corpus.vocab if self.is_synthetic and self.tokenizer is None else super().vocabulary()

    def made(self, vocab: TokenizerVocab) -> Iterator[Made]:
        if not self.is_synthetic:
            return super().made(vocab)
        split = cast(Split, self.split)
        return (written(split, drawn) for drawn in self.corpus.stream(seed=self.seed, split=split, num_workers=self.workers, vocab=vocab))
