"""The page of a response: its data against the reference automaton, what it must never do, and how it behaves in a real browser."""

import base64
import functools
import hashlib
import html.parser
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from selfspan_jax import Output
from selfspan_jax.attention.policies import Window, get_policy
from selfspan_jax.config import ModelConfig
from selfspan_jax.viewing.reading import attention_mask
from tests import browser
from tests.selfspan_jax.models import TINY, Words
from tests.selfspan_jax.reference import Reference
from tests.selfspan_jax.streams import NAMED, VOCAB

_S, _R = VOCAB.seg_base, VOCAB.ref_base
# What a model may write to break out of a page, or to make it unreadable.
HOSTILE = [
    "</span></li></section><script>window.broken = 1</script>",
    '"><img src="https://example.org/x.png" onerror="window.broken = 1">',
    "' onmouseover='window.broken = 1",
    "<style>* { display: none }</style><!--",
    "&lt;b&gt; &amp; ]]> \u202eright to left\u202c \x00\x1b[31m\udc80\x85",
    "\n  two lines\t",
]


HOSTILE_TASK = Words(HOSTILE, '<{}" onmouseover="window.broken = 1">')


def read_back(token_ids, prompt_tokens, num_attended, attention="span", task=None, **config):
    """The output that decoding these tokens would give."""
    task, model = task or Words(), ModelConfig(**TINY, **config)
    prompt = task.decode(token_ids[:prompt_tokens])
    return Output(task, token_ids, prompt_tokens, num_attended, get_policy(attention), model, VOCAB, prompt)


def output(token_ids, attention="span", *, task=None, **config):
    """The output that decoding these tokens after their first <solve> (or the first token) would give, its reference and mask."""
    token_ids, model = np.array(token_ids, np.int32), ModelConfig(**TINY, **config)
    views = {name: getattr(model, name) for name in ("header_view", "prompt_view", "prompt_window_tokens")}
    reference = Reference(token_ids, VOCAB, **views)
    prompt_tokens = 1 + (0 if reference.solve_position is None else reference.solve_position)
    mask = np.array(reference.mask()) if attention == "span" else np.tri(len(token_ids), dtype=bool)
    if attention == "window":
        distance = np.subtract.outer(np.arange(len(token_ids)), np.arange(len(token_ids)))
        mask &= (distance < Window().window_tokens) | (np.arange(len(token_ids)) < Window().sink_tokens)
    out = read_back(token_ids, prompt_tokens, mask.sum(axis=1)[prompt_tokens:], attention, task, **config)
    assert out.unresolved_refs == reference.unresolved_refs
    return out, reference, mask


class Parsed(html.parser.HTMLParser):
    """What a browser makes of a page: elements, their attributes, the text of each token, the data of each step."""

    VOID = ("wbr", "meta")

    def __init__(self, text):
        super().__init__()
        self.elements, self.tokens, self.steps, self.texts, self._open = [], [], [], {}, []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        classes = attributes.get("class", "").split()
        self.elements.append((tag, attributes))
        if "step" in classes:
            self.steps.append({"first": len(self.tokens), "classes": classes, **attributes})
        if "t" in classes:
            self.tokens.append({"text": "", "classes": classes, **attributes})
        if tag not in self.VOID:
            self._open.append((tag, classes))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        tag, classes = self._open[-1] if self._open else ("", [])
        if "t" in classes:
            self.tokens[-1]["text"] += data
        for name in (tag, *classes):
            self.texts.setdefault(name, []).append(data)

    def reads(self, step):
        """{reason: positions} of a step's data."""
        groups = {}
        for word in self.steps[step]["data-reads"].split():
            name, _, ranges = word.partition(":")
            bounds = [[int(bound) for bound in item.split("-")] for item in ranges.split(",") if item]
            groups[name] = {i for first, *last in bounds for i in range(first, (last or [first])[0] + 1)}
        return groups


def steps_of(parsed):
    """The range of tokens of each step."""
    firsts = [step["first"] for step in parsed.steps] + [len(parsed.tokens)]
    return [range(*pair) for pair in itertools.pairwise(firsts)]


@pytest.mark.parametrize("header_view", ["span", "labels", "all"])
@pytest.mark.parametrize("name", NAMED)
def test_each_step_has_exactly_what_the_reference_says_it_read(name, header_view):
    tokens, _ = NAMED[name]
    out, reference, mask = output(tokens, header_view=header_view)
    parsed = Parsed(out._repr_html_())
    assert len(parsed.tokens) == len(tokens)
    steps = steps_of(parsed)
    assert [i for step in steps for i in step] == list(range(out.prompt_tokens, len(tokens)))
    for number, step in enumerate(steps):
        reads = parsed.reads(number)
        expected = {int(s) for t in step for s in np.flatnonzero(mask[t])}
        assert sorted(i for group in reads.values() for i in group) == sorted(expected)  # each once, for one reason
        own = reference.carries[step[0]]
        names = set().union(*(reference.named[t] for t in step)) - {0, own}
        if reference.solve_position is not None:
            assert reads.keys() - {"sink", "own", "toc", "wide"} == {str(k) for k in names}
        for reason, group in reads.items():
            carried = {reference.carries[i] for i in group}
            if reason in ("toc", "wide"):
                assert reason != "toc" or all(reference.is_seg[i] for i in group)
                assert reason == ("toc" if header_view == "labels" else "wide") or reference.solve_position is None
                assert not carried & {0, own, *names} and (header_view != "span" or reference.solve_position is None)
            else:
                assert carried <= {0 if reason == "sink" else own if reason == "own" else int(reason)}


def test_a_step_begins_where_a_label_is_opened():
    out, _, _ = output(NAMED["ref before any step"][0] + [_S + 1, 4, _S + 2, _R + 1, 5, 2])
    parsed = Parsed(out._repr_html_())
    assert [step.start - out.prompt_tokens for step in steps_of(parsed)] == [0, 3, 5]
    assert ["odd" in step["classes"] for step in parsed.steps] == [True, False, False]
    assert [step["tabindex"] for step in parsed.steps] == ["0", "-1", "-1"]  # one stop of the Tab key, arrows beyond it


@pytest.mark.parametrize("attention", ["dense", "window"])
def test_other_policies_read_what_nothing_named(attention):
    out, _, mask = output(NAMED["specification"][0], attention)
    parsed = Parsed(out._repr_html_())
    for number, step in enumerate(steps_of(parsed)):
        assert parsed.reads(number) == {"policy": set(np.flatnonzero(mask[step].any(axis=0)).tolist())}


def test_the_strip_is_the_mean_share_of_the_context():
    out, _, mask = output(NAMED["specification"][0])
    shares = mask.sum(axis=1) / np.arange(1, len(mask) + 1)
    parsed = Parsed(out._repr_html_())
    widths = [a["style"] for _, a in parsed.elements if "style" in a]
    assert widths == [f"width: {shares[list(step)].mean():.1%}" for step in steps_of(parsed)]


PROBLEMS = {
    "unresolved": (NAMED["unresolved"][0], ["stopped before", "no token carries, for which nothing was read: 1."]),
    "no step": (NAMED["no step"][0], ["stopped before", "opens no step"]),
    "before the first step": (NAMED["ref before any step"][0] + [_S + 1, 4, 2], ["before the first step: 2."]),
    "named by <solve>": ([1, _S + 1, 4, 3, _R + 1, _S + 2, _R + 1, 5, 2], []),
    "structure of a prompt": ([1, 4, 3, _S + 1, 3, 0, 1, 5, 2], ["that only prompts have (padding, beginning of text, <solve>): 3."]),
    "nothing written": ([1, 4, 3], ["tokens written: 0."]),
    "nothing wrong": (NAMED["specification"][0], []),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_wrong_with_a_response_is_said(name):
    tokens, expected = PROBLEMS[name]
    said = Parsed(output(tokens)[0]._repr_html_()).texts.get("warning", [])
    assert len(said) == len(expected) and all(part in line for part, line in zip(expected, said)), said


JUDGED = {
    "right": (SimpleNamespace(answer_right=True, steps_right=True, spans_right=True, message="all <b>right</b>"), "right", "✓ Right:"),
    "flawed": (SimpleNamespace(answer_right=True, steps_right=False, spans_right=True, message="step 2 is 7"), "wrong", "✗ Flawed:"),
    "wrong": (SimpleNamespace(answer_right=False, steps_right=True, spans_right=True, message="step 3 is 8"), "wrong", "✗ Wrong:"),
}


class Judged(Words):
    """The same, with a verdict, and warnings of the prompt."""

    def __init__(self, name):
        super().__init__()
        self.verdict = JUDGED[name][0]

    def verify(self, prompt, response_ids):
        return self.verdict

    def warnings(self, prompt):
        return ["<b>Larger</b> than any number seen.", "Cut."]


@pytest.mark.parametrize("name", JUDGED)
def test_warnings_come_first_and_a_verdict_is_in_words(name):
    verdict, style, word = JUDGED[name]
    page = output(NAMED["specification"][0], task=Judged(name))[0].to_html()
    places = [page.index(part) for part in ("Larger", "Cut.", 'class="said', 'class="verdict', 'class="facts')]
    assert places == sorted(places)
    (found,) = [attributes["class"] for _, attributes in Parsed(page).elements if "verdict" in attributes.get("class", "").split()]
    answers = [attributes["class"] for tag, attributes in Parsed(page).elements if tag == "strong" and "dir" in attributes]
    assert (found, answers) == (f"verdict {style}", [style])
    assert f"<strong>{word}</strong> {html.escape(verdict.message)}</p>" in page and "<b>" not in page


def test_references_show_whether_they_name_anything():
    out, _, _ = output([1, _S + 1, 4, _R + 1, 3, _S + 2, _R + 4, _R + 1, _R + 1, _R + 2, _R + 0, 5, 2])
    tokens = Parsed(out._repr_html_()).tokens
    assert tokens[3]["classes"] == ["t", "mark"]  # of a prompt: does nothing
    lost, good, again, own, sink = tokens[6:11]
    assert (lost["text"], lost["classes"]) == ("↖4 ?", ["t", "ref", "lost"]) and "no token carries" in lost["title"]
    assert (good["text"], good["classes"]) == ("↖1", ["t", "ref"])
    assert all("idle" in token["classes"] and "adds nothing" in token["title"] for token in (again, own, sink))
    assert 'data-reads="sink:0,4 own:5-12 4: 1:1-3"' in out._repr_html_()


def test_what_a_model_writes_is_text_and_nothing_else():
    tokens = [1, 4, _S + 1, 5, 6, 7, 8, 9, 3, _S + 2, _R + 1, *range(4, 10), 2]
    calm, _, _ = output(tokens)
    hostile, _, _ = output(tokens, task=HOSTILE_TASK)
    expected, found = Parsed(calm.to_html()), Parsed(hostile.to_html())
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in expected.elements]
    assert [a.keys() for _, a in found.elements] == [a.keys() for _, a in expected.elements]
    texts = [token["text"] for token in found.tokens][-7:-1]
    assert texts[:4] == HOSTILE[:4] and texts[5] == HOSTILE[5]
    assert texts[4] == "&lt;b&gt; &amp; ]]> \u202eright to left\u202c ␀␛[31m\ufffd\ufffd"
    hostile.to_html().encode("utf-8")  # a lone surrogate would not go into a file


def test_a_page_needs_and_allows_nothing_from_outside():
    document = output(NAMED["specification"][0])[0].to_html()
    assert not re.search(
        r"https?:|//[a-z]|url\(|@import|\b(src|href)=|fetch\(|XMLHttp|innerHTML|eval\(", re.sub(r"^ *//.*", "", document, flags=re.M)
    )
    script = document[document.index("<script>") + len("<script>") : document.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for _, a in Parsed(document).elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}';" in policy


def test_several_outputs_share_one_notebook():
    """No ids to collide, and no style that reaches beyond an output."""
    fragment = output(NAMED["specification"][0])[0]._repr_html_()
    assert not any("id" in attributes for _, attributes in Parsed(fragment).elements)
    style = fragment[fragment.index("<style>") + len("<style>") : fragment.index("</style>")]
    selectors = re.findall(r"(?:^|[{}])\s*([^{}@]+?)\s*\{", re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL))
    assert len(selectors) > 30
    assert all(part.strip().startswith(".selfspan") for selector in selectors for part in selector.split(","))


@functools.cache
def long_page(*words, num_tokens=2000):
    """A page of steps of ten tokens that name labels of a prompt of 200."""
    prompt = [1, *itertools.chain.from_iterable([_S + 1 + i % 4, 4, 5, 6, 7, 8, 9, 4, 5, 6] for i in range(20)), 3]
    steps = itertools.chain.from_iterable([_S + i % 5, _R + 1 + i % 4, 4, 5, 6, 7, 8, 9, 4, 5] for i in itertools.count())
    token_ids = np.array([*prompt, *itertools.islice(steps, num_tokens - len(prompt) - 1), 2], np.int32)
    mask = attention_mask(token_ids, VOCAB, ModelConfig(**TINY), get_policy("span"))
    return read_back(token_ids, len(prompt), mask.sum(axis=1)[len(prompt) :], task=Words(words) if words else None).to_html()


def test_two_thousand_tokens_make_a_small_page():
    page = long_page()
    assert len(Parsed(page).tokens) == 2000 and len(page) < 250_000


# ------------------------------------------------------------------------------------------------ in a browser

needs_browser = pytest.mark.skipif(browser.installed() is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is installed")
LIT = "[...document.querySelectorAll('.t')].map((t, i) => t.matches('.lit') ? i : -1).filter(i => i >= 0)"
INSIDE = "(() => { const [a, b] = ['.step:last-child', '.steps'].map(s => document.querySelector(s).getBoundingClientRect());"
SELECTED = "[...document.querySelectorAll('.step')].map(s => s.getAttribute('aria-selected') === 'true')"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def show(chromium, tmp_path):
    """Opens a document, in a window of a size and scheme."""

    def open_document(text, **look):
        chromium.look(**look)
        file = tmp_path / "page.html"
        file.write_text(text, encoding="utf-8")
        chromium.open(file)
        return chromium

    return open_document


def step_reads(text):
    parsed = Parsed(text)
    return [sorted(set().union(*parsed.reads(number).values())) for number in range(len(parsed.steps))]


@needs_browser
def test_keys_move_between_steps_and_light_up_what_each_read(show):
    text = output(NAMED["specification"][0])[0].to_html()
    reads = step_reads(text)
    page = show(text)
    assert page.run(LIT) == reads[0] and page.run(SELECTED) == [True, False, False]  # the first step, before anything is pressed
    assert not page.run("document.activeElement.matches('.step')")
    page.run("document.addEventListener('keydown', (event) => (window.heard = [...(window.heard ?? []), event.key]))")
    page.press("Tab")  # how to read this
    page.press("Tab")  # the prompt
    page.press("Tab")  # what was read
    page.press("Tab")
    for key, number in (("", 0), ("ArrowDown", 1), ("End", 2), ("ArrowDown", 2), ("ArrowUp", 1), ("Home", 0), ("PageDown", 2)):
        if key:
            page.press(key)
        refs = [i for i in steps_of(Parsed(text))[number] if text and NAMED["specification"][0][i] >= _R]
        assert set(page.run(LIT)) == {*reads[number], *refs}
        assert page.run(SELECTED) == [i == number for i in range(3)]
        assert page.run("document.activeElement.matches('.step:focus-visible.shown')")
    said = page.run("document.querySelector('.reads').innerText")
    assert "<ref:1> names it" in said and "<ref:2> names it" in said and "its own label" in said
    page.press("Escape")
    assert page.run(LIT) == [] and page.run(SELECTED) == [False] * 3
    assert "arrow keys" in page.run("document.querySelector('.reads').innerText")
    page.press("Enter")
    assert page.run(SELECTED) == [False, False, True]
    page.press("Tab")
    assert not page.run("document.activeElement.matches('.step')")
    assert set(page.run("window.heard")) == {"Tab"}  # a notebook around it does not move to its next cell
    assert page.errors == [] and [url for url in page.requests if not url.startswith("file:")] == []


@needs_browser
def test_pointing_shows_a_step_and_leaving_goes_back_to_the_chosen_one(show):
    text = output(NAMED["specification"][0])[0].to_html()
    reads = [set(step) for step in step_reads(text)]
    page = show(text)
    page.point(".step:nth-child(1)", click=True)
    before = page.run("document.querySelector('.step:nth-child(2)').getBoundingClientRect().top")
    page.point(".step:nth-child(3)")
    assert set(page.run(LIT)) >= reads[2]
    assert page.run("document.querySelector('.step:nth-child(2)').getBoundingClientRect().top") == before  # nothing moves
    page.point(".said")
    assert set(page.run(LIT)) == reads[0]
    titles = page.run("[...document.querySelectorAll('.lit')].map(t => t.title)")
    assert all("read: " in title for title in titles)


@needs_browser
def test_unresolved_references_are_told_where_they_stand(show):
    page = show(output(NAMED["unresolved"][0])[0].to_html())
    page.point(".step:nth-child(1)")
    assert "<ref:4> names nothing" in page.run("document.querySelector('.reads').innerText")
    assert page.run("getComputedStyle(document.querySelector('.ref.lost')).borderTopStyle") == "dashed"


@needs_browser
def test_two_outputs_on_one_page_do_not_meddle(show):
    first, second = (output(NAMED[name][0])[0]._repr_html_() for name in ("specification", "reopened"))
    page = show(f"<!doctype html><meta charset=utf-8><div>{first}</div><div>{second}</div><div>{first}</div>")
    page.run("document.querySelectorAll('section')[1].querySelector('.step').focus()")
    for key in ("ArrowDown", "Escape"):
        page.press(key)
        chosen = page.run(
            "[...document.querySelectorAll('section')].map(s => [...s.querySelectorAll('.step')].findIndex(e => e.matches('.shown')))"
        )
        assert chosen == [0, {"ArrowDown": 1, "Escape": -1}[key], 0]
    page.run("document.querySelectorAll('section')[0].querySelector('.step').focus()")
    page.press("ArrowDown")  # by one: every output is set up once
    assert page.run("[...document.querySelectorAll('section')[0].querySelectorAll('.step')].indexOf(document.activeElement)") == 1
    assert page.errors == []


@needs_browser
def test_hostile_text_stays_text_in_a_browser(show):
    tokens = [1, 4, _S + 1, 5, 6, 7, 8, 9, 3, _S + 2, _R + 1, *range(4, 10), 2]
    page = show(output(tokens, task=HOSTILE_TASK)[0].to_html())
    page.point(".step")
    assert page.run("window.broken") is None and page.run("document.images.length") == 0
    assert page.run("document.querySelectorAll('script').length") == 1
    assert page.run("document.querySelector('.reads').innerText").count("<script>") == 2
    # In a notebook there is no policy of the page's own: escaping alone must do.
    fragment = output(tokens, task=HOSTILE_TASK)[0]._repr_html_()
    page = show(f"<!doctype html><meta charset=utf-8>{fragment}")
    page.point(".step")
    assert page.run("window.broken") is None and page.errors == []
    assert [url for url in page.requests if not url.startswith("file:")] == []


CONTRAST = """
(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const fill = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
  const ratios = {};
  for (const e of document.querySelectorAll('.selfspan *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.matches('style, script') || e.closest('.step.shown')) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(fill(e))].sort((x, y) => y - x);
    ratios[e.className] = Math.min(ratios[e.className] ?? 99, (a + 0.05) / (b + 0.05));
  }
  return ratios;
})()
"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "judged"), [("unresolved", "wrong"), ("specification", "right")])
def test_text_is_readable_in_light_and_dark(show, scheme, name, judged):
    """WCAG 2.2, 1.4.3: 4.5 to 1, lit or not. A wrong verdict is red, and its answer too."""
    page = show(output(NAMED[name][0], task=Judged(judged))[0].to_html(), scheme=scheme)
    page.run("document.querySelector('details').open = true")
    page.run("document.querySelector('.step').focus()")
    page.press("Escape")
    assert page.run(LIT) == []
    idle = page.run(CONTRAST)
    for part in (".verdict", ".said strong"):
        red, green, _ = map(int, re.findall(r"\d+", page.run(f"getComputedStyle(document.querySelector('{part}')).color")))
        assert (red > 1.5 * green) == (judged == "wrong") and (green > 1.5 * red) == (judged == "right")
    page.run("[...document.querySelectorAll('.step')].at(-1).focus()")
    ratios = idle | page.run(CONTRAST)
    assert len(ratios) > 8 and min(ratios.values()) >= 4.5, json.dumps(ratios, indent=1)
    dark = page.run("getComputedStyle(document.querySelector('.selfspan')).backgroundColor")
    assert dark == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]


@needs_browser
@pytest.mark.parametrize("width", [360, 1400])
def test_two_thousand_tokens_can_be_read(show, width):
    page = show(long_page("48", " the", "(51+75)", "-", " summary", "9" * 99), width=width, height=700)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run("[...document.querySelectorAll('.prompt, .reads, .steps')].every(e => e.scrollWidth <= e.clientWidth)")
    page.run("document.querySelector('.step').focus()")
    page.press("End")
    assert page.run(f"{INSIDE} return a.top >= b.top && a.bottom <= b.bottom && Math.floor(a.bottom) <= innerHeight; }})()")
    lit = "[...document.querySelectorAll('.prompt .lit:not(.k-sink)')].map(e => e.getBoundingClientRect())"
    pane = "document.querySelector('.prompt').getBoundingClientRect()"
    assert page.run(f"{lit}.some(r => r.top >= {pane}.top && r.bottom <= {pane}.bottom)")
    assert page.run("document.querySelectorAll('.map span').length") > 3


@needs_browser
def test_on_a_phone_one_touches_and_texts_have_the_width(show):
    page = show(long_page("48", " the", "(51+75)", "-", " summary", "9" * 99), width=390, height=844, touch=True)
    hints = page.run(
        "[...document.querySelectorAll('.steps .title span')].filter(e => e.getBoundingClientRect().width).map(e => e.innerText)"
    )
    assert hints == ["touch a step"] and page.run(SELECTED)[:2] == [True, False]
    assert page.run("document.documentElement.scrollWidth") == 390
    narrow = "[...document.querySelectorAll('.step .text')].filter(e => e.clientWidth < 0.85 * 390 - 40).length"
    assert page.run(narrow) == 0
    page.run("document.querySelector('.step:last-child').scrollIntoView({block: 'end'})")
    x, y = page.run(f"{INSIDE} return [a.x + a.width / 2, a.y + a.height / 2]; }})()")
    for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
        page.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    assert page.run(SELECTED)[-1]
    pane = page.run("(() => { const r = document.querySelector('.reads').getBoundingClientRect(); return [r.top, r.bottom]; })()")
    assert 0 <= pane[0] < pane[1] < y, pane  # in sight, above what was touched, though the page has scrolled


@needs_browser
def test_without_scripts_the_text_its_labels_and_its_strip_are_there(show):
    text = output(NAMED["specification"][0])[0].to_html()
    page = show(text, script=False)
    try:
        seen = page.run("document.body.innerText")
        widths = page.run("[...document.querySelectorAll('.bar span')].map(e => e.getBoundingClientRect().width)")
    finally:
        page.look()
    assert "↖1" in seen and "45" in seen and all(width > 0 for width in widths) and len(widths) == 3


def test_a_page_is_the_same_every_time():
    out = output(NAMED["specification"][0])[0]
    assert out.to_html() == output(NAMED["specification"][0])[0].to_html()
