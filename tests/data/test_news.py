"""News: splitting, alignment, synthetic stories, the task, corpus directories; what is read from files in news/test_sources.py."""

import dataclasses
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from data import dataset as corpus
from data import news, scoring
from data.__main__ import main as data_main
from data.alignment import Alignment, split_sentences, words
from data.news import synthetic
from data.news.facts import fact_scores, stated
from data.tasks import TASKS

STORIES = [synthetic.draw(f"tests/{i}") for i in range(150)]


@pytest.fixture(scope="module")
def task():
    return news.NewsTask.of(news.Corpus())


@pytest.fixture(scope="module")
def examples(task):
    return list(itertools.islice(news.Corpus().stream(seed=3), 96))


# ------------------------------------------------------------------------------------------------ splitting

HARD = {
    "titles and initials": ["Dr. Smith met Mr. J. R. Brown on Jan. 5 in Washington, D.C. on Monday.", "They talked."],
    "quotes": ['"We will win," said Anna.', '"It is time!"', "Nobody answered."],
    "a question in quotes": ['He asked: "Why now?" and left.', "No one knew."],
    "decimal numbers": ["Shares rose 3.5 percent to $12.40.", "Analysts were surprised."],
    "a number without a whole part": ["Prices fell by .5 percent.", "That was new."],
    "countries": ["The U.S. economy grew.", "The U.K. did not."],
    "an abbreviation at the end": ["He moved to the U.S. in 1999.", "He stayed."],
    "companies": ["The firm, Acme Inc., said so.", "Acme Corp. disagreed."],
    "times": ["It happened at 5 p.m. on Friday.", "Police came at 6 a.m.", "Nobody was hurt."],
    "ranks": ["The match ended 3-2.", "Lt. Col. Miller (retired) watched."],
    "addresses": ["No. 10 Downing St. was closed.", "The St. Louis mayor came."],
    "curly quotes": ["“It works,” she said.", "“We are glad.”", "He nodded."],
    "ellipsis": ["Is it over?", "Yes!", "It is..."],
}


@pytest.mark.parametrize("case", HARD)
def test_hard_sentence_ends(case):
    assert split_sentences(" ".join(HARD[case])) == HARD[case]


def test_blank_lines_end_sentences_and_signs_are_none():
    assert split_sentences("A title without a stop\n\nOne\nsentence.\n\n* * *\n\n") == ["A title without a stop", "One sentence."]
    assert split_sentences(" \n ") == []


# ------------------------------------------------------------------------------------------------ alignment


def best_recall(article, sentence, size, function_words):
    """The highest ROUGE-1 recall of any set of so many sentences, by trying all."""
    wanted = [word for word in words(sentence) if word not in function_words]

    def recall(members):
        have = [word for i in members for word in words(article[i])]
        return sum(min(wanted.count(word), have.count(word)) for word in set(wanted)) / len(wanted)

    return max((recall(members), members) for members in itertools.combinations(range(len(article)), size))


def test_small_cases_reach_what_trying_every_set_reaches():
    from data.alignment import FUNCTION_WORDS

    reached = []
    for story in STORIES[:15]:
        found = Alignment().align(story.article, story.summary)
        for sentence, own in zip(story.summary, found, strict=True):
            assert own and list(own) == sorted(set(own))
            mine = best_recall([story.article[i] for i in own], sentence, len(own), FUNCTION_WORDS)[0]
            best = best_recall(story.article, sentence, len(own), FUNCTION_WORDS)[0]
            assert mine <= best + 1e-9
            reached.append(mine / best)
            for i in own:  # each of them adds at least the threshold
                rest = [story.article[j] for j in own if j != i]
                without = best_recall(rest, sentence, len(rest), FUNCTION_WORDS)[0] if rest else 0.0
                assert mine - without >= Alignment().min_gain - 1e-9
    assert np.mean(reached) > 0.99  # greedy, so not always 1


ALIGNMENTS = {
    "one sentence has it all": (["Rain fell.", "Ada Moss won in Oakton.", "Ada spoke."], "Ada Moss won in Oakton.", (1,)),
    "two sentences share it": (["Ada Moss won.", "Rain fell.", "It was in Oakton."], "Ada Moss won in Oakton.", (0, 2)),
    "nothing shared": (["Rain fell."], "Ada Moss won.", ()),
    "only function words shared": (["It was the one that he had."], "The mayor was in it.", ()),
    "a needless first choice is taken out": (
        ["A fire hurt nine people elsewhere.", "A fire reached the Oakton mill.", "It hurt 14 people there."],
        "A fire hurt 14 people Oakton mill.",
        (1, 2),
    ),
    "pairs of words decide between equals": (["Moss beat Lee.", "Lee beat Moss."], "Lee beat Moss.", (1,)),
    "the earlier of equals": (["Ada won.", "Ada won."], "Ada won.", (0,)),
    "an empty article": ([], "Ada won.", ()),
}


@pytest.mark.parametrize("case", ALIGNMENTS)
def test_alignment_of(case):
    article, sentence, expected = ALIGNMENTS[case]
    assert Alignment().align(article, [sentence]) == [expected]


def test_alignment_finds_the_true_sources_of_synthetic_news_and_a_guesser_by_position_does_not():
    right = found = true = 0
    for story in STORIES:
        for own, gold in zip(Alignment().align(story.article, story.summary), story.sources, strict=True):
            right, found, true = right + len({*own} & {*gold}), found + len(own), true + len(gold)
    assert right / found > 0.9 and right / true > 0.9
    guessed = sum(len({0, 1, 2} & {*gold}) for story in STORIES for gold in story.sources)
    assert guessed / true < 0.5


# ------------------------------------------------------------------------------------------------ synthetic


def test_a_seed_is_a_story_and_nothing_but_random_is_drawn():
    assert synthetic.draw("tests/0") == STORIES[0] != STORIES[1]
    assert synthetic.story(random.Random("tests/0").random) == STORIES[0]


def test_facts_are_in_the_summary_sentence_and_in_its_sources_and_nowhere_else():
    kinds = set()
    for story in STORIES:
        for fact in story.facts:
            kinds.add(fact.kind)
            word = re.compile(rf"\b{fact.text}\b")
            assert word.search(story.summary[fact.sentence])
            holders = {i for i, sentence in enumerate(story.article) if word.search(sentence)}
            assert holders and holders <= {*story.sources[fact.sentence]}, (fact, story)
            assert not any(word.search(text) for n, text in enumerate(story.summary) if n != fact.sentence)
        for n, sentence in enumerate(story.summary):  # and they are all that the sentence states
            assert stated(sentence) == {fact.text for fact in story.facts if fact.sentence == n}, sentence
    assert kinds == {"name", "place", "number"}


def test_every_event_is_told_before_it_is_referred_to():
    for story in STORIES:
        for number, own in enumerate(story.sources):
            (who,) = [fact.text for fact in story.facts if fact.sentence == number and fact.kind == "name"][:1]
            assert who in story.article[own[0]]
        assert not any("{" in sentence for sentence in (*story.article, *story.summary))


def test_splits_share_no_article(task):
    drawn = {split: {x.prompt for x in itertools.islice(news.Corpus().stream(seed=0, split=split), 64)} for split in ("train", "test")}
    assert not drawn["train"] & drawn["test"]


# ----------------------------------------------------------------------------------------------------- task


def test_an_example_is_written_as_the_protocol_says(task):
    story = news.Story(("Ada won.", "Rain fell.", "It was Monday."), ("Ada won on Monday.",), ((0, 2),), ())
    example = task.encode(story)
    written = task.decode(example.token_ids)
    assert written == (
        "<bos> Summarize:<seg:1> Ada won.<seg:2> Rain fell.<seg:3> It was Monday.<solve><seg:4><ref:1><ref:3> Ada won on Monday.<eos>"
    )
    closing = dataclasses.replace(task, closed_pieces=True)
    closed = closing.encode(story)
    assert task.decode(closed.token_ids) == (
        "<bos> Summarize:<seg:1> Ada won.<seg:1><seg:2> Rain fell.<seg:2><seg:3> It was Monday.<seg:3><solve>"
        "<seg:4><ref:1><ref:3> Ada won on Monday.<eos>"
    )
    assert (example.prompt_ids == task.encode_prompt(example.prompt)).all()
    assert (closed.prompt_ids == closing.encode_prompt(example.prompt)).all()
    assert closing.scores([closed], [example.response_ids])["span_recall"] == 1
    assert task.steps(example.response_ids) == [(4, frozenset({0, 2}), "Ada won on Monday.")]
    assert task.answer(example.response_ids) == "Ada won on Monday."
    assert task.answer([]) is None


def test_streams_start_anywhere_and_do_not_depend_on_workers(task, examples):
    later = list(itertools.islice(news.Corpus().stream(seed=3, start=70), 10))
    for one, other in zip(examples[70:80], later, strict=True):
        assert (one.token_ids == other.token_ids).all()
    stream = news.Corpus().stream(seed=3, num_workers=1)
    for one, other in zip(examples, itertools.islice(stream, 4), strict=False):
        assert (one.token_ids == other.token_ids).all()
    stream.close()


def test_the_prompt_s_text_gives_the_prompt_s_sentences(examples):
    for example in examples:
        assert split_sentences(example.prompt) == list(example.story.article)


def test_labels_are_consecutive_and_all_used(task, examples):
    seen = set()
    for example in examples:
        segs = example.token_ids[np.isin(example.token_ids, list(task.step_ids))] - task.vocab.seg_base
        assert (np.diff(segs) == 1).all() and segs[0] == example.first_label >= 1 and segs[-1] < task.vocab.num_labels
        seen |= {*segs.tolist()}
    assert seen == {*range(1, task.vocab.num_labels)}


def test_text_cannot_open_or_name_anything(task):
    ids = task.encode_prompt("He wrote <seg:5> and <solve> and <eos> and <ref:1>.")
    structural = [i for i in ids.tolist() if i >= task.vocab.pad_id]
    assert structural == [task.vocab.bos_id, task.vocab.seg_base + 1, task.vocab.solve_id]


def test_a_task_survives_its_json(task):
    again = news.NewsTask.from_json(json.loads(json.dumps(task.to_json())))
    assert again == task and (again.encode_prompt("Ada won.") == task.encode_prompt("Ada won.")).all()
    with pytest.raises(ValueError, match="task: unknown key 'x'"):
        news.NewsTask.from_json({**task.to_json(), "x": 1})


def test_long_articles_are_cut_at_sentence_ends_with_the_sources_beyond(task):
    short = news.NewsTask(task.vocab, max_prompt_tokens=40)
    article = tuple(f"Sentence number {i} is here now." for i in range(9))
    example = short.encode(news.Story(article, ("One.", "Eight.", "Both."), ((1,), (8,), (1, 8)), (news.Fact(2, "name", "Both"),)))
    assert example.prompt_tokens <= 40 and task.decode(example.token_ids[: example.prompt_tokens]).endswith("now.<solve>")
    assert example.story.article == article[: len(example.story.article)] and 1 < len(example.story.article) < 8
    assert (example.story.summary, example.story.sources) == (("One.", "Both."), ((1,), (1,)))
    assert example.story.facts == (news.Fact(1, "name", "Both"),)
    assert short.encode(news.Story(article, ("Eight.",), ((8,),), ())) is None


REAL_NEWS = (
    "A fire broke out at a supermarket in Leeds on Monday evening and firefighters needed five hours to bring it under control, the fire "
    "service said. No one was hurt. Police are investigating whether the blaze was started deliberately. Nearby residents were told to "
    "keep windows closed because of smoke. The store, which opened in 1998, had been closed for renovation."
)


def test_words_beyond_the_templates_are_told(task):
    """Held-out synthetic stories have none, an article told with the templates' words few, one of a newspaper many."""
    told = Path(__file__).parents[2] / "docs" / "article.txt"
    stories = ["\n\n".join(synthetic.draw(f"others/{i}").article) for i in range(100)]
    assert {word for story in stories for word in words(story) if not word[0].isdigit()} <= synthetic.words()
    for text in (told.read_text(), *stories[:3]):
        assert task.warnings(text) == []
    (warning,) = task.warnings(REAL_NEWS)
    assert re.match(r"30% of the article's words are beyond what the model was trained on", warning)
    (warning,) = task.warnings("Пожар начался в понедельник. Никто не пострадал.")
    assert warning.startswith("100%")


def test_an_article_that_is_cut_is_told_with_what_is_left(task):
    sentence = "The old town has five bridges."
    short = dataclasses.replace(task, max_prompt_tokens=16 + 3 * len(task.vocab.text_ids(" " + sentence)))
    kept = sum(token in task.step_ids for token in short.encode_prompt(" ".join([sentence] * 20)).tolist())
    assert 1 < kept < 20
    (warning,) = [line for line in short.warnings(" ".join([sentence] * 20)) if "reads" in line]
    assert warning.startswith(f"The model reads the first {kept} of 20 sentences, {kept / 20:.0%} of the article: its prompts have at most")
    assert not any("reads" in line for line in task.warnings(sentence))


def test_too_many_sentences_for_the_labels_are_said(task):
    few = news.NewsTask(news.train_vocab(["Ada won."], vocab_tokens=300, num_labels=4))
    with pytest.raises(ValueError, match=r"^the text has 4 sentences, but the model has room for 2: each takes a label"):
        few.encode_prompt("One won. Two won. Three won. Four won.")
    assert len(few.encode_prompt("One won. Two won.")) > 0
    with pytest.raises(ValueError, match=r"^the first of the text's sentences does not fit into 896 tokens of prompt; blank"):
        task.encode_prompt("on and " * 1000)
    assert len(task.encode_prompt("on and \n\n" * 100)) < 896
    with pytest.raises(ValueError, match="the article has no sentence"):
        few.encode_prompt(" \n")


# -------------------------------------------------------------------------------------------------- scoring


def test_gold_responses_score_one_and_spoiled_ones_less(task):
    golds = [task.encode(story) for story in STORIES[:8]]
    perfect = task.scores(golds, [example.response_ids for example in golds])
    assert {round(value, 9) for value in perfect.values()} == {1.0}
    exchanged = task.scores(golds, [example.response_ids for example in golds[1:] + golds[:1]])
    assert exchanged["fact_accuracy"] < 0.1 and exchanged["rougeL"] < 0.7 and exchanged["all_facts_right"] == 0
    nothing = task.scores(golds, [[] for _ in golds])
    assert nothing["rouge1"] == nothing["fact_accuracy"] == nothing["span_recall"] == 0


def test_a_right_number_of_the_wrong_event_is_wrong():
    facts = [news.Fact(0, "name", "Ada Moss"), news.Fact(0, "number", "7"), news.Fact(1, "name", "Ian Holt"), news.Fact(1, "number", "9")]
    assert fact_scores([facts], [["Ada Moss had 7.", "Ian Holt had 9."]])["fact_accuracy"] == 1
    crossed = fact_scores([facts], [["Ada Moss had 9.", "Ian Holt had 7."]])
    assert (crossed["fact_accuracy"], crossed["fact_recall"], crossed["all_facts_right"]) == (0.5, 0.5, 0)
    assert fact_scores([facts], [["Ada Moss had 7."]])["fact_recall"] == 0.5


def test_span_scores_by_hand():
    assert scoring.span_scores([[{1, 2}, {3}]], [[{1, 4}, {3}, {5}]]) == {"span_precision": 0.5, "span_recall": 2 / 3}


# -------------------------------------------------------------------------------------------------- command


def test_a_synthetic_corpus_is_read_back(tmp_path, call):
    assert call(data_main, "news", "--num-examples", 30, "--out", tmp_path / "out")[0] == 0
    stored = corpus.load(tmp_path / "out", TASKS)
    expected = {x.prompt: x for x in itertools.islice(news.Corpus().stream(seed=0), 30)}
    for example in itertools.islice(stored.stream(seed=1), 30):
        own = expected.pop(example.prompt)
        assert example.story == own.story and (example.token_ids == own.token_ids).all()
    assert not expected
    statistics = stored.card["statistics"]
    assert statistics["alignment_against_truth"]["recall"] > 0.9 and statistics["position_guesser"]["f1"] < 0.5
    assert 0 < statistics["attended_fraction_body"] < 0.3 and statistics["attended_fraction_header"] == 1


def test_examples_held_out_are_of_no_training_stream(task):
    held = {example.prompt for example in task.held_out(16, seed=0)["synthetic"]}
    assert len(held) == 16 and not held & {example.prompt for example in itertools.islice(news.Corpus().stream(seed=0), 64)}


# ------------------------------------------------------------------------------------------------ other scripts

SCRIPTS = {
    "Chinese": "今天市长辞职了。",
    "Japanese": "市長は月曜日に辞任した。",
    "Thai": "นายกเทศมนตรีลาออกแล้ว",
    "Russian": "Мэр ушёл в отставку.",
    "Arabic": "استقال رئيس البلدية.",
    "Hindi": "मेयर ने इस्तीफा दिया।",
    "Greek": "Ο δήμαρχος παραιτήθηκε.",
    "French": "Élève à l'œil noir, ça y est.",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_rouge_of_the_same_text_is_one_and_of_another_none(script):
    text, others = SCRIPTS[script], [text for name, text in SCRIPTS.items() if name != script]
    assert scoring.rouge([[text]], [[text]]) == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    for other in others:
        assert scoring.rouge([[text]], [[other]])["rouge2"] == 0
    assert Alignment().align([others[0], text, others[1]], [text]) == [(1,)]


def test_rouge_by_hand_in_other_scripts():
    """Each Chinese character is a word; accents tell words apart, composed or not; vowel signs do."""
    assert scoring.rouge([["市长辞职"]], [["市长上任"]])["rouge1"] == 0.5
    assert scoring.rouge([["Café fermé"]], [["cafe\u0301 ferme"]])["rouge1"] == 0.5
    assert scoring.rouge([["की का"]], [["की कि"]])["rouge1"] == 0.5


def test_rouge_of_english_is_that_of_rouge_score():
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)
    texts = [
        ['The mayor\'s 3.5 percent_rise, re-elected (U.S.): "wins"!', "1,200 people's votes."],
        ["Mayors win 3 5 percents of 1 200 votes"],
    ]
    texts += [list(story.summary) for story in STORIES[:5]]
    for gold, own in itertools.product(texts, texts):
        expected = scorer.score("\n".join(gold), "\n".join(own))
        found = scoring.rouge([gold], [own])
        assert [found[name] for name in ("rouge1", "rouge2", "rougeL")] == [score.fmeasure for score in expected.values()]
