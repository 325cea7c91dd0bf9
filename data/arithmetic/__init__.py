"""Arithmetic expressions: parser, oracle of gold responses, verifier, and endless streams of examples.

The grammar of prompts and responses is the span protocol's, section 5:

    ((51+75)-(95*3))
    <bos><seg:3>(<seg:1>(51+75)<seg:3>-<seg:2>(95*3)<seg:3>)<solve>
    <seg:1>51+75=126<seg:2>95*3=285<seg:3><ref:1><ref:2>126-285=-159<eos>

Two things are ours. `names_first_step` ends the prompt in `<ref:1><solve>`: where the first step's label stands in a prompt
is arbitrary, so a model whose prompt tokens see only their surroundings cannot know it (docs/protocol.md). And
`labelling="plain"` is text without span tokens, for models that are to be compared:

    <bos>((51+75)-(95*3))<solve>51+75=126<solve>95*3=285<solve>126-285=-159<eos>
"""

from data.arithmetic.corpus import Corpus
from data.arithmetic.expressions import Expression, ExpressionError, parse
from data.arithmetic.oracle import encode, encode_prompt
from data.arithmetic.task import ArithmeticTask
from data.arithmetic.verifier import answer, verify

stream = Corpus.stream  # stream(corpus, seed=0)

__all__ = ["ArithmeticTask", "Corpus", "Expression", "ExpressionError", "answer", "encode", "encode_prompt", "parse", "stream", "verify"]
