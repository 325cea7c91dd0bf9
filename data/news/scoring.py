"""Score summaries: ROUGE against the gold ones, the facts that they state, the sources that they name.

All take lists over examples, of lists over sentences.
"""

import re
from collections.abc import Collection, Sequence

from data.news.alignment import WORD_LISTS, plain_words
from data.news.synthetic import Fact

_NAMED = re.compile(r"[0-9]+(?:[.,][0-9]+)*|[A-Z][^\W\d_]+(?: [A-Z][^\W\d_]+)*")
_NO_NAMES = WORD_LISTS["no_names"]


def rouge(golds: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the mean F1 of ROUGE-1, -2 and -L (`rouge-score`, stemmed; L over whole summaries, sentence by sentence).

    Words are those of all scripts, where `rouge-score` by itself sees the letters a to z alone; English is scored as by itself.
    """
    from rouge_score import rouge_scorer, tokenizers  # imports nltk, which takes a second

    english = tokenizers.DefaultTokenizer(use_stemmer=True)

    class Words(tokenizers.Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return [stem for word in plain_words(text) for stem in (english.tokenize(word) if word.isascii() else [word])]

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"], tokenizer=Words())
    scores = [scorer.score("\n".join(gold), "\n".join(own)) for gold, own in zip(golds, found, strict=True)]
    names = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rougeLsum"}
    return {name: sum(score[key].fmeasure for score in scores) / max(len(scores), 1) for name, key in names.items()}


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
    return {
        "fact_accuracy": right / max(told, 1),
        "fact_recall": recalled / max(wanted, 1),
        "all_facts_right": whole / max(len(golds), 1),
    }


def span_scores(golds: Sequence[Sequence[Collection[int]]], found: Sequence[Sequence[Collection[int]]]) -> dict[str, float]:
    """Return precision and recall of the sources named, the n-th sentence compared with the n-th gold one, over all sentences."""
    hits = named = wanted = 0
    for gold, own in zip(golds, found, strict=True):
        hits += sum(len(set(a) & set(b)) for a, b in zip(gold, own))
        named += sum(len(set(b)) for b in own)
        wanted += sum(len(set(a)) for a in gold)
    return {"span_precision": hits / max(named, 1), "span_recall": hits / max(wanted, 1)}
