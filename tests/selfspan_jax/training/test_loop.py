"""One training step against gradients taken another way, the loss's mask, accumulation, resuming, and what stops a run."""

import dataclasses
import itertools
import json
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from data.packing import Batch
from selfspan_jax import training
from selfspan_jax.attention.sequences import attend_in_training
from selfspan_jax.config import TrainConfig
from selfspan_jax.model import Frozen
from selfspan_jax.parallel.memory import DoesNotFit
from selfspan_jax.training import DeviceBatch, TrainingDiverged
from selfspan_jax.training import step as step_module
from tests.selfspan_jax.models import random_model, reference_logits
from tests.selfspan_jax.reference import Reference
from tests.selfspan_jax.streams import VOCAB, VOCAB_SIZE

CONFIG = TrainConfig(
    steps=12, batch_size=4, sequence_tokens=32, warmup_steps=2, log_every_steps=2, checkpoint_every_steps=4, eval_every_steps=6
)

LONGER = dataclasses.replace(CONFIG, steps=16, keep_checkpoints=1, log_every_steps=1)


def batch_of(number, rows=4, tokens=32):
    """A batch that depends on its number alone: two packed sequences a row and padding."""
    rng = np.random.default_rng(number)
    token_ids = rng.integers(4, VOCAB_SIZE, (rows, tokens)).astype(np.int32)
    segment_ids = np.zeros((rows, tokens), np.int32)
    target_mask = np.zeros((rows, tokens), bool)
    for row in range(rows):
        first, second = rng.integers(8, 14, 2)
        for segment, begin, end in ((1, 0, first), (2, first, first + second)):
            segment_ids[row, begin:end] = segment
            token_ids[row, begin + 3] = VOCAB.solve_id
            target_mask[row, begin + 4 : end] = True
    token_ids[segment_ids == 0] = VOCAB.pad_id
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), (rows, tokens))
    return Batch(token_ids, segment_ids, positions, target_mask, next_example=number + 1)


def batches_from(number):
    while True:
        yield batch_of(number)
        number += 1


def test_the_loss_is_the_mean_over_targets_of_sequences_seen_alone():
    """Each packed sequence, cut out and run by itself under the reference mask, gives its share of the packed batch's loss."""
    model, batch = random_model(header_view="labels"), batch_of(0)
    _, sums = nnx.jit(training.loss_sums)(model, DeviceBatch.of(batch))
    total, count, right = 0.0, 0, 0
    for row in range(4):
        for segment in (1, 2):
            at = np.flatnonzero(batch.segment_ids[row] == segment)
            ids = batch.token_ids[row, at]
            # Rotary scores depend on distances alone, so that starting at 0 is the same as starting in mid-row.
            filled = np.append(ids, [4] * (14 - len(ids)))  # one length, one compilation
            logits = reference_logits(model, filled[None], [np.array(Reference(filled, VOCAB, header_view="labels").mask())])[0].astype(
                np.float64
            )
            for t in range(4, len(at)):
                scores = logits[t - 1] - logits[t - 1].max()
                total -= scores[ids[t]] - np.log(np.exp(scores).sum())
                right += np.argmax(scores) == ids[t]
                count += 1
    assert int(sums["targets"]) == count and int(sums["right"]) == right
    assert float(sums["loss"]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("fraction", [0.3, 1.0, 0.0])
def test_a_loss_that_is_summed_in_parts_is_the_same(fraction):
    """With its gradients; logits of all rows are never in memory, and parts without targets cost nothing."""
    rng, num_rows, model = np.random.default_rng(0), 500, random_model()
    graph, params = nnx.split(model)
    hidden = jnp.asarray(rng.normal(size=(num_rows, 32)), jnp.float32)
    targets, is_target = jnp.asarray(rng.integers(0, VOCAB_SIZE, num_rows)), jnp.asarray(rng.random(num_rows) < fraction)

    def sums(params, hidden, **options):
        return step_module.sums_of_targets(nnx.merge(graph, params), hidden, targets, is_target, (3.0, 2.0), **options)

    def parts(params, hidden):
        return sums(params, hidden, max_logits_bytes=1)  # 128 rows

    found, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, hidden) for f in (parts, sums))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    program = str(jax.make_jaxpr(jax.grad(lambda *args: parts(*args)[0]))(params, hidden))
    assert f"f32[128,{VOCAB_SIZE}]" in program and f"f32[{num_rows},{VOCAB_SIZE}]" not in program


def test_the_choice_among_sources_and_the_end_count_as_often_as_is_said():
    """By numpy in float64, from the logits of the same model: whether one is named counts once, and so does all in what is logged."""
    packed, weight, end_weight = batch_of(0), 2.5, 1.5
    packed.token_ids[0, -1], packed.target_mask[0, -1] = VOCAB.eos_id, True
    batch = DeviceBatch.of(packed)

    @nnx.jit
    def computed(model):
        attend, _ = attend_in_training(batch.token_ids, model.vocab, model.config, segment_ids=batch.segment_ids)
        hidden, _ = model(batch.token_ids, batch.positions, attend)
        return model.logits(hidden), *training.loss_sums(model, batch, weights=(weight, end_weight))

    logits, found, sums = computed(random_model())
    logits, ids = np.asarray(logits, np.float64)[:, :-1], np.asarray(batch.token_ids)[:, 1:]
    own, scores = np.take_along_axis(logits, ids[..., None], -1)[..., 0], np.exp(logits)
    sources = slice(VOCAB.ref_base, VOCAB.ref_base + VOCAB.num_labels)
    losses, choices = np.log(scores.sum(-1)) - own, np.log(scores[..., sources].sum(-1)) - own
    is_source, mask = (ids >= sources.start) & (ids < sources.stop), np.asarray(batch.target_mask)[:, 1:]
    assert (mask & is_source).any() and (mask & ~is_source).any()
    expected = (losses * mask).sum()
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-4) and float(sums["targets"]) == mask.sum()
    ends = losses[mask & (ids == VOCAB.eos_id)]
    assert ends.any()
    expected += (weight - 1) * choices[mask & is_source].sum() + (end_weight - 1) * ends.sum()
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_a_dense_control_is_trained_under_the_causal_mask():
    batch = DeviceBatch.of(batch_of(0))
    loss_sums = nnx.jit(training.loss_sums)
    span, dense = (float(loss_sums(random_model(mask=mask), batch)[0]) for mask in ("span", "dense"))
    assert span != pytest.approx(dense, rel=1e-3)
    prompt_only = dataclasses.replace(batch, token_ids=jnp.where(batch.token_ids == VOCAB.solve_id, 4, batch.token_ids))
    span, dense = (float(loss_sums(random_model(mask=mask), prompt_only)[0]) for mask in ("span", "dense"))
    assert span == pytest.approx(dense, rel=1e-5)  # without <solve> all is prompt, and a causal prompt is dense


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    """Parts hold different numbers of targets, one of them none: the mean over parts would be another gradient."""
    uneven = batch_of(3)
    uneven.target_mask[0] = False
    states = []
    for steps in (1, 4):
        fixed, state = training.initial_state(random_model(), config := dataclasses.replace(CONFIG, accumulation_steps=steps))
        for _ in range(3):  # the first step of a warm-up has rate 0
            state, metrics = training.train_step(fixed, state, DeviceBatch.of(uneven), config)
        states.append((state.params, metrics))
    for whole, parts in zip(*(jax.tree.leaves(state) for state in states), strict=True):
        np.testing.assert_allclose(whole, parts, rtol=2e-3, atol=2e-5)


def test_a_step_is_adamw_on_the_clipped_gradient():
    """Two steps written out: Adam's moments with bias correction, decoupled decay on layer matrices only, rate by schedule."""
    config = dataclasses.replace(CONFIG, clip_norm=0.05, weight_decay=0.3, warmup_steps=0, learning_rate=1e-2)
    model = random_model()
    fixed, state = training.initial_state(model, config)
    params = {path: np.asarray(value[...], np.float64) for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    moments = {path: (0.0, 0.0) for path in params}

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        loss, sums = training.loss_sums(nnx.merge(fixed.graph, params, fixed.frozen), batch)
        return loss / sums["targets"]

    for step in range(2):
        batch = DeviceBatch.of(batch_of(step))
        grads = {path: np.asarray(value[...], np.float64) for path, value in nnx.to_flat_state(gradient(state.params, batch))}
        norm = np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
        assert norm > config.clip_norm
        progress = step / config.steps
        final = config.final_learning_rate_fraction
        rate = config.learning_rate * (final + (1 - final) * 0.5 * (1 + np.cos(np.pi * progress)))
        for path, grad in grads.items():
            grad = grad * config.clip_norm / norm
            first = config.beta1 * moments[path][0] + (1 - config.beta1) * grad
            second = config.beta2 * moments[path][1] + (1 - config.beta2) * grad**2
            moments[path] = (first, second)
            update = first / (1 - config.beta1 ** (step + 1)) / (np.sqrt(second / (1 - config.beta2 ** (step + 1))) + 1e-8)
            decay = config.weight_decay if path[-1] == "weight" else 0.0
            params[path] = params[path] - rate * (update + decay * params[path])
        state, metrics = training.train_step(fixed, state, batch, config)
        assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
        assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-5)
    for path, value in nnx.to_flat_state(state.params):
        np.testing.assert_allclose(value[...], params[path], rtol=2e-3, atol=2e-5, err_msg=str(path))


def frozen_layers(model):
    """The model with the matrices of its layers frozen."""
    for layer in model.layers:
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            linear.weight = Frozen(linear.weight[...])
    return model


def arrays_made(jaxpr):
    """(shape, primitive) of everything that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from ((variable.aval.shape, equation.primitive.name) for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if (inner := getattr(inner, "jaxpr", inner)) is not None and hasattr(inner, "eqns"):
                yield from arrays_made(inner)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_frozen_parameters_have_no_gradients_and_no_moments(accumulation_steps):
    """Nothing of a frozen matrix's shape is computed; the same reading of a training of all parameters finds much."""
    config = dataclasses.replace(CONFIG, accumulation_steps=accumulation_steps)
    made = {}
    for name, model in (("frozen", frozen_layers(random_model())), ("whole", random_model())):
        fixed, state = training.initial_state(model, config)
        matrices = {layer.mlp.down_proj.weight[...].shape for layer in model.layers} | {(64, 32), (32, 32), (96, 32)}
        batch = DeviceBatch.of(batch_of(0, tokens=29))  # so that no array of tokens has the shape of a matrix
        program = jax.make_jaxpr(training.train_step, static_argnums=(3,))(fixed, state, batch, config)
        found = {primitive for shape, primitive in arrays_made(program.jaxpr) if shape in matrices | {s[::-1] for s in matrices}}
        made[name] = found - {"pjit", "jit", "convert_element_type", "transpose"}
        moments = optax.tree_utils.tree_get(state.opt_state, "mu")
        assert jax.tree.structure(moments) == jax.tree.structure(state.params)
        shapes = {leaf.shape for leaf in jax.tree.leaves((state.params, moments))}
        assert bool(shapes & matrices) == (name == "whole")
    assert not made["frozen"] and {"add_any", "mul", "dot_general"} & made["whole"]


@pytest.mark.gpu
def test_a_step_taken_again_is_the_same_to_the_bit():
    """An embedding's row sums the gradients of hundreds of tokens: in one order, whichever are ready first."""
    config = dataclasses.replace(CONFIG, batch_size=1024, warmup_steps=0)
    fixed, state = training.initial_state(random_model(), config)
    batch = DeviceBatch.of(batch_of(0, rows=1024))
    results = []
    for _ in range(4):
        after, metrics = training.train_step(fixed, jax.tree.map(jnp.copy, state), batch, config)
        results.append(jax.tree.map(np.asarray, (after.params, metrics)))
    for again in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, again, results[0])


def test_a_step_leaves_frozen_parameters_alone_and_trains_the_others():
    fixed, state = training.initial_state(model := frozen_layers(random_model()), dataclasses.replace(CONFIG, warmup_steps=0))
    before, frozen = (jax.tree.map(np.array, tree) for tree in (state.params, fixed.frozen))
    state, _ = training.train_step(fixed, state, DeviceBatch.of(batch_of(0)), dataclasses.replace(CONFIG, warmup_steps=0))
    assert all((a != b).any() for a, b in zip(*(jax.tree.leaves(tree) for tree in (before, state.params)), strict=True))
    for leaf, after in zip(*(jax.tree.leaves(tree) for tree in (frozen, fixed.frozen)), strict=True):
        np.testing.assert_array_equal(leaf, after)
    assert len(jax.tree.leaves(frozen)) == 4 * len(model.layers)


def run(run_dir, *, config=CONFIG, source=batches_from, evaluate=None, **options):
    return training.train(random_model(), config, batches_from=source, run_dir=run_dir, evaluate=evaluate, **options)


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class Stopped(Exception):
    pass


def assert_same_parameters(models):
    for expected, found in zip(*(jax.tree.leaves(nnx.state(model)) for model in models), strict=True):
        np.testing.assert_array_equal(expected, found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not interrupted: its model, its log and its directory."""
    run_dir = tmp_path_factory.mktemp("whole")
    return run(run_dir), lines(run_dir), run_dir


@pytest.mark.parametrize(
    ("stop_after", "error", "saved"),
    [(3, Stopped, []), (5, ValueError, [4, 5]), (9, Stopped, [4, 8]), (0, ValueError, [])],
    ids=["before any checkpoint", "between checkpoints, by its data", "after two checkpoints", "before a step, by its data"],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(whole, tmp_path, capfd, stop_after, error, saved):
    """What ends it otherwise than by the data leaves what was saved before."""

    def stopping(number):
        for batch in batches_from(number):
            if batch.next_example > stop_after:
                raise error("row 17 is damaged")
            yield batch

    model, log, _ = whole
    with pytest.raises(error, match="row 17 is damaged"):
        run(tmp_path, source=stopping)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == saved
    assert (f"step {stop_after} is saved, --steps {stop_after}" in capfd.readouterr().out) == (stop_after in saved)
    assert_same_parameters((model, run(tmp_path)))
    for expected, found in zip(log, lines(tmp_path), strict=True):
        assert (expected["step"], expected["loss"], expected["gradient_norm"]) == (found["step"], found["loss"], found["gradient_norm"])


def test_a_run_that_is_stopped_in_time_goes_on_from_its_checkpoint(whole, tmp_path):
    with pytest.raises(training.Stopped, match=r"^stopped after step 1$"):
        run(tmp_path / "run", stop_after_seconds=0)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1]
    with pytest.raises(training.Stopped, match=r"^stopped after step 2$"):
        run(tmp_path / "run", stop_after_seconds=0)
    assert_same_parameters((whole[0], run(tmp_path / "run")))


def test_a_run_logs_and_evaluates_when_it_says(tmp_path):
    run(tmp_path, evaluate=lambda model: {"answer_accuracy": 0.25, "parameters": model.num_parameters})
    log = lines(tmp_path)
    assert [line["step"] for line in log if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in log if "eval/answer_accuracy" in line] == [6, 12]
    assert all(line["tokens_per_second"] > 0 and 0 <= line["input_wait_fraction"] <= 1 for line in log if "loss" in line)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [8, 12]  # the last two are kept
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def interrupted(run_dir, **options):
    """A run that SIGTERM stops: what it raises."""
    with training.Interrupts() as interrupts, pytest.raises(training.Stopped) as stopped:
        run(run_dir, interrupts=interrupts, **options)
    assert stopped.value.signal == signal.SIGTERM
    return stopped.value.step


def test_a_run_that_gets_a_signal_saves_and_goes_on_as_if_it_had_not(whole, tmp_path, capfd):
    def signalling(number):
        for batch in batches_from(number):
            if batch.next_example == 7:  # a few batches ahead of the step that is taken
                signal.raise_signal(signal.SIGTERM)
            yield batch

    step = interrupted(tmp_path, source=signalling)
    assert 1 <= step <= 7 and max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == step
    assert "SIGTERM: saving a checkpoint, then stopping" in capfd.readouterr().err
    assert_same_parameters((whole[0], run(tmp_path)))


@pytest.mark.parametrize("eval_every_steps", [6, 5, 12], ids=["in mid-run", "not at a checkpoint", "after the last step"])
def test_an_evaluation_that_a_signal_interrupts_is_made_when_the_run_goes_on(whole, tmp_path, eval_every_steps):
    config, scored = dataclasses.replace(CONFIG, eval_every_steps=eval_every_steps), []

    def evaluate(model):
        if not scored:
            scored.append(None)
            signal.raise_signal(signal.SIGTERM)
        scored.append(float(nnx.state(model)["norm"]["scale"][...][0]))
        return {"scale": scored[-1]}

    assert interrupted(tmp_path, config=config, evaluate=evaluate) == eval_every_steps and scored == [None]
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == eval_every_steps
    assert_same_parameters((whole[0], run(tmp_path, config=config, evaluate=evaluate)))
    expected = sorted({*range(eval_every_steps, 13, eval_every_steps), 12})
    assert [line["step"] for line in lines(tmp_path) if "eval/scale" in line] == expected
    assert training.read_scores(tmp_path, 12) == {"scale": scored[-1]}
    assert run(tmp_path, config=config, evaluate=evaluate) and len(scored) == 1 + len(expected)  # not once more


def events(run_dir):
    """(tag, step) of every event in the files of TensorBoard."""
    found = []
    for file in (run_dir / "tensorboard").iterdir():
        for event in EventFileLoader(str(file)).Load():
            found += [(value.tag, event.step) for value in event.summary.value]
    return found


def test_no_step_is_logged_twice_after_a_kill_beyond_a_checkpoint(tmp_path):
    def stopping(number):
        yield from itertools.takewhile(lambda batch: batch.next_example <= 7, batches_from(number))
        raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path, source=stopping, evaluate=lambda model: {"score": 1.0})
    assert max(line["step"] for line in lines(tmp_path)) == 6  # of the checkpoint after 4
    run(tmp_path, evaluate=lambda model: {"score": 1.0})
    steps = [line["step"] for line in lines(tmp_path) if "loss" in line]
    assert steps == [2, 4, 6, 8, 10, 12] and [step for tag, step in events(tmp_path) if tag == "loss"] == steps
    assert sorted(step for tag, step in events(tmp_path) if tag == "eval/score") == [6, 12]
    seconds = [line["unix_seconds"] for line in lines(tmp_path)]
    assert seconds == sorted(seconds)


def test_a_finished_run_that_is_extended_follows_the_longer_schedule_from_there_on(whole, tmp_path):
    """Rates by the formula of the cosine; the state that it goes on from is that of the shorter run."""
    shutil.copytree(whole[2], tmp_path / "run")
    run(tmp_path / "run", config=LONGER)
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [2, 4, 6, 8, 10, 12, 13, 14, 15, 16]
    for line in found:
        taken, steps = line["step"] - 1, 12 if line["step"] <= 12 else 16
        decay = 0.5 * (1 + np.cos(np.pi * (taken - 2) / (steps - 2)))
        fraction = taken / 2 if taken < 2 else 0.02 + 0.98 * decay
        assert line["learning_rate"] == pytest.approx(CONFIG.learning_rate * fraction, rel=1e-4), line["step"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["16"]


def test_progress_is_lines_where_there_is_no_terminal(whole, tmp_path, capsys):
    run(tmp_path / "quiet")
    assert capsys.readouterr().out == ""
    shutil.copytree(whole[2], tmp_path / "run")
    run(tmp_path / "run", config=LONGER, progress=True)
    *first, a, b, c, d = capsys.readouterr().out.splitlines()
    assert first == ["resuming from step 12 of 16", "compiling the training step"]
    for step, line in zip((13, 14, 15, 16), (a, b, c, d)):
        assert re.fullmatch(rf"step {step} of 16: loss \d\.\d{{4}}, [\d,]+ tokens/s, \d\d:\d\d left", line)


def test_a_half_written_line_of_the_log_is_dropped_on_resuming(tmp_path):
    whole_lines = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in (2, 4, 6))
    (tmp_path / "metrics.jsonl").write_text(whole_lines + '{"step": 4, "lo')
    training.MetricsLog(tmp_path, resumed_step=4).close()
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(tmp_path):
    """The state that went wrong is not saved: resuming starts from the last good one."""
    config = dataclasses.replace(CONFIG, checkpoint_every_steps=1)
    model = random_model()

    def poisoned(number):
        for batch in batches_from(number):
            yield batch._replace(positions=np.full_like(batch.positions, np.iinfo(np.int32).max)) if batch.next_example == 6 else batch

    original = training.loss_sums

    def loss_sums(model, batch, attention, **options):
        loss, sums = original(model, batch, attention, **options)
        bad = jnp.where(jnp.max(batch.positions) > 10**6, jnp.nan, 1.0)
        return loss * bad, {**sums, "loss": sums["loss"] * bad}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "loss_sums", loss_sums)
        training.train_step.clear_cache()
        with pytest.raises(TrainingDiverged, match="nan at step 6"):
            training.train(model, config, batches_from=poisoned, run_dir=tmp_path)
    training.train_step.clear_cache()
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == 5


def test_a_run_that_does_not_fit_says_what_needs_less(tmp_path):
    def too_large(model):
        return {"score": float(jax.device_get(jnp.zeros(2**50, jnp.int8))[0])}

    with pytest.raises(DoesNotFit, match="ran out of memory; more --accumulation-steps"):
        run(tmp_path, evaluate=too_large)


def test_errors_of_the_data_reach_the_caller():
    def broken():
        yield batch_of(0)
        raise ValueError("row 17 is damaged")

    batches = training.prefetch(broken())
    next(batches)
    with pytest.raises(ValueError, match="row 17 is damaged"):
        next(batches)


def test_the_small_model_learns_to_repeat(tmp_path):
    """The loop as a whole lowers the loss: responses that repeat their prompt's token."""
    ids = np.array([[1, 4 + i % 6, 3, *[4 + i % 6] * 5] for i in range(24)], np.int32)
    targets = np.arange(8)[None] >= 3
    batch = Batch(ids, np.ones_like(ids), np.broadcast_to(np.arange(8, dtype=np.int32), ids.shape), np.broadcast_to(targets, ids.shape), 0)

    def repeated(number):
        while True:
            yield batch

    config = TrainConfig(steps=60, batch_size=24, sequence_tokens=8, warmup_steps=5, learning_rate=3e-3, log_every_steps=20)
    model = training.train(random_model(), config, batches_from=repeated, run_dir=tmp_path)
    assert lines(tmp_path)[-1]["token_accuracy"] > 0.95
    logits = reference_logits(model, ids, [np.array(Reference(row, VOCAB).mask()) for row in ids])
    assert np.mean(np.argmax(logits[:, 2:-1], axis=-1) == ids[:, 3:]) > 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "steps is 0"),
        (dict(accumulation_steps=3), "accumulation_steps is 3; allowed: divisors of batch_size=4"),
        (dict(warmup_steps=-1), "warmup_steps is -1; allowed: 0 to"),
        (dict(steps=2**31), "steps is 2147483648; allowed: numbers above 0, up to 2,147,483,647"),
        (dict(seed=2**63), "seed is 9223372036854775808; allowed: 0 to 9,223,372,036,854,775,807"),
        (dict(learning_rate=float("inf")), "learning_rate is inf"),
        (dict(gap_scales=()), "gap_scales"),
        (dict(beta2=1.0), "beta2 is 1.0"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_the_schedule_warms_up_and_decays():
    schedule = training.learning_rate(TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0))
    rates = [schedule(np.float32(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 0.51, 0.02], atol=1e-6)


def test_a_run_shorter_than_twice_its_warmup_warms_up_for_a_tenth_of_it():
    """So that --steps 30 is all that a short run needs; the peak is reached in any case."""
    for steps, warmup in ((30, 3), (399, 39), (400, 200), (8000, 200), (5, 0)):
        config = TrainConfig(steps=steps, warmup_steps=200, learning_rate=1.0)
        rates = np.asarray(training.learning_rate(config)(np.arange(steps, dtype=np.float32)))
        assert config.warmup == warmup == np.argmax(rates) and rates.max() == 1


def test_optimizer_state_is_float32():
    _, state = training.initial_state(random_model(compute_dtype="bfloat16"), CONFIG)
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {np.dtype("float32")}
