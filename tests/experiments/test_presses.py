"""Decoding in transformers on caches that presses compressed: against whole forwards under a mask of what each press keeps."""

import types
from pathlib import Path

import numpy as np
import pytest

from experiments import presses
from selfspan_jax.errors import UserError

ENDS = [99]
PROMPTS = [np.random.default_rng(n).integers(0, 90, n) for n in (15, 9)]
NEW = 4


@pytest.fixture(scope="module")
def peer():
    import torch  # five seconds, in the process only that runs this
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=100, initializer_range=0.2, **sizes)
    return presses.Peer(transformers.LlamaForCausalLM(config).eval(), ENDS)


class Every:
    """Keep each n-th token of a prompt, from one on."""

    def __init__(self, n, first=0):
        self.n, self.first = n, first

    def post_init_from_model(self, model): ...

    def compress(self, module, hidden_states, keys, values, attentions, named):
        assert named["past_key_values"].layers[module.layer_idx].keys is keys and hidden_states.shape[1] == keys.shape[2]
        assert int(named["cache_position"][-1]) + 1 == keys.shape[2]
        return keys[:, :, self.first :: self.n], values[:, :, self.first :: self.n]


def whole_forwards(model, prompt, kept, size):
    """Decode by a forward of everything for each token: response tokens do not see the tokens of the prompt that were dropped."""
    import torch

    ids = prompt.tolist()
    for _ in range(size):
        seen = np.tri(len(ids), dtype=bool)
        seen[len(prompt) :, : len(prompt)] = kept
        mask = torch.tensor(np.where(seen, 0, -np.inf), dtype=torch.float32)[None, None]
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), attention_mask=mask).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_responses_are_those_of_whole_forwards(peer):
    """Of ragged prompts under several presses in one batch; all kept is dense decoding. And a press that keeps others gives others."""
    made = {"half": Every(2), "odd": Every(2, 1)}
    kept, first = peer.read(PROMPTS, made)
    found = peer.decode_all(kept, first, PROMPTS, NEW)
    for key, press in {**made, ("dense", 100.0): Every(1)}.items():
        for prompt, (tokens, rows) in zip(PROMPTS, found[key]):
            is_kept = np.isin(np.arange(len(prompt)), np.arange(len(prompt))[press.first :: press.n])
            expected = whole_forwards(peer.model, prompt, is_kept, NEW)
            np.testing.assert_array_equal(tokens, expected[: expected.index(99) + 1] if 99 in expected else expected)
            np.testing.assert_array_equal(rows, is_kept.sum() + np.arange(1, len(tokens) + 1))
    differ = [tuple(one) != tuple(other) for (one, _), (other, _) in zip(found["half"], found["odd"])]
    assert any(differ)


def test_layers_that_keep_different_numbers_are_made_alike(peer):
    """Of the longer one the newest rows are kept: there is one mask for all layers."""

    class Uneven(Every):
        def compress(self, module, hidden_states, keys, values, attentions, named):
            first = (4, 7)[module.layer_idx]
            return keys[:, :, first:], values[:, :, first:]

    kept, _ = peer.read(PROMPTS, {"uneven": Uneven(1)})
    for prompt, own, every in zip(PROMPTS, kept["uneven"], kept["dense", 100.0]):
        for layer, whole in zip(own, every):
            assert layer[0].shape[2] == len(prompt) - 7 and layer[1].equal(whole[1][:, :, 7:])


def test_a_corpus_of_longer_prompts_is_refused(monkeypatch):
    example = types.SimpleNamespace(prompt="a long one")
    task = types.SimpleNamespace(encode_prompt=list)
    monkeypatch.setattr(presses.examples, "stored", lambda *_: (task, {"validation": [example]}, None))
    settings = presses.ModelAndCorpus(model=Path("m"), data=Path("corpus"), max_prompt_tokens=9)
    with pytest.raises(UserError, match="corpus: no prompt of the first 1 has at most 9 tokens"):
        presses.chosen(types.SimpleNamespace(task=None), settings)


def test_compression_goes_on_while_it_decodes(peer, monkeypatch):
    """A cache is cut back to its size after every so many tokens; the rows that are read say so."""

    class Decoding:
        def __init__(self, base_press, compression_interval, target_size):
            self.interval, self.size, self.steps = compression_interval, target_size, {}

        def forward_hook(self, module, given, named, output):
            index = module.layer_idx
            self.steps[index] = self.steps.get(index, 0) + 1
            if self.steps[index] % self.interval == 0:
                layer = named["past_key_values"].layers[index]
                layer.keys, layer.values = layer.keys[:, :, -self.size :], layer.values[:, :, -self.size :]

    class Last(Every):
        compression_ratio = 0.0

        def compress(self, module, hidden_states, keys, values, attentions, named):
            size = int(keys.shape[2] * (1 - self.compression_ratio))
            return keys[:, :, -size:], values[:, :, -size:]

    stub = types.SimpleNamespace(KnormPress=lambda: Last(1), DecodingPress=Decoding)
    monkeypatch.setitem(__import__("sys").modules, "kvpress", stub)
    kept, first = peer.read_to(PROMPTS, 50)
    assert {layer[0].shape[2] for own in kept for layer in own} == {6}  # half of 15 and 9 tokens' mean
    for tokens, rows in peer.decode_compressing(kept, first, PROMPTS, 5, interval=3):
        np.testing.assert_array_equal(rows, [7, 8, 9, 7, 8][: len(tokens)])
    dense, compressing = peer.timed(PROMPTS, [], [50], 4)
    assert dense["attended_tokens"] == (15 + 9) / 2 + 3 and 7 < compressing["attended_tokens"] <= 6 + 3
    assert compressing["cache_bytes"] == dense["cache_bytes"] / 2 and compressing["ms_per_step"] > 0
