"""Time sparse prefill at given shares of the tiles: the first token, and the attention and the choice of one layer.

    python -m benchmarks.sparse_prefill --shape llama3-8b --tokens 8192,32768,131072 --kept 0.3,0.3,0.2 --json FILE

Which tiles a selector keeps depends on the model, and random weights say nothing of it. So the time is that of the selector's own
work, and of attention to as many tiles as `--kept` says, spread at random; take the shares that `python -m experiments.prefill
quality` found. A first token is the wall time of `Engine.prefill`; attention and choice are those of a layer for the last chunk.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from benchmarks import timing
from benchmarks.shapes import ShapeName, named_shape
from data import commandline
from data.errors import check_range
from pallas_kernels import PromptMask, prompt_attention
from pallas_kernels.prompt_attention import BLOCK, BlockMeans, SampleAttention, Selector
from pallas_kernels.tiles import list_tiles
from selfspan_jax import files
from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.engine import Engine
from selfspan_jax.errors import UserError
from selfspan_jax.memory import catch_out_of_memory

Kind = Literal["sample 1", "sample 2", "blocks"]
KINDS: tuple[Kind, ...] = ("sample 1", "sample 2", "blocks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfShare(Selector):
    """Do a selector's work, then keep its diagonal and a share of the other tiles, at random and other ones for each head."""

    selector: Selector
    share: float

    name = "share"

    def choose(self, q, k, *, first_query=0, lengths=None):
        tiles, counts = self.selector.choose(q, k, first_query=first_query, lengths=lengths)
        worked = counts[..., 1:] >= 0  # always, which no compiler knows: so the selector's work is not left out
        head, i, j = (jax.lax.broadcasted_iota(jnp.uint32, tiles.shape, axis) for axis in (1, 2, 3))
        draw = (head * jnp.uint32(0x9E3779B9)) ^ (i * jnp.uint32(0x85EBCA6B)) ^ (j * jnp.uint32(0xC2B2AE35))
        draw = (draw ^ (draw >> 15)) * jnp.uint32(0x2C1B3C6D)
        draw = (draw ^ (draw >> 12)) * jnp.uint32(0x297A2D39)
        own = (jnp.int32(first_query) // BLOCK).astype(jnp.uint32) + i
        kept = (j <= own) & ((j == own) | ((draw >> 8).astype(jnp.float32) < jnp.float32(self.share * 2**24)))
        return list_tiles(kept & worked, kept & worked & (j < own))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsePrefill:
    """Time the first token of a shape with random weights, dense and at given shares of the tiles."""

    shape: ShapeName = "llama3-8b"
    tokens: Annotated[tuple[int, ...], commandline.commas(int)] = (8192, 32_768, 131_072)
    """Lengths of the prompt."""
    kept: Annotated[tuple[float, ...], commandline.commas(float)]
    """Share of the tiles, as `quality` found it: one for each selector, or one for all."""
    selectors: Annotated[tuple[Kind, ...], commandline.commas(*KINDS)] = KINDS
    layers: int | None = None
    """Fewer layers than the shape has, for a try."""
    prefill_tokens: int = DecodeConfig.prefill_tokens
    """Tokens that go through the model at once."""
    repetitions: int = 3
    """Of each prefill, after one more; the median counts."""
    json: Path | None = None
    """Write the rows into this file, each as soon as it is there."""

    def __post_init__(self):
        check_range(self, "tokens", "repetitions", "prefill_tokens", low=1)
        if len(self.kept) not in (1, len(self.selectors)) or not all(0 <= share <= 1 for share in self.kept):
            raise UserError(f"kept is {self.kept}; allowed: numbers from 0 to 1, one, or one for each of {', '.join(self.selectors)}")

    @property
    def shares(self) -> tuple[float, ...]:
        return self.kept * len(self.selectors) if len(self.kept) == 1 else self.kept

    def run(self) -> None:
        shape = named_shape(self.shape).with_context(max(self.tokens) + 64)
        changes: dict[str, Any] = {"prompt_view": "causal"} | ({"num_layers": self.layers} if self.layers else {})
        shape = dataclasses.replace(shape, config=dataclasses.replace(shape.config, **changes))
        engine = Engine(shape.random(0))
        header = {**timing.report_header(), "jax": jax.__version__, "shape": self.shape, "num_layers": shape.config.num_layers}
        report: dict[str, Any] = {**header, "speed": []}
        choices: dict[str, Selector] = {
            "sample 1": SampleAttention(version=1),
            "sample 2": SampleAttention(version=2),
            "blocks": BlockMeans(),
        }
        rng = np.random.default_rng(0)
        for tokens in self.tokens:
            prompt = rng.integers(0, shape.vocab.seg_base, (1, tokens)).astype(np.int32)
            prompt[prompt == shape.vocab.solve_id] = 0
            dense_ms = None
            runs: list[tuple[str, float, str | Selector]] = [("dense", 1.0, "dense")]
            runs += [(name, share, choices[name]) for name, share in zip(self.selectors, self.shares, strict=True)]
            for name, share, selector in runs:
                chosen = selector if isinstance(selector, str) else OfShare(selector=selector, share=share, dense_below_tokens=0)
                config = DecodeConfig("dense", 64, prefill=chosen, prefill_tokens=self.prefill_tokens)
                row: dict[str, Any] = {"tokens": tokens, "selector": name, "kept": share}
                try:
                    row |= self.time(engine, prompt, config)
                except (jax.errors.JaxRuntimeError, UserError) as error:
                    row["not_run"] = str(error).splitlines()[0][:200]
                else:
                    dense_ms = row["first_token_ms"] if name == "dense" else dense_ms
                    row["times_dense"] = None if dense_ms is None else dense_ms / row["first_token_ms"]
                report["speed"].append(row)
                print(
                    "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else str(value) for name, value in row.items()), flush=True
                )
                files.write_rows(self.json, report, complete=False)
        files.write_rows(self.json, report, complete=True)

    def time(self, engine: Engine, prompt: Int[np.ndarray, "1 T"], config: DecodeConfig) -> dict[str, Any]:
        lengths = np.array([prompt.shape[1]], np.int32)
        with catch_out_of_memory():
            seconds = timing.run_seconds(lambda: engine.prefill(prompt, lengths, config).logits, warm_ups=1, repetitions=self.repetitions)
        median, spread = timing.median_and_spread(seconds)
        layer = self.time_layer(engine, prompt.shape[1], config)
        return {"first_token_ms": 1e3 * median, "spread_ms": 1e3 * spread, **layer}

    def time_layer(self, engine: Engine, tokens: int, config: DecodeConfig) -> dict[str, float]:
        """Time attention and choice of one layer for the prompt's last chunk, on random queries and keys."""
        model, chunk = engine.config, min(tokens, self.prefill_tokens)
        q, k, v = (
            jax.random.normal(jax.random.key(i), (*shape, model.head_size), model.compute_dtype)
            for i, shape in enumerate([(1, chunk, model.num_heads), *[(tokens, model.num_kv_heads)] * 2])
        )
        mask = PromptMask.causal(tokens - chunk, jnp.array([tokens]), num_keys=tokens)
        found: dict[str, float] = {}
        if isinstance(config.prefill, Selector):
            selector = config.prefill
            choose = jax.jit(lambda q, k: selector.choose(q, k[None], first_query=mask.first_query, lengths=mask.lengths))
            tiles, counts = choose(q, k)
            mask = dataclasses.replace(mask, key_tiles=tiles, key_counts=counts, blocks=(BLOCK, BLOCK))
            found["choice_ms"] = 1e3 * timing.median_and_spread(timing.run_seconds(lambda: choose(q, k), queued=4))[0]
        attend = jax.jit(prompt_attention)
        found["attention_ms"] = 1e3 * timing.median_and_spread(timing.run_seconds(lambda: attend(q, k, v, mask), queued=4))[0]
        return found


def main(argv: list[str] | None = None) -> None:
    with commandline.exit_on_user_error(UserError, NotImplementedError), catch_out_of_memory():
        command = commandline.parse(SparsePrefill, "sparse_prefill", sys.argv[1:] if argv is None else argv, user_error=UserError)
        with files.outputs(json=command.json):
            command.run()


if __name__ == "__main__":
    main()
