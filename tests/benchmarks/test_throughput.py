"""Which prompts a queue has, and what is reported of it at each number of places."""

import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import systems, throughput
from selfspan_jax.errors import UserError
from selfspan_jax.evaluation import MARGIN_TOKENS
from selfspan_jax.serving.requests import Stats, Tokens
from tests.selfspan_jax.models import Digits

PARTS = {"validation": [(8, 5), (3, 4), (9, 2)], "train": [(7, 90), (8, 1), (30, 1)]}  # digits of each prompt, tokens of its gold response
LM = types.SimpleNamespace(
    task=Digits(), model=types.SimpleNamespace(config=types.SimpleNamespace(max_context_tokens=40, mask="span"), num_parameters=7)
)


@pytest.fixture
def queue(monkeypatch):
    def stored(directory, task, tasks, number, split):
        own = [types.SimpleNamespace(prompt="4" * digits, response_ids=[0] * new) for digits, new in PARTS[split]]
        return task, {directory.name: own[:number]}, {"warnings": [f"{split} is known by heart"]}

    monkeypatch.setattr(throughput.examples, "stored", stored)
    monkeypatch.setattr(systems.SpanLM, "load", lambda *_, **__: LM)
    return lambda **options: throughput.Throughput(checkpoint=Path("model"), data=Path("corpora/digits"), **options)


CASES = {  # options -> digits of the prompts, in order of size, and how many each part gave
    "one part": (dict(split=("validation",)), [3, 8, 9], {"of_validation": 3}),
    "the train part after it, whose gold responses set no limit; one prompt leaves no room": (
        dict(split=("validation", "train")),
        [3, 7, 8, 8, 9],
        {"of_validation": 3, "of_train": 2},
    ),
    "long ones alone": (dict(split=("validation", "train"), min_prompt_tokens=11), [9], {"of_validation": 1, "of_train": 0}),
    "those without room take no other's place": (
        dict(split=("train", "validation"), num_requests=3, max_new_tokens=20),
        [7, 8, 8],
        {"of_train": 2, "of_validation": 1},
    ),
    "as many as are wanted, those of the first part first": (
        dict(split=("validation", "train"), num_requests=4),
        [3, 7, 8, 9],
        {"of_validation": 3, "of_train": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_queue_has_the_prompts_of_its_parts_that_leave_room(case, queue):
    options, digits, numbers = CASES[case]
    work, drawn = throughput.queue(queue(**options), LM)
    assert sorted(len(item.prompt_ids) - 2 for item in work) == digits
    assert {name: value for name, value in drawn.items() if name.startswith("of_")} == numbers and drawn["data"] == "digits"
    assert set(drawn["warnings"]) >= {f"{part} is known by heart" for part in PARTS if numbers.get(f"of_{part}")}
    longest = max(new for digits, new in PARTS["validation"] if digits + 2 >= options.get("min_prompt_tokens", 1))
    assert {item.new_tokens for item in work} == {options.get("max_new_tokens", longest + MARGIN_TOKENS)}


def test_a_queue_is_in_random_order_or_has_its_longest_prompts_first(queue):
    found = {}
    for order, seed in (("random", 0), ("random", 3), ("longest", 0)):
        work, _ = throughput.queue(queue(split=("validation", "train"), order=order, seed=seed), LM)
        found[order, seed] = [len(item.prompt_ids) - 2 for item in work]
    assert found["longest", 0] == [9, 8, 8, 7, 3] and sorted(found["random", 0]) == sorted(found["random", 3]) == [3, 7, 8, 8, 9]
    assert found["random", 0] != found["random", 3]


def test_rounds_of_a_queue_have_the_same_order(queue):
    once, _ = throughput.queue(queue(split=("validation", "train")), LM)
    thrice, drawn = throughput.queue(queue(split=("validation", "train"), rounds=3), LM)
    assert [item.prompt_ids.tolist() for item in thrice] == 3 * [item.prompt_ids.tolist() for item in once]
    assert (drawn["of_validation"], drawn["of_train"]) == (3, 2)


def test_places_that_no_prompt_fills_are_refused_before_anything_is_compiled(queue, monkeypatch):
    monkeypatch.setattr(LM, "engine", None, raising=False)
    with pytest.raises(UserError, match="--places has 9; allowed: up to the 6 prompts of the queue"):
        queue(places=(2, 9), rounds=2).run()


@pytest.mark.parametrize("min_prompt_tokens, reason", [(100, "of 100 tokens or more"), (30, "leaves room for 17 new ones")])
def test_a_queue_without_prompts_is_refused(min_prompt_tokens, reason, queue):
    with pytest.raises(UserError, match=reason):
        throughput.queue(queue(split=("train",), min_prompt_tokens=min_prompt_tokens), LM)


@pytest.mark.parametrize("name", ["prefill_tokens", "min_read_tokens", "chunk_tokens", "places", "rounds", "seed", "split"])
def test_sizes_that_cannot_be_are_refused_before_a_model_is_loaded(name):
    value = {"places": (2, 0), "seed": -1, "split": ("train", "train")}.get(name, 0)
    with pytest.raises(ValueError, match=f"{name} is"):
        throughput.Throughput(checkpoint=Path("none"), data=Path("none"), **{name: value})


class Rounds:
    """A scheduler that gives each request a token in each round; `broken`: the device fails at the first."""

    def __init__(self, broken=False):
        self.config, self.broken, self.running, self.written = types.SimpleNamespace(page_tokens=8), broken, [], 0

    @property
    def stats(self):
        return Stats(generated_tokens=self.written, context_tokens=1 + self.written)

    def submit(self, request, deliver):
        self.running.append((request.max_new_tokens, deliver))

    def run_once(self):
        for left, deliver in self.running:
            self.written += 1
            ends = "length" if left == 1 else None
            deliver(Tokens.none("error", "out of memory") if self.broken else Tokens(np.array([4]), np.array([1]), ends))
        self.running = [] if self.broken else [(left - 1, deliver) for left, deliver in self.running if left > 1]
        return bool(self.running)


def test_a_device_that_fails_is_an_error_and_no_rate():
    work = [systems.Work(np.array([4]), new) for new in (1, 3, 4, 2, 5)]
    assert systems.run_at_once(Rounds(), work)["generated_tokens"] == 15
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        systems.run_at_once(Rounds(broken=True), work)


def test_rates_are_of_the_queue_and_not_of_the_warm_up(queue, monkeypatch, tmp_path, capsys):
    sizes = []

    def run_at_once(scheduler, work):
        sizes.append((scheduler.config.num_sequences, len(work)))
        assert len({id(item) for item in work}) == len(work) and scheduler.config.reads_per_chunk is None
        of_all = {"generated_tokens": 10 * len(work), "attended_tokens": 70 * len(work), "finished": {"stop": 2, "length": 1}}
        of_all |= {"prompt_tokens": 30, "prefix_hit_tokens": 10}
        return {"seconds": 2.0 * scheduler.config.num_sequences, "tokens": 1} | of_all

    def scheduler(engine, config, **_):
        assert config.context_tokens == 11 + 5 + MARGIN_TOKENS
        return types.SimpleNamespace(config=config, num_pages=6, warm_up=lambda **options: sizes.append("compiled"))

    monkeypatch.setattr(systems, "Scheduler", scheduler)
    monkeypatch.setattr(throughput, "run_at_once", run_at_once)
    monkeypatch.setattr(systems, "report_header", lambda: {"device": "cpu", "jax": "0"})
    monkeypatch.setattr(throughput, "header_line", lambda report: report["device"])
    monkeypatch.setattr(throughput, "_WARM_UPS", 2)
    monkeypatch.setattr(LM, "engine", None, raising=False)
    monkeypatch.setattr(LM, "end_ids", (2,), raising=False)
    queue(places=(2, 3), json=tmp_path / "found.json").run()
    assert sizes == ["compiled", (2, 2), (2, 3), "compiled", (3, 2), (3, 3)]
    report = json.loads((tmp_path / "found.json").read_text())
    names = ("places", "cache_tokens", "responses_per_second", "mean_response_tokens", "mean_attended_tokens", "ended_fraction")
    names += ("prefix_hit_fraction",)
    found = [[row[name] for name in names] for row in report["rows"]]
    np.testing.assert_allclose(found, [(2, 384, 3 / 4, 10, 7, 2 / 3, 1 / 4), (3, 384, 3 / 6, 10, 7, 2 / 3, 1 / 4)])
    assert (report["data"], report["num_requests"], report["mean_prompt_tokens"], report["most_prompt_tokens"]) == ("digits", 3, 26 / 3, 11)
    told = capsys.readouterr().out
    assert "warning: validation is known by heart" in told
    assert "2 places:     0.8 responses/s, of 10 tokens that read 7 each, 66.7% ended" in told
    assert "25.0% of the prompts' tokens found in the cache" in told
