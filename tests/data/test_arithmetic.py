"""Parser, oracle and verifier, against Python's own parser and arithmetic and a plain recursive writer."""

import ast
import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.arithmetic import ArithmeticTask, Corpus, Expression, ExpressionError, answer, encode, encode_prompt, parse, stream, verify
from data.vocab import Vocab

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=200)
EXAMPLE = "((51+75)-(95*3))"
EXAMPLE_PROMPT = "<bos><seg:3>(<seg:1>(51+75)<seg:3>-<seg:2>(95*3)<seg:3>)<solve>"
EXAMPLE_RESPONSE = "<seg:1>51+75=126<seg:2>95*3=285<seg:3><ref:1><ref:2>126-285=-159<eos>"
SYMBOLS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


def python_tree(text):
    """The tree as Python reads it, with the specification's unary minus: an int, or (left, symbol, right)."""

    def convert(node):
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                converted = convert(operand)
                return -converted if isinstance(converted, int) else (0, "-", converted)
            case ast.BinOp(left=left, op=symbol, right=right):
                return (convert(left), SYMBOLS[type(symbol)], convert(right))
        raise AssertionError(ast.dump(node))

    return convert(ast.parse(text.strip(), mode="eval").body)


def written(tree):
    return str(tree) if isinstance(tree, int) else f"({written(tree[0])}{tree[1]}{written(tree[2])})"


def gold(tree, first_label=1):
    """Prompt and response of a tree, written recursively from the specification."""
    labels = itertools.count(first_label)
    steps = []

    def walk(node):  # -> ([(label of the owner, token)], label, value)
        if isinstance(node, int):
            return list(str(node)), None, node
        (left, left_label, left_value), (right, right_label, right_value) = walk(node[0]), walk(node[2])
        label = next(labels)
        value = eval(f"({left_value}){node[1]}({right_value})")
        refs = "".join(f"<ref:{child}>" for child in (left_label, right_label) if child is not None)
        steps.append(f"<seg:{label}>{refs}{left_value}{node[1]}{right_value}={value}")
        own = [token if isinstance(token, tuple) else (label, token) for token in ["(", *left, node[1], *right, ")"]]
        return own, label, value

    tokens = walk(tree)[0]
    runs = itertools.groupby(tokens, key=lambda token: token[0])
    prompt = "".join(f"<seg:{owner}>" + "".join(token for _, token in run) for owner, run in runs)
    return f"<bos>{prompt}<solve>", "".join(steps) + "<eos>"


leaves = st.integers(-999, 999)
trees = st.recursive(leaves, lambda t: st.tuples(t, st.sampled_from("+-*"), t), max_leaves=12)
operations = trees.filter(lambda tree: not isinstance(tree, int))


@st.composite
def infix(draw, depth=3):
    """Ordinary infix with spaces, redundant parentheses and minuses: what Python reads as well, but for leading zeros."""
    spaces = st.sampled_from(["", "", " ", "  "])
    kind = draw(st.integers(0, 5)) if depth else 0
    if kind <= 1:
        text = str(draw(st.integers(0, 120)))
    elif kind == 2:
        text = "-" + draw(spaces) + draw(infix(depth=depth - 1))
    elif kind == 3:
        text = "(" + draw(infix(depth=depth - 1)) + ")"
    else:
        text = draw(infix(depth=depth - 1)) + draw(st.sampled_from("+-*")) + draw(infix(depth=depth - 1))
    return draw(spaces) + text + draw(spaces)


# --- parser


@QUICK
@given(infix())
def test_parse_reads_what_python_reads(text):
    expression = parse(text)
    assert expression.text == written(python_tree(text))
    assert expression.value == eval(text)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("3*(4+5)", "(3*(4+5))"),
        ("1-2-3", "((1-2)-3)"),
        ("1+2*3-4", "((1+(2*3))-4)"),
        ("-5", "-5"),
        ("--5", "5"),
        ("-(5)", "-5"),
        ("-0", "0"),
        ("2--3", "(2--3)"),
        ("2*-3", "(2*-3)"),
        ("-2*3", "(-2*3)"),
        ("-(1+2)", "(0-(1+2))"),
        ("-(1+2)*3", "((0-(1+2))*3)"),
        ("4*-(1+2)", "(4*(0-(1+2)))"),
        ("--(1+2)", "(0-(0-(1+2)))"),
        (" ( ( 007 ) ) ", "7"),
    ],
)
def test_parse_conventions(text, canonical):
    assert parse(text).text == canonical
    assert parse(canonical) == parse(text)


@QUICK
@given(trees)
def test_canonical_text_parses_to_itself(tree):
    assert parse(written(tree)).text == written(tree)


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("", 1, 'expected a number or "(", found the end'),
        ("   ", 4, 'expected a number or "(", found the end'),
        ("1+", 3, 'expected a number or "(", found the end'),
        ("(1+)", 4, 'expected a number or "(", found ")"'),
        ("1 + + 2", 5, 'expected a number or "(", found "+"'),
        ("*2", 1, 'expected a number or "(", found "*"'),
        ("()", 2, 'expected a number or "(", found ")"'),
        ("1 2", 3, 'expected an operator (+ - *), found "2"'),
        ("1(2)", 2, 'expected an operator (+ - *), found "("'),
        ("6/2", 2, 'expected an operator (+ - *), found "/"'),
        ("1.5+2", 2, 'expected an operator (+ - *), found "."'),
        ("x+1", 1, 'expected a number or "(", found "x"'),
        ("٣+1", 1, 'expected a number or "(", found "٣"'),
        ("1+\x00", 3, "expected a number or \"(\", found '\\x00'"),
        ("((1+2)", 1, 'found "(" that is never closed'),
        ("1+(2*(3)", 3, 'found "(" that is never closed'),
        ("(1+2))", 6, 'found ")" without "("'),
        ("1+" + "9" * 641, 3, "a number of 641 digits; at most 640 are read"),
    ],
)
def test_parse_errors_point_at_the_column(text, column, problem):
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    assert caught.value.column == column
    assert str(caught.value) == f"column {column}: {problem}"


@QUICK
@given(st.one_of(st.text(), st.text("0123456789+-*() ")))
def test_any_text_is_an_expression_or_an_error_of_one_line(text):
    try:
        expression = parse(text)
    except ExpressionError as error:
        assert 1 <= error.column <= len(text) + 1
        assert "\n" not in str(error)
        assert len(str(error)) < 100
    else:
        assert eval(re.sub(r"\b0+(?=\d)", "", text).strip()) == expression.value


@pytest.mark.parametrize(
    "text",
    [
        "+".join(["1"] * 5001),
        "(" * 5000 + "1" + "+1)" * 5000,
        "(1+" * 5000 + "1" + ")" * 5000,
        "-" * 5000 + "(1+2)" + "*1" * 4000,
        "(" * 20_000 + "1+1" + ")" * 20_000,
        "-(" * 5000 + "1+1" + ")" * 5000,
    ],
    ids=["flat", "left", "right", "minuses", "parentheses", "negations"],
)
def test_depth_does_not_matter(text):
    vocab = Vocab(num_labels=20_000)
    expression = parse(text)
    assert parse(expression.text) == expression
    example = encode(expression, vocab=vocab)
    verdict = verify(expression, example.response_ids, vocab=vocab)
    assert verdict.steps_right and verdict.spans_right and verdict.num_steps == expression.num_ops
    assert hash(expression) == hash(parse(text))


def test_expression_is_a_frozen_postfix_tuple():
    expression = parse(EXAMPLE)
    assert list(expression) == [51, 75, "+", 95, 3, "*", "-"]
    assert (expression.num_ops, expression.value, str(expression)) == (3, -159, EXAMPLE)
    assert {expression, parse(" (51+75) - 95*3")} == {expression}
    with pytest.raises(AttributeError):
        expression.postfix = ()


@pytest.mark.parametrize("postfix", [(), (1, 2), (1, "+"), (1, 2, "/"), (True, 1, "+"), ("+",), (1, 2, "+", "+")])
def test_expression_refuses_what_is_not_postfix(postfix):
    with pytest.raises(ValueError, match="postfix expression"):
        Expression(postfix)


# --- oracle


def test_the_specification_s_example_token_for_token():
    vocab = Vocab()
    example = encode(EXAMPLE)
    assert example.token_ids.dtype == np.int32
    assert vocab.decode(example.prompt_ids) == EXAMPLE_PROMPT
    assert vocab.decode(example.response_ids) == EXAMPLE_RESPONSE
    assert example.token_ids[example.prompt_tokens - 1] == vocab.solve_id
    assert (example.first_label, example.labelling, example.expression) == (1, "tree", parse(EXAMPLE))


@QUICK
@given(operations, st.integers(1, 500))
def test_encode_writes_what_the_specification_says(tree, first_label):
    vocab = Vocab()
    example = encode(written(tree), vocab=vocab, first_label=first_label)
    prompt, response = gold(tree, first_label)
    assert vocab.decode(example.prompt_ids) == prompt
    assert vocab.decode(example.response_ids) == response
    assert np.array_equal(encode_prompt(written(tree), vocab=vocab, first_label=first_label), example.prompt_ids)


@QUICK
@given(operations)
def test_untagged_prompts_have_the_same_response(tree):
    vocab = Vocab()
    example = encode(written(tree), labelling="none")
    assert vocab.decode(example.token_ids) == f"<bos>{written(tree)}<solve>{gold(tree)[1]}"
    assert np.array_equal(encode_prompt(written(tree), labelling="none"), example.prompt_ids)
    assert verify(written(tree), example.response_ids, labelling="none").steps_right


@QUICK
@given(operations, st.integers(1, 500), st.sampled_from(["tree", "none"]))
def test_a_prompt_may_name_the_first_step(tree, first_label, labelling):
    """`<ref:k>` right before `<solve>`, k as in the response's first token; nothing else changes."""
    options = {"labelling": labelling, "first_label": first_label}
    silent, naming = (encode(written(tree), names_first_step=names, **options) for names in (False, True))
    vocab = Vocab()
    prompt, solve = vocab.decode(silent.prompt_ids).rsplit("<", 1)
    response = vocab.decode(silent.response_ids)
    first_step = re.match(r"<seg:(\d+)>", response)[1]
    assert vocab.decode(naming.prompt_ids) == f"{prompt}<ref:{first_step}><{solve}"
    assert vocab.decode(naming.response_ids) == response
    assert np.array_equal(encode_prompt(written(tree), names_first_step=True, **options), naming.prompt_ids)


PLAIN = "51+75=126<solve>95*3=285<solve>126-285=-159<eos>"


@QUICK
@given(operations)
def test_plain_text_has_the_same_steps_without_span_tokens(tree):
    vocab = Vocab()
    example = encode(written(tree), labelling="plain", first_label=7, names_first_step=True)
    steps = re.split(r"<seg:\d+>", re.sub(r"<ref:\d+>", "", gold(tree)[1]))[1:]
    assert vocab.decode(example.token_ids) == f"<bos>{written(tree)}<solve>{'<solve>'.join(steps)}"
    assert np.array_equal(encode_prompt(written(tree), labelling="plain"), example.prompt_ids)
    verdict = verify(written(tree), example.response_ids, labelling="plain")
    assert verdict.steps_right and verdict.spans_right and verdict.answer_right and verdict.answer == eval(written(tree))
    assert verdict.num_steps == example.expression.num_ops and answer(example.response_ids) == str(verdict.answer)


@pytest.mark.parametrize(
    ("response", "expected"),
    [  # (answer, answer_right, steps_right, spans_right, first_wrong_step, num_steps)
        (PLAIN, (-159, True, True, True, None, 3)),
        (PLAIN.replace("126<", "127<"), (-159, True, False, True, 0, 3)),
        (PLAIN.replace("95*3", "3*95"), (-159, True, False, True, 1, 3)),
        (PLAIN.removesuffix("<eos>"), (-159, True, False, True, None, 3)),
        (PLAIN.replace("<eos>", "<solve><eos>"), (None, False, False, False, 3, 4)),
        (PLAIN.replace("126<solve>", "126"), (-159, True, False, False, 0, 2)),
        ("<solve>" + PLAIN, (-159, True, False, False, 0, 4)),
        (EXAMPLE_RESPONSE, (-159, True, False, False, 0, 1)),
        ("<eos>", (None, False, False, False, 0, 0)),
        ("", (None, False, False, False, 0, 0)),
    ],
)
def test_verdicts_on_plain_text(response, expected):
    verdict = verify(EXAMPLE, response, labelling="plain")
    assert dataclasses.astuple(verdict)[:-1] == expected
    assert "\n" not in verdict.message and "None" not in verdict.message


@pytest.mark.parametrize("function", [encode, encode_prompt, lambda *a, **k: verify(*a, response="", **k)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expression": "7"}, 'nothing to evaluate: "7" has no operator'),
        ({"expression": "1+"}, "column 3: expected a number"),
        ({"first_label": 0}, "first_label is 0; allowed: 1 and above"),
        ({"first_label": 510}, "3 operators; allowed: at most 2 (from 510 on there are 2 labels for their steps)"),
        ({"vocab": Vocab(3)}, "3 operators; allowed: at most 2 (from 1 on there are 2 labels for their steps)"),
        ({"labelling": "flat"}, "labelling is 'flat'; allowed: tree, none, plain"),
    ],
)
def test_what_cannot_be_encoded(function, arguments, message):
    expression = arguments.get("expression", EXAMPLE)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        function(expression, **{name: value for name, value in arguments.items() if name != "expression"})
    assert "\n" not in str(caught.value)


def test_labels_that_just_fit():
    assert encode(EXAMPLE, first_label=509).token_ids.max() == Vocab().ref_base + 510
    assert encode(EXAMPLE, vocab=Vocab(4)).expression.num_ops == 3


def test_values_of_any_size_up_to_the_limit():
    assert verify("999*999*999", encode("999*999*999").response_ids).answer == 999**3
    power = "*".join(["9" * 320] * 2)
    assert verify(power, encode(power).response_ids).answer_right
    for function in (encode, lambda text: verify(text, "1"), lambda text: parse(text).value):
        with pytest.raises(ValueError, match=r"^operation 2 has a value of more than 640 digits$"):
            function(power + "*9")


# --- verifier


def test_verdict_of_the_gold_response():
    verdict = verify(EXAMPLE, EXAMPLE_RESPONSE)
    assert verdict.answer == -159
    assert verdict.answer_right and verdict.steps_right and verdict.spans_right
    assert (verdict.first_wrong_step, verdict.num_steps) == (None, 3)
    assert verdict.message == "all 3 steps and spans are right"
    assert verify("1+2", "<seg:1>1+2=3<eos>").message == "the step and its span are right"


@pytest.mark.parametrize(
    ("response", "expected"),
    [  # (answer, answer_right, steps_right, spans_right, first_wrong_step, num_steps)
        (EXAMPLE_RESPONSE.replace("126<", "127<"), (-159, True, False, True, 0, 3)),
        (EXAMPLE_RESPONSE.replace("95*3=285", "95+3=98"), (-159, True, False, True, 1, 3)),
        (EXAMPLE_RESPONSE.replace("51+75", "75+51"), (-159, True, False, True, 0, 3)),
        (EXAMPLE_RESPONSE.replace("=-159", "=-158"), (-158, False, False, True, 2, 3)),
        (EXAMPLE_RESPONSE.replace("=-159", ""), (None, False, False, True, 2, 3)),
        (EXAMPLE_RESPONSE.replace("=-159", "=-0159"), (-159, True, False, True, 2, 3)),
        (EXAMPLE_RESPONSE.replace("<seg:2>", "<seg:4>"), (-159, True, False, True, 1, 3)),
        (EXAMPLE_RESPONSE.replace("<seg:2>", "<seg:512>"), (-159, True, False, False, 0, 2)),
        (EXAMPLE_RESPONSE.replace("<ref:1>", ""), (-159, True, True, False, None, 3)),
        (EXAMPLE_RESPONSE.replace("<ref:1>", "<ref:1><ref:3>"), (-159, True, True, False, None, 3)),
        (EXAMPLE_RESPONSE.replace("<seg:1>", "<seg:1><ref:2>"), (-159, True, True, False, None, 3)),
        (EXAMPLE_RESPONSE.replace("<ref:1>", "<ref:2><ref:1>"), (-159, True, True, True, None, 3)),
        (EXAMPLE_RESPONSE.replace("<ref:2>126-", "126<ref:2>-"), (-159, True, True, True, None, 3)),
        (EXAMPLE_RESPONSE.replace("<eos>", ""), (-159, True, False, True, None, 3)),
        (EXAMPLE_RESPONSE.replace("<eos>", "<pad><pad>"), (-159, True, False, True, None, 3)),
        (EXAMPLE_RESPONSE.replace("<eos>", "<pad><eos>"), (None, False, False, True, 2, 3)),
        (EXAMPLE_RESPONSE + "<pad><pad>", (-159, True, True, True, None, 3)),
        (EXAMPLE_RESPONSE + "<seg:9>garbage", (-159, True, True, True, None, 3)),
        (EXAMPLE_RESPONSE.replace("<eos>", "<solve><eos>"), (None, False, False, True, 2, 3)),
        ("<ref:1>" + EXAMPLE_RESPONSE, (-159, True, False, True, 0, 3)),
        ("5" + EXAMPLE_RESPONSE, (-159, True, False, True, 0, 3)),
        ("<solve>" + EXAMPLE_RESPONSE, (-159, True, False, True, 0, 3)),
        (EXAMPLE_RESPONSE.replace("<eos>", "<seg:4><ref:3>-159+0=-159<eos>"), (-159, True, False, False, 3, 4)),
        ("<seg:1>51+75=126<eos>", (126, False, False, False, 1, 1)),
        ("=-159<eos>", (-159, True, False, False, 0, 0)),
        ("", (None, False, False, False, 0, 0)),
        ("<eos>" + EXAMPLE_RESPONSE, (None, False, False, False, 0, 0)),
        ("<seg:1>" + "9" * 10_000 + "=" + "9" * 10_000, (None, False, False, False, 0, 1)),
    ],
)
def test_verdicts(response, expected):
    verdict = verify(EXAMPLE, response)
    found = (verdict.answer, verdict.answer_right, verdict.steps_right, verdict.spans_right, verdict.first_wrong_step, verdict.num_steps)
    assert found == expected
    assert "\n" not in verdict.message and len(verdict.message) < 160
    if verdict.first_wrong_step is not None:
        assert verdict.message.startswith(f"step {verdict.first_wrong_step + 1}: ")


def test_ids_outside_the_vocabulary_are_wrong_not_errors():
    ids = encode(EXAMPLE).response_ids.tolist()
    for stranger in (-1, 1044, 2**70, -(2**70)):
        verdict = verify(EXAMPLE, [*ids[:2], stranger, *ids[2:]])
        assert verdict.first_wrong_step == 0 and verdict.answer_right
    assert verify(EXAMPLE, []).num_steps == 0
    assert verify(EXAMPLE, np.array([], np.int32)).answer is None


@QUICK
@given(operations, st.data())
def test_every_single_token_mutation_is_caught_in_its_step(tree, data):
    vocab = Vocab(num_labels=16)
    text = written(tree)
    ids = encode(text, vocab=vocab).response_ids.tolist()
    place = data.draw(st.integers(0, len(ids) - 2), label="place")  # not <eos>: what follows it does not count
    kind = data.draw(st.sampled_from(["replace", "delete", "insert"]), label="kind")
    token = data.draw(st.integers(0, vocab.size - 1).filter(lambda i: i not in (ids[place], vocab.eos_id)), label="token")
    mutated = ids[:place] + ([] if kind == "delete" else [token]) + ids[place + (kind != "insert") :]

    def is_seg(i):
        return vocab.seg_base <= i < vocab.ref_base

    def without_refs(tokens):
        """But for one that stands before the first step, where it belongs to none."""
        return tokens[:1] + [i for i in tokens[1:] if i < vocab.ref_base]

    def steps_of(tokens):
        """Each step's tokens but its refs, the stray ones before the first step first."""
        steps = [[]]
        for i in without_refs(tokens):
            if is_seg(i):
                steps.append([])
            steps[-1].append(i)
        return steps

    verdict = verify(text, mutated, vocab=vocab)
    if mutated == ids:  # an insertion or deletion beside an equal token
        assert verdict.steps_right and verdict.spans_right
    elif without_refs(mutated) == without_refs(ids):
        named = [re.findall(r"<ref:\d+>", step) for step in vocab.decode(mutated).split("<seg:")]
        gold_named = [re.findall(r"<ref:\d+>", step) for step in vocab.decode(ids).split("<seg:")]
        assert verdict.steps_right
        assert verdict.spans_right == (list(map(set, named)) == list(map(set, gold_named)))
    else:
        stray, *rest = steps_of(mutated)
        _, *gold_steps = steps_of(ids)
        pairs = itertools.zip_longest(rest, gold_steps)
        first = 0 if stray else next(i for i, (found, right) in enumerate(pairs) if found != right)
        assert not verdict.steps_right
        assert verdict.first_wrong_step == first


token_soup = st.lists(st.sampled_from(["<eos>", "<pad>", "<seg:1>", "<seg:2>", "<seg:3>", "<ref:1>", "<ref:2>", *"0123456789+-*="]))
good_parts = st.sampled_from(["<seg:1>51+75=126", "<seg:2>95*3=285", "<seg:3><ref:1><ref:2>126-285=-159", "<eos>", "<ref:1>", "1", "<pad>"])


@QUICK
@given(st.one_of(st.text(), st.lists(st.integers()), token_soup.map("".join), st.lists(good_parts, max_size=6).map("".join)))
def test_no_response_raises_and_only_the_gold_steps_are_right(response):
    verdict = verify(EXAMPLE, response)
    assert "\n" not in verdict.message
    if verdict.steps_right:
        steps, eos, _ = response.partition("<eos>")
        assert eos and re.sub(r"<ref:\d+>|\s", "", steps) == re.sub("<ref:.>|<eos>", "", EXAMPLE_RESPONSE)
    assert verdict.steps_right <= verdict.answer_right
    assert (verdict.first_wrong_step is None) >= verdict.steps_right
    assert verdict.answer == (None if answer(response) is None else int(answer(response)))


@QUICK
@given(operations, st.integers(1, 400))
def test_gold_responses_are_right(tree, first_label):
    example = encode(written(tree), first_label=first_label)
    verdict = verify(example.expression, example.response_ids, first_label=first_label)
    assert verdict.steps_right and verdict.spans_right and verdict.answer_right
    assert verdict.answer == eval(written(tree))
    assert answer(example.response_ids) == str(verdict.answer)
    assert not verify(example.expression, example.response_ids, first_label=first_label + 1).steps_right


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (EXAMPLE_RESPONSE, "-159"),
        ("<seg:1>1+1=2", "2"),
        ("<seg:1>1+1=2<seg:2>3+", None),
        ("<seg:1>1+1=", None),
        ("<seg:1>1+1=-", None),
        ("<seg:1>1+1=2+3", None),
        ("1+1=2<eos>=3", "2"),
        ("<seg:1>1+1=<ref:1>2<eos>", "2"),
        ("<seg:1>1+1=2<bos>", None),
        ("12", None),
        ("", None),
    ],
)
def test_answers(response, expected):
    assert answer(response) == expected
    assert answer(Vocab().encode(response)) == expected


# --- task


def test_task_round_trip_and_methods():
    task = ArithmeticTask(Vocab(64), "none")
    assert ArithmeticTask.from_json(json.loads(json.dumps(task.to_json()))) == task
    assert task.name == "arithmetic"
    assert task.decode(task.encode_prompt("1+2")) == "<bos>(1+2)<solve>"
    response = Vocab(64).encode("<seg:1>1+2=3<eos>")
    assert task.answer(response) == "3"
    assert task.verify("1+2", response).steps_right


@pytest.mark.parametrize("labelling", ["tree", "none", "plain"])
@pytest.mark.parametrize("names_first_step", [False, True])
def test_a_task_writes_what_its_corpus_does(labelling, names_first_step):
    settings = {"min_ops": 2, "max_ops": 5, "labelling": labelling, "num_labels": 64, "names_first_step": names_first_step}
    corpus = Corpus(**settings, label_jumps=0)
    task = ArithmeticTask.from_json(json.loads(json.dumps(ArithmeticTask.of(corpus).to_json())))
    assert task == ArithmeticTask.of(corpus) and task.corpus(min_ops=2, max_ops=5) == Corpus(**settings)
    for example in itertools.islice(stream(corpus, seed=0), 20):
        text, first_label = example.expression.text, example.first_label
        again = encode(text, vocab=corpus.vocab, labelling=labelling, names_first_step=names_first_step, first_label=first_label)
        assert np.array_equal(example.token_ids, again.token_ids)
        assert len(task.encode_prompt(text)) == example.prompt_tokens and len(task.encode(text).response_ids) == len(example.response_ids)
        assert task.verify(text, task.encode(text).response_ids).steps_right
    assert task.step_ids & set(example.prompt_ids.tolist()) and task.step_ids & set(example.response_ids.tolist())


LIMITS = {  # what it is -> (expression, settings, how many warnings, what they say)
    "all that a model knows": ("((51+75)-(95*3))", {}, []),
    "the largest operand, negative": ("-99+1", {}, []),
    "the largest value": ("37*27", {}, []),
    "one more": ("37*27+1", {}, ["step is 1000, .* values up to 999"]),
    "less than the least": ("0-37*27-1", {}, ["step is 1000"]),
    "only on the way": ("50*20-10", {}, ["step is 1000"]),
    "an operand": ("100-1", {}, ["^100 is beyond .* up to 2 digits"]),
    "a negative operand": ("1-(-100)", {}, ["^100 is beyond"]),
    "both": ("123456*7", {}, ["^123456 is", "step is 864192"]),
    "operands of a larger corpus": ("123*7", {"max_digits": 3, "max_value": 9999}, []),
    "digits that nobody counts": ("1" * 60 + "-1", {"max_value": 10**100}, [r"^111111111111\.\.\. \(60 digits\) is beyond"]),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_beyond_the_corpus_is_said(name):
    text, settings, expected = LIMITS[name]
    found = ArithmeticTask(**settings).warnings(text)
    assert len(found) == len(expected) and all(re.search(part, line) for part, line in zip(expected, found)), found


def test_a_corpus_stays_within_the_limits_of_its_task():
    settings = Corpus(max_digits=3, max_value=5000, max_ops=5)
    task = ArithmeticTask.of(settings)
    assert task == ArithmeticTask.from_json(json.loads(json.dumps(task.to_json())))
    drawn = [example.expression.text for example in itertools.islice(stream(settings, seed=0), 100)]
    assert not any(task.warnings(text) for text in drawn) and any(ArithmeticTask().warnings(text) for text in drawn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "news"}, "task is 'news'"),
        ({"version": 99}, "version is 99"),
        ({"labelling": "some"}, "labelling is 'some'"),
        ({"labelling": ["tree"]}, "labelling is"),
        ({"names_first_step": 1}, "names_first_step is 1; allowed: true, false"),
        ({"max_digits": 0}, "max_digits is 0"),
        ({"max_value": 9.5}, "max_value is 9.5; allowed: whole numbers"),
        ({"vocab": None}, "expected a JSON object"),
        ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_task_json_is_strict(change, message):
    with pytest.raises(ValueError, match=message):
        ArithmeticTask.from_json({**ArithmeticTask().to_json(), **change})
