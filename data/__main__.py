"""Write a corpus to a directory, with a card of its statistics."""

import contextlib
import itertools
import sys
from collections.abc import Mapping

import tqdm

from data import card, commandline, writing
from data.sources import REPEATED
from data.streams import SPLITS
from data.task import Task, WriteCommand
from data.tasks import TASKS


def write(command: WriteCommand, kind: type[Task]) -> None:
    """Write the corpus that a command asks for, and say what was written."""
    line = f"python -m data {kind.name} {command.words()} --out DIR"
    writing.check_new(command.out)
    vocab, examples, found = command.make()
    description = {"command": line, **command.drawn(), "distributions": command.settings(), **found}
    with contextlib.closing(examples):
        chosen = itertools.islice(examples, command.num_examples)
        shown = tqdm.tqdm(chosen, "examples", command.num_examples, unit="", disable=None)
        written = writing.write(command.out, shown, command.make_task(kind, vocab), description)
    print(f"{command.out}: " + ", ".join(f"{count:,} {split}" for split, count in written.items()))
    for what, counts in found.items():
        if what != "absent_splits":
            print(f"{what}: {counts if isinstance(counts, str) else card.listed(counts)}")
        elif counts:
            print(f"no {' and no '.join(counts)} part in {description['source']}")
        if repeated := isinstance(counts, Mapping) and counts.get(REPEATED):
            told = f"examples {REPEATED.removeprefix('written, ')}: {repeated:,}"
            print(f"warning: {told}; scores on them say little", file=sys.stderr)
    there = {*written, *found.get("absent_splits", ())}
    if empty := [split for split in SPLITS if command.split is None and split not in there]:
        what = "; train.py takes --eval-examples 0 then" if "validation" in empty else ""
        print(f"no {' and no '.join(empty)} part: none of the {sum(written.values()):,} examples fell into it{what}")


def main(argv: list[str] | None = None) -> None:
    commands = {name: task.WriteCommand for name, task in TASKS.items() if hasattr(task, "WriteCommand")}
    with commandline.exit_on_user_error(), commandline.exit_on_termination():
        name, command = commandline.parse_one_of(commands, __doc__, argv)
        write(command, TASKS[name])


if __name__ == "__main__":
    main()
