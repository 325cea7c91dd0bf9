"""Write a corpus to a directory, with a card of its statistics."""

import contextlib
import itertools
import signal
import sys
from typing import Any

import tqdm
import tyro

from data import card, commandline, dataset
from data.task import Task, WriteCommand
from data.tasks import TASKS


def write(command: WriteCommand, kind: type[Task]) -> None:
    """Write the corpus that a command asks for, and say what was written."""
    line = f"python -m data {kind.name} {command.words()} --out DIR"
    dataset.check_new(command.out)
    vocab, examples, found = command.make()
    description = {"command": line, **command.drawn(), "distributions": command.settings(), **found}
    with contextlib.closing(examples):
        chosen = itertools.islice(examples, command.num_examples)
        shown = tqdm.tqdm(chosen, "examples", command.num_examples, unit="", disable=None)
        write = dataset.write if command.split else dataset.write_splits
        written = write(command.out, shown, command.make_task(kind, vocab), description)
    print(f"{command.out}: " + ", ".join(f"{count:,} {split}" for split, count in written.items()))
    if counts := found.get("articles"):
        print(f"articles: {card.listed(counts)}")


def main(argv: list[str] | None = None) -> None:
    commands = {name: task.WriteCommand for name, task in TASKS.items() if hasattr(task, "WriteCommand")}
    tasks = {command: TASKS[name] for name, command in commands.items()}
    options: dict[str, Any] = {"args": argv, "prog": "python -m data", "description": __doc__, "config": (tyro.conf.OmitArgPrefixes,)}
    with commandline.exit_on_user_error():
        command = commandline.parse(tyro.extras.subcommand_cli_from_dict, commands, **options)
        write(command, tasks[type(command)])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half written directory is removed
    main()
