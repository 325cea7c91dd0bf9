"""The registry of tasks: what `python -m data`, train.py, decode.py and `SpanLM.load` know by name."""

import warnings
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from data.arithmetic import ArithmeticTask
from data.documents import DocumentTask
from data.news import NewsTask
from data.papers import PaperTask
from data.stories import StoryTask
from data.task import Task
from data.tools import ToolTask
from data.verdicts import VerdictTask

_OWN: dict[str, type[Task]] = {
    task.name: task for task in (ArithmeticTask, NewsTask, DocumentTask, PaperTask, VerdictTask, StoryTask, ToolTask)
}


def with_installed(tasks: Mapping[str, type[Task]], entries: Iterable[metadata.EntryPoint]) -> dict[str, Any]:
    """Return tasks with those that other packages offer as entry points of the group `selfspan.tasks`.

    An entry point is the class of a task, under the task's name, or a mapping from names to classes. One that cannot be
    imported, or that takes a name that is taken, is left out with a warning.
    """
    found = dict(tasks)
    for entry in entries:
        if entry.module.partition(".")[0] == "data":  # our own, so that SpanLM.load finds them
            continue
        where = f"entry point {entry.name} = {entry.value} of selfspan.tasks"
        try:
            loaded = entry.load()
        except (ImportError, AttributeError) as error:
            warnings.warn(f"{where} cannot be loaded: {error}", stacklevel=2)
            continue
        for name, task in (loaded if isinstance(loaded, Mapping) else {entry.name: loaded}).items():
            if name in found:
                warnings.warn(f"{where}: there is a task {name!r} already, {found[name].__module__}.{found[name].__name__}", stacklevel=2)
            else:
                found[name] = task
    return found


TASKS: dict[str, type[Task]] = with_installed(_OWN, metadata.entry_points(group="selfspan.tasks"))
