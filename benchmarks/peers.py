"""Measure Hugging Face on the same shape: its decode step with a static cache (eager, compiled, by `generate`), and its prefill.

    python -m benchmarks.peers JOB      (JOB is JSON; see `Peers`)

A step is one forward pass of the token with a static cache, greedy sampling, fed back. Weights, tokens and cached rows are
random, in the dtype of the shape. "hf-compiled" is `torch.compile(mode="reduce-overhead", fullgraph=True)` of that forward,
"hf-eager" the forward pass as it is, "hf-generate" is `model.generate` with that cache, which compiles by itself where it sees fit,
less the same call for one token. "hf-sdpa" is the prefill: one forward pass over whole prompts, all of the same length, that
fills a cache and computes the logits of each last token. Attention is PyTorch's SDPA everywhere. Milliseconds are CUDA events around the
steps or the prefill (a clock without a GPU), the median of five runs of the same after two.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.timing import median_and_spread, torch_ms

PeerName = Literal["hf-compiled", "hf-eager", "hf-generate", "hf-sdpa"]
PREFILL_PEERS: tuple[PeerName, ...] = ("hf-sdpa",)  # the others decode
_UNCOMPILED = ("hf-eager", "hf-sdpa")
SERVED = "hf-continuous"  # requests through continuous batching, see `_serve`
BATCH_TOKENS = 8192  # what transformers takes where the size of its cache is not given; where it is, it would fill all memory with a mask
WARM_UPS, REPETITIONS = 2, 5  # an eager step needs one warm-up only
_MARK = "row: "  # in front of a result among what libraries print


def missing_reason() -> str | None:
    """Return why the peers cannot run here; None when they can."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


class Peers:
    """Run peers in a process of their own, so that its memory is free again afterwards. A context manager.

    The process builds the model and compiles at once, beside whatever the caller compiles. It measures when `rows` is called,
    and should then have the device to itself.

    Args:
      config: the fields of the shape's Hugging Face config.json.
      cases: each with peer, batch_size, context_tokens and, but for a prefill, steps.
    """

    def __init__(self, config: dict[str, Any], cases: Sequence[dict[str, Any]], seed: int):
        job = json.dumps({"config": config, "cases": list(cases), "seed": seed})
        # Closed at the end.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        command = [sys.executable, "-m", "benchmarks.peers", job]
        options: dict[str, Any] = {"cwd": Path(__file__).parents[1], "encoding": "utf-8"}  # where `benchmarks` lies, installed or not
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, **options)

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Measure, and yield each row as it comes. Raises RuntimeError with the last lines of the process if it fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # a process that has failed says why below
            self._process.stdin.write("measure\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_MARK):
                yield json.loads(line.removeprefix(_MARK))
        if status := self._process.wait():
            self._log.seek(0)
            last = self._log.read().splitlines()[-20:]
            raise RuntimeError("\n".join([f"the peers' process ended with status {status}:", *last]))


def _num_tokens(case: dict[str, Any]) -> int:
    """Return the tokens in the cache after the steps: as in our cases, the mean context of the steps is the one asked for."""
    return case["context_tokens"] + case["steps"] // 2


def _make_steps(model, case: dict[str, Any], device: str, seed: int) -> Callable[[], float]:
    """Allocate the cache of a peer; return a function that runs its steps and returns milliseconds per step."""
    import torch
    from transformers import StaticCache

    steps, compiled = case["steps"], case["peer"] == "hf-compiled"
    prompt_tokens = _num_tokens(case) - steps
    generator = torch.Generator(device).manual_seed(seed)
    cache: Any = StaticCache(config=model.config, max_cache_len=_num_tokens(case))

    def draw(num_tokens: int):
        return torch.randint(model.config.vocab_size, (case["batch_size"], num_tokens), device=device, generator=generator)

    if case["peer"] == "hf-generate":
        prompts = draw(prompt_tokens)
        options = {"attention_mask": torch.ones_like(prompts), "past_key_values": cache, "do_sample": False}

        def generate_ms(new_tokens: int) -> float:
            cache.reset()
            return torch_ms(lambda: model.generate(prompts, max_new_tokens=new_tokens, **options), device)

        return lambda: (generate_ms(steps) - generate_ms(1)) / (steps - 1)

    def forward(tokens):
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    tokens = draw(16)
    forward(tokens)  # allocates the cache, whose rows are then as good as those of a prompt of that length
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    step = torch.compile(forward, mode="reduce-overhead", fullgraph=True, dynamic=False) if compiled else forward

    def step_ms() -> float:
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt_tokens)
        first = tokens[:, :1].clone(memory_format=torch.contiguous_format)  # strides as a step returns them

        def decode() -> None:
            written = first
            for _ in range(steps):
                if compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                written = step(written).clone()  # the graph's own output is overwritten by its next run

        return torch_ms(decode, device) / steps

    return step_ms


def _make_prefill(model, case: dict[str, Any], device: str, seed: int) -> Callable[[], float]:
    """Draw prompts; return a function that reads them and returns milliseconds."""
    import torch

    size = (case["batch_size"], case["context_tokens"])
    prompts = torch.randint(model.config.vocab_size, size, device=device, generator=torch.Generator(device).manual_seed(seed))

    def read():
        return model(input_ids=prompts, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)

    return lambda: torch_ms(read, device)


def _serve(model, case: dict[str, Any], seed: int) -> Iterator[list[list[float]]]:
    """Run requests through continuous batching (`generate_batch`'s manager) as they arrive; yield for each rate when its tokens came.

    The case has `prompt_tokens` and `new_tokens` of the requests, and `rates`: pairs of a rate and the arrivals of the first requests,
    in seconds. Its `rows` are the tokens that the cache has room for.
    """
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(model.config.vocab_size, (length,), generator=generator).tolist() for length in case["prompt_tokens"]]
    defaults = ContinuousBatchingConfig()
    page = defaults.page_size if hasattr(defaults, "page_size") else defaults.block_size  # its name up to 5.17, at least
    sizes = {"num_blocks": case["rows"] // page, "max_requests_per_batch": case["slots"], "max_batch_tokens": BATCH_TOKENS}
    batching = ContinuousBatchingConfig(**sizes)
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=max(case["new_tokens"]))
    with model.continuous_batching_context_manager(generation_config=greedy, continuous_batching_config=batching) as manager:

        def run(name: str, arrivals: Sequence[float], prompts: list[list[int]] = prompts) -> list[list[float]]:
            outputs: dict[str, Any] = {}
            begin = time.perf_counter()
            for i, at in enumerate(arrivals):
                time.sleep(max(0.0, begin + at - time.perf_counter()))
                manager.add_request(prompts[i], f"{name}-{i}", max_new_tokens=case["new_tokens"][i], record_timestamps=True)
            while len(outputs) < len(arrivals):
                if (output := manager.get_result(timeout=60)) is None:
                    raise RuntimeError(f"transformers: {len(arrivals) - len(outputs)} requests have no result after a minute")
                if output.is_finished():
                    outputs[output.request_id] = output
            each = [outputs[f"{name}-{i}"] for i in range(len(arrivals))]
            if failed := next((output.error for output in each if output.error), None):
                raise RuntimeError(f"transformers: {failed}")
            return [[stamp - begin for stamp in output.timestamps] for output in each]

        run("warm-up", [0.0] * min(16, len(prompts)), [prompt[::-1] for prompt in prompts])  # others, since pages of prompts are kept
        for number, (_, arrivals) in enumerate(case["rates"]):
            yield run(str(number), arrivals)


def _main(job: dict[str, Any]) -> None:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    endless = transformers.AutoConfig.for_model(**job["config"] | {"bos_token_id": None, "eos_token_id": None})
    options = {"dtype": getattr(torch, job["config"]["dtype"]), "attn_implementation": "sdpa"}
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(endless, **options).eval()

    def make(case: dict[str, Any]) -> tuple[Callable[[], float], float] | str:
        """Return a peer's steps, or its prefill, with the seconds of the first run; or why there are none."""
        try:
            run = (_make_prefill if case["peer"] in PREFILL_PEERS else _make_steps)(model, case, device, job["seed"])
            began = time.perf_counter()
            run()
            return run, time.perf_counter() - began
        except torch.OutOfMemoryError:
            return "does not fit: PyTorch ran out of memory"

    def measure(case: dict[str, Any], run_ms: Callable[[], float], compile_seconds: float) -> dict[str, Any]:
        for _ in range(1 if case["peer"] in _UNCOMPILED else WARM_UPS):
            run_ms()
        median_ms, spread_ms = median_and_spread([run_ms() for _ in range(REPETITIONS)])
        if case["peer"] in PREFILL_PEERS:
            batch, length = case["batch_size"], case["context_tokens"]
            return {
                "time_to_first_token_ms": median_ms,
                "spread_ms": spread_ms,
                "num_tokens": batch * length,
                "allowed_pairs": batch * (length * (length + 1) // 2),
                "program_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
            }
        return {
            "ms_per_step": median_ms,
            "spread_ms": spread_ms,
            "tokens_per_second": 1e3 * case["batch_size"] / median_ms,
            "mean_context_tokens": _num_tokens(case) - (case["steps"] - 1) / 2,
            "compile_seconds": compile_seconds,
        }

    with torch.no_grad():
        runs = [make(case) if case["peer"] not in (*_UNCOMPILED, SERVED) else None for case in job["cases"]]
        sys.stdin.readline()  # the word to measure; nothing when the caller is gone
        for index, case in enumerate(job["cases"]):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if case["peer"] == SERVED:
                each = zip(case["rates"], _serve(model, case, job["seed"]))
                rows: Iterator[dict[str, Any]] = ({"rates": [rate], "events": [events]} for rate, events in each)
                run = None
            else:
                run = runs[index] or make(case)
                rows = iter([{"not_run": run} if isinstance(run, str) else measure(case, *run)])
            for row in rows:
                print(_MARK + json.dumps({**case, **row, "versions": versions}), flush=True)
            del run
            runs[index] = None
            gc.collect()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
