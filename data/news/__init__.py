"""News: articles and their summaries as labelled examples, in the span protocol's section 6.

    <bos> Summarize:<seg:1> sentence 1<seg:2> sentence 2 ...<solve><seg:m+1><ref:a><ref:b> summary sentence ...<eos>

Labels of one example are consecutive, in training from a random offset. Articles too long for `max_prompt_tokens` are cut at
the end of a sentence; a summary sentence whose sources are all cut off is left out.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from data import streams
from data.news import scoring, synthetic
from data.news.alignment import Alignment, split_sentences
from data.news.synthetic import Fact, Story
from data.streams import Split
from data.vocab import TokenizerVocab, Vocab, check_json

__all__ = ["Alignment", "Corpus", "Example", "Fact", "NewsTask", "Story", "split_sentences", "train_vocab"]

INSTRUCTION = " Summarize:"
CHUNK_EXAMPLES = 64
_VOCAB_STORIES = 3000
_TASK_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """An article and its gold summary: int32 [n] ids, the first `prompt_tokens` of them the prompt, and what they say."""

    story: Story
    token_ids: npt.NDArray[np.int32]
    prompt_tokens: int
    first_label: int

    @property
    def prompt(self) -> str:
        """The article as `NewsTask.encode_prompt` takes it."""
        return "\n\n".join(self.story.article)

    @property
    def response_ids(self) -> npt.NDArray[np.int32]:
        return self.token_ids[self.prompt_tokens :]


def train_vocab(texts: Iterable[str], *, vocab_tokens: int, num_labels: int) -> TokenizerVocab:
    """A byte-pair vocabulary of at most `vocab_tokens` tokens, digits apart, and the structural tokens after them.

    The tokenizer knows nothing of the structural tokens, so no text can contain one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_tokens < 300:
        raise ValueError(f"vocab_tokens is {vocab_tokens}: expected at least 300 (the 256 bytes are among them)")
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_tokens, initial_alphabet=alphabet, show_progress=False))
    first = tokenizer.get_vocab_size()
    single = {"pad_id": first, "bos_id": first + 1, "eos_id": first + 2, "solve_id": first + 3}
    families = {"seg_base": first + 4, "ref_base": first + 4 + num_labels, "num_labels": num_labels}
    return TokenizerVocab.of(tokenizer.to_str(), single | families, first + 4 + 2 * num_labels)


@functools.lru_cache(maxsize=4)
def _synthetic_vocab(vocab_tokens: int, num_labels: int) -> TokenizerVocab:
    stories = (synthetic.draw(f"news/vocabulary/{i}") for i in range(_VOCAB_STORIES))
    texts = (" ".join(["", *story.article, *story.summary]) for story in stories)
    return train_vocab(texts, vocab_tokens=vocab_tokens, num_labels=num_labels)


@dataclasses.dataclass(frozen=True)
class NewsTask:
    """What a model directory needs to know of this corpus to turn an article into ids and a response into a summary.

    Attributes:
      vocab: trained by `train_vocab`, or a language model's own with structural tokens added.
      max_prompt_tokens: Longer articles are cut at the end of a sentence.
    """

    vocab: TokenizerVocab
    max_prompt_tokens: int = 896

    name: ClassVar[str] = "news"

    def __post_init__(self) -> None:
        if type(self.max_prompt_tokens) is not int or self.max_prompt_tokens < 16:
            raise ValueError(f"max_prompt_tokens is {self.max_prompt_tokens!r}: expected an integer of at least 16")

    @property
    def step_ids(self) -> frozenset[int]:
        """The tokens at which a piece of the text begins."""
        return frozenset(range(self.vocab.seg_base, self.vocab.seg_base + self.vocab.num_labels))

    def text_ids(self, text: str) -> list[int]:
        """Ids of text; whatever a tokenizer reads as structure is left out, so that no text can open or name anything."""
        return [i for i in self.vocab.text_ids(text).tolist() if i not in self.vocab.structural]

    def encode_prompt(self, text: str) -> npt.NDArray[np.int32]:
        """Article -> prompt, int32 [n], labels from 1 on. ValueError: no sentence, or more sentences than labels."""
        sentences = split_sentences(text)
        if not sentences:
            raise ValueError("the article has no sentence")
        return np.array(self._prompt(sentences)[0], np.int32)

    def _prompt(self, sentences: Sequence[str], num_steps: int = 1) -> tuple[list[int], int]:
        """(ids with labels from 1 on, sentences that were kept)."""
        token_ids = [self.vocab.bos_id, *self.text_ids(INSTRUCTION)]
        kept = 0
        for number, sentence in enumerate(sentences):
            ids = self.text_ids(" " + sentence)
            if len(token_ids) + len(ids) + 2 > self.max_prompt_tokens:
                break
            token_ids += [self.vocab.seg_base + min(1 + number, self.vocab.num_labels - 1), *ids]
            kept += 1
        if not kept:
            raise ValueError(f"the article's first sentence does not fit into {self.max_prompt_tokens} tokens of prompt")
        if kept + num_steps >= self.vocab.num_labels:
            raise ValueError(
                f"{kept} article sentences and {num_steps} of summary need labels up to {kept + num_steps}, "
                f"but the last one is {self.vocab.num_labels - 1}: more num_labels, or fewer max_prompt_tokens"
            )
        return [*token_ids, self.vocab.solve_id], kept

    def encode(self, story: Story, uniform: float | None = None) -> Example | None:
        """Prompt and gold response; None where the cut left no summary sentence a source.

        Args:
          uniform: in [0, 1), where the labels begin among the places that there are; None for label 1.

        Raises:
          ValueError: more sentences than labels, or a first sentence that does not fit.
        """
        prompt, kept = self._prompt(story.article, len(story.summary))
        steps = [(text, [i for i in sources if i < kept]) for text, sources in zip(story.summary, story.sources, strict=True)]
        numbers = [number for number, (_, sources) in enumerate(steps) if sources]
        if not numbers:
            return None
        if len(numbers) < len(steps) or kept < len(story.article):
            facts = tuple(fact._replace(sentence=numbers.index(fact.sentence)) for fact in story.facts if fact.sentence in numbers)
            kept_sources = tuple(tuple(steps[n][1]) for n in numbers)
            story = Story(story.article[:kept], tuple(steps[n][0] for n in numbers), kept_sources, facts)
        used = kept + len(numbers)
        first_label = 1
        if uniform is not None:
            first_label = self.vocab.first_label(used, uniform)
            tags = range(self.vocab.seg_base, self.vocab.seg_base + self.vocab.num_labels)
            prompt = [i + first_label - 1 if i in tags else i for i in prompt]
        token_ids = list(prompt)
        for number, (text, sources) in enumerate(zip(story.summary, story.sources)):
            token_ids.append(self.vocab.seg_base + first_label + kept + number)
            token_ids += [self.vocab.ref_base + first_label + i for i in sources]
            token_ids += self.text_ids(" " + text)
        token_ids.append(self.vocab.eos_id)
        return Example(story, np.array(token_ids, np.int32), len(prompt), first_label)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Ids [n] -> text with span tokens as they are written."""
        return self.vocab.decode(token_ids)

    def steps(self, response_ids: Iterable[int]) -> list[tuple[int, frozenset[int], str]]:
        """(label, labels named, sentence) of each step of a response; what stands before the first step is left out."""
        vocab, found = self.vocab, list[tuple[int, set[int], list[int]]]()
        for i in map(int, response_ids):
            if i == vocab.eos_id:
                break
            if vocab.seg_base <= i < vocab.seg_base + vocab.num_labels:
                found.append((i - vocab.seg_base, set(), []))
            elif found and vocab.ref_base <= i < vocab.ref_base + vocab.num_labels:
                found[-1][1].add(i - vocab.ref_base)
            elif found and i not in self.vocab.structural:
                found[-1][2].append(i)
        return [(label, frozenset(named), self.vocab.decode(body).strip()) for label, named, body in found]

    def answer(self, response_ids: Iterable[int]) -> str | None:
        """The summary without span tokens, or None where no step was opened."""
        return " ".join(text for *_, text in self.steps(response_ids)) or None

    def scores(self, examples: Sequence[Example], responses: Sequence[Iterable[int]]) -> dict[str, float]:
        """ROUGE, right facts and right spans of responses to the examples' prompts, labels from 1 on; see `scoring`."""
        found = [self.steps(response) for response in responses]
        golds = [example.story for example in examples]
        scores = scoring.rouge([gold.summary for gold in golds], [[text for *_, text in steps] for steps in found])
        # Labels count from 1 on: a source's label is its index and one.
        named = [[{label - 1 for label in refs} for _, refs, _ in steps] for steps in found]
        scores |= scoring.span_scores([[set(own) for own in gold.sources] for gold in golds], named)
        if any(gold.facts for gold in golds):
            scores |= scoring.fact_scores([gold.facts for gold in golds], [[text for *_, text in steps] for steps in found])
        return scores

    def to_json(self) -> dict[str, Any]:
        """A plain dict for `from_json`."""
        return {"task": self.name, "version": _TASK_VERSION, "max_prompt_tokens": self.max_prompt_tokens, "vocab": self.vocab.to_json()}

    @classmethod
    def from_json(cls, fields: object) -> "NewsTask":
        """The inverse of `to_json`. ValueError: unknown or missing keys, another task or version."""
        checked = check_json(fields, "task", {"task": cls.name, "version": _TASK_VERSION}, ("max_prompt_tokens", "vocab"))
        return cls(TokenizerVocab.from_json(checked["vocab"]), checked["max_prompt_tokens"])


@dataclasses.dataclass(frozen=True)
class Corpus:
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

    name: ClassVar[str] = "news"

    def __post_init__(self) -> None:
        Vocab(self.num_labels)
        if not 1 <= self.min_events <= self.max_events <= synthetic.MAX_EVENTS:
            raise ValueError(
                f"min_events is {self.min_events} and max_events {self.max_events}: "
                f"expected 1 <= min_events <= max_events <= {synthetic.MAX_EVENTS}"
            )
        if not 0 <= self.max_distractors <= synthetic.MAX_DISTRACTORS:
            raise ValueError(f"max_distractors is {self.max_distractors}: expected 0 to {synthetic.MAX_DISTRACTORS}")
        if self.vocab_tokens < 300:
            raise ValueError(f"vocab_tokens is {self.vocab_tokens}: expected at least 300")
        if self.max_prompt_tokens < 16:
            raise ValueError(f"max_prompt_tokens is {self.max_prompt_tokens}: expected at least 16")

    @property
    def task(self) -> NewsTask:
        """What a model needs to know of it; its vocabulary is trained on stories that are in no split."""
        return self.task_in(_synthetic_vocab(self.vocab_tokens, self.num_labels))

    @property
    def description(self) -> str:
        """For people: what a prompt is."""
        return f"synthetic articles of {self.min_events} to {self.max_events} events"

    def task_in(self, vocab: TokenizerVocab) -> NewsTask:
        """`task`, written in another vocabulary."""
        return NewsTask(vocab, self.max_prompt_tokens)

    def stream(
        self,
        task: NewsTask,
        *,
        seed: int,
        split: Split = "train",
        start: int = 0,
        num_workers: int = 0,
        part: streams.Part = streams.ALL,
    ) -> Generator[Example, None, None]:
        """Endless synthetic examples from number `start` on; the i-th depends on (self, seed, split, part, i) alone, as in arithmetic.

        Raises:
          ValueError: a split, start or number of workers that there is not.
        """
        chunk = functools.partial(_chunk, self, task, seed, split)
        return streams.stream(chunk, CHUNK_EXAMPLES, split=split, start=start, num_workers=num_workers, part=part)

    def check_rows(self, task: NewsTask, sequence_tokens: int) -> None:
        """Raises ValueError where the longest examples would hardly fit into rows of so many tokens."""
        largest = dataclasses.replace(self, min_events=self.max_events)
        lengths = [len(example.token_ids) for example in _chunk(largest, task, 0, "train", 0)]
        if (longest := streams.likely_longest(lengths)) > sequence_tokens:
            raise ValueError(f"articles of {self.max_events} events take up to {longest} tokens, a row only {sequence_tokens}")


def split_of(story: Story) -> Split:
    """The split that a story belongs to, by a hash of its article: an eighth of all stories is "test"."""
    return streams.split_of("\n".join(story.article))


def _chunk(corpus: Corpus, task: NewsTask, seed: int, split: Split, number: int) -> list[Example]:
    uniform = random.Random(f"news/{seed}/{split}/{number}").random
    sizes = {"min_events": corpus.min_events, "max_events": corpus.max_events, "max_distractors": corpus.max_distractors}
    examples: list[Example] = []
    while len(examples) < CHUNK_EXAMPLES:
        story = synthetic.story(uniform, **sizes)
        if split_of(story) == split and (example := task.encode(story, uniform())) is not None:
            examples.append(example)
    return examples


def held_out(task: NewsTask, num_examples: int, *, seed: int, directory: Path | None = None) -> list[Example]:
    """Examples with labels from 1 on: synthetic ones of the test stream, or the first ones of a corpus directory."""
    if directory is None:
        corpus = Corpus(num_labels=task.vocab.num_labels, max_prompt_tokens=task.max_prompt_tokens)
        stories = (example.story for example in corpus.stream(task, seed=seed, split="test"))
    else:
        from data.dataset import load

        stored = load(directory)
        if not isinstance(stored.task, NewsTask):
            raise ValueError(f"{directory} is a corpus of {stored.task.name}: expected one of news")
        stories = (from_row(task, row).story for row in stored.dataset)
    encoded = (example for story in stories if (example := task.encode(story)) is not None)
    return list(itertools.islice(encoded, num_examples))


def from_row(task: NewsTask, row: Mapping[str, Any]) -> Example:
    """The example of a row of a dataset directory; the inverse of `to_row`."""
    facts = tuple(Fact(fact["sentence"], fact["kind"], fact["text"]) for fact in row["facts"])
    story = Story(tuple(row["article"]), tuple(row["summary"]), tuple(map(tuple, row["sources"])), facts)
    return Example(story, np.array(row["token_ids"], np.int32), row["prompt_tokens"], row["first_label"])


def to_row(example: Example) -> dict[str, Any]:
    """What a dataset directory holds of an example."""
    story = example.story
    return {
        "article": list(story.article),
        "summary": list(story.summary),
        "sources": [list(own) for own in story.sources],
        "facts": [fact._asdict() for fact in story.facts],
        "first_label": example.first_label,
        "prompt_tokens": example.prompt_tokens,
        "token_ids": example.token_ids,
    }
