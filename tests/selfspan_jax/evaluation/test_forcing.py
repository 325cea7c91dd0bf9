"""Given headers and beginnings: what is the model's own changes nothing, all else is what a forward over the whole sequence writes."""

import numpy as np

from selfspan_jax import spans
from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.evaluation.forcing import Order, generate_under
from tests.selfspan_jax.models import random_model, reference_logits
from tests.selfspan_jax.streams import VOCAB

# A model that writes labels at random, and random prompts with pieces 1 and 2.
VIEWS = {"header_view": "all", "prompt_view": "causal", "prompt_window_tokens": 16}
MODEL = random_model(3, max_context_tokens=1024, tie_embeddings=False, **VIEWS)
ENGINE, CONFIG = Engine(MODEL), DecodeConfig(max_new_tokens=24)
SEGS, REFS = (range(base, base + VOCAB.num_labels) for base in (VOCAB.seg_base, VOCAB.ref_base))
LENGTHS = np.array([6, 8] * 16, np.int32)
PROMPTS = np.random.default_rng(0).integers(4, 10, (32, 8)).astype(np.int32)
PROMPTS[:, [0, 1, 4]] = VOCAB.bos_id, SEGS[1], SEGS[2]
PROMPTS[np.arange(32), LENGTHS - 1] = VOCAB.solve_id


def read(state):
    """Tokens and how many each attends to, of each sequence as far as it was written."""
    counts = np.asarray(state.num_attended)
    return [(own[: (n > 0).sum()].tolist(), n[n > 0].tolist()) for own, n in zip(np.asarray(state.new_tokens), counts, strict=True)]


def test_what_the_model_named_itself_gives_the_same_tokens():
    """Up to where a step names something after it has begun to write, which given headers do not do."""
    own = read(ENGINE.generate(PROMPTS, LENGTHS, CONFIG))
    headers, same = [], []
    for tokens, _ in own:
        steps, before, stray = [], None, len(tokens)
        for place, token in enumerate(tokens):
            if token in SEGS:
                steps.append([])
            elif token in REFS and steps and (before in SEGS or before in REFS):
                steps[-1].append(token - REFS[0])
            elif token in REFS and steps:
                stray = place
                break
            before = token
        headers.append(steps)
        same.append(stray)
    assert sum(named != [] for steps in headers for named in steps) >= 8 and max(same) > 8
    given = read(generate_under(ENGINE, PROMPTS, LENGTHS, CONFIG, headers))
    for found, expected, stray in zip(given, own, same, strict=True):
        assert [found[0][:stray], found[1][:stray]] == [expected[0][:stray], expected[1][:stray]]
    assert read(generate_under(ENGINE, PROMPTS, LENGTHS, CONFIG, [[]] * 32)) == own  # without headers all is the model's


def test_each_token_is_what_a_forward_over_all_before_it_finds():
    """Given steps name what is said, then themselves, and after that some of it once more; the others what the model chooses."""
    headers = [[(1, 2), (), (2,)], [(1,)]] * 16
    forced = chosen = 0
    found = read(generate_under(ENGINE, PROMPTS, LENGTHS, CONFIG, headers))
    for prompt, length, given, (new, attended) in [*zip(PROMPTS, LENGTHS, headers, found, strict=True)][:6]:
        sequence = np.array([*prompt[:length], *new], np.int32)
        mask = np.asarray(spans.attention_mask(sequence, VOCAB, **VIEWS))
        assert attended == mask.sum(axis=-1)[length:].tolist()
        logits = reference_logits(MODEL, np.pad(sequence, (0, 32 - len(sequence)))[None], [np.pad(mask, (0, 32 - len(sequence)))])[0].copy()
        waiting, opened, itself, before = [], 0, None, None
        for token, scores in zip(new, logits[length - 1 :]):
            if waiting:
                assert token == REFS[waiting.pop(0)]
                forced, before = forced + 1, token
                continue
            if 0 < opened <= len(given):
                may = [REFS[i] for i in given[opened - 1]] if before == itself else [itself]
                scores[[i for i in REFS if i not in may]] = -np.inf
            assert token == int(np.argmax(scores))
            chosen += token in REFS
            if token in SEGS:
                waiting, itself = [*given[opened]] if opened < len(given) else [], REFS[token - SEGS[0]]
                opened += 1
            before = token
    assert forced >= 6 and chosen >= 1


def test_the_text_of_each_step_begins_as_is_said():
    """The oracle reads the tokens back: while what a step wrote is less than a beginning, the most likely of what goes on with one."""
    beginnings, free = [[[9, 8, 7], [9, 5], [4, 6, 6, 6]], [[7, 4]]] * 16, {VOCAB.eos_id, *SEGS, *REFS}
    found = read(generate_under(ENGINE, PROMPTS, LENGTHS, CONFIG, [[]] * 32, beginnings))
    given = steps = 0
    for prompt, length, own, (new, _) in [*zip(PROMPTS, LENGTHS, beginnings, found, strict=True)][:6]:
        sequence = np.array([*prompt[:length], *new], np.int32)
        mask = np.asarray(spans.attention_mask(sequence, VOCAB, **VIEWS))
        logits = reference_logits(MODEL, np.pad(sequence, (0, 32 - len(sequence)))[None], [np.pad(mask, (0, 32 - len(sequence)))])[0]
        text = []
        for token, scores in zip(new, logits[length - 1 :]):
            after = {choice[len(text)] for choice in own if choice[: len(text)] == text and len(choice) > len(text)}
            if any(choice == text[: len(choice)] for choice in own):
                after = set()
            may = sorted(after | (free if not text else set())) if after else range(len(scores))
            assert token == max(may, key=lambda i: scores[i])
            given += token in after
            if token in SEGS or token == VOCAB.solve_id:
                steps, text = steps + 1, []
            elif text or token not in REFS:
                text.append(token)
    assert given > 8 and steps > 3


def test_labels_follow_their_order_and_the_model_says_when():
    """All `<seg:k>` together against each other token; a step is closed before the next one opens; no end before so many have begun."""
    orders = [Order(range(1, 5), closed, count) for closed, count in ((True, 0), (False, 3))] * 16
    given = {"headers": [[(1,)]] * 32, "orders": orders, "names_more": True}
    found = read(generate_under(ENGINE, PROMPTS, LENGTHS, CONFIG, **given))
    begun = []
    for order, (new, _) in zip(orders, found, strict=True):
        opened = [token - SEGS[0] for token in new if token in SEGS]
        expected = [label for label in (1, 2, 3, *[4] * 24) for _ in range(1 + order.closed)]
        assert opened == expected[: len(opened)]
        places = [i for i, token in enumerate(new) if token in SEGS]
        assert all(i + 1 == len(new) or new[i + 1] == REFS[1] for i in places[:1]) and (
            VOCAB.eos_id not in new or len(opened) >= order.num_steps
        )
        begun.append(len(opened))
    assert max(begun) > 4
    for prompt, length, order, (new, _) in [*zip(PROMPTS, LENGTHS, orders, found, strict=True)][:6]:
        sequence = np.array([*prompt[:length], *new], np.int32)
        mask = np.asarray(spans.attention_mask(sequence, VOCAB, **VIEWS))
        logits = reference_logits(MODEL, np.pad(sequence, (0, 32 - len(sequence)))[None], [np.pad(mask, (0, 32 - len(sequence)))])[0]
        for place, (token, scores) in enumerate(zip(new, logits[length - 1 :].astype(float))):
            goes_on = sum(own in SEGS for own in new[:place]) < order.num_steps
            family = {*SEGS, *([VOCAB.eos_id] if goes_on else [])}
            others = max((score, own) for own, score in enumerate(scores) if own not in family)
            if place == 0 or new[place - 1] not in SEGS or sum(own in SEGS for own in new[:place]) > 1:  # else its given source comes
                total = np.log(sum(np.exp(scores[own]) for own in family))
                assert token == others[1] if others[0] > total else token in SEGS
