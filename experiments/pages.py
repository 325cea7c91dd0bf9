"""Pages that report experiments: tables and plots of stored runs, written between the markers of a Markdown file.

The text between `<!-- NAME -->` and `<!-- end -->` is replaced. A page says what was not run.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin
from tyro.conf import Positional

from data import card, commandline
from experiments.results import Run, digest, load, take
from experiments.variants import Experiment
from selfspan_jax import files
from selfspan_jax.commands import running
from selfspan_jax.errors import UserError
from selfspan_jax.evaluation import wilson

# ----------------------------------------------------------------------------------------------------------------- tables


@dataclasses.dataclass(frozen=True)
class Tally:
    """How many of some examples were right, over all seeds and as the share of each seed."""

    right: int
    num_examples: int
    by_seed: tuple[float, ...]

    @classmethod
    def of(cls, frame: pd.DataFrame, score: str) -> Tally:
        """Pool rows with the columns seed, num_examples and `score`, the share that was right."""
        counts = pd.DataFrame({"right": (frame[score] * frame["num_examples"]).round(), "all": frame["num_examples"]})
        by_seed = counts.groupby(frame["seed"]).sum()
        return cls(int(counts["right"].sum()), int(counts["all"].sum()), tuple(by_seed["right"] / by_seed["all"]))

    @property
    def share(self) -> float:
        return self.right / self.num_examples

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.share, self.num_examples)

    @property
    def spread(self) -> float:
        return max(self.by_seed) - min(self.by_seed)

    @property
    def bounds(self) -> tuple[str, str]:
        """The cells of its 95% interval (Wilson), in percent."""
        low, high = self.interval
        return f"{100 * low:.1f}", f"{100 * high:.1f}"

    @property
    def extremes(self) -> tuple[str, str]:
        """The cells of the lowest and the highest seed, in percent; "-" where there is one."""
        shares = [f"{100 * share:.1f}" for share in (min(self.by_seed), max(self.by_seed))]
        return (shares[0], shares[1]) if len(self.by_seed) > 1 else ("-", "-")


Row = dict[str, Any]
Reports = Sequence[tuple[Path, Row]]
"""Files of results, and the JSON in them."""

BOUNDS = ("95% from, %", "95% to, %")
"""Head of `Tally.bounds`."""
EXTREMES = ("lowest seed, %", "highest seed, %")
"""Head of `Tally.extremes`."""
TARGETS = ("target", "wanted", "found", "reached")
"""Head of a table of targets; see `judge`."""


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; "Not run." where it has no rows."""
    return card.table(head, rows) if rows else "Not run."


Cell = Callable[[Row], str]
Columns = Sequence[tuple[str, Cell]]
"""The head of each column, and what writes its cells."""


def shown(row: Row, key: str, form: str = "", scale: float = 1) -> str:
    """Write a value of a row in a format, times a scale; "-" where it has none."""
    return "-" if row.get(key) is None else format(row[key] if scale == 1 else scale * row[key], form)


def value(key: str, form: str = "", scale: float = 1) -> Cell:
    """Return what writes a value of rows, see `shown`."""
    return lambda row: shown(row, key, form, scale)


def rows_table(rows: Iterable[Row], columns: Columns) -> str:
    """Write a table of rows; see `markdown_table`."""
    return markdown_table([head for head, _ in columns], [[write(row) for _, write in columns] for row in rows])


def judge(target: str, wanted: str = "-", found: str = "-", *, reached: bool | None = None) -> tuple[str, str, str, str]:
    """Write the row of a target; None where it was not run."""
    return target, wanted, found, "not run" if reached is None else "yes" if reached else "**no**"


def conditions(report: Row, *more: str) -> str:
    """Say under which conditions figures were measured: what, the device, versions, the memory's speed."""
    words = [*more, report["device"], *(f"JAX {found['jax']}" for found in [report.get("versions", report)] if "jax" in found)]
    words += [f"transformers {report['transformers']}"] if "transformers" in report else []
    ceiling = report.get("read_ceiling_terabytes_per_second")
    return ", ".join(words + ([f"read ceiling {ceiling:.2f} TB/s"] if ceiling else []))


def link(file: Path) -> str:
    """Link a file of results from the page beside its directory."""
    return f"[JSON]({file.parent.name}/{file.name})"


def each(write: Callable[[Row], str]) -> Callable[[Reports], str]:
    """Write what `write` makes of each report, below its conditions, where they are known, and its file."""

    def tables(reports: Reports) -> str:
        shapes = [[report["shape"]] if report.get("shape") else [] for _, report in reports]
        told = [
            f"{conditions(report, *shape)} ({link(file)})" if "device" in report else link(file)
            for (file, report), shape in zip(reports, shapes)
        ]
        return "\n\n".join(f"{words}:\n\n{write(report)}" for words, (_, report) in zip(told, reports))

    return tables


def sections_of(results: Path, writers: Mapping[str, tuple[str, Callable[[Reports], str]]]) -> dict[str, str]:
    """Write the sections of a directory's pages whose files are there: by its name a pattern of their names, and what writes it of them."""
    found = {}
    for name, (pattern, write) in writers.items():
        if reports := [(file, files.read_json(file)) for file in sorted(results.glob(pattern))]:
            found[name] = write(reports)
    return found


def tables_page(default: str, sections: Callable[[Path], dict[str, str]]) -> type:
    """Make the command that writes the tables of a directory's pages."""

    @dataclasses.dataclass(frozen=True)
    class Page:
        """Write the tables of pages from their JSON files."""

        results: Positional[Path] = Path(default)
        """Directory of the files; the pages are NAME.md and NAME-figures.md beside it. A section without files stays as it is."""

        def run(self) -> None:
            fill_pages(self.results, sections(self.results))

    return Page


READING = {
    "attended_fraction_body": "body: of the context",
    "attended_tokens_body": "tokens",
    "attended_fraction_header": "span tokens: of the context",
    "attended_tokens_header": "tokens",
    "header_share": "share of span tokens",
}
"""What decode.py eval says of the context that was read, and the heads of its columns."""


def evaluations(runs: Iterable[Run], kind: str) -> pd.DataFrame:
    """Collect evaluations, a row for each run that has one.

    Args:
      kind: "eval", or "own": of the run itself after its last step, on few articles, the same for all variants.
    """
    rows = [{**values, "variant": run.variant, "seed": run.seed} for run in runs if (values := run.part(kind))]
    return pd.DataFrame(rows, columns=None if rows else ["variant"])


def by_variant(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Divide what `evaluations` collected, in its order."""
    return ((str(variant), own) for variant, own in frame.groupby("variant", sort=False))


def score_cell(own: pd.DataFrame, key: str) -> str:
    """Write the mean over seeds: ROUGE x 100, tokens, or a share."""
    values = own[key].dropna().astype(float)  # there are no span tokens to attend where a model writes none
    if values.empty:
        return "-"
    scale, unit = (1, "") if "tokens" in key else (100, "" if key.startswith("rouge") else "%")
    return f"{scale * values.mean():.1f}{unit}"


def reading_table(frame: pd.DataFrame) -> str:
    rows = [(f"`{variant}`", *(score_cell(own, key) for key in READING)) for variant, own in by_variant(frame)]
    return markdown_table(("variant", *READING.values()), rows)


def speed_table(frame: pd.DataFrame, unit: str, controls: Mapping[str, str]) -> str:
    """Write every batch size; the one that gives a variant the most a second has the ratio to the control's most."""
    speeds = {}
    for variant, own in by_variant(frame):
        if found := [speed for each in own["by_batch_size"] for speed in each]:  # none of what was decoded beside other work
            timed = pd.DataFrame(found).groupby("batch_size")
            speeds[variant] = timed.mean()[timed.size() == len(own)]  # at batch sizes that all seeds were timed at
    most = {variant: own[f"{unit}_per_second"].max() for variant, own in speeds.items()}
    rows = []
    for variant, own in speeds.items():
        control = controls.get(variant)
        for size, speed in own.iterrows():
            rate = speed[f"{unit}_per_second"]
            best = control in most and rate == most[variant]
            ratio = f"{rate / most[control]:.2f}x `{control}`" if control and best else "-"
            rows.append((f"`{variant}`", str(size), f"{rate:,.1f}", f"{speed['response_tokens_per_second']:,.0f}", ratio))
    return markdown_table(("variant", "batch", f"{unit}/s", "response tokens/s", "each at its best batch"), rows)


def _seeds(runs: Iterable[Run]) -> dict[str, list[str]]:
    """List the seeds of each variant."""
    by_variant = itertools.groupby(runs, key=lambda run: run.variant)
    return {name: [str(run.seed) for run in own] for name, own in by_variant}


def _cards(runs: Iterable[Run]) -> dict[str, str]:
    """Name the cards that each variant was evaluated on, as in "H100"."""
    devices = {run.variant: {found["device"] for found in run.evaluations.values()} for run in runs}
    return {name: ", ".join(sorted(each.removeprefix("NVIDIA ").split(" ")[0] for each in own)) for name, own in devices.items()}


def _variants_table(experiment: Experiment, runs: Sequence[Run]) -> str:
    seeds, cards = _seeds(runs), _cards(runs)
    rows = [
        (
            f"`{name}`",
            own.description,
            f"`{f'{own.preset} {own.options}'.strip()}`",
            str(len(seeds[name])) if name in seeds else "not run",
            cards.get(name) or "-",
        )
        for name, own in experiment.variants.items()
    ]
    return markdown_table(("variant", "what it is", "`python train.py`", "number of seeds", "evaluated on"), rows)


def _training_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        settings, curve = run.settings["training"], run.curve
        done, cells = settings["steps"], ["-"] * 5
        if curve:
            done = curve["step"][-1]
            mfu = curve["mfu"]
            cells = [
                f"{curve['seconds']:,.0f}",
                f"{round(curve['tokens_per_second'], -3):,.0f}",
                "-" if mfu is None else f"{100 * mfu:.1f}",
            ]
            cells += [f"{100 * curve['input_wait_fraction']:.1f}", f"{curve['loss'][-1]:.2g}"]
        sizes = (f"{done:,}", str(settings["batch_size"]), str(settings["sequence_tokens"]))
        rows.append((f"`{run.variant}`", str(run.seed), *sizes, *cells))
    head = ("variant", "seed", "steps", "rows", "tokens of a row", "seconds", "tokens/s", "MFU, %", "input wait, %", "last loss")
    return markdown_table(head, rows)


def _not_run(experiment: Experiment, runs: Sequence[Run]) -> str:
    trained = _seeds(runs)
    lines = [f"- `{name}` ({own.description}): not trained" for name, own in experiment.variants.items() if name not in trained]
    for kind, description in experiment.evaluations.items():
        missing, made = (_seeds(run for run in runs if (kind in run.evaluations) == there) for there in (False, True))
        few = made if len(made) < len(missing) else missing
        names = [f"`{name}` with seed {', '.join(seeds)}" for name, seeds in few.items()]
        words = "; ".join(names) if few is missing else f"all but {'; '.join(names)}" if names else "all"
        lines += [f"- {description}: {words}"] if missing else []
    return "\n".join(lines) or "Nothing: all variants were trained and evaluated."


def _commands(experiment: Experiment, runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        commit, directory = run.settings["commit"], f"runs/{run.variant}-{run.seed}"
        machine = next((f"evaluated on one {e['device']}, JAX {e['jax']}" for e in run.evaluations.values()), "not evaluated")
        lines += [f"# {run.variant}, seed {run.seed}: trained at commit {commit}, {machine}"]
        lines += [experiment.variants[run.variant].command(run.settings, directory)]
        for evaluation in run.evaluations.values():
            other = "" if evaluation["commit"] == commit else f"  # commit {evaluation['commit']}"
            lines.append(f"python decode.py eval {directory}/model {_eval_options(evaluation)}{other}")
    return "\n".join(["```", *lines, "```"]) if lines else "Not run."


def _eval_options(evaluation: Mapping[str, Any]) -> str:
    """Write the options of `decode.py eval` that an evaluation was made with."""
    if sets := evaluation.get("sets"):  # of expressions, by number of operators or a range of them
        low, _, high = next(iter(sets)).partition("-")
        which = f" --min-ops {low} --max-ops {high}" if high else f" --ops {','.join(sets)}"
        scored, num_sets = sum(row["num_examples"] for row in evaluation["by_ops"].values()), len(sets)
        speeds = next(iter(sets.values()))["by_batch_size"]
    else:
        scored, num_sets, speeds, which = evaluation["num_examples"], 1, evaluation["by_batch_size"], ""
    num_examples = (scored + evaluation.get("num_too_long", 0)) // num_sets  # those without room were drawn, too
    passes = f" --passes {evaluation['passes']}" if evaluation.get("passes", 1) > 1 else ""
    batches = f" --batch-size {','.join(str(speed['batch_size']) for speed in speeds)}" if speeds else ""
    rest = f"--num-examples {num_examples}{which}{batches}{passes}"
    if "data" not in evaluation:
        return f"--seed {evaluation['seed']} {rest}"
    sources = f" --sources {evaluation['sources']}" if "sources" in evaluation else ""
    constrained = " --constrained" if "constrained" in evaluation else ""
    return f"--data corpora/{evaluation['data']} --split {evaluation['split']} {rest}{sources}{constrained}"


# ------------------------------------------------------------------------------------------------------------------ plots


_AVERAGED_POINTS = 5  # of a curve of losses, each the loss of a batch or two
_ENTRIES_INSIDE = 8  # of a legend that stands in the plot; a longer one hides its curves


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot of the runs that have some part, see `Run.part`; `draw` draws those of one panel."""

    title: str
    part: str
    draw: Callable[[Axes, Sequence[Run]], None]


def color(experiment: Experiment, variant: str) -> Any:
    """Return a variant's colour, the same in all plots and of its own in its panel."""
    place = next(list(variants).index(variant) for variants in experiment.panels.values() if variant in variants)
    maps = [matplotlib.colormaps[name] for name in ("tab10", "Dark2", "Set2")]
    return [shade(number) for shade in maps for number in range(shade.N)][place]


def _loss_plot(experiment: Experiment) -> Plot:
    def draw(axes: Axes, runs: Sequence[Run]) -> None:
        for variant, own in itertools.groupby(runs, key=lambda run: run.variant):
            for number, curve in enumerate(run.curve for run in own if run.curve):
                label = None if number else variant
                loss = pd.Series(curve["loss"]).rolling(_AVERAGED_POINTS, center=True, min_periods=1).mean()
                axes.plot(curve["step"], loss, color=color(experiment, variant), linewidth=1, label=label)
        axes.set(xlabel="step", ylabel="loss of a response token, nats", yscale="log")

    return Plot(f"loss against steps, means of {_AVERAGED_POINTS} points", "curve", draw)


def draw_plots(experiment: Experiment, plots: Mapping[str, Plot], runs: Sequence[Run], results: Path) -> dict[str, str]:
    """Draw plots into the results directory; return the page's line for each, empty where there is nothing to draw.

    Every plot carries a digest of all results as its description, so that a plot of older results is recognized.
    """
    lines = {}
    for name, plot in plots.items():
        shown = [run for run in runs if run.part(plot.part)]
        panels = {title: own for title, names in experiment.panels.items() if (own := [run for run in shown if run.variant in names])}
        file, lines[name] = results / f"{name}.png", ""
        if not panels:
            file.unlink(missing_ok=True)
            continue
        most, columns, wide = max(len({run.variant for run in own}) for own in panels.values()), 2 * len(panels), len(panels) > 1
        inside, entries = most <= _ENTRIES_INSIDE, dict[str, Any]()
        figure = Figure(figsize=(10 if wide else 6.4, 3.6 if inside else 3.6 + 0.16 * most / columns), layout="constrained")
        for axes, (title, own) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            plot.draw(axes, own)
            axes.grid(alpha=0.3)
            for curve, label in zip(*axes.get_legend_handles_labels()):
                curve.set_label(label.removeprefix(f"{title}_"))
                entries.setdefault(curve.get_label(), curve)  # what panels have in common stands in a legend once
            if inside:
                axes.legend(fontsize=7)
            if wide:
                axes.set_title(title, fontsize=9)
        if not inside:
            figure.legend(handles=[*entries.values()], loc="outside lower center", fontsize=7, ncols=columns)
        _save(figure, file, digest(results))
        lines[name] = f"\n\n![{plot.title}]({results.name}/{name}.png)"
    return lines


def _save(figure: Figure, file: Path, description: str) -> None:
    """Save a figure in 256 colours, which lines and letters need no more than; the file is a third of its size otherwise."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Description", description)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=100)
        with Image.open(buffer) as picture:
            few = picture.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    with io.BytesIO() as buffer:
        few.save(buffer, format="png", pnginfo=info, optimize=True)
        files.write_bytes(file, buffer.getvalue())


# ------------------------------------------------------------------------------------------------------------------- page


def fill(page: str, sections: Mapping[str, str]) -> str:
    """Replace the sections of a page. Raises UserError for a page that lacks one."""
    for name, text in sections.items():
        before, _, rest = page.partition(_begin(name))
        _, end, after = rest.partition("<!-- end -->")
        if not end or _begin(name) in rest:
            raise UserError(f"the page has not just one `<!-- {name} -->` line with an `<!-- end -->` line after it")
        page = f"{before}{_begin(name)}\n{text}\n\n{end}{after}"
    return page


def _begin(name: str) -> str:
    return f"<!-- {name} -->\n"


def pages_of(results: Path) -> list[Path]:
    """List the pages of a directory of results, which lie beside it: NAME.md, and NAME-figures.md where there is one.

    Raises: UserError where the first is missing.
    """
    page = results.with_name(f"{results.name}.md")
    if not page.is_file():
        raise UserError(f"{page}: no such page")
    figures = results.with_name(f"{results.name}-figures.md")
    return [page, figures] if figures.is_file() else [page]


def fill_pages(results: Path, sections: Mapping[str, str]) -> None:
    """Replace the sections of the pages of a directory of results, each in the page that has it. Raises as `fill` does."""
    first, *others = pages_of(results)
    texts = {page: files.read_text(page) for page in (first, *others)}
    elsewhere = {name: page for page in others for name in sections if _begin(name) in texts[page]}
    for page in texts:
        texts[page] = fill(texts[page], {name: text for name, text in sections.items() if elsewhere.get(name, first) == page})
    for page, text in texts.items():
        files.write_text(page, text)


run_command = functools.partial(commandline.run_command, user_error=UserError, within=running)


def report(experiment: Experiment, plots: Mapping[str, Plot], sections: Callable[[Sequence[Run], dict[str, str]], dict[str, str]]) -> type:
    """Make the command of a report, which adds results if asked to, and writes the pages.

    Args:
      plots: by the names of their files, beside "loss", which every report has.
      sections: makes the sections of the pages beside those that every report has, of the runs and the page's lines of the plots.
    """

    @dataclasses.dataclass(frozen=True)
    class Report:
        """Write the pages of an experiment from its stored results."""

        results: Positional[Path]
        """Directory of results; the pages are NAME.md and NAME-figures.md beside it."""
        take: Path | None = None
        """First add the results of this directory, reduced."""
        commit: str | None = None
        """With --take: the commit that made them."""

        def __post_init__(self) -> None:
            if bool(self.take) != bool(self.commit):
                raise UserError("--take and --commit belong together")

        def run(self) -> None:
            pages_of(self.results)
            if self.take and self.commit:
                print("added: " + ", ".join(take(experiment, self.take, self.results, self.commit)))
            runs = load(experiment, self.results)
            lines = draw_plots(experiment, {**plots, "loss": _loss_plot(experiment)}, runs, self.results)
            texts = {"variants": _variants_table(experiment, runs), **sections(runs, lines)}
            texts |= {"training": _training_table(runs) + lines["loss"], "not run": _not_run(experiment, runs)}
            fill_pages(self.results, texts | {"commands": _commands(experiment, runs)})
            print(f"{self.results}: {len(runs)} runs of {len(_seeds(runs))} variants")

    return Report
