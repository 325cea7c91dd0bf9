"""Articles and summaries from files and from Hugging Face datasets, as labelled examples."""

import collections
import csv
import dataclasses
import functools
import itertools
import json
import multiprocessing
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data.news import Example, NewsTask, Story, split_sentences, train_vocab
from data.news.alignment import Alignment

ARTICLE_COLUMNS = ("article", "document", "text", "content", "body")
SUMMARY_COLUMNS = ("summary", "highlights", "abstract", "headline")
_SUFFIXES = (".jsonl", ".csv", ".parquet")
_CHUNK_ARTICLES = 64
_VOCAB_ARTICLES = 10_000

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where articles come from.

    Attributes:
      name: A .jsonl, .csv or .parquet file, or the name of a Hugging Face dataset, its configuration after a colon.
      split: Of a Hugging Face dataset.
      article_column, summary_column: By default the first that there is of ARTICLE_COLUMNS and SUMMARY_COLUMNS.
    """

    name: str
    split: str = "train"
    article_column: str | None = None
    summary_column: str | None = None

    def pairs(self) -> Iterator[Pair]:
        """(article, summary), row by row; text that is missing is empty.

        Raises:
          FileNotFoundError, IsADirectoryError: there is no such file.
          ValueError: a file that is not what its name says, or lacks a column; names the row.
        """
        path = Path(self.name)
        if path.suffix in _SUFFIXES:
            rows = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix](path)
        elif path.exists():
            raise ValueError(f"{self.name}: expected a file that ends in {', '.join(_SUFFIXES)}")
        else:
            rows = self._hub_rows()
        article = summary = ""
        for number, row in enumerate(rows, 1):
            if number == 1:
                article = _column(self.name, row, self.article_column, ARTICLE_COLUMNS, "article")
                summary = _column(self.name, row, self.summary_column, SUMMARY_COLUMNS, "summary")
            values = (row.get(article), row.get(summary))
            if not all(value is None or isinstance(value, str) for value in values):
                raise ValueError(f"{self.name}: row {number}: expected text in {article!r} and {summary!r}")
            yield values[0] or "", values[1] or ""
        if not article:
            raise ValueError(f"{self.name}: no rows")

    def _hub_rows(self) -> Iterator[Mapping[str, Any]]:
        import datasets

        name, _, configuration = self.name.partition(":")
        try:
            rows = datasets.load_dataset(name, configuration or None, split=self.split, streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.name}: neither a file nor a data set that could be loaded: {str(error).splitlines()[0]}") from error
        return iter(rows)


def _column(source: str, row: Mapping[str, Any], named: str | None, known: Sequence[str], what: str) -> str:
    wanted = known if named is None else (named,)
    found = next((name for name in wanted if name in row), None)
    if found is None:
        raise ValueError(
            f"{source}: no column {' or '.join(wanted)}; there are {', '.join(map(str, row)) or 'none'}: name one with --{what}-column"
        )
    return found


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number}: expected a JSON object")
            yield row


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(2**27)
    with path.open(newline="", encoding="utf-8-sig") as lines:
        try:
            yield from csv.DictReader(lines)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not CSV in UTF-8: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    with path.open("rb") as file:
        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=_CHUNK_ARTICLES):
                yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is not Parquet: {str(error).splitlines()[0]}") from None


class Aligned(NamedTuple):
    """An article in sentences with the sources of its summary, or why there is none."""

    story: Story | None
    dropped: str


def aligned(pair: Pair, alignment: Alignment) -> Aligned:
    """Splits an article and its summary (whose lines may be sentences without a full stop) and finds the sources.

    Summary sentences without sources are left out; an article without any left is dropped.
    """
    article = split_sentences(pair[0])
    summary = [sentence for line in pair[1].splitlines() for sentence in split_sentences(line)]
    if not article:
        return Aligned(None, "without a sentence")
    if not summary:
        return Aligned(None, "without a summary")
    found = [(text, own) for text, own in zip(summary, alignment.align(article, summary), strict=True) if own]
    if not found:
        return Aligned(None, "without a usable alignment")
    return Aligned(Story(tuple(article), tuple(text for text, _ in found), tuple(own for _, own in found), ()), "")


def _encoded(task: NewsTask, alignment: Alignment, seed: int, chunk: tuple[int, list[Pair]]) -> list[Example | str]:
    """The examples of a chunk of articles, or why an article is dropped."""
    results: list[Example | str] = []
    for number, pair in enumerate(chunk[1], chunk[0]):
        story, dropped = aligned(pair, alignment)
        if story is None:
            results.append(dropped)
            continue
        try:
            example = task.encode(story, random.Random(f"news/{seed}/labels/{number}").random())
        except ValueError as error:
            raise ValueError(f"article {number + 1}: {error}") from None
        results.append("with all sources beyond the cut" if example is None else example)
    return results


def examples(
    source: Source, task: NewsTask, alignment: Alignment, *, seed: int, workers: int, dropped: collections.Counter[str]
) -> Iterator[Example]:
    """The labelled examples of a source in order; `dropped` counts the articles read, cut and dropped."""
    function = functools.partial(_encoded, task, alignment, seed)
    for chunk in _mapped(function, _chunks(source.pairs()), workers):
        for result in chunk:
            dropped["read"] += 1
            if isinstance(result, str):
                dropped[result] += 1
            else:
                yield result


def _chunks(pairs: Iterator[Pair]) -> Iterator[tuple[int, list[Pair]]]:
    """(number of the first, pairs)."""
    start = 0
    while chunk := list(itertools.islice(pairs, _CHUNK_ARTICLES)):
        yield start, chunk
        start += len(chunk)


def vocab_of(source: Source, *, vocab_tokens: int, num_labels: int) -> Any:
    """A byte-pair vocabulary trained on the first articles and summaries of a source, 10,000 at most."""
    pairs = itertools.islice(source.pairs(), _VOCAB_ARTICLES)
    return train_vocab((f" {text}" for pair in pairs for text in pair), vocab_tokens=vocab_tokens, num_labels=num_labels)


def _mapped(function: Callable[[Any], Any], items: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """function(item) of each in order, by so many processes, none of which runs far ahead; 0 for this one."""
    if num_workers == 0:
        yield from map(function, items)
        return
    # Fresh interpreters: nothing of this process (threads of libraries) is copied.
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        waiting: collections.deque[Future[Any]] = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
