"""Write a corpus to a directory, with a card of its statistics."""

if __name__ == "__main__":
    import data.interrupts  # noqa: F401  # before what takes seconds

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import tqdm

from data import card, commandline, writing
from data.sources import PLACES, REPEATED, TWICE, num_written, places_listed
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
    for what, own in found.items():
        if what == PLACES:
            print("".join(f"{line}\n" for line in places_listed(own)), end="")
        elif what != "absent_splits":
            print(f"{what}: {own if isinstance(own, str) else card.listed(own)}")
    for what, why in ((REPEATED, "scores on them say little"), (TWICE, "each counts as an example of its own")):
        if number := num_written(found, what):
            print(f"warning: examples {what}: {number:,}; {why}", file=sys.stderr)
    if command.split is None:
        for line in _missing(description, written):
            print(line)


def _missing(description: Mapping[str, Any], written: Mapping[str, int]) -> Iterator[str]:
    """Say which of the parts that are written beside each other are missing, and why."""
    source, count, absent = description["source"], sum(written.values()), description.get("absent_splits", ())
    if count == description["num_examples"]:
        why = f": the first {count:,} examples are of {' and '.join(written)}"
    elif "splits" in description:
        why = f": none of the {count:,} examples fell into it"
    else:
        why = f": {source} has nothing for it that can be used"
    for reason, missing in ((f" in {source}", absent), (why, [split for split in SPLITS if split not in (*written, *absent)])):
        if missing:
            hint = "; train.py takes --eval-examples 0 then" if "validation" in missing else ""
            yield f"no {' and no '.join(missing)} part{reason}{hint}"


def main(argv: list[str] | None = None) -> None:
    commands = {name: task.WriteCommand for name, task in TASKS.items() if hasattr(task, "WriteCommand")}
    with commandline.exit_on_user_error(), commandline.exit_on_termination():
        name, command = commandline.parse_one_of(commands, __doc__, argv)
        write(command, TASKS[name])


if __name__ == "__main__":
    main()
