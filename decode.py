"""Decode with a trained span model: one prompt step by step, many to see how often it is right, or to see how fast.

python decode.py generate checkpoints/arithmetic-tiny "((51+75)-(95*3))"
python decode.py eval checkpoints/arithmetic-tiny --num-examples 1000
python decode.py bench --shape llama2-7b --batch-size 1,32 --context 2048
python decode.py serve checkpoints/arithmetic-tiny --port 8000
"""

if __name__ == "__main__":
    import data.interrupts  # noqa: F401  # before what takes seconds

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg
from tyro.extras import literal_type_from_choices

from benchmarks.sweep import Bench
from data import commandline, examples, rows
from data.errors import check_range
from data.tasks import TASKS
from selfspan_jax import evaluation, files
from selfspan_jax.attention.policies import POLICIES, policy_help
from selfspan_jax.attention.selectors import SELECTORS
from selfspan_jax.commands import running
from selfspan_jax.config import WORKING_SET_TOKENS, Dtype, KvMemory, Sampling, ServerConfig, Weights
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM
from selfspan_jax.neighbours.rebalanced import rebalanced
from selfspan_jax.viewing import text
from selfspan_jax.viewing.output import Output

PolicyName = literal_type_from_choices(tuple(POLICIES))
PrefillName = literal_type_from_choices(tuple(SELECTORS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")]
    """Directory of a finished model or an adapter, a Hugging Face directory or an id of its Hub (owner/name), or a GGUF file."""
    base: Path | None = None
    """For an adapter: the model that it was trained on, named in the same ways."""
    task: str | None = None
    """Read prompts as this task does, where a model knows several: papers, verdicts, stories, documents. Default: the model's own."""
    dtype: Dtype | None = None
    """What activations and products are computed in. Default: as the model was trained; a pretrained one that is stored so, in f32."""
    mesh: str | None = None
    """Devices, as in data=2,tensor=4: data divides sequences, tensor kv heads, context the rows of each sequence. Default: one device."""
    kv_memory: KvMemory = "device"
    """Where keys and values of prompts lie: host is for contexts that the GPU cannot hold."""
    working_set_tokens: int = WORKING_SET_TOKENS
    """With --kv-memory host: tokens of each prompt whose keys and values are on the GPU."""
    attention: Annotated[PolicyName | None, arg(help=f"{policy_help()}. Default: as it was trained.")] = None
    rebalance: float | None = None
    """Dense attention, whatever the model was trained with; later layers weigh so much more what the first attends to (2403.14932: 0.2)."""
    compile_cache: bool = True
    """Keep compiled programs for the next call, in ~/.cache/selfspan/compiled or JAX_COMPILATION_CACHE_DIR."""

    def load(self, **options: Any) -> SpanLM:
        if self.compile_cache:
            files.keep_programs()
        with commandline.status("loading the model ..."):
            return SpanLM.load(self.checkpoint, TASKS, **{name: getattr(self, name) for name in _LOADED if hasattr(self, name)} | options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Model):
    """Decode a response to an expression, an article or a text, or to each of a file; show each step with what it read."""

    prompt: Annotated[Positional[str | None], arg(metavar="[PROMPT]")] = None
    """An expression: whole numbers, + - * and parentheses; or text."""
    article: Path | None = None
    """A text file in place of the prompt: an article, a report, a story with its questions; - is standard input."""
    prompts: Path | None = None
    """A file of prompts in place of the prompt: one a line, or .jsonl: objects with a "prompt" each; - is standard input, one a line."""
    batch_size: int = 32
    """Prompts of a file that are decoded together."""
    num_samples: int | None = None
    """Responses to each prompt, drawn at a temperature above 0."""
    chat: bool = False
    """Write the prompt as a user's message, by the chat template of a pretrained model's tokenizer."""
    prefill: PrefillName = "dense"
    """How causal prompts of 2,048 tokens and more are read: all of them, or for each head what sampled queries or mean keys point at."""
    max_new_tokens: int | None = None
    """Stop after so many tokens; by default what the model's context leaves."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """End a response before this text; may be given several times. Span tokens are text too, as written: "<seg:3>"."""
    sampling: OmitArgPrefixes[Sampling] = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    """Of the draws: 0 to 2**63 - 1."""
    weights: Weights = "bf16"
    """bf16: the model's own compute dtype; int8: half the bytes of bfloat16."""
    stream: bool = False
    """Print tokens as they are decoded."""
    json: Path | None = None
    """Write the responses, warnings, verdicts, steps and what each token attended to into this file; - is standard output."""
    html: Path | None = None
    """Write a page that shows what each step read into this file; - is standard output."""
    plot: Path | None = None
    """Draw what the response read into this file (PNG, SVG or PDF); - is standard output."""

    def __post_init__(self):
        if sum(given is not None for given in (self.prompt, self.article, self.prompts)) != 1:
            raise UserError("give exactly one of these: a prompt, --article, --prompts")
        several = [name for name in ("prompts", "num_samples") if getattr(self, name) is not None]
        if several and (single := [name for name in ("stream", "html", "plot") if getattr(self, name)]):
            raise UserError(f"{_options(single)} is for one response: leave out {_options(several)}")
        if self.num_samples and not self.sampling.temperature:
            raise UserError("num_samples is for a temperature above 0: at 0 all samples are the same")

    def run(self) -> None:
        named = rows.read_prompts(self.prompts) if self.prompts else {}
        prompts: Any = [*named.values()] or (files.read_text(self.article) if self.article else str(self.prompt))
        lm = self.load()
        options = {k: getattr(self, k) for k in ("prefill", "max_new_tokens", "chat", "seed", "stop")} | vars(self.sampling)
        options["attention"] = rebalanced(self.attention, self.rebalance)
        several, kept = self.prompts or self.num_samples, dict[str, Any]()
        told = lm.early_warnings(prompts, prompt_names=[*named], **options)
        print(text.for_terminal("".join(f"{line}\n" for line in text.warning_lines(told))), end="", flush=True)
        if self.stream and isinstance(prompts, str):
            stream = lm.stream(prompts, **options)
            with commandline.status("compiling and decoding ..."):
                first = next(stream, "")
            for piece in itertools.chain([first], stream):
                print(piece, end="", flush=True)
            print()
            outs = [stream.output]
        else:
            with commandline.status("compiling and decoding ..."):
                found = lm.generate(prompts, num_samples=self.num_samples, batch_size=self.batch_size, prompt_names=[*named], **options)
            outs = [found] if isinstance(found, Output) else [out for own in found for out in ([own] if isinstance(own, Output) else own)]
        if self.prefill != "dense":
            some = prompts if isinstance(prompts, str) else prompts[: self.batch_size]
            kept = {"selector": self.prefill, **lm.measure_prefill(some, self.prefill, attention=self.attention, chat=self.chat)}
        responses = {"responses": [out.to_json() for out in outs]} if several else outs[0].to_json()
        written = {"checkpoint": files.model_name(self.checkpoint), **responses, **({"prefill": kept} if kept else {})}
        with contextlib.ExitStack() as results:  # each of them, whatever becomes of the others
            if self.plot:
                results.callback(lambda file: files.write_picture(file, outs[0].plot()), self.plot)
            if self.html:
                results.callback(lambda file: files.write_text(file, outs[0].to_html()), self.html)
            if self.json:
                results.callback(files.write_json, self.json, written)
            table = text.response_tables(outs, told=told) if several else text.response_table(outs[0], told=told)
            print(text.for_terminal(f"{table}\n{text.prefill_line(kept)}" if kept else table), flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Model):
    """Decode fresh examples of the task's test split, score the responses, and count right answers per second."""

    num_examples: int = 1000
    """Examples; expressions: of each number of operators that --ops has."""
    ops: Annotated[tuple[int, ...], commandline.commas(int)] = ()
    """Expressions: operators of each; several with commas are decoded and timed one after the other."""
    min_ops: int | None = None
    """Expressions without --ops: fewest operators, by default 2; their number is uniform between the bounds."""
    max_ops: int | None = None
    """Expressions without --ops: most operators, by default 12."""
    prefill: PrefillName = "dense"
    """How causal prompts of 2,048 tokens and more are read, as for generate."""
    batch_size: Annotated[tuple[int, ...], commandline.commas(int)] = (128,)
    """Sequences decoded together; of several with commas, the fastest counts."""
    passes: int = 1
    """Times that each batch is decoded; the median counts. The first time has what happens once, such as loading kernels."""
    seed: int | None = None
    """Of fresh examples, by default 1."""
    data: Path | None = None
    """A corpus directory that python -m data wrote; by default fresh examples."""
    split: Literal["train", "validation", "test"] | None = None
    """Of a corpus directory that was divided; by default test, else validation. What is neither may have been trained on."""
    sources: Literal["model", "order", "gold", "bm25", "random", "recent"] = "model"
    """What steps name: what the model chooses (order: but labels and questions); the gold sources, or as many of BM25's, drawn or last."""
    constrained: bool = False
    """Tools: let each step begin with a service of the catalogue and one of its methods."""
    json: Path | None = None
    """Write the scores, in all and by group and set, into this file; - is standard output."""

    def __post_init__(self):
        check_range(self, "num_examples", "batch_size", "passes", low=1)
        check_range(self, *([] if self.seed is None else ["seed"]), low=0)
        if self.data is None and self.split:
            raise UserError("--split is of a corpus directory: give one with --data")
        if self.data and (given := [name for name in _FRESH if getattr(self, name) not in (None, ())]):
            raise UserError(f"{_options(given)} is for fresh examples, not for those of --data {self.data}")
        if self.ops and (self.min_ops, self.max_ops) != (None, None):
            raise UserError("--ops says how many operators there are: leave out --min-ops and --max-ops")

    def run(self) -> None:
        lm = self.load()
        lm.task, sets, drawn = self.examples(lm.task)
        text.warn(drawn.get("warnings", ()))  # and again above the table
        options: dict[str, Any] = {name: getattr(self, name) for name in ("prefill", "passes", "sources", "constrained")}
        attention = rebalanced(self.attention, self.rebalance)
        found = evaluation.evaluate_all(lm, sets, batch_sizes=self.batch_size, progress=True, attention=attention, **options)
        settings = {"checkpoint": files.model_name(self.checkpoint), "mesh": self.mesh, "passes": self.passes, **drawn}
        settings |= {k: v for k in ("dtype", "kv_memory", "rebalance", *options) if (v := getattr(self, k)) not in _USUAL}
        settings |= {"working_set_tokens": self.working_set_tokens} if self.kv_memory == "host" else {}
        results = evaluation.report(lm, found, settings)
        with contextlib.ExitStack() as also:  # where nobody reads the table any more, too
            if self.json:
                also.callback(files.write_json, self.json, results)
            print(text.evaluation_table(results, lm.task), flush=True)

    def examples(self, task: Any) -> tuple[Any, dict[str, list[Any]], dict[str, Any]]:
        """Return the task that scores examples, fresh ones or a corpus directory's, these as sets by name, and how they were drawn."""
        if not hasattr(task, "held_out"):
            raise UserError(f"{self.checkpoint}: its task has no examples, so there is nothing to score")
        if self.data:
            return examples.stored(self.data, task, TASKS, self.num_examples, self.split)
        given = {name: value for name in _FRESH if (value := getattr(self, name)) not in (None, ())}
        return task, *examples.held_out(task, self.num_examples, **given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(Model):
    """Serve a model over HTTP: OpenAI's API, metrics, and a page on which steps appear with what they read."""

    server: OmitArgPrefixes[ServerConfig] = dataclasses.field(default_factory=ServerConfig)
    weights: Weights = "bf16"
    """As for generate."""

    def run(self) -> None:
        from selfspan_jax.serving import server  # the packages that speak HTTP are imported where they are needed

        server.serve(self.load, files.model_name(self.checkpoint), self.server, self.mesh, rebalanced(self.attention, self.rebalance))


_LOADED = ("base", "task", "dtype", "weights", "mesh", "kv_memory", "working_set_tokens")
_USUAL = (None, "device", "dense", "model", False)
_FRESH = ("ops", "min_ops", "max_ops", "seed")


def _options(names: list[str]) -> str:
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)


COMMANDS: dict[str, Any] = {"generate": Generate, "eval": Eval, "bench": Bench, "serve": Serve}


def main() -> None:
    commandline.run_command(COMMANDS, description=__doc__, user_error=UserError, within=running)


if __name__ == "__main__":
    main()
