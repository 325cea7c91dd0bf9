"""What an experiment compares: variants of a model, each with the command of train.py that trains it. A TOML file lists them."""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.alignment import Alignment
from data.tasks import TASKS
from selfspan_jax.config import PRESETS, LoraConfig, tuning_preset
from selfspan_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Variant:
    """One model of a comparison. A run is a variant trained with one seed."""

    description: str
    preset: str
    """The subcommand of train.py: a preset, finetune-lora or finetune-full."""
    options: str = ""
    """Options of the command, --name or --name and value; every run of this variant has these settings."""
    control: str | None = None
    """The variant that it is compared with; None: the report's."""

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        """The options by name; one without a value is True."""
        options = re.findall(r"--(\S+)(?: (?!--)(\S+))?", self.options)
        return {name.replace("-", "_"): value or str(True) for name, value in options}

    @functools.cached_property
    def defaults(self) -> dict[str, dict[str, Any]]:
        """The settings of a run without options, by the sections of its run.json."""
        if self.preset in PRESETS:
            preset = PRESETS[self.preset]
            configs: dict[str, Any] = {"model": preset.model, "training": preset.training}
            corpus = TASKS[preset.task].Corpus(**preset.corpus)
        else:
            adapters = self.preset == "finetune-lora"
            tuning = tuning_preset(self.settings["corpus"], adapters=adapters)
            configs = {"base": None, "attention": tuning.attention, "training": tuning.training}
            configs |= {"lora": LoraConfig()} if adapters else {}
            corpus = TASKS[self.settings["corpus"]].Corpus(**tuning.corpus)
        configs["corpus"] = corpus
        found = {section: dataclasses.asdict(config) if config else {} for section, config in configs.items()}
        if "data" in self.settings:  # a card says too how sources were aligned, and whose words it is written in
            found["corpus"] |= {**dataclasses.asdict(Alignment()), "tokenizer": None}
        return found

    def check(self, run: Mapping[str, Mapping[str, Any]], where: str) -> None:
        """Raise UserError unless the sections of a run.json are those of this variant with its options."""
        if unknown := sorted(run["corpus"].keys() - self.defaults["corpus"].keys()):
            raise UserError(f"{where}: {unknown[0]} is no setting of the variant's corpus")
        found = {key: value for section in self.defaults for key, value in run[section].items()}
        if "base" in run:  # the corpus of fine-tuning is known by its settings
            name, init = run["base"].get("name"), self.settings.get("init", "")
            found |= {"init": init if init.endswith(f"/{name}") else name} | {  # of another run, its directory is left out
                key: self.settings[key] for key in ("corpus", "data", "adapter") if key in self.settings
            }
        for key, expected in self.settings.items():
            if (value := as_option(found.get(key, "missing"))) != expected:
                raise UserError(f"{where}: {key} is {value}, but {expected} in this variant")

    def command(self, run: Mapping[str, Mapping[str, Any]], run_dir: str) -> str:
        """Write the command that trains a run: the variant's options, and whatever else differs from the preset."""
        words = ["python train.py", self.preset, f"--run-dir {run_dir}", *self.options.split()]
        for section, defaults in self.defaults.items():
            for key, value in () if section == "corpus" and "data" in self.settings else run[section].items():
                if key in defaults and key not in self.settings and as_option(value) != as_option(defaults[key]):
                    option = key.replace("_", "-")
                    words += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", as_option(value)]
        return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A comparison of variants."""

    name: str
    evaluations: Mapping[str, str]
    """The kinds of evaluation that a run may have, each with its description."""
    evaluation_fields: Any
    """What is kept of `decode.py eval --json`: the `fields` argument of `results.pick`."""
    tables: tuple[str, ...] = ()
    """Those of NAME.toml that it compares; by default all."""

    @functools.cached_property
    def panels(self) -> dict[str, dict[str, Variant]]:
        """The variants in each panel of a plot, by the panel's title: tables of NAME.toml; "a | b" is two alike, {table} their name."""
        with Path(__file__).with_name(f"{self.name}.toml").open("rb") as file:
            tables = {title: own for titles, own in tomllib.load(file).items() for title in titles.split(" | ")}
        return {title: dict(_variants(title, tables[title])) for title in self.tables or tables}

    @functools.cached_property
    def variants(self) -> dict[str, Variant]:
        return {name: own for variants in self.panels.values() for name, own in variants.items()}


def _variants(title: str, table: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, Variant]]:
    """Yield the variants of a table by name, with its title for {table}."""
    for name, fields in table.items():
        yield name.replace("{table}", title), Variant(**{key: text.replace("{table}", title) for key, text in fields.items()})


def as_option(value: Any) -> str:
    """Write a setting as the value of a command-line option."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
