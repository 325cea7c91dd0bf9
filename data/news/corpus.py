"""Write articles and their summaries as examples, and draw synthetic ones."""

import dataclasses
import functools
import random
from collections.abc import Iterator
from typing import Any, ClassVar

from data import streams
from data.errors import UserError, check_range
from data.news import synthetic
from data.news.synthetic import Story
from data.pieces import MIN_PROMPT_TOKENS, encode_prompt, encode_steps, style
from data.streams import GeneratedCorpus, Split, split_of
from data.vocab import MAX_TOKENIZER_TOKENS, MIN_TOKENIZER_TOKENS, TokenizerVocab, Vocab, train_vocab

INSTRUCTION = "Summarize:"
SYNTHETIC_SETTINGS = ("min_events", "max_events", "max_distractors")
_VOCAB_STORIES = 3000


@dataclasses.dataclass(frozen=True, eq=False)
class Example(streams.Example):
    """An article and its gold summary, and the story that they tell, without what was cut off."""

    story: Story
    first_label: int
    cut_sentences: int = 0

    @property
    def prompt(self) -> str:
        """The text that `NewsTask.encode_prompt` takes."""
        return "\n\n".join(self.story.article)

    text = prompt  # what it is known by in another split


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
      closed_pieces: End each sentence of an article with its `<seg:k>` once more: for header_view="labels".
    """

    min_events: int = 2
    max_events: int = 4
    max_distractors: int = 8
    vocab_tokens: int = 4096
    num_labels: int = 128
    max_prompt_tokens: int = 896
    closed_pieces: bool = False

    chunk_examples: ClassVar[int] = 64

    def __post_init__(self) -> None:
        Vocab(self.num_labels)
        if not 1 <= self.min_events <= self.max_events <= synthetic.MAX_EVENTS:
            raise UserError(
                f"min_events is {self.min_events} and max_events {self.max_events}: "
                f"expected 1 <= min_events <= max_events <= {synthetic.MAX_EVENTS}"
            )
        check_range(self, "max_distractors", low=0, high=synthetic.MAX_DISTRACTORS)
        check_range(self, "vocab_tokens", low=MIN_TOKENIZER_TOKENS, high=MAX_TOKENIZER_TOKENS)
        check_range(self, "max_prompt_tokens", low=MIN_PROMPT_TOKENS)

    @property
    def vocab(self) -> TokenizerVocab:
        """A vocabulary trained on stories that are in no split."""
        return _synthetic_vocab(self.vocab_tokens, self.num_labels)

    @property
    def description(self) -> str:
        return f"synthetic articles of {self.min_events} to {self.max_events} events"

    @property
    def limits(self) -> str:
        kinds = ", ".join(synthetic.KINDS)
        return f"These are news from templates, of {len(synthetic.KINDS)} kinds ({kinds}): of other news it makes up what it says."

    def largest(self) -> "Corpus":
        return dataclasses.replace(self, min_events=self.max_events)

    def chunk(self, vocab: TokenizerVocab, seed: int, split: Split, number: int) -> Iterator[Example]:
        uniform = random.Random(f"news/{seed}/{split}/{number}").random
        sizes = {"min_events": self.min_events, "max_events": self.max_events, "max_distractors": self.max_distractors}
        written = 0
        while written < self.chunk_examples:
            story = synthetic.story(uniform, **sizes)
            if split_of("\n".join(story.article)) == split and (example := encode(story, vocab, uniform=uniform(), **style(self))):
                written += 1
                yield example


@functools.lru_cache(maxsize=4)
def _synthetic_vocab(vocab_tokens: int, num_labels: int) -> TokenizerVocab:
    stories = (synthetic.draw(f"news/vocabulary/{i}") for i in range(_VOCAB_STORIES))
    texts = (" ".join(["", *story.article, *story.summary]) for story in stories)
    return train_vocab(texts, vocab_tokens=vocab_tokens, num_labels=num_labels)


def encode(story: Story, vocab: TokenizerVocab, *, uniform: float | None = None, **style: Any) -> Example | None:
    """Write the prompt and the gold response of a story; None where the cut left no summary sentence a source.

    Args:
      uniform: in [0, 1), where the labels begin among the places that there are; None for label 1.
      style: `max_prompt_tokens` and `closed_pieces`.

    Raises:
      Unusable: a first sentence that does not fit, or more sentences, the summary's among them, than labels.
    """
    prompt, kept = encode_prompt(INSTRUCTION, story.article, vocab, num_steps=len(story.summary), **style)
    steps = [(text, [i for i in sources if i < kept]) for text, sources in zip(story.summary, story.sources, strict=True)]
    numbers = [number for number, (_, sources) in enumerate(steps) if sources]
    cut_sentences = len(story.article) - kept
    if not numbers:
        return None
    if len(numbers) < len(steps) or cut_sentences:
        facts = tuple(fact._replace(sentence=numbers.index(fact.sentence)) for fact in story.facts if fact.sentence in numbers)
        kept_sources = tuple(tuple(steps[n][1]) for n in numbers)
        story = Story(story.article[:kept], tuple(steps[n][0] for n in numbers), kept_sources, facts)
    token_ids, first_label = encode_steps(prompt, kept, [[part] for part in zip(story.sources, story.summary, strict=True)], vocab, uniform)
    return Example(token_ids, len(prompt), story, first_label, cut_sentences)
