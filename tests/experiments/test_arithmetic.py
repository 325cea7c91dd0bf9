"""The report of the arithmetic experiments: the page says what the stored results say, and results that do not fit are refused."""

import copy
import json
import re
from dataclasses import asdict

import pandas as pd
import pytest
from PIL import Image

from data import arithmetic
from experiments import arithmetic as report
from experiments.pages import Tally
from selfspan_jax.config import PRESETS, TUNING_PRESETS
from tests.experiments import reports

SMALL = PRESETS["arithmetic-small"]
CORPORA = {"small": asdict(arithmetic.Corpus(**SMALL.corpus)), "tuned": asdict(arithmetic.Corpus(**TUNING_PRESETS["arithmetic"].corpus))}
RUN = json.loads(json.dumps({"model": asdict(SMALL.model), "training": asdict(SMALL.training), "corpus": CORPORA["small"]}))
PAGE = "".join(
    f"<!-- {name} -->\n<!-- end -->\n"
    for name in ("variants", "targets", "range", "long", "errors", "speed", "training", "not run", "commands")
)


def run_of(variant, seed):
    run = {name: copy.deepcopy(RUN[name]) for name in ("model", "training", "corpus")}
    run["training"]["seed"] = seed
    run["corpus"]["label_jumps"] = 0
    if variant != "span":
        run["model"]["mask"] = "dense"
    if variant == "long":
        run["corpus"] |= {"labelling": "plain", "max_ops": 200}
        run["training"] |= {"sequence_tokens": 4096, "batch_size": 16, "gap_scales": [0]}
    return run


def tuned_run_of(variant, seed):
    return reports.tuned_run("arithmetic", CORPORA["tuned"], seed, mask="dense" if variant.endswith("dense") else "span")


def evaluation(scores, rates=((8, 10.0),)):
    """As `decode.py eval --json` writes it; `scores`: by number of operators, right ones of 10; `rates`: by batch size."""

    def speeds(right):
        return [{"batch_size": size, "problems_per_second": rate, "decode_seconds": right / rate} for size, rate in rates]

    rows = {}
    for ops, right in scores.items():
        accuracies = dict.fromkeys(("answer_accuracy", "step_accuracy", "span_accuracy"), right / 10)
        errors = {"refs": 10 - right} if right < 10 else {}
        rows[str(ops)] = accuracies | {"num_examples": 10, "attended_tokens": 30.0, "attended_fraction": 0.1, "first_errors": errors}
    sets = {name: {"context_tokens": 100.0, "by_batch_size": speeds(scores[int(name)])} for name in rows}
    device = {"device": "some GPU", "jax": "1.0", "num_parameters": 1000, "seed": 1, "attention": "span"}
    return {**device, "by_ops": rows, "sets": sets, "first_wrong": None}


@pytest.fixture
def place(tmp_path):
    """A function that writes raw results: of a variant and seed, what kind by what values."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "out.md").write_text(PAGE)

    def write(variant, seed, **kinds):
        for kind, values in {"run": run_of(variant, seed), **kinds}.items():
            (tmp_path / "raw" / f"{variant}-{seed}.{kind}.json").write_text(json.dumps(values))
        return tmp_path

    return write


def test_seeds_are_pooled_and_their_spread_is_told(place, call):
    place("span", 0, range=evaluation({2: 10, 3: 10}), long=evaluation({50: 9}))
    place("span", 1, range=evaluation({2: 10, 3: 8}), long=evaluation({50: 10, 100: 10}))
    path = place("dense", 0, range=evaluation({2: 10, 3: 10}))
    assert call(report.main, path / "out", "--take", path / "raw", "--commit", "abc")[0] == 0
    page = (path / "out.md").read_text()
    # Wilson's interval of 38 of 40 and 20 of 20, as published calculators give it.
    assert re.search(r"`span` \| 2-3 \| 40 \| 38 \| 38 \| 83.5 \| 98.6 \| 90.0 \| 100.0 \| \d+ \|", page)
    assert re.search(r"`dense` \| 2-3 \| 20 \| 20 \| 20 \| 83.9 \| 100.0 \| - \| - \| \d+ \|", page)
    assert "spread | 90.00 | 95.00 | yes |" in page  # 5 points below, the seeds differ by 10
    assert "| `span` | 50 | 20 | 0 | 0 | 1 | 0 | 0 |" in page and "| `span` | 2-3 | 40 | 0 | 0 | 2 | 0 | 0 |" in page
    assert "- `plain` (text without span tokens, dense mask): not trained" in page and "- `long`" in page
    assert "- length generalization: `dense` with seed 0\n- right answers per second: all\n" in page
    assert "python train.py arithmetic-small --run-dir runs/dense-0 --mask dense --label-jumps 0\n" in page
    assert "python train.py arithmetic-small --run-dir runs/span-1 --label-jumps 0 --seed 1\n" in page
    assert "eval runs/span-1/model --seed 1 --num-examples 10 --ops 50,100 --batch-size 8\n" in page
    assert "| `span` | 100 |" not in page  # of one seed only
    assert "commit abc" in page and not (path / "out" / "speed.png").exists()


def test_right_examples_are_counted_from_their_share():
    """0.29 of 100 is 28.999999999999996 in floating point."""
    tally = Tally.of(pd.DataFrame({"seed": [0], "num_examples": [100], "accuracy": [0.29]}), "accuracy")
    assert (tally.right, tally.num_examples, tally.by_seed) == (29, 100, (0.29,))


def test_speed_is_compared_at_the_batch_that_is_best_for_each(place, call):
    place("span", 0, speed={**evaluation({20: 10, 200: 10}, [(8, 50.0), (16, 70.0)]), "passes": 3, "num_too_long": 4})
    path = place("long", 0, speed=evaluation({20: 10, 200: 8}, [(8, 20.0), (16, 10.0)]))
    assert call(report.main, path / "out", "--take", path / "raw", "--commit", "abc")[0] == 0
    page = (path / "out.md").read_text()
    # The control answers 25 a second and 20 of them right.
    assert re.search(r"`span` \| 200 \| .* \| 70.0 \| 70.0 \| 16 \| 3.50 \| 2.80 \|", page)
    assert re.search(r"`long` \| 200 \| 100 \| 10 \| 8 \| 20.0 \| 25.0 \| 8 \| - \| - \|", page)
    assert "at 200 operators, over `long` | 3.00 | 3.50 | yes |" in page
    assert "--num-examples 12 --ops 20,200 --batch-size 8,16 --passes 3\n" in page  # four were left out
    assert "--ops 20,200 --batch-size 8,16\n" in page
    assert "(out/speed.png)" in page
    assert (path / "out" / "speed.png").exists()


def test_a_curve_is_reduced_to_its_means_and_its_time(place, call):
    path = place("span", 0)
    row = {"tokens_per_second": 1000.0, "input_wait_fraction": 0.01, "mfu": 0.5}
    lines = [{"step": 10 * i, "loss": 1.0 + i % 2, "steps_per_second": 5.0 if i > 1 else 1.0, **row} for i in range(1, 401)]
    text = "\n".join(map(json.dumps, [*lines, {"step": 4000, "eval/step_accuracy": 1.0}]))
    (path / "raw" / "span-0.metrics.jsonl").write_text(text)
    assert call(report.main, path / "out", "--take", path / "raw", "--commit", "abc")[0] == 0
    curve = json.loads((path / "out" / "span-0.curve.json").read_text())
    assert len(curve["step"]) == 100 and curve["step"][-1] == 4000 and set(curve["loss"]) == {1.5}
    assert curve["seconds"] == pytest.approx(10 + 399 * 2)
    assert "| `span` | 0 | 4,000 | 128 | 512 | 808 | 1,000 | 50.0 | 1.0 | 1.5 |" in (path / "out.md").read_text()
    # Taken again, nothing changes.
    before = {file: file.read_bytes() for file in (path / "out").glob("*.json")}
    assert call(report.main, path / "out", "--take", path / "raw", "--commit", "def")[0] == 0
    assert before == {file: file.read_bytes() for file in (path / "out").glob("*.json")}


def test_fine_tuned_models_are_reported_beside_the_others(place, call):
    path = place("span", 0, range=evaluation({2: 10, 3: 10}))
    assert call(report.main, path / "out", "--take", path / "raw", "--commit", "abc")[0] == 0
    with Image.open(path / "out" / "accuracy.png") as image:
        narrow = image.size[0]
    place("smollm2", 0, run=tuned_run_of("smollm2", 0), range=evaluation({2: 10, 3: 9}), long=evaluation({20: 10, 50: 4}))
    place("smollm2_dense", 2, run=tuned_run_of("smollm2_dense", 2), range=evaluation({2: 10, 3: 10}))
    assert call(report.main, path / "out", "--take", path / "raw", "--commit", "abc")[0] == 0
    page = (path / "out.md").read_text()
    tuned = "--init SmolLM2-135M-Instruct.Q4_1.gguf --corpus arithmetic"
    assert f"| `smollm2` | SmolLM2-135M, LoRA, span mask | `finetune-lora {tuned}` | 1 | some |" in page
    assert f"python train.py finetune-lora --run-dir runs/smollm2-0 {tuned}\n" in page
    assert f"python train.py finetune-lora --run-dir runs/smollm2_dense-2 {tuned} --mask dense --seed 2\n" in page
    assert re.search(r"`smollm2` \| 50 \| 10 \| 4 \| 4 \| 16.8 \| 68.7 \|", page) and "| `smollm2` | 2-3 | 20 | 19 |" in page
    assert "| `smollm2` | 0 | 1,500 | 64 | 512 | - |" in page
    assert re.search("^- length generalization: all but `smollm2` with seed 0$", page, re.MULTILINE)
    assert "smollm2" not in page[page.index("<!-- targets") : page.index("<!-- range")]  # no target was set for them
    with Image.open(path / "out" / "accuracy.png") as image:
        assert image.size[0] > narrow  # a panel of their own


def _remove(file):
    def change(path):
        (path / file).unlink()

    return change


def _rewrite(file, text):
    def change(path):
        (path / file).write_text(text)

    return change


BAD = {
    "no run": (_remove("raw/span-0.run.json"), "span-0.run.json: missing, beside range of the same variant and seed"),
    "no JSON": (_rewrite("raw/span-0.range.json", '{"by_ops"'), "span-0.range.json: not JSON"),
    "another version": (_rewrite("raw/span-0.range.json", '{"seed": 1}'), "has no 'attention'; not written by this version"),
    "another seed": (_rewrite("raw/span-0.run.json", json.dumps(run_of("span", 4))), "span-0.run.json: is of seed 4"),
    "another variant": (_rewrite("raw/dense-0.run.json", json.dumps(run_of("span", 0))), "mask is span, but dense in this variant"),
    "no such variant": (_rewrite("raw/spam-0.run.json", "{}"), "of an unknown variant; allowed: leaf_jumps, span, "),
    "a training without steps": (_rewrite("raw/span-0.metrics.jsonl", ""), "has no step"),
    "no page": (_remove("out.md"), "out.md: no such page"),
    "a page without tables": (_rewrite("out.md", "# Arithmetic"), "not just one `<!-- variants -->` line"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_said_in_one_line(place, call, change, message):
    path = place("span", 0, range=evaluation({2: 10}))
    change(path)
    status, _, err = call(report.main, path / "out", "--take", path / "raw", "--commit", "abc")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_two_runs_of_one_variant_and_seed_that_differ_are_refused(place, call):
    path = place("span", 0, range=evaluation({2: 10}))
    assert call(report.main, path / "out", "--take", path / "raw", "--commit", "abc")[0] == 0
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.parent.name != "raw"}
    place("span", 0, range=evaluation({2: 9}), long=evaluation({50: 9}))
    status, _, err = call(report.main, path / "out", "--take", path / "raw", "--commit", "abc")
    assert status == 2 and "span-0.range.json: another run of the same variant and seed is in" in err and err.count("\n") == 1
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.parent.name != "raw"}
    for arguments in ([path / "none"], [path / "out", "--take", path / "raw"], [path / "out", "--take", path / "none", "--commit", "a"]):
        status, _, err = call(report.main, *arguments)
        assert status == 2 and err.count("\n") == 1
