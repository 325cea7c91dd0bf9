"""The benchmark of prefill: its prompts, what it counts, what it writes of a case, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import prefill, report, sweep, workloads
from benchmarks.prefill import PrefillCase
from benchmarks.shapes import Shape, named_shape
from benchmarks.sweep import Bench
from data import arithmetic
from data.vocab import Vocab
from pallas_kernels.prompt_attention import BLOCK, WindowTiles
from selfspan_jax import files
from selfspan_jax.attention.policies import Window, get_policy
from selfspan_jax.parallel import memory
from selfspan_jax.parallel.mesh import make_mesh
from selfspan_jax.training import metrics
from tests.benchmarks.test_decoding import ARITHMETIC, ARITHMETIC_SHAPE, SHAPE
from tests.selfspan_jax.reference import Reference

TASK = arithmetic.ArithmeticTask()
BENCH = dict(shape="llama2-7b", prefill=True, batch_size=(1, 3), context=(256,))


def prompts_of(case, shape=SHAPE, seed=0):
    size = dict(batch_size=case.batch_size, num_tokens=case.context_tokens, seed=seed)
    if shape.vocab == ARITHMETIC:
        return workloads.arithmetic_prompts(TASK, **size)
    return workloads.segment_prompts(shape, attended_fraction=0.15, **size)


@pytest.mark.parametrize("num_tokens", [12, 60, 300])
def test_prompts_of_arithmetic_are_expressions_of_about_that_length(num_tokens):
    token_ids, lengths = prompts_of(PrefillCase("span", 5, num_tokens), ARITHMETIC_SHAPE)
    assert token_ids.shape == (5, num_tokens) and lengths.max() <= num_tokens and lengths.mean() > num_tokens - 8
    expressions = set()
    for row, length in zip(token_ids, lengths):
        assert row[0] == ARITHMETIC.bos_id and row[length - 1] == ARITHMETIC.solve_id and np.all(row[length:] == ARITHMETIC.pad_id)
        words = [TASK.vocab.tokens[i] for i in row[1 : length - 1]]
        expressions.add(arithmetic.parse("".join(word for word in words if "<" not in word)).text)  # without their tags
    assert len(expressions) == 5


def test_long_expressions_get_the_labels_that_they_need():
    """One label an operator: a checkpoint has as many as it has, a shape gets more."""
    size = dict(batch_size=1, num_tokens=400, seed=0)
    with pytest.raises(ValueError, match="400 tokens are more than an expression of 31 operators has"):
        workloads.arithmetic_prompts(arithmetic.ArithmeticTask(vocab=Vocab(32)), **size)
    with pytest.raises(ValueError, match="no expression has a prompt of 3 tokens"):
        workloads.arithmetic_prompts(TASK, **size | {"num_tokens": 3})
    _, shape, model, workload, _ = Bench(shape="arithmetic-base", prefill=True, context=(8000,))._subject()
    assert shape.vocab.num_labels > 8000 / 6.65 and workload == "arithmetic" and model is None
    assert shape.config.max_context_tokens >= 8001 and named_shape("arithmetic-base").vocab.num_labels == 512


def test_prompts_of_segments_are_labelled_text_of_that_length():
    token_ids, lengths = prompts_of(PrefillCase("span", 3, 200))
    vocab = SHAPE.vocab
    assert token_ids.shape == (3, 200) and lengths.tolist() == [200] * 3
    assert np.all(token_ids[:, 0] == vocab.bos_id) and np.all(token_ids[:, -1] == vocab.solve_id)
    opens = (token_ids >= vocab.seg_base) & (token_ids < vocab.seg_base + vocab.num_labels)
    assert np.all((opens.sum(axis=1) >= 23) & (opens.sum(axis=1) <= 26))  # 15% of the prompt are the 3.7 segments that a step names
    assert (token_ids == vocab.solve_id).sum() == 3 and not np.isin(token_ids, [vocab.eos_id, vocab.pad_id]).any()
    with pytest.raises(ValueError, match=r"attended_fraction is 0\.15: in a prompt of 3 tokens"):
        prompts_of(PrefillCase("span", 1, 3))
    with pytest.raises(ValueError, match=r"attended_fraction is 0\.001: in a prompt of 2000 tokens"):
        workloads.segment_prompts(SHAPE, batch_size=1, num_tokens=2000, attended_fraction=0.001, seed=0)


MASKS = {  # policy, the views of the model, and which pairs (query, key) of a sequence it allows, by the automaton or by hand
    "dense": ("dense", {}, lambda query, key, _: True),
    "span, local view": ("span", {"prompt_view": "local"}, lambda query, key, mask: mask[query, key]),
    "span, a wide window": ("span", {"prompt_view": "local", "prompt_window_tokens": 33}, lambda query, key, mask: mask[query, key]),
    "span, causal view": ("span", {"prompt_view": "causal"}, lambda query, key, mask: mask[query, key]),
    "window": ("window", {}, lambda query, key, _: query - key < 128 or key < 4),
    "a small window": (Window(sink_tokens=2, window_tokens=3), {}, lambda query, key, _: query - key < 3 or key < 2),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", [SHAPE, ARITHMETIC_SHAPE], ids=["segments", "arithmetic"])
def test_allowed_pairs_are_those_of_the_mask(name, shape):
    policy, views, allowed = MASKS[name]
    config = dataclasses.replace(shape.config, **views)
    token_ids, lengths = prompts_of(PrefillCase("span", 2, 150), shape)
    lengths = lengths - [0, 41]  # one is cut off: what follows is not read
    expected = 0
    for row, length in zip(token_ids, lengths):
        seen = {view: getattr(config, view) for view in ("header_view", "prompt_view", "prompt_window_tokens")}
        mask = np.array(Reference(row[:length], shape.vocab, **seen).mask())
        expected += sum(bool(allowed(query, key, mask)) for query in range(length) for key in range(query + 1))
    mask = prefill.prompt_mask(get_policy(policy), token_ids, lengths, shape.vocab, config)
    assert mask.key_tiles is None and prefill.count_pairs(mask) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_operations_of_a_prefill_by_hand(tied):
    model = Shape(dataclasses.replace(SHAPE.config, tie_embeddings=tied), SHAPE.vocab, SHAPE.vocab_size).abstract()
    d, f, layers, n, k, h, v = 32, 48, 2, 4, 2, 8, 700
    tokens, batch, pairs = 75, 3, 1000
    products = [(tokens, d, (n + 2 * k) * h), (tokens, n * h, d), (tokens, d, f), (tokens, d, f), (tokens, f, d)]
    scores_and_values = n * 2 * (pairs * h)
    multiplications = layers * (sum(a * b * c for a, b, c in products) + scores_and_values) + batch * d * v
    assert prefill.prefill_flops(model, tokens, batch, pairs) == 2 * multiplications


def test_lists_of_a_share_are_of_that_share():
    q, k = np.ones((1, 8 * BLOCK, 4, 8), np.float32), np.ones((1, 64 * BLOCK, 2, 8), np.float32)
    selector = prefill.OfShare(selector=WindowTiles(near_tiles=1), share=0.3, dense_below_tokens=0)
    tiles, counts = selector.choose(q, k, first_query=56 * BLOCK)
    own, kept = 56 + np.arange(8), np.asarray(counts)[0, :, :, 1]
    assert ((kept - 1).sum(axis=0) / (4 * own)).mean() == pytest.approx(0.3, abs=0.03) and (np.asarray(counts)[..., 0] == 1).all()
    for n, i in np.ndindex(4, 8):
        listed = np.asarray(tiles)[0, n, i, : kept[n, i]]
        assert listed[0] == own[i] and (listed[1:] < own[i]).all() and len(set(listed)) == len(listed)
    assert len({tuple(np.asarray(tiles)[0, n, 0, :10]) for n in range(4)}) == 4


def test_pairs_of_a_share_are_those_of_the_diagonal_and_of_that_share():
    t, s = np.indices((300, 300))
    causal, own = s <= t, t // BLOCK == s // BLOCK
    expected = (causal & own).sum() + 0.25 * (causal & ~own).sum() + 128 * 129 // 2  # and a prompt of one tile
    assert prefill.kept_pairs([300, 128], 0.25) == pytest.approx(expected, abs=0.5)
    assert prefill.kept_pairs([300, 128], 1) == prefill.causal_pairs([300, 128])


def test_a_sparse_row_stands_beside_the_dense_one():
    """Of the same first row of tiles, which all read; with everything kept it is the dense prefill."""
    dense, sparse = (PrefillCase("dense", 1, 512, prefill=name, kept=kept) for name, kept in (("dense", 1.0), ("sample", 0.5)))
    rows = list(sweep.sweep(SHAPE, [dense, sparse], prompts_of))
    assert [report.label(row) for row in rows] == ["dense", "sample 50%"]
    assert rows[0]["allowed_pairs"] == 512 * 513 // 2 and rows[1]["allowed_pairs"] == prefill.kept_pairs([512], 0.5)
    with pytest.raises(
        ValueError, match=r"sparse is 'sample': prompts of 300 tokens, 1 at once, go .* 320 tokens .*; allowed: multiples of 128"
    ):
        dataclasses.replace(sparse, context_tokens=300)


CASES = [PrefillCase("dense", 2, 130), PrefillCase("span", 2, 130, "int8")]
ROWS = 192 + 1  # of each sequence in the cache: the prompt's, rounded up, and one of a new token


def eights(rows: int) -> int:
    """Pools have rows in eights."""
    return -(-rows // 8) * 8


@pytest.fixture(scope="module")
def measured():
    return list(sweep.sweep(ARITHMETIC_SHAPE, CASES, lambda case: prompts_of(case, ARITHMETIC_SHAPE), profile=True))


def test_rows_say_what_was_read(measured):
    _, lengths = prompts_of(CASES[0], ARITHMETIC_SHAPE)
    causal = sum(n * (n + 1) // 2 for n in lengths.tolist())
    for case, row in zip(CASES, measured, strict=True):
        assert (row["attention"], row["batch_size"], row["context_tokens"], row["int8"]) == (case.attention, 2, 130, case.weights == "int8")
        assert row["num_tokens"] == lengths.sum() and 2 <= row["repetitions"] <= 5 and row["time_to_first_token_ms"] > 0
        assert row["kv_memory_bytes"] == eights(2 * ROWS) * 2 * 2 * 2 * 8 * 2  # rows, layers, K and V, kv heads of 8, bytes
        parts = row["argument_memory_bytes"] + row["temporary_memory_bytes"] + row["kv_memory_bytes"]
        assert parts <= row["program_memory_bytes"] < parts + 2**20 and row["device_ms_by_kind"] == {}
    dense, span = measured
    assert dense["allowed_pairs"] == causal and dense["allowed_fraction"] == 1
    assert span["allowed_pairs"] < causal and span["allowed_fraction"] == span["allowed_pairs"] / causal
    assert span["argument_memory_bytes"] < dense["argument_memory_bytes"]  # int8


def test_what_does_not_fit_is_said_and_the_rest_goes_on(monkeypatch):
    small, large = PrefillCase("dense", 1, 70), PrefillCase("dense", 500, 70)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: 8 * 2**20)
    rows = list(sweep.sweep(SHAPE, [large, small], prompts_of))
    assert "does not fit: needs" in rows[0]["not_run"] and "num_tokens" not in rows[0] and rows[1]["num_tokens"] == 70

    def out_of_memory(*_, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")

    monkeypatch.setattr(prefill, "measure_case", out_of_memory)
    (row,) = sweep.sweep(SHAPE, [small], prompts_of, compiled={small: prefill.compile_case(SHAPE, small)})
    assert row["not_run"] == "does not fit: the device ran out of memory"


def test_on_a_mesh_operations_are_all_and_bytes_those_of_one_device():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    (row,) = sweep.sweep(ARITHMETIC_SHAPE, CASES[:1], lambda case: prompts_of(case, ARITHMETIC_SHAPE), mesh=make_mesh("data=2,tensor=2"))
    assert row["num_devices"] == 4 and row["num_tokens"] == prompts_of(CASES[0], ARITHMETIC_SHAPE)[1].sum()
    assert row["kv_memory_bytes"] == eights(ROWS) * 2 * 2 * 8 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(steps=32), "--steps is for decode steps"),
        (dict(num_samples=4), "--num-samples is for decode steps"),
        (dict(stream_check=True), "--stream-check is for decode steps"),
        (dict(peers=("hf-eager",)), "peers has hf-eager; allowed with --prefill: hf-sdpa"),
        (dict(prefill=False, peers=("hf-sdpa",)), "peers has hf-sdpa; allowed without --prefill: hf-compiled, hf-eager, hf-generate"),
        (dict(context=(0,)), "context is"),
        (dict(sparse=("sample",)), "--sparse needs --kept"),
        (dict(sparse=("sample", "blocks"), kept=(0.5, 2.0)), "kept is"),
        (dict(kept=(0.5,)), "--kept is the share that --sparse reads: give --sparse"),
        (dict(prefill=False, sparse=("sample",), kept=(0.5,)), "--sparse is for prompts: give --prefill"),
        (dict(attended_fraction=0.0), "attended_fraction is"),
    ],
)
def test_options_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Bench(**{**BENCH, **change})


def test_cases_are_all_lengths_and_policies():
    bench = Bench(**BENCH | dict(context=(64, 16)), attention=("span", "dense"), weights=("int8", "bf16"))  # shorter than 64 steps
    assert bench.cases[:3] == [PrefillCase("dense", 1, 64), PrefillCase("span", 1, 64), PrefillCase("dense", 3, 64)]
    sparse = dataclasses.replace(bench, context=(512,), batch_size=(1,), weights=("bf16",), sparse=("sample", "blocks"), kept=(0.4, 0.3))
    assert sparse.cases[2:] == [PrefillCase("dense", 1, 512, "bf16", name, kept) for name, kept in (("sample", 0.4), ("blocks", 0.3))]
    assert dataclasses.replace(sparse, kept=(0.2,)).cases[3].kept == 0.2
    assert len(bench.cases) == 16 and [case.weights for case in bench.cases[7:9]] == ["bf16", "int8"]
    assert Bench(shape="llama2-7b", prefill=True).with_contexts(1000).context == (999,)  # and the first new token
    with pytest.raises(ValueError, match="context 64 takes 65 tokens; the model's context is 64"):
        bench.with_contexts(64)


OURS = {"int8": False, "num_tokens": 512, "allowed_pairs": 2 * 256 * 257 // 2, "batch_size": 2}


def report_of(*rows):
    found = {"read_ceiling_terabytes_per_second": 2.0, "shape": "toy", "rows": []}
    for row in rows:
        report.add_row(found, SHAPE, {"batch_size": 2, "context_tokens": 256, **row})
    return found


def test_rows_are_compared_with_the_peak_the_dense_row_and_the_peer(monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "bf16_peak", lambda device_kind: 1e12)
    found = report_of(
        {"peer": "hf-sdpa", **OURS, "time_to_first_token_ms": 6.0},
        {**OURS, "attention": "dense", "time_to_first_token_ms": 4.0, "num_devices": 2},
        {**OURS, "attention": "span", "time_to_first_token_ms": 1.0, "allowed_pairs": 6579, "allowed_fraction": 0.1},
        {**OURS, "attention": "dense", "context_tokens": 512, "time_to_first_token_ms": 9.0},
        {**OURS, "attention": "dense", "prefill": "blocks", "kept": 0.25, "time_to_first_token_ms": 0.5},
        {"attention": "window", "int8": False, "not_run": "does not fit"},
    )
    peer, dense, span, other, sparse, _ = found["rows"]
    flops = prefill.prefill_flops(SHAPE.abstract(), 512, 2, 65792)
    assert peer["model_flops"] == dense["model_flops"] == flops > span["model_flops"]
    assert peer["percent_of_peak"] == pytest.approx(100 * flops / 6e-3 / 1e12) and peer["roofline_ms"] == pytest.approx(1e3 * flops / 1e12)
    assert dense["percent_of_peak"] == pytest.approx(100 * flops / 4e-3 / 2e12) and dense["tokens_per_second"] == 128_000
    assert (span["speedup_over_dense"], span["speedup_over_hf"], dense["speedup_over_hf"]) == (4.0, 6.0, 1.5)
    assert "speedup_over_hf" not in other and sparse["speedup_over_dense"] == 8.0 and "blocks 25%" in report.line(sparse)
    text = report.table(found["rows"]).splitlines()
    assert text[0].split()[:5] == ["batch", "context", "first", "token", "tokens/s"] and text[-1].endswith("not run: does not fit")
    assert "6.58e+03 (10.0%)" in text[3] and "4.00x" in text[3] and "6.00x" in text[3]
    figure = report.plot(found)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "context, tokens" and axes.get_ylabel() == "ms to the first token"
    files.write_picture(tmp_path / "prefill.png", figure)
    assert (tmp_path / "prefill.png").read_bytes().startswith(b"\x89PNG")
