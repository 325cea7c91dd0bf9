"""Write a corpus to a directory, with a card of its statistics."""

import collections
import contextlib
import dataclasses
import itertools
import shlex
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated, Any

import tqdm
import tyro

from data import arithmetic, commandline, news


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Write examples of arithmetic (prompts and gold responses) as a datasets.load_from_disk directory.

    Attributes:
      out: Directory to write; it must not exist, or be empty.
      num_examples: How many examples.
      seed: The same seed gives the same bytes of every file.
      split: The two splits share no expression.
      workers: Processes that generate examples; 0 generates them in the main process. The files are the same.
      corpus: What is drawn.
    """

    out: Path
    num_examples: int = 1000
    seed: int = 0
    split: arithmetic.Split = "train"
    workers: int = 0
    corpus: tyro.conf.OmitArgPrefixes[arithmetic.Corpus] = arithmetic.Corpus()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ValueError(f"--num-examples is {self.num_examples}: expected at least 1")


def write_arithmetic(command: Arithmetic) -> None:
    """Writes the corpus that the command line asks for."""
    from data import dataset as corpus

    distributions = dataclasses.asdict(command.corpus)
    drawn: dict[str, Any] = {"num_examples": command.num_examples, "seed": command.seed, "split": command.split}
    words = [_option(name.replace("_", "-"), value) for name, value in {**drawn, **distributions}.items()]
    description = {"command": f"python -m data arithmetic {' '.join(words)} --out DIR", **drawn, "distributions": distributions}
    examples = arithmetic.stream(command.corpus, seed=command.seed, split=command.split, num_workers=command.workers)
    shown = tqdm.tqdm(itertools.islice(examples, command.num_examples), "examples", command.num_examples, unit="", disable=None)
    task = command.corpus.task
    with contextlib.closing(examples):
        corpus.write(command.out, shown, task, description)


def _option(name: str, value: Any) -> str:
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {shlex.quote(str(value))}"


@dataclasses.dataclass(frozen=True)
class News:
    """Write examples of news (articles and gold summaries with the sources of each sentence) as a datasets.load_from_disk directory.

    Attributes:
      out: Directory to write; it must not exist, or be empty.
      source: "synthetic", a file (.jsonl, .csv, .parquet) or a Hugging Face data set (NAME or NAME:CONFIGURATION).
      num_examples: How many examples, at most; a file may have fewer articles.
      seed: The same seed gives the same bytes of every file.
      split: Of synthetic news, whose two splits share no article (train, test), or of a Hugging Face data set.
      article_column: Column of the articles; by default article, document, text, content or body.
      summary_column: Column of the summaries; by default summary, highlights, abstract or headline.
      workers: Processes that make examples; 0 makes them in the main process. The files are the same.
      alignment: Of files and data sets: which sentences a summary sentence was written from.
      corpus: What is drawn and how it is written.
    """

    out: Path
    source: str = "synthetic"
    num_examples: int = 1000
    seed: int = 0
    split: str = "train"
    article_column: str | None = None
    summary_column: str | None = None
    workers: int = 0
    alignment: tyro.conf.OmitArgPrefixes[news.Alignment] = news.Alignment()  # noqa: RUF009 (frozen)
    corpus: tyro.conf.OmitArgPrefixes[news.Corpus] = news.Corpus()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ValueError(f"--num-examples is {self.num_examples}: expected at least 1")
        if self.workers < 0:
            raise ValueError(f"--workers is {self.workers}: expected at least 0")


def write_news(command: News) -> None:
    """Writes the corpus that the command line asks for."""
    from data import dataset as corpus
    from data.news import sources

    drawn: dict[str, Any] = {"source": command.source, "num_examples": command.num_examples, "seed": command.seed, "split": command.split}
    settings = {**dataclasses.asdict(command.corpus), **dataclasses.asdict(command.alignment)}
    columns = {name: value for name in ("article_column", "summary_column") if (value := getattr(command, name)) is not None}
    words = [_option(name.replace("_", "-"), value) for name, value in {**drawn, **columns, **settings}.items()]
    description = {"command": f"python -m data news {' '.join(words)} --out DIR", **drawn, "distributions": {**columns, **settings}}
    articles: collections.Counter[str] = collections.Counter()
    examples: Iterator[news.Example]
    if command.source == "synthetic":
        task = command.corpus.task
        examples = command.corpus.stream(task, seed=command.seed, split=command.split, num_workers=command.workers)  # type: ignore[arg-type]
    else:
        source = sources.Source(command.source, command.split, command.article_column, command.summary_column)
        task = command.corpus.task_in(
            sources.vocab_of(source, vocab_tokens=command.corpus.vocab_tokens, num_labels=command.corpus.num_labels)
        )
        examples = sources.examples(source, task, command.alignment, seed=command.seed, workers=command.workers, dropped=articles)

    def counted() -> Generator[news.Example, None, None]:
        for example in itertools.islice(examples, command.num_examples):
            articles["written"] += 1
            yield example
        if not articles["written"]:
            why = "; ".join(f"{count} {name}" for name, count in articles.items() if name not in ("read", "written"))
            raise ValueError(f"{command.source}: none of its articles can be used: {why}")
        articles.setdefault("read", articles["written"])
        description.update(num_examples=articles["written"], articles=dict(articles))

    with contextlib.closing(counted()) as drawn_examples:
        shown = tqdm.tqdm(drawn_examples, "examples", command.num_examples, unit="", disable=None)
        corpus.write(command.out, shown, task, description)


# A union makes subcommands.
_COMMANDS = Annotated[Arithmetic, tyro.conf.subcommand("arithmetic")] | Annotated[News, tyro.conf.subcommand("news")]


def main(argv: list[str] | None = None) -> None:
    with commandline.errors_for_people():
        command: Arithmetic | News = commandline.parse(_COMMANDS, argv, prog="python -m data", description=__doc__)
        write_news(command) if isinstance(command, News) else write_arithmetic(command)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half written directory is removed
    main()
