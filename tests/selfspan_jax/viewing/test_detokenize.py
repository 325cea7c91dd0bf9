"""Text in pieces: joined it is what the tokenizer itself makes of all tokens, and no piece ends in the middle of anything."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data.vocab import train_vocab
from selfspan_jax.errors import UserError
from selfspan_jax.viewing.detokenize import Detokenizer, Response, StopStrings, check_stop_strings, text_at, token_texts

TEXTS = {  # what makes it hard -> text
    "emoji, four bytes each": "Emoji: 🌧️🌈😀🎉🚀🌍 and on",
    "a family of joined emoji": "👩‍👩‍👧‍👦 at home 🏳️‍🌈",
    "Chinese, three bytes each": "今天下雨了。明天会晴天吗？" * 8,
    "combining marks": "e\u0301 a\u0308\u0323 n\u0303o",
    "two bytes each": "żółć ß Пожар",
    "nothing but ASCII": "Trains to Norwick ran with delays of 25 minutes. " * 4,
    "begins with a space": "  two spaces",
    "long runs of rare characters": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢" * 12,
}


def byte_level():
    """Bytes and a few merges, as GPT-2 and SmolLM have them."""
    return Tokenizer.from_str(train_vocab(["Trains to Norwick ran 今天下"], vocab_tokens=300, num_labels=2).tokenizer_json)


def byte_fallback():
    """Characters, and bytes for the others, as Llama 2 and Mistral have them; the decoder drops a space at the beginning."""
    known = [f"<0x{i:02X}>" for i in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyzETN:.,0123456789", "今", "é", "▁t", "to"]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(known)}, [("▁", "t"), ("t", "o")], byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return core


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", TEXTS)
def test_pieces_are_the_text(name, tokenizer):
    """The oracle is the tokenizer, given all tokens at once."""
    tokenizer, text = TOKENIZERS[tokenizer], TEXTS[name]
    ids = tokenizer.encode(text).ids
    pieces = token_texts(tokenizer.decode, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids) and tokenizer.decode(ids).strip() == text.strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert token_texts(tokenizer.decode, []) == ()
    if text.isascii():  # others in a token's place are written as it is
        assert pieces == tuple(text_at(tokenizer.decode, ids, i, token) for i, token in enumerate(ids))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_character_that_is_never_finished_is_told_at_the_end(tokenizer):
    tokenizer = TOKENIZERS[tokenizer]
    ids = tokenizer.encode("ab 😀").ids[:-1]
    detokenizer = Detokenizer(tokenizer.decode)
    assert "".join(map(detokenizer.push, ids)) == "ab " and "\N{REPLACEMENT CHARACTER}" in detokenizer.flush() and not detokenizer.flush()
    assert "".join(token_texts(tokenizer.decode, ids)) == tokenizer.decode(ids)


def test_bytes_without_sense_come_out_as_the_tokenizer_writes_them():
    tokenizer = TOKENIZERS["byte level"]
    for seed in range(20):
        ids = [random.Random(seed * 1000 + i).randrange(256) for i in range(120)]
        assert "".join(token_texts(tokenizer.decode, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("size", [1, 3, 200])
def test_the_tokens_of_a_response_are_its_text(size):
    """Of bytes with and without sense, whatever stops them; what a token was said to add stays."""
    tokenizer, end = TOKENIZERS["byte level"], 299
    known = tokenizer.encode("a 😀今天 to x " * 4).ids
    for seed in range(12):
        rng = random.Random(seed)
        ids = [rng.choice(known) if seed % 2 else rng.randrange(256) for _ in range(60)] + [end] * (seed % 3 > 0)
        text = tokenizer.decode([token for token in ids if token != end])
        stop = () if seed % 4 == 3 else (text[(at := rng.randrange(50)) : at + 3], "no such")
        response = Response(lambda ids: tokenizer.decode([token for token in ids if token != end]), stop, [end], by_token=True)
        told = []
        for start in range(0, len(ids), size):
            response.push(ids[start : start + size])
            told += response.token_texts(len(told))
            assert len(told) == response.num_sure and response.text.startswith("".join(told))
        response.finish()
        told += response.token_texts(len(told))
        assert response.text == (text[: text.find(stop[0])] if stop else text) == "".join(told)
        assert len(told) == len(response.token_ids) and response.token_ids == ids[: len(told)]
        assert told == response.token_texts()


def test_windows_stay_short():
    """A token of a long text takes no longer than one of a short text."""
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return TOKENIZERS["byte level"].decode(ids)

    token_texts(decode, TOKENIZERS["byte level"].encode(TEXTS["Chinese, three bytes each"] * 20).ids)
    assert longest < 50


STOPS = {  # what it is -> (text, stop strings, what is left, what stopped it)
    "none": ("abcabc", (), "abcabc", None),
    "one that does not come": ("abcabc", ("abd",), "abcabc", None),
    "over the borders of pieces": ("abcabd", ("cab",), "ab", "cab"),
    "the first place counts": ("one.two.", (".",), "one", "."),
    "the first that is complete": ("abcd", ("abcd", "bc"), "a", "bc"),
    "of two that end at once the longest": ("xabc", ("bc", "abc"), "x", "abc"),
    "one that begins within itself": ("aaab", ("aab",), "a", "aab"),
    "all of the text": ("stop", ("stop",), "", "stop"),
    "begun at the end": ("abc<e", ("<eos>",), "abc<e", None),
    "span tokens": ("<seg:1>5<seg:2>6", ("<seg:2>",), "<seg:1>5", "<seg:2>"),
    "emoji": ("x😀y", ("😀",), "x", "😀"),
}


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("name", STOPS)
def test_stop_strings(name, size):
    """Whatever the pieces; nothing of a stop string is ever given."""
    text, strings, expected, stopped_by = STOPS[name]
    stops, given = StopStrings(strings), ""
    for start in range(0, len(text), size):
        given += stops.push(text[start : start + size])
        assert expected.startswith(given)
    assert given + stops.flush() == expected and stops.found == stopped_by


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [1], 3, {"a": 1}, None])
def test_what_is_no_stop_string_is_refused(stop):
    with pytest.raises(UserError, match=r"stop is .*; allowed: a text of at least one character"):
        check_stop_strings(stop)
