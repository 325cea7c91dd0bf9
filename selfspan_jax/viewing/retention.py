"""What sparse prefill keeps of each layer's and head's attention, measured on a prompt."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from pallas_kernels.prompt_attention import Retained
from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.engine import Engine, Graph
from selfspan_jax.decoding.sampling import sequence_keys
from selfspan_jax.decoding.state import DecodeState, prefill_state
from selfspan_jax.errors import UserError
from selfspan_jax.parallel import layout

EXACT_TOKENS = 2048


def measured_prefill(
    engine: Engine, token_ids: Int[np.ndarray, "b T"], lengths: Int[np.ndarray, "b"], config: DecodeConfig
) -> tuple[DecodeState, Retained]:
    """Read causal prompts as `Engine.prefill` does, and measure what their tiles keep of the attention: leaves [L, b, N].

    Every query is measured up to 4,095 tokens, above that so many that 2,048 to 4,095 are.

    Raises: UserError as `Engine.prefill`, and where a prompt goes on in a response; ValueError for prompts that are not read causally.
    """
    if engine.mesh is not None and engine.mesh.shape["context"] > 1:
        raise UserError("what prefill keeps is measured where a device has all rows of a prompt: the mesh has context=1")
    if engine.goes_on(token_ids, lengths):
        raise UserError("what prefill keeps is measured of prompts: here a response has begun")
    every = max(1, int(np.max(lengths)) // EXACT_TOKENS)  # from one that is measured to the next
    prompts = *engine.check_prompts(token_ids, lengths, config), sequence_keys(None, len(lengths))
    state, retained = _prefill(engine.graph, engine.params, *prompts, config, every)
    return state, jax.device_get(retained)


@functools.partial(jax.jit, static_argnames=("graph", "config", "every"))
def _prefill(graph: Graph, params, token_ids, lengths, keys, config: DecodeConfig, every: int):
    def prefill(model, token_ids, lengths, keys):
        nothing = Retained.nothing(token_ids.shape[0], model.config.num_heads, every)
        state = prefill_state(model, token_ids, lengths, keys, config, 1, False, (nothing,))
        pools, retained = zip(*((layer[:2], layer[2]) for layer in state.cache.pools))
        state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, pools=pools))
        return state, jax.tree.map(lambda *layers: jnp.stack(layers), *retained)

    each = layout.spec("sequences")
    leaf: Any = layout.spec(None, "sequences", "heads")
    specs = DecodeState.partition_specs(), Retained(leaf, leaf, leaf, leaf, leaf, every)
    return graph.shard_map(prefill, each, each, each, out_specs=specs)(params, token_ids, lengths, keys)


def to_json(retained: Retained) -> dict[str, Any]:
    """Sum up what was measured, leaves [L, b, N]: the least and the mean retained mass and the tiles kept, in all and by layer and head.

    Prompts that are shorter than `every`, of which no query was measured, count in the tiles only.
    """
    mean = np.mean(retained.total / np.maximum(retained.queries, 1), axis=1, where=np.asarray(retained.queries) > 0)
    kept = np.mean(retained.kept / retained.tiles, axis=1)
    found = {"retained_mass_min": np.min(retained.least, axis=1), "retained_mass_mean": mean, "tiles_kept": kept}
    whole = {"retained_mass_min": np.min(retained.least), "retained_mass_mean": np.mean(mean), "tiles_kept": np.mean(kept)}
    by_head = {name: np.round(values, 4).tolist() for name, values in found.items()}
    rounded = {name: round(float(value), 6) for name, value in whole.items()}
    return {**rounded, "measured_every": retained.every, "by_layer_and_head": by_head}
