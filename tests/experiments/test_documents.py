"""The reports of documents: the pages say what the stored results say, also where there are none."""

import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from data import dataset
from data.__main__ import main as data_main
from data.alignment import Alignment
from data.documents import Corpus
from data.tasks import TASKS
from experiments import documents
from experiments.results import Run
from selfspan_jax import evaluation
from selfspan_jax.attention.policies import get_policy
from selfspan_jax.config import ModelConfig
from selfspan_jax.spans import SpanVocab
from selfspan_jax.viewing.output import Output
from tests.data import layouts
from tests.experiments.reports import rows_of, take, tuned_run
from tests.selfspan_jax.models import TINY

STORIES = SimpleNamespace(main=lambda: documents.main(["stories", *sys.argv[1:]]))
TABLES = ("scores", "differences", "sources", "lengths", "reading", "speed", "times", "sets")
SECTIONS = ("variants", "targets", *(f"stories {name}" for name in TABLES))
PAGE = "".join(f"<!-- {name} -->\n<!-- end -->\n" for name in (*SECTIONS, "training", "not run", "commands"))
FILES = {
    "seed": (".eval.json", lambda values: values.pop("by_example"), "has no 'by_example'; not written by this version"),
    "arm": (
        ".run.json",
        lambda values: values["attention"].update(mask="dense", header_view="all"),
        "header_view is all, but labels in this",
    ),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root = tmp_path_factory.mktemp("stories")
    options = ["--vocab-tokens", "400", "--num-labels", "64", "--max-prompt-tokens", "600", "--split", "validation"]
    data_main(["stories", "--source", str(layouts.write_stories(root / "source")), *options, "--out", str(root / "stories")])
    return dataset.load(root / "stories", TASKS)


def written(stored, responses, sources="model"):
    """What `decode.py eval --json` writes of given responses."""
    task, examples = stored.task, [stored.task.renumber(example) for example in stored]
    config, vocab, outputs = ModelConfig(**TINY, header_view="labels"), SpanVocab(**task.vocab.span_ids()), []
    for example, response in zip(examples, responses(examples), strict=True):
        ids = task.encode_prompt(example.prompt)
        token_ids = np.concatenate([ids, response]).astype(np.int32)
        outputs.append(Output(task, token_ids, len(ids), np.full(len(response), 10), get_policy("span"), config, vocab, example.prompt))
    own = evaluation.Evaluation(task, tuple(examples), tuple(outputs), 16, decode_seconds=2.0, compile_seconds=1.0)
    lm = SimpleNamespace(task=task, model=SimpleNamespace(config=config, num_parameters=7))
    settings = {"checkpoint": "model", "passes": 1, "data": "stories", "split": "validation"}
    settings |= {} if sources == "model" else {"sources": sources}
    return json.loads(json.dumps(evaluation.report(lm, {"stories": [own]}, settings)))


@pytest.fixture
def place(tmp_path):
    """A function that writes raw results of a variant and seed: its run, and evaluations by kind."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "out.md").write_text(PAGE)
    views = {"dense": {"mask": "dense"}, "labels": {}}

    def write(arm, seed=0, **evaluations):
        corpus = asdict(Corpus()) | asdict(Alignment())
        name = f"stories_{arm}-{seed}"
        run = tuned_run("documents", corpus, seed, **views[arm])
        run["lora"] |= {"rank": 20, "alpha": 40.0}
        run["training"] |= {"source_weight": 3.0, "end_weight": 3.0}
        (tmp_path / "raw" / f"{name}.run.json").write_text(json.dumps(run))
        for kind, values in evaluations.items():
            (tmp_path / "raw" / f"{name}.{kind}.json").write_text(json.dumps(values))
        return tmp_path

    return write


def scored(values, counts, tokens, seconds=1.0, **changes):
    """The same evaluation with other examples: of each the sum and the weight of ROUGE-L and of the sections named."""
    digests, pairs = (
        [f"d{i}" for i in range(len(counts))],
        {"rougeL": [[own, 1] for own, _ in counts], "section_named": [own for _, own in counts]},
    )
    timed = values["by_batch_size"][0] | {"responses_per_second": 1 / seconds}
    return values | {"by_example": {"digests": digests, "prompt_tokens": tokens, "counts": pairs}, "by_batch_size": [timed]} | changes


def test_an_evaluation_is_taken_as_it_was_written(stored, place, call):
    """Gold responses are right in all of it, empty ones in nothing: the difference is everything, whatever is drawn. They have no
    precision, since they name nothing.
    """
    gold, nothing = (written(stored, responses) for responses in (gold_responses, lambda examples: [[2]] * len(examples)))
    place("labels", eval=gold, bm25=gold | {"sources": "bm25", "num_too_long": 3})
    page = take(STORIES, place("dense", eval=nothing), call)
    names = [name.replace("_", " ") for names in TASKS["stories"].score_kinds.values() for name in names]
    assert [row[1] for row in rows_of(page, "stories differences")] == [name for name in names if name != "section precision"]
    assert {tuple(row[2:]) for row in rows_of(page, "stories differences")} == {("1", "`stories_dense`", "0.0", *["100.0"] * 3)}
    assert rows_of(page, "stories scores") == [
        ["`stories_labels`", "1", *["100.0"] * 8],
        ["`stories_dense`", "1", *["0.0"] * 6, "-", "0.0"],
    ]
    line = "decode.py eval runs/stories_labels-0/model --data corpora/stories --split validation --num-examples {} --batch-size 16{}\n"
    assert line.format(1, "") in page and line.format(4, " --sources bm25") in page  # three more were drawn, and left out
    train = "python train.py finetune-lora --run-dir runs/stories_labels-0 --init SmolLM2-135M-Instruct.Q4_1.gguf"
    options = "--rank 20 --alpha 40.0 --header-view labels --source-weight 3.0 --end-weight 3.0"
    assert f"{train} --corpus documents --data corpora/mixture {options}\n" in page


def gold_responses(examples):
    return [example.response_ids for example in examples]


def test_tables_by_hand(stored, place, call):
    """Two seeds are one: 0.6 of four examples; its control has three of them. Sections: 5 of 8 named, where BM25's are 6 of 8."""
    plain = written(stored, gold_responses)
    fast = {"seconds": 0.25, "attended_fraction_body": 0.12, "attended_fraction": 0.2}
    tokens = [2047, 2048, 4096, 8192]
    ours = [(0.5, (1, 2)), (0.7, (1, 2)), (0.5, (2, 2)), (0.5, (0, 2))], [(0.5, (1, 2)), (0.7, (2, 2)), (0.7, (2, 2)), (0.7, (1, 2))]
    given = scored(plain, [(0.4, (2, 2)), (0.5, (1, 2)), (0.5, (1, 2)), (0.5, (2, 2))], tokens, sources="bm25")
    place("labels", eval=scored(plain, ours[0], tokens, **fast), bm25=given)
    place("labels", 1, eval=scored(plain, ours[1], tokens, **fast))
    theirs = scored(plain, [(0.4, (0, 2)), (0.6, (0, 2)), (0.5, (0, 2))], tokens[:3])
    timed = theirs["by_batch_size"][0] | {"response_tokens_per_second": 100.0, "decode_seconds": 2.0, "prefill_seconds": 0.5}
    alone = {"num_examples": 10, "attended_tokens": 1000.0, "device": "NVIDIA H200", "by_batch_size": [timed]}
    page = take(STORIES, place("dense", eval=theirs | {"by_batch_size": []}, speed=theirs | alone), call)
    bound = 20 * (2 * theirs["num_parameters"] / 16 + 1000 * 2 * 30 * 3 * 64 * 2) / 4.8e9  # 20 tokens a response, in ms
    assert rows_of(page, "stories times") == [["`stories_dense`", "16", "20.0", "50.00", "150.00", f"{bound:.2f}"]]
    assert [row[:3] for row in rows_of(page, "stories scores")] == [["`stories_labels`", "4", "60.0"], ["`stories_dense`", "3", "50.0"]]
    assert ["`stories_labels`", "rougeL", "3", "`stories_dense`", "50.0", "10.0", "10.0", "10.0"] in rows_of(page, "stories differences")
    lengths = [row[1:5] for row in rows_of(page, "stories lengths") if row[0] == "`stories_labels`"]
    assert lengths == [
        ["below 2,048", "1", "50.0", "10.0"],
        ["2,048 to 4,095", "1", "70.0", "10.0"],
        ["4,096 to 8,191", "1", "60.0", "10.0"],
        ["8,192 and above, longer than trained", "1", "60.0", "-"],
    ]
    sources = [row[:6] for row in rows_of(page, "stories sources")]
    assert ["`stories_labels`", "bm25", "rougeL", "55.0", "47.5", "-7.5"] in sources  # of the seed that they were given to
    assert ["`stories_labels`", "bm25", "section named", "50.0", "75.0", "25.0"] in sources
    found = {row[0]: row[1:] for row in rows_of(page, "targets")}
    assert found["stories: rougeL minus that of dense, upper bound"] == ["at least 0", "10.00", "yes"]
    assert found["stories: section named minus that with BM25's sources given"] == ["at least 0", "-12.50", "**no**"]
    assert found["stories: of the context, text of responses reads"] == ["at most 12%", "12.0%", "yes"]
    assert found["stories: of the context, all tokens of responses reads"] == ["at most 10%", "20.0%", "**no**"]
    assert found["stories: responses a second, times those of dense"] == ["at least 2", "4.00", "yes"]
    assert found["stories: section named minus that of dense, upper bound"] == ["at least 0", "100.00", "yes"]
    assert found["stories: other scores below those of dense by more than their interval"] == ["none", "none", "yes"]


@pytest.mark.parametrize("case", FILES)
def test_what_does_not_fit_is_said_in_one_line(case, stored, place, call):
    path = place("labels", eval=written(stored, gold_responses))
    ending, change, message = FILES[case]
    file = path / "raw" / f"stories_labels-0{ending}"
    change(values := json.loads(file.read_text()))
    file.write_text(json.dumps(values))
    status, _, err = call(STORIES.main, path / "out", "--take", path / "raw", "--commit", "abc")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_tables_of_tools_by_hand():
    """Each number of services is a corpus of its own; what all parameters are trained for is compared with what they are trained for."""

    def run(variant, **right):
        fast = [{"batch_size": size, "responses_per_second": 7.0 + size} for size in (1, 2)]
        evaluations = {}
        for kind, each in right.items():
            counts = {name: [[own, 2] for own in each] for name in ("calls_right", "service_named")}
            own = {"digests": ["a", "b"][: len(each)], "prompt_tokens": [9, 9], "counts": counts}
            evaluations[kind] = {"by_example": own, "by_batch_size": fast}
        return Run(variant, 0, {}, None, evaluations)

    runs = [run("tools_labels", eval=(2, 1), few=(2, 2)), run("tools_dense", eval=(1, 0), many=(1, 1), near01=(1, 0), constrained=(2, 1))]
    runs += [run("tools_late_full", eval=(2, 2)), run("tools_dense_late_full", eval=(2, 2))]  # of one catalogue alone: no rows
    runs += [run("tools_values_more", eval=(2, 2)), run("tools_dense_values_more", eval=(1, 2))]
    names = [run.variant for run in runs]
    rows = [line.strip("| ").split(" | ") for line in documents.sets_table(runs, names, "tools").splitlines()]
    assert {row[1]: row[-1] for row in rows[2:]} == dict.fromkeys(documents.SETS["tools"].values(), "9.0") | {
        documents.SETS["tools"]["constrained"]: "-"
    }
    assert [row[:5] for row in rows if "calls right" in row] == [
        ["`tools_labels`", "`corpora/turns-5`", "calls right", "100.0", "-"],
        ["`tools_labels`", "`corpora/turns-26`", "calls right", "75.0", "50.0"],
        ["`tools_dense`", "`corpora/turns-26`", "calls right", "25.0", "-"],
        ["`tools_dense`", "`corpora/turns-100`", "calls right", "50.0", "-"],
        ["`tools_dense`", "`corpora/turns-26`, `name_share` 0.1", "calls right", "25.0", "-"],
        ["`tools_dense`", "`corpora/turns-26`, `--constrained`", "calls right", "75.0", "-"],
    ]
    rows = [line.strip("| ").split(" | ") for line in documents.differences_table(runs, names, "tools").splitlines()]
    assert [row[:6] for row in rows if "calls right" in row] == [
        ["`tools_labels`", "calls right", "2", "`tools_dense`", "25.0", "50.0"],
        ["`tools_late_full`", "calls right", "2", "`tools_dense_late_full`", "100.0", "0.0"],
        ["`tools_values_more`", "calls right", "2", "`tools_dense_values_more`", "75.0", "25.0"],
    ]
    rates = {"tools_dense_solve": 2.0, "tools_dense": 1.0, "tools_dense_late": 4.0, "papers_dense": 9.0, "tools_late": 8.0}
    speeds = pd.DataFrame([{"variant": own, "by_batch_size": [{"responses_per_second": rate}]} for own, rate in rates.items()])
    speeds = pd.concat([speeds, pd.DataFrame([{"variant": "tools_dense_recent", "by_batch_size": []}])])  # decoded beside other work
    timed = {own: documents.timed_control(speeds, "tools", f"tools_{own}") for own in ("solve", "labels", "recent")}
    assert timed == {"solve": "tools_dense_solve", "labels": "tools_dense", "recent": "tools_dense_late"}
    assert documents.timed_control(speeds, "stories", "stories_labels") == "stories_dense"
    for page, corpora in documents.CORPORA.items():
        for corpus in corpora:
            variants = documents.EXPERIMENTS[page].panels[corpus]
            masks = {variants[documents.control(corpus, name)].settings["mask"] for name in variants}
            assert masks == {"dense"}
