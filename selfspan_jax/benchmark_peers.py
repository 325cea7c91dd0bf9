"""Hugging Face's decode step on the same shape: static cache, eager and compiled. Runs in a process of its own.

    python -m selfspan_jax.benchmark_peers JOB      (JOB is JSON; see `rows`)

What is timed is what `generate` does for each token with a static cache: one forward of the token, greedy choice, fed back.
Weights, tokens and cached rows are random, in the dtype of the shape. "hf-compiled" is
`torch.compile(mode="reduce-overhead", fullgraph=True)` of that forward, "hf-eager" the forward as it is. Milliseconds per
step are CUDA events around the steps (a clock without a GPU), the median of five runs of the same steps after two.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

Name = Literal["hf-compiled", "hf-eager"]
WARM_UPS, REPETITIONS = 2, 5  # an eager step needs one warm-up only
_MARK = "row: "  # in front of a result among what libraries print


def missing_reason() -> str | None:
    """Why the peers cannot run here; None when they can."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def rows(config: dict[str, Any], vocab_size: int, cases: Sequence[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Measures peers in a process of its own, so that its memory is free again afterwards; yields each row as it comes.

    Call it before JAX takes the device's memory.

    Args:
      config: the shape, as `dataclasses.asdict` of a ModelConfig.
      cases: each with peer, batch_size, context_tokens and steps.

    Raises: RuntimeError with the end of what the process said when it fails.
    """
    job = json.dumps({"config": config, "vocab_size": vocab_size, "cases": list(cases), "seed": seed})
    command = [sys.executable, "-m", "selfspan_jax.benchmark_peers", job]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_MARK):
                yield json.loads(line.removeprefix(_MARK))
            else:
                said = [*said[-19:], line]
    if process.returncode:
        raise RuntimeError(f"the peers' process ended with status {process.returncode}:\n{''.join(said)}")


def _make_model(config: dict[str, Any], vocab_size: int, device: str, dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_heads"],
        num_key_value_heads=config["num_kv_heads"],
        head_dim=config["head_size"],
        max_position_embeddings=config["max_context_tokens"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=config["tie_embeddings"],
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**options)).eval()
    finally:
        torch.set_default_dtype(before)


def _run_ms(device: str, run) -> float:
    """Milliseconds of a call."""
    import torch

    if device == "cpu":
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _measure(model, case: dict[str, Any], vocab_size: int, device: str, seed: int) -> dict[str, Any]:
    import torch
    from transformers import StaticCache

    batch, steps = case["batch_size"], case["steps"]
    num_tokens = case["context_tokens"] + steps // 2  # as ours: the mean context of the steps is the one asked for
    prompt = torch.randint(vocab_size, (batch, 16), device=device, generator=torch.Generator(device).manual_seed(seed))
    cache: Any = StaticCache(config=model.config, max_cache_len=num_tokens)

    def rewind(length: int) -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    def forward(tokens):
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    step = torch.compile(forward, mode="reduce-overhead", fullgraph=True) if case["peer"] == "hf-compiled" else forward
    forward(prompt)  # allocates the cache, whose rows are then as good as those of a prompt of that length
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()

    def decode() -> None:
        tokens = prompt[:, -1:]
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            tokens = step(tokens).clone()  # the graph's own output is overwritten by its next run

    def run() -> float:
        rewind(num_tokens - steps)
        return _run_ms(device, decode) / steps

    began = time.perf_counter()
    run()
    first_run_seconds = time.perf_counter() - began
    for _ in range(WARM_UPS if case["peer"] == "hf-compiled" else 1):
        run()
    ms = [run() for _ in range(REPETITIONS)]
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else None
    return {
        "ms_per_step": statistics.median(ms),
        "spread_ms": max(ms) - min(ms),
        "tokens_per_second": 1e3 * batch / statistics.median(ms),
        "mean_context_tokens": num_tokens - (steps - 1) / 2,
        "process_peak_memory_bytes": peak,
        "compile_seconds": first_run_seconds,
    }


def _main(job: dict[str, Any]) -> None:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    model = _make_model(job["config"], job["vocab_size"], device, getattr(torch, job["config"]["compute_dtype"]))
    for case in job["cases"]:
        try:
            with torch.no_grad():
                row = _measure(model, case, job["vocab_size"], device, job["seed"])
        except torch.OutOfMemoryError:
            row = {"not_run": "does not fit: PyTorch ran out of memory"}
        print(_MARK + json.dumps({**case, **row, "versions": versions}), flush=True)
        torch.compiler.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
