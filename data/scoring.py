"""Score texts against gold ones by ROUGE, and the sources that they name.

All take lists over examples, of lists over sentences.
"""

from collections.abc import Collection, Sequence

from data.alignment import plain_words


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


def span_scores(golds: Sequence[Sequence[Collection[int]]], found: Sequence[Sequence[Collection[int]]]) -> dict[str, float]:
    """Return precision and recall of the sources named, the n-th sentence compared with the n-th gold one, over all sentences."""
    hits = named = wanted = 0
    for gold, own in zip(golds, found, strict=True):
        hits += sum(len(set(a) & set(b)) for a, b in zip(gold, own))
        named += sum(len(set(b)) for b in own)
        wanted += sum(len(set(a)) for a in gold)
    return {"span_precision": hits / max(named, 1), "span_recall": hits / max(wanted, 1)}
