"""Write a decoded response as HTML: what each step read, and what named it. Self-contained: no network, no fonts, no libraries.

`fragment` is for a notebook's output cell, where several stand on one page: it has no ids, its styles are all below
`.selfspan`, and its script sets up whatever is not set up yet. `document` is the same as a page of its own. What the script
needs is in attributes: each step has `data-reads`, groups of positions by what made them visible:

    sink:0,13 own:11-12,41-57 1:3-9,14-23     label 0, the step's own label, tokens that <ref:1> named
    toc:... wide:...                          a span token that looks wider than the step: at every <seg>, or as header_view says
    policy:0-57                               dense or window attention: named by nothing
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
from importlib import resources

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from selfspan_jax.task import Verdict, judgement
from selfspan_jax.viewing.reading import Reading, Step, attended_line, clipped

# Control characters and lone surrogates cannot stand in a page; each is shown as a symbol of its own.
# What a style sheet chooses from by the device: a finger cannot hover.
_HOW = '<span class="pointing">point at a step, or move to one with the arrow keys</span><span class="touching">touch a step</span>'
_SIGNS = {"right": ("✓ Right:", "right"), "flawed": ("✗ Flawed:", "wrong"), "wrong": ("✗ Wrong:", "wrong")}
_SIGNS |= {"stopped": ("■ Stopped:", "wrong"), "": ("", "")}
_INVISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_INVISIBLE |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)


def document(reading: Reading, prompt: str, answer: str | None, verdict: Verdict | None = None) -> str:
    """Write a page. It allows no request and no script but its own, whatever the model has written."""
    style = (
        "body { margin: 1rem; } .selfspan { margin: auto; --selfspan-height: max(22rem, calc(100vh - 14rem)); }"
        "@media (max-width: 59rem) { body { margin: 0.4rem; } .selfspan { --selfspan-height: none; } }"
    )
    return page(clipped(prompt, 60), style, fragment(reading, prompt, answer, verdict), asset("page.js"))


def content_policy(*scripts: str, connect: str = "'none'") -> str:
    """Write the Content-Security-Policy of a page: no script but these, no request but to `connect`."""
    digests = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {digests}; base-uri 'none'; form-action 'none'"
    return policy + ("" if connect == "'none'" else f"; connect-src {connect}")


def page(title: str, style: str, body: str, *scripts: str, connect: str = "'none'") -> str:
    """Put a page together, which allows no script but those that its body has, and no request but to `connect`."""
    policy = content_policy(*scripts, connect=connect)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escaped(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )


def fragment(reading: Reading, prompt: str, answer: str | None, verdict: Verdict | None = None) -> str:
    """Write the same for the output cell of a notebook."""
    word = judgement(verdict, ended=reading.ended) if verdict else ""
    tokens = _tokens(reading)
    rows = "".join(_row(reading, step, tokens, tab_stop=number == 0) for number, step in enumerate(reading.parts))
    said = answer if answer is not None or verdict is None else "(no answer)"
    shown = "" if said is None else f' <strong class="{_SIGNS[word][1]}" dir="auto">→ {escaped(clipped(said, 300))}</strong>'
    long = " long" if len(prompt) + len(said or "") > 80 else ""
    judged = f'<p class="verdict {_SIGNS[word][1]}"><strong>{_SIGNS[word][0]}</strong> {escaped(verdict.message)}</p>' if verdict else ""
    facts = [f"steps: {len(reading.steps)}", f"tokens written: {len(reading.response_ids)}", f"attention: {reading.attention}"]
    if len(reading.response_ids):
        facts.append(attended_line(reading))
    return (
        f'<section class="selfspan" aria-label="what each step of a response read"><style>{asset("page.css")}</style>'
        + "".join(f'<p class="warning"><strong>Warning:</strong> {escaped(warning)}</p>' for warning in reading.warnings)
        + f'<p class="said{long}"><span dir="auto">{escaped(clipped(prompt, 160))}</span>{shown}</p>{judged}'
        f'<p class="facts">{" · ".join(facts)}</p><details class="legend"><summary>How to read this</summary>'
        "<p>A filled number opens a label, an arrow names one: a step reads what carries the labels that it names, its own, and label 0. "
        "Beside each step: the tokens that its tokens read on average, and their share of the context.</p></details>"
        f"{panes(f'prompt, {reading.prompt_tokens} tokens', ''.join(tokens[: reading.prompt_tokens]), rows)}"
        f"<script>{asset('page.js')}</script></section>"
    )


def panes(title: str, prompt: str, rows: str) -> str:
    """Write the prompt, what the shown step read, and the steps, side by side or one below the other; all three as markup."""
    return (
        f'<div class="panes"><div class="prompt" role="region" aria-label="prompt" tabindex="0">'
        f'<p class="title">{title}</p><p class="text">{prompt}</p></div>'
        '<div class="reads" role="region" aria-label="what the step read" aria-live="polite" tabindex="0">'
        f'<p class="hint">To see what a step read, and what named it, {_HOW}.</p></div>'
        f'<div class="steps"><p class="title">response: {_HOW}</p>'
        # JupyterLab moves between cells by the same keys, unless told not to.
        f'<ol role="listbox" aria-label="steps of the response" data-lm-suppress-shortcuts="true">{rows}</ol></div></div>'
    )


def _groups(reading: Reading, step: Step) -> dict[str, Int[np.ndarray, "I"]]:
    """Group what the step read by what made it visible; a label that was named in vain has an empty group."""
    reads, labels = reading.mask[step.indices].any(axis=0), reading.roles.labels
    if reading.attention != "span":
        return {"policy": np.flatnonzero(reads)}
    groups = {"sink": reads & (labels == 0), "own": reads & (labels == step.label) & (labels != 0)}
    named = {str(k): reads & (labels == k) for k in step.refs if k not in (0, step.label)}
    wide = reads.copy()
    for group in (*groups.values(), *named.values()):
        wide &= ~group
    tags = reading.roles.is_seg & (reading.config.header_view == "labels") & reading.roles.is_header[step.indices].any()
    wider = {"toc": wide & tags, "wide": wide & ~tags}
    found = {name: np.flatnonzero(group) for name, group in (groups | named | wider).items()}
    return {name: indices for name, indices in found.items() if len(indices) or name in named}


def _ranges(indices: Int[np.ndarray, "I"]) -> str:
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1) if len(indices) else []
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _row(reading: Reading, step: Step, tokens: list[str], *, tab_stop: bool) -> str:
    reads = " ".join(f"{name}:{_ranges(indices)}" for name, indices in _groups(reading, step).items())
    attended, share = step.attended_tokens, step.attended_fraction
    what = f"label {step.label}" if step.opened else "before the first step"
    said = f"{what}: each of its tokens reads on average {attended:.{1 if attended < 100 else 0}f} ({share:.1%}) of the tokens up to it"
    return (
        f'<li class="step{"" if step.opened else " odd"}" role="option" aria-selected="false" tabindex="{0 if tab_stop else -1}" '
        f'data-said="{said}" data-reads="{reads}"><span class="share"><span>{attended:.1f}</span>'
        f'<span class="bar"><span style="width: {share:.1%}"></span></span><span>{share:.0%}</span></span>'
        f'<span class="text">{"".join(tokens[step.indices[0] : step.indices[-1] + 1])}</span></li>'
    )


def _tokens(reading: Reading) -> list[str]:
    """Write the markup of each token."""
    vocab, roles = reading.vocab, reading.roles
    opens, refers = (np.asarray(vocab.label_of(jnp.asarray(reading.token_ids), base)) for base in (vocab.seg_base, vocab.ref_base))
    named: set[int] = set()
    made = []
    for index, (token, text, opened, referred) in enumerate(zip(reading.token_ids, reading.token_texts, opens, refers, strict=True)):
        name = int(roles.names[index])
        if opened >= 0:
            named = set()
            made.append(f'<wbr><span class="t seg" title="{escaped(text)}">{opened}</span>')
        elif name >= 0:
            lost = reading.unresolved[index]
            idle = name in (0, int(roles.labels[index])) or name in named
            state, remark = (" lost", ": names nothing, no token carries that label") if lost else ("", "")
            if idle and not lost:
                state, remark = " idle", ": adds nothing, it is visible already"
            named.add(name)
            made.append(
                f'<span class="t ref{state}" data-names="{name}" title="{escaped(text + remark)}">↖{name}{" ?" if lost else ""}</span>'
            )
        elif referred >= 0:
            made.append(f'<span class="t mark" title="{escaped(text)}: means nothing here">↖{referred}</span>')
        elif token in (vocab.pad_id, vocab.bos_id, vocab.eos_id, vocab.solve_id):
            lost_class = " lost" if index >= reading.prompt_tokens and token != vocab.eos_id else ""
            made.append(f'<span class="t mark{lost_class}">{escaped(text)}</span>')
        else:
            made.append(f'<span class="t">{escaped(text)}</span>')
    return made


@functools.cache
def asset(name: str) -> str:
    """Return a style sheet or a script of this package."""
    return (resources.files(__package__) / name).read_text("utf-8")


def escaped(text: str) -> str:
    """Write text as markup that shows it."""
    return html.escape(text.translate(_INVISIBLE))
