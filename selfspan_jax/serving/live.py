"""The live page: prompts are typed in, and steps appear while they are decoded, with what they read.

The page is that of one response (`viewing.html`), filled by a script from the events of `/v1/completions`. For that an event says
of each token what it is: `Watch`.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Int

from selfspan_jax import spans
from selfspan_jax.spans import SpanVocab
from selfspan_jax.task import Task
from selfspan_jax.viewing import detokenize, html

_CONNECT = "'self'"  # where the page may send requests


def page(model_name: str, task: str, attention: str, examples: Sequence[str]) -> str:
    """Write the page. It needs nothing but the server that it came from, and shows what a model writes as text."""
    fields = {"model": model_name, "task": task, "attention": attention, "examples": json.dumps(list(examples))}
    body = string.Template(_asset("live.html")).substitute(
        {name: html.escaped(value) for name, value in fields.items()}, panes=html.panes("prompt", "", "")
    )
    body += "".join(f"<script>{script}</script>" for script in _scripts())
    return html.page(f"{model_name}: selfspan", html.asset("page.css") + _asset("live.css"), body, *_scripts(), connect=_CONNECT)


def content_policy() -> str:
    """Write the page's Content-Security-Policy as a header, which can also keep it out of frames."""
    return f"{html.content_policy(*_scripts(), connect=_CONNECT)}; frame-ancestors 'none'"


class Watch:
    """Describe the tokens of one response as they come, and before them those of its prompt.

    A token has `text`, the `label` that it carries, and its `kind`: "seg" opens a label, "ref" names one, `names`; "mark" is another
    structural token, or one that means nothing where it stands; "text" is anything else. A written token also has `attended`, how
    many tokens it read.
    """

    def __init__(self, task: Task, vocab: SpanVocab, prompt_ids: Int[np.ndarray, "T"]):
        self._vocab, self._ids = vocab, prompt_ids.tolist()
        self._attended: Sequence[int] = ()
        self._prompt_tokens = len(self._ids)
        self._texts = list(detokenize.token_texts(task.decode, self._ids))
        self._detokenizer = detokenize.Detokenizer(task.decode)

    def prompt(self) -> dict[str, Any]:
        """Describe the tokens of the prompt."""
        return {"prompt": self._described(0)}

    def add(self, token_ids: Sequence[int], attended: Sequence[int]) -> dict[str, Any]:
        """Describe the tokens of a response that are new; given are all so far, and what each read."""
        start, self._attended = len(self._ids), attended
        new = [int(token) for token in token_ids[start - self._prompt_tokens :]]
        self._ids += new
        self._texts += map(self._detokenizer.push, new)
        return {"tokens": self._described(start)}

    def _described(self, start: int) -> list[dict[str, Any]]:
        ids, vocab = np.array(self._ids, np.int32), self._vocab
        roles, described = spans.token_roles(ids, vocab), []
        structural = {vocab.pad_id, vocab.bos_id, vocab.eos_id, vocab.solve_id}
        for index in range(start, len(ids)):
            token: dict[str, Any] = {"kind": "text", "text": self._texts[index], "label": int(roles.labels[index])}
            if roles.is_seg[index]:
                token["kind"] = "seg"
            elif (name := int(roles.names[index])) >= 0:
                token |= {"kind": "ref", "names": name}
            elif (referred := int(ids[index]) - vocab.ref_base) in range(vocab.num_labels):
                token |= {"kind": "mark", "names": referred}
            elif ids[index] in structural:
                token["kind"] = "mark"
            if index >= self._prompt_tokens:
                token["attended"] = self._attended[index - self._prompt_tokens]
            described.append(token)
        return described


def _scripts() -> list[str]:
    return [html.asset("page.js"), _asset("live.js")]


@functools.cache
def _asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text("utf-8")
