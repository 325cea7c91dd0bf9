"""Generated corpora: endless streams of examples, made in chunks of a random state each, and read from any number on."""

import abc
import contextlib
import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Generator, Iterable
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from data import workers
from data.errors import UserError, check_choice

Split = Literal["train", "test"]  # of generated examples
SPLITS = ("train", "validation", "test")  # that the articles of a file are divided into
Shard = tuple[int, int]  # (i, n): the i-th of n shards, from 0
ANY_LIMITS = "What differs from them in kind it has never seen."
WHOLE: Shard = (0, 1)

_SAMPLED_EXAMPLES = 256  # at most, to estimate lengths


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A prompt and its gold response: int32 [n] ids, the first `prompt_tokens` of them, `<solve>` included, the prompt.

    It may have `unpredictable`, positions of response tokens that are not to be predicted, and `predictable`, of prompt tokens that are.
    """

    token_ids: npt.NDArray[np.int32]
    prompt_tokens: int

    @property
    def prompt_ids(self) -> npt.NDArray[np.int32]:
        return self.token_ids[: self.prompt_tokens]

    @property
    def response_ids(self) -> npt.NDArray[np.int32]:
        return self.token_ids[self.prompt_tokens :]


E = TypeVar("E", bound=Example)


@dataclasses.dataclass(frozen=True)
class GeneratedCorpus(abc.ABC, Generic[E]):
    """Settings of a corpus whose examples are generated; a task's own settings are a frozen dataclass that subclasses it."""

    chunk_examples: ClassVar[int]

    @property
    @abc.abstractmethod
    def num_labels(self) -> int:
        """Labels of the vocabulary."""

    @property
    @abc.abstractmethod
    def vocab(self) -> Any:
        """The corpus's own vocabulary."""

    @property
    @abc.abstractmethod
    def description(self) -> str:
        """A few words on the prompts, in the plural."""

    @property
    def limits(self) -> str:
        """What a model that was trained on such examples does not know, for its card, in a sentence."""
        return ANY_LIMITS

    @abc.abstractmethod
    def largest(self) -> "GeneratedCorpus[E]":
        """Return the same corpus with the longest examples only."""

    @abc.abstractmethod
    def chunk(self, vocab: Any, seed: int, split: Split, number: int) -> Iterable[E]:
        """Generate `chunk_examples` examples, one by one or all at once; they depend on the arguments and the settings alone."""

    def stream(
        self, *, seed: int, split: Split = "train", start: int = 0, num_workers: int = 0, shard: Shard = WHOLE, vocab: Any = None
    ) -> Generator[E, None, None]:
        """Generate examples without end, from number `start` on, in the corpus's own vocabulary or the one given.

        Example i depends on (settings, vocab, seed, split, shard, i) alone, and the splits share no prompt. Closing the
        generator ends its worker processes.

        Args:
          num_workers: processes that generate ahead; 0 generates in this one, when asked. The examples are the same.
          shard: (i, n) generates chunks i, i + n, i + 2n, ...; `start` counts the shard's own examples.

        Raises:
          UserError: a split, start or number of workers that there is not.
        """
        check_choice("split", split, Split)
        if start < 0:
            raise UserError(f"start is {start}; allowed: 0 and above")
        first_chunk, skipped = divmod(start, self.chunk_examples)
        chunk: Callable[[int], Iterable[E]] = functools.partial(self.chunk, self.vocab if vocab is None else vocab, seed, split)
        chunk = functools.partial(_listed, chunk) if num_workers else chunk
        return _flatten(workers.ordered(chunk, shard[0] + shard[1] * first_chunk, num_workers, step=shard[1]), skipped)

    def likely_longest_tokens(self, vocab: Any = None) -> int:
        """Estimate a length, in tokens, that hardly any example exceeds.

        As far beyond the longest of a sample of the largest examples as that is beyond their mean: lengths are sums of many
        small parts, so this is some six standard deviations out.
        """
        sample = itertools.islice(self.largest().stream(seed=0, vocab=vocab), min(self.chunk_examples, _SAMPLED_EXAMPLES))
        lengths = [len(example.token_ids) for example in sample]
        return 2 * max(lengths) - sum(lengths) // len(lengths)


def split_of(text: str) -> Split:
    """Return the split that an example of this text belongs to, by a hash: an eighth of all is "test"."""
    return "test" if zlib.crc32(text.encode()) % 8 == 0 else "train"


def divided_split_of(text: str) -> str:
    """Return which of SPLITS the text of a file belongs to, by a hash: eight tenths, a tenth and a tenth."""
    return SPLITS[max(0, zlib.crc32(text.encode("utf-8", "surrogatepass")) % 10 - 7)]


def _listed(chunk: Callable[[int], Iterable[E]], number: int) -> list[E]:
    """Make the whole of a chunk, as a worker sends it."""
    return list(chunk(number))


def _flatten(chunks: Generator[Iterable[E], None, None], skipped: int) -> Generator[E, None, None]:
    with contextlib.closing(chunks):
        yield from itertools.islice(itertools.chain.from_iterable(chunks), skipped, None)
