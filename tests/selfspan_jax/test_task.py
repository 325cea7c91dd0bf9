"""Tasks of installed packages, as the library finds them."""

from importlib import metadata

from data.tasks import TASKS
from selfspan_jax import task


def test_installed_tasks_are_those_of_the_registry(monkeypatch):
    """Which reads the entry points of other packages; without it there are none."""
    values = {"sums": "tests.sums:SumsTask", "builtin": "data.tasks:TASKS"}
    entries = metadata.EntryPoints(metadata.EntryPoint(name, value, "selfspan.tasks") for name, value in values.items())
    monkeypatch.setattr(metadata, "entry_points", entries.select)
    assert task.installed_tasks() == TASKS and {"arithmetic", "news"} <= TASKS.keys()
    monkeypatch.setattr(metadata, "entry_points", metadata.EntryPoints(entries.select(name="sums")).select)
    assert task.installed_tasks() == {}
