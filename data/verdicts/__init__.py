"""Verdicts: a report, a doctor's question, and an answer that quotes its evidence and names the pieces that hold it."""

from data.verdicts.task import VerdictTask

__all__ = ["VerdictTask"]
