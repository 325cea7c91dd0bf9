"""Small made-up repositories in the layout of the public ones, all three parts of each."""

import csv
import json

REPORT = """TITLE: {drug} for tired {people}

  ABSTRACT.OBJECTIVE::
To see whether {drug} wakes {people}.

ABSTRACT.RESULTS::
Of 1,240 {people}, {n} woke with {drug} and 31 with tea (p = 0.02). Nobody was hurt.

BODY.INTRODUCTION:
Tired {people} are a problem everywhere. Tea is what most of them drink.

BODY.METHODS.PATIENTS (TABLE :1)
We asked 1240 {people} in the town of Oakwick.

They were given {drug} or tea for 3 weeks.

BODY.RESULTS.MAIN.:
With {drug}, {n} {people} woke, and with tea 31 (p=0.02).
No one was hurt by anything.
"""
EVIDENCE = "With {drug}, {n} {people} woke, and with tea 31 (p=0.02)."
IN_ABSTRACT = "{n} woke with {drug} and 31 with tea"
QUESTIONS = [("Waking", 1, (EVIDENCE, IN_ABSTRACT)), ("Harm", 0, ("No one was hurt by anything.",))]
PAPERS = {  # by split: number, words of the report
    "train": {101: ("Brightol", "bakers", 77), 102: ("Sunnium", "sailors", 85), 103: ("Dawnex", "dancers", 64)},
    "validation": {201: ("Wakor", "waiters", 58)},
    "test": {301: ("Lumin", "lawyers", 93), 302: ("Glowan", "grooms", 44)},
}


def write_csv(file, columns, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_reports(root, parts=tuple(PAPERS)):
    """A clone of jayded/evidence-inference with these parts; each paper has a question on waking and one on harm."""
    annotations = root / "annotations"
    prompts, answers = [], []
    (annotations / "splits").mkdir(parents=True)
    (annotations / "txt_files").mkdir()
    for split in parts:
        (annotations / "splits" / f"{split}_article_ids.txt").write_text("".join(f"{number}\n" for number in PAPERS[split]))
        for number, (drug, people, n) in PAPERS[split].items():
            words = {"drug": drug, "people": people, "n": n}
            text = REPORT.format(**words)
            (annotations / "txt_files" / f"PMC{number}.txt").write_text(text)
            asked = {"PMCID": number, "Intervention": drug, "Comparator": "tea"}
            prompts += [{**asked, "PromptID": 10 * number, "Outcome": "Waking"}, {**asked, "PromptID": 10 * number + 1, "Outcome": "Harm"}]
            for prompt, code, quotes in (
                (10 * number, 1, (EVIDENCE, IN_ABSTRACT)),
                (10 * number + 1, 0, ("No one was hurt by anything.",)),
            ):
                for quote in quotes:
                    start = text.rindex(quote.format(**words))
                    answers.append({"UserID": 0, "PromptID": prompt, "PMCID": number, "Valid Label": True, "Valid Reasoning": True})
                    answers[-1] |= {"Label": "", "Annotations": "", "Label Code": code, "In Abstract": "UNK"}
                    answers[-1] |= {"Evidence Start": start, "Evidence End": start + len(quote.format(**words))}
    write_csv(annotations / "prompts_merged.csv", list(prompts[0]), prompts)
    write_csv(annotations / "v2_annotations.csv", list(answers[0]), answers)
    return root


STORIES = {"train": ("the-fox", "the-owl"), "val": ("the-mole",), "test": ("the-swan", "the-wren")}
TOLD = ["Once {name} found\na silver key.\n\nIt shone.", "A hungry wolf came to {name}.", "And {name} slept under the oak."]
ASKED = [  # question, sections, kind, answers
    ("What did {name} find?", "1", "explicit", ("a silver key", "the key")),
    ("Who came to {name}?", "2", "explicit", ("a hungry wolf", "a wolf")),
    ("Why was {name} glad?", "2, 3", "implicit", ("the wolf had gone", "")),
    ("Where did {name} sleep?", "3", "explicit", ("under the oak", "below an oak")),
]


def write_stories(root, parts=tuple(STORIES)):
    """A clone of uci-soe/FairytaleQAData with these parts: three sections and four questions a story."""
    top = root / "data-by-train-split"
    for part in parts:
        for name in STORIES[part]:
            who = name.removeprefix("the-")
            texts = [
                f"Once the {who} found\na silver key.\n\nIt shone.",
                f"A hungry wolf came to the {who}.",
                f"The {who} slept under the oak.",
            ]
            rows = [{"section": number, "text": text} for number, text in enumerate(texts, 1)]
            write_csv(top / "section-stories" / part / f"{name}-story.csv", ["section", "text"], rows)
            columns = ["question_id", "cor_section", "question", "ex-or-im1", "answer1", "answer2", "answer4"]
            asked = [
                {"question_id": i, "cor_section": told, "question": text.format(name=f"the {who}"), "ex-or-im1": kind}
                | {"answer1": answers[0], "answer2": "", "answer4": answers[1]}
                for i, (text, told, kind, answers) in enumerate(ASKED, 1)
            ]
            write_csv(top / "questions" / part / f"{name}-questions.csv", columns, asked)
    return root


OWN = [
    {
        "document": "The mayor of Oakton resigned on Monday. It rained. She had served for 12 years.\n\nA bridge was closed.",
        "steps": [{"text": "Oakton's mayor resigned after 12 years."}, {"text": "No way over.", "sources": ["bridge was closed"]}],
    },
    {
        "document": ["Snow fell on three towns. It was deep.", "The school was closed for 2 days."],
        "steps": [{"text": "Nobody learned anything.", "sources": [1]}, {"text": "Quiet.", "sources": ["closed for 2 days", 0]}],
        "instruction": "Say what it was like.",
    },
]


def write_own(file):
    file.write_text("".join(json.dumps(row) + "\n" for row in OWN), encoding="utf-8")
    return file


SERVICES = {  # slots with the values that they may take, if these are known; methods with what they require and their defaults
    "Buses_1": (
        {"to_town": (), "seats": ("1", "2", "3"), "line": (), "class": ("any", "first"), "leaves": ()},
        {"FindBus": (["to_town"], {"seats": "1"}), "BookBus": (["line", "seats"], {"class": "any"})},
    ),
    "Buses_2": ({"stop": ()}, {"FindStop": (["stop"], {})}),
    "Inns_1": ({"place": (), "inn": ()}, {"FindInn": (["place"], {})}),
    "Weather_1": ({"town": (), "sky": ()}, {"GetWeather": (["town"], {})}),
}
SERVICES["Taxis_1"] = SERVICES["Buses_1"]
SCHEMAS = {"train": [*SERVICES][:4], "dev": ["Buses_1", "Inns_1", "Weather_1", "Taxis_1"], "test": ["Inns_1", "Taxis_1", "Weather_1"]}
CARRIERS = {"train": ["Buses_1"] * 3, "dev": ["Buses_1", "Taxis_1"], "test": ["Taxis_1"] * 2}  # one a dialogue
TOWNS = ("Oakton", "Elmville", "Ashford")


def paraphrased(name, version):
    return name + f"_v{version}" * bool(version)


def schema(name, version):
    slots, methods = SERVICES[name]
    return {
        "service_name": f"{name}{version or ''}",
        "description": paraphrased(f"Offers {name}", version),
        "slots": [
            {"name": paraphrased(slot, version), "description": f"The {slot}", "is_categorical": bool(values), "possible_values": [*values]}
            for slot, values in slots.items()
        ],
        "intents": [
            {"name": paraphrased(method, version), "description": f"To {method}", "is_transactional": False, "result_slots": []}
            | {"required_slots": [paraphrased(slot, version) for slot in required]}
            | {"optional_slots": {paraphrased(slot, version): value for slot, value in optional.items()}}
            for method, (required, optional) in methods.items()
        ],
    }


def frame(service, *values, **called):
    acts = [{"act": "INFORM", "slot": slot, "values": [value], "canonical_values": [value]} for slot, value in values]
    return {"service": service, "actions": acts, "slots": []} | called


def call(method, results=(), **parameters):
    return {"service_call": {"method": method, "parameters": parameters}, "service_results": [*results]}


def dialogue(number, carrier, town):
    """A call whose values stand in two turns, one with a value of a row and a default, and one with what another service was told."""
    rows = [{"to_town": town, "seats": "2", "line": line, "leaves": f"{line[1]}:30"} for line in ("K7", "K8")]
    turns = [
        ("USER", f"I want to go to {town}.", frame(carrier, ("to_town", town))),
        ("SYSTEM", "How many are you?", frame(carrier)),
        ("USER", "Two of\nus.", frame(carrier, ("seats", "2"))),
        ("SYSTEM", "One leaves at 7:30.", frame(carrier, ("leaves", "7:30"), **call("FindBus", rows, seats="2", to_town=town))),
        ("USER", "Book it.", frame(carrier)),
        ("SYSTEM", "Booked.", frame(carrier, **call("BookBus", rows[:1], **{"line": "K7", "seats": "2", "class": "any"}))),
        ("USER", "An inn there?", frame("Inns_1")),
        ("SYSTEM", "There is none.", frame("Inns_1", **call("FindInn", place=town))),
        ("USER", "Thanks.", frame("Inns_1")),
    ]
    return {
        "dialogue_id": number,
        "services": [carrier, "Inns_1"],
        "turns": [{"speaker": who, "utterance": text, "frames": [own]} for who, text, own in turns],
    }


def write_tools(root, parts=tuple(SCHEMAS)):
    """A clone of google-research-datasets/dstc8-schema-guided-dialogue with these parts; a dialogue has three calls."""
    for part in parts:
        for version in range(6):
            folder = root / f"sgd_x/data/v{version}" / part if version else root / part
            folder.mkdir(parents=True)
            (folder / "schema.json").write_text(json.dumps([schema(name, version) for name in SCHEMAS[part]]))
        for number, carrier in enumerate(CARRIERS[part]):
            file = root / part / f"dialogues_{number:03}.json"
            file.write_text(json.dumps([dialogue(f"{part}_{number}", carrier, TOWNS[number])]))
    return root
