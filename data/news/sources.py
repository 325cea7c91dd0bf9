"""Read articles and summaries from files and Hugging Face datasets, and make labelled examples of them."""

import collections
import csv
import dataclasses
import functools
import itertools
import json
import multiprocessing
import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from data import task
from data.errors import UserError
from data.news.alignment import Alignment, split_sentences
from data.news.corpus import Corpus, Example, encode
from data.news.synthetic import Story
from data.vocab import TokenizerVocab, train_vocab

ARTICLE_COLUMNS = ("article", "document", "text", "content", "body")
SUMMARY_COLUMNS = ("summary", "highlights", "abstract", "headline")
_CHUNK_ARTICLES = 64
_CHUNKS_AHEAD = 4  # of each worker
_VOCAB_ARTICLES = 10_000

Pair = tuple[str, str]


def read_pairs(source: str, split: str = "train", article_column: str | None = None, summary_column: str | None = None) -> Iterator[Pair]:
    """Yield (article, summary), row by row; text that is missing is empty.

    Args:
      source: a .jsonl, .csv or .parquet file, or the name of a Hugging Face dataset, its configuration after a colon.
      split: of a Hugging Face dataset.
      article_column, summary_column: by default the first that there is of ARTICLE_COLUMNS and SUMMARY_COLUMNS.

    Raises:
      FileNotFoundError, IsADirectoryError: there is no such file.
      UserError: a file that is not what its name says, or lacks a column; names the row.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}
    path = Path(source)
    if path.suffix in readers:
        rows = readers[path.suffix](path)
    elif path.exists():
        raise UserError(f"{source}: expected a file that ends in {', '.join(readers)}")
    else:
        rows = _hub_rows(source, split)
    article = summary = ""
    for number, row in enumerate(rows, 1):
        if number == 1:
            article = _column(source, row, article_column, ARTICLE_COLUMNS, "article")
            summary = _column(source, row, summary_column, SUMMARY_COLUMNS, "summary")
        values = (row.get(article), row.get(summary))
        if not all(value is None or isinstance(value, str) for value in values):
            raise UserError(f"{source}: row {number}: expected text in {article!r} and {summary!r}")
        yield values[0] or "", values[1] or ""
    if not article:
        raise UserError(f"{source}: no rows")


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


def _hub_rows(source: str, split: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        return iter(datasets.load_dataset(name, configuration or None, split=split, streaming=True))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source}: neither a file nor a data set that could be loaded: {str(error).splitlines()[0]}") from error


def examples(
    pairs: Iterator[Pair], vocab: TokenizerVocab, alignment: Alignment, *, max_prompt_tokens: int, seed: int, num_workers: int
) -> Iterator[Example | str]:
    """Make the labelled example of each article, or say why it is dropped, in order; 0 workers make them in this process."""
    make, numbered = functools.partial(_example, vocab, max_prompt_tokens, alignment, seed), enumerate(pairs)
    if num_workers == 0:
        yield from map(make, numbered)
        return
    # Fresh interpreters: nothing of this process (threads of libraries) is copied.
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        while ahead := list(itertools.islice(numbered, num_workers * _CHUNKS_AHEAD * _CHUNK_ARTICLES)):
            yield from pool.map(make, ahead, chunksize=_CHUNK_ARTICLES)


def _example(vocab: TokenizerVocab, max_prompt_tokens: int, alignment: Alignment, seed: int, numbered: tuple[int, Pair]) -> Example | str:
    """Write the example of an article, or say why it is dropped.

    Lines of the summary may be sentences without a full stop; summary sentences without sources are left out.
    """
    number, (text, lines) = numbered
    article = split_sentences(text)
    summary = [sentence for line in lines.splitlines() for sentence in split_sentences(line)]
    if not article:
        return "without a sentence"
    if not summary:
        return "without a summary"
    found = [(sentence, own) for sentence, own in zip(summary, alignment.align(article, summary), strict=True) if own]
    if not found:
        return "without a usable alignment"
    uniform = random.Random(f"news/{seed}/labels/{number}").random()
    try:
        sentences, owns = zip(*found)
        story = Story(tuple(article), sentences, owns, ())
        example = encode(story, vocab, max_prompt_tokens=max_prompt_tokens, uniform=uniform)
    except UserError as error:
        raise UserError(f"article {number + 1}: {error}") from None
    return "with all sources beyond the cut" if example is None else example


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand(task.WriteCommand):
    """Write examples of news (articles and gold summaries with the sources of each sentence) as a datasets.load_from_disk directory.

    Attributes:
      source: "synthetic", a file (.jsonl, .csv, .parquet) or a Hugging Face data set (NAME or NAME:CONFIGURATION).
      split: Of synthetic news, whose two splits share no article (train, test), or of a Hugging Face data set.
      article_column: Column of the articles; by default article, document, text, content or body.
      summary_column: Column of the summaries; by default summary, highlights, abstract or headline.
      alignment: Of files and data sets: which sentences a summary sentence was written from.
    """

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

    def make(self) -> tuple[TokenizerVocab, Generator[Example, None, None], dict[str, Any]]:
        if self.source == "synthetic":
            made: Iterator[Example | str]
            vocab, made, _ = super().make()
            counts = collections.Counter(written=0, read=0)
        else:
            source = (self.source, self.split, self.article_column, self.summary_column)
            texts = (f" {text}" for pair in itertools.islice(read_pairs(*source), _VOCAB_ARTICLES) for text in pair)
            vocab = train_vocab(texts, vocab_tokens=self.corpus.vocab_tokens, num_labels=self.corpus.num_labels)
            options = {"max_prompt_tokens": self.corpus.max_prompt_tokens, "seed": self.seed, "num_workers": self.workers}
            made = examples(read_pairs(*source), vocab, self.alignment, **options)
            counts = collections.Counter(read=0)
        return vocab, self._counted(made, counts), {"articles": counts}

    def _counted(self, made: Iterator[Example | str], counts: collections.Counter[str]) -> Generator[Example, None, None]:
        """Yield the examples, and count the articles read, written and dropped; UserError where no example comes."""
        for result in made:
            counts["read"] += 1
            counts[result if isinstance(result, str) else "written"] += 1
            if not isinstance(result, str):
                yield result
        if not counts["written"]:
            why = "; ".join(f"{count} {name}" for name, count in counts.items() if name not in ("read", "written"))
            raise UserError(f"{self.source}: none of its articles can be used: {why}")
