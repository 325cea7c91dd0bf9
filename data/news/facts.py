"""Score the facts that summaries state against the gold ones."""

import re
from collections.abc import Sequence

from data.alignment import WORD_LISTS
from data.news.synthetic import Fact

_NAMED = re.compile(r"[0-9]+(?:[.,][0-9]+)*|[A-Z][^\W\d_]+(?: [A-Z][^\W\d_]+)*")
_NO_NAMES = WORD_LISTS["no_names"]


def stated(sentence: str) -> set[str]:
    """Find the names, places and numbers that a sentence states: runs of capitalised words, and numbers."""
    found: set[str] = set()
    for run in _NAMED.findall(sentence):
        words = run.split()
        while words and words[0] in _NO_NAMES:
            del words[0]
        while words and words[-1] in _NO_NAMES:
            del words[-1]
        if words:
            found.add(" ".join(words))
    return found


def fact_scores(golds: Sequence[Sequence[Fact]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score the names, places and numbers that summaries state: the share that is right, and the share of the gold ones stated.

    Each sentence is judged by the one gold sentence that it has most in common with: a right number of the wrong event is wrong.
    Gold facts that look like none (see `stated`) do not occur in the synthetic corpus, and a test says so.
    """
    right = told = recalled = wanted = whole = 0
    for facts, sentences in zip(golds, found, strict=True):
        by_sentence = [{fact.text for fact in facts if fact.sentence == n} for n in sorted({fact.sentence for fact in facts})]
        claims = [stated(sentence) for sentence in sentences]
        correct = sum(max((len(claim & gold) for gold in by_sentence), default=0) for claim in claims)
        covered = sum(max((len(claim & gold) for claim in claims), default=0) for gold in by_sentence)
        num_told, num_wanted = sum(map(len, claims)), sum(map(len, by_sentence))
        right, told, recalled, wanted = right + correct, told + num_told, recalled + covered, wanted + num_wanted
        whole += correct == num_told and covered == num_wanted
    return {"fact_accuracy": right / max(told, 1), "fact_recall": recalled / max(wanted, 1), "all_facts_right": whole / max(len(golds), 1)}
