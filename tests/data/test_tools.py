"""Tools: catalogues and dialogues of the public layout, what their calls rest on, scores, and what is refused."""

# ruff: noqa: E501  (tables of text)

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

import decode
from data import dataset
from data.__main__ import main as data_main
from data.errors import UserError
from data.examples import TrainingExamples
from data.pieces import Written, encode_steps
from data.retrieval import BM25
from data.sources import Made
from data.tasks import TASKS
from data.tools import chat
from data.tools.source import KINDS, Call, Corpus, WriteCommand, read_call
from tests.data import layouts
from tests.data.test_documents import respond

OPTIONS = ["--vocab-tokens", "400", "--services", "3", "--original", "1"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return layouts.write_tools(tmp_path_factory.mktemp("tools") / "sgd")


@pytest.fixture(scope="module")
def corpus(clone, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpora") / "tools"
    data_main(["tools", "--source", str(clone), *OPTIONS, "--out", str(out)])
    return out


def drafts(clone, split="train", seed=0, **settings):
    """What becomes of a split's dialogues."""
    command = WriteCommand(source=str(clone), out=Path("-"), seed=seed, split=split, corpus=Corpus(**settings))
    make = command.drafts()
    return [draft for dialogue in sorted(command.read(split)) for draft in make(dialogue)]


def to_oakton(stored):
    """The first dialogue of the clone's training part."""
    return next(example for example in map(stored.task.renumber, stored) if "Oakton" in example.prompt)


BUSES = (
    'Service Buses_1: Offers Buses_1. FindBus(to_town, seats="1"): To FindBus. BookBus(line, seats, class="any"): To BookBus. '
    "Parameters: to_town: The to_town; seats (1, 2, 3): The seats; line: The line; class (any, first): The class"
)
INNS = "Service Inns_1: Offers Inns_1. FindInn(place): To FindInn. Parameters: place: The place"
WEATHER = "Service Weather_1: Offers Weather_1. GetWeather(town): To GetWeather. Parameters: town: The town"
SAID = [
    "User: I want to go to Oakton.", "System: How many are you?", "User: Two of us.", 'Result: {"line": "K7", "leaves": "7:30"}',
    'Result: {"line": "K8", "leaves": "8:30"}', "System: One leaves at 7:30.", "User: Book it.", 'Result: {"to_town": "Oakton", "leaves": "7:30"}',
    "System: Booked.", "User: An inn there?", "System: There is none.", "User: Thanks.",
]  # fmt: skip
CALLS = [  # what is written, the service, the pieces of SAID that it rests on: what it answers to, and of each value; None is the service
    ('{"service": "Buses_1", "method": "FindBus", "parameters": {"to_town": "Oakton", "seats": "2"}}', "Buses_1", (2, 0, 2)),
    ('{"service": "Buses_1", "method": "BookBus", "parameters": {"line": "K7", "seats": "2", "class": "any"}}', "Buses_1", (6, 3, 2, None)),
    ('{"service": "Inns_1", "method": "FindInn", "parameters": {"place": "Oakton"}}', "Inns_1", (9, 0)),
]


def test_an_example_is_the_dialogue_and_its_calls_with_where_their_values_stand(corpus):
    """Rows leave out what was asked for; a value of another service's slot stands where it stood last, a default in the service itself."""
    assert [len(dataset.load(corpus, TASKS, split)) for split in dataset.splits(corpus)] == [3, 2, 2]
    stored = dataset.load(corpus, TASKS, "train")
    example = to_oakton(stored)
    catalogue, said = example.document.pieces[:3], example.document.pieces[3:]
    assert sorted(catalogue) == [BUSES, INNS, WEATHER] and [*said] == SAID  # Buses_2 could be meant as well
    places = {piece.split()[1].rstrip(":"): place for place, piece in enumerate(catalogue)}
    expected = [(text, (places[name], *(places[name] if i is None else 3 + i for i in sources))) for text, name, sources in CALLS]
    assert [(step.text, step.sources) for step in example.document.steps] == expected
    assert stored.task.encode_prompt(example.prompt).tolist() == example.prompt_ids.tolist()
    names = "".join(f"<ref:{1 + piece}>" for piece in (expected[0][1][0], 3, 5))
    decoded = stored.task.decode(example.token_ids)
    assert decoded.startswith("<bos> Call the services:<seg:1> Service ") and f"<solve><seg:16>{names} {CALLS[0][0]}<seg:17>" in decoded


STANDS = {  # what a turn says too: number, service, slot, value -> the pieces of SAID that the second call rests on
    "a default is no other slot's": (1, "Inns_1", "inn", "any", (2, 3, 6)),
    "the latest turn": (4, "Buses_1", "seats", "2", (3, 6)),
    "the same slot before another": (3, "Buses_1", "leaves", "2", (2, 3, 6)),
    "the same service before another": (3, "Inns_1", "seats", "2", (2, 3, 6)),
    "any slot before a row": (2, "Inns_1", "inn", "K7", (2, 6)),
    "nothing after the call": (5, "Buses_1", "seats", "2", (2, 3, 6)),
}


@pytest.mark.parametrize("case", STANDS)
def test_where_values_stand(clone, tmp_path, case):
    number, service, slot, value, expected = STANDS[case]
    shutil.copytree(clone / "train", tmp_path / "train")
    (tmp_path / "sgd_x").symlink_to(clone / "sgd_x")
    turns(lambda own: own[number]["frames"].append(layouts.frame(service, (slot, value))))(tmp_path)
    step = drafts(tmp_path, services=3)[1].document.steps[1]
    assert sorted({*step.sources[1:]} - {step.sources[0]}) == [3 + piece for piece in expected]


def test_one_turn_an_example_has_what_was_said_before_its_call(clone):
    found = drafts(clone, services=3, original=1, example="turn")
    assert len(found) == 9
    for (text, _, sources), draft in zip(CALLS, found, strict=False):
        pieces, (step,) = draft.document.pieces, draft.document.steps
        assert [*pieces[3:]] == SAID[: sources[0] + 1] and step.text == text
        assert step.sources[1:] == tuple(step.sources[0] if i is None else 3 + i for i in sources)
        assert pieces[step.sources[0]].startswith(f"Service {read_call(text).service}:")


def test_values_name_what_they_stand_in_and_some_of_it_late(clone, corpus):
    """Before each value its call names itself, as a header, then the value's source; the text stays as it is."""
    stored = dataset.load(corpus, TASKS, "train")
    task = dataclasses.replace(stored.task, value_sources=True)
    example = task.renumber(to_oakton(stored))
    document, first = example.document, 1 + len(example.document.pieces)
    tokens = task.decode(example.token_ids).split(f"<seg:{first + 1}>", 1)[1].split(f"<seg:{first + 2}>")[0]
    service, answered, line, seats, _ = document.steps[1].sources
    names = [f"<ref:{1 + piece}>" for piece in (service, line, seats, answered)]
    values = [f"<ref:{first + 1}>{name}" for name in (names[1], names[2], names[0])]
    text = CALLS[1][0].replace('"line":', f'"line":{values[0]}').replace('"seats":', f'"seats":{values[1]}')
    assert tokens == f"{names[0]}{names[2]}{names[1]}{names[3]} " + text.replace('"class":', f'"class":{values[2]}')
    (step,) = task.steps(example.token_ids[example.prompt_tokens :])[1:2]
    assert (step.text, step.named) == (CALLS[1][0], {*document.steps[1].sources})
    found = [Corpus(value_sources=True, late_sources=share).parts(document, 1, 0.5) for share in (0, 1)]
    assert [own[0][0] for own in found] == [(service, seats, line, answered), (service, answered)] and found[0][1:] == found[1][1:]
    more = [Corpus(value_sources=True, extra_sources=1, late_sources=1).parts(document, 1, i / 64) for i in range(64)]
    others = {*range(seats, answered)} - {seats, line}
    assert {own[0][0] for own in more} == {(service, piece, answered) for piece in others} and all(own[1:] == found[0][1:] for own in more)
    few = [len(Corpus(value_sources=True, extra_sources=0.25).parts(document, 1, i / 64)[0][0]) - 4 for i in range(64)]
    assert {*few} == {0, 1} and 8 <= sum(few) <= 24


@pytest.mark.parametrize("values", [False, True])
def test_calls_name_the_last_turns_in_any_case_and_values_what_they_stand_in(corpus, values):
    stored = dataset.load(corpus, TASKS, "train")
    document = to_oakton(stored).document
    service, answered, *others = document.steps[1].sources
    others = [i for i in others if i != service]
    said = [i for i in range(answered + 1) if document.pieces[i].startswith(("User: ", "System: "))]
    for count in (0, 2, 99):
        own = Corpus(value_sources=values, recent_turns=count, late_sources=values).parts(document, 1, 0.5)
        recent = said[len(said) - count :] if count < len(said) else said
        assert own[0][0] == (service, *sorted({answered, *recent, *(() if values else others)}))
        assert own[1:] == Corpus(value_sources=values).parts(document, 1, 0.5)[1:]
    task = dataclasses.replace(stored.task, recent_turns=2)
    assert {*task.headers(to_oakton(stored), "gold")[1]} == {1 + i for i in (service, answered, *others, *said[-2:])}


def test_some_catalogues_to_train_on_are_names_alone(clone):
    found = drafts(clone, services=3, bare=1, bare_services=6, example="turn")
    sizes = {sum(piece.startswith("Service") for piece in own.document.pieces) for own in found if not isinstance(own, Made)}
    assert sizes <= {*range(3, 7)} and len(sizes) > 1
    assert not any("Parameters:" in piece for own in found if not isinstance(own, Made) for piece in own.document.pieces)


def test_without_descriptions_services_are_names_alone(clone):
    """The default of a parameter stands nowhere then, so neither does a call that has it."""
    first, *_ = drafts(clone, services=3, original=1, described=False, example="turn")
    assert "Service Buses_1: FindBus(to_town, seats?) BookBus(line, seats, class?)" in first.document.pieces
    assert {own.counted for own in drafts(clone, described=False)} == {("with a value that stands nowhere",)}


# -------------------------------------------------------------------------------------------------------------- catalogues


def plain(text):
    """The original wording of a paraphrase: (text, its version)."""
    versions = {int(n) for n in re.findall(r"_v([1-5])\b", text)} or {0}
    (version,) = versions
    return re.sub(r"_v[1-5]\b", "", re.sub(rf"_([12]){version}\b", r"_\1", text) if version else text), version


def test_wordings_are_drawn_and_calls_are_written_in_that_of_their_service(clone):
    """Across seeds no place and no wording is the service's own. In training one paraphrase of each service is never seen."""
    seen = {split: {} for split in layouts.SCHEMAS}
    for seed in range(40):
        for split, part in zip(("train", "validation"), layouts.SCHEMAS):
            for draft in drafts(clone, split, seed, services=3, original=0.2):
                services = draft.document.pieces[:3]
                names = [plain(piece)[0].split()[1].rstrip(":") for piece in services]
                assert len({*names}) == 3 and {*names} <= {*layouts.SCHEMAS[part]} - {"Buses_2"}
                for place, (name, piece) in enumerate(zip(names, services)):
                    text, version = plain(piece)
                    assert name == "Taxis_1" or text in (BUSES, INNS, WEATHER)
                    seen[part if name in layouts.SCHEMAS["train"] else "test"].setdefault(name, set()).add((place, version))
                for step, (text, *_) in zip(draft.document.steps, CALLS, strict=True):
                    own, version = plain(step.text)
                    carrier = draft.document.steps[0].text.split('"')[3].partition("_")[0]
                    town = read_call(draft.document.steps[2].text).parameters.popitem()[1]
                    assert own == text.replace("Oakton", town).replace("Buses", carrier)
                    assert version == plain(services[step.sources[0]])[1]
                    assert read_call(step.text).service == services[step.sources[0]].split()[1].rstrip(":")
    held_out = {name: {*range(1, 6)} - {version for _, version in found} for name, found in seen["train"].items()}
    assert held_out.keys() == {"Buses_1", "Inns_1", "Weather_1"} and {len(own) for own in held_out.values()} == {1}
    assert all({place for place, _ in found} == {0, 1, 2} for part in seen.values() for found in part.values())
    assert all({version for _, version in found} == {*range(6)} for found in seen["dev"].values())


SIZES = {  # settings -> how many services there are
    "fewer than it uses": ({"services": 1}, {2}),
    "each once": ({"services": 3}, {3}),
    "in second wordings": ({"services": 5}, {5}),
    "as many as there are": ({"services": 100}, {2 + 5}),
    "of several sizes": ({"services": 5, "min_services": 3, "example": "turn"}, {3, 4, 5}),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_catalogue_has_what_the_dialogue_uses_and_distractors(clone, case):
    """Of a distractor there are five wordings in training; those of the services used would be right as well."""
    settings, expected = SIZES[case]
    found = [
        [plain(piece)[0].split()[1] for piece in draft.document.pieces if piece.startswith("Service ")]
        for draft in drafts(clone, **settings)
    ]
    assert {len(services) for services in found} == expected
    assert all(services.count("Buses_1:") == services.count("Inns_1:") == 1 for services in found)


def test_dialogues_are_in_an_order_of_their_own(clone):
    """Files are by kind of service, and an evaluation of some examples takes the first ones."""
    orders = {tuple(d.name for d in WriteCommand(source=str(clone), out=Path("-"), seed=seed).read("train")) for seed in range(9)}
    assert len(orders) > 3 and {tuple(sorted(order)) for order in orders} == {("train_0", "train_1", "train_2")}


def test_kinds_say_what_of_a_service_training_sees(clone):
    """Only validation and test have the wordings that are held out, and services of their own."""
    kinds = {"train": set(), "validation": set()}
    for split, found in kinds.items():
        for seed in range(20):
            for draft in drafts(clone, split, seed, services=3):
                found |= {(step.kind, read_call(step.text).service[:4]) for step in draft.document.steps}
    assert kinds["train"] == {("seen", "Buse"), ("seen", "Inns")}
    assert kinds["validation"] == kinds["train"] | {("reworded", "Buse"), ("reworded", "Inns"), ("unseen", "Taxi")}


# ------------------------------------------------------------------------------------------------------------------ scores

FIND, BOOK, INN = (text for text, *_ in CALLS)
SCORES = {  # steps: (is the service named, rests on which of the gold turns and on a wrong one, text) -> scores that are not 1
    "gold": ([(1, 1, 0, FIND), (1, 1, 0, BOOK), (1, 1, 0, INN)], {}),
    "other order of parameters, other white space": ([(1, 1, 0, FIND.replace('"to_town": "Oakton", "seats": "2"', '"seats":"2",  "to_town":"Oakton"')), (1, 1, 0, BOOK), (1, 1, 0, INN)], {}),
    "a wrong value": ([(1, 1, 0, FIND.replace('"2"', '"3"')), (1, 1, 0, BOOK), (1, 1, 0, INN)],
        {"calls_right": 2 / 3, "parameters_right": 5 / 6, "dialogues_right": 0}),
    "a number in place of text": ([(1, 1, 0, FIND.replace('"2"', "2")), (1, 1, 0, BOOK), (1, 1, 0, INN)],
        {"calls_right": 2 / 3, "parameters_right": 5 / 6, "dialogues_right": 0}),
    "one parameter more": ([(1, 1, 0, FIND), (1, 1, 0, BOOK), (1, 1, 0, INN.replace("Oakton", 'Oakton", "inn": "any'))],
        {"calls_right": 2 / 3, "dialogues_right": 0}),
    "another method": ([(1, 1, 0, FIND.replace("FindBus", "BookBus")), (1, 1, 0, BOOK), (1, 1, 0, INN)],
        {"calls_right": 2 / 3, "methods_right": 2 / 3, "dialogues_right": 0}),
    "another service": ([(0, 1, 0, FIND.replace("Buses_1", "Inns_1")), (1, 1, 0, BOOK), (1, 1, 0, INN)],
        {"calls_right": 2 / 3, "services_right": 2 / 3, "methods_right": 2 / 3, "dialogues_right": 0, "service_named": 2 / 3, "service_precision": 2 / 3}),
    "no JSON": ([(1, 1, 0, FIND[:-1]), (1, 1, 0, BOOK), (1, 1, 0, INN)],
        {"calls_right": 2 / 3, "services_right": 2 / 3, "methods_right": 2 / 3, "parameters_right": 4 / 6, "calls_readable": 2 / 3, "dialogues_right": 0}),
    "a wrong turn": ([(1, 1, 1, FIND), (1, 1, 0, BOOK), (1, 1, 0, INN)], {"turn_precision": 7 / 8}),
    "a turn left out": ([(1, 0, 0, FIND), (1, 1, 0, BOOK), (1, 1, 0, INN)], {"turn_recall": 5 / 7}),
    "a call left out": ([(1, 1, 0, FIND), (1, 1, 0, BOOK)],
        {"calls_right": 2 / 3, "services_right": 2 / 3, "methods_right": 2 / 3, "parameters_right": 5 / 6, "dialogues_right": 0, "service_named": 2 / 3, "turn_recall": 5 / 7}),
    "a call too many": ([(1, 1, 0, FIND), (1, 1, 0, BOOK), (1, 1, 0, INN), (0, 0, 1, INN)],
        {"dialogues_right": 0, "service_precision": 3 / 4, "turn_precision": 7 / 8}),
}  # fmt: skip


@pytest.mark.parametrize("case", SCORES)
def test_scores_by_hand(corpus, case):
    steps, expected = SCORES[case]
    stored = dataset.load(corpus, TASKS, "train")
    example = to_oakton(stored)
    response = []
    for number, (is_named, rests, is_wrong, text) in enumerate(steps):
        place, *turns = example.document.steps[min(number, 2)].sources
        other = next(i for i in range(3) if i != place)
        refs = [1 + (place if is_named else other), *(1 + turn for turn in turns if rests), *[1 + 3 + 11] * is_wrong]
        response.append((refs, text))
    scores = stored.task.scores([example], [respond(stored.task, response)])
    calls = {"calls_right_seen_services", "calls_right_seen_wording"}
    names = {name for kind in stored.task.score_kinds.values() for name in kind} - {
        "calls_right_unseen_services",
        "calls_right_unseen_wording",
    }
    right = expected.get("calls_right", 1)
    assert scores == pytest.approx({**dict.fromkeys(names, 1), **dict.fromkeys(calls, right), **expected})


BY_KIND = {  # what of the service is seen -> which shares have the call
    "seen": {"seen_services", "seen_wording"},
    "reworded": {"seen_services", "unseen_wording"},
    "unseen": {"unseen_services"},
    "": set(),
}


@pytest.mark.parametrize("kind", BY_KIND)
def test_right_calls_are_counted_by_what_training_sees(corpus, kind):
    stored = dataset.load(corpus, TASKS, "test")
    example = stored.task.renumber(next(iter(stored)))
    document = dataclasses.replace(example.document, steps=tuple(step._replace(kind=kind) for step in example.document.steps))
    counts = stored.task.counts(dataclasses.replace(example, document=document), example.response_ids)
    assert {name: own for name, own in counts.items() if name.startswith("calls_right_")} == {
        f"calls_right_{name}": (3, 3) for name in BY_KIND[kind]
    }
    assert kind in (*KINDS, "")


NO_CALLS = ["", "null", "[1]", '"x"', "{" * 5000, "[" * 100_000, '{"service": "a", "method": "b"}', '{"service": 1, "method": "b", "parameters": {}}',
    '{"service": "a", "method": "b", "parameters": []}', '{"service": "a", "method": "b", "parameters": {}, "id": 1}', "9" * 5000]  # fmt: skip


def test_what_is_no_call_is_none():
    assert [read_call(text) for text in NO_CALLS] == [None] * len(NO_CALLS)
    assert read_call(' {"method": "b", "parameters": {"c": [1]}, "service": "a"} ') == ("a", "b", {"c": [1]})


def test_sources_that_are_given_are_a_service_and_as_many_turns_before_the_call(corpus):
    stored = dataset.load(corpus, TASKS, "train")
    for example in map(stored.task.renumber, stored):
        pieces = example.document.pieces
        found = {kind: stored.task.headers(example, kind) for kind in ("gold", "bm25", "random", "recent")}
        for number, step in enumerate(example.document.steps):
            service, turns = step.sources[0], sorted({*step.sources[1:]} - {step.sources[0]})
            gold, bm25, drawn, recent = (found[kind][number] for kind in found)
            assert gold == [1 + service, *(1 + turn for turn in turns)]
            said = pieces[3 : turns[-1] + 1]
            assert bm25 == [1 + BM25(pieces[:3]).rank(said[-1])[0], *(4 + i for i in sorted(BM25(said).rank(said[-1])[: len(turns)]))]
            assert drawn[0] <= 3 and {*drawn[1:]} <= {*range(4, turns[-1] + 2)} and len({*drawn}) == len({*step.sources})
            assert recent == [3, *range(turns[-1] + 2 - len(turns), turns[-1] + 2)]
        assert found["random"] == stored.task.headers(example, "random")


def test_a_step_may_begin_with_a_service_of_the_catalogue_and_its_method(clone, corpus):
    stored = dataset.load(corpus, TASKS, "train")
    task, example = stored.task, to_oakton(stored)
    expected = {("Buses_1", "FindBus"), ("Buses_1", "BookBus"), ("Inns_1", "FindInn"), ("Weather_1", "GetWeather")}
    for prompt in (example.prompt, drafts(clone, services=3, original=1, described=False, example="turn")[0].document.prompt):
        texts = [task.decode(ids) for ids in task.beginnings(prompt)]
        assert sorted(texts) == sorted(f' {{"service": "{own}", "method": "{name}", "parameters":' for own, name in expected)
    for step in example.document.steps:
        ids = task.vocab.plain_text_ids(f" {step.text}")
        assert sum(ids[: len(own)] == own for own in task.beginnings(example.prompt)) == 1


def test_prompts_are_told_apart_by_their_number_of_services(corpus):
    task = dataset.load(corpus, TASKS).task
    group = {n: task.group("\n\n".join([*[f"Service S_{i}: f(x)" for i in range(n)], "User: hello"])) for n in (0, 5, 6, 26, 27, 100, 101)}
    assert group == {0: "5", 5: "5", 6: "26", 26: "26", 27: "100", 100: "100", 101: "above 100"}
    assert (
        task.decode(task.encode_prompt("Service A:\n f(x)\n\nUser: Hi."))
        == "<bos> Call the services:<seg:1> Service A: f(x)<seg:1><seg:2> User: Hi.<seg:2><solve>"
    )
    with pytest.raises(UserError, match=r"^the text has 2,000 paragraphs \(services and turns\), but the model has room for \d+: "):
        task.encode_prompt("\n\n".join(["User: Hi."] * 2000))


def test_the_card_counts_what_prompts_have(corpus):
    statistics = dataset.load(corpus, TASKS, "test").card["statistics"]
    assert {name: statistics[name]["mean"] for name in ("services", "turns", "rows", "steps")} == {
        "services": 3,
        "turns": 9,
        "rows": 3,
        "steps": 3,
    }
    assert statistics["kinds"] == {"seen": 2, "unseen": 4} and 0 < statistics["bm25"] < 1
    assert "the one called for" in (text := (corpus / "test" / "README.md").read_text())
    stored = dataset.load(corpus, TASKS)
    limits = TrainingExamples(stored.task, stored.corpus, stored).texts()["limits"]
    assert all("Licence of google-research-datasets/dstc8-schema-guided-dialogue: CC BY-SA 4.0 (" in own for own in (text, limits))


def test_an_evaluation_takes_the_test_part(corpus):
    _, sets, drawn = decode.Eval(checkpoint=Path("model"), data=corpus, split="test").examples(dataset.load(corpus, TASKS).task)
    (examples,) = sets.values()
    assert drawn["split"] == "test" and len(examples) == 2 and {example.first_label for example in examples} == {1}


# ---------------------------------------------------------------------------------------------------------- what is refused


def edited(file, change):
    """A change of a file's JSON."""

    def edit(root):
        values = json.loads((root / file).read_text())
        (root / file).write_text(json.dumps(change(values) or values))

    return edit


def turns(change):
    return edited("train/dialogues_001.json", lambda own: change(own[0]["turns"]))


DAMAGED = {  # what is done to the clone -> what is said
    "no dialogues": (
        lambda root: [file.unlink() for file in (root / "train").glob("dialogues_*")],
        "train: expected files dialogues_*.json",
    ),
    "no schema": (lambda root: (root / "train/schema.json").unlink(), "train/schema.json: there is no such file, so no train part"),
    "no paraphrase": (
        lambda root: (root / "sgd_x/data/v3/train/schema.json").unlink(),
        "v3/train/schema.json: there is no such file: this",
    ),
    "no JSON": (lambda root: (root / "train/dialogues_001.json").write_text("[{"), "dialogues_001.json is not JSON"),
    "a number of many digits": (
        lambda root: (root / "train/dialogues_001.json").write_text("9" * 5000),
        "dialogues_001.json has a number of more than 4,300 digits\n",
    ),
    "an object": (edited("train/dialogues_001.json", lambda own: {"a": own}), "dialogues_001.json: expected a list of dialogues"),
    "a dialogue without turns": (
        edited("train/dialogues_001.json", lambda own: own[0].pop("turns") and None),
        "train_1: expected a list as 'turns'",
    ),
    "another speaker": (turns(lambda own: own[0].update(speaker="HOST")), "train_1: the speaker is 'HOST'; allowed: USER, SYSTEM"),
    "an unknown method": (
        turns(lambda own: own[3]["frames"][0]["service_call"].update(method="Fly")),
        "Buses_1 has no method Fly, only FindBus, BookBus",
    ),
    "an unknown parameter": (
        turns(lambda own: own[3]["frames"][0]["service_call"].update(parameters={"seats": "2", "wings": "2"})),
        "Buses_1: FindBus has no parameter wings",
    ),
    "a service of no dialogue": (
        turns(lambda own: own[3]["frames"][0].update(service="Weather_1")),
        "a call of Weather_1, which is none of its services",
    ),
    "an unknown service": (
        edited("train/dialogues_001.json", lambda own: own[0].update(services=["Ships_1"])),
        "train/schema.json: has no Ships_1, a service of dialogue train_1",
    ),
    "a paraphrase of others": (
        edited("sgd_x/data/v2/train/schema.json", lambda own: own.pop() and None),
        "v2/train/schema.json: expected Weather_12, with the methods",
    ),
    "fewer parameters": (
        edited("sgd_x/data/v2/train/schema.json", lambda own: own[0]["intents"][0].update(optional_slots={})),
        "expected Buses_12, with the methods and slots of Buses_1",
    ),
    "fewer slots": (
        edited("sgd_x/data/v2/train/schema.json", lambda own: own[1]["slots"].pop() and None),
        "Buses_22 has 0 slots, but Buses_2 1",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_repositories_are_one_line(case, clone, tmp_path, call):
    damage, message = DAMAGED[case]
    shutil.copytree(clone, tmp_path / "clone")
    damage(tmp_path / "clone")
    status, _, err = call(data_main, "tools", "--source", tmp_path / "clone", "--split", "train", *OPTIONS, "--out", tmp_path / "out")
    assert status == 2 and err.startswith("error: ") and message in err and not (tmp_path / "out").exists()


def test_dialogues_that_cannot_be_used_are_counted(clone, tmp_path):
    shutil.copytree(clone, tmp_path / "clone")
    turns(lambda own: own[3]["frames"][0]["service_call"]["parameters"].update(seats="7"))(tmp_path / "clone")
    edited("train/dialogues_002.json", lambda own: own[0]["turns"].__delitem__(slice(3, None)))(tmp_path / "clone")
    found = [draft.counted for draft in drafts(tmp_path / "clone") if isinstance(draft, Made)]
    assert found == [("with a value that stands nowhere",), ("without a call",)]


def test_parts_that_are_missing_are_said(tmp_path, call):
    source = layouts.write_tools(tmp_path / "source", ("train", "test"))
    status, out, _ = call(data_main, "tools", "--source", source, *OPTIONS, "--out", tmp_path / "out")
    assert (
        status == 0
        and out.endswith(f"no validation part in {source}; train.py takes --eval-examples 0 then\n")
        and dataset.splits(tmp_path / "out") == ("train", "test")
    )
    shutil.rmtree(source / "train")
    status, _, err = call(data_main, "tools", "--source", source, "--split", "test", *OPTIONS, "--out", tmp_path / "new")
    assert status == 2 and "train/schema.json: there is no such file: this clone of google" in err


SETTINGS = {
    "no service": ({"services": 0}, "services is 0; allowed: 1 and above"),
    "fewest above most": ({"min_services": 27}, "min_services is 27; allowed: 0 to 26"),
    "more than all": ({"original": 1.5}, "original is 1.5; allowed: 0 to 1"),
    "another example": ({"example": "word"}, "example is 'word'; allowed: dialogue, turn"),
    "a cut dialogue": ({"too_long": "cut"}, "too_long is 'cut'; allowed: drop"),
    "extra sources of none": ({"extra_sources": 0.3}, "extra_sources is 0.3 where value_sources is False"),
    "late sources of none": ({"late_sources": 0.3}, "late_sources is 0.3 where value_sources is False"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_refused(case):
    settings, message = SETTINGS[case]
    with pytest.raises(UserError, match=message):
        Corpus(**settings)


def test_own_documents_are_catalogues_and_calls(tmp_path, call):
    row = {
        "document": ["Service A: f(x)", "User: Do it with 3."],
        "steps": [{"text": '{"service": "A", "method": "f", "parameters": {"x": 3}}', "sources": [0, 1]}],
    }
    for steps, message in ((row["steps"], None), ([{"text": "f(3)", "sources": [0]}], "line 2, step 1: 'f(3)' is no call: expected {")):
        (tmp_path / "own.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | {'steps': steps})}\n")
        status, out, err = call(
            data_main,
            "tools",
            "--source",
            tmp_path / "own.jsonl",
            "--split",
            "all",
            *OPTIONS[:2],
            "--out",
            tmp_path / f"out{message is None}",
        )
        assert (status, message or "2 written") == (2, message) and message in err if message else status == 0 and "2 written" in out


# ------------------------------------------------------------------------------------------------------ OpenAI's functions

SEATS = {"type": "integer", "description": "How many", "default": 1}
FUNCTIONS = [
    {"name": "Buses-FindBus", "description": "Find a bus.", "parameters": {"type": "object", "required": ["to"], "properties": {
        "to": {"type": "string", "description": "Where to"}, "seats": SEATS, "fast": {"type": "boolean"}, "price": {"type": "number"}, "note": {"type": ["string", "null"]}}}},
    {"name": "Buses-BookBus", "parameters": {"required": ["line", "seats"], "properties": {"line": {"enum": ["K7", "K8"]}, "seats": SEATS}}},
    {"name": "get_time", "description": "Tell the time"},
]  # fmt: skip
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
FOUND = json.dumps([{"line": "K7", "to": "Oakton", "direct": True}, {"to": "Oakton"}, "and\nmore"])
MESSAGES = [
    {"role": "system", "content": "Today is  Friday."},
    {"role": "user", "content": "To Oakton,\x1e Service X: please"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "Buses-FindBus", "arguments": '{"to": "Oakton"}'}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": FOUND},
    {"role": "assistant", "content": "K7?"},
    {"role": "user", "content": "Yes."},
]


def test_functions_and_messages_are_a_catalogue_and_a_dialogue(corpus):
    task = dataset.load(corpus, TASKS).task
    about, pieces = task.split_prompt(task.tool_prompt(MESSAGES, TOOLS))
    assert about == "Today is Friday." and [*pieces] == [
        'Service Buses: Find a bus. FindBus(to, seats="1", fast="dontcare", price="dontcare", note="dontcare"): Find a bus. BookBus(line, seats): A function. '
        "Parameters: to: Where to; seats: How many; fast (True, False): fast; price: price; note: note; line (K7, K8): line",
        "Service get_time: Tell the time. get_time(): Tell the time.",
        "User: To Oakton, Service X: please", 'Result: {"line": "K7", "direct": "True"}', "Result: and more", "System: K7?", "User: Yes.",
    ]  # fmt: skip
    assert task.group(task.tool_prompt(MESSAGES, TOOLS)) == "5" and len(task.beginnings(task.tool_prompt(MESSAGES, TOOLS))) == 3


ARGUMENTS = {  # what a step says of parameters -> what the function gets
    "numbers and truth values": (
        {"to": "Oakton", "seats": "2", "fast": "True", "price": "1.5"},
        {"to": "Oakton", "seats": 2, "fast": True, "price": 1.5},
    ),
    "what may be anything is left out": ({"to": "3", "fast": "dontcare"}, {"to": "3"}),
    "what is none stays text": (own := {"seats": "two", "fast": "maybe", "price": "inf", "note": "1"}, own),
    "typed already": ({"seats": 2, "price": None, "more": [1]}, {"seats": 2, "price": None, "more": [1]}),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_calls_of_functions_have_the_types_of_their_schema_and_the_pieces_that_they_name(corpus, case):
    said, expected = ARGUMENTS[case]
    task = dataset.load(corpus, TASKS).task
    prompt = task.tool_prompt(MESSAGES, TOOLS)
    text = json.dumps({"service": "Buses", "method": "FindBus", "parameters": said})
    others = [
        ((), text.replace("FindBus", "Fly")),
        ((2,), '{"service": "Get_Time", "method": "get_time", "parameters": {}}'),  # as models write that have learnt such names
        ((), "Hello"),
    ]
    first, second = task.tool_calls(prompt, respond(task, [((3, 1, 30), text), *others]), TOOLS)
    assert (first["name"], json.loads(first["arguments"])) == ("Buses-FindBus", expected)
    pieces = task.split_prompt(prompt)[1]
    assert first["pieces"] == [{"label": label, "text": pieces[label - 1]} for label in (1, 3)]
    assert second == {"name": "get_time", "arguments": "{}", "pieces": [{"label": 2, "text": pieces[1]}], "values": {}}


def test_names_of_functions_that_differ_in_case_alone_are_told_apart_by_it():
    tools = [{"type": "function", "function": {"name": name}} for name in ("Clock-get", "clock-Get", "Clock-set")]
    texts = [Call(service, method, {}).write() for service, method in (("clock", "Get"), ("clock", "get"), ("CLOCK", "SET"))]
    found = chat.calls([Written(label, frozenset(), text) for label, text in enumerate(texts)], (), tools, {})
    assert [own["name"] for own in found] == ["clock-Get", "Clock-set"]


def test_calls_say_in_which_piece_each_argument_stands(corpus):
    task = dataset.load(corpus, TASKS).task
    prompt, vocab = task.tool_prompt(MESSAGES, TOOLS), task.vocab
    parts = Call("Buses", "FindBus", {"to": "Oakton", "fast": "dontcare", "seats": "2"}).parts()
    ids, _ = encode_steps(
        task.encode_prompt(prompt).tolist(),
        7,
        [[((0, 2), parts[0]), *(((i,), text) for i, text in zip((2, 0, 6), parts[1:]))]],
        vocab,
        None,
        closed=True,
    )
    response = ids[len(task.encode_prompt(prompt)) :].tolist()
    (whole,) = task.tool_calls(prompt, response, TOOLS)
    assert json.loads(whole["arguments"]) == {"to": "Oakton", "seats": 2} and whole["values"] == {"to": 3, "seats": 7}
    assert [piece["label"] for piece in whole["pieces"]] == [1, 3, 7]
    first = response.index(vocab.ref_base + 8)
    (less,) = task.tool_calls(prompt, response[:first] + response[first + 2 :], TOOLS)  # one value's is missing
    assert less["values"] == {} and less["arguments"] == whole["arguments"]


def function(**changes):
    return [{"type": "function", "function": FUNCTIONS[0] | changes}]


NO_CHAT = {
    "no function": (MESSAGES, [{"type": "function"}], "tool 1: expected a dict as 'function'"),
    "no object": (MESSAGES, [3], "tool 1: expected a dict as 'function'"),
    "no name": (MESSAGES, function(name=None), "tool 1: expected a str as 'name'"),
    "a name with white space": (MESSAGES, function(name="a b"), "tool 1: the name is 'a b'; allowed: up to 64 letters, digits, _ and -"),
    "a property with white space": (MESSAGES, function(parameters={"properties": {"a\x1e": {}}}), "the property 'a\\x1e' has white space"),
    "a property that is none": (MESSAGES, function(parameters={"required": ["x"]}), "'x' is required, but none of its properties"),
    "a number as calls": ([{"role": "assistant", "tool_calls": 3}], TOOLS, "message 1: expected a list as 'tool_calls'"),
    "a number as values": (MESSAGES, function(parameters={"properties": {"a": {"type": "boolean", "enum": 3}}}), "tool 1, a: expected a list as 'enum'"),
    "a list as a property": (MESSAGES, function(parameters={"properties": {"a": []}}), "tool 1: expected a dict as 'a'"),
    "a result of no call": (MESSAGES[:2] + MESSAGES[3:], TOOLS, "message 3: no call before it has the id 'a'"),
    "arguments that are no JSON": ([{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "x", "arguments": "{"}}]}], TOOLS, "message 1: the arguments of a call are no JSON object: '{'"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_CHAT)
def test_functions_and_messages_that_are_refused(corpus, case):
    messages, tools, message = NO_CHAT[case]
    with pytest.raises(UserError, match=re.escape(message)):
        dataset.load(corpus, TASKS).task.tool_prompt(messages, tools)
