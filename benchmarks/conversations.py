"""Decode conversations over one catalogue of tools: time to the first token, tokens a second, rows of the cache kept and read.

    python -m benchmarks.conversations runs/tools_labels-0/model --data corpora/tools --json FILE

A model of tools answers `--conversations` at once, on a scheduler with as many places, in three systems:

- apart: each conversation has the catalogue that the corpus gives it, and all of it is read.
- shared: all have the same catalogue, which is read with the first of them.
- kept: the same, but other conversations over this catalogue have been there before.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from benchmarks.arrivals import table
from benchmarks.systems import AtOnce, Work, run_at_once
from benchmarks.timing import header_line, run_command
from data import examples
from data.documents import Document
from data.errors import check_range
from data.tasks import TASKS
from data.tools import ToolTask
from data.tools.task import services_of
from selfspan_jax import files
from selfspan_jax.errors import UserError
from selfspan_jax.evaluation import MARGIN_TOKENS
from selfspan_jax.serving.pages import Pages

_CANDIDATES = 8  # examples that are looked at for each conversation over one catalogue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversations(AtOnce):
    """Answer many conversations at once, with a catalogue of tools each and with one for all, and print what that takes."""

    data: Path
    """A corpus directory that `python -m data tools` wrote."""
    split: Literal["train", "validation", "test"] = "validation"
    """Its part."""
    conversations: int = 64
    """That are there at once."""
    services: int = 26
    """In the catalogue that they share."""
    passes: int = 3
    """Times that each is measured; the one whose time is the median counts."""
    json: Path | None = None
    """Write the figures into this file; - is standard output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "conversations", "services", "passes", low=1)

    def run(self) -> None:
        report = measure(self)
        print(header_line(report), table(report["rows"]), sep="\n", flush=True)
        for row in report["rows"]:
            print(f"{row['system']}: {row['prompt_tokens']:,} tokens of prompts read, {row['rows_kept']:,} rows kept,", end=" ")
            print(f"{row['attended_fraction']:.1%} of the context read by {row['generated_tokens']:,} tokens")
        if self.json:
            files.write_json(self.json, report)


def over_one_catalogue(documents: Iterable[Document], size: int, number: int) -> list[Document]:
    """Choose conversations whose services fit into one catalogue of so many together, and give it to each in place of its own.

    Where they use fewer services, others of their catalogues follow. UserError: there are fewer such conversations.
    """
    catalogue, others, chosen = dict[str, None](), dict[str, None](), list[Document]()
    for document in documents:
        services = services_of(document.pieces)
        used = dict.fromkeys(document.pieces[i] for step in document.steps for i in step.sources if i in services)
        if len(catalogue | used) <= size and len(chosen) < number:
            catalogue |= used
            others |= dict.fromkeys(document.pieces[i] for i in services)
            chosen.append(document)
    if len(chosen) < number:
        raise UserError(f"{len(chosen)} conversations fit into one catalogue of {size} services, but {number} are wanted")
    whole = [*catalogue, *(piece for piece in others if piece not in catalogue)][:size]
    return [Document(own.about, (*whole, *own.pieces[len(services_of(own.pieces)) :]), ()) for own in chosen]


def measure(settings: Conversations) -> dict[str, Any]:
    """Measure all systems; return the report."""
    lm = settings.load()
    if not isinstance(lm.task, ToolTask):
        raise UserError(f"{settings.checkpoint} is no model of tools")
    count = settings.conversations
    task, sets, drawn = examples.stored(settings.data, lm.task, TASKS, 2 * count * _CANDIDATES, settings.split)
    (found,) = sets.values()
    own = [example.document for example in found[:count]]
    shared = over_one_catalogue((example.document for example in found), settings.services, 2 * count)
    room = MARGIN_TOKENS + max(len(example.response_ids) for example in found)
    apart, *both = (
        [Work(task.encode_prompt(document.prompt), room) for document in part] for part in (own, shared[:count], shared[count:])
    )
    scheduler = settings.scheduler(lm, [*apart, *both[0], *both[1]], count)
    rows = collections.defaultdict[str, list[dict[str, Any]]](list)
    for _ in range(settings.passes):
        for system, work in zip(("apart", "shared", "kept"), (apart, *both), strict=True):
            if system != "kept":
                scheduler.pages = Pages(scheduler.num_pages)  # forgets what it has read
            rows[system].append({"system": system, **run_at_once(scheduler, work)})
    return {
        **settings.described(lm),
        **drawn,
        "rows": [sorted(own, key=lambda row: row["seconds"])[len(own) // 2] for own in rows.values()],
    }


def main() -> None:
    run_command(Conversations, description=__doc__)


if __name__ == "__main__":
    main()
