"""A decoded response as HTML: what each step read, and what named it. Self-contained: no network, no fonts, no libraries.

`fragment` is for a notebook's output cell, where several stand on one page: it has no ids, its styles are all below
`.selfspan`, and its script sets up whatever is not set up yet. `document` is the same as a page of its own. What the script
needs is in attributes: each step has `data-reads`, groups of positions by what made them visible:

    sink:0,13 own:11-12,41-57 1:3-9,14-23     label 0, the step's own label, tokens that <ref:1> named
    wide:...                                  a span token that looks wider than the step (header_view)
    policy:0-57                               dense or window attention: named by nothing
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from selfspan_jax.spans import TokenRoles

if TYPE_CHECKING:
    from selfspan_jax.lm import Output

# Control characters and lone surrogates cannot stand in a page; each is shown as a symbol of its own.
_INVISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_INVISIBLE |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)


def document(out: Output) -> str:
    """A page of its own. It allows no request and no script but its own, whatever the model has written."""
    digest = base64.b64encode(hashlib.sha256(_asset("page.js").encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{_escaped(_clipped(out.prompt, 60))}</title>"
        "<style>body { margin: 1rem; } .selfspan { margin: auto; --selfspan-height: max(22rem, calc(100vh - 11rem)); }</style>"
        f"</head><body>{fragment(out)}</body></html>\n"
    )


def fragment(out: Output) -> str:
    """The same for the output cell of a notebook."""
    roles = out.lm.roles(out.token_ids)
    tokens = _tokens(out, roles)
    steps = read_steps(out)
    rows = "".join(_row(out, step, np.asarray(roles.labels), tokens, tab_stop=number == 0) for number, step in enumerate(steps))
    answer = "" if out.answer is None else f"<strong>→ {_escaped(_clipped(out.answer, 200))}</strong>"
    facts = [
        f"steps: {sum(step.opened for step in steps)}",
        f"tokens written: {len(out.response_ids)}",
        f"attention: {out.attention}",
    ]
    if len(out.response_ids):
        facts.append(f"reads {out.num_attended.mean():.1f} tokens on average, {out.attended_fraction:.1%} of its context")
    return (
        f'<section class="selfspan" aria-label="what each step of a response read"><style>{_asset("page.css")}</style>'
        f'<p class="said"><span>{_escaped(_clipped(out.prompt, 400))}</span>{answer}</p><p class="facts">{" · ".join(facts)}</p>'
        + "".join(f'<p class="wrong">{_escaped(problem)}</p>' for problem in _problems(out, roles, steps))
        + f'<div class="panes"><div class="prompt" role="region" aria-label="prompt" tabindex="0">'
        f'<p class="title">prompt, {out.prompt_tokens} tokens</p><p class="text">{"".join(tokens[: out.prompt_tokens])}</p></div>'
        '<div class="reads" role="region" aria-label="what the step read" aria-live="polite" tabindex="0">'
        '<p class="hint">Point at a step, or move to one with the arrow keys: what it read lights up, and what named it is told here. '
        "A filled number opens a label, an arrow names one. Before each step: the tokens that its tokens read on average, "
        "and their share of the context.</p></div>"
        '<div class="steps"><p class="title">response</p>'
        # JupyterLab moves between cells by the same keys, unless told not to.
        f'<ol role="listbox" aria-label="steps of the response" data-lm-suppress-shortcuts="true">{rows}</ol></div></div>'
        f"<script>{_asset('page.js')}</script></section>"
    )


class ReadStep(NamedTuple):
    """A step of a response, or what stands before its first one."""

    indices: Int[np.ndarray, "I"]
    """Of the step's tokens in the sequence."""
    label: int
    opened: bool
    """By a `<seg>`; what stands before the first step is not."""
    names: tuple[int, ...]
    """Labels named, each once, in order."""
    reads: Bool[np.ndarray, "T"]
    """Tokens that at least one token of the step attended to."""


def read_steps(out: Output) -> list[ReadStep]:
    """The steps of a response in order, every token in one of them."""
    roles = out.lm.roles(out.token_ids)
    mask = out.lm.mask(out.token_ids, out.attention)
    response = np.arange(out.prompt_tokens, len(out.token_ids))
    steps = []
    for start in np.unique(roles.step_index[response]):
        indices = response[roles.step_index[response] == start]
        steps.append(
            ReadStep(
                indices=indices,
                label=int(roles.labels[indices[0]]),
                opened=bool(start >= 0 and roles.is_header[start]),
                names=tuple(dict.fromkeys(int(name) for name in roles.names[indices] if name >= 0)),
                reads=mask[indices].any(axis=0),
            )
        )
    return steps


def _groups(out: Output, step: ReadStep, labels: Int[np.ndarray, "T"]) -> dict[str, Int[np.ndarray, "I"]]:
    """What the step read by what made it visible; a label that was named in vain has an empty group."""
    if out.attention != "span":
        return {"policy": np.flatnonzero(step.reads)}
    groups = {"sink": step.reads & (labels == 0), "own": step.reads & (labels == step.label) & (labels != 0)}
    named = {str(k): step.reads & (labels == k) for k in step.names if k not in (0, step.label)}
    wide = step.reads.copy()
    for group in (*groups.values(), *named.values()):
        wide &= ~group
    found = {name: np.flatnonzero(group) for name, group in (groups | named | {"wide": wide}).items()}
    return {name: indices for name, indices in found.items() if len(indices) or name in named}


def _ranges(indices: Int[np.ndarray, "I"]) -> str:
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1) if len(indices) else []
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _row(out: Output, step: ReadStep, labels: Int[np.ndarray, "T"], tokens: list[str], *, tab_stop: bool) -> str:
    reads = " ".join(f"{name}:{_ranges(indices)}" for name, indices in _groups(out, step, labels).items())
    attended = out.num_attended[step.indices - out.prompt_tokens]
    share = float(np.mean(attended / (step.indices + 1)))
    what = f"label {step.label}" if step.opened else "before the first step"
    said = f"{what}: {attended.mean():.1f} tokens on average ({share:.1%})"
    return (
        f'<li class="step{"" if step.opened else " odd"}" role="option" aria-selected="false" tabindex="{0 if tab_stop else -1}" '
        f'data-said="{said}" data-reads="{reads}"><span class="share"><span>{attended.mean():.1f}</span>'
        f'<span class="bar"><span style="width: {share:.1%}"></span></span><span>{share:.0%}</span></span>'
        f'<span class="text">{"".join(tokens[step.indices[0] : step.indices[-1] + 1])}</span></li>'
    )


def _tokens(out: Output, roles: TokenRoles) -> list[str]:
    """The markup of each token."""
    vocab = out.lm.model.vocab
    texts = out.lm.token_texts(out.token_ids)
    opens, refers = (np.asarray(vocab.label_of(jnp.asarray(out.token_ids), base)) for base in (vocab.seg_base, vocab.ref_base))
    named: set[int] = set()
    made = []
    for index, (token, text, opened, referred) in enumerate(zip(out.token_ids, texts, opens, refers, strict=True)):
        name = int(roles.names[index])
        if opened >= 0:
            named = set()
            made.append(f'<wbr><span class="t seg" title="{_escaped(text)}">{opened}</span>')
        elif name >= 0:
            carried = name in roles.labels[: index + 1]
            idle = name in (0, int(roles.labels[index])) or name in named
            state, remark = ("", "") if carried else (" lost", ": names nothing, no token carries that label")
            if carried and idle:
                state, remark = " idle", ": adds nothing, it is visible already"
            named.add(name)
            made.append(
                f'<span class="t ref{state}" data-names="{name}" title="{_escaped(text + remark)}">↖{name}{"" if carried else " ?"}</span>'
            )
        elif referred >= 0:
            made.append(f'<span class="t mark" title="{_escaped(text)}: means nothing here">↖{referred}</span>')
        elif token in (vocab.pad_id, vocab.bos_id, vocab.eos_id, vocab.solve_id):
            lost = " lost" if index >= out.prompt_tokens and token != vocab.eos_id else ""
            made.append(f'<span class="t mark{lost}">{_escaped(text)}</span>')
        else:
            made.append(f'<span class="t">{_escaped(text)}</span>')
    return made


def _problems(out: Output, roles: TokenRoles, steps: list[ReadStep]) -> Iterator[str]:
    """What is wrong with a response, one line each."""
    vocab = out.lm.model.vocab
    if not out.finished:
        yield f"The response was stopped before it had ended; tokens written: {len(out.response_ids)}."
    if out.unresolved_refs:
        yield f"References to a label that no token carries, for which nothing was read: {out.unresolved_refs}."
    if len(out.response_ids) and not any(step.opened for step in steps):
        yield "The response opens no step."
    elif steps and not steps[0].opened:
        yield f"Tokens before the first step: {len(steps[0].indices)}."
    misplaced = np.isin(out.response_ids, (vocab.pad_id, vocab.bos_id, vocab.solve_id))
    if count := int(misplaced.sum()):
        yield f"Structural tokens of a prompt, which mean nothing in a response: {count}."


@functools.cache
def _asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text("utf-8")


def _escaped(text: str) -> str:
    return html.escape(text.translate(_INVISIBLE))


def _clipped(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
