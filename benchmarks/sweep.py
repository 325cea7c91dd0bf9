"""Sweep benchmarks of decode steps or prefill over batch sizes, contexts, policies and weights: the `bench` command of decode.py."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import jax
from jax.sharding import Mesh
from tqdm import tqdm
from tyro.conf import Positional, arg

from benchmarks import decoding, prefill, report, tiers
from benchmarks import peers as hf
from benchmarks.decoding import STREAMED_TOKENS, Case, Programs, measure_stream
from benchmarks.prefill import SELECTORS, PrefillCase
from benchmarks.shapes import Shape, ShapeName, named_shape
from benchmarks.tiers import TieredCase
from benchmarks.timing import header_line, report_header
from benchmarks.workloads import (
    REFS_PER_STEP,
    WorkloadName,
    arithmetic_prompts,
    arithmetic_tokens,
    check_labels,
    prompt_operators,
    segment_prompts,
    segment_tokens,
)
from data import arithmetic, commandline
from data.errors import check_range
from data.tasks import TASKS
from data.vocab import DEFAULT_VOCAB, Vocab
from selfspan_jax import files
from selfspan_jax.attention.policies import POLICIES, get_policy, policy_help
from selfspan_jax.config import WORKING_SET_TOKENS, KvMemory, ModelConfig, Weights, check_kv_memory
from selfspan_jax.errors import UserError
from selfspan_jax.lm import SpanLM
from selfspan_jax.model import Decoder
from selfspan_jax.neighbours.memory import check_policy
from selfspan_jax.neighbours.query_driven import check_keys
from selfspan_jax.parallel.compiling import compile_all
from selfspan_jax.parallel.engine import check_context_policy, make_engine
from selfspan_jax.parallel.memory import DoesNotFit, attempt
from selfspan_jax.parallel.mesh import check_batch, check_decoding, describe, make_mesh
from selfspan_jax.spans import SpanVocab
from selfspan_jax.training.metrics import bf16_peak
from selfspan_jax.weights.huggingface import to_hugging_face

DEFAULT_CONTEXT = 2048
_USUAL = ("span", "dense", "window")  # of the policies
AnyCase = Case | PrefillCase
TokensOf = Callable[[AnyCase], Any]  # whole sequences [B, T], or prompts with their lengths


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time decode steps against the bytes that they must move, or prefill: of a checkpoint, or of a shape with random weights.

    Whole sequences are drawn and replayed, so that automaton and mask do what they do for a trained model of that size.
    """

    checkpoint: Annotated[Positional[Path | None], arg(metavar="[CHECKPOINT]")] = None
    """Directory of a finished model or an adapter, or a pretrained model as for generate; or give --shape."""
    base: Path | None = None
    """For an adapter: the model that it was trained on."""
    shape: ShapeName | None = None
    """A model's sizes, filled with random weights."""
    prefill: bool = False
    """Time how long prompts of --context tokens take to the first token, against the bf16 peak, instead of decode steps."""
    batch_size: Annotated[tuple[int, ...], commandline.commas(int)] = (1, 8, 32)
    """Sequences decoded together; several with commas."""
    context: Annotated[tuple[int, ...], commandline.commas(int)] = ()
    """Tokens of context, the mean over the timed steps, or of the prompts; several with commas.
    Default: 2048, or the room of the checkpoint."""
    attention: Annotated[tuple[str, ...], commandline.commas(*POLICIES), arg(help=f"{policy_help()}; several with commas.")] = _USUAL
    sparse: Annotated[tuple[str, ...], commandline.commas(*SELECTORS)] = ()
    """With --prefill: selectors of sparse prefill, a row of each beside those of --attention."""
    kept: Annotated[tuple[float, ...], commandline.commas(float)] = ()
    """Share of the tiles before the diagonal that --sparse reads, 0 to 1: one for all, or one for each."""
    weights: Annotated[tuple[Weights, ...], commandline.commas(*get_args(Weights))] = ("bf16",)
    """Precision of the weights; both with a comma."""
    kv_memory: Annotated[tuple[KvMemory, ...], commandline.commas(*get_args(KvMemory))] = ("device",)
    """Where keys and values of prompts lie, as for generate; both with a comma."""
    working_set_tokens: int = WORKING_SET_TOKENS
    """With --kv-memory host: tokens of each prompt whose keys and values are on the GPU."""
    steps: int = 64
    """Timed steps of every sequence, an even number."""
    peers: Annotated[tuple[hf.PeerName, ...], commandline.commas(*get_args(hf.PeerName))] = ()
    """Time Hugging Face on the same shape, where PyTorch is installed: steps with a static cache, or with --prefill hf-sdpa;
    several with commas."""
    workload: WorkloadName | None = None
    """arithmetic: expressions and oracle responses; segments: steps that name pieces of a long prompt. Default: by the vocabulary."""
    attended_fraction: float = 0.1
    """Share of its context that a response token of "segments" attends to, on average."""
    named_again: int = 0
    """Of the four pieces that each step of "segments" names, so many are of those that the step before named."""
    random_rows: bool = False
    """Fill the cache, on the device or the host, with random rows instead of reading prompts, which takes minutes where they are long."""
    num_samples: int = 1
    """Above 1, add two rows: so many sequences that share their prompt, and as many that do not."""
    stream_check: bool = False
    """Add a row: the first span configuration streamed, against one loop."""
    profile: bool = False
    """Run every configuration once more under the profiler: the device's time by kind of operation, in --json."""
    mesh: str | None = None
    """Devices, as in data=2,tensor=4 or context=2; by default one. Bytes and roofline are then those of one device."""
    seed: int = 0
    """Seed of weights and tokens."""
    json: Path | None = None
    """Write the rows into this file, after each of them; - is standard output."""
    plot: Path | None = None
    """Draw milliseconds and their rooflines into this file (PNG, SVG or PDF); - is standard output."""

    def __post_init__(self):
        if (self.checkpoint is None) == (self.shape is None):
            raise UserError("give either a checkpoint or --shape")
        if self.base and self.shape:
            raise UserError("--base is for an adapter, not for --shape")
        check_range(self, "batch_size", "context", "num_samples", low=1)
        if self.steps < 2 or self.steps % 2:
            raise UserError(f"steps is {self.steps}; allowed: even numbers, 2 and above")
        if self.kept and not self.sparse:
            raise UserError("--kept is the share that --sparse reads: give --sparse")
        if self.sparse and not self.kept:
            raise UserError("--sparse needs --kept, the share of the tiles that it reads: numbers from 0 to 1")
        if len(self.kept) not in ({1, len(self.sparse)} if self.sparse else {0}) or not all(0 <= share <= 1 for share in self.kept):
            raise UserError(f"kept is {self.kept}; allowed: numbers from 0 to 1, one, or one for each of --sparse {','.join(self.sparse)}")
        if self.prefill:
            self._refuse(_STEPS_ONLY, "decode steps: leave it out with --prefill")
        elif self.sparse:
            raise UserError("--sparse is for prompts: give --prefill")
        elif self.context and min(self.context) <= self.steps:
            raise UserError(f"context is {min(self.context)}; allowed: more than the {self.steps} timed steps")
        if not 0 < self.attended_fraction < 1:
            raise UserError(f"attended_fraction is {self.attended_fraction}; allowed: above 0, below 1")
        check_range(self, "seed", low=0)
        check_range(self, "named_again", low=0, high=REFS_PER_STEP)
        check_range(self, "working_set_tokens", low=2)
        allowed = [name for name in get_args(hf.PeerName) if (name in hf.PREFILL_PEERS) == self.prefill]
        if wrong := [peer for peer in self.peers if peer not in allowed]:
            raise UserError(f"peers has {wrong[0]}; allowed {'with' if self.prefill else 'without'} --prefill: {', '.join(allowed)}")
        check_kv_memory(self.kv_memory, self.working_set_tokens, self.mesh)
        for name in self.attention:
            check_keys(get_policy(name), "kv_memory='host'" if "host" in self.kv_memory else None)
        if self.peers and self.mesh:
            raise UserError(f"mesh is {self.mesh!r}, but peers are measured on one device: give one of --mesh and --peers")

    def _refuse(self, options: Sequence[str], what_for: str) -> None:
        """Raise UserError where one of these options was given, as it is for something else."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in options:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"--{name.replace('_', '-')} is for {what_for}")

    @property
    def cases(self) -> list[AnyCase]:
        """The cases in the order in which they are measured: dense first, because the others are compared with it, int8 last."""
        policies = sorted(dict.fromkeys(self.attention), key=lambda policy: policy != "dense")
        every = itertools.product(self.weights, self.context, self.batch_size, policies)
        if self.prefill:
            cases: list[AnyCase] = [PrefillCase(policy, batch, context, weights) for weights, context, batch, policy in every]
            shares = self.kept * len(self.sparse) if len(self.kept) == 1 else self.kept
            sparse = itertools.product(self.weights, self.context, self.batch_size, zip(self.sparse, shares))
            cases += [PrefillCase("dense", batch, context, weights, *chosen) for weights, context, batch, chosen in sparse]
        else:
            host = functools.partial(TieredCase, random_rows=self.random_rows, working_set_tokens=self.working_set_tokens)
            device = functools.partial(Case, random_rows=self.random_rows)
            kinds: list[Callable[..., Case]] = [host if memory == "host" else device for memory in dict.fromkeys(self.kv_memory)]
            cases = [kind(policy, batch, context, self.steps, weights) for weights, context, batch, policy in every for kind in kinds]
        if self.num_samples > 1:
            apart = Case("span", self.num_samples, max(self.context), self.steps)
            cases += [apart, dataclasses.replace(apart, num_samples=self.num_samples)]
        return sorted(dict.fromkeys(cases), key=lambda case: case.weights == "int8")

    def with_contexts(self, max_context_tokens: int | None) -> Bench:
        """Fill in the context where none was given; None for a model with any room.

        Raises: UserError for a context that the model has no room for.
        """
        if not self.context:
            room = DEFAULT_CONTEXT if max_context_tokens is None else max_context_tokens - self._more_tokens
            return dataclasses.replace(self, context=(min(DEFAULT_CONTEXT, room),))
        longest = max(self.context) + self._more_tokens
        if max_context_tokens is not None and longest > max_context_tokens:
            raise UserError(f"context {max(self.context)} takes {longest} tokens; the model's context is {max_context_tokens}")
        return self

    @property
    def _more_tokens(self) -> int:
        """Tokens that a sequence has beyond its context."""
        return 1 if self.prefill else self.steps // 2

    def make_mesh(self, config: ModelConfig) -> Mesh | None:
        """Make the mesh. Raises UserError for one that does not fit the model, the policies or the batches."""
        mesh = make_mesh(self.mesh) if self.mesh else None
        if mesh is not None:
            check_decoding(config, mesh)
            for name in self.attention:
                check_context_policy(name, mesh.shape["context"])
            for case in self.cases:
                check_batch(case.num_prompts, mesh, "the number of prompts")
        return mesh

    def run(self) -> None:
        """Measure, peers first; print each row as it comes, then the table."""
        if self.peers:  # they share the device with this process
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        bench, shape, model, workload, tokens_of = self._subject()
        mesh = bench.make_mesh(shape.config)
        for name in bench.attention:
            check_policy(name, shape.config)
        # An impossible workload is refused before anything is measured.
        tokens_of(min(bench.cases, key=lambda case: (case.context_tokens, case.batch_size)))
        settings = {
            name: value for name, value in dataclasses.asdict(bench).items() if name not in ("checkpoint", "base", "shape", "json", "plot")
        }
        results = {
            "shape": files.model_name(self.checkpoint) if self.checkpoint else self.shape,
            **report_header(),
            "bf16_peak_flops_per_second": bf16_peak(jax.devices()[0].device_kind),
            "workload": workload,
            "plan": settings,
            "model": dataclasses.asdict(shape.config),
            "vocab_size": shape.vocab_size,
            "rows": [],
        }
        print(header_line(results, describe(mesh)), flush=True)
        with contextlib.ExitStack() as ends:  # each of them, whatever becomes of the others
            ends.callback(files.write_rows, self.json, results, complete=True)
            for row in bench._rows(shape, model, tokens_of, mesh):
                results["versions"] |= row.pop("versions", {})
                report.add_row(results, shape, row)
                files.write_rows(self.json, results, complete=False)
                tqdm.write("  ".join(report.line(row)))
            if self.plot:
                ends.callback(lambda file: files.write_picture(file, report.plot(results), dpi=120), self.plot)
            print(report.table(results["rows"]), flush=True)

    def _subject(self) -> tuple[Bench, Shape, Decoder | None, WorkloadName, TokensOf]:
        """Open what is measured: the options with their contexts, the shape, a checkpoint's model, the workload and its tokens."""
        task, model = arithmetic.ArithmeticTask(), None
        if self.checkpoint:
            lm = SpanLM.load(self.checkpoint, TASKS, base=self.base)
            model, task = lm.model, lm.task if isinstance(lm.task, arithmetic.ArithmeticTask) else task
            shape = Shape(model.config, model.vocab, model.vocab_size)
            bench = self.with_contexts(model.config.max_context_tokens)
        else:
            assert self.shape is not None
            bench, num_labels = self.with_contexts(None), DEFAULT_VOCAB.num_labels
            if self.prefill:
                num_labels = max(num_labels, prompt_operators(max(bench.context)) + 1)
            task = dataclasses.replace(task, vocab=Vocab(num_labels))
            shape = named_shape(self.shape, arithmetic_vocab=self.workload == "arithmetic", num_labels=num_labels)
            shape = shape.with_context(max(bench.context) + self._more_tokens + STREAMED_TOKENS)
        is_arithmetic = shape.vocab == SpanVocab(**task.vocab.span_ids())
        workload = self.workload or ("arithmetic" if is_arithmetic else "segments")
        if workload == "arithmetic" and not is_arithmetic:
            raise UserError("workload is 'arithmetic', but the model has another vocabulary; allowed: segments")
        if self.prefill and workload == "arithmetic":
            check_labels(prompt_operators(max(bench.context)), task.vocab, max(bench.context))
        if workload == "arithmetic":
            self._refuse(_SEGMENTS_ONLY, "--workload segments, and this one is arithmetic: leave it out")

        @functools.lru_cache(maxsize=2)
        def draw(batch_size: int, num_tokens: int):
            size: dict[str, Any] = {"batch_size": batch_size, "num_tokens": num_tokens, "seed": self.seed}
            if not self.prefill:
                size["steps"] = self.steps
                size |= {} if workload == "arithmetic" else {"named_again": self.named_again}
            if workload == "arithmetic":
                return (arithmetic_prompts if self.prefill else arithmetic_tokens)(task, **size)
            return (segment_prompts if self.prefill else segment_tokens)(shape, attended_fraction=self.attended_fraction, **size)

        return bench, shape, model, workload, lambda case: draw(case.batch_size, case.num_tokens)

    def _rows(self, shape: Shape, model: Decoder | None, tokens_of: TokensOf, mesh: Mesh | None) -> Iterator[dict[str, Any]]:
        with contextlib.ExitStack() as stack:
            process = None
            if self.peers and (reason := hf.missing_reason()):
                print(f"peers not run: {reason}", flush=True)
            elif self.peers:
                config = to_hugging_face(shape.config, shape.vocab, shape.vocab_size)
                every = itertools.product(self.peers, self.context, self.batch_size)
                cases = [{"peer": peer, "batch_size": b, "context_tokens": context} for peer, context, b in every]
                cases = cases if self.prefill else [case | {"steps": self.steps} for case in cases]
                process = stack.enter_context(hf.Peers(config, cases, self.seed))
            compiled = compile_cases(shape, self.cases, mesh)  # beside the peers' own compilation
            if process:
                yield from process.rows()
        options: dict[str, Any] = {"seed": self.seed, "stream": self.stream_check, "profile": self.profile}
        yield from sweep(shape, self.cases, tokens_of, model=model, mesh=mesh, compiled=compiled, **options)


# The options that say something of decode steps only, and those of the workload "segments" only.
_STEPS_ONLY = ("steps", "named_again", "random_rows", "num_samples", "stream_check", "kv_memory", "working_set_tokens")
_SEGMENTS_ONLY = ("attended_fraction", "named_again")


def _module_of(case: AnyCase) -> Any:
    """Return the module that compiles and measures a case."""
    return prefill if isinstance(case, PrefillCase) else tiers if isinstance(case, TieredCase) else decoding


def sweep(
    shape: Shape,
    cases: Sequence[AnyCase],
    tokens_of: TokensOf,
    *,
    model: Decoder | None = None,
    seed: int = 0,
    stream: bool = False,
    profile: bool = False,
    mesh: Mesh | None = None,
    compiled: Mapping[AnyCase, Programs | DoesNotFit] | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure cases and yield the row of each; a case that does not fit in memory gets a row that says so.

    Args:
      tokens_of: the workload of a case, [B, case.num_tokens]; of a prefill the prompts.
      model: with its weights in float32 or the compute dtype; by default random weights.
      stream: measure streaming too, on the first case with span attention.
      profile: run each case once more, under the profiler.
      mesh: the devices to decode on, by default one.
      compiled: the result of `compile_cases` for the cases.
    """
    streamed = (
        next((case for case in cases if type(case) is Case and case.attention == "span" and case.weights == "bf16"), None)
        if stream
        else None
    )
    waiting = dict(compile_cases(shape, cases, mesh) if compiled is None else compiled)
    decoder = model.for_decoding() if model is not None else shape.random(seed)
    params, quantized = make_engine(decoder, mesh).params, False

    def measure(case: AnyCase, programs: Programs) -> dict[str, Any]:
        nonlocal decoder, params, quantized
        if case.weights == "int8" and not quantized:
            decoder, quantized = decoder.for_decoding(weights="int8"), True
            params = make_engine(decoder, mesh).params
        return _module_of(case).measure_case(shape, params, case, programs, tokens_of(case), profile=profile)

    for case in tqdm(cases, desc="measure", unit="row", leave=False, disable=None):
        programs = waiting.pop(case)
        row = programs if isinstance(programs, DoesNotFit) else attempt(functools.partial(measure, case, programs))
        settings = dataclasses.asdict(case)
        settings["int8"] = settings.pop("weights") == "int8"
        yield settings | ({"not_run": str(row)} if isinstance(row, DoesNotFit) else row)
        if isinstance(case, Case) and case == streamed:
            yield settings | {"stream": True} | measure_stream(decoder, tokens_of(case), case, mesh)


def compile_cases(shape: Shape, cases: Sequence[AnyCase], mesh: Mesh | None = None) -> dict[AnyCase, Programs | DoesNotFit]:
    """Compile every case, several at once."""

    def compile_one(case: AnyCase) -> Programs | DoesNotFit:
        return attempt(lambda: _module_of(case).compile_case(shape, case, mesh))

    programs = [functools.partial(functools.partial, compile_one, case) for case in cases]
    with tqdm(total=len(cases), desc="compile", unit="case", leave=False, disable=None) as bar:
        return dict(zip(cases, compile_all(programs, lambda done, of: bar.update(done - bar.n))))
