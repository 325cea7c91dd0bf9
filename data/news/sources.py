"""Read articles and summaries from files and Hugging Face datasets, and make labelled examples of them."""

import collections
import dataclasses
import functools
import itertools
import multiprocessing
import random
import re
import signal
from collections.abc import Collection, Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from data import card, rows, task
from data.alignment import Alignment, readable, split_sentences
from data.errors import UserError
from data.news.corpus import SYNTHETIC_SETTINGS, Corpus, Example, UnusableArticle, encode, style
from data.news.synthetic import Story
from data.streams import SPLITS, divided_split_of
from data.vocab import TokenizerVocab, train_vocab
from data.workers import check_workers

ARTICLE_COLUMNS = ("article", "document", "text", "content", "body")
SUMMARY_COLUMNS = ("summary", "highlights", "abstract", "headline")
_CHUNK_ARTICLES = 64
_CHUNKS_AHEAD = 4  # of each worker
_VOCAB_ARTICLES = 10_000


class Pair(NamedTuple):
    """A row: its number from 0 on, its split, and its article and summary, None where there is something other than text."""

    number: int
    split: str
    article: str | None
    summary: str | None


class Made(NamedTuple):
    """What became of a row: an example of a split, or none; and what a card counts of it."""

    split: str
    example: Example | None
    counted: tuple[str, ...]


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


def examples(
    pairs: Iterator[Pair], vocab: TokenizerVocab, alignment: Alignment, *, seed: int, num_workers: int, **written: Any
) -> Iterator[Made]:
    """Make the labelled example of each article, or say why it is dropped, in order; 0 workers make them in this process.

    Other arguments as for `corpus.encode`.
    """
    check_workers(num_workers)
    make = functools.partial(_example, vocab, written, alignment, seed)
    if num_workers == 0:
        yield from map(make, pairs)
        return
    # Fresh interpreters: nothing of this process (threads of libraries) is copied. Ctrl-C is for this process alone.
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            while ahead := list(itertools.islice(pairs, num_workers * _CHUNKS_AHEAD * _CHUNK_ARTICLES)):
                yield from pool.map(make, ahead, chunksize=_CHUNK_ARTICLES)
        except BrokenProcessPool:
            raise UserError(f"one of {num_workers} workers was ended from outside, for want of memory perhaps: try fewer") from None


def _example(vocab: TokenizerVocab, written: Mapping[str, Any], alignment: Alignment, seed: int, pair: Pair) -> Made:
    """Write the example of an article, or say why it is dropped.

    Lines of the summary may be sentences without a full stop; summary sentences without sources are left out.
    """
    number, split, text, lines = pair
    if text is None or lines is None:
        return Made(split, None, ("with something other than text",))
    article = split_sentences(text)
    summary = [sentence for line in lines.splitlines() for sentence in split_sentences(line)]
    if not article:
        return Made(split, None, ("without a sentence",))
    if not summary:
        return Made(split, None, ("without a summary",))
    found = [(sentence, own) for sentence, own in zip(summary, alignment.align(article, summary), strict=True) if own]
    if not found:
        return Made(split, None, ("without a usable alignment",))
    uniform = random.Random(f"news/{seed}/labels/{number}").random()
    sentences, owns = zip(*found)
    story = Story(tuple(article), sentences, owns, ())
    try:
        example = encode(story, vocab, uniform=uniform, **written)
    except UnusableArticle as error:
        return Made(split, None, (error.kind,))
    if example is None:
        return Made(split, None, ("with all sources beyond the cut",))
    also = {
        "written, cut to max_prompt_tokens": example.cut_sentences > 0,
        "written, without summary sentences that have no source": len(example.story.summary) < len(summary),
        "written, with unreadable characters replaced": readable(text + lines) != text + lines,
    }
    return Made(split, example, ("written", *(name for name, is_so in also.items() if is_so)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand(task.WriteCommand):
    """Write examples of news (articles and gold summaries with the sources of each sentence) as a datasets.load_from_disk directory.

    Attributes:
      source: "synthetic", a file (.jsonl, .csv, .parquet), a directory of some, or a Hugging Face data set (NAME or
        NAME:CONFIGURATION).
      num_examples: How many examples, at most. Default: 1000 of synthetic news, otherwise all.
      split: train, validation or test: that part alone, by a hash of the article (80%, 10%, 10%); all: everything, undivided.
        Default: of synthetic news train, otherwise the three beside each other. What has splits of its own keeps them.
      article_column: Column of the articles; by default article, document, text, content or body.
      summary_column: Column of the summaries; by default summary, highlights, abstract or headline.
      alignment: Of files and data sets: which sentences a summary sentence was written from.
    """

    source: str = "synthetic"
    num_examples: int | None = None
    split: str | None = None
    article_column: str | None = None
    summary_column: str | None = None
    alignment: Alignment = dataclasses.field(default_factory=Alignment)
    corpus: Corpus = dataclasses.field(default_factory=Corpus)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_synthetic:
            for name in ("num_examples", "split"):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, getattr(task.WriteCommand, name))
        elif Path(self.source).exists() and self.split not in (None, "all", *SPLITS):
            raise UserError(f"split is {self.split!r}; allowed: {', '.join(SPLITS)}, all")

    @property
    def is_synthetic(self) -> bool:
        return self.source == "synthetic"

    def drawn(self) -> dict[str, Any]:
        return {"source": self.source, **super().drawn()}

    def settings(self) -> dict[str, Any]:
        columns = {"article_column": self.article_column, "summary_column": self.summary_column}
        named = {name: value for name, value in columns.items() if value is not None}
        return {**named, **super().settings(), **dataclasses.asdict(self.alignment)}

    def words(self, *left_out: str) -> str:
        return super().words(*left_out, *(() if self.is_synthetic else SYNTHETIC_SETTINGS))

    def make_task(self, kind: type[task.Task], vocab: Any) -> Any:
        made: Any = kind.of(self.corpus, vocab)
        path = Path(self.source)
        name = path.absolute().name if path.exists() and not self.is_synthetic else self.source
        return dataclasses.replace(made, source=name if self.is_synthetic or name != "synthetic" else f"./{name}")

    def make(self) -> tuple[TokenizerVocab, Generator[Any, None, None], dict[str, Any]]:
        if self.is_synthetic:
            vocab, drawn, _ = super().make()
            made: Iterator[Made] = (Made("train", example, ("written",)) for example in drawn)
            counts = collections.Counter(read=0, written=0)
        else:
            columns = self.article_column, self.summary_column
            train = read_pairs(self.source, "train" if self.split in SPLITS or self.split is None else self.split, *columns)
            texts = (
                f" {readable(text)}" for pair in itertools.islice(train, _VOCAB_ARTICLES) for text in (pair.article, pair.summary) if text
            )
            vocab = train_vocab(texts, vocab_tokens=self.corpus.vocab_tokens, num_labels=self.corpus.num_labels)
            options = {"seed": self.seed, "num_workers": self.workers, **style(self.corpus)}
            made = examples(read_pairs(self.source, self.split, *columns), vocab, self.alignment, **options)
            counts = collections.Counter(read=0, written=0)
        return vocab, self._counted(made, counts), {"articles": counts}

    def _counted(self, made: Iterator[Made], counts: collections.Counter[str]) -> Generator[Any, None, None]:
        """Yield the examples, with their splits where there are several; count what became of articles. UserError where none comes."""
        for split, example, counted in made:
            counts["read"] += 1
            counts.update(counted)
            if example is not None:
                yield example if self.split else (split, example)
        if not counts["read"]:
            raise UserError(f"{self.source}: no article falls to the {self.split} split")
        if not counts["written"]:
            raise UserError(f"{self.source}: none of its articles can be used: {card.listed(counts)}")
