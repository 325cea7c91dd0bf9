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


def check_tables(name, sections, tmp_path):
    """The sections of the pages of docs/NAME are what is written of the files there now, and no file is added."""
    found = pages.pages_of(DOCS / name)
    for page in found:
        shutil.copy(page, tmp_path)
    shutil.copytree(DOCS / name, tmp_path / name)
    pages.fill_pages(tmp_path / name, sections(tmp_path / name))
    for page in found:
        assert (tmp_path / page.name).read_text() == page.read_text(), f"fill the pages of docs/{name} by their command"
    assert {file.name for file in (tmp_path / name).rglob("*")} == {file.name for file in (DOCS / name).rglob("*")}


def check_page(report, name, tmp_path, call, max_bytes):
    """The pages are what the stored results say, and their plots were drawn from them; returns their text."""
    results, texts = DOCS / name, {page.name: page.read_text() for page in pages.pages_of(DOCS / name)}
    if results.exists():
        shutil.copytree(results, tmp_path / name)
    for page, text in texts.items():  # emptied first, so that nothing can be left standing
        (tmp_path / page).write_text(re.sub(r"(<!-- (?!end)[\w ]+ -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL))
    assert call(report.main, tmp_path / name)[0] == 0
    assert {page: (tmp_path / page).read_text() for page in texts} == texts
    text = "".join(texts.values())
    plots = re.findall(rf"\]\({name}/(\w+\.png)\)", text)
    assert {file.name for file in results.glob("*.png")} == set(plots)
    for plot in plots:
        assert Image.open(results / plot).text["Description"] == digest(results), plot
    assert sum(file.stat().st_size for file in results.glob("*")) < max_bytes
    return text
