"""The report of the news experiments: the page says what the stored results say, also where there are none."""

import copy
import itertools
import json
import re
from dataclasses import asdict

import pytest
from flax import nnx
from PIL import Image

from data import news
from data.vocab import train_vocab
from experiments import news as report
from selfspan_jax import evaluation
from selfspan_jax.config import PRESETS, ModelConfig
from selfspan_jax.lm import SpanLM
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab
from tests.experiments.reports import take, tuned_run

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_size": 16}
PAGE = "".join(
    f"<!-- {name} -->\n<!-- end -->\n"
    for name in ("variants", "targets", "scores", "own", "reading", "speed", "training", "not run", "commands")
)


def run_of(variant, seed):
    """As train.py writes it (test_results.py compares with train.py itself)."""
    changes = {"mask": "dense"} if variant.endswith("dense") else {"header_view": "prompt"} if variant == "prompt" else {}
    if variant.startswith("smollm2"):
        return tuned_run("news", asdict(news.Corpus()), seed, **changes)
    preset = PRESETS["news-small"]
    run = {"model": asdict(preset.model) | changes, "data": None, "training": asdict(preset.training) | {"seed": seed}}
    return json.loads(json.dumps(run | {"corpus": asdict(news.Corpus())}))


@pytest.fixture(scope="module")
def written():
    """What `decode.py eval --json` writes of news, of the smallest model that there is."""
    corpus = news.Corpus(max_events=2, max_distractors=0)
    task = news.NewsTask(train_vocab(["A fire at the Oakton warehouse injured 14 people."], vocab_tokens=300, num_labels=64))
    config = ModelConfig(**SIZES, header_view="all", prompt_view="causal", compute_dtype="float32")
    lm = SpanLM(Decoder(config, vocab=SpanVocab(**task.vocab.span_ids()), vocab_size=task.vocab.size, rngs=nnx.Rngs(0)), task)
    examples = list(itertools.islice(corpus.stream(vocab=task.vocab, seed=1, split="test"), 2))
    settings = {"num_examples": 2, "ops": (), "seed": 1, "batch_size": (2,), "mesh": None, "checkpoint": "model"}
    values = evaluation.report(lm, evaluation.evaluate_all(lm, {"synthetic": examples}, batch_sizes=(2,)), settings)
    return json.loads(json.dumps(values))


@pytest.fixture
def place(tmp_path, written):
    """A function that writes raw results of a variant and seed: an evaluation with some values changed; `rates`: by batch size."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "out.md").write_text(PAGE)

    def write(variant, seed=0, rates=((64, 10.0),), **changes):
        values = copy.deepcopy(written) | {"num_examples": 100, "all_facts_right": 0.5, "device": "some GPU", "jax": "1.0"} | changes
        timed = values["by_batch_size"][0]
        values["by_batch_size"] = [
            timed | {"batch_size": size, "summaries_per_second": rate, "response_tokens_per_second": 50 * rate} for size, rate in rates
        ]
        (tmp_path / "raw" / f"{variant}-{seed}.run.json").write_text(json.dumps(run_of(variant, seed)))
        (tmp_path / "raw" / f"{variant}-{seed}.eval.json").write_text(json.dumps(values))
        return tmp_path

    return write


@pytest.fixture
def trained(tmp_path, written):
    """A function that writes the run of a variant and its metrics, with an evaluation at step 10 and one at step `last` of 20."""

    def write(variant, rouge, last=20, **changes):
        scores = {key: value for key, value in written.items() if isinstance(value, float | int)} | {
            "num_examples": 8,
            "all_facts_right": 0.5,
        }
        evaluation = {f"eval/{key}": value for key, value in (scores | {"rougeL": rouge} | changes).items()}
        step = {"loss": 1.0, "steps_per_second": 2.0, "tokens_per_second": 3.0, "input_wait_fraction": 0.0}
        rows = [{"step": 10, **step}, {"step": 10, **evaluation, "eval/rougeL": 0.1}, {"step": 20, **step}, {"step": last, **evaluation}]
        (tmp_path / "raw" / f"{variant}-0.metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "raw" / f"{variant}-0.run.json").write_text(json.dumps(run_of(variant, 0)))
        return tmp_path

    return write


def width(file):
    with Image.open(file) as image:
        return image.size[0]


READS = "of the context, body tokens attend to less than"


def rows_of(page, section):
    """Cells of a section's table, by its first cell."""
    (text,) = re.findall(rf"<!-- {section} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    return {cells[0]: cells[1:] for line in text.splitlines() if line.startswith("|") if (cells := line.strip("| ").split(" | "))}


def test_an_evaluation_of_an_untrained_model_is_taken_as_it_was_written(written, tmp_path, call):
    """Whatever `evaluation.report` names, also where there is nothing to take a mean of."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "out.md").write_text(PAGE)
    nothing = {"attended_fraction_header": None, "attended_tokens_header": None, "attended_fraction_body": None, "header_share": 0.0}
    for seed, values in enumerate([written, written | nothing]):
        (tmp_path / "raw" / f"span-{seed}.run.json").write_text(json.dumps(run_of("span", seed)))
        (tmp_path / "raw" / f"span-{seed}.eval.json").write_text(json.dumps(values))
    page = take(report, tmp_path, call)
    assert f"{100 * written['attended_fraction_body']:.1f}%" == rows_of(page, "reading")["`span`"][0]
    assert rows_of(page, "scores")["`span`"][0] == "4"
    assert "first" not in json.loads((tmp_path / "out" / "span-0.eval.json").read_text())


@pytest.mark.parametrize(("span", "control"), [("span", "dense"), ("smollm2", "smollm2_dense")])
def test_targets_are_judged_against_the_control_of_the_same_kind(place, call, span, control):
    other = "smollm2" if span == "span" else "span"
    path = place(span, rougeL=0.7021, attended_fraction_body=0.249)
    place(other, rougeL=0.9, attended_fraction_body=0.9)
    targets = rows_of(take(report, path, call), "targets")
    assert targets[f"`{span}`: ROUGE-L less than 0.5 below that of `{control}`"] == ["-", "-", "not run"]
    place(control, rougeL=0.7070, attended_fraction_body=1.0)
    targets = rows_of(take(report, path, call), "targets")
    assert targets[f"`{span}`: ROUGE-L less than 0.5 below that of `{control}`"] == ["70.20", "70.21", "yes"]
    assert targets[f"`{span}`: {READS}"] == ["25%", "24.9%", "yes"] and targets[f"`{other}`: {READS}"] == ["25%", "90.0%", "**no**"]


def test_targets_that_are_missed_are_said_to_be(place, call):
    path = place("span", rougeL=0.7019, attended_fraction_body=0.25)
    place("dense", rougeL=0.7070)
    targets = rows_of(take(report, path, call), "targets")
    assert targets["`span`: ROUGE-L less than 0.5 below that of `dense`"] == ["70.20", "70.19", "**no**"]
    assert targets[f"`span`: {READS}"] == ["25%", "25.0%", "**no**"]


def test_a_runs_own_evaluation_stands_in_where_a_control_has_no_other(place, trained, call):
    """The last one of metrics.jsonl, and only if it is of the last step."""
    path = place("span", rougeL=0.7100)
    trained("span", 0.7000)
    trained("dense", 0.7040, attended_fraction=1.0)
    trained("prompt", 0.9, last=10)
    page = take(report, path, call)
    assert rows_of(page, "targets")["`span`: ROUGE-L less than 0.5 below that of `dense`"] == ["69.90", "70.00", "yes"]
    own = rows_of(page, "own")
    assert own.keys() == {"variant", "---", "`span`", "`dense`"} and "`dense`" not in rows_of(page, "scores")
    cells = dict(zip(own["variant"], own["`dense`"], strict=True))
    assert (cells["summaries"], cells["ROUGE-L"], cells["attended, of the context"]) == ("8", "70.4", "100.0%")
    assert cells["all facts right"] == "4" and "- scores, reading and speed: all but `span` with seed 0\n" in page


def test_scores_are_means_over_seeds_and_summaries_are_pooled(place, call):
    place("span", 0, rouge1=0.5, rougeL=0.625, all_facts_right=0.98, num_examples=100, attended_tokens_body=40.0)
    path = place("span", 1, rouge1=0.5, rougeL=0.5, all_facts_right=0.9, num_examples=200, attended_tokens_body=50.0)
    place("dense", fact_accuracy=0.123, finished_fraction=1.0, header_share=0.25)
    page = take(report, path, call)
    head, span, dense = (rows_of(page, "scores")[name] for name in ("variant", "`span`", "`dense`"))
    cells = dict(zip(head, span, strict=True))
    assert cells["summaries"] == "300" and cells["ROUGE-1"] == "50.0" and cells["ROUGE-L"] == "56.2"
    # Wilson's interval of 278 of 300, as published calculators give it.
    assert [cells[f"all facts right{more}"] for more in ("", ", 95% from, %", ", 95% to, %")] == ["278", "89.1", "95.1"]
    cells = dict(zip(head, dense, strict=True))
    assert cells["fact accuracy"] == "12.3%" and cells["finished"] == "100.0%"
    assert rows_of(page, "reading")["`span`"][1] == "45.0" and rows_of(page, "reading")["`dense`"][-1] == "25.0%"
    assert "- `prompt`" in page and "- scores, reading and speed: " not in page


def test_speed_is_compared_at_the_batch_that_is_best_for_each(place, call):
    place("span", rates=[(64, 10.0), (256, 60.0), (1000, 50.0)])
    place("smollm2", rates=[(64, 10.0)])
    place("smollm2", 1, rates=[(64, 20.0), (128, 50.0)])
    path = place("dense", rates=[(64, 40.0), (256, 30.0)])
    page = take(report, path, call)
    lines = [line for line in page.splitlines() if re.match(r"\| `\w+` \| \d+ \| [\d.]+ \| [\d,]+ \| \S", line)]
    assert lines[:3] == [
        "| `span` | 64 | 10.0 | 500 | - |",
        "| `span` | 256 | 60.0 | 3,000 | 1.50x `dense` |",
        "| `span` | 1000 | 50.0 | 2,500 | - |",
    ]
    assert [line.split(" | ")[-1] for line in lines[3:]] == ["- |"] * 3
    assert lines[-1] == "| `smollm2` | 64 | 15.0 | 750 | - |"  # at what both seeds were timed at
    assert "python decode.py eval runs/span-0/model --seed 1 --num-examples 100 --batch-size 64,256,1000\n" in page
    assert "python train.py news-small --run-dir runs/dense-0 --mask dense\n" in page
    smollm2 = "--init SmolLM2-135M-Instruct.Q4_1.gguf --corpus news"
    assert f"python train.py finetune-lora --run-dir runs/smollm2-0 {smollm2}\n" in page
    assert "# span, seed 0: trained at commit abc, evaluated on one some GPU, JAX 1.0" in page


def test_fine_tuned_models_have_a_panel_of_their_own(place, trained, call):
    path = place("span")
    assert "scores.png" not in take(report, path, call) and not list(path.rglob("*.png"))
    trained("span", 0.5)
    assert "(out/scores.png)" in take(report, path, call) and (path / "out" / "loss.png").exists()
    one = width(path / "out" / "scores.png")
    trained("smollm2", 0.5)
    take(report, path, call)
    assert width(path / "out" / "scores.png") > one


BAD = {
    "an evaluation of expressions": ({"by_ops": {}}, ["rouge1"], "span-0.eval.json: has no 'rouge1'; not written by this version"),
    "news without facts": ({}, ["fact_accuracy"], "span-0.eval.json: has no 'fact_accuracy'"),
    "rates without a batch": ({"by_batch_size": [{}]}, [], "span-0.eval.json: has no 'batch_size'"),
    "no rates": ({"by_batch_size": [7]}, [], "span-0.eval.json: found int in place of an object"),
}


@pytest.mark.parametrize(("changes", "without", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_said_in_one_line(written, place, call, changes, without, message):
    path = place("span")
    values = {key: value for key, value in (written | changes).items() if key not in without}
    (path / "raw" / "span-0.eval.json").write_text(json.dumps(values))
    status, _, err = call(report.main, path / "out", "--take", path / "raw", "--commit", "abc")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (path / "out").exists()
