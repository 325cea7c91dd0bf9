"""Measure Hugging Face's decode step on the same shape, with a static cache: eager, compiled, and by `generate`.

    python -m benchmarks.peers JOB      (JOB is JSON; see `Peers`)

A step is one forward pass of the token with a static cache, greedy sampling, fed back. Weights, tokens and cached rows are
random, in the dtype of the shape. "hf-compiled" is `torch.compile(mode="reduce-overhead", fullgraph=True)` of that forward,
"hf-eager" the forward pass as it is, "hf-generate" is `model.generate` with that cache, which compiles by itself where it sees fit,
less the same call for one token. Milliseconds per step are CUDA events around the steps (a clock without a GPU),
the median of five runs of the same steps after two.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from benchmarks.timing import median_and_spread, torch_ms

PeerName = Literal["hf-compiled", "hf-eager", "hf-generate"]
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
      cases: each with peer, batch_size, context_tokens and steps.
    """

    def __init__(self, config: dict[str, Any], cases: Sequence[dict[str, Any]], seed: int):
        job = json.dumps({"config": config, "cases": list(cases), "seed": seed})
        # Closed at the end.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "benchmarks.peers", job]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)

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


def _make_model(config: dict[str, Any], device: str, dtype):
    import torch
    import transformers

    endless = transformers.AutoConfig.for_model(**config | {"bos_token_id": None, "eos_token_id": None})
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(endless, dtype=dtype, attn_implementation="sdpa").eval()


class _Run:
    """One peer at one batch size and context: its cache and its step."""

    def __init__(self, model, case: dict[str, Any], device: str, seed: int):
        import torch
        from transformers import StaticCache

        self.case, self.device = case, device
        batch, steps = case["batch_size"], case["steps"]
        self.num_tokens = case["context_tokens"] + steps // 2  # as ours: the mean context of the steps is the one asked for
        generator = torch.Generator(device).manual_seed(seed)
        self.cache: Any = StaticCache(config=model.config, max_cache_len=self.num_tokens)
        self.compiled = case["peer"] != "hf-eager"
        if case["peer"] == "hf-generate":
            prompts = torch.randint(model.config.vocab_size, (batch, self.num_tokens - steps), device=device, generator=generator)
            self.ms_per_step = functools.partial(self._ms_of_generate, model, prompts)
        else:
            tokens = torch.randint(model.config.vocab_size, (batch, 16), device=device, generator=generator)
            self.ms_per_step = functools.partial(self._ms_of_steps, self._make_step(model, tokens), tokens[:, :1])
        began = time.perf_counter()
        self.ms_per_step()
        self.compile_seconds = time.perf_counter() - began

    def _make_step(self, model, tokens):
        import torch

        def forward(tokens):
            out = model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].argmax(-1, keepdim=True)

        forward(tokens)  # allocates the cache, whose rows are then as good as those of a prompt of that length
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        return torch.compile(forward, mode="reduce-overhead", fullgraph=True, dynamic=False) if self.compiled else forward

    def _ms_of_steps(self, step, first) -> float:
        import torch

        steps = self.case["steps"]
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.num_tokens - steps)
        first = first.clone(memory_format=torch.contiguous_format)  # strides as a step returns them

        def decode() -> None:
            tokens = first
            for _ in range(steps):
                if self.compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                tokens = step(tokens).clone()  # the graph's own output is overwritten by its next run

        return torch_ms(decode, self.device) / steps

    def _ms_of_generate(self, model, prompts) -> float:
        import torch

        def new_tokens(number: int) -> float:
            self.cache.reset()
            options = {"attention_mask": torch.ones_like(prompts), "past_key_values": self.cache, "do_sample": False}
            return torch_ms(lambda: model.generate(prompts, max_new_tokens=number, **options), self.device)

        steps = self.case["steps"]
        return (new_tokens(steps) - new_tokens(1)) / (steps - 1)

    def row(self) -> dict[str, Any]:
        for _ in range(WARM_UPS if self.compiled else 1):
            self.ms_per_step()
        median_ms, spread_ms = median_and_spread([self.ms_per_step() for _ in range(REPETITIONS)])
        return {
            "ms_per_step": median_ms,
            "spread_ms": spread_ms,
            "tokens_per_second": 1e3 * self.case["batch_size"] / median_ms,
            "mean_context_tokens": self.num_tokens - (self.case["steps"] - 1) / 2,
            "compile_seconds": self.compile_seconds,
        }


def _main(job: dict[str, Any]) -> None:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    model = _make_model(job["config"], device, getattr(torch, job["config"]["dtype"]))

    def make(case: dict[str, Any]) -> _Run | str:
        try:
            return _Run(model, case, device, job["seed"])
        except torch.OutOfMemoryError:
            return "does not fit: PyTorch ran out of memory"

    with torch.no_grad():
        runs = [make(case) if case["peer"] != "hf-eager" else None for case in job["cases"]]
        sys.stdin.readline()  # the word to measure; nothing when the caller is gone
        for index, case in enumerate(job["cases"]):
            run = runs[index] or make(case)
            row = {"not_run": run} if isinstance(run, str) else run.row()
            print(_MARK + json.dumps({**case, **row, "versions": versions}), flush=True)
            del run
            runs[index] = None
            gc.collect()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
