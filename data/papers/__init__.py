"""Papers: the body of a clinical trial's report, and its abstract, each sentence of which names what it rests on."""

from data.papers.task import PaperTask

__all__ = ["PaperTask"]
