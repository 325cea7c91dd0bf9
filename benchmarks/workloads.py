"""Oracle examples of a given length, for benchmarks that replay what a trained model would have written."""

import itertools

import numpy as np
import numpy.typing as npt

from data import arithmetic

_TOKENS_PER_OPERATOR = 18  # a little below what the corpus has, so that the first guess is seldom too few operators


def tokens(task: arithmetic.ArithmeticTask, batch_size: int, num_tokens: int, steps: int, *, seed: int) -> npt.NDArray[np.int32]:
    """int32 [batch_size, num_tokens]: examples cut off within their responses, the last `steps` tokens being response.

    The expressions are the shortest, of random numbers of operators a quarter apart, that are long enough.

    Raises:
      ValueError: the vocabulary has too few labels for so long an expression.
    """
    vocab = task.vocab
    num_ops = max(2, num_tokens // _TOKENS_PER_OPERATOR)
    rows: list[npt.NDArray[np.int32]] = []
    while len(rows) < batch_size:
        if num_ops >= vocab.num_labels:
            raise ValueError(f"{num_tokens} tokens are more than an expression of {vocab.num_labels - 1} operators has, one for each label")
        corpus = task.corpus(min_ops=num_ops, max_ops=num_ops)
        examples = itertools.islice(arithmetic.stream(corpus, seed=seed, split="test"), arithmetic.CHUNK_EXAMPLES)
        fitting = [x.token_ids for x in examples if len(x.token_ids) > num_tokens and x.prompt_tokens <= num_tokens - steps]
        rows += fitting[: batch_size - len(rows)]
        num_ops = num_ops + max(1, num_ops // 16)
    return np.stack([row[:num_tokens] for row in rows])
