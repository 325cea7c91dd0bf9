"""Write a corpus to a directory, with a card of its statistics."""

import collections
import contextlib
import itertools
import signal
import sys
from collections.abc import Iterator
from typing import Any

import tqdm
import tyro

from data import commandline, dataset
from data.tasks import TASKS
from data.writing import WriteCommand


def write(command: WriteCommand) -> None:
    """Write the corpus that a command asks for."""
    name, drawn, settings = command.task_name, command.drawn(), command.settings()
    description = {"command": f"python -m data {name} {command.words()} --out DIR", **drawn, "distributions": settings}
    counts: collections.Counter[str] = collections.Counter()
    vocab, examples = command.vocab_and_examples(counts)

    def counted() -> Iterator[Any]:
        number = 0
        for example in itertools.islice(examples, command.num_examples):
            number += 1
            yield example
        description.update({"num_examples": number} | ({"articles": dict(counts)} if counts else {}))

    with contextlib.closing(examples):
        shown = tqdm.tqdm(counted(), "examples", command.num_examples, unit="", disable=None)
        dataset.write(command.out, shown, TASKS[name].of(command.corpus, vocab), description)


def main(argv: list[str] | None = None) -> None:
    commands = {name: task.WriteCommand for name, task in TASKS.items()}
    options: dict[str, Any] = {"args": argv, "prog": "python -m data", "description": __doc__, "config": (tyro.conf.OmitArgPrefixes,)}
    with commandline.exit_on_user_error():
        write(commandline.parse(tyro.extras.subcommand_cli_from_dict, commands, **options))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half written directory is removed
    main()
