"""The pictures: that what is drawn is what the reference automaton says."""

import numpy as np
import pytest

from selfspan_jax import SpanLM
from selfspan_jax.viewing import plots
from tests.selfspan_jax.models import Words, random_model
from tests.selfspan_jax.streams import NAMED, VOCAB
from tests.selfspan_jax.viewing.test_html import output

TOKENS = NAMED["specification"][0]
STEPS = [range(14, 17), range(17, 20), range(20, 26)]  # of the response to TOKENS, <eos> in the last


def cells_of(axes):
    """The drawn values, 0 for what is not read and for the future."""
    return np.nan_to_num(np.asarray(axes.images[0].get_array().filled(np.nan)))


@pytest.mark.parametrize("header_view", ["span", "labels"])
def test_a_mask_is_drawn_as_it_is_and_why_the_response_reads(header_view):
    """By the label that the reference automaton gives a token that is read, and whether the step names it."""
    out, reference, mask = output(TOKENS, header_view=header_view)
    (axes,) = plots.plot_mask(out).axes
    cells = cells_of(axes)
    np.testing.assert_array_equal(cells > 0, mask)
    carries = np.array(reference.carries)
    for t, s in np.argwhere(mask):
        reason = 3 if carries[s] == 0 else 4 if carries[s] == carries[t] else 5 if carries[s] in reference.named[t] else 2
        assert cells[t, s] == (1 if t < out.prompt_tokens else reason), (t, s)
    assert f"{out.attended_fraction:.0%}" in axes.get_title()
    colors = {text.get_text(): patch.get_facecolor() for text, patch in zip(axes.get_legend().texts, axes.get_legend().get_patches())}
    image = axes.images[0]
    drawn = {"prompt": 1, "label 0, which every token reads": 3, "its own label": 4, "labels that it names by <ref>": 5}
    drawn |= {"span": {}, "labels": {"beyond that, by a span token": 2}}[header_view] | {"not read": 0}
    assert header_view == "span" or 2 in cells
    assert colors == {name: image.to_rgba(float(value)) for name, value in drawn.items()}
    assert [label.get_text() for label in axes.get_yticklabels()][:4] == ["<1>", "<13>", "4", "<11>"]


@pytest.mark.parametrize("attention", ["dense", "window"])
def test_other_policies_have_their_own_mask(attention):
    out, _, mask = output([*TOKENS[:-1], *[4] * 120, 2], attention)  # longer than a window
    np.testing.assert_array_equal(cells_of(plots.plot_mask(out).axes[0]) > 0, mask)


def test_a_prompt_alone_is_all_prompt():
    lm = SpanLM(random_model(), Words())
    (axes,) = lm.plot_mask(np.array(NAMED["all prompt"][0], np.int32)).axes
    assert set(np.unique(cells_of(axes))) <= {0.0, 1.0} and "prompt" in axes.get_title()


def test_the_pictures_of_an_output_are_its_mask_its_positions_and_its_steps():
    out, _, mask = output(TOKENS)
    axes = {axes.get_label(): axes for axes in out.plot().axes}
    assert axes.keys() == {"mask", "positions", "steps"}
    np.testing.assert_array_equal(cells_of(axes["mask"]) > 0, mask[out.prompt_tokens :])
    texts = [label.get_text() for label in axes["mask"].get_yticklabels()]
    assert texts == list(out.token_texts[out.prompt_tokens :]) and axes["mask"].get_yticks()[0] == out.prompt_tokens

    dense, prompt, response = (line.get_xydata() for line in axes["positions"].lines)
    attended = mask.sum(axis=1)
    np.testing.assert_array_equal(dense[:, 1], np.arange(1, len(TOKENS) + 1))
    np.testing.assert_array_equal(np.concatenate([prompt, response])[:, 0], np.arange(len(TOKENS)))
    np.testing.assert_array_equal(np.concatenate([prompt, response])[:, 1], attended)
    assert len(prompt) == out.prompt_tokens

    dense_bars, read_bars = ([bar.get_height() for bar in bars] for bars in axes["steps"].containers)
    assert read_bars == [attended[list(step)].sum() for step in STEPS]
    assert dense_bars == [sum(t + 1 for t in step) for step in STEPS]
    assert f"{sum(read_bars) / sum(dense_bars):.0%} of dense" in axes["steps"].get_title()


def test_a_response_of_nothing_and_one_without_steps_are_drawn():
    for tokens in ([1, 4, 3], NAMED["no step"][0], NAMED["all prompt"][0]):
        output(tokens)[0].plot().canvas.draw()


def test_text_that_looks_like_a_formula_is_text():
    out, _, _ = output(TOKENS, task=Words(("$x$", "\\frac{", "^_", "\n", " ", "é")))
    out.plot().canvas.draw()  # a formula that cannot be parsed would raise


def test_long_tokens_are_cut_and_characters_that_no_font_has_do_not_warn():
    out, _, _ = output(TOKENS, task=Words(("9" * 60, "שלום", "🌧️", "\n", " ", "é")))
    figure = out.plot()
    figure.canvas.draw()  # warnings are errors in tests
    texts = {label.get_text() for label in figure.axes[0].get_xticklabels()}
    assert {"9" * 11 + "…", "שלום", "↵"} <= texts


def test_long_sequences_are_drawn_without_token_labels():
    tokens = [1, *[4] * 200, VOCAB.solve_id, VOCAB.seg_base + 1, 5, 2]
    axes = output(tokens)[0].plot().axes
    assert all("<" not in label.get_text() for label in axes[0].get_yticklabels())


def test_a_notebook_shows_a_picture_without_being_set_up_for_it():
    assert output(TOKENS)[0].plot()._repr_png_().startswith(b"\x89PNG")
