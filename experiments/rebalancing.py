"""What rebalanced attention (2403.14932) does to a pretrained model: people's questions about stories, doctors' about trials, plain text.

    python -m experiments.neighbours rebalance MODEL --stories FairytaleQAData --reports evidence-inference --json FILE

Each question stands in a chat after the text that people marked for it. Answers about stories are decoded and scored by ROUGE-L against
the people's; verdicts are the likeliest first word of "increased", "decreased" and "no difference". The loss is of the last tokens of
reports, read densely but for the weights. Alpha 0 is dense attention, so its rows show what rounding does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional

from data import commandline, scoring
from data.errors import check_range
from data.papers import reports
from data.stories import source as stories
from data.tasks import TASKS
from data.verdicts.source import VERDICTS, ask
from experiments.prefill import check_texts, concatenated, continued, device_header, summary
from selfspan_jax import files
from selfspan_jax.attention.policies import Policy, get_policy
from selfspan_jax.config import DecodeConfig, Dtype
from selfspan_jax.errors import UserError
from selfspan_jax.evaluation import wilson
from selfspan_jax.lm import SpanLM
from selfspan_jax.neighbours.rebalanced import Rebalanced

STORY = "{}\n\nAnswer with a few words of the text: {}"
VERDICT = "{}\n\n{} Answer with one of: increased, decreased, no difference."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rebalancing:
    """Score a pretrained model's answers, verdicts and text under rebalanced attention, beside dense."""

    model: Positional[Path]
    """As `decode.py` takes it."""
    stories: Path | None = None
    """A clone of github.com/uci-soe/FairytaleQAData, whose validation questions are asked."""
    reports: Path | None = None
    """A clone of github.com/jayded/evidence-inference, whose validation questions are asked and texts are read."""
    alphas: Annotated[tuple[float, ...], commandline.commas(float)] = (0.0, 0.1, 0.2, 0.4)
    """What is added to weights, in the second layer."""
    num_questions: int = 1000
    """Of each kind, at most."""
    batch_size: int = 64
    """Questions that are answered together."""
    tokens: int = 2048
    """Of each text of reports, continuation included."""
    continuation: int = 256
    """Last tokens, which are scored."""
    num_texts: int = 16
    """Texts, no report in two of them."""
    dtype: Dtype | None = None
    """What activations and products are computed in; by default as the model is stored."""
    json: Path | None = None
    """Write the rows into this file, each as soon as it is there."""

    def __post_init__(self):
        check_range(self, "num_questions", "batch_size", low=1)
        if self.stories is None and self.reports is None:
            raise UserError("give --stories, --reports, or both")
        check_texts(self)

    def run(self) -> None:
        lm = SpanLM.load(self.model, TASKS, dtype=self.dtype)
        report: dict[str, Any] = {**device_header(), "model": files.model_name(self.model), "dtype": lm.model.config.compute_dtype}
        report |= {"tokens": self.tokens, "continuation_tokens": self.continuation, "num_texts": self.num_texts, "rebalancing": []}
        policies: list[Policy] = [get_policy("dense"), *(Rebalanced(alpha) for alpha in self.alphas)]
        for make, given in ((self.answers, self.stories), (self.verdicts, self.reports), (self.losses, self.reports)):
            for row in make(lm, given, policies) if given else ():
                report["rebalancing"].append(row)
                files.write_rows(self.json, report, complete=False)
                print("  ".join(cells(row)), flush=True)
        files.write_rows(self.json, report, complete=True)

    def answers(self, lm: SpanLM, source: Path, policies: Sequence[Policy]) -> Iterator[dict[str, Any]]:
        """Yield ROUGE-L of answers about stories under each policy, and the difference to dense with its error over questions."""
        asked = [(tale, question) for tale in stories.read(str(source), "validation") for question in tale.questions if question.answers]
        asked, dense, told = asked[: self.num_questions], None, list[str]()
        prompts = [STORY.format(" ".join(tale.sections[i] for i in question.sections), question.text) for tale, question in asked]
        for policy in policies:
            outs = lm.generate(prompts, attention=policy, chat=True, max_new_tokens=24, batch_size=self.batch_size, stop="\n")
            scores = 100 * np.array(scoring.rouge_l([question.answers for _, question in asked], [out.answer or out.text for out in outs]))
            dense = scores if dense is None else dense
            told = told or [out.text for out in outs]
            yield row_of(policy, "stories", scores, dense) | {"same_answers": sum(out.text == one for out, one in zip(outs, told))}

    def verdicts(self, lm: SpanLM, source: Path, policies: Sequence[Policy]) -> Iterator[dict[str, Any]]:
        """Yield the share of right verdicts under each policy."""
        asked = [*questions(source)][: self.num_questions]
        prompts, golds = [prompt for prompt, _ in asked], np.array([code for _, code in asked])
        ids = lm.encode(prompts, chat=True)[1]
        words = [lm.task.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in VERDICTS.values()]  # type: ignore[attr-defined]
        width, dense = max(map(len, ids)), None
        for policy in policies:
            found = []
            for start in range(0, len(ids), self.batch_size):
                some = ids[start : start + self.batch_size]
                rows, lengths = np.zeros((len(some), width), np.int32), np.array([*map(len, some)], np.int32)
                for row, own in zip(rows, some):
                    row[: len(own)] = own
                found += np.argmax(np.asarray(lm.engine.prefill(rows, lengths, DecodeConfig(policy, 1)).logits)[:, words], axis=1).tolist()
            right = 100.0 * (np.array([*VERDICTS])[found] == golds)
            dense = right if dense is None else dense
            given = {word: found.count(index) for index, word in enumerate(VERDICTS.values())}
            yield row_of(policy, "verdicts", right, dense) | {"given": given, "interval": wilson(right.mean() / 100, len(right))}

    def losses(self, lm: SpanLM, source: Path, policies: Sequence[Policy]) -> Iterator[dict[str, Any]]:
        """Yield the loss of the last tokens of reports under each policy."""
        numbers = reports.part(str(source), "validation").read_text(encoding="utf-8").split()
        paths = [source / "annotations" / "txt_files" / f"PMC{number}.txt" for number in numbers]
        texts, dense = concatenated(lm, paths, self.tokens, self.num_texts), None
        for policy in policies:
            prompts, config = texts[:, : -self.continuation], DecodeConfig(policy, self.continuation)
            state = lm.engine.prefill(prompts, np.full(len(texts), prompts.shape[1], np.int32), config)
            own = continued(lm, state, texts[:, -self.continuation :], config)
            dense = own if dense is None else dense
            yield {"kind": "text", "alpha": getattr(policy, "alpha", None), "number": own.size, **summary(own, dense)}


def questions(source: Path) -> Iterator[tuple[str, int]]:
    """Yield doctors' validation questions after a quote of their evidence, and the verdict that most doctors gave."""
    for paper in reports.read(str(source), "validation"):
        for question in paper.questions:
            codes = [annotation.code for annotation in question.annotations if annotation.is_right]
            quotes = [annotation for annotation in question.annotations if annotation.is_right and annotation.is_shown]
            if quotes and codes.count(max(codes, key=codes.count)) * 2 > len(codes):
                code = max(codes, key=codes.count)
                if own := next((each for each in quotes if each.code == code), None):
                    yield VERDICT.format(" ".join(paper.text[own.start : own.end].split()), ask(question)), code


def row_of(policy: Policy, kind: str, scores: np.ndarray, dense: np.ndarray) -> dict[str, Any]:
    """Return the mean of scores in percent, and its difference to dense with the standard error over questions."""
    more = scores - dense
    error = float(more.std(ddof=1) / np.sqrt(len(more))) if len(more) > 1 else None
    means = {"score": float(scores.mean()), "more": float(more.mean()), "error": error}
    return {"kind": kind, "alpha": getattr(policy, "alpha", None), "number": len(scores), **means}


HEADER = ("task", "alpha", "questions or tokens", "ROUGE-L or right, %; perplexity", "more than dense", "± (one error)")


def cells(row: dict[str, Any]) -> list[str]:
    """Write the cells of a row of the table."""
    first = [row["kind"], "dense" if row["alpha"] is None else f"{row['alpha']:g}", f"{row['number']:,}"]
    if row["kind"] == "text":
        return [*first, f"{row['perplexity']:.3f}", f"{row['loss_more']:+.4f} (loss)", f"{row['loss_more_error']:.4f}"]
    return [*first, f"{row['score']:.2f}", f"{row['more']:+.2f}", "-" if row["error"] is None else f"{row['error']:.2f}"]
