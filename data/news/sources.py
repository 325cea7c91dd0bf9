"""Read articles and summaries from files and Hugging Face datasets, and make labelled examples of them."""

import collections
import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import multiprocessing
import random
import re
import signal
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from data import card, task
from data.errors import UserError
from data.news.alignment import Alignment, readable, split_sentences
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
_UNDECODED = re.compile("[\ud800-\udfff]")

Choose = Callable[[Collection[str]], tuple[str, str]]  # the columns of articles and summaries among those that there are
Values = tuple[Any, Any]


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
    article that occurs twice is in one of them. Files of a directory that are all named after splits, train-1.csv and
    test.csv say, are these; so are the splits of a Hugging Face dataset. Where there is one of them only, it is as a file.

    Args:
      source: a .jsonl, .csv or .parquet file, a directory of some, or the name of a Hugging Face dataset, its configuration
        after a colon.
      split: "train", "validation" or "test"; "all" or None reads all; of a Hugging Face dataset also another of its own.
      article_column, summary_column: by default the first that there is of ARTICLE_COLUMNS and SUMMARY_COLUMNS.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: a file that is not what its name says, or lacks a column; names the line.
    """
    choose = functools.partial(_columns, source, article_column, summary_column)
    path = Path(source)
    is_local = path.exists() or path.suffix.lower() in _READERS
    number = -1
    parts = _files(path, choose) if is_local else _hub_splits(source, split, choose)
    for number, (own, (article, summary)) in enumerate((own, row) for own, rows in parts for row in rows):
        texts = [None if not isinstance(text, str | None) else text or "" for text in (article, summary)]
        found = own or divided_split_of(" ".join(readable(texts[0] or "").split()))
        if split in (None, "all", found):
            yield Pair(number, found, *texts)
    if number < 0:
        raise UserError(f"{source}: no rows")


def _files(path: Path, choose: Choose) -> Iterator[tuple[str | None, Iterator[Values]]]:
    """Yield the rows of a file, or of those in a directory, with their splits where all are named after one of several."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix.lower() in _READERS]
    if not files:
        raise UserError(f"{path}: expected a file that ends in {', '.join(_READERS)}, or a directory of some")
    named = [next((split for split in SPLITS if file.name.startswith(split)), None) for file in files]
    is_divided = None not in named and len({*named}) > 1
    for file, split in zip(files, named):
        yield split if is_divided else None, _READERS[file.suffix.lower()](file, choose)


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


def _json_lines(path: Path, choose: Choose) -> Iterator[Values]:
    columns = None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                why = "expected an object a line, not an array" if line.lstrip().startswith(b"[") else error
                raise UserError(f"{path}: line {number} is not JSON: {why}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number}: expected a JSON object")
            columns = columns or choose(row)
            yield row.get(columns[0]), row.get(columns[1])


def _csv_rows(path: Path, choose: Choose) -> Iterator[Values]:
    """Read CSV strictly: a quote that is not closed, and a row of more or fewer fields than the header, are errors."""
    csv.field_size_limit(2**27)
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(_text_lines(path, file), strict=True)
        header: list[str] = []
        begin = 1  # line of the row that is read
        try:
            for fields in reader:
                if any(map(str.strip, fields)) and not header:
                    header = [name.strip() for name in fields]
                    columns = tuple(map(header.index, choose(header)))
                elif any(map(str.strip, fields)):
                    if len(fields) != len(header):
                        raise UserError(f"{path}: line {begin}: {len(fields)} fields, but the header has {len(header)} columns")
                    yield fields[columns[0]], fields[columns[1]]
                begin = reader.line_num + 1
        except csv.Error as error:
            is_open = "unexpected end" in str(error)
            why = "a quote is opened there and never closed" if is_open else f"{error} (a quote inside a text is written twice)"
            raise UserError(f"{path}: the row that begins in line {begin}: {why}") from None


def _text_lines(path: Path, file: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if "\0" in line or (not line.isascii() and _UNDECODED.search(line)):
            raise UserError(f"{path}: line {number} is not text in UTF-8")
        yield line


def _parquet_rows(path: Path, choose: Choose) -> Iterator[Values]:
    import pyarrow
    from pyarrow import parquet, types

    def values(column: pyarrow.Array) -> list[str | None]:
        found = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()  # bytes need not be UTF-8
        return [None if text is None else text.decode("utf-8", "surrogateescape") for text in found]

    with path.open("rb") as file:
        try:
            reader = parquet.ParquetFile(file)
            columns = choose(reader.schema_arrow.names)
            for name in columns:
                kind = reader.schema_arrow.field(name).type
                kind = kind.value_type if types.is_dictionary(kind) else kind
                if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)):
                    raise UserError(f"{path}: column {name} holds {kind}: expected text")
            for batch in reader.iter_batches(batch_size=_CHUNK_ARTICLES, columns=list(columns)):
                yield from zip(*(values(batch.column(name)) for name in columns), strict=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not Parquet, or damaged: {str(error).splitlines()[0]}") from None


_READERS = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _hub_splits(source: str, split: str | None, choose: Choose) -> Iterator[tuple[str | None, Iterator[Values]]]:
    """Yield the rows of a data set's own splits by name; those of its only one without a name."""
    import datasets

    path = [part or None for part in source.split(":", 1)]
    with _hub_errors(source):
        names = datasets.get_dataset_split_names(*path)
    own = [name for name in names if name in SPLITS] or names
    is_named = split not in (None, "all", *SPLITS) or len({*own} & {*SPLITS}) > 1
    wanted = [split] if is_named and split not in (None, "all") else own
    if wanted[0] not in names:
        raise UserError(f"{source}: there is no split {split}, only {', '.join(names)}")
    for name in wanted:
        yield name if is_named else None, _hub_rows(source, path, name, choose)


def _hub_rows(source: str, path: list[str | None], split: str, choose: Choose) -> Iterator[Values]:
    import datasets

    with _hub_errors(source):
        rows = datasets.load_dataset(*path, split=split, streaming=True)
        article, summary = choose(rows.column_names or list(next(iter(rows), {})))
        for row in rows.select_columns([article, summary]):
            yield row[article], row[summary]


@contextlib.contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source}: neither a file nor a data set that could be loaded: {str(error).splitlines()[0]}") from error


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
        return dataclasses.replace(made, source=path.name if path.exists() else self.source)

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
