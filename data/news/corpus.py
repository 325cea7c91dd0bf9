"""Draw synthetic news, and say how news of any source is written."""

import dataclasses
import functools
import math
import random
from typing import ClassVar

from data.errors import UserError, check_range
from data.news import synthetic
from data.news.oracle import Example, encode
from data.streams import GeneratedCorpus, Split, split_of
from data.vocab import MIN_TOKENIZER_TOKENS, TokenizerVocab, Vocab, train_vocab

MIN_PROMPT_TOKENS = 16
_VOCAB_STORIES = 3000


@dataclasses.dataclass(frozen=True)
class Corpus(GeneratedCorpus[Example]):
    """Synthetic news, and how news of any source is written.

    Attributes:
      min_events: Synthetic: fewest events of an article.
      max_events: Synthetic: most events.
      max_distractors: Synthetic: most sentences that belong to no event.
      vocab_tokens: Entries of the byte-pair vocabulary, at most.
      num_labels: Labels of the vocabulary; sentences of an article and of its summary each take one.
      max_prompt_tokens: Longer articles are cut at the end of a sentence.
    """

    min_events: int = 2
    max_events: int = 4
    max_distractors: int = 8
    vocab_tokens: int = 4096
    num_labels: int = 128
    max_prompt_tokens: int = 896

    chunk_examples: ClassVar[int] = 64

    def __post_init__(self) -> None:
        Vocab(self.num_labels)
        if not 1 <= self.min_events <= self.max_events <= synthetic.MAX_EVENTS:
            raise UserError(
                f"min_events is {self.min_events} and max_events {self.max_events}: "
                f"expected 1 <= min_events <= max_events <= {synthetic.MAX_EVENTS}"
            )
        check_range(0, synthetic.MAX_DISTRACTORS, self, "max_distractors")
        check_range(MIN_TOKENIZER_TOKENS, math.inf, self, "vocab_tokens")
        check_range(MIN_PROMPT_TOKENS, math.inf, self, "max_prompt_tokens")

    @property
    def vocab(self) -> TokenizerVocab:
        """A vocabulary trained on stories that are in no split."""
        return _synthetic_vocab(self.vocab_tokens, self.num_labels)

    @property
    def description(self) -> str:
        return f"synthetic articles of {self.min_events} to {self.max_events} events"

    def largest(self) -> "Corpus":
        return dataclasses.replace(self, min_events=self.max_events)

    def chunk(self, vocab: TokenizerVocab, seed: int, split: Split, number: int) -> list[Example]:
        uniform = random.Random(f"news/{seed}/{split}/{number}").random
        sizes = {"min_events": self.min_events, "max_events": self.max_events, "max_distractors": self.max_distractors}
        examples: list[Example] = []
        while len(examples) < self.chunk_examples:
            story = synthetic.story(uniform, **sizes)
            if split_of("\n".join(story.article)) == split:
                example = encode(story, vocab, max_prompt_tokens=self.max_prompt_tokens, uniform=uniform())
                examples += [] if example is None else [example]
        return examples


@functools.lru_cache(maxsize=4)
def _synthetic_vocab(vocab_tokens: int, num_labels: int) -> TokenizerVocab:
    stories = (synthetic.draw(f"news/vocabulary/{i}") for i in range(_VOCAB_STORIES))
    texts = (" ".join(["", *story.article, *story.summary]) for story in stories)
    return train_vocab(texts, vocab_tokens=vocab_tokens, num_labels=num_labels)
