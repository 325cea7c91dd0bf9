"""The news task: articles in, token ids out, and summaries back."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from data import alignment, scoring
from data.alignment import split_sentences
from data.errors import UserError
from data.news import card, corpus, facts, sources, synthetic
from data.news.corpus import Example
from data.news.synthetic import Fact, Story
from data.pieces import PiecesTask, encode_prompt, style

MAX_STRANGE_WORDS = 0.1  # of synthetic articles: 0; of docs/article.txt, told freely: 0.01; of real news of the same kinds of event: 0.3


@dataclasses.dataclass(frozen=True)
class NewsTask(PiecesTask):
    """Turn articles into ids and responses into summaries.

    Attributes:
      vocab: trained by `data.vocab.train_vocab`, or a language model's own with structural tokens added.
      max_prompt_tokens: Longer articles are cut at the end of a sentence.
      closed_pieces: Each sentence of an article ends with its `<seg:k>` once more.
      source: "synthetic", or the name of the file or data set that its corpus was read from.
    """

    max_prompt_tokens: int = 896
    closed_pieces: bool = False
    source: str = "synthetic"

    name: ClassVar[str] = "news"
    version: ClassVar[int] = 3
    unit: ClassVar[str] = "summaries"
    score_kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "ROUGE": ("rouge1", "rouge2", "rougeL"),
        "facts": ("fact_accuracy", "fact_recall", "all_facts_right"),
        "spans": ("span_precision", "span_recall"),
    }
    Corpus: ClassVar[type] = corpus.Corpus
    WriteCommand: ClassVar[type] = sources.WriteCommand
    columns: ClassVar[Mapping[str, Any]] = {
        "article": ["string"],
        "summary": ["string"],
        "sources": [["int32"]],
        "facts": [{"sentence": "int32", "kind": "string", "text": "string"}],
        "first_label": "int32",
        "prompt_tokens": "int32",
        "token_ids": ["int32"],
    }

    @property
    def is_generated(self) -> bool:
        return self.source == "synthetic"

    def encode(self, story: Story) -> Example | None:
        """Write the prompt and the gold response of a story, labels from 1 on; see `corpus.encode`."""
        return corpus.encode(story, self.vocab, **style(self))

    def encode_prompt(self, text: str) -> npt.NDArray[np.int32]:
        """Write the prompt of an article, int32 [n], labels from 1 on. UserError: no sentence, or more sentences than labels."""
        sentences = split_sentences(text)
        if not sentences:
            raise UserError("the article has no sentence")
        return np.array(encode_prompt(corpus.INSTRUCTION, sentences, self.vocab, **style(self, "divided_into"))[0], np.int32)

    def warnings(self, text: str) -> list[str]:
        """Say how much of an article is cut, and whether its words are those of the stories that models of this task know.

        UserError: see `encode_prompt`.
        """
        sentences, found = split_sentences(text), []
        words = [word for word in alignment.words(text) if not word[0].isdigit()]
        strange = sum(word not in synthetic.words() for word in words) / max(len(words), 1)
        if self.is_generated and strange > MAX_STRANGE_WORDS:
            found.append(
                f"{strange:.0%} of the article's words are beyond what the model was trained on, synthetic news from templates: "
                "do not trust its summary."
            )
        _, kept = encode_prompt(corpus.INSTRUCTION, sentences, self.vocab, **style(self, "divided_into"))
        return found + self.cut_warning(kept, sentences, whole="article")

    def scores(self, examples: Sequence[Example], responses: Sequence[Iterable[int]]) -> dict[str, float]:
        """Score responses to the examples' prompts, labels from 1 on: ROUGE, right facts and right spans."""
        found = [self.steps(response) for response in responses]
        golds, texts = [example.story for example in examples], [[step.text for step in steps] for steps in found]
        scores = scoring.rouge([gold.summary for gold in golds], texts)
        named = [[step.named for step in steps] for steps in found]
        scores |= scoring.span_scores([[set(own) for own in gold.sources] for gold in golds], named)
        if any(gold.facts for gold in golds):
            scores |= facts.fact_scores([gold.facts for gold in golds], texts)
        return scores

    def held_out(self, num_examples: int, *, seed: int) -> dict[str, list[Example]]:
        """Draw synthetic examples of the test split, labels from 1 on, as one set.

        Raises:
          UserError: the model's corpus is no synthetic one, so that these would say nothing of it.
        """
        if not self.is_generated:
            raise UserError(f"trained on news of {self.source}, not on synthetic news: give its corpus directory (--data DIR --split test)")
        settings = corpus.Corpus(num_labels=self.vocab.num_labels, **style(self))
        drawn = map(self.renumber, settings.stream(seed=seed, split="test", vocab=self.vocab))
        return {"synthetic": list(itertools.islice(filter(None, drawn), num_examples))}

    def renumber(self, example: Example, uniform: float | None = None) -> Example | None:
        """Write an example again, labels from 1 on, or from where `uniform` says; None where the vocabulary has no room for it."""
        try:
            return corpus.encode(example.story, self.vocab, uniform=uniform, **style(self))
        except UserError:
            return None

    def to_row(self, example: Example) -> dict[str, Any]:
        """Return the columns of an example in a corpus directory."""
        facts = [fact._asdict() for fact in example.story.facts]
        return {**vars(example.story), "facts": facts, "first_label": example.first_label}

    def from_row(self, row: Mapping[str, Any]) -> Example:
        """Read what `to_row` returned."""
        facts = tuple(Fact(fact["sentence"], fact["kind"], fact["text"]) for fact in row["facts"])
        story = Story(tuple(row["article"]), tuple(row["summary"]), tuple(map(tuple, row["sources"])), facts)
        return Example(row["token_ids"], row["prompt_tokens"], story, row["first_label"])

    def statistics(self) -> card.Statistics:
        """Return the empty statistics of a corpus."""
        return card.Statistics(self.vocab, header_view=self.header_view)
