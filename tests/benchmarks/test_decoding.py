"""The decode benchmark: its workloads, its bytes, what it says of what does not fit, and its report."""

import dataclasses
import functools
import io
import itertools
import json
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import decoding, peers, report, shapes, sweep, workloads
from benchmarks.decoding import Case
from benchmarks.shapes import Shape
from benchmarks.sweep import Bench
from benchmarks.tiers import TieredCase
from data import arithmetic
from selfspan_jax import files
from selfspan_jax.config import ModelConfig
from selfspan_jax.errors import UserError
from selfspan_jax.parallel import memory
from selfspan_jax.parallel.mesh import make_mesh
from selfspan_jax.spans import SpanVocab
from selfspan_jax.weights.huggingface import to_hugging_face
from tests.selfspan_jax.reference import Reference

ARITHMETIC = SpanVocab(**arithmetic.ArithmeticTask().vocab.span_ids())
SIZES = dict(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, tie_embeddings=False)
SHAPE = Shape(ModelConfig(**SIZES), shapes.borrow_labels(700, 200), 700)
BENCH = dict(shape="llama2-7b", batch_size=(1, 3), context=(256,), attention=("span", "dense", "window"), steps=32)


def counts(shape, row, steps):
    """How many tokens each of the last tokens attends to, by the reference automaton."""
    views = {name: getattr(shape.config, name) for name in ("header_view", "prompt_view", "prompt_window_tokens")}
    return np.array(Reference(row, shape.vocab, **views).mask())[-steps:].sum(axis=1)


def segments(case, fraction=0.15, shape=SHAPE, seed=0):
    size = dict(batch_size=case.batch_size, num_tokens=case.num_tokens, steps=case.steps)
    return workloads.segment_tokens(shape, **size, attended_fraction=fraction, seed=seed)


@functools.cache  # a chunk of expressions is drawn each time
def oracle(case, seed=0):
    size = dict(batch_size=case.batch_size, num_tokens=case.num_tokens, steps=case.steps)
    return workloads.arithmetic_tokens(arithmetic.ArithmeticTask(), **size, seed=seed)


@pytest.mark.parametrize(("context", "fraction"), [(512, 0.1), (512, 0.3), (1024, 0.05), (300, 0.2)])
def test_segments_attend_to_the_share_that_was_asked_for(context, fraction):
    case = Case("span", 4, context, 64)
    token_ids = segments(case, fraction)
    assert token_ids.shape == (4, context + 32)
    attended = np.array([counts(SHAPE, row, case.steps) for row in token_ids])
    contexts = np.arange(case.prompt_tokens + 1, case.num_tokens + 1)
    assert contexts.mean() == context + 0.5
    # Steps are drawn to stay on course, but the timed window cuts them anywhere: measured worst 4%.
    assert np.mean(attended / contexts) == pytest.approx(fraction, rel=0.06)


@pytest.mark.parametrize(("num_tokens", "steps"), [(19, 32), (102, 64)])
def test_a_context_that_leaves_no_room_for_a_prompt_is_refused(num_tokens, steps):
    with pytest.raises(UserError, match="leave too few for a prompt"):  # the search for longer expressions had no end
        workloads.arithmetic_tokens(arithmetic.ArithmeticTask(), batch_size=1, num_tokens=num_tokens, steps=steps, seed=0)


def test_segments_have_span_tokens_at_different_places_in_each_sequence():
    case = Case("span", 8, 512, 64)
    token_ids = segments(case)
    vocab, timed = SHAPE.vocab, token_ids[:, -case.steps :]
    opens = (timed >= vocab.seg_base) & (timed < vocab.seg_base + vocab.num_labels)
    names = (timed >= vocab.ref_base) & (timed < vocab.ref_base + vocab.num_labels)
    assert (opens.sum(axis=1) == 2).all()  # 64 tokens are two steps of 32
    assert ((names.sum(axis=1) >= 4) & (names.sum(axis=1) <= 12)).all()
    assert len(np.unique(opens.argmax(axis=1))) > 4
    assert (token_ids == vocab.solve_id).sum() == 8 and (token_ids == vocab.bos_id).sum() == 8
    assert not np.isin(token_ids, [vocab.eos_id, vocab.pad_id]).any()
    assert not np.array_equal(token_ids, segments(case, seed=1)) and np.array_equal(token_ids, segments(case))


@pytest.mark.parametrize("again", [0, 3])
def test_segments_name_so_many_of_the_step_before(again):
    case, vocab = Case("span", 4, 1024, 128), SHAPE.vocab
    size = dict(batch_size=4, num_tokens=case.num_tokens, steps=case.steps, attended_fraction=0.1, named_again=again, seed=0)
    for row in workloads.segment_tokens(SHAPE, **size):
        response = row[np.flatnonzero(row == vocab.solve_id)[0] :]
        opens = np.flatnonzero((response >= vocab.seg_base) & (response < vocab.seg_base + vocab.num_labels))
        names = [set(response[at + 1 : at + 5].tolist()) for at in opens[:-1]]
        shared = [len(one & other) for one, other in itertools.pairwise(names)]
        assert all(len(each) == 4 for each in names) and all(number == again if again else number < 4 for number in shared)


@pytest.mark.parametrize(
    ("context", "fraction", "why"),
    [(512, 0.9, "fewer than eight segments"), (256, 0.05, "segments without text"), (8192, 0.01, "more labels than there are")],
)
def test_a_share_that_cannot_be_had_is_refused(context, fraction, why):
    with pytest.raises(ValueError, match=f"attended_fraction is {fraction}"):
        segments(Case("span", 1, context, 32), fraction)


def test_oracle_examples_are_cut_within_their_responses():
    case = Case("span", 5, 300, 64)
    token_ids = oracle(case)
    assert token_ids.shape == (5, 332) and len(np.unique(token_ids, axis=0)) == 5
    solve = (token_ids == ARITHMETIC.solve_id).argmax(axis=1)
    assert (solve < case.prompt_tokens).all() and (token_ids[:, 0] == ARITHMETIC.bos_id).all()
    assert not (token_ids == ARITHMETIC.eos_id).any()
    with pytest.raises(ValueError, match="one for each label"):
        oracle(Case("span", 1, 20_000, 64))


ARITHMETIC_SHAPE = Shape(ModelConfig(**SIZES), ARITHMETIC, 1044)


SPAN, DENSE = Case("span", 4, 256, 32), Case("dense", 4, 256, 32)
SAMPLES, INT8 = Case("span", 4, 256, 32, num_samples=4), Case("span", 4, 256, 32, weights="int8")
TIERED, DRAWN = TieredCase("span", 4, 256, 32), TieredCase("span", 4, 256, 32, random_rows=True)


@pytest.fixture(scope="module")
def measured():
    """The rows of these cases on one device: what tests have in common is compiled once."""
    cases = [SPAN, DENSE, SAMPLES, TIERED, DRAWN, INT8]
    return dict(zip(cases, sweep.sweep(SHAPE, cases, segments), strict=True))


@pytest.mark.parametrize(("shape", "draw"), [(SHAPE, segments), (ARITHMETIC_SHAPE, oracle)], ids=["segments", "arithmetic"])
def test_what_is_measured_attends_to_what_the_mask_says(shape, draw, measured):
    """The replayed loop sees what the reference automaton sees, and the loop that it is compared with reads the same rows."""
    row = measured[SPAN] if shape is SHAPE else next(sweep.sweep(shape, [SPAN], draw))
    token_ids = draw(SPAN)
    expected = np.array([counts(shape, sequence, 32) for sequence in token_ids])
    assert row["attended_tokens"] == pytest.approx(expected.mean())
    assert row["attended_fraction"] == pytest.approx((expected / np.arange(241, 273)).mean())
    assert row["mean_context_tokens"] == 256.5 and "overhead_fraction" in row

    table = 1000 * np.arange(4)[:, None] + np.arange(300)
    listed, how_many, own = map(np.asarray, decoding.oracle_slots(shape, SPAN, token_ids, table.astype(np.int32)))
    np.testing.assert_array_equal(how_many.T, expected)
    np.testing.assert_array_equal(own.T, table[:, 240:272])
    mask = Reference(token_ids[2], shape.vocab, prompt_view="local").mask()
    for step in (0, 7, 31):
        np.testing.assert_array_equal(listed[step, 2, : how_many[step, 2]], table[2, np.flatnonzero(mask[240 + step])])


def test_rows_of_other_cases(measured):
    """Dense steps attend to everything; samples attend to what their one prompt says."""
    assert measured[DENSE]["attended_tokens"] == measured[DENSE]["mean_context_tokens"] == 256.5
    assert measured[DENSE]["attended_fraction"] == 1.0 and "overhead_fraction" not in measured[DENSE]
    assert measured[SAMPLES]["attended_tokens"] == pytest.approx(counts(SHAPE, segments(SAMPLES)[0], 32).mean())
    for case, row in measured.items():
        assert row["ms_per_step"] > 0 and row["tokens_per_second"] == pytest.approx(1e3 * case.batch_size / row["ms_per_step"])
        assert (row["time_to_first_token_ms"] is None) == (case is DRAWN) and row["int8"] == (case is INT8)
        assert "compile_seconds" in row or case in (TIERED, DRAWN)


def test_what_comes_over_the_link_is_counted(measured):
    """With room for the whole prompt each row that a header reads is copied once, but those of the step that the prompt ends in."""
    copied = 0
    for row in segments(TIERED):
        says = Reference(row, SHAPE.vocab)
        mask, labels = np.array(says.mask())[:, :240], np.array(says.carries)[:240]
        read = mask[[t for t in range(240, 272) if says.is_header[t]]].any(axis=0)
        copied += (read & (labels > 0) & ~np.isin(labels, [*says.named[239], labels[239]])).sum()
    found = measured[TIERED]
    assert all(found[name] == measured[DRAWN][name] for name in found if name.endswith(("_rows_per_step", "_bytes", "_tokens")))
    assert (found["copied_rows_per_step"], found["missed_rows_per_step"]) == (copied / 32, 0) and copied > 0
    row_bytes = 2 * 2 * 2 * 8 * 2  # K and V, layers, kv heads, head size, bfloat16
    assert found["link_bytes_per_second"] > 0
    assert found["link_bytes_per_step"] == copied / 32 * row_bytes and found["host_memory_bytes"] == 4 * 256 * row_bytes
    assert found["attended_tokens"] == measured[SPAN]["attended_tokens"] and found["kv_memory"] == "host"


def test_samples_share_the_memory_of_their_prompt(measured):
    row_bytes = 2 * 2 * 2 * 8 * 2  # K and V, layers, kv heads, head size, bfloat16
    assert measured[SPAN]["kv_memory_bytes"] == 4 * (256 + 32) * row_bytes
    assert measured[SAMPLES]["kv_memory_bytes"] == (256 + 4 * 32) * row_bytes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_bytes_of_a_step_by_hand(tied, weights):
    shape = Shape(dataclasses.replace(SHAPE.config, tie_embeddings=tied), SHAPE.vocab, SHAPE.vocab_size)
    d, f, layers, n, k, h, v = 32, 48, 2, 4, 2, 8, 700
    outputs = [(n + 2 * k) * h, d, 2 * f, d]  # of a layer's maps: query, key and value; o; gate and up; down
    inputs = [d, n * h, d, f]
    int8 = weights == "int8"
    maps = sum(m * i * (1 if int8 else 2) + (4 * m if int8 else 0) for m, i in zip(outputs, inputs))
    parameters = layers * (maps + 2 * d * 2) + d * 2 + v * d * 2
    batch, attended = 3, 100
    expected = parameters + batch * d * 2 + (attended + batch) * layers * 2 * k * h * 2
    assert shapes.step_bytes(shape.abstract(weights), attended, batch) == expected


def test_on_a_mesh_bytes_and_memory_are_those_of_one_device(measured):
    """Heads and features are divided over tensor, sequences over data; embeddings and norms are whole everywhere."""
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = make_mesh("data=2,tensor=2")
    parts, split = mesh.shape["data"], mesh.shape["tensor"]
    d, f, layers, n, k, h, v = 32, 48 // split, 2, 4 // split, 2 // split, 8, 700
    outputs, inputs = [(n + 2 * k) * h, d, 2 * f, d], [d, n * h, d, f]
    cases = [DENSE, INT8]
    for case, row in zip(cases, sweep.sweep(SHAPE, cases, segments, mesh=mesh), strict=True):
        maps = sum(m * i * (1 if row["int8"] else 2) + (4 * m if row["int8"] else 0) for m, i in zip(outputs, inputs))
        weights = layers * (maps + 2 * d * 2) + d * 2 + v * d * 2
        batch, attended = 4 // parts, row["attended_tokens"] * 4 / parts
        assert row["bytes_per_step"] == round(weights + batch * d * 2 + (attended + batch) * layers * 2 * k * h * 2)
        assert row["kv_memory_bytes"] * mesh.size == measured[case]["kv_memory_bytes"]
        assert row["attended_tokens"] == measured[case]["attended_tokens"] and ("overhead_fraction" in row) == (case is not DENSE)
        if case is DENSE:  # all that there is: 60,480 bytes of weights, 2 embeddings, 2 x 256.5 tokens read and 2 written, 64 bytes each
            assert (row["bytes_per_step"], row["kv_memory_bytes"]) == (60_480 + 128 + 515 * 64, 2 * 288 * 64)


def test_a_mesh_that_does_not_fit_is_refused():
    wrong = {
        "data=2 does not divide the number of prompts=3": dict(mesh="data=2"),
        "data=2 does not divide the number of prompts=1": dict(mesh="data=2", batch_size=(2,), num_samples=4),
        "tensor=4 does not divide num_kv_heads=2": dict(mesh="tensor=4"),
        "fsdp is for training": dict(mesh="fsdp=2"),
        "attention is 'quest', which looks at all keys: a mesh that divides context": dict(mesh="context=2", attention=("quest",)),
        "give one of --mesh and --peers": dict(mesh="tensor=2", peers=("hf-eager",)),
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            Bench(**{**BENCH, "batch_size": (3,), **change}).make_mesh(SHAPE.config)


def test_random_weights_are_drawn_in_the_dtype_that_decodes():
    leaves = jax.tree.leaves(nnx.state(SHAPE.random(0), nnx.Param))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert all(float(jnp.std(leaf.astype(jnp.float32))) == pytest.approx(0.02, rel=0.1) for leaf in leaves if leaf.ndim == 2)


def test_shapes_are_those_of_the_published_models():
    vocab_sizes = {"llama2-7b": 32_000, "llama3-8b": 128_256, "llama3-1b": 128_256, "smollm2-135m": 49_152}
    parameters = {"llama2-7b": 6_738_415_616, "llama3-8b": 8_030_261_248, "llama3-1b": 1_235_814_400, "smollm2-135m": 134_515_008}
    for name, size in vocab_sizes.items():
        shape = shapes.named_shape(name)
        assert shape.vocab_size == size == shape.vocab.ref_base + shape.vocab.num_labels
        assert shape.abstract().num_parameters == parameters[name]
    assert shapes.named_shape("arithmetic-base").vocab_size == 1044


def test_what_does_not_fit_is_said_and_the_rest_goes_on(monkeypatch):
    shape = Shape(dataclasses.replace(SHAPE.config, num_layers=1), SHAPE.vocab, SHAPE.vocab_size)
    small, large, other = Case("window", 1, 256, 32), Case("dense", 64, 256, 32), Case("dense", 1, 256, 32)
    programs = decoding.compile_case(shape, small)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: 2 * programs.needed_bytes)
    compiled = {small: programs, other: programs} | sweep.compile_cases(shape, [large])
    rows = list(sweep.sweep(shape, [large, small], segments, compiled=compiled))
    assert "does not fit: needs" in rows[0]["not_run"] and "ms_per_step" not in rows[0]
    assert rows[1]["ms_per_step"] > 0

    def out_of_memory(*_, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")

    def broken(*_, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    measure = decoding.measure_case
    monkeypatch.setattr(decoding, "measure_case", lambda *a, **o: (out_of_memory if a[2] == other else measure)(*a, **o))
    rows = list(sweep.sweep(shape, [other, small], segments, compiled=compiled))
    assert rows[0]["not_run"] == "does not fit: the device ran out of memory" and rows[1]["ms_per_step"] > 0
    monkeypatch.setattr(decoding, "measure_case", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        list(sweep.sweep(shape, [small], segments, compiled=compiled))


def test_a_sweep_measures_dense_first_and_int8_last():
    cases = Bench(**BENCH, weights=("int8", "bf16"), num_samples=4).cases
    assert [case.attention for case in cases[:3]] == ["dense", "span", "window"]
    assert [case.weights for case in cases] == ["bf16"] * 8 + ["int8"] * 6
    assert cases[7] == Case("span", 4, 256, 32, num_samples=4) and cases[6] == Case("span", 4, 256, 32)
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize(
    "change", [dict(steps=7), dict(steps=0), dict(context=(32,)), dict(batch_size=(0,)), dict(attended_fraction=1.0), dict(seed=-1)]
)
def test_options_that_make_no_sense_are_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name} is "):
        Bench(**{**BENCH, **change})


def report_of(*rows):
    found = {"read_ceiling_terabytes_per_second": 2.0, "shape": "toy", "rows": []}
    for row in rows:
        report.add_row(found, SHAPE, {"batch_size": 2, "context_tokens": 256, "steps": 32, **row})
    return found


OURS = {"int8": False, "num_samples": 1, "bytes_per_step": 10**9}


def test_rows_are_compared_with_their_roofline_their_dense_row_and_the_peer():
    found = report_of(
        {"peer": "hf-compiled", "ms_per_step": 6.0},
        {**OURS, "attention": "dense", "ms_per_step": 4.0},
        {**OURS, "attention": "span", "ms_per_step": 1.0, "overhead_fraction": 0.25},
        {**OURS, "attention": "span", "int8": True, "ms_per_step": 0.8},
        {**OURS, "attention": "span", "context_tokens": 512, "ms_per_step": 1.0, "overhead_fraction": -1.25},
        {**OURS, "attention": "dense", "stream": True, "ms_per_step": 2.0, "cost_of_streaming": -0.5},
        {**OURS, "attention": "window", "not_run": "does not fit"},
    )
    peer, dense, span, int8, other, streamed, _ = found["rows"]
    assert not {"speedup_over_dense", "speedup_over_hf"} & streamed.keys()
    assert span["roofline_ms"] == pytest.approx(0.5) and span["percent_of_roofline"] == pytest.approx(50)
    assert (span["speedup_over_dense"], span["speedup_over_hf"]) == (4.0, 6.0)
    assert (dense["speedup_over_dense"], dense["speedup_over_hf"], peer["speedup_over_hf"]) == (1.0, 1.5, 1.0)
    assert "speedup_over_dense" not in int8 and "speedup_over_hf" in int8  # there is no dense int8 row
    assert not {"speedup_over_dense", "speedup_over_hf"} & other.keys()
    # A static cache is read to its end, whatever stands in it.
    assert peer["bytes_per_step"] == shapes.step_bytes(SHAPE.abstract(), 2 * 272, 2)
    text = report.table(found["rows"]).splitlines()
    assert len(text) == 8 and "6.00x" in text[3] and text[7].endswith("not run: does not fit")
    assert "25.0%" in text[3] and "-125" not in text[5]


@pytest.mark.parametrize("swept", ["batch_size", "context_tokens"])
def test_the_picture_is_drawn(tmp_path, swept):
    rows = [{**OURS, "attention": name, swept: x, "ms_per_step": x / 100} for name in ("dense", "span") for x in (64, 128)]
    files.write_picture(tmp_path / "plots" / "decode.png", report.plot(report_of(*rows)))
    assert (tmp_path / "plots" / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_the_peers_process_is_heard_and_its_failure_is_told(monkeypatch, tmp_path):
    """With a stand-in for the interpreter: it waits for the word, then two rows among other talk, then a failure."""
    script = tmp_path / "python"
    rows = [{"peer": "hf-eager", "ms_per_step": 1.5}, {"peer": "hf-compiled", "not_run": "does not fit"}]
    lines = "\n".join(f"echo 'row: {json.dumps(row)}'\necho a warning" for row in rows)
    told = '[ "$1 $2" = "-m benchmarks.peers" ] || exit 1\nread word; [ "$word" = measure ] || exit 2'
    script.write_text(f"#!/bin/sh\n{told}\n{lines}\necho it broke >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(peers.sys, "executable", str(script))
    with peers.Peers({}, [], seed=0) as process:
        heard = process.rows()
        assert [next(heard), next(heard)] == rows
        with pytest.raises(RuntimeError, match=r"status 3:\nit broke"):
            next(heard)


@pytest.mark.skipif(peers.missing_reason() is not None, reason="PyTorch and transformers are not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_peers_that_need_no_compiler_run(monkeypatch, capsys):
    """The module as the process runs it, but in this one: PyTorch and transformers take 8 seconds to import."""
    import torch

    cases = [{"peer": peer, "batch_size": 2, "context_tokens": 64, "steps": 8} for peer in ("hf-eager", "hf-generate")]
    cases += [{"peer": "hf-sdpa", "batch_size": 2, "context_tokens": 40}]
    job = {"config": to_hugging_face(SHAPE.config, SHAPE.vocab, SHAPE.vocab_size), "cases": cases, "seed": 0}
    monkeypatch.setattr(sys, "argv", ["benchmarks/peers.py", json.dumps(job)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("measure\n"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other longer than so small a model has work
    try:
        runpy.run_path(peers.__file__, run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line.removeprefix("row: ")) for line in capsys.readouterr().out.splitlines() if line.startswith("row: ")]
    assert [row["peer"] for row in rows] == ["hf-eager", "hf-generate", "hf-sdpa"]
    prefill = rows.pop()
    assert prefill["time_to_first_token_ms"] > 0 and (prefill["num_tokens"], prefill["allowed_pairs"]) == (80, 2 * 40 * 41 // 2)
    assert all(row["ms_per_step"] > 0 and row["mean_context_tokens"] == 64.5 for row in rows)
