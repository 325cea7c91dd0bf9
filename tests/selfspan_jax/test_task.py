"""Tasks of installed packages, as the library finds them."""

from importlib import metadata

import pytest

from selfspan_jax import task


def test_an_entry_point_that_cannot_be_imported_is_said_and_the_rest_goes_on(monkeypatch):
    values = {"sums": "tests.sums:SumsTask", "gone": "no_such_package:Task", "lost": "tests.sums:Other", "builtin": "data.tasks:TASKS"}
    entries = [metadata.EntryPoint(name, value, "selfspan.tasks") for name, value in values.items()]
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: entries if group == "selfspan.tasks" else [])
    with pytest.warns(UserWarning, match="of selfspan.tasks cannot be loaded: ") as said:
        found = task.installed_tasks()
    assert [name for name in values if any(f"entry point {name} = {values[name]} " in str(w.message) for w in said)] == ["gone", "lost"]
    assert found.keys() >= {"sums", "arithmetic", "news"} and found["sums"].__name__ == "SumsTask"
