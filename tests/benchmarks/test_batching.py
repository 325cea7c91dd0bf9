"""What the comparison of batching counts, of systems whose course is known."""

import types

import numpy as np
import pytest

from benchmarks import batching, systems
from benchmarks.systems import Work
from selfspan_jax.serving.requests import Tokens


class Scripted:
    """A scheduler that gives each request two tokens a round, until it has what it asks for."""

    def __init__(self):
        self.left = {}

    def submit(self, request, deliver):
        self.left[deliver] = request.max_new_tokens

    def run_once(self):
        for deliver, left in list(self.left.items()):
            count = min(2, left)
            self.left[deliver] -= count
            finished = "length" if left == count else None
            deliver(Tokens(np.full(count, 7, np.int32), np.ones(count, np.int32), finished))
            if finished:
                del self.left[deliver]
        return bool(self.left)


def work(*new_tokens):
    return [Work(np.full(3 + i, 5, np.int32), new, lambda tokens, new=new: len(tokens) == new) for i, new in enumerate(new_tokens)]


@pytest.mark.parametrize("times", [np.zeros(5), np.array([0, 0, 0.01, 0.02, 0.02])])
def test_each_request_gets_its_tokens_and_its_time_counts_from_its_arrival(times):
    sent = systems.run_scheduler(Scripted(), work(1, 2, 5, 4, 3), times)
    assert [(own.tokens, len(own.events), own.right, own.failed) for own in sent] == [
        (1, 1, True, None), (2, 1, True, None), (5, 3, True, None), (4, 2, True, None), (3, 2, True, None)
    ]  # fmt: skip
    assert all(own.arrival == at and own.events[0] >= at for own, at in zip(sent, times))


@pytest.mark.parametrize("times, batches", [(np.zeros(5), 3), (np.array([0, 0, 0, 0.0, 0.03]), 3)])
def test_a_static_batch_runs_as_long_as_its_longest_response_and_each_counts_its_own(times, batches, monkeypatch):
    limits = []

    def generate(token_ids, lengths, config, limit_tokens):
        assert token_ids.shape == (2, 7)
        limits.append(limit_tokens)
        return types.SimpleNamespace(new_tokens=np.full((2, limit_tokens), 7), num_attended=np.ones((2, limit_tokens), np.int32))

    def stream(*arguments, limit_tokens, chunk_tokens):
        state = generate(*arguments, limit_tokens)
        for start in range(0, limit_tokens, chunk_tokens):
            yield tuple(x[:, start : start + chunk_tokens] for x in (state.new_tokens, state.num_attended))

    engine = types.SimpleNamespace(generate=generate, stream=stream)
    settings = types.SimpleNamespace(batch_size=2)
    monkeypatch.setattr(systems.ServingConfig, "chunk_tokens", 4)
    model = types.SimpleNamespace(engine=engine, settings=settings, prompt_tokens=7, config=None)
    sent = systems.run_static(model, work(1, 2, 5, 4, 3), times)
    assert limits == [4, 8, 4] and len(limits) == batches
    assert [(own.tokens, own.right) for own in sent] == [(n, True) for n in (1, 2, 5, 4, 3)]
    assert len(sent[2].events) == (1 if not times[-1] else 2)


def test_what_cannot_be_measured_is_refused():
    for options, message in (
        ({}, "checkpoint or --shape"),
        ({"shape": "smollm2-135m", "rates": (0.0,)}, "rates"),
        ({"shape": "smollm2-135m", "slots": 0}, "slots"),
    ):
        with pytest.raises(ValueError, match=message):
            batching.Batching(**options)
