"""Every request gets what `Engine.generate` writes for it alone, whatever else runs; nothing leaks, is lost or compiled anew."""

import collections
import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfspan_jax.attention.policies import Window
from selfspan_jax.config import DecodeConfig, Sampling, ServingConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.sampling import sequence_keys
from selfspan_jax.errors import UserError
from selfspan_jax.serving import scheduler as module
from selfspan_jax.serving.scheduler import Closed, QueueFull, Request, Scheduler
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.streams import VOCAB, VOCAB_SIZE

# One model and one config, because compiling is what takes the time: four places, pages of 8 tokens.
ENGINE = Engine(random_model(max_context_tokens=192, header_view="labels", prompt_view="local", prompt_window_tokens=3))
CONFIG = ServingConfig(num_sequences=4, context_tokens=96, page_tokens=8, prefill_tokens=128, num_pages=16, chunk_tokens=4)
SAMPLINGS = [Sampling(), Sampling(temperature=1.0), Sampling(0.8, top_k=6, top_p=0.9, min_p=0.01, repetition_penalty=1.2)]
NEW = 24  # tokens at most
LONGEST = 64  # prompt


def prompt(rng, length, document=()):
    """A prompt that ends in `<solve>`, after a document."""
    ids = rng.integers(4, VOCAB_SIZE, length).astype(np.int32)
    ids[-1] = VOCAB.solve_id
    return np.concatenate([np.array(document, np.int32), ids])


def alone(requests, attention="span"):
    """What `Engine.generate` writes for each request, its tokens and how many each attended to: batches of independent sequences."""
    found = {}
    for sampling in {request.sampling for request in requests}:
        chosen = [i for i, request in enumerate(requests) if request.sampling == sampling]
        for some in (chosen[start : start + 64] for start in range(0, len(chosen), 64)):
            rows = [*some, *some[:1] * (64 - len(some))]  # one shape
            token_ids, lengths, keys = np.zeros((64, LONGEST), np.int32), np.ones(64, np.int32), []
            for row, i in enumerate(rows):
                ids, (high, low) = requests[i].prompt_ids, divmod(requests[i].seed, 2**32)
                token_ids[row, : len(ids)], lengths[row] = ids, len(ids)
                key = jax.random.fold_in(jax.random.key(low), high) if high else jax.random.key(low)
                keys.append(sequence_keys(key, 1, requests[i].sample))
            config = DecodeConfig(attention, NEW, sampling)
            state = ENGINE.generate(token_ids, lengths, config, jnp.concatenate(keys))
            for i, tokens, attended in zip(some, np.asarray(state.new_tokens), np.asarray(state.num_attended)):
                ends = np.flatnonzero(tokens == VOCAB.eos_id)
                count = min(requests[i].max_new_tokens, int(ends[0]) + 1 if len(ends) else NEW)
                found[i] = tokens[:count], attended[:count]
    return [found[i] for i in range(len(requests))]


def assert_as_alone(requests, found, attention="span"):
    for request, tokens, (ids, attended) in zip(requests, found, alone(requests, attention), strict=True):
        np.testing.assert_array_equal(tokens.token_ids, ids, err_msg=str(request))
        np.testing.assert_array_equal(tokens.num_attended, attended, err_msg=str(request))
        assert tokens.finished == ("stop" if ids[-1] == VOCAB.eos_id else "length")


@pytest.fixture(scope="module")
def warm():
    """A scheduler all of whose programs are compiled."""
    scheduler = Scheduler(ENGINE, CONFIG)
    scheduler.warm_up()
    return scheduler


def assert_no_page_is_lost(scheduler):
    stats = scheduler.stats
    assert stats.pages_free + stats.pages_used + stats.pages_cached == scheduler.num_pages
    return stats


@pytest.fixture
def idle(warm):
    """The same scheduler, left idle by each test."""
    yield warm
    stats = assert_no_page_is_lost(warm)
    assert (stats.running, stats.reading, stats.waiting, stats.pages_used) == (0, 0, 0, 0)
    assert sorted(warm._places) == list(range(CONFIG.num_sequences))


# ------------------------------------------------------------------------------------- a hostile schedule, seeded


def read_rows_belong_to_the_reader(scheduler):
    """Every pool row that a sequence has just read is of a page of its own, or of one that began all its sharers alike."""
    chunk = scheduler._in_flight
    if chunk is None:
        return
    slots, counts = np.asarray(scheduler._state.slots.slots), np.asarray(scheduler._state.slots.counts)
    readers = collections.defaultdict(list)
    for ticket, place in chunk.tickets:
        pages = ticket.pages if ticket.pages else scheduler._table[place][scheduler._table[place] >= 0].tolist()
        read = slots[place, : counts[place]]
        assert len(set(read.tolist())) == len(read)
        assert set((read // CONFIG.page_tokens).tolist()) <= set(pages)
        for number, page in enumerate(pages):
            readers[page].append((ticket, (number + 1) * CONFIG.page_tokens))
    for sharers in readers.values():
        begins = {
            (end, np.concatenate([ticket.request.prompt_ids, *ticket.written])[:end].tobytes()) if len(sharers) > 1 else 0
            for ticket, end in sharers
        }
        assert len(begins) == 1


@jax.jit
def poisoned(pools, rows):
    return jax.tree.map(lambda pool: jnp.where(rows[:, None, None], jnp.nan, pool), pools)


def poison_what_nobody_holds(scheduler):
    """Whoever reads a row that is not his gets NaN, and other tokens than alone."""
    rows = np.repeat(np.isin(np.arange(scheduler.num_pages), scheduler.pages._free), CONFIG.page_tokens)
    pools = poisoned(scheduler._state.cache.pools, rows)
    scheduler._state = dataclasses.replace(scheduler._state, cache=dataclasses.replace(scheduler._state.cache, pools=pools))


def test_a_thousand_requests_with_cancellations(warm):
    """Lengths from 1 to the limit, documents that are shared, three kinds of sampling, fewer pages than the sequences want; some are
    cancelled before, while and after they run. What is not cancelled is as alone."""
    rng = np.random.default_rng(1)
    scheduler = Scheduler(ENGINE, CONFIG)
    documents = [rng.integers(4, VOCAB_SIZE, length).astype(np.int32) for length in (16, 33, 50)]
    requests, received, tickets = [], [], []
    busy, worst = True, 0
    while busy or len(requests) < 1000:
        for _ in range(rng.integers(0, 10) if len(requests) < 1000 else 0):
            document = documents[rng.integers(3)] if rng.random() < 0.4 else ()
            short = rng.random() < 0.6
            ids = prompt(rng, rng.integers(1, 12 if short else LONGEST - len(document)), document)
            new, seed = int(rng.integers(1, 6) if short else NEW), int(rng.integers(0, 2**63)) if rng.random() < 0.5 else len(requests)
            request = Request(ids, new, SAMPLINGS[rng.choice(3, p=[0.7, 0.2, 0.1])], seed, int(rng.integers(3)))
            received.append([])
            tickets.append(scheduler._submit(request, received[-1].append, None))
            requests.append(request)
        if tickets and rng.random() < 0.3:
            scheduler.cancel(tickets[rng.integers(max(0, len(tickets) - 40), len(tickets))])
        busy = scheduler.run_once()
        stats = assert_no_page_is_lost(scheduler)
        worst = max(worst, stats.pages_used)
        read_rows_belong_to_the_reader(scheduler)
        poison_what_nobody_holds(scheduler)
    assert all(sum(tokens.finished is not None for tokens in parts) == 1 and parts[-1].finished for parts in received)
    stats = assert_no_page_is_lost(scheduler)
    assert stats.pages_used == 0 and worst > 12 and stats.finished["cancelled"] > 50 and stats.preemptions > 5
    assert stats.prefix_hit_tokens > 1000
    ended = [i for i, parts in enumerate(received) if parts[-1].finished != "cancelled"]
    assert len(ended) > 800
    whole = [module.joined(received[i]) for i in ended]
    assert_as_alone([requests[i] for i in ended], whole)
    for i in set(range(len(requests))) - set(ended):  # what came before the cancellation was right too
        found = module.joined(received[i])
        expected, _ = alone_of_one(requests[i]) if i % 20 == 0 else (found.token_ids, None)
        np.testing.assert_array_equal(found.token_ids, expected[: len(found.token_ids)])
    assert stats.generated_tokens == sum(len(module.joined(parts).token_ids) for parts in received)


def alone_of_one(request):
    return alone([request])[0]
