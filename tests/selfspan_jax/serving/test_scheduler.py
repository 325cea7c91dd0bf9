"""Every request gets what `Engine.generate` writes for it alone, whatever else runs; nothing leaks, is lost or compiled anew."""

import collections
import dataclasses
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfspan_jax.config import DecodeConfig, Sampling, ServingConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.decoding.sampling import sequence_keys
from selfspan_jax.errors import UserError
from selfspan_jax.parallel.mesh import make_mesh
from selfspan_jax.serving.pages import Pages
from selfspan_jax.serving.programs import Programs
from selfspan_jax.serving.requests import Closed, QueueFull, Request, joined
from selfspan_jax.serving.running import Decoded, read_prompts
from selfspan_jax.serving.scheduler import Scheduler
from selfspan_jax.serving.throughput import is_faster, shared_beginning
from selfspan_jax.spans import attention_mask
from selfspan_jax.tiers.engine import HostEngine
from tests.selfspan_jax.models import random_model, reference_logits
from tests.selfspan_jax.streams import VOCAB, VOCAB_SIZE

# One model and one config, because compiling is what takes the time: four places, pages of 8 tokens.
MODEL = random_model(max_context_tokens=192, header_view="labels", prompt_view="local", prompt_window_tokens=3)
ENGINE = Engine(MODEL)
CONFIG = ServingConfig(num_sequences=4, context_tokens=96, page_tokens=8, prefill_tokens=128, num_pages=16, chunk_tokens=4)
GREEDY, FILTERED = Sampling(), Sampling(0.8, top_k=6, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
NEW = 24  # tokens at most
LONGEST = 64  # prompt
ALL_READ = {"context_tokens": 192, "num_pages": 44, "reads_per_chunk": None}  # prompts of several parts, all read before a chunk


def prompt(rng, length, document=()):
    """A prompt that ends in `<solve>`, after a document."""
    ids = rng.integers(4, VOCAB_SIZE, length).astype(np.int32)
    ids[-1] = VOCAB.solve_id
    return np.concatenate([np.array(document, np.int32), ids])


def alone(requests, longest=LONGEST):
    """What `Engine.generate` writes for each request, its tokens and how many each attended to: batches of independent sequences."""
    found = {}
    for sampling in {request.sampling for request in requests}:
        chosen = [i for i, request in enumerate(requests) if request.sampling == sampling]
        for some in (chosen[start : start + 64] for start in range(0, len(chosen), 64)):
            token_ids, lengths, keys = np.full((64, longest), VOCAB.solve_id, np.int32), np.full(64, 2, np.int32), []  # one program
            for row, i in enumerate(some):
                ids, (high, low) = requests[i].prompt_ids, divmod(requests[i].seed, 2**32)
                token_ids[row, : len(ids)], lengths[row] = ids, len(ids)
                key = jax.random.fold_in(jax.random.key(low), high) if high else jax.random.key(low)
                keys.append(sequence_keys(key, 1, requests[i].sample))
            keys += keys[:1] * (64 - len(some))
            state = ENGINE.generate(token_ids, lengths, DecodeConfig("span", NEW, sampling), jnp.concatenate(keys))
            for i, tokens, attended in zip(some, np.asarray(state.new_tokens), np.asarray(state.num_attended)):
                ends = np.flatnonzero(tokens == VOCAB.eos_id)
                count = min(requests[i].max_new_tokens, int(ends[0]) + 1 if len(ends) else NEW)
                found[i] = tokens[:count], attended[:count]
    return [found[i] for i in range(len(requests))]


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


def assert_read_rows_belong_to_the_reader(scheduler):
    """Every pool row that a sequence has just read is of a page of its own, or of one that began all its sharers alike."""
    if not scheduler._in_flight:
        return
    (chunk,) = scheduler._in_flight
    slots, counts = np.asarray(scheduler.programs.state.slots.slots), np.asarray(scheduler.programs.state.slots.counts)
    readers = collections.defaultdict(list)
    for place, ticket in chunk.tickets.items():
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
    def poison(pool):
        whole = jnp.where(rows[:, None, None], jnp.nan, jax.device_put(pool, jax.memory.Space.Device))
        return jax.device_put(whole, pool.aval.memory_space)

    return jax.tree.map(poison, pools)


def poison_what_nobody_holds(scheduler):
    """Whoever reads a row that is not his gets NaN, and other tokens than alone."""
    rows = np.repeat(np.isin(np.arange(scheduler.num_pages), scheduler.pages._free), CONFIG.page_tokens)
    state = scheduler.programs.state
    pages = [layer[-2:] for layer in state.cache.pools]  # before them, for prompts in host memory, what lies on the device
    rows = np.pad(rows, (0, len(pages[0][0]) - len(rows)), constant_values=True)
    pools = tuple((*layer[:-2], *own) for layer, own in zip(state.cache.pools, poisoned(pages, rows)))
    cache = dataclasses.replace(state.cache, pools=pools)
    scheduler.programs.state = dataclasses.replace(state, cache=cache)


def hostile(scheduler, rng, num, requests, received, samplings=(GREEDY,), longest=LONGEST, short_share=0.7):
    """Submit requests and cancel some, at random, a round at a time until all have ended. Lengths from 1 to the limit, documents that are
    shared, prompts that go on in a response; cancelled before, while and after they run. Yields after each round."""
    documents, tickets, busy = [rng.integers(4, VOCAB_SIZE, n).astype(np.int32) for n in (16, 33, 50)], [], True
    while busy or len(requests) < num:
        for _ in range(rng.integers(0, 12) if len(requests) < num else 0):
            document, short = documents[rng.integers(3)] if rng.random() < 0.4 else (), rng.random() < short_share
            ids = prompt(rng, rng.integers(1, 12 if short else longest - len(document)), document)
            if rng.random() < 0.1:
                ids[len(ids) // 2] = VOCAB.solve_id
            new, seed = int(rng.integers(1, 6) if short else NEW), int(rng.integers(0, 2**63)) if rng.random() < 0.5 else len(requests)
            drawn = samplings[rng.integers(len(samplings))], seed, int(rng.integers(3))
            requests.append(Request(ids, new, *drawn, expected_tokens=(None, None, 2, 0, NEW)[len(requests) % 5]))
            received.append([])
            tickets.append(scheduler._submit(requests[-1], received[-1].append, None))
        if tickets and rng.random() < 0.3:
            scheduler.cancel(tickets[rng.integers(max(0, len(tickets) - 40), len(tickets))])
        busy = scheduler.run_once()
        assert_no_page_is_lost(scheduler)
        yield
    assert all([tokens.finished is not None for tokens in parts] == [False] * (len(parts) - 1) + [True] for parts in received)


@pytest.mark.parametrize(
    "seed, changes, lengths",
    [(11, {}, {}), (14, ALL_READ, {"longest": 168, "short_share": 0.2})],
    ids=["a part between two chunks", "all read before a chunk"],
)
def test_whatever_comes_and_goes_each_request_is_as_alone(seed, changes, lengths, idle, monkeypatch):
    """What is not cancelled is as alone, and so is what came before a cancellation; there are fewer pages than the sequences want."""
    scheduler, read, parts = Scheduler(ENGINE, dataclasses.replace(CONFIG, **changes)) if changes else idle, Programs.read, []
    monkeypatch.setattr(Programs, "read", lambda own, group, *to, **of: [parts.append((to[0], len(group))), read(own, group, *to, **of)])
    before, requests, received = scheduler.stats, [], []
    for _ in hostile(scheduler, np.random.default_rng(seed), 100, requests, received, (GREEDY, GREEDY, FILTERED), **lengths):
        assert_read_rows_belong_to_the_reader(scheduler)
        poison_what_nobody_holds(scheduler)
    stats, found = scheduler.stats, list(map(joined, received))
    assert stats.pages_used == 0 and (not changes or any(first >= CONFIG.prefill_tokens and together > 1 for first, together in parts))
    assert stats.finished["cancelled"] > 20 and stats.preemptions > before.preemptions
    assert stats.prefix_hit_tokens - before.prefix_hit_tokens > 500
    assert stats.generated_tokens - before.generated_tokens == sum(len(tokens.token_ids) for tokens in found)
    assert stats.attended_tokens - before.attended_tokens == sum(tokens.num_attended.sum() for tokens in found)
    for request, tokens, (ids, attended) in zip(requests, found, alone(requests, lengths.get("longest", LONGEST)), strict=True):
        count = len(tokens.token_ids)
        np.testing.assert_array_equal(tokens.token_ids, ids[:count], err_msg=str(request))
        np.testing.assert_array_equal(tokens.num_attended, attended[:count], err_msg=str(request))
        if tokens.finished != "cancelled":
            assert count == len(ids) and tokens.finished == ("stop" if ids[-1] == VOCAB.eos_id else "length")


def test_pages_in_host_memory_give_what_each_request_writes_alone():
    """Shared beginnings, cancellations, fewer pages than wanted; a working set that is too small, and rings that are used again."""
    config = dataclasses.replace(CONFIG, context_tokens=88, prefill_tokens=64, num_pages=12)
    scheduler = Scheduler(HostEngine(MODEL, working_set_tokens=24), config)
    requests: list[Request] = []
    received: list[list] = []
    for _ in hostile(scheduler, np.random.default_rng(19), 40, requests, received):
        poison_what_nobody_holds(scheduler)
    stats = scheduler.stats
    assert stats.finished["cancelled"] > 5 and stats.preemptions > 0 and stats.prefix_hit_tokens > 100
    assert stats.copied_rows > 100 and stats.missed_rows > 100 and stats.pages_used == 0
    for request, tokens, (ids, attended) in zip(requests, map(joined, received), alone(requests), strict=True):
        count = len(tokens.token_ids)
        np.testing.assert_array_equal(tokens.token_ids, ids[:count], err_msg=str(request))
        np.testing.assert_array_equal(tokens.num_attended, attended[:count], err_msg=str(request))
        assert count == len(ids) or tokens.finished == "cancelled"


class Device:
    """What the host sees of a device, in NumPy: tokens at random, and what it may write where."""

    def __init__(self, scheduler, rng, monkeypatch, stops=0.05):
        self.scheduler, self.rng, self.stops = scheduler, rng, stops
        monkeypatch.setattr("selfspan_jax.serving.programs.read_prompts", self.read_prompts)
        monkeypatch.setattr("selfspan_jax.serving.programs.decode_chunk", self.decode_chunk)
        self.ends, self.num_new, self.done = (np.zeros(CONFIG.num_sequences, kind) for kind in (np.int32, np.int32, bool))
        self.num_readings = 0

    def read_prompts(self, graph, params, state, prompts, config, page_tokens, num_queries, responses):
        self.num_readings += 1
        for lengths, pages in zip(prompts.lengths, prompts.pages):
            self.may_write(pages, range(int(prompts.first), int(lengths)))
        for place, row in enumerate(prompts.sources):
            if row >= 0:
                self.ends[place], self.num_new[place], self.done[place] = prompts.lengths[row], prompts.num_new[row], False

    def decode_chunk(self, graph, params, state, pages, until, *options):
        token_ids = self.rng.integers(4, VOCAB_SIZE, (CONFIG.num_sequences, CONFIG.chunk_tokens)).astype(np.int32)
        counts = np.zeros_like(token_ids)
        for place in np.flatnonzero(until):
            for step in range(CONFIG.chunk_tokens):
                if self.num_new[place] < until[place] and not self.done[place]:
                    self.may_write(pages[place], [self.ends[place]])
                    counts[place, step], self.done[place] = 1, self.rng.random() < self.stops
                    self.ends[place], self.num_new[place] = self.ends[place] + 1, self.num_new[place] + 1
        return None, Decoded(*(np.array(x).view(Fetched) for x in (token_ids, counts, self.done)))

    def may_write(self, pages, positions):
        """A sequence writes to pages that nobody else holds, and whose content nobody knows."""
        for page in {pages[position // CONFIG.page_tokens] for position in positions}:
            assert page >= 0 and self.scheduler.pages._holders[page] == 1 and page not in self.scheduler.pages._key_of


class Fetched(np.ndarray):
    def copy_to_host_async(self):
        pass


def test_after_many_requests_no_page_is_lost(monkeypatch):
    """The host's part alone."""
    scheduler, rng, requests, received = Scheduler(ENGINE, CONFIG), np.random.default_rng(9), [], []
    Device(scheduler, rng, monkeypatch)
    for _ in hostile(scheduler, rng, 1000, requests, received):
        holders = collections.Counter(page for ticket in {*scheduler._running.values(), *scheduler._reading} for page in ticket.pages)
        assert all(scheduler.pages._holders[page] >= count for page, count in holders.items())
    stats = scheduler.stats
    assert (stats.pages_used, stats.running, stats.waiting) == (0, 0, 0) and sum(stats.finished.values()) == len(requests) >= 1000
    assert stats.finished["cancelled"] > 50 and stats.preemptions > 10
    for request, parts in zip(requests, received):
        tokens = joined(parts)
        assert len(tokens.token_ids) == request.max_new_tokens or tokens.finished != "length"


@pytest.mark.parametrize("known", [False, True])
def test_where_lengths_are_known_no_sequence_loses_its_pages_and_the_longest_do_not_hold_up_the_others(known, monkeypatch):
    rng = np.random.default_rng(4)
    scheduler = Scheduler(ENGINE, dataclasses.replace(CONFIG, reads_per_chunk=None))
    Device(scheduler, rng, monkeypatch, stops=0.0)
    ends, sizes = [], [(44, 24)] * 4 + [(3, 2)] * 8
    requests = [Request(prompt(rng, size), new, expected_tokens=new if known else None) for size, new in sizes]
    for number, request in enumerate(requests):
        scheduler.submit(request, lambda tokens, number=number: tokens.finished and ends.append(number))
    while scheduler.run_once():
        pass
    assert (scheduler.stats.preemptions == 0) == known and len(ends) == len(sizes)
    if known:  # one long one at a time has room, beside it short ones
        assert set(ends[:8]) == {*range(4, 12)} and ends[8:] == [0, 1, 2, 3]


def test_the_last_parts_of_prompts_are_read_together_where_all_are_read_before_a_chunk(monkeypatch):
    """A reading takes as long for one prompt as for those that fill it: four times 128 tokens, then twice 50 and 40 of two of them."""
    sizes = {"context_tokens": 192, "num_pages": 4 * 24, "reads_per_chunk": None}
    scheduler, rng = Scheduler(ENGINE, dataclasses.replace(CONFIG, **sizes)), np.random.default_rng(5)
    device = Device(scheduler, rng, monkeypatch, stops=0.0)
    ended = []
    found = scheduler.generate([Request(prompt(rng, size), 3) for size in (178, 168, 178, 168)], lambda: ended.append(1))
    assert [len(tokens.token_ids) for tokens in found] == [3] * 4 and ended == [1] * 4
    assert device.num_readings == 4 + 2


# ------------------------------------------------------------------------------------------------ one thing at a time


def test_prompts_that_begin_alike_are_read_once_and_write_what_they_would_without(idle):
    """Questions on one document, all at once: the first reads it, the others wait for its pages. Alone, none has any to share."""
    rng = np.random.default_rng(2)
    document = prompt(rng, 43)[:-1]
    requests = [Request(prompt(rng, 9, document), 6) for _ in range(5)]
    before = idle.stats
    together = idle.generate(requests)
    assert idle.stats.prompt_tokens - before.prompt_tokens == 51 + 4 * (51 - 40)  # five full pages of eight
    assert idle.stats.prefix_hit_tokens - before.prefix_hit_tokens == 4 * 40
    for request, found in zip(requests, together):
        idle.pages = Pages(idle.num_pages)  # forgets what it has read
        before = idle.stats
        (apart,) = idle.generate([request])
        assert idle.stats.prefix_hit_tokens == before.prefix_hit_tokens
        for one, other in zip(apart, found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_prompt_of_whole_pages_asked_again_has_its_last_page_read_again(idle):
    """All of its pages are known then, but the first new token needs the last one's logits."""
    page = CONFIG.page_tokens
    for length in (page, 3 * page):
        request = Request(prompt(np.random.default_rng(12 + length), length), 6)
        (first,), before = idle.generate([request]), idle.stats
        (again,) = idle.generate([request])
        assert idle.stats.prefix_hit_tokens - before.prefix_hit_tokens == length - page
        assert idle.stats.prompt_tokens - before.prompt_tokens == page
        np.testing.assert_array_equal(again.token_ids, first.token_ids)
        np.testing.assert_array_equal(again.num_attended, first.num_attended)


@pytest.mark.parametrize("waits_already", [True, False])
def test_what_is_cancelled_while_it_is_read_is_read_for_who_asks_it_too(idle, waits_already):
    """Who begins alike waits for the pages of the one that reads, which never come once that is cancelled."""
    rng = np.random.default_rng(13)
    other, document = np.append(prompt(rng, 20), 5).astype(np.int32), prompt(rng, 40)  # one goes on after <solve>: they are read apart
    idle.pages, received, others = Pages(idle.num_pages), [], []
    idle.submit(Request(other, 6), others.append)
    cancelled = idle.submit(Request(document, 6), others.append)
    again = idle.submit(Request(document, 6), received.append) if waits_already else None
    idle.run_once()
    assert idle._reading == [cancelled] and idle._waiting == ([again] if waits_already else [])
    idle.cancel(cancelled)
    again = again or idle.submit(Request(document, 6), received.append)
    for _ in range(20):
        idle.run_once()
    if waits := not again.finished:  # so that it fails here alone
        idle.cancel(again)
        idle.run_once()
    assert cancelled.finished == "cancelled" and not waits and not idle._being_read
    ((ids, attended),) = alone([Request(document, 6)])
    np.testing.assert_array_equal(joined(received).token_ids, ids)
    np.testing.assert_array_equal(joined(received).num_attended, attended)


def test_what_is_drawn_is_each_request_s_own(idle):
    """A seed's sequences differ; the same one is the same again, alone or beside a request that makes others go another way."""
    ids = prompt(np.random.default_rng(3), 20)
    drawn = [Request(ids, 12, Sampling(1.0), seed=2**40 + 5, sample=sample) for sample in (0, 1, 0)]
    first, second, again = (found.token_ids.tolist() for found in idle.generate(drawn))
    assert first == again != second
    beside = idle.generate([Request(ids, 12, FILTERED), *drawn[:2]])
    assert [found.token_ids.tolist() for found in beside[1:]] == [first, second]


def test_log_probabilities_are_the_model_s_before_temperature_and_filters(idle):
    """Of the tokens taken and of the most likely ones; a request beside it that asks for none has none."""
    ids = prompt(np.random.default_rng(11), 20)
    asking, other = idle.generate([Request(ids, 9, FILTERED, logprobs=True), Request(ids, 9)])
    assert other.logprobs is None
    whole, count = np.concatenate([ids, asking.token_ids]), len(asking.token_ids)
    mask = np.asarray(attention_mask(jnp.asarray(whole), VOCAB, header_view="labels", prompt_view="local", prompt_window_tokens=3))
    logits = reference_logits(MODEL, whole[None], mask[None])[0, len(ids) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    taken, likeliest_ids, likeliest = asking.logprobs
    np.testing.assert_allclose(taken, expected[np.arange(count), asking.token_ids], atol=1e-4)
    np.testing.assert_allclose(likeliest, -np.sort(-expected, axis=1)[:, : likeliest.shape[1]], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(expected, likeliest_ids, axis=1), likeliest, atol=1e-4)
    assert likeliest.shape == (count, min(20, VOCAB_SIZE))


def test_a_request_that_ends_early_leaves_the_others_alone(idle):
    """Cancelled while it waits, while it runs, and once it has ended; and one whose function raises. A place is free in the next round."""
    rng, received = np.random.default_rng(4), collections.defaultdict(list)
    requests = [Request(prompt(rng, 10 + i), 20) for i in range(7)]

    def refuse(tokens):
        received[6].append(tokens)
        raise LookupError("gone")

    tickets = [idle.submit(request, refuse if i == 6 else received[i].append) for i, request in enumerate(requests)]
    idle.cancel(tickets[5])
    for _ in range(3):
        idle.run_once()
    place, told = tickets[1].place, len(received[1])
    idle.cancel(tickets[1])
    (queued,) = idle._in_flight
    idle.run_once()
    (chunk,) = idle._in_flight
    assert queued.tickets[place] is tickets[1] and chunk.tickets[place] is tickets[6]
    assert idle.stats.pages_used == sum(len(ticket.pages) for ticket in chunk.tickets.values())
    assert len(received[1]) == told + 1 and not received[1][-1].token_ids.size  # what was queued for it is nobody's
    while idle.run_once():
        pass
    idle.cancel(tickets[0])
    idle.run_once()
    assert [tickets[i].finished for i in (1, 5, 6)] == ["cancelled", "cancelled", "error"]
    assert 0 < len(joined(received[1]).token_ids) < 20 and not joined(received[5]).token_ids.size and len(received[6]) == 1
    kept = (0, 2, 3, 4)
    for i, (ids, attended) in zip(kept, alone([requests[i] for i in kept])):
        np.testing.assert_array_equal(joined(received[i]).token_ids, ids)
        np.testing.assert_array_equal(joined(received[i]).num_attended, attended)


def test_a_device_that_fails_ends_what_it_had_and_goes_on(idle, monkeypatch):
    ids = prompt(np.random.default_rng(5), 10)
    (before,) = idle.generate([Request(ids, 8)])
    received = [[] for _ in range(6)]
    for parts in received:
        idle.submit(Request(ids, 8), parts.append)
    idle.run_once()

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("selfspan_jax.serving.programs.decode_chunk", fail)
        idle.run_once()
    assert [parts[-1].error for parts in received if parts] == ["RESOURCE_EXHAUSTED: out of memory"] * 4
    while idle.run_once():
        pass
    for parts in received[4:]:
        np.testing.assert_array_equal(joined(parts).token_ids, before.token_ids)


def test_nothing_is_compiled_after_the_warm_up(idle):
    """Lengths, places, pages, sampling, prompts read again: whatever comes, the programs are there."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    rng = np.random.default_rng(6)
    lengths, samplings = (*range(25, 41), 1, 7, 8, 9, 63, 64), (GREEDY, GREEDY, FILTERED, Sampling(1.0))
    preemptions, held = idle.stats.preemptions, idle.pages.allocate(5)
    idle.generate([Request(prompt(rng, length), NEW, samplings[i % 4]) for i, length in enumerate(lengths)])
    idle.pages.release(held)
    assert idle.stats.preemptions > preemptions
    assert not [name for name in events if "trace" in name or "compile" in name]
    jax.jit(lambda x: x + 1)(1)
    assert [name for name in events if "compile" in name]  # it would show


def test_a_thread_runs_it_until_it_is_closed():
    scheduler, received, ended = Scheduler(ENGINE, CONFIG), [], threading.Event()
    thread = threading.Thread(target=scheduler.run)
    thread.start()

    def deliver(tokens):
        received.append(tokens)
        if tokens.finished:
            ended.set()

    request = Request(prompt(np.random.default_rng(7), 30), 10)
    scheduler.submit(request, deliver)
    assert ended.wait(60)
    scheduler.submit(request, received.append)
    scheduler.close(drain=True)
    with pytest.raises(Closed):
        scheduler.submit(request, print)
    thread.join(60)
    assert not thread.is_alive() and received[-1].finished in ("stop", "length")
    assert joined(received).token_ids.tolist() == 2 * alone([request])[0][0].tolist()
    hurried, received = Scheduler(ENGINE, CONFIG), []
    hurried.submit(request, received.append)
    hurried.close(drain=False)
    hurried.run()
    assert [tokens.finished for tokens in received] == ["cancelled"]


def test_dense_reads_everything_on_two_devices_as_well():
    """Its slots are a copy of the slot table, which grows with the pages; each device has half of the heads."""
    scheduler, rng = Scheduler(Engine(MODEL, make_mesh("tensor=2")), CONFIG, attention="dense"), np.random.default_rng(8)
    requests = [Request(prompt(rng, length), 20) for length in (3, 30, 64, 17, 44)]
    assert all(leaf.size for leaf in jax.tree.leaves(scheduler.programs.state))  # XLA's compiler for GPUs dies of arrays without elements
    reading = read_prompts.lower(*scheduler.programs._read_arguments([], 0, 128, 128, False))
    assert not re.search(r"tensor<(\d+x)*0x", reading.as_text())
    for request, found in zip(requests, scheduler.generate(requests)):
        start, count = len(request.prompt_ids), len(found.token_ids)
        np.testing.assert_array_equal(found.num_attended, np.arange(start + 1, start + count + 1))
        row = np.concatenate([request.prompt_ids, found.token_ids])
        row = np.pad(row, (0, LONGEST + NEW - len(row)))
        best = reference_logits(MODEL, row[None], np.tri(len(row), dtype=bool)[None])[0].argmax(axis=1)
        np.testing.assert_array_equal(found.token_ids, best[start - 1 : start - 1 + count])


MIXED, ALIKE = [20, 40, 80, 600] * 64, [600] * 256


@pytest.mark.parametrize(
    "prompts, new, batch_size, changes, backend, shared, faster",
    [
        (MIXED, MIXED, 16, {}, "gpu", 0.0, True),
        (sorted(MIXED), sorted(MIXED), 16, {}, "gpu", 0.0, False),  # static batches of similar lengths lose little
        (ALIKE, ALIKE, 16, {}, "gpu", 0.0, False),  # as many rows hold hardly more sequences than the batch
        (MIXED, [5, 9, 5, 12] * 64, 16, {}, "gpu", 0.0, False),  # a place that ends is free a chunk later
        (MIXED, MIXED, 100, {}, "gpu", 0.0, False),  # few batches
        (MIXED, MIXED, 16, {"prefill": "sample"}, "gpu", 0.0, False),
        ([600] * 8, [20] * 8, 8, {}, "gpu", 0.9, True),  # one batch, of eight questions about one document
        (MIXED, MIXED, 16, {}, "cpu", 0.9, False),  # where twice the rows take twice the time
    ],
)
def test_a_scheduler_is_for_where_it_saves_steps_or_reading(prompts, new, batch_size, changes, backend, shared, faster, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = DecodeConfig("span", 640, **changes)
    assert is_faster(ENGINE, config, prompts, new, batch_size, shared) == faster
    assert not is_faster(Engine(MODEL, make_mesh("tensor=2")), config, prompts, new, batch_size, shared)


def test_what_prompts_begin_with_is_counted_in_whole_pages():
    page, rng = ServingConfig.page_tokens, np.random.default_rng(0)
    story = rng.integers(4, 99, 3 * page + 5)
    asked = [np.concatenate([story, np.full(page, question)]) for question in (1, 2)]
    assert shared_beginning(asked) == 3 * page / sum(map(len, asked))  # the fourth page has a question in it
    assert shared_beginning([story, story[1:]]) == shared_beginning([story[: page - 1]] * 2) == shared_beginning([]) == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "attention, prompt_view, mesh", [("span", "local", None), ("dense", "causal", None), ("span", "local", "tensor=2")]
)
def test_the_kernels_give_each_request_what_it_would_get_alone(attention, prompt_view, mesh):
    """Heads of 64, which they take; parts of prompts that begin after a shared page, at no multiple of a tile of queries."""
    if mesh and jax.device_count() < 2:
        pytest.skip("needs two devices")
    wide = dict(hidden_size=64, intermediate_size=96, head_size=64, num_heads=4, num_kv_heads=2, max_context_tokens=512)
    engine, rng = Engine(random_model(prompt_view=prompt_view, **wide), mesh and make_mesh(mesh)), np.random.default_rng(10)
    config = ServingConfig(num_sequences=4, context_tokens=384, page_tokens=64, prefill_tokens=256, num_pages=18, chunk_tokens=4)
    document = prompt(rng, 70)[:-1]
    requests = [Request(prompt(rng, length, document if length > 100 else ()), 12) for length in (150, 7, 250, 64, 130, 200)]
    scheduler = Scheduler(engine, config, attention=attention)
    found = scheduler.generate(requests)
    assert scheduler.stats.prefix_hit_tokens == 3 * 64
    for request, tokens in zip(requests, found):
        state = engine.generate(request.prompt_ids[None], np.array([len(request.prompt_ids)]), DecodeConfig(attention, 12))
        count = len(tokens.token_ids)
        np.testing.assert_array_equal(tokens.token_ids, state.new_tokens[0, :count])
        np.testing.assert_array_equal(tokens.num_attended, state.num_attended[0, :count])


@pytest.mark.parametrize(
    "ids, changes, message",
    [
        ([], {}, "at least one"),
        ([[4]], {}, "expected whole numbers"),
        ([0.5], {}, "expected whole numbers"),
        ([VOCAB_SIZE], {}, "the model knows 0 to 19"),
        ([4] * 73, {"max_new_tokens": 24}, "73 prompt tokens and 24 new ones exceed the 96"),
        ([4], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([4], {"seed": -1}, "seed is -1"),
        ([4], {"sampling": 0.5}, "sampling is 0.5"),
    ],
)
def test_what_can_never_run_is_refused(idle, ids, changes, message):
    with pytest.raises(UserError, match=message):
        idle.submit(Request(np.array(ids or np.zeros(0, np.int32)), **{"max_new_tokens": 4, **changes}), print)


def test_a_full_queue_says_so():
    """So many wait beside those that have a place, or will have one in the next round."""
    scheduler = Scheduler(ENGINE, dataclasses.replace(CONFIG, max_queue=2))
    for _ in range(CONFIG.num_sequences + 2):
        scheduler.submit(Request(np.array([4]), 1), print)
    with pytest.raises(QueueFull, match="2 requests wait"):
        scheduler.submit(Request(np.array([4]), 1), print)
