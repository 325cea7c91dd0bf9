"""Token streams for the tests: well-formed, random and malformed ones, over one small vocabulary."""

import hypothesis.strategies as st

from selfspan_jax.spans import SpanVocab

VOCAB = SpanVocab(pad_id=0, bos_id=1, eos_id=2, solve_id=3, seg_base=10, ref_base=15, num_labels=5)
VOCAB_SIZE = 20
TEXT = range(4, 10)

VIEWS = [
    dict(header_view=header_view, prompt_view=prompt_view, prompt_window_tokens=window)
    for header_view in ("span", "labels", "prompt", "all")
    for prompt_view, window in (("causal", 16), ("local", 3), ("local", 1))
]

_S, _R = VOCAB.seg_base, VOCAB.ref_base

# name -> (token ids, why it is here)
NAMED = {
    "specification": (
        [1, _S + 3, 4, _S + 1, 5, 6, _S + 3, 7, _S + 2, 5, 6, _S + 3, 8, 3] + [_S + 1, 4, 5, _S + 2, 4, 5, _S + 3, _R + 1, _R + 2, 6, 7, 2],
        "the example of section 5, in miniature",
    ),
    "all prompt": ([1, _S + 1, 4, _R + 1, 5, _S + 2, 6], "no <solve>: refs of a prompt do nothing"),
    "no step": ([1, _S + 1, 4, 5, 3, 6, 7, 8], "a response that opens no step is body with label 0"),
    "ref before any step": ([1, _S + 1, 4, 3, _R + 1, 5, 6], "a span may widen before the first step"),
    "span widens late": ([1, _S + 1, 4, _S + 2, 5, 3, _S + 3, 6, _R + 1, 7, _R + 2, 8, _S + 4, 9], "legal anywhere in a step"),
    "unresolved": ([1, _S + 1, 4, 3, _S + 2, _R + 4, 5, _S + 4, 6, _S + 2, _R + 4, 7], "names nothing, then something"),
    "second solve": ([1, _S + 1, 4, 3, _S + 2, 5, 3, 6, _R + 1, 7], "a second <solve> does nothing"),
    "second bos": ([1, _S + 1, 4, 1, 5, 3, _S + 1, 1, 6], "nor does a second <bos>"),
    "after eos": ([1, _S + 1, 4, 3, _S + 2, 5, 2, _S + 3, _R + 1, 6, 3, 7], "nothing changes after <eos>"),
    "eos in prompt": ([1, _S + 1, 4, 2, 3, _S + 2, 5], "an <eos> before <solve> freezes the prompt"),
    "reopened": ([1, _S + 1, 4, _S + 2, 5, _S + 1, 6, 3, _S + 1, 7, _S + 2, 8, _S + 1, _R + 2, 9], "labels may be opened many times"),
    "sink named": ([1, 4, 3, _S + 0, _R + 0, 5, _S + 1, _R + 0, 6], "naming the sink adds nothing"),
    "names itself": ([1, _S + 1, 4, 3, _S + 1, _R + 1, 5], "naming the own label adds nothing"),
    "only solve": ([3], "the shortest response"),
    "starts with seg": ([_S + 2, 4, 3, _S + 2, 5], "no <bos>"),
    "closed pieces": (
        [1, 4, _S + 1, 5, _S + 1, _S + 2, 6, _S + 2, 3, _S + 3, _R + 1, 7, _S + 2, _R + 3, _R + 1, 8, 9],
        "tags that open what is open",
    ),
    "padding inside": ([1, 0, _S + 1, 0, 3, 0, _S + 1, 0, 5], "padding is an ordinary token"),
}

_token = st.one_of(
    st.sampled_from(list(TEXT)),
    st.integers(_S, _S + VOCAB.num_labels - 1),
    st.integers(_R, _R + VOCAB.num_labels - 1),
    st.sampled_from([VOCAB.pad_id, VOCAB.bos_id, VOCAB.eos_id, VOCAB.solve_id]),
)
_calm = st.one_of(  # no <eos>, so that long streams stay alive
    st.sampled_from(list(TEXT)), st.integers(_S, _S + VOCAB.num_labels - 1), st.integers(_R, _R + VOCAB.num_labels - 1)
)


@st.composite
def streams(draw, length):
    """A stream of exactly `length` tokens: anything at all, or a prompt, <solve> and a response."""
    if draw(st.booleans()):
        return draw(st.lists(_token, min_size=length, max_size=length))
    tokens = draw(st.lists(_calm, min_size=length, max_size=length))
    tokens[draw(st.integers(0, length - 1))] = VOCAB.solve_id
    return tokens
