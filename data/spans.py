"""The span protocol (docs/protocol.md) in numpy: what response tokens attend to, and the steps of a response."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from data.vocab import Vocab


class Step(NamedTuple):
    """A step of a response: the label that it opens, the labels that it names, and its other ids."""

    label: int
    named: set[int]
    body: list[int]


def is_label(token_ids: npt.NDArray[np.int32], base: int, vocab: Vocab) -> npt.NDArray[np.bool_]:
    """Tell which tokens are of the family of labels that begins at `base`."""
    return (token_ids >= base) & (token_ids < base + vocab.num_labels)


def attended_tokens(
    token_ids: npt.NDArray[np.int32], prompt_tokens: int, vocab: Vocab, *, header_view: Literal["span", "all"] = "span"
) -> npt.NDArray[np.int64]:
    """Count the tokens that each response token attends to, itself included: int64 [R].

    Between structural tokens the number grows by one a token, so only those are looked at one by one.

    Args:
      token_ids: int32 [T], an example without padding; the first `prompt_tokens` of them end in the first `<solve>`.
      header_view: "all" lets `<seg:k>` and `<ref:k>` tokens of the response attend to everything before them.
    """
    opens, names = is_label(token_ids, vocab.seg_base, vocab), is_label(token_ids, vocab.ref_base, vocab)
    names[:prompt_tokens] = False
    changes = opens | names
    changes[prompt_tokens - 1] = True  # <solve>
    places = np.flatnonzero(changes)
    carried: defaultdict[int, int] = defaultdict(int)  # label -> tokens before `begin` that carry it
    carried[0] = begin = int(places[0])
    named = {0}  # what the current step sees: the sink, its own label, and those that it names
    label = attended = 0
    offsets = []  # attended - position, from each of the places to the next
    for position in places.tolist():
        carried[label] += position - begin
        attended += position - begin
        begin, token = position, int(token_ids[position])
        if names[position]:
            attended += carried[token - vocab.ref_base] if token - vocab.ref_base not in named else 0
            named.add(token - vocab.ref_base)
        else:
            label = token - vocab.seg_base if opens[position] else 0
            named = {0, label}
            attended = 1 + sum(carried[k] for k in named)
        offsets.append(attended - position)
    counts = np.repeat(np.array(offsets), np.diff(places, append=len(token_ids))) + np.arange(int(places[0]), len(token_ids))
    counts = counts[prompt_tokens - int(places[0]) :]
    if header_view == "all":
        headers = changes[prompt_tokens:]
        counts[headers] = np.flatnonzero(headers) + prompt_tokens + 1
    return counts


def read_steps(token_ids: Iterable[int], vocab: Vocab) -> tuple[list[int], list[Step], bool]:
    """Cut a response into (ids before the first step, steps, whether `<eos>` ends it).

    What follows `<eos>` is ignored, and padding at the end of a response without one.
    """
    ids = [int(i) for i in token_ids]
    if ended := vocab.eos_id in ids:
        del ids[ids.index(vocab.eos_id) :]
    while not ended and ids and ids[-1] == vocab.pad_id:
        ids.pop()
    before: list[int] = []
    steps: list[Step] = []
    for i in ids:
        if vocab.seg_base <= i < vocab.seg_base + vocab.num_labels:
            steps.append(Step(i - vocab.seg_base, set(), []))
        elif steps and vocab.ref_base <= i < vocab.ref_base + vocab.num_labels:
            steps[-1].named.add(i - vocab.ref_base)
        else:
            (steps[-1].body if steps else before).append(i)
    return before, steps, ended
