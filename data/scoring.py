"""Score texts against gold ones by ROUGE, and the numbers that they state and the sources that they name."""

import collections
import functools
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from data.alignment import plain_words

Counts = Mapping[str, tuple[float, float]]
"""Of one example, the sum and the weight that it adds to each score: a score is the ratio of the two over all examples."""

_NUMBER = re.compile(r"[0-9]+(?:[.,·][0-9]+)*")


def rouge(golds: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the mean F1 of ROUGE-1, -2 and -L (`rouge-score`, stemmed; L over whole summaries, sentence by sentence).

    Words are those of all scripts, where `rouge-score` by itself sees the letters a to z alone; English is scored as by itself.
    """
    scorer = _scorer("rouge1", "rouge2", "rougeLsum")
    scores = [scorer.score("\n".join(gold), "\n".join(own)) for gold, own in zip(golds, found, strict=True)]
    names = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rougeLsum"}
    return {name: sum(score[key].fmeasure for score in scores) / max(len(scores), 1) for name, key in names.items()}


def rouge_counts(gold: Sequence[str], found: Sequence[str]) -> Counts:
    """Return what one text adds to the means of `rouge`."""
    return {name: (score, 1) for name, score in rouge([gold], [found]).items()}


def rouge_l(golds: Sequence[Sequence[str]], found: Sequence[str]) -> list[float]:
    """Return the F1 of ROUGE-L of each text against the best of its gold ones, each as one sentence; words as for `rouge`."""
    scorer = _scorer("rougeL")
    return [max(scorer.score(gold, own)["rougeL"].fmeasure for gold in every) for every, own in zip(golds, found, strict=True)]


@functools.cache
def _scorer(*names: str) -> Any:
    from rouge_score import rouge_scorer, tokenizers  # imports nltk, which takes a second

    english = tokenizers.DefaultTokenizer(use_stemmer=True)

    class Words(tokenizers.Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return [stem for word in plain_words(text) for stem in (english.tokenize(word) if word.isascii() else [word])]

    return rouge_scorer.RougeScorer(list(names), tokenizer=Words())


def span_scores(golds: Sequence[Sequence[Collection[int]]], found: Sequence[Sequence[Collection[int]]]) -> dict[str, float]:
    """Return precision and recall of the sources named, the n-th sentence compared with the n-th gold one, over all sentences."""
    return ratios(span_counts(gold, own) for gold, own in zip(golds, found, strict=True))


def span_counts(gold: Sequence[Collection[int]], found: Sequence[Collection[int]]) -> Counts:
    """Return what one text adds to `span_scores`."""
    shares = Shares("span_precision", "span_recall")
    nothing: set[int] = set()
    for wanted, named in itertools.zip_longest(map(set, gold), map(set, found), fillvalue=nothing):
        shares.add("span_precision", named & wanted, named)
        shares.add("span_recall", named & wanted, wanted)
    return shares.counts()


def numbers(texts: Iterable[str]) -> set[str]:
    """Find the numbers of texts, written in one way: 1,200 as 1200, and 0·05, as some journals print it, as 0.05."""
    return {re.sub(r",(?=[0-9]{3}(?![0-9]))", "", n).replace("·", ".") for text in texts for n in _NUMBER.findall(text)}


def ratios(counts: Iterable[Counts]) -> dict[str, float]:
    """Compute each score over the examples that have it; of nothing it is 0."""
    sums: dict[str, tuple[float, float]] = {}
    for own in counts:
        for name, (total, weight) in own.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + total, before[1] + weight
    return {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}


class Shares:
    """Shares by name, each of all that was added under the name; those named at first are there without anything too."""

    def __init__(self, *names: str) -> None:
        self._hits: collections.Counter[str] = collections.Counter()
        self._of = collections.Counter(dict.fromkeys(names, 0))

    def add(self, name: str, hits: Collection[object], of: Collection[object]) -> None:
        """Count some of a collection as hits."""
        self._hits[name] += len(hits)
        self._of[name] += len(of)

    def counts(self) -> Counts:
        """Return the hits, and of how many."""
        return {name: (self._hits[name], count) for name, count in self._of.items()}

    def shares(self) -> dict[str, float]:
        """Return the shares; of nothing it is 0."""
        return ratios([self.counts()])
