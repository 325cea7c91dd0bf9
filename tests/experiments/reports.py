"""What the tests of all reports do."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from experiments import pages
from experiments.results import digest
from selfspan_jax.config import LoraConfig, tuning_preset

DOCS = Path(__file__).parents[2] / "docs"


def call(report, capsys, *arguments):
    """(exit status, stdout, stderr) of a report's command."""
    try:
        status = report.main([str(argument) for argument in arguments]) or 0
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def take(report, path, capsys):
    """Take the raw files of a directory; returns the page."""
    status, _, err = call(report, capsys, path / "out", "--take", path / "raw", "--commit", "abc")
    assert status == 0, err
    return (path / "out.md").read_text()


def tuned_run(corpus_name, corpus, seed, *, adapters=True, **attention):
    """The run.json of a fine-tuning, as train.py writes it (test_results.py compares with train.py itself)."""
    tuning = tuning_preset(corpus_name, adapters=adapters)
    run = {"attention": asdict(tuning.attention) | attention, "base": {"name": "SmolLM2-135M-Instruct.Q4_1.gguf", "sha256": "0" * 64}}
    run |= {"training": asdict(tuning.training) | {"seed": seed}, "corpus": corpus} | ({"lora": asdict(LoraConfig())} if adapters else {})
    return json.loads(json.dumps(run))


def check_page(report, name, tmp_path, capsys, max_bytes):
    """The pages are what the stored results say, and their plots were drawn from them; returns their text."""
    results, texts = DOCS / name, {page.name: page.read_text() for page in pages.pages_of(DOCS / name)}
    if results.exists():
        shutil.copytree(results, tmp_path / name)
    for page, text in texts.items():  # emptied first, so that nothing can be left standing
        (tmp_path / page).write_text(re.sub(r"(<!-- (?!end)[\w ]+ -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL))
    assert call(report, capsys, tmp_path / name)[0] == 0
    assert {page: (tmp_path / page).read_text() for page in texts} == texts
    text = "".join(texts.values())
    plots = re.findall(rf"\]\({name}/(\w+\.png)\)", text)
    assert {file.name for file in results.glob("*.png")} == set(plots)
    for plot in plots:
        assert Image.open(results / plot).text["Description"] == digest(results), plot
    assert sum(file.stat().st_size for file in results.glob("*")) < max_bytes
    return text
