"""Run directories: whose they are, how a run that stopped goes on, and what is said of its model.

A run's identity is what decides its result, as JSON: parts by name, most of them objects of settings. It is in
`run.json`, in the run directory and in an export of it alike.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Int

from selfspan_jax.config import TrainConfig
from selfspan_jax.evaluation import evaluate
from selfspan_jax.lm import SpanLM, Task
from selfspan_jax.model import Decoder
from selfspan_jax.parallel import distributed


class Example(Protocol):
    """A prompt, as its task's `encode_prompt` takes it, and the ids of its gold response."""

    @property
    def prompt(self) -> str: ...
    @property
    def response_ids(self) -> Int[np.ndarray, "R"]: ...


class ScoringTask(Task, Protocol):
    """A task that judges responses."""

    def scores(self, examples: Sequence[Any], responses: Sequence[Iterable[int]]) -> dict[str, float]: ...


def claim(run_dir: Path, identity: dict[str, Any], resume_from: Path | None = None) -> None:
    """Makes the run directory, or checks that it is one of this very run, and so is what is to be resumed.

    Of several processes all check, and the first makes it.

    Raises: ValueError that names the differences; FileNotFoundError where there is nothing to resume from.
    """
    if resume_from:
        if not (resume_from / "run.json").exists():
            raise FileNotFoundError(f"{resume_from}: not an export of a run, run.json is missing")
        _check_same(resume_from, identity)
    file, partial = run_dir / "run.json", run_dir / ".run.json.partial"
    there = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    if file.name in there:
        return _check_same(run_dir, identity)
    if there - {partial.name}:
        raise ValueError(f"{run_dir} is not empty and not a run directory (no run.json): choose another --run-dir")
    if not distributed.is_first_process():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(identity, indent=2) + "\n")
    os.replace(partial, file)


def _check_same(directory: Path, here: dict[str, Any]) -> None:
    file = directory / "run.json"
    try:
        there = json.loads(file.read_text())
        if there.keys() != here.keys():
            raise ValueError
    except (ValueError, AttributeError):
        raise ValueError(f"{file} was not written by this version of train.py: choose another --run-dir") from None
    settings = {name: value for name, value in here.items() if not isinstance(value, dict)}
    pairs = [(there, settings), *((there[name], value) for name, value in here.items() if isinstance(value, dict))]
    differences = [
        f"{key} is {old.get(key)!r} there, {new.get(key)!r} here"
        for old, new in pairs
        for key in [*new, *(key for key in old if key not in new and new is not settings)]
        if old.get(key) != new.get(key)
    ]
    if differences:
        raise ValueError(f"{directory} holds a run of another config: {'; '.join(differences)}")


def how_to_go_on(run_dir: Path) -> str:
    """For people: how a stopped run goes on, here and, where there is an export, elsewhere."""
    line, export = "the same command goes on", run_dir / "export"
    if export.exists():
        line += f"; elsewhere with --resume-from and the {len(list(export.iterdir()))} files of {export}"
    return line


def score(model: Decoder, task: ScoringTask, examples: Sequence[Example]) -> dict[str, float]:
    """Decodes the examples' prompts greedily, as the model was trained to attend: the task's scores, and what was read.

    Responses may be 16 tokens longer than the longest gold one.
    """
    evaluation = evaluate(
        SpanLM(model, task),
        [example.prompt for example in examples],
        verify=_unjudged,
        attention=model.config.mask,
        max_new_tokens=max(len(example.response_ids) for example in examples) + 16,
        batch_size=128,
        progress=distributed.is_first_process(),
    )
    outputs = [result.output for result in evaluation.results]
    attended = np.concatenate([out.num_attended for out in outputs])
    contexts = np.concatenate([np.arange(out.prompt_tokens + 1, len(out.token_ids) + 1) for out in outputs])
    return {
        "num_examples": len(outputs),
        **task.scores(examples, [out.response_ids for out in outputs]),
        "attended_fraction": float(np.mean(attended / contexts)),
        "attended_tokens": float(np.mean(attended)),
        "finished_fraction": float(np.mean([out.finished for out in outputs])),
    }


def _unjudged(prompt: str, response_ids: Int[np.ndarray, "R"]) -> Any:
    """The task judges all responses at once."""


def card(title: str, model: Decoder, config: TrainConfig, prompts: str, scores: Mapping[str, float], identity: Mapping[str, Any]) -> str:
    """The README of a finished model, with the command line of this process.

    Args:
      prompts: what the scores are on, for people.
    """
    lines = [f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in scores.items()]
    return (
        f"# {title}\n\nA span model of {model.num_parameters:,} parameters, trained by `train.py` of selfspan.\n\n"
        f"```\npython train.py {shlex.join(_shown(sys.argv[1:]))}\n```\n\n"
        f"{config.steps:,} steps of {config.batch_size} x {config.sequence_tokens} tokens, "
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}.\n\n"
        f"Scores on fresh {prompts}, decoded greedily by the model itself "
        f"(attention: {model.config.mask}):\n\n" + "\n".join(lines) + "\n\n"
        "`config.json` has the architecture, `vocab.json` the task.\n\n"
        f"```json\n{json.dumps(identity, indent=2)}\n```\n"
    )


def _shown(arguments: Sequence[str]) -> list[str]:
    """The command line without this machine's paths."""
    return [Path(word).name if Path(word).is_absolute() else word for word in arguments]
