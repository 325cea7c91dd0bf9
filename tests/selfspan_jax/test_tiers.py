"""Prompts in host memory: the same steps as with all rows on the device, and a working set as a simulation has it."""

import numpy as np
import pytest

from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.tiers import HostEngine
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.reference import Reference
from tests.selfspan_jax.streams import NAMED, VOCAB, VOCAB_SIZE

S, R, TOOLS = VOCAB.seg_base, VOCAB.ref_base, [4, 5, 6, 7, 8, 9]
PROMPT = [1, 4, S + 1, *TOOLS, S + 1, S + 2, 5, S + 2, S + 3, 8, 9, 8, S + 3, 3]  # 8, 3 and 5 tokens of labels 1, 2 and 3
RESPONSES = {  # what follows it, and why
    "one after the other": [S + 4, R + 1, 5, S + 4, R + 2, 6, S + 4, R + 3, 7, S + 4, R + 1, 8, 9],
    "again and again": [S + 4, R + 2, 5, S + 4, R + 2, 6, S + 4, R + 2, R + 2, 7, S + 2, 4, R + 2],
    "larger than the working set": [S + 4, R + 1, R + 2, R + 3, 7, 8, 9, S + 4, R + 3, R + 2, R + 1, 6, 5],
    "without rows": [S + 4, R + 4, 5, S + 4, R + 4, R + 3, 6, S + 0, R + 0, 4, 5, S + 4, R + 4],
    "opened, not named": [S + 1, 5, S + 2, 6, S + 3, 7, S + 1, 8, S + 1, R + 3, 9, S + 3, R + 1],
    "no step": [4, 5, R + 3, 6, R + 1, 7, 8, R + 2, 4, 5, 6, 7, 8],
}
ROWS = [(PROMPT, tokens) for tokens in RESPONSES.values()]
ROWS += [(tokens[: (n := 1 + i % 9)], (tokens[n:] + TOOLS * 3)[:13]) for i, (tokens, _) in enumerate(NAMED.values())]  # any streams
VIEWS = [
    {"header_view": "span", "prompt_view": "causal"},
    {"header_view": "labels", "prompt_view": "causal"},
    {"header_view": "prompt", "prompt_view": "causal"},
    {"header_view": "all", "prompt_view": "local"},
]
STEPS = 13


def prompts_of(rows):
    lengths = np.array([len(prompt) for prompt, _ in rows], np.int32)
    tokens = np.full((len(rows), lengths.max()), VOCAB_SIZE - 1, np.int32)  # garbage after the prompts
    for row, (prompt, _) in zip(tokens, rows):
        row[: len(prompt)] = prompt
    return tokens, lengths


class WorkingSet:
    """Which tokens of a prompt lie on the device: a simulation of one sequence, token by token."""

    def __init__(self, tokens, prompt_tokens, size, views):
        self.prompt_tokens, self.says = prompt_tokens, Reference(tokens, VOCAB, **views)
        self.visible, self.labels = np.array(self.says.mask()), self.says.carries
        wide = views["header_view"] == "labels"
        always = [t for t in range(prompt_tokens) if self.labels[t] == 0 or (wide and self.says.is_seg[t])]
        self.pinned = len(always[: size // 2])
        self.rows = [*always[: size // 2], *[None] * (size - self.pinned)]  # of the working set: whose token
        self.last_named, self.copied, self.misses = {}, 0, 0
        for t in range(prompt_tokens):
            self.note(t, tokens[t])

    def note(self, t, token):
        """Note when a label was named."""
        if token - R in self.says.named[t]:
            self.last_named[token - R] = t

    def feed(self, t, token):
        self.note(t, token)
        if self.says.is_header[t]:
            used = {0, self.labels[t], *self.says.named[t]}
            wanted = [s for s in range(self.prompt_tokens) if self.labels[s] in used and s not in self.rows]
            free = [i for i in range(self.pinned, len(self.rows)) if self.rows[i] is None or self.labels[self.rows[i]] not in used]
            age = {i: -2 if self.rows[i] is None else self.last_named.get(self.labels[self.rows[i]], -1) for i in free}
            taken = sorted(sorted(free, key=lambda i: (age[i], i))[: len(wanted)])
            for i, s in zip(taken, wanted):
                self.rows[i] = s
            self.copied += len(taken)
        self.misses += sum(self.visible[t, s] and s not in self.rows for s in range(self.prompt_tokens))


@pytest.mark.parametrize("views", VIEWS, ids=lambda views: "-".join(views.values()))
def test_steps_are_those_of_rows_on_the_device(views):
    model = random_model(**views)
    prompts, config = prompts_of(ROWS), DecodeConfig(max_new_tokens=STEPS)
    forced = np.array([response for _, response in ROWS], np.int32)
    resident = Engine(model)
    for size in (2, 5, 12, 64):
        engine = HostEngine(model, working_set_tokens=size)
        simulated = [WorkingSet([*prompt, *response], len(prompt), size, views) for prompt, response in ROWS]
        state, plain = engine.prefill(*prompts, config), resident.prefill(*prompts, config)
        np.testing.assert_allclose(state.logits, plain.logits, atol=1e-4)
        for step in range(STEPS):
            alive = ~np.asarray(state.done)
            state, plain = engine.step(state, forced[:, step], config), resident.step(plain, forced[:, step], config)
            np.testing.assert_allclose(
                np.asarray(state.logits)[alive], np.asarray(plain.logits)[alive], atol=1e-4, err_msg=f"{size}, step {step}"
            )
            np.testing.assert_array_equal(np.asarray(state.slots.counts)[alive], np.asarray(plain.slots.counts)[alive])
            for b in np.flatnonzero(alive):
                simulated[b].feed(len(ROWS[b][0]) + step, forced[b, step])
                owner = [-1 if token is None else token for token in simulated[b].rows]
                np.testing.assert_array_equal(np.asarray(state.cache.owner)[b], owner, err_msg=f"{size}, sequence {b}, step {step}")
        np.testing.assert_array_equal(state.cache.copied, [each.copied for each in simulated])
        np.testing.assert_array_equal(state.cache.misses, [each.misses for each in simulated])
