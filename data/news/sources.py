"""Read articles and summaries from files and Hugging Face datasets, and make labelled examples of them."""

import collections
import csv
import dataclasses
import functools
import itertools
import json
import multiprocessing
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from data import writing
from data.errors import UserError
from data.news.alignment import Alignment, split_sentences
from data.news.corpus import Corpus
from data.news.oracle import Example, encode
from data.news.synthetic import Story
from data.vocab import TokenizerVocab, train_vocab

ARTICLE_COLUMNS = ("article", "document", "text", "content", "body")
SUMMARY_COLUMNS = ("summary", "highlights", "abstract", "headline")
_SUFFIXES = (".jsonl", ".csv", ".parquet")
_CHUNK_ARTICLES = 64
_VOCAB_ARTICLES = 10_000

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Source:
    """A file or a dataset of articles.

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
        """Yield (article, summary), row by row; text that is missing is empty.

        Raises:
          FileNotFoundError, IsADirectoryError: there is no such file.
          UserError: a file that is not what its name says, or lacks a column; names the row.
        """
        path = Path(self.name)
        if path.suffix in _SUFFIXES:
            rows = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix](path)
        elif path.exists():
            raise UserError(f"{self.name}: expected a file that ends in {', '.join(_SUFFIXES)}")
        else:
            rows = self._hub_rows()
        article = summary = ""
        for number, row in enumerate(rows, 1):
            if number == 1:
                article = _column(self.name, row, self.article_column, ARTICLE_COLUMNS, "article")
                summary = _column(self.name, row, self.summary_column, SUMMARY_COLUMNS, "summary")
            values = (row.get(article), row.get(summary))
            if not all(value is None or isinstance(value, str) for value in values):
                raise UserError(f"{self.name}: row {number}: expected text in {article!r} and {summary!r}")
            yield values[0] or "", values[1] or ""
        if not article:
            raise UserError(f"{self.name}: no rows")

    def _hub_rows(self) -> Iterator[Mapping[str, Any]]:
        import datasets

        name, _, configuration = self.name.partition(":")
        try:
            rows = datasets.load_dataset(name, configuration or None, split=self.split, streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.name}: neither a file nor a data set that could be loaded: {str(error).splitlines()[0]}") from error
        return iter(rows)


def _column(source: str, row: Mapping[str, Any], named: str | None, known: Sequence[str], what: str) -> str:
    wanted = known if named is None else (named,)
    found = next((name for name in wanted if name in row), None)
    if found is None:
        raise UserError(
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
                raise UserError(f"{path}: line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number}: expected a JSON object")
            yield row


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(2**27)
    with path.open(newline="", encoding="utf-8-sig") as lines:
        try:
            yield from csv.DictReader(lines)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not CSV in UTF-8: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    with path.open("rb") as file:
        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=_CHUNK_ARTICLES):
                yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not Parquet: {str(error).splitlines()[0]}") from None


class AlignedPair(NamedTuple):
    """An article in sentences with the sources of its summary, or why it is dropped."""

    story: Story | None
    dropped: str


def align_pair(pair: Pair, alignment: Alignment) -> AlignedPair:
    """Split an article and its summary (whose lines may be sentences without a full stop) and finds the sources.

    Summary sentences without sources are left out; an article without any left is dropped.
    """
    article = split_sentences(pair[0])
    summary = [sentence for line in pair[1].splitlines() for sentence in split_sentences(line)]
    if not article:
        return AlignedPair(None, "without a sentence")
    if not summary:
        return AlignedPair(None, "without a summary")
    found = [(text, own) for text, own in zip(summary, alignment.align(article, summary), strict=True) if own]
    if not found:
        return AlignedPair(None, "without a usable alignment")
    return AlignedPair(Story(tuple(article), tuple(text for text, _ in found), tuple(own for _, own in found), ()), "")


def _encode_chunk(
    vocab: TokenizerVocab, max_prompt_tokens: int, alignment: Alignment, seed: int, chunk: tuple[int, list[Pair]]
) -> list[Example | str]:
    """Write the examples of a chunk of articles, or say why an article is dropped."""
    results: list[Example | str] = []
    for number, pair in enumerate(chunk[1], chunk[0]):
        story, dropped = align_pair(pair, alignment)
        if story is None:
            results.append(dropped)
            continue
        try:
            uniform = random.Random(f"news/{seed}/labels/{number}").random()
            example = encode(story, vocab, max_prompt_tokens=max_prompt_tokens, uniform=uniform)
        except UserError as error:
            raise UserError(f"article {number + 1}: {error}") from None
        results.append("with all sources beyond the cut" if example is None else example)
    return results


def examples(
    source: Source,
    vocab: TokenizerVocab,
    alignment: Alignment,
    *,
    max_prompt_tokens: int,
    seed: int,
    num_workers: int,
    counts: collections.Counter[str],
) -> Iterator[Example]:
    """Make the labelled examples of a source in order; `counts` counts the articles read, cut and dropped."""
    function = functools.partial(_encode_chunk, vocab, max_prompt_tokens, alignment, seed)
    for chunk in _mapped(function, _chunks(source.pairs()), num_workers):
        for result in chunk:
            counts["read"] += 1
            if isinstance(result, str):
                counts[result] += 1
            else:
                yield result


def _chunks(pairs: Iterator[Pair]) -> Iterator[tuple[int, list[Pair]]]:
    """Yield (number of the first pair, pairs)."""
    start = 0
    while chunk := list(itertools.islice(pairs, _CHUNK_ARTICLES)):
        yield start, chunk
        start += len(chunk)


def vocab_of(source: Source, *, vocab_tokens: int, num_labels: int) -> TokenizerVocab:
    """Train a byte-pair vocabulary on the first articles and summaries of a source, 10,000 at most."""
    pairs = itertools.islice(source.pairs(), _VOCAB_ARTICLES)
    return train_vocab((f" {text}" for pair in pairs for text in pair), vocab_tokens=vocab_tokens, num_labels=num_labels)


def _mapped(function: Callable[[Any], Any], items: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """Yield function(item) of each item in order, computed by so many processes, none of which runs far ahead; 0 for this one."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand(writing.WriteCommand):
    """Write examples of news (articles and gold summaries with the sources of each sentence) as a datasets.load_from_disk directory.

    Attributes:
      source: "synthetic", a file (.jsonl, .csv, .parquet) or a Hugging Face data set (NAME or NAME:CONFIGURATION).
      split: Of synthetic news, whose two splits share no article (train, test), or of a Hugging Face data set.
      article_column: Column of the articles; by default article, document, text, content or body.
      summary_column: Column of the summaries; by default summary, highlights, abstract or headline.
      alignment: Of files and data sets: which sentences a summary sentence was written from.
    """

    task_name: ClassVar[str] = "news"

    source: str = "synthetic"
    split: str = "train"
    article_column: str | None = None
    summary_column: str | None = None
    alignment: Alignment = dataclasses.field(default_factory=Alignment)
    corpus: Corpus = dataclasses.field(default_factory=Corpus)

    def drawn(self) -> dict[str, Any]:
        return {"source": self.source, **super().drawn()}

    def settings(self) -> dict[str, Any]:
        columns = {"article_column": self.article_column, "summary_column": self.summary_column}
        named = {name: value for name, value in columns.items() if value is not None}
        return {**named, **super().settings(), **dataclasses.asdict(self.alignment)}

    def vocab_and_examples(self, counts: collections.Counter[str]) -> tuple[TokenizerVocab, Generator[Example, None, None]]:
        if self.source == "synthetic":
            vocab, made = super().vocab_and_examples(counts)
            return vocab, self._counted(made, counts)
        source = Source(self.source, self.split, self.article_column, self.summary_column)
        vocab = vocab_of(source, vocab_tokens=self.corpus.vocab_tokens, num_labels=self.corpus.num_labels)
        options = {"max_prompt_tokens": self.corpus.max_prompt_tokens, "seed": self.seed, "num_workers": self.workers}
        return vocab, self._counted(examples(source, vocab, self.alignment, counts=counts, **options), counts)

    def _counted(self, made: Iterator[Example], counts: collections.Counter[str]) -> Generator[Example, None, None]:
        """Count the examples; UserError where there are none."""
        for example in made:
            counts["written"] += 1
            counts["read"] += self.source == "synthetic"  # of other sources all articles are counted
            yield example
        if not counts["written"]:
            why = "; ".join(f"{count} {name}" for name, count in counts.items() if name not in ("read", "written"))
            raise UserError(f"{self.source}: none of its articles can be used: {why}")
