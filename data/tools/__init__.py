"""Tools: a catalogue of services and a dialogue; each call that the dialogue needs names its service and the turns its values come from."""

from data.tools.task import ToolTask

__all__ = ["ToolTask"]
