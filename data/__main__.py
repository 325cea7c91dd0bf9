"""Write a corpus to a directory, with a card of its statistics."""

import contextlib
import dataclasses
import itertools
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import tqdm
import tyro

from data import arithmetic, commandline


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
    from data import corpus  # here, so that --help and wrong arguments need not wait for `datasets`

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


# A union makes subcommands; it takes two members, and tyro's documentation pads it like this.
_COMMANDS = Annotated[Arithmetic, tyro.conf.subcommand("arithmetic")] | Annotated[None, tyro.conf.Suppress]


def main(argv: list[str] | None = None) -> None:
    with commandline.errors_for_people():
        command: Arithmetic = commandline.parse(_COMMANDS, argv, prog="python -m data", description=__doc__)
        write_arithmetic(command)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half written directory is removed
    main()
