"""Prompts in host memory: the same steps as with all rows on the device, and a working set as a simulation has it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.arithmetic import ArithmeticTask
from selfspan_jax import lm
from selfspan_jax.config import DecodeConfig, LoraConfig, Sampling, ServingConfig
from selfspan_jax.decoding.engine import Engine, _run_chunk
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM
from selfspan_jax.parallel import memory
from selfspan_jax.parallel.memory import DoesNotFit, catch_out_of_memory
from selfspan_jax.serving.requests import Request
from selfspan_jax.serving.scheduler import Scheduler
from selfspan_jax.tiers import engine as tiers
from selfspan_jax.tiers import prefill, working_sets
from selfspan_jax.tiers.engine import HostEngine
from selfspan_jax.weights import lora
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.reference import Reference
from tests.selfspan_jax.streams import NAMED, VOCAB, VOCAB_SIZE

S, R, TOOLS = VOCAB.seg_base, VOCAB.ref_base, [4, 5, 6, 7, 8, 9]
PROMPT = [1, 4, S + 1, *TOOLS, S + 1, S + 2, 5, S + 2, S + 3, 8, 9, 8, S + 3, 3]  # 8, 3 and 5 tokens of labels 1, 2 and 3
RESPONSES = {  # what follows it, and why
    "one after the other": [S + 4, R + 1, 5, S + 4, R + 2, 6, S + 4, R + 3, 7, S + 4, R + 1, 8, 9],
    "again and again": [S + 4, R + 2, 5, S + 4, R + 2, 6, S + 4, R + 2, R + 2, 7, S + 2, 4, R + 2],
    "larger than the working set": [S + 4, R + 1, R + 2, R + 3, 7, 8, 9, S + 4, R + 3, R + 2, R + 1, 6, 5],
    "without rows": [S + 4, R + 4, 5, S + 4, R + 4, R + 3, 6, S + 0, R + 0, 4, 5, S + 4, R + 4],
    "opened, not named": [S + 1, 5, S + 2, 6, S + 3, 7, S + 1, 8, S + 1, R + 3, 9, S + 3, R + 1],
    "no step": [4, 5, R + 3, 6, R + 1, 7, 8, R + 2, 4, 5, 6, 7, 8],
}
ROWS = [(PROMPT, tokens) for tokens in RESPONSES.values()]
ROWS += [(tokens[: (n := 1 + i % 9)], (tokens[n:] + TOOLS * 3)[:13]) for i, (tokens, _) in enumerate(NAMED.values())]  # any streams
VIEWS = [  # with sizes of working sets: next to nothing, some labels
    ("span", "causal", (2, 12)),
    ("labels", "causal", (12,)),
    ("all", "local", (12,)),
]
STEPS = 13


def prompts_of(rows):
    lengths = np.array([len(prompt) for prompt, _ in rows], np.int32)
    tokens = np.full((len(rows), lengths.max()), VOCAB_SIZE - 1, np.int32)  # garbage after the prompts
    for row, (prompt, _) in zip(tokens, rows):
        row[: len(prompt)] = prompt
    return tokens, lengths


class WorkingSet:
    """Which tokens of a prompt lie on the device: a simulation of one sequence, token by token."""

    def __init__(self, tokens, prompt_tokens, size, views):
        self.prompt_tokens, self.says = prompt_tokens, Reference(tokens, VOCAB, **views)
        self.visible, self.labels = np.array(self.says.mask()), self.says.carries
        wide = views["header_view"] == "labels"
        always = [t for t in range(prompt_tokens) if self.labels[t] == 0 or (wide and self.says.is_seg[t])]
        self.pinned = len(always[: size // 2])
        self.rows = [*always[: size // 2], *[None] * (size - self.pinned)]  # of the working set: whose token
        self.last_named, self.copied, self.misses = {}, 0, 0
        for t in range(prompt_tokens):
            self.note(t, tokens[t])
        if self.says.is_response[prompt_tokens - 1]:
            self.place(prompt_tokens - 1)
        self.copied = 0  # since the prompt

    def note(self, t, token):
        """Note when a label was named."""
        if token - R in self.says.named[t]:
            self.last_named[token - R] = t

    def place(self, t):
        """Give rows to what the step of token t reads of the prompt by label."""
        used = {0, self.labels[t], *self.says.named[t]}
        wanted = [s for s in range(self.prompt_tokens) if self.labels[s] in used and s not in self.rows]
        free = [i for i in range(self.pinned, len(self.rows)) if self.rows[i] is None or self.labels[self.rows[i]] not in used]
        age = {i: -2 if self.rows[i] is None else self.last_named.get(self.labels[self.rows[i]], -1) for i in free}
        taken = sorted(sorted(free, key=lambda i: (age[i], i))[: len(wanted)])
        for i, s in zip(taken, wanted):
            self.rows[i] = s
        self.copied += len(taken)

    def feed(self, t, token):
        self.note(t, token)
        if self.says.is_header[t]:
            self.place(t)
        self.misses += sum(self.visible[t, s] and s not in self.rows for s in range(self.prompt_tokens))


@pytest.mark.parametrize("header_view, prompt_view, sizes", VIEWS)
def test_steps_are_those_of_rows_on_the_device(header_view, prompt_view, sizes):
    views = {"header_view": header_view, "prompt_view": prompt_view}
    model = random_model(num_layers=1, **views)
    prompts, config = prompts_of(ROWS), DecodeConfig(max_new_tokens=STEPS)
    forced = np.array([response for _, response in ROWS], np.int32)
    resident = Engine(model)
    for size in sizes:
        engine = HostEngine(model, working_set_tokens=size)
        simulated = [WorkingSet([*prompt, *response], len(prompt), size, views) for prompt, response in ROWS]
        state, plain = engine.prefill(*prompts, config), resident.prefill(*prompts, config)
        np.testing.assert_allclose(state.logits, plain.logits, atol=1e-4)
        for step in range(STEPS):
            alive = ~np.asarray(state.done)
            state, plain = engine.step(state, forced[:, step], config), resident.step(plain, forced[:, step], config)
            np.testing.assert_allclose(
                np.asarray(state.logits)[alive], np.asarray(plain.logits)[alive], atol=1e-4, err_msg=f"{size}, step {step}"
            )
            np.testing.assert_array_equal(np.asarray(state.slots.counts)[alive], np.asarray(plain.slots.counts)[alive])
            for b in np.flatnonzero(alive):
                simulated[b].feed(len(ROWS[b][0]) + step, forced[b, step])
                owner = [-1 if token is None else token for token in simulated[b].rows]
                np.testing.assert_array_equal(np.asarray(state.cache.owner)[b], owner, err_msg=f"{size}, sequence {b}, step {step}")
        np.testing.assert_array_equal(state.cache.copied, [each.copied for each in simulated])
        np.testing.assert_array_equal(state.cache.misses, [each.misses for each in simulated])


@pytest.mark.parametrize("attention", ["span", "dense"])
def test_drawn_tokens_are_those_of_rows_on_the_device(attention, monkeypatch):
    """Samples share a prompt's rows in host memory; new rows go there, more than was taken for them; a stream gives the same tokens."""
    monkeypatch.setattr(tiers, "NEW_TOKENS", 5)
    if attention == "span":
        monkeypatch.setattr(working_sets, "copies_beside", lambda *_, **__: True)  # every map and attention copies its share
        monkeypatch.setattr(tiers, "bucket", lambda num_tokens: 9)  # so long are responses taken to be: more memory is taken at 9 tokens
    model = random_model(max_context_tokens=1024, header_view="labels")
    model = model if attention == "span" else lora.adapt(model, LoraConfig(rank=2))  # whose maps copy nothing beside their product
    config = DecodeConfig(attention, max_new_tokens=18, sampling=Sampling(temperature=1.0))
    arguments: tuple = (*prompts_of(ROWS[:3]), dataclasses.replace(config, max_new_tokens=8), jax.random.key(1))
    engine, taken = HostEngine(model, working_set_tokens=8), []
    engine.rows_per_step = 4  # who misses more waits
    monkeypatch.setattr(memory, "take_host_memory", lambda needed_bytes, _: taken.append(needed_bytes // model.config.row_bytes))
    plain = Engine(model).generate(*arguments[:2], config, arguments[3], num_samples=2)
    tiered = engine.generate(*arguments, num_samples=2, limit_tokens=18)
    np.testing.assert_array_equal(tiered.new_tokens[:, :18], plain.new_tokens)
    np.testing.assert_array_equal(tiered.num_attended[:, :18], plain.num_attended)
    assert int(tiered.cache.first_new) == 15 and int(tiered.cache.misses.sum()) > 0
    assert tiered.cache.pools[0][2].shape[0] == 3 * 64 + 6 * 20
    assert taken == ([3 * 64 + 6 * 10, 2 * 3 * 64 + 6 * (10 + 20)] if attention == "span" else [3 * 64 + 6 * 20])  # while both are there
    assert tiered.cache.pools[0][0].shape[0] == -(-6 * (8 + 5) // 8) * 8  # rows of six sequences
    assert {pool.sharding.memory_kind for layer in tiered.cache.pools for pool in layer[2:]} == {"pinned_host"}
    if attention == "span":
        chunks = list(engine.stream(*arguments, num_samples=2, limit_tokens=18, chunk_tokens=4))
        streamed = np.concatenate([chunk.tokens for chunk in chunks], axis=1)
        np.testing.assert_array_equal(streamed, np.asarray(plain.new_tokens)[:, : streamed.shape[1]])
        assert streamed.shape[1] == 18
    else:
        state = engine.prefill(*arguments[:2], config, num_samples=2)
        for tokens in np.asarray(plain.new_tokens).T:
            state = engine.step(state, tokens, config)
        np.testing.assert_allclose(state.logits, plain.logits, atol=1e-4)


def test_sequences_that_wait_for_rows_draw_the_same_tokens():
    """Whatever each step may copy: who misses more takes no token, and draws the same one later."""
    model, rng = random_model(num_layers=1, name_share=0.5), np.random.default_rng(0)
    config = DecodeConfig(max_new_tokens=STEPS, sampling=Sampling(temperature=1.0, repetition_penalty=1.2))
    arguments: tuple = (*prompts_of(ROWS[:8]), config, jax.random.key(3))
    plain, engine = Engine(model).generate(*arguments), HostEngine(model, working_set_tokens=12)
    state, alone, waited = engine.prefill(*arguments), 0, 0
    while not np.all(ended := np.asarray(state.done | (state.num_new == STEPS))):
        engine.rows_per_step = int(rng.integers(0, 6))
        before, copied = np.asarray(state.num_new), int(state.cache.copied.sum())
        state, _ = _run_chunk(engine.graph, engine.params, engine._waiting(state), jnp.int32(STEPS - 1), config, 1)
        assert int(state.cache.copied.sum()) - copied <= engine.rows_per_step
        taken = np.asarray(state.num_new) - before
        assert not taken[ended].any()
        waited, alone = waited + int((taken[~ended] == 0).sum()), alone + (0 < taken[~ended].sum() < (~ended).sum())
    assert waited > 10 and alone > 5
    np.testing.assert_array_equal(state.new_tokens, plain.new_tokens)
    np.testing.assert_array_equal(state.num_attended, plain.num_attended)


def test_prompts_are_read_in_groups(monkeypatch):
    """Some prompts at a time, whose rows then lie behind each other."""
    model, arguments = random_model(num_layers=1), (*prompts_of(ROWS[:4]), DecodeConfig(max_new_tokens=8))
    whole = HostEngine(model).prefill(*arguments)
    monkeypatch.setattr(prefill, "READ_TOKENS", 2 * 64)
    grouped = HostEngine(model).prefill(*arguments)
    np.testing.assert_allclose(grouped.logits, whole.logits, atol=1e-5)
    for pool, expected in zip(jax.tree.leaves(grouped.cache.pools), jax.tree.leaves(whole.cache.pools), strict=True):
        np.testing.assert_allclose(pool, expected, atol=1e-5)


def test_what_is_not_there_is_refused():
    model = random_model()
    with pytest.raises(UserError, match="working_set_tokens is 1; allowed: 2 and above"):
        HostEngine(model, working_set_tokens=1)
    with pytest.raises(UserError, match="num_samples is 0"):
        HostEngine(model).prefill(*prompts_of(ROWS[:1]), DecodeConfig(), num_samples=0)
    config = ServingConfig(2, 64, num_pages=2)
    assert Scheduler(HostEngine(model), config).config.page_tokens == 128  # a program that reads so many writes eight pages
    with pytest.raises(UserError, match="prefill_tokens is 64; allowed: multiples of the page's 128 tokens"):
        Scheduler(HostEngine(model), ServingConfig(prefill_tokens=64, page_tokens=128))
    wrong = [({"kv_memory": "disk"}, "allowed: device, host"), ({"kv_memory": "host", "mesh": "data=1"}, "for one device")]
    for options, message in [*wrong, ({"working_set_tokens": 64}, "'device', which has no working sets")]:
        with pytest.raises(UserError, match=message):
            SpanLM(model, ArithmeticTask(), **options)


def test_memory_that_cannot_be_had_is_said_before_anything_is_read(monkeypatch):
    """Of the host for the engine and for a server, by which limit; of the device for working sets."""
    engine, prompts = HostEngine(random_model(num_layers=1), read=lambda *_: pytest.fail("prompts are read")), prompts_of(ROWS[:2])
    with monkeypatch.context() as patch:
        patch.setattr(memory, "free_host_memory_bytes", lambda: 2**10)
        with pytest.raises(DoesNotFit, match=r"rows of 2 prompts of up to 64 tokens take 0\.0 GiB of host memory, 0\.0 are free"):
            engine.prefill(*prompts, DecodeConfig(max_new_tokens=10))
        patch.setattr(memory, "host_memory_limit_bytes", lambda: 2**10)
        with pytest.raises(DoesNotFit, match="of host memory, XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB allows"):
            engine.prefill(*prompts, DecodeConfig(max_new_tokens=10))
        patch.setattr(memory, "free_memory_bytes", lambda: 2**30)
        with pytest.raises(DoesNotFit, match="host memory leaves no room for the cache"):
            Scheduler(engine, ServingConfig(2, 64))
        with pytest.raises(DoesNotFit, match=r"12 pages of 128 tokens take 0\.0 GiB of host memory"):
            Scheduler(engine, ServingConfig(2, 64, num_pages=12))
        patch.setattr(memory, "free_memory_bytes", lambda: None)  # of a CPU, which has no other memory than the host's
        for policy, error, message in [
            (None, DoesNotFit, "128 tokens of a working set and 256 of the latest for each of 2"),
            ("quest", UserError, "looks at all keys"),
        ]:
            with pytest.raises(error, match=message):
                Scheduler(engine, ServingConfig(2, 64, num_pages=12), attention=policy)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: 2**14)
    with pytest.raises(
        DoesNotFit, match=r"64 tokens of a working set and 10 of the latest for each of 2 sequences take .*: give a smaller"
    ):
        engine.prefill(*prompts, DecodeConfig(max_new_tokens=10))


def test_free_host_memory_is_what_the_system_says_for_as_many_processes_as_begin_and_what_says_nothing_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_MEMORY_INFO", str(tmp_path / "meminfo"))
    monkeypatch.setattr(memory, "_CONTROL_GROUP", str(tmp_path))
    with pytest.raises(UserError, match=r"kv_memory is 'host', which needs Linux: .*meminfo says what host memory is free"):
        memory.free_host_memory_bytes()
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  12 kB\n")
    monkeypatch.setattr(memory, "_HOST", memory._Host())
    memory.share_host_memory(3)
    for version, files in (("1", memory._CONTAINER_FILES[1]), ("2", memory._CONTAINER_FILES[0])):  # the newer one is asked first
        for name, text in zip(files, ("9000\n", "5000\n", f"anon 7\n{files[3]} 500\n")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        assert memory.free_host_memory_bytes() == 4500 // 3, version
        (tmp_path / files[0]).write_text("max" if version == "2" else str(2**63 - 4096))
    assert memory.free_host_memory_bytes() == 4096
    memory.take_host_memory(4096, "rows")  # and again, once it was taken
    with pytest.raises(DoesNotFit, match="rows take"):
        memory.take_host_memory(2 * 4096 + 1, "rows")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "2.5 GB")
    with pytest.raises(UserError, match=r"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB is '2\.5 GB'; allowed: a whole number of GiB"):
        memory.free_host_memory_bytes()


def test_host_memory_that_runs_out_is_named_and_a_device_that_cannot_be_used():
    with (
        pytest.raises(DoesNotFit, match="host memory ran out that a GPU may read: XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"),
        catch_out_of_memory(),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory allocating 17179869184 bytes")
    full = "Unable to initialize backend 'cuda': INTERNAL: no supported devices found for platform CUDA (you may need to uninstall"
    with pytest.raises(UserError, match=r"no device can be used: .*CUDA; other programs may have all of its memory"), catch_out_of_memory():
        raise RuntimeError(full)
    with pytest.raises(RuntimeError, match="of another kind"), catch_out_of_memory():
        raise RuntimeError("of another kind")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 4096])
def test_a_trained_model_writes_the_same_tokens_on_a_gpu(size, monkeypatch):
    """With a small working set also: prompts that are read in groups, new rows that go to host memory, more than was taken, and waiting."""
    if size == 16:
        monkeypatch.setattr(tiers, "LINK_SHARE", 2**40)
        monkeypatch.setattr(tiers, "MIN_LINK_BYTES", 1)  # one row a step
        monkeypatch.setattr(prefill, "READ_TOKENS", 64)
        monkeypatch.setattr(tiers, "NEW_TOKENS", 16)
        monkeypatch.setattr(tiers, "bucket", lambda num_tokens: 32)
        monkeypatch.setattr(lm, "_FIRST_ROOM", 32)
    prompts = ["((51+75)-(95*3))", "(((4+5)*(7-2))+((8-3)*(2+6)))", "((1+2)-(3+(4-(5+6))))"]
    options: tuple[dict, ...] = ({}, {"kv_memory": "host", "working_set_tokens": size})
    models = (SpanLM.load("checkpoints/arithmetic-tiny", {"arithmetic": ArithmeticTask}, dtype="f32", **each) for each in options)
    plain, tiered = ([out.token_ids.tolist() for out in model.generate(prompts)] for model in models)
    assert tiered == plain and max(map(len, plain)) > 70


@pytest.mark.gpu
def test_a_server_writes_the_same_tokens_on_a_gpu():
    """Pages in host memory, fewer than wanted, working sets that are too small, prompts that begin alike."""
    prompts = ["((51+75)-(95*3))", "(((4+5)*(7-2))+((8-3)*(2+6)))", "((1+2)-(3+(4-(5+6))))"]
    options: tuple[dict, ...] = ({}, {"kv_memory": "host", "working_set_tokens": 24})
    config, found = ServingConfig(2, 192, page_tokens=8, prefill_tokens=64, num_pages=30, chunk_tokens=4), []
    for each in options:
        model = SpanLM.load("checkpoints/arithmetic-tiny", {"arithmetic": ArithmeticTask}, dtype="f32", **each)
        _, ids = model.encode(prompts, False)
        requests = [Request(np.asarray(own), 80) for own in (*ids, *ids, ids[1][:-1])]
        scheduler = Scheduler(model.engine, config, stop_ids=model.end_ids[1:])
        scheduler.warm_up(draws=False)  # programs compile beside each other
        found.append([tokens.token_ids.tolist() for tokens in scheduler.generate(requests)])
    assert found[1] == found[0] and max(map(len, found[0])) > 50
    assert scheduler.stats.copied_rows > 0 and scheduler.stats.prefix_hit_tokens > 0
