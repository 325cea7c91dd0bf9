"""Report the experiments on documents, of papers and verdicts, of stories or of tools: stored results in, tables and plots of a page out.

    python -m experiments.documents papers docs/papers
    python -m experiments.documents stories docs/stories
    python -m experiments.documents tools docs/tools

Each is a page, docs/tools.md, and one of figures, docs/tools-figures.md.

`--take DIR` first adds, reduced, what train.py and decode.py eval left in DIR under the names of `experiments.results`:
papers_labels-0.run.json and .metrics.jsonl of a run, papers_labels-0.eval.json of an evaluation, .gold.json, .bm25.json,
.random.json and .recent.json of one with `--sources`, .unlimited.json without `max_step_tokens`, .free.json of one without
`names_new` either; .single.json of stories with one question a prompt, .whole.json with all,
.near02.json and .near01.json of them with `name_share`, .long.json of papers longer than rows of training; of tools
.few.json and .many.json of one on other catalogues, .constrained.json of one with `--constrained`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd

from data.documents.task import Sources
from data.tasks import TASKS
from experiments import bootstrap, pages
from experiments.bootstrap import Interval
from experiments.pages import judge, markdown_table
from experiments.results import Run
from experiments.variants import Experiment

CORPORA = {"papers": ("papers", "verdicts"), "stories": ("stories",), "tools": ("tools",)}
"""The corpora of each page."""
MAIN = {
    "papers": ("rougeL", "evidence_named"),
    "verdicts": ("verdict_accuracy", "evidence_named"),
    "stories": ("rougeL", "section_named"),
    "tools": ("calls_right", "service_named"),
}
"""The score that each corpus is published by, and how often a right source is named."""
JUDGED = MAIN | {"tools": (*MAIN["tools"], "calls_right_seen_services", "calls_right_unseen_services")}
"""The scores that have a row of their own among the targets."""
BINS = {"below 2,048": (0, 2048), "2,048 to 4,095": (2048, 4096), "4,096 to {:,}": (4096, np.inf)}
"""Lengths of prompts, in tokens; the last one ends where rows of training do."""
# Variants whose headers read labels alone, the one to be judged first.
_NARROW = ("recent", "values_more", "late", "solve", "labels")
_READS = {"papers": 0.05, "verdicts": 0.05, "stories": 0.12, "tools": 0.06}  # at most, of the context, text of responses
_READS_WITH_LABELS = 0.10  # at most, of the context, all tokens of responses
_FASTER = {"papers": 3, "verdicts": 3, "stories": 2, "tools": 2}  # at least, times the responses of the dense control
_BYTES_PER_SECOND = {"H100": 3.35e12, "H200": 4.8e12}  # by the card's data sheet
_KV_BYTES = 23_040  # a token of SmolLM2-135M: keys and values of 3 heads of 64 in bfloat16, in 30 layers
SETS = {
    "tools": {
        "few": "`corpora/turns-5`",
        "eval": "`corpora/turns-26`",
        "many": "`corpora/turns-100`",
        "near01": "`corpora/turns-26`, `name_share` 0.1",
        "constrained": "`corpora/turns-26`, `--constrained`",
    },
    "stories": {
        "eval": "`corpora/stories`, up to 16 questions a prompt",
        "single": "`corpora/stories-1`, one question a prompt",
        "whole": "`corpora/stories-0`, all questions of a story in one prompt",
        "near02": "`corpora/stories`, `name_share` 0.2",
        "near01": "`corpora/stories`, `name_share` 0.1",
        "unlimited": "`corpora/stories`, without `max_step_tokens`",
        "free": "`corpora/stories`, without `max_step_tokens` and `names_new`",
    },
    "papers": {
        "eval": "`corpora/papers`",
        "unlimited": "the same, without `max_step_tokens`",
        "free": "the same, without `max_step_tokens` and `names_new`",
        "long": "prompts of 7,681 to 14,336 tokens, longer than trained",
    },
}
"""Evaluations of other examples, or decoded otherwise, by kind: of tools corpora by their number of services."""
_KEPT = (
    "data",
    "split",
    "attention",
    "device",
    "jax",
    "num_parameters",
    "num_examples",
    "attended_fraction",
    "attended_tokens?",
    *pages.READING,
)
EXPERIMENTS = {
    page: Experiment(
        "documents",
        evaluations={
            "eval": "scores, reading and speed",
            "speed": "the same, alone on the GPU",
            **{kind: f"steps name the sources of `--sources {kind}`" for kind in get_args(Sources)},
            **{kind: f"on {own}" for kind, own in SETS.get(page, {}).items() if kind != "eval"},
        },
        evaluation_fields={
            **dict.fromkeys((*_KEPT, "finished_fraction?", "sources?", "constrained?")),
            "by_example": dict.fromkeys(("digests", "prompt_tokens", "counts")),
            "by_batch_size": [dict.fromkeys(("batch_size", "response_tokens_per_second", "*"))],
        },
        tables=corpora,
    )
    for page, corpora in CORPORA.items()
}
_VARIANTS = {name: own for experiment in EXPERIMENTS.values() for name, own in experiment.variants.items()}


def scored(runs: Sequence[Run], variant: str, kind: str) -> pd.DataFrame:
    """Collect the examples of a variant's evaluations of a kind, all seeds together, by digest; empty where there is none.

    Columns: (score, 0) and (score, 1), the sum and the weight; ("prompt_tokens", 0).
    """
    return _scored(tuple(run for run in runs if run.variant == variant), kind)


@functools.lru_cache(maxsize=256)  # each table asks for the same ones
def _scored(runs: tuple[Run, ...], kind: str) -> pd.DataFrame:
    frames = [_frame(values) for run in runs if (values := run.part(kind))]
    if not frames:
        return pd.DataFrame()
    examples = pd.concat(frames).groupby(level=0, sort=False)
    found = examples.sum()
    found["prompt_tokens", 0] /= examples.size()
    return found


def _frame(evaluation: Mapping[str, Any]) -> pd.DataFrame:
    own = evaluation["by_example"]
    columns = {(name, part): [pair[part] for pair in pairs] for name, pairs in own["counts"].items() for part in (0, 1)}
    return pd.DataFrame({**columns, ("prompt_tokens", 0): own["prompt_tokens"]}, index=own["digests"], dtype=float)


def _counts(examples: pd.DataFrame, name: str) -> bootstrap.Counts:
    return np.stack([examples[name, part] for part in (0, 1)], axis=1) if (name, 0) in examples.columns else np.zeros((len(examples), 2))


def compare(ours: pd.DataFrame, theirs: pd.DataFrame, name: str) -> tuple[int, float, Interval] | None:
    """Compare a score on the examples that both have: (how many, the other's score, the difference); None where one has none."""
    common = ours.index.intersection(theirs.index, sort=False)
    own, other = (_counts(examples, name)[examples.index.get_indexer(common)] for examples in (ours, theirs))
    if not (own[:, 1].any() and other[:, 1].any()):
        return None
    return len(common), bootstrap.score(other), bootstrap.difference(own, other)


def _percent(*values: float) -> list[str]:
    return ["-" if np.isnan(value) else f"{100 * value:.1f}" for value in values]


def control(corpus: str, variant: str) -> str:
    """Name the dense control of a variant, which a dense one is itself: that of the corpus where the variant names none."""
    dense = f"{corpus}_dense"
    return variant if variant.startswith(dense) else _VARIANTS[variant].control or dense


def _interval(found: Interval | None) -> list[str]:
    return _percent(*found) if found else ["-"] * 3


def _names(corpus: str) -> list[str]:
    """Return the names of all scores of a corpus."""
    kinds: Mapping[str, tuple[str, ...]] = vars(TASKS[corpus])["score_kinds"]
    return [name for names in kinds.values() for name in names]


def _words(name: str) -> str:
    return name.replace("_", " ")


_DIFFERENCE = ("difference", *(f"95% {bound}" for bound in ("from", "to")))


def scores_table(runs: Sequence[Run], variants: Sequence[str], corpus: str) -> str:
    """Write all scores of each variant, x 100."""
    names, rows = _names(corpus), []
    for variant in variants:
        if len(examples := scored(runs, variant, "eval")):
            cells = _percent(*(bootstrap.score(_counts(examples, name)) for name in names))
            rows.append((f"`{variant}`", f"{len(examples):,}", *cells))
    return markdown_table(("variant", "examples", *map(_words, names)), rows)


def latest(runs: Sequence[Run], corpus: str) -> str:
    """Name the variant with narrow headers that is judged: the latest one that was evaluated."""
    names = [f"{corpus}_{kind}" for kind in _NARROW]
    return next((name for name in names if len(scored(runs, name, "eval"))), names[-1])


def differences_table(runs: Sequence[Run], variants: Sequence[str], corpus: str) -> str:
    """Write how much higher than the control each variant scores, on the examples that both have: all scores of the latest one.

    That one is compared with text without span tokens as well, in the scores that such text can have.
    """
    rows, judged = [], latest(runs, corpus)
    plain = control(corpus, judged).replace("_dense", "_plain")
    for variant, own in [*((variant, control(corpus, variant)) for variant in variants), (judged, plain)]:
        ours, theirs = (scored(runs, name, "eval") for name in (variant, own))
        names = () if variant == own else _names(corpus) if variant == judged else JUDGED[corpus]
        for name in names:
            found = compare(ours, theirs, name)
            if found and (found[1] or own != plain):  # text that names nothing has 0 of what it does not name
                rows.append((f"`{variant}`", _words(name), f"{found[0]:,}", f"`{own}`", *_percent(found[1]), *_interval(found[2])))
    return markdown_table(("variant", "score", "examples", "control", "the control's", *_DIFFERENCE), rows)


def sources_table(runs: Sequence[Run], variants: Sequence[str], corpus: str) -> str:
    """Write the scores with given sources beside those with the model's own, of the same examples and seeds."""
    rows = []
    for variant in variants:
        for kind in get_args(Sources):
            both = [run for run in runs if run.part(kind)]
            given, chosen = scored(both, variant, kind), scored(both, variant, "eval")
            for name in MAIN[corpus]:
                if found := compare(given, chosen, name):
                    value = found[1] + found[2].value
                    rows.append((f"`{variant}`", kind, _words(name), *_percent(found[1], value), *_interval(found[2])))
    return markdown_table(("variant", "sources", "score", "the model's own", "given", *_DIFFERENCE), rows)


def lengths_table(runs: Sequence[Run], variants: Sequence[str], corpus: str) -> str:
    """Write the main score by the length of the prompt, those beyond the rows of training apart."""
    name, rows = MAIN[corpus][0], []
    for variant in variants:
        both = (pd.concat([scored(runs, own, "eval"), scored(runs, own, "long")]) for own in (variant, control(corpus, variant)))
        ours, theirs = (examples[~examples.index.duplicated()] for examples in both)
        if ours.empty:
            continue
        tokens = ours["prompt_tokens", 0]
        trained = min(run.settings["training"]["sequence_tokens"] for run in runs if run.variant == variant)
        parts = {words.format(trained - 1): (tokens >= low) & (tokens < min(high, trained)) for words, (low, high) in BINS.items()}
        parts[f"{trained:,} and above, longer than trained"] = tokens >= trained
        for words, part in parts.items():
            own = ours[part]
            if len(own):
                found = compare(own, theirs, name) if variant != control(corpus, variant) else None
                score = _percent(bootstrap.score(_counts(own, name)))
                rows.append((f"`{variant}`", words, f"{len(own):,}", *score, *_interval(found[2] if found else None)))
    return markdown_table(("variant", "tokens of the prompt", "examples", _words(name), *_DIFFERENCE), rows)


def sets_table(runs: Sequence[Run], variants: Sequence[str], corpus: str) -> str:
    """Write the main scores on each set of examples, such as catalogues by their size, of variants that have others, and their speeds."""
    rows, unit = [], TASKS[corpus].unit
    for variant in variants:
        several = any(len(scored(runs, variant, kind)) for kind in SETS[corpus] if kind != "eval")
        for kind, words in SETS[corpus].items() if several else ():
            ours, theirs = (scored(runs, own, kind) for own in (variant, control(corpus, variant)))
            # Constrained tokens come from the host, which says nothing of the model's speed.
            speeds = timed(runs) if kind == "eval" else pages.evaluations(runs, kind)
            rate = None if kind == "constrained" else _best(speeds[speeds["variant"] == variant], f"{unit}_per_second")
            fastest = f"{rate:.1f}" if rate else "-"
            for name in MAIN[corpus] if len(ours) else ():
                found = compare(ours, theirs, name) if variant != control(corpus, variant) else None
                score = _percent(bootstrap.score(_counts(ours, name)))
                rows.append((f"`{variant}`", words, _words(name), *score, *_interval(found[2] if found else None), fastest))
    return markdown_table(("variant", "corpus", "score", "found", *_DIFFERENCE, f"{unit}/s"), rows)


def targets(runs: Sequence[Run], corpora: Sequence[str]) -> str:
    """Judge what the latest evaluated variant with narrow headers is to reach against its dense control."""
    rows, evaluated, speeds = [], pages.evaluations(runs, "eval"), timed(runs)
    for corpus in corpora:
        unit, (_, named) = TASKS[corpus].unit, MAIN[corpus]
        variant = latest(runs, corpus)
        pair = variant, control(corpus, variant)
        ours = evaluated[evaluated["variant"] == variant]
        examples, others = (scored(runs, own, "eval") for own in pair)
        differences = {name: found[2] for name in _names(corpus) if (found := compare(examples, others, name))}
        for name in JUDGED[corpus]:
            own = differences.get(name)
            rows.append(_judge(f"{corpus}: {_words(name)} minus that of dense, upper bound", 0, own and 100 * own.high))
        target = f"{corpus}: other scores below those of dense by more than their interval"
        below = [_words(name) for name, own in differences.items() if name not in JUDGED[corpus] and own.high < 0]
        reached = not below if differences else None
        rows.append(judge(target, "none", ", ".join(below) or "none" if differences else "-", reached=reached))
        reading = {"text": ("attended_fraction_body", _READS[corpus]), "all tokens": ("attended_fraction", _READS_WITH_LABELS)}
        for words, (key, most) in reading.items():
            target, wanted = f"{corpus}: of the context, {words} of responses reads", f"at most {most:.0%}"
            share = None if ours.empty else ours[key].astype(float).mean()
            rows.append(judge(target, wanted) if share is None else judge(target, wanted, f"{share:.1%}", reached=share <= most))
        rates = [_best(speeds[speeds["variant"] == own], f"{unit}_per_second") for own in (variant, timed_control(speeds, corpus, variant))]
        ratio = rates[0] / rates[1] if rates[0] and rates[1] else None
        rows.append(_judge(f"{corpus}: {unit} a second, times those of dense", _FASTER[corpus], ratio))
        found = compare(examples, scored(runs, variant, "bm25"), named)
        rows.append(_judge(f"{corpus}: {_words(named)} minus that with BM25's sources given", 0, found and 100 * found[2].value))
    return markdown_table(pages.TARGETS, rows)


def _judge(target: str, least: float, found: float | None) -> tuple[str, str, str, str]:
    if found is None:
        return judge(target, f"at least {least:g}")
    return judge(target, f"at least {least:g}", f"{found:.2f}", reached=found >= least)


def _best(frame: pd.DataFrame, unit: str) -> float | None:
    """Return the rate of the best batch size, a mean over seeds; None where there is none."""
    timed = pd.DataFrame([speed for each in frame.get("by_batch_size", ()) for speed in each])
    return None if timed.empty else float(timed.groupby("batch_size")[unit].mean().max())


def timed(runs: Sequence[Run]) -> pd.DataFrame:
    """Collect the evaluations that say how fast a variant is: those that ran alone, where there are some. Others were not timed."""
    alone = {run.variant for run in runs if run.part("speed")}
    found = [pages.evaluations(runs, "speed"), pages.evaluations([run for run in runs if run.variant not in alone], "eval")]
    return pd.concat([own[own["by_batch_size"].astype(bool)] if len(own) else own for own in found])


def timed_control(speeds: pd.DataFrame, corpus: str, variant: str) -> str:
    """Name the dense control that was timed: a variant's own, or else the last one, which has as many weights and the same prompts."""
    own = control(corpus, variant)
    names = [values["variant"] for values in speeds.to_dict("records") if values["by_batch_size"]]
    others = [name for name in names if name.startswith(f"{corpus}_dense")]
    return own if own in others or not others else others[-1]


def times_table(frame: pd.DataFrame, unit: str) -> str:
    """Write what a response takes of the GPU's time, prefill and decoding apart, and the least that decoding's bytes take.

    These are the weights, read once a token for a whole batch, and the keys and values of the tokens attended to.
    """
    rows = []
    for values in frame.to_dict("records"):
        for speed in values["by_batch_size"]:
            if not isinstance(speed, dict) or "prefill_seconds" not in speed:
                continue
            count, per_second = values["num_examples"], next(own for card, own in _BYTES_PER_SECOND.items() if card in values["device"])
            tokens = speed["response_tokens_per_second"] * speed["decode_seconds"] / count
            moved = 2 * values["num_parameters"] / speed["batch_size"] + values["attended_tokens"] * _KV_BYTES
            taken = speed["prefill_seconds"], speed["decode_seconds"] - speed["prefill_seconds"], count * tokens * moved / per_second
            numbers = [f"{1000 * seconds / count:.2f}" for seconds in taken]
            rows.append((f"`{values['variant']}`", str(speed["batch_size"]), f"{tokens:.1f}", *numbers))
    return markdown_table(("variant", "batch", f"tokens, mean of {unit}", "prefill, ms", "decoding, ms", "bound of bytes, ms"), rows)


def sections(page: str, runs: Sequence[Run], plots: dict[str, str]) -> dict[str, str]:
    """Write the sections of a page beside those that every report has."""
    evaluated, speeds, found = pages.evaluations(runs, "eval"), timed(runs), {"targets": targets(runs, CORPORA[page])}
    tables = {"scores": scores_table, "differences": differences_table, "sources": sources_table, "lengths": lengths_table}
    for corpus in CORPORA[page]:
        variants = list(EXPERIMENTS[page].panels[corpus])
        own, alone = (frame[frame["variant"].isin(variants)] for frame in (evaluated, speeds))
        controls = {variant: timed_control(speeds, corpus, variant) for variant in variants if variant != control(corpus, variant)}
        # Prompts of tools are as long as their catalogues, whose sizes are sets.
        own_tables = {name: write for name, write in tables.items() if (corpus, name) != ("tools", "lengths")}
        found |= {f"{corpus} {name}": write(runs, variants, corpus) for name, write in own_tables.items()}
        found |= {f"{corpus} reading": pages.reading_table(own), f"{corpus} speed": pages.speed_table(alone, TASKS[corpus].unit, controls)}
        found[f"{corpus} times"] = times_table(alone, TASKS[corpus].unit)
    if page in SETS:
        found[f"{page} sets"] = sets_table(runs, list(EXPERIMENTS[page].panels[page]), page)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    commands = {page: pages.report(EXPERIMENTS[page], {}, functools.partial(sections, page)) for page in CORPORA}
    pages.run_command(commands, argv, __doc__)


if __name__ == "__main__":
    main()
