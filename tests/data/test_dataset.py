"""Dataset directories and their cards, through the command line in this process; the real command in test_commandline."""

import collections
import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess

import datasets
import numpy as np
import pytest

from data import dataset as corpus
from data import examples, writing
from data.__main__ import main
from data.arithmetic import ArithmeticTask, Corpus, encode, stream
from data.tasks import TASKS
from data.vocab import Vocab
from selfspan_jax.config import PRESETS
from tests.data.test_spans import attended_positions

ARGUMENTS = [
    "arithmetic",
    "--num-examples",
    "700",
    "--min-ops",
    "2",
    "--max-ops",
    "9",
    "--label-jumps",
    "2",
    "--jumps-at",
    "any",
    "--seed",
    "3",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpora") / "nested" / "corpus"
    main([*ARGUMENTS, "--out", str(path)])
    return path


@pytest.fixture(scope="module")
def expected():
    return list(itertools.islice(stream(Corpus(max_ops=9, label_jumps=2, jumps_at="any"), seed=3), 700))


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_columns_are_the_stream_s(directory, expected):
    dataset = datasets.load_from_disk(str(directory))
    assert dataset.column_names == ["expression", "answer", "num_ops", "first_label", "prompt_tokens", "token_ids"]
    assert len(dataset) == 700
    for row, example in zip(dataset, expected, strict=True):
        assert row["expression"] == example.expression.text
        assert row["answer"] == str(eval(row["expression"]))
        assert row["num_ops"] == len(re.findall(r"(?<=[\d)])[-+*]", row["expression"]))
        assert row["first_label"] == example.first_label
        assert row["prompt_tokens"] == example.prompt_tokens
        assert row["token_ids"] == example.token_ids.tolist()


@pytest.mark.slow
def test_same_seed_same_bytes_whatever_the_workers(directory, tmp_path):
    main([*ARGUMENTS, "--workers", "2", "--out", str(tmp_path / "again")])
    assert contents(tmp_path / "again") == contents(directory)
    assert set(contents(directory)) == {"README.md", "card.json", "data-00000-of-00001.arrow", "dataset_info.json", "state.json"}


def test_another_seed_is_another_corpus(directory, tmp_path):
    main([*ARGUMENTS[:-1], "4", "--out", str(tmp_path / "other")])
    assert contents(tmp_path / "other")["data-00000-of-00001.arrow"] != contents(directory)["data-00000-of-00001.arrow"]


def test_the_card_says_what_is_in_the_corpus(directory, expected):
    card = json.loads((directory / "card.json").read_text())
    statistics = card["statistics"]
    lengths = [len(e.token_ids) for e in expected]
    assert statistics["example_tokens"]["mean"] == pytest.approx(np.mean(lengths), abs=1e-3)
    for name, quantile in (("min", 0), ("5%", 0.05), ("median", 0.5), ("95%", 0.95), ("max", 1)):
        assert statistics["example_tokens"][name] == np.quantile(lengths, quantile, method="inverted_cdf")
    assert statistics["prompt_tokens"]["max"] == max(e.prompt_tokens for e in expected)
    assert statistics["response_tokens"]["min"] == min(len(e.token_ids) - e.prompt_tokens for e in expected)
    assert statistics["num_ops_histogram"] == {
        str(n): c for n, c in sorted(collections.Counter(e.expression.num_ops for e in expected).items())
    }
    symbols = collections.Counter(node for e in expected for node in e.expression if isinstance(node, str))
    assert statistics["operators"] == symbols
    assert sum(statistics["example_tokens_histogram"].values()) == 700
    assert statistics["example_tokens_histogram"]["64-95"] == sum(64 <= n < 96 for n in lengths)
    combs = sum(bool(re.fullmatch(r"\(+-?\d+([-+*]-?\d+\))+", e.expression.text)) for e in expected)
    assert statistics["tree_shape_share"]["left comb"] == pytest.approx(combs / 700, abs=1e-6)
    assert card["distributions"] == {**json.loads(json.dumps(vars(Corpus(max_ops=9, label_jumps=2, jumps_at="any"))))}
    assert (card["num_examples"], card["seed"], card["split"]) == (700, 3, "train")
    assert ArithmeticTask.from_json(card["task"]) == ArithmeticTask(names_first_step=True)


def test_the_card_s_command_makes_the_corpus_again(directory, tmp_path):
    card = json.loads((directory / "card.json").read_text())
    words = card["command"].split()
    assert words[:4] == ["python", "-m", "data", "arithmetic"] and words[-2:] == ["--out", "DIR"]
    main([*words[3:-1], str(tmp_path / "again")])
    assert contents(tmp_path / "again") == contents(directory)
    assert card["command"] in (directory / "README.md").read_text()


def test_attended_fraction_of_the_card(directory, expected):
    fractions, counts = [], []
    for example in expected:
        for t, positions in enumerate(attended_positions(example.token_ids.tolist(), Vocab()), example.prompt_tokens):
            fractions.append(len(positions) / (t + 1))
            counts.append(len(positions))
    statistics = json.loads((directory / "card.json").read_text())["statistics"]
    assert statistics["attended_fraction"] == pytest.approx(np.mean(fractions), abs=1e-6)
    assert statistics["attended_tokens_mean"] == pytest.approx(np.mean(counts), abs=1e-3)
    assert statistics["attended_tokens_max"] == max(counts)


# --- reading


def identity(example):
    return example.expression.text, example.first_label, example.prompt_tokens, example.token_ids.tobytes(), example.unpredictable.tolist()


def test_epochs_are_shuffled_whole_and_resumable(directory, expected):
    stored = corpus.load(directory, TASKS)
    assert len(stored) == 700 and stored.task == ArithmeticTask(names_first_step=True)
    found = [identity(e) for e in itertools.islice(stored.stream(seed=1), 1500)]
    everything = sorted(map(identity, expected))
    assert sorted(found[:700]) == everything and sorted(found[700:1400]) == everything
    assert found[:700] != found[700:1400]
    for start in (0, 1, 255, 256, 699, 700, 1100):
        again = [identity(e) for e in itertools.islice(stored.stream(seed=1, start=start), 300)]
        assert again == found[start : start + 300]
    assert [identity(e) for e in itertools.islice(stored.stream(seed=2), 50)] != found[:50]
    with pytest.raises(ValueError, match="start -1; allowed: 0 and above"):
        stored.stream(seed=0, start=-1)


def test_shards_of_an_epoch_are_apart_and_together_whole(directory, expected):
    """Three shards of 700 examples: 234, 233 and 233, each shuffled anew in each epoch and resumable."""
    stored = corpus.load(directory, TASKS)
    parts = [[identity(e) for e in itertools.islice(stored.stream(seed=1, shard=(p, 3)), 500)] for p in range(3)]
    sizes = (234, 233, 233)
    everything = sorted(map(identity, expected))
    for epoch in range(2):
        assert sorted(x for part, size in zip(parts, sizes) for x in part[epoch * size : (epoch + 1) * size]) == everything
    for p, start in ((0, 234), (1, 100), (2, 240)):
        assert [identity(e) for e in itertools.islice(stored.stream(seed=1, start=start, shard=(p, 3)), 50)] == parts[p][start : start + 50]
    with pytest.raises(ValueError, match="700 examples cannot be read in 701 shards"):
        stored.stream(seed=0, shard=(0, 701))


def damaged(directory, tmp_path, name, change):
    copy = tmp_path / "damaged"
    shutil.copytree(directory, copy)
    if change is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(change((copy / name).read_bytes()))
    return copy


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("card.json", None, "is not a corpus directory: it has no card.json"),
        ("card.json", lambda b: b"", "or it is damaged"),
        ("card.json", lambda b: b"\xff", "or it is damaged"),
        ("card.json", lambda b: b"[]", "or it is damaged: expected a JSON object"),
        ("card.json", lambda b: b"[" * 100_000, "or it is damaged"),
        ("card.json", lambda b: b.replace(b'"version": 1', b'"version": 2', 1), "version is 2"),
        ("card.json", lambda b: b.replace(b"selfspan corpus", b"other"), "format is 'other'"),
        ("card.json", lambda b: b.replace(b'"tree"', b'"bush"', 1), "labelling is 'bush'"),
        ("card.json", lambda b: b.replace(b'"num_examples": 700', b'"num_examples": 701'), "700 examples where its card says 701"),
        ("state.json", None, "or it is damaged"),
        ("state.json", lambda b: b"{}", "or it is damaged"),
        ("dataset_info.json", lambda b: b"{", "or it is damaged"),
        ("dataset_info.json", lambda b: b.replace(b"first_label", b"first_lapel"), "is not a corpus directory"),
        ("data-00000-of-00001.arrow", None, "or it is damaged"),
        ("data-00000-of-00001.arrow", lambda b: b[:1000], "or it is damaged"),
        ("data-00000-of-00001.arrow", lambda b: b"", "or it is damaged"),
    ],
)
def test_what_is_not_a_corpus_is_said_in_one_line(directory, tmp_path, name, change, message):
    copy = damaged(directory, tmp_path, name, change)
    with pytest.raises(ValueError, match=message) as caught:
        corpus.load(copy, TASKS)
    assert str(caught.value).startswith(str(copy))


def test_paths_that_are_not_directories(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        corpus.load(tmp_path / "absent", TASKS)
    with pytest.raises(NotADirectoryError, match="is a file"):
        corpus.load(directory / "card.json", TASKS)
    with pytest.raises(ValueError, match=r"no card\.json"):
        corpus.load(tmp_path, TASKS)


def test_rows_are_checked_when_read(directory, tmp_path):
    path = damaged(directory, tmp_path, "card.json", lambda b: b.replace(b'"num_labels": 512', b'"num_labels": 20', 1))
    with pytest.raises(ValueError, match=r"example \d+ has ids outside its vocabulary of 60 tokens"):
        list(itertools.islice(corpus.load(path, TASKS).stream(seed=0), 700))


def test_a_write_that_fails_leaves_nothing(tmp_path, expected):
    def failing():
        yield from expected[:10]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writing.write(tmp_path / "out", failing(), ArithmeticTask(), {"num_examples": 700, "split": "train"})
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_may_be_written_to(tmp_path):
    """What a process left that was killed goes, not what one writes that goes on, and nothing of other names."""
    with subprocess.Popen("true") as ended:
        pass
    left = [f".empty.{ended.pid}.partial", f".empty.{os.getppid()}.partial", f".other.{ended.pid}.partial", "empty"]
    for name in left:
        (tmp_path / name).mkdir()
    main(["arithmetic", "--num-examples", "5", "--out", str(tmp_path / "empty")])
    assert len(corpus.load(tmp_path / "empty", TASKS)) == 5 and {path.name for path in tmp_path.iterdir()} == {*left[1:]}


# --- what a run asks of a directory


def test_the_settings_of_a_directory_are_those_of_its_card(directory):
    assert corpus.load(directory, TASKS).corpus == Corpus(max_ops=9, label_jumps=2, jumps_at="any")


def test_settings_that_an_older_card_lacks_are_said(directory, tmp_path):
    path = damaged(directory, tmp_path, "card.json", lambda b: b.replace(b'"label_jumps": 2,', b"", 1))
    with pytest.raises(ValueError, match="its card does not say label_jumps: written by an older version; write it anew"):
        corpus.load(path, TASKS).corpus  # noqa: B018


@pytest.mark.parametrize(
    ("preset", "options"), [("arithmetic-tiny", ["--max-ops", "12"]), ("arithmetic-small", []), ("arithmetic-base", [])]
)
def test_a_directory_has_what_the_presets_train_on(preset, options, tmp_path):
    main(["arithmetic", "--num-examples", "5", *options, "--out", str(tmp_path / "out")])
    assert corpus.load(tmp_path / "out", TASKS).corpus == Corpus(**PRESETS[preset].corpus)


def test_epochs_are_counted_in_tokens(directory, expected):
    stored = corpus.load(directory, TASKS)
    num_tokens = sum(len(example.token_ids) for example in expected)
    assert stored.num_tokens == num_tokens and stored.epochs(5 * num_tokens) == 5


def test_a_fingerprint_is_that_of_the_content(directory, tmp_path):
    """The same examples elsewhere have the same; another seed, number, order, vocabulary or prompt length has another."""
    main([*ARGUMENTS, "--out", str(tmp_path / "again")])
    (tmp_path / "again" / "README.md").write_text("")
    assert corpus.fingerprint(tmp_path / "again") == corpus.fingerprint(directory)
    example = encode("(1+2)*3")
    examples = [example, encode("1+2")]
    longer = dataclasses.replace(example, prompt_tokens=example.prompt_tokens + 1)
    other = ArithmeticTask(Vocab(64))
    cases = [(examples, ArithmeticTask()), (examples[::-1], ArithmeticTask()), (examples[:1], ArithmeticTask())]
    cases += [([longer, examples[1]], ArithmeticTask()), ([other.encode(e.prompt) for e in examples], other)]
    found = {corpus.fingerprint(directory)}
    for number, (drawn, task) in enumerate(cases):
        writing.write(tmp_path / str(number), drawn, task, {"command": "", "split": "train", "distributions": {}})
        found.add(corpus.fingerprint(tmp_path / str(number)))
    assert len(found) == 6


def test_files_exchanged_under_a_card_have_another_fingerprint(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "mixed")
    main([*ARGUMENTS, "--seed", "8", "--out", str(tmp_path / "other")])
    (file,) = (tmp_path / "mixed").glob("*.arrow")
    shutil.copy(tmp_path / "other" / file.name, file)
    assert corpus.fingerprint(tmp_path / "mixed") != corpus.fingerprint(directory)


def test_generated_examples_are_held_out_by_the_task_s_test_split(directory, expected):
    held, num_without_room = corpus.load(directory, TASKS).held_out(40, seed=3)
    fresh = itertools.islice(stream(Corpus(max_ops=9), seed=3, split="test"), 40)
    assert not num_without_room and [x.prompt for x in held] == [x.prompt for x in fresh]
    assert not {x.prompt for x in held} & {x.prompt for x in expected} and {x.first_label for x in held} == {1}


def test_examples_are_written_again_in_another_vocabulary(directory, expected):
    """In fewer labels: the same expressions in the same order, labels from places drawn anew, any start; the longest left out."""
    stored, task = corpus.load(directory, TASKS), ArithmeticTask(Vocab(8), names_first_step=True)
    found = list(itertools.islice(stored.stream(seed=1, task=task), 1050))
    plain = list(itertools.islice(stored.stream(seed=1), 1050))
    for own, example in zip(found, plain, strict=True):
        assert example.expression.num_ops > 7 or own.expression == example.expression
        assert own.expression.num_ops <= 7 and task.verify(own.prompt, task.encode(own.prompt).response_ids).steps_right
        again = encode(own.expression, vocab=task.vocab, first_label=own.first_label, names_first_step=True)
        assert (own.token_ids == again.token_ids).all() and own.token_ids.max() < task.vocab.size
    starts = {x.first_label for x in found if x.expression.num_ops == 2}
    assert starts == set(range(1, 7))
    fitting = (task.encode(x.expression) if x.expression.num_ops <= 7 else None for x in expected)
    assert stored.lengths(task).tolist() == [len(x.token_ids) if x else 0 for x in fitting]
    for start in (1, 699, 700, 1000):
        again = [x.token_ids.tolist() for x in itertools.islice(stored.stream(seed=1, start=start, task=task), 50)]
        assert again == [x.token_ids.tolist() for x in found[start : start + 50]]
    with pytest.raises(ValueError, match="the vocabulary has room for none of its examples"):
        next(stored.stream(seed=1, task=ArithmeticTask(Vocab(2))))


def test_examples_that_a_model_has_no_room_for_are_counted(directory, expected):
    task = ArithmeticTask(Vocab(8), names_first_step=True)
    _, sets, drawn = examples.stored(directory, task, TASKS, 20)
    fits = [number for number, own in enumerate(expected) if own.expression.num_ops <= 7][:20]
    assert [own.prompt for own in sets[directory.name]] == [expected[number].prompt for number in fits]
    assert drawn["num_without_room"] == fits[-1] + 1 - 20 > 0 and f"{fits[-1] - 19} of {fits[-1] + 1} examples" in drawn["warnings"][-1]
    with pytest.raises(ValueError, match=f"no room for {len(expected)} of {len(expected)} examples of"):
        examples.stored(directory, ArithmeticTask(Vocab(2)), TASKS, 20)


# --- where nothing can be written


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def failing(*arguments, **options):
        raise OSError(28, "No space left on device")

    def run(out):
        with pytest.raises(SystemExit, match="2"):
            main(["arithmetic", "--num-examples", "5", "--out", str(out)])
        return [line for line in capsys.readouterr().err.splitlines() if "examples" not in line]

    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == [
        f"error: {tmp_path / 'file'} exists and is not an empty directory: choose another, or remove it first"
    ]
    assert run(tmp_path / "file" / "out") == [f"error: {tmp_path / 'file'} is a file: expected a directory to write out in"]
    with monkeypatch.context() as patch:  # a disk that fills up
        patch.setattr(datasets.Dataset, "save_to_disk", failing)
        (line,) = run(tmp_path / "a" / "b" / "out")
    assert line.startswith("error: ") and line.endswith("the corpus cannot be written in it: No space left on device")
    with monkeypatch.context() as patch:  # a file system that is read only: the rights of root would allow all
        patch.setattr(writing.tempfile, "TemporaryFile", lambda **options: failing())
        assert run(tmp_path / "a" / "out") == [f"error: {tmp_path}: out cannot be written in it: No space left on device"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
