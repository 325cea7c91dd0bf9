"""News: articles and their summaries as labelled examples, in the span protocol's section 6.

    <bos> Summarize:<seg:1> sentence 1<seg:2> sentence 2 ...<solve><seg:m+1><ref:a><ref:b> summary sentence ...<eos>

Labels of one example are consecutive, in training from a random offset. Articles too long for `max_prompt_tokens` are cut at
the end of a sentence; a summary sentence whose sources are all cut off is left out.
"""

from data.alignment import Alignment, split_sentences
from data.news.corpus import INSTRUCTION, Corpus, Example
from data.news.synthetic import Fact, Story
from data.news.task import NewsTask
from data.vocab import train_vocab

__all__ = ["INSTRUCTION", "Alignment", "Corpus", "Example", "Fact", "NewsTask", "Story", "split_sentences", "train_vocab"]
