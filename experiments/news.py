"""The report of the news experiments: stored results in, tables of a page and plots out.

    python -m experiments.news docs/news

`--take DIR` first adds, reduced to what is used here, what train.py and decode.py eval left in DIR under the names of
`experiments` (there metrics.jsonl is the curve). The evaluation of span-0 is span-0.eval.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from experiments.results import Arm, Experiment, Plot, Tally, Trial, by_arm, picked, table, targets_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CORPUS = {
    **{"min_events": 2, "max_events": 4, "max_distractors": 8},
    **{"vocab_tokens": 4096, "num_labels": 128, "max_prompt_tokens": 896},
}
_TUNED = "--init SmolLM2-135M-Instruct.Q4_1.gguf --corpus news"
ARMS = {
    "span": Arm("span tokens see everything, body tokens what is named", "news-small", _CORPUS),
    "prompt": Arm("as span, but span tokens see the prompt and what is named", "news-small", _CORPUS, "--header-view prompt"),
    "dense": Arm("the same text, dense mask", "news-small", _CORPUS, "--mask dense"),
    "dense_18k": Arm("the same, three times the steps", "news-small", _CORPUS, "--mask dense --steps 18000"),
    "smollm2": Arm("SmolLM2-135M, LoRA, span mask", "finetune-lora", _CORPUS, _TUNED),
    "smollm2_dense": Arm("SmolLM2-135M, LoRA, dense mask", "finetune-lora", _CORPUS, f"{_TUNED} --mask dense"),
}
CONTROLS = {"span": "dense", "prompt": "dense", "smollm2": "smollm2_dense"}
_SETTINGS = ("seed", "attention", "device", "jax", "num_parameters", "num_examples")
_SCORES = {
    **{"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"},
    **{"fact_accuracy": "fact accuracy", "fact_recall": "fact recall", "all_facts_right": "all facts right"},
    **{"span_precision": "span precision", "span_recall": "span recall", "finished_fraction": "finished"},
}
_READING = {
    "attended_fraction_body": "body: of the context",
    "attended_tokens_body": "tokens",
    "attended_fraction_header": "span tokens: of the context",
    "attended_tokens_header": "tokens",
    "header_share": "share of span tokens",
}
_SPEEDS = ("batch_size", "summaries_per_second", "response_tokens_per_second")


def reduced_evaluation(values: Any, where: str) -> dict[str, Any]:
    """Of what `decode.py eval --json` wrote: the scores, what was read, the speed at each batch size, and what decides them."""
    kept = picked(values, (*_SETTINGS, *_SCORES, *_READING, "by_batch_size"), where)
    return kept | {"by_batch_size": [picked(speed, _SPEEDS, where) for speed in kept["by_batch_size"]]}


def evaluation_options(evaluation: dict[str, Any]) -> str:
    batches = ",".join(str(speed["batch_size"]) for speed in evaluation["by_batch_size"])
    return f"--num-examples {evaluation['num_examples']} --batch-size {batches}"


EXPERIMENT = Experiment(
    arms=ARMS,
    kinds={"eval": "scores, reading and speed"},
    reduced_evaluation=reduced_evaluation,
    evaluation_options=evaluation_options,
    panels={
        "trained from random parameters": [arm for arm, own in ARMS.items() if own.preset == "news-small"],
        "SmolLM2-135M": [arm for arm, own in ARMS.items() if own.preset != "news-small"],
    },
)


def _values(trials: Sequence[Trial], key: str) -> list[float]:
    """Of each seed that has one: there are no span tokens to read by where a model writes none."""
    found = [trial.evaluations["eval"][key] for trial in trials]
    return [value for value in found if value is not None]


def _cell(trials: Sequence[Trial], key: str) -> str:
    """The mean over seeds, and where there are several the lowest and the highest: ROUGE x 100, tokens, or a share."""
    if not (values := _values(trials, key)):
        return "-"
    scale, unit = (1, "") if "tokens" in key else (100, "" if key.startswith("rouge") else "%")
    average, *seeds = (f"{scale * value:.1f}{unit}" for value in (mean(values), *sorted(values)))
    return average if len(seeds) == 1 else f"{average} ({seeds[0]} to {seeds[-1]})"


def _all_facts_right(trials: Sequence[Trial]) -> Tally:
    counts = [(trial.evaluations["eval"]["all_facts_right"], trial.evaluations["eval"]["num_examples"]) for trial in trials]
    return Tally.of([(round(share * num_examples), num_examples) for share, num_examples in counts])


def _scores_table(arms: Mapping[str, Sequence[Trial]], **more: str) -> str:
    """A row for each arm; `more` of what its evaluations have, by name: the column's head."""
    columns, rows = _SCORES | more, []
    for arm, own in arms.items():
        right = _all_facts_right(own)
        cells = [str(right) if key == "all_facts_right" else _cell(own, key) for key in columns]
        rows.append((f"`{arm}`", f"{right.num_examples:,}", *cells))
    return table(("arm", "summaries", *columns.values()), rows)


def scores_table(trials: Sequence[Trial]) -> str:
    return _scores_table(by_arm(trials, "eval"))


def _own(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """The trials that were evaluated by their runs, by arm, as if that were all that there is of them."""
    found = ((trial, (trial.curve or {}).get("evaluation")) for trial in trials)
    return by_arm([dataclasses.replace(trial, evaluations={"eval": evaluation}) for trial, evaluation in found if evaluation])


def own_table(trials: Sequence[Trial]) -> str:
    """The evaluation after the last step of training, of few articles, the same for all arms."""
    return _scores_table(_own(trials), attended_fraction="attended, of the context")


def reading_table(trials: Sequence[Trial]) -> str:
    rows = [(f"`{arm}`", *(_cell(own, key) for key in _READING)) for arm, own in by_arm(trials, "eval").items()]
    return table(("arm", *_READING.values()), rows)


def _speeds(trials: Sequence[Trial]) -> dict[int, tuple[float, float]]:
    """Summaries and response tokens per second, the mean over seeds, by batch sizes that all of them were timed at."""
    found = [{speed["batch_size"]: speed for speed in trial.evaluations["eval"]["by_batch_size"]} for trial in trials]
    sizes = sorted(set.intersection(*({*own} for own in found)))
    summaries, tokens = ({size: mean([own[size][key] for own in found]) for size in sizes} for key in _SPEEDS[1:])
    return {size: (summaries[size], tokens[size]) for size in sizes}


def speed_table(trials: Sequence[Trial]) -> str:
    """Every batch size; at the one that gives an arm the most summaries stands the ratio to its control's most."""
    speeds = {arm: _speeds(own) for arm, own in by_arm(trials, "eval").items()}
    most = {arm: max(own.values(), default=(0.0, 0.0)) for arm, own in speeds.items()}
    rows = []
    for arm, own in speeds.items():
        control = CONTROLS.get(arm)
        for size, (summaries, tokens) in own.items():
            ratio = "-"
            if control in most and summaries == most[arm][0]:
                ratio = f"{summaries / most[control][0]:.2f}x `{control}`"
            rows.append((f"`{arm}`", str(size), f"{summaries:,.1f}", f"{tokens:,.0f}", ratio))
    return table(("arm", "batch", "summaries/s", "response tokens/s", "each at its best batch"), rows)


def targets(trials: Sequence[Trial]) -> str:
    arms, own = by_arm(trials, "eval"), _own(trials)

    def rouge(arm: str) -> tuple[bool, str] | None:
        pair = (arm, CONTROLS[arm])
        for found in (arms, own):  # the larger evaluation, if both have it
            if {*pair} <= found.keys():
                span, dense = (100 * mean(_values(found[name], "rougeL")) for name in pair)
                summaries = found[arm][0].evaluations["eval"]["num_examples"]
                return dense - span < 0.5, f"{span:.2f} against {dense:.2f} ({summaries:,} summaries)"
        return None

    def reading(arm: str) -> tuple[bool, str] | None:
        if arm not in arms:
            return None
        values = _values(arms[arm], "attended_fraction_body")
        return bool(values) and mean(values) < 0.25, _cell(arms[arm], "attended_fraction_body")

    return targets_table(
        target
        for arm in ("span", "smollm2")
        for target in (
            (f"`{arm}`: ROUGE-L less than 0.5 points below `{CONTROLS[arm]}`", rouge(arm)),
            (f"`{arm}`: body tokens attend to less than 25% of their context", reading(arm)),
        )
    )


_MARKS = {
    "rougeL": ("ROUGE-L", {"marker": "o", "markersize": 7}),
    "fact_accuracy": ("right facts, of those stated", {"marker": "s", "markersize": 7}),
    "attended_fraction": ("context read by response tokens", {"marker": "|", "markersize": 14}),
}


def _plot_scores(axes: Axes, trials: Sequence[Trial]) -> None:
    """Of each arm, on its line: what its run found it to score, and how much it read for it."""
    arms = _own(trials)
    for place, (arm, own) in enumerate(arms.items()):
        for key, (words, mark) in _MARKS.items():
            style: dict[str, Any] = {"linestyle": "", "fillstyle": "none", "markeredgewidth": 2, "color": EXPERIMENT.color(arm), **mark}
            if values := _values(own, key):
                axes.plot(100 * mean(values), place, label=words if place == 0 else None, **style)
    axes.set(xlim=(-3, 103), xlabel="%")
    axes.set_yticks(range(len(arms)), [*arms])
    axes.margins(y=0.5)
    axes.invert_yaxis()


PLOTS = {"scores": Plot("ROUGE-L, fact accuracy and the share of the context that was read", lambda trial: _own([trial]), _plot_scores)}


def sections(trials: Sequence[Trial], plots: dict[str, str]) -> dict[str, str]:
    """What stands between the page's markers, beside what every report has."""
    return {
        "targets": targets(trials),
        "scores": scores_table(trials),
        "own": own_table(trials) + plots["scores"],
        "reading": reading_table(trials),
        "speed": speed_table(trials),
    }


def main(arguments: list[str] | None = None) -> int:
    return EXPERIMENT.main("experiments.news", (__doc__ or "").split("\n")[0], PLOTS, sections, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
