"""Every request gets what `Engine.generate` writes for it alone, whatever else runs; nothing leaks, is lost or compiled anew."""

import jax
import numpy as np
import pytest

from selfspan_jax.config import DecodeConfig, Sampling, ServingConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.sampling import sequence_keys
from selfspan_jax.errors import UserError
from selfspan_jax.serving.scheduler import QueueFull, Request, Scheduler
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.streams import VOCAB, VOCAB_SIZE

MODEL = random_model(max_context_tokens=192, header_view="labels", prompt_view="local", prompt_window_tokens=3)
ENGINE = Engine(MODEL)
SMALL = ServingConfig(num_sequences=4, context_tokens=128, page_tokens=8, prefill_tokens=64, num_pages=40, chunk_tokens=4)
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_k=6, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
]
NEW = 40


def requests_of(rng, count, longest=60):
    """Ragged prompts, limits and settings; all ends of `prompt_ids` are `<solve>` but a few, which are all prompt."""
    found = []
    for number in range(count):
        ids = rng.integers(4, VOCAB_SIZE, rng.integers(1, longest)).astype(np.int32)
        ids[-1] = VOCAB.solve_id if number % 5 else ids[-1]
        seed = int(rng.integers(0, 2**63)) if number % 2 else number
        found.append(Request(ids, int(rng.integers(1, NEW)), SAMPLINGS[number % 3], seed, int(rng.integers(3))))
    return found


def alone(request, engine=ENGINE, attention="span"):
    """The tokens and attended counts of `Engine.generate` for one request."""
    high, low = divmod(request.seed, 2**32)
    key = jax.random.fold_in(jax.random.key(low), high) if high else jax.random.key(low)
    prompts = np.zeros((1, 64), np.int32)
    prompts[0, : len(request.prompt_ids)] = request.prompt_ids
    config = DecodeConfig(attention, NEW, request.sampling)
    keys = sequence_keys(key, 1, request.sample)
    state = engine.generate(prompts, np.array([len(request.prompt_ids)], np.int32), config, keys)
    tokens, attended = np.asarray(state.new_tokens)[0], np.asarray(state.num_attended)[0]
    ends = np.flatnonzero(tokens == VOCAB.eos_id)
    count = min(request.max_new_tokens, int(ends[0]) + 1 if len(ends) else NEW)
    return tokens[:count], attended[:count]


def test_every_request_gets_what_it_would_get_alone():
    requests = requests_of(np.random.default_rng(0), 24)
    for request, found in zip(requests, Scheduler(ENGINE, SMALL).generate(requests)):
        tokens, attended = alone(request)
        np.testing.assert_array_equal(found.token_ids, tokens)
        np.testing.assert_array_equal(found.num_attended, attended)
        assert found.finished == ("stop" if tokens[-1] == VOCAB.eos_id else "length")


def test_what_can_never_run_is_refused_and_a_full_queue_says_so():
    scheduler = Scheduler(
        ENGINE, ServingConfig(num_sequences=1, context_tokens=64, page_tokens=8, prefill_tokens=64, num_pages=4, max_queue=1)
    )
    for ids, new, message in [
        ([], 4, "at least one"),
        ([VOCAB_SIZE], 4, "the model knows"),
        ([4] * 30, 4, "exceed the 32"),
        ([4], 0, "max_new_tokens is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            scheduler.submit(Request(np.array(ids, np.int32), new), print)
    scheduler.submit(Request(np.array([4], np.int32), 1), lambda tokens: None)
    with pytest.raises(QueueFull):
        scheduler.submit(Request(np.array([4], np.int32), 1), lambda tokens: None)
