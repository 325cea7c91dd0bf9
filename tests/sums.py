"""A task as docs/adding-a-corpus.md describes one: numbers are added up, one a step."""

import collections
import dataclasses
import itertools
from typing import Any, ClassVar

import numpy as np

from data import spans, streams, task
from data.errors import UserError
from data.vocab import Vocab


@dataclasses.dataclass(frozen=True)
class Example:
    prompt: str
    token_ids: np.ndarray
    prompt_tokens: int

    @property
    def response_ids(self):
        return self.token_ids[self.prompt_tokens :]


def encode(text, vocab, first_label=1):
    try:
        numbers = [int(word) for word in text.split()]
    except ValueError:
        raise UserError(f"{text!r}: expected numbers") from None
    if not 2 <= len(numbers) < vocab.num_labels // 2:
        raise UserError(f"{len(numbers)} numbers; allowed: 2 to {vocab.num_labels // 2 - 1}")
    label = itertools.count(first_label)
    prompt = "<bos>" + "".join(f"<seg:{next(label)}>{number}" for number in numbers) + "<solve>"
    response, total, before = "", numbers[0], first_label
    for k, number in enumerate(numbers[1:], first_label + 1):
        own = next(label)
        response += f"<seg:{own}><ref:{before}><ref:{k}>{total}+{number}={total + number}"
        total, before = total + number, own
    ids = [vocab.encode(prompt), vocab.encode(response + "<eos>")]
    return Example(" ".join(map(str, numbers)), np.concatenate(ids), len(ids[0]))


@dataclasses.dataclass(frozen=True)
class Corpus(streams.GeneratedCorpus[Example]):
    """Numbers that are added up.

    Attributes:
      max_numbers: Most numbers of a prompt; their count is uniform from 2 on.
      num_labels: Labels of the vocabulary.
    """

    max_numbers: int = 4
    num_labels: int = 32

    chunk_examples: ClassVar[int] = 64

    @property
    def vocab(self):
        return Vocab(self.num_labels)

    @property
    def description(self):
        return f"sums of 2 to {self.max_numbers} numbers"

    def largest(self):
        return self

    def chunk(self, vocab, seed, split, number):
        draw, examples = np.random.default_rng((seed, number)), []
        while len(examples) < self.chunk_examples:
            text = " ".join(map(str, draw.integers(0, 100, draw.integers(2, self.max_numbers + 1))))
            if streams.split_of(text) == split:
                first_label = vocab.first_label(2 * len(text.split()) - 1, draw.random())
                examples.append(encode(text, vocab, first_label))
        return examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCommand(task.WriteCommand):
    """Write sums and their steps."""

    corpus: Corpus = dataclasses.field(default_factory=Corpus)


class Statistics:
    def __init__(self):
        self.lengths = collections.Counter()

    def add(self, example):
        self.lengths[len(example.token_ids)] += 1

    def to_json(self):
        return {str(length): count for length, count in sorted(self.lengths.items())}

    def readme(self, fields):
        return f"# sums\n\n    {fields['command']}\n"


@dataclasses.dataclass(frozen=True)
class SumsTask(task.Task):
    name: ClassVar[str] = "sums"
    version: ClassVar[int] = 1
    unit: ClassVar[str] = "sums"
    score_kinds: ClassVar[dict[str, Any]] = {"right": ("answer_accuracy",)}
    Corpus: ClassVar[type] = Corpus
    WriteCommand: ClassVar[type] = WriteCommand
    columns: ClassVar[dict[str, Any]] = {"prompt": "string", "token_ids": ["int32"], "prompt_tokens": "int32"}

    def encode_prompt(self, text):
        example = encode(text, self.vocab)
        return example.token_ids[: example.prompt_tokens]

    def answer(self, response_ids):
        _, steps, _ = spans.read_steps(response_ids, self.vocab)
        return self.decode(steps[-1].body).rpartition("=")[2] or None if steps else None

    def scores(self, examples, responses):
        right = [self.answer(ids) == self.answer(example.response_ids) for example, ids in zip(examples, responses, strict=True)]
        return {"answer_accuracy": float(np.mean(right))}

    def held_out(self, num_examples, *, seed):
        drawn = Corpus(num_labels=self.vocab.num_labels).stream(seed=seed, split="test", vocab=self.vocab)
        return {"sums": [encode(example.prompt, self.vocab) for example in itertools.islice(drawn, num_examples)]}

    def renumber(self, example, uniform=None):
        num_labels = 2 * len(example.prompt.split()) - 1
        return encode(example.prompt, self.vocab, 1 if uniform is None else self.vocab.first_label(num_labels, uniform))

    def to_row(self, example):
        return dataclasses.asdict(example)

    def from_row(self, row):
        return Example(row["prompt"], row["token_ids"], row["prompt_tokens"])

    def statistics(self):
        return Statistics()
