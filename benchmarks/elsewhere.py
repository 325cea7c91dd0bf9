"""Time layers of a decode step whose attention is on other devices than the model (Lamina, 2405.01814), as far as one program can say it.

    python -m benchmarks.elsewhere --shape llama3-8b --devices 4 --batch-size 32 --context 32768 --json FILE

"together" is the mesh `context=N`: every device computes the linear maps and attends to its share of the rows; a gather a layer.
"elsewhere": the first device computes the maps, the others have the rows. A conditional skips the maps there; queries, keys and values
of new tokens are sent by a gather of which the first part is taken, and attention comes back by the same gather as above. Shards of an
array are of one size, so each device takes memory for all weights and for a share of the rows in both: what is saved is work, not memory.
"tensor" is the mesh `tensor=N`: heads and features are divided, two sums a layer; it is left out where N does not divide the heads.

Layers alone, no automaton, embedding or logits; rows are made by a formula, named ones are evenly spaced.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import ShapeName, named_shape
from benchmarks.timing import median_and_spread, report_header, run_command, run_seconds
from data import commandline
from data.errors import check_range
from selfspan_jax import files
from selfspan_jax.attention.policies import Slots
from selfspan_jax.model import Decoder, rotary_angles
from selfspan_jax.parallel import layout
from selfspan_jax.parallel.collectives import broadcast_from_first
from selfspan_jax.parallel.engine import make_engine
from selfspan_jax.parallel.mesh import describe, make_mesh

WAYS = ("together", "elsewhere", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Time attention on the devices of the model, and on others."""

    shape: ShapeName = "llama3-8b"
    """Sizes of the model, which has random weights."""
    layers: int = 8
    """How many of its layers."""
    devices: int = 4
    """How many devices; "elsewhere" takes one of them for the model."""
    batch_size: Annotated[tuple[int, ...], commandline.commas(int)] = (32,)
    """Sequences decoded together; several with commas."""
    context: int = 32768
    """Tokens of each sequence. Where owners do not divide them, ways read rows beside each other's, and short contexts differ by it."""
    attended_fraction: Annotated[tuple[float, ...], commandline.commas(float)] = (0.1, 1.0)
    """Shares of them that are read; several with commas."""
    steps: int = 16
    """Steps of a run."""
    json: Path | None = None
    """Write the rows into this file, after each of them; - is standard output."""

    def __post_init__(self):
        check_range(self, "layers", "batch_size", "context", "steps", low=1)
        check_range(self, "devices", low=2)
        check_range(self, "attended_fraction", low=1e-4, high=1)

    def run(self) -> None:
        """Measure and print each row."""
        shape = named_shape(self.shape)
        shape = dataclasses.replace(shape, config=dataclasses.replace(shape.config, num_layers=self.layers))
        meshes = {axis: make_mesh(f"{axis}={self.devices}") for axis in ("context", "tensor")}
        divided = shape.config.num_kv_heads % self.devices == 0
        ways = WAYS if divided else WAYS[:2]
        engines = {axis: make_engine(shape.random(0), mesh) for axis, mesh in meshes.items() if divided or axis != "tensor"}
        settings = {"shape": self.shape, "layers": self.layers, "devices": self.devices, "steps": self.steps}
        results: dict[str, Any] = {**report_header(), **settings, "rows": []}
        print(describe(meshes["context"]), flush=True)
        for batch in self.batch_size:
            for fraction in self.attended_fraction:
                hidden = {}
                for way in ways:
                    engine = engines["tensor" if way == "tensor" else "context"]
                    sizes = {"batch": batch, "context": self.context, "fraction": fraction}
                    row, hidden[way] = measure(engine, way, self.steps, **sizes)
                    difference = float(np.abs(hidden[way] - hidden["together"]).max() / np.abs(hidden["together"]).max())
                    results["rows"].append({"way": way, **sizes, **row, "largest_difference": difference})
                    files.write_rows(self.json, results, complete=False)
                    print(f"{way:10}{batch:5} {fraction:5.0%} {row['ms_per_step']:8.3f} ms a step, differs by {difference:.1e}", flush=True)
        files.write_rows(self.json, results, complete=True)


def measure(engine: Any, way: str, steps: int, **sizes: Any) -> tuple[dict[str, float], np.ndarray]:
    """Time a loop of steps; return the row, and the hidden states of the device with the model."""
    of_pools, specs = layout.spec("rows", "heads"), layout.spec("rows")
    fill = engine.graph.shard_map(functools.partial(rows_of, way=way, **sizes), out_specs=(of_pools, specs, specs, specs))
    pools, slots, counts, own = jax.jit(fill)(engine.params)
    loop = functools.partial(run_steps, way=way, steps=steps)
    run = jax.jit(engine.graph.shard_map(loop, of_pools, specs, specs, specs, out_specs=(of_pools, specs)), donate_argnums=1)
    kept = [pools]

    def once():
        kept[0], hidden = run(engine.params, kept[0], slots, counts, own)
        return hidden

    ms, spread = median_and_spread([1e3 * seconds / steps for seconds in run_seconds(once, repetitions=3)])
    return {"ms_per_step": ms, "spread_ms": spread}, np.asarray(once()[: sizes["batch"]], np.float32)


def rows_of(model: Decoder, *, way: str, batch: int, context: int, fraction: float) -> tuple[Any, ...]:
    """Make a device's pools, the slots that it reads [B, A], how many [B], and the rows of new tokens, which the last device has."""
    config, index, size = model.config, jax.lax.axis_index("context"), jax.lax.axis_size("context")
    holders, first = (size - 1, 1) if way == "elsewhere" else (size, 0)
    devices = size * jax.lax.axis_size("tensor")
    whole = devices * (devices - 1)  # so that any way names the same rows
    share, named = -(-context // holders), max(1, round(fraction * context / whole)) * whole // holders
    shape = (batch * (share + 1), config.num_kv_heads, config.head_size)
    row, head, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    head += jax.lax.axis_index("tensor") * config.num_kv_heads
    token = (index - first) * share + row % share
    pools = []
    for layer in range(config.num_layers):
        angles = (token * 31 + row // share * 17 + head * 7 + column * 3 + layer).astype(jnp.float32)
        pools.append(tuple(jnp.sin(angles * rate).astype(config.compute_dtype) for rate in (0.7, 1.3)))
    sequence, has_new = jnp.arange(batch, dtype=jnp.int32), index == size - 1
    evenly = np.arange(named) * share // named  # which int32 would not hold
    slots = sequence[:, None] * share + jnp.asarray(evenly, jnp.int32)[None, :]
    new = batch * share + sequence
    slots = jnp.concatenate([slots, new[:, None]], axis=1)
    counts = jnp.where(index >= first, named + has_new.astype(jnp.int32), 0)
    return tuple(pools), slots, jnp.broadcast_to(counts, batch), jnp.where(has_new, new, -1)


def run_steps(model: Decoder, pools, slots, counts, own, *, way: str, steps: int) -> tuple[Any, jax.Array]:
    """Take steps through the layers, each from the same hidden states: of random weights, many layers would make anything of a rounding."""
    batch, is_model = len(own), jax.lax.axis_index("context") == 0
    angles = rotary_angles(jnp.full((batch, 1), 7, jnp.int32), model.config)
    attend = Slots(slots, counts, kept=counts).attend(own, None)

    def at_model(function, *arrays):
        if way != "elsewhere":
            return function(*arrays)
        nothing = jax.eval_shape(function, *arrays)
        return jax.lax.cond(is_model, function, lambda *_: jnp.zeros(nothing.shape, nothing.dtype), *arrays)

    def step(_, carry):
        (pools, _), x, after = carry, first, []
        for layer, own_pools in zip(model.layers, pools, strict=True):
            attention, mlp = layer.self_attn, layer.mlp

            def project(x, layer=layer, attention=attention):
                return attention.qkv_proj(x, norm=layer.input_layernorm, implementation=None)

            def rest(out, x, layer=layer, attention=attention, mlp=mlp):
                x = attention.o_proj(out, residual=x, implementation=None)
                hidden = mlp.gate_up_proj(x, norm=layer.post_attention_layernorm, gated=True, implementation=None)
                return mlp.down_proj(hidden, residual=x, implementation=None)

            qkv = at_model(project, x)
            qkv = broadcast_from_first(qkv) if way == "elsewhere" else qkv
            qkv = qkv.reshape(batch, 1, -1, attention.projections, attention.head_size)
            out, own_pools = attend(qkv, {}, angles, own_pools)
            x = at_model(rest, out, x)
            after.append(own_pools)
        return tuple(after), model.norm(x)

    first = jnp.sin(jnp.arange(batch * model.config.hidden_size, dtype=jnp.float32)).reshape(batch, 1, -1)
    first = first.astype(model.config.compute_dtype)
    return jax.lax.fori_loop(0, steps, step, (pools, first))


def main(argv: list[str] | None = None) -> None:
    run_command(Elsewhere, argv)


if __name__ == "__main__":
    main()
