"""What a model chooses next: kinds of tokens by hand, and shares against logits of whole sequences."""

import json

import numpy as np
from flax import nnx

from data import dataset
from data.__main__ import main as data_main
from data.tasks import TASKS
from experiments import choices
from selfspan_jax.config import ModelConfig
from selfspan_jax.lm import SpanLM
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab
from tests.selfspan_jax.models import TINY

ROW = {"document": ["Ada won.", "Rain fell.", "Question: Who won?"], "steps": [{"text": "Ada did", "sources": [2, 0, 1]}]}
KINDS = ["first label", "question", "first source", "more sources", "first text", "text", "closes", "end"]


def test_choices_are_scored_by_kind_after_gold_tokens(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    data_main(["documents", "--source", str(tmp_path), "--closed-steps", "--vocab-tokens", "300", "--out", str(tmp_path / "corpus")])
    stored = dataset.load(tmp_path / "corpus", TASKS)
    task, (example,) = stored.task, map(stored.task.renumber, stored)
    ids, begin, vocab = example.token_ids, example.prompt_tokens, task.vocab
    found = [*choices.kinds(ids, begin, task)]
    assert [*dict.fromkeys(kind for kind, _ in found)] == KINDS
    assert all(token in right for token, (_, right) in zip(ids[begin:], found, strict=True))
    sources = {vocab.ref_base + 1, vocab.ref_base + 2}
    assert [right for kind, right in found if "source" in kind] == [sources, {vocab.ref_base + 2}]  # any that is not named yet

    config = ModelConfig(**{**TINY, "max_context_tokens": 512}, header_view="labels")
    model = Decoder(config, vocab=SpanVocab(**vocab.span_ids()), vocab_size=vocab.size, rngs=nnx.Rngs(0))
    scores = SpanLM(model, task).logits(ids)[begin - 1 : -1]
    values = choices.choices(model, task, [example, example])
    assert {kind: own["tokens"] for kind, own in values.items()} == {kind: 2 * sum(kind == k for k, _ in found) for kind in KINDS}
    for kind in KINDS:
        rows = [i for i, (own, _) in enumerate(found) if own == kind]
        base = {"label": vocab.seg_base, "closes": vocab.seg_base, "question": vocab.ref_base, "source": vocab.ref_base}
        low = next((first for word, first in base.items() if word in kind), None)
        family = slice(None) if low is None else slice(low, low + vocab.num_labels)
        best, within = scores[rows].argmax(1), scores[rows, family].argmax(1) + (low or 0)
        losses = np.log(np.exp(scores[rows].astype(float)).sum(1)) - scores[rows, ids[begin:][rows]]
        expected = [np.mean([b in found[row][1] for b, row in zip(own, rows)]) for own in (best, within)]
        np.testing.assert_allclose(
            [values[kind][name] for name in ("right", "right_within_family", "loss")], [*expected, losses.mean()], atol=2e-3
        )
