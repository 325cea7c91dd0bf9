"""The pages of all reports: they say what the stored results say, also where there are none."""

import re
import shutil

import pytest
from PIL import Image

from experiments import arithmetic, documents, neighbours, news, pages, prefill_tables, serving
from experiments.results import digest
from tests.experiments.reports import DOCS, rows_of

REPORTS = {  # of runs: the command, and the experiment
    "arithmetic": (arithmetic.main, (), arithmetic.EXPERIMENT),
    "news": (news.main, (), news.EXPERIMENT),
    **{page: (documents.main, (page,), experiment) for page, experiment in documents.EXPERIMENTS.items()},
}
TABLES = {"neighbours": neighbours.sections, "prefill": prefill_tables.sections, "serving": serving.sections}
MAX_BYTES = {"arithmetic": 340_000, "news": 100_000}


def empty_pages(name, tmp_path):
    """Write the pages of a report with empty sections, so that nothing can be left standing."""
    for page in pages.pages_of(DOCS / name):
        text = re.sub(r"(<!-- (?!end)[\w ]+ -->\n).*?(<!-- end -->)", r"\1\2", page.read_text(), flags=re.DOTALL)
        (tmp_path / page.name).write_text(text)


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_what_the_stored_results_say(name, tmp_path, call):
    """If this fails, run the page's command, as in `python -m experiments.documents papers docs/papers`. Plots are of these results."""
    main, words, _ = REPORTS[name]
    shutil.copytree(DOCS / name, tmp_path / name)
    empty_pages(name, tmp_path)
    assert call(main, *words, tmp_path / name)[0] == 0
    for page in pages.pages_of(DOCS / name):
        assert (tmp_path / page.name).read_text() == page.read_text()
    plots = re.findall(rf"\]\({name}/(\w+\.png)\)", "".join(page.read_text() for page in pages.pages_of(DOCS / name)))
    assert {file.name for file in (DOCS / name).glob("*.png")} == {*plots}
    for plot in plots:
        assert Image.open(DOCS / name / plot).text["Description"] == digest(DOCS / name), plot
    assert sum(file.stat().st_size for file in (DOCS / name).glob("*")) < MAX_BYTES.get(name, 5_000_000)


@pytest.mark.parametrize("name", REPORTS)
def test_where_nothing_was_run_a_report_says_so(name, tmp_path, call):
    main, words, experiment = REPORTS[name]
    empty_pages(name, tmp_path)
    status, out, _ = call(main, *words, tmp_path / name)
    assert status == 0 and "0 runs of 0 variants" in out
    page = "".join(own.read_text() for own in tmp_path.glob("*.md"))
    for section in {*re.findall(r"<!-- (?!end)([\w ]+) -->", page)} - {"variants", "targets", "not run"}:
        assert f"<!-- {section} -->\n\nNot run.\n\n<!-- end -->" in page
    assert {row[-1] for row in rows_of(page, "targets")} == {"not run"}
    assert page.count(": not trained") == len(experiment.variants) and not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_their_files(name, tmp_path):
    empty_pages(name, tmp_path)
    shutil.copytree(DOCS / name, tmp_path / name)
    pages.fill_pages(tmp_path / name, TABLES[name](tmp_path / name))
    for page in pages.pages_of(DOCS / name):
        assert (tmp_path / page.name).read_text() == page.read_text(), f"fill the pages of docs/{name} by their command"
    assert {file.name for file in (tmp_path / name).rglob("*")} == {file.name for file in (DOCS / name).rglob("*")}
