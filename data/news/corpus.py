"""Write articles and their summaries as examples, and draw synthetic ones."""

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from data import spans, streams
from data.errors import UserError, check_range
from data.news import synthetic
from data.news.synthetic import Story
from data.streams import GeneratedCorpus, Split, split_of
from data.vocab import MAX_TOKENIZER_TOKENS, MIN_TOKENIZER_TOKENS, TokenizerVocab, Vocab, train_vocab

INSTRUCTION = " Summarize:"
MIN_PROMPT_TOKENS = 16
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


class UnusableArticle(UserError):
    """An article that cannot be written as a prompt; `kind` says why, as cards count it."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


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

    def chunk(self, vocab: TokenizerVocab, seed: int, split: Split, number: int) -> list[Example]:
        uniform = random.Random(f"news/{seed}/{split}/{number}").random
        sizes = {"min_events": self.min_events, "max_events": self.max_events, "max_distractors": self.max_distractors}
        examples: list[Example] = []
        while len(examples) < self.chunk_examples:
            story = synthetic.story(uniform, **sizes)
            if split_of("\n".join(story.article)) == split:
                example = encode(story, vocab, uniform=uniform(), **style(self))
                examples += [] if example is None else [example]
        return examples


@functools.lru_cache(maxsize=4)
def _synthetic_vocab(vocab_tokens: int, num_labels: int) -> TokenizerVocab:
    stories = (synthetic.draw(f"news/vocabulary/{i}") for i in range(_VOCAB_STORIES))
    texts = (" ".join(["", *story.article, *story.summary]) for story in stories)
    return train_vocab(texts, vocab_tokens=vocab_tokens, num_labels=num_labels)


def style(settings: Any) -> dict[str, Any]:
    """Return how a corpus or a task writes articles, as arguments of `encode` and `encode_prompt`."""
    return {name: getattr(settings, name) for name in ("max_prompt_tokens", "closed_pieces")}


def encode_prompt(
    sentences: Sequence[str], vocab: TokenizerVocab, *, max_prompt_tokens: int, closed_pieces: bool, summary_sentences: int = 1
) -> tuple[list[int], int]:
    """Write an article's prompt, labels from 1 on, cut at the end of a sentence: (ids, sentences that were kept).

    Raises:
      UnusableArticle: a first sentence that does not fit, or more sentences than labels.
    """
    token_ids = [vocab.bos_id, *vocab.plain_text_ids(INSTRUCTION)]
    kept = 0
    for number, sentence in enumerate(sentences):
        label = min(1 + number, vocab.num_labels - 1)
        ids = spans.piece(label, vocab.plain_text_ids(" " + sentence), vocab, closed=closed_pieces)
        if len(token_ids) + len(ids) + 1 > max_prompt_tokens:  # `<solve>` follows
            break
        token_ids += ids
        kept += 1
    if not kept:
        message = f"the article's first sentence does not fit into {max_prompt_tokens} tokens of prompt"
        raise UnusableArticle(message, "with a first sentence longer than max_prompt_tokens")
    if kept + summary_sentences >= vocab.num_labels:
        raise UnusableArticle(
            f"{kept} article sentences and {summary_sentences} of summary need labels up to {kept + summary_sentences}, "
            f"but the last one is {vocab.num_labels - 1}: more num_labels, or fewer max_prompt_tokens",
            "with more sentences than num_labels",
        )
    return [*token_ids, vocab.solve_id], kept


def encode(story: Story, vocab: TokenizerVocab, *, uniform: float | None = None, **style: Any) -> Example | None:
    """Write the prompt and the gold response of a story; None where the cut left no summary sentence a source.

    Args:
      uniform: in [0, 1), where the labels begin among the places that there are; None for label 1.
      style: `max_prompt_tokens` and `closed_pieces`.

    Raises:
      UnusableArticle: a first sentence that does not fit, or more sentences than labels.
    """
    prompt, kept = encode_prompt(story.article, vocab, summary_sentences=len(story.summary), **style)
    steps = [(text, [i for i in sources if i < kept]) for text, sources in zip(story.summary, story.sources, strict=True)]
    numbers = [number for number, (_, sources) in enumerate(steps) if sources]
    cut_sentences = len(story.article) - kept
    if not numbers:
        return None
    if len(numbers) < len(steps) or cut_sentences:
        facts = tuple(fact._replace(sentence=numbers.index(fact.sentence)) for fact in story.facts if fact.sentence in numbers)
        kept_sources = tuple(tuple(steps[n][1]) for n in numbers)
        story = Story(story.article[:kept], tuple(steps[n][0] for n in numbers), kept_sources, facts)
    first_label = 1
    if uniform is not None:
        first_label = vocab.first_label(kept + len(numbers), uniform)
        tags = range(vocab.seg_base, vocab.seg_base + vocab.num_labels)
        prompt = [i + first_label - 1 if i in tags else i for i in prompt]
    token_ids = list(prompt)
    for number, (text, sources) in enumerate(zip(story.summary, story.sources)):
        token_ids.append(vocab.seg_base + first_label + kept + number)
        token_ids += [vocab.ref_base + first_label + i for i in sources]
        token_ids += vocab.plain_text_ids(" " + text)
    token_ids.append(vocab.eos_id)
    return Example(np.array(token_ids, np.int32), len(prompt), story, first_label, cut_sentences)
