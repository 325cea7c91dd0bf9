"""The span protocol (docs/protocol.md) in numpy: what response tokens attend to, and the steps of a response."""

import collections
import itertools
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from data.vocab import Vocab

HeaderView = Literal["span", "labels", "prompt", "all"]


class Step(NamedTuple):
    """A step of a response: the label that it opens, the labels that it names, and its other ids."""

    label: int
    named: set[int]
    body: list[int]

    def closes(self, before: "Step | None") -> bool:
        """Whether it only opens the label of the step before once more, which so ends with its label as pieces do."""
        return before is not None and self.label == before.label and not (self.named or self.body)


def piece(label: int, token_ids: Iterable[int], vocab: Vocab, *, closed: bool) -> list[int]:
    """Write a piece of a prompt: `<seg:label>` and its ids; where it is closed, `<seg:label>` once more.

    The closing tag has read the piece: there a header that sees `<seg>` tokens alone (`header_view="labels"`) finds what it is about.
    """
    tag = vocab.seg_base + label
    return [tag, *token_ids, *([tag] if closed else [])]


def is_label(token_ids: npt.NDArray[np.integer[Any]], base: int, vocab: Vocab) -> npt.NDArray[np.bool_]:
    """Tell which tokens are of the family of labels that begins at `base`."""
    return (token_ids >= base) & (token_ids < base + vocab.num_labels)


def attended_tokens(
    token_ids: npt.NDArray[np.int32], prompt_tokens: int, vocab: Vocab, *, header_view: HeaderView = "span"
) -> npt.NDArray[np.int64]:
    """Count the tokens that each response token attends to, itself included: int64 [R].

    Args:
      token_ids: int32 [T], an example without padding; the first `prompt_tokens` of them end in the first `<solve>`.
      header_view: what `<seg:k>` and `<ref:k>` tokens of the response attend to beside that: nothing ("span"), every `<seg>` token
        ("labels"), the prompt, or all.
    """
    prompt = token_ids[:prompt_tokens]
    tags = is_label(prompt, vocab.seg_base, vocab)
    last_tag = np.maximum.accumulate(np.where(tags, np.arange(prompt_tokens), -1))
    labels = np.where(last_tag < 0, 0, prompt[last_tag] - vocab.seg_base)
    labels[-1] = 0  # <solve>
    seen = {"span": tags & False, "labels": tags, "prompt": tags | True, "all": tags | True}[header_view]
    carried = collections.Counter(labels.tolist())  # label -> tokens so far that carry it
    wider = collections.Counter(labels[seen].tolist())  # those of them that headers see whatever the step names
    label, named = 0, {0}  # of the current step, which sees the sink, its own label, and those that it names
    attended = carried[0]
    counts = []
    for token in token_ids[prompt_tokens:].tolist():
        opened, referred = token - vocab.seg_base, token - vocab.ref_base
        opens, names = 0 <= opened < vocab.num_labels, 0 <= referred < vocab.num_labels
        if opens:
            label, named = opened, {0, opened}
            attended = sum(carried[k] for k in named)
        elif names and referred not in named:
            named.add(referred)
            attended += carried[referred]
        carried[label] += 1
        wider[label] += header_view == "all" or (header_view == "labels" and opens)
        attended += 1
        counts.append(attended + (sum(count for k, count in wider.items() if k not in named) if opens or names else 0))
    return np.array(counts, np.int64)


class Cut(NamedTuple):
    """A response cut into steps: `body[: bounds[0]]` stands before the first one, step i writes `body[bounds[i] : bounds[i + 1]]`."""

    labels: list[int]
    named: list[set[int]]
    body: list[int]
    bounds: list[int]
    ended: bool  # by `<eos>`


def cut_steps(token_ids: Iterable[int], vocab: Vocab) -> Cut:
    """Cut a response into steps. What follows `<eos>` is ignored, and padding at the end of a response without one."""
    ids = np.asarray(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids), np.int64)
    ends, written = np.flatnonzero(ids == vocab.eos_id), np.flatnonzero(ids != vocab.pad_id)
    ids = ids[: ends[0] if len(ends) else written[-1] + 1 if len(written) else 0]
    opens = is_label(ids, vocab.seg_base, vocab)
    step = np.cumsum(opens)  # 0 before the first one
    names = is_label(ids, vocab.ref_base, vocab) & (step > 0)
    is_body = ~(opens | names)
    labels = (ids[opens] - vocab.seg_base).tolist()
    bounds = np.searchsorted(step[is_body], np.arange(1, len(labels) + 2)).tolist()
    named: list[set[int]] = [set() for _ in labels]
    for number, label in zip(step[names].tolist(), (ids[names] - vocab.ref_base).tolist()):
        named[number - 1].add(label)
    return Cut(labels, named, ids[is_body].tolist(), bounds, bool(len(ends)))


def read_steps(token_ids: Iterable[int], vocab: Vocab) -> tuple[list[int], list[Step], bool]:
    """Return (ids before the first step, steps, whether `<eos>` ends it) of a response, as `cut_steps` cuts it."""
    labels, named, body, bounds, ended = cut_steps(token_ids, vocab)
    bodies = (body[start:end] for start, end in itertools.pairwise(bounds))
    return body[: bounds[0]], list(map(Step, labels, named, bodies)), ended
