"""Bring the settings of older runs up to date: the only place that knows how run.json files differed from today's.

Settings of training and model that a run does not name (`data_parts`), or that no longer exist, need nothing: they are in no command.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The values of settings that runs did not name yet.
_UNNAMED = {"label_jumps": 0, "jumps_at": "any"}


def migrate_corpus(corpus: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's corpus settings with those that it is too old to name; `known` has all settings of such a corpus."""
    settings = {**{key: value for key, value in _UNNAMED.items() if key in known}, **corpus}
    if not settings.get("label_jumps", True):
        del settings["jumps_at"]  # means nothing without jumps
    return settings
