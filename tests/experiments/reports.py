"""What the tests of all reports do."""

import json
import re
from dataclasses import asdict
from pathlib import Path

from selfspan_jax.config import LoraConfig, tuning_preset

DOCS = Path(__file__).parents[2] / "docs"


def take(report, path, call):
    """Take the raw files of a directory; returns the page."""
    status, _, err = call(report.main, path / "out", "--take", path / "raw", "--commit", "abc")
    assert status == 0, err
    return (path / "out.md").read_text()


def tuned_run(corpus_name, corpus, seed, *, adapters=True, **attention):
    """The run.json of a fine-tuning, as train.py writes it (test_results.py compares with train.py itself)."""
    tuning = tuning_preset(corpus_name, adapters=adapters)
    run = {"attention": asdict(tuning.attention) | attention, "base": {"name": "SmolLM2-135M-Instruct.Q4_1.gguf", "sha256": "0" * 64}}
    run |= {"training": asdict(tuning.training) | {"seed": seed}, "corpus": corpus} | ({"lora": asdict(LoraConfig())} if adapters else {})
    return json.loads(json.dumps(run))


def rows_of(page, section):
    """Cells of the rows of a section's table."""
    (text,) = re.findall(rf"<!-- {section} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
