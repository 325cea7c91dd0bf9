"""Stories: their sections and people's questions, shuffled; each answer names its question and the sections that it is in."""

from data.stories.task import StoryTask

__all__ = ["StoryTask"]
