"""Every implementation against a float64 oracle, within measured error budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_kernels import QuantizedPool, quantize_pool, span_decode_attention

from pallas_kernels.span_decode.cases import CASES, Case, Problem, make_problem

ON_ANY_MACHINE = [("reference", False), ("xla", False)]


@pytest.fixture(autouse=True)
def strict_numerics():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def oracle(problem: Problem) -> np.ndarray:
    """Softmax attention in float64, one head of one sequence at a time."""
    q, out = problem.q, np.zeros_like(problem.q)
    batch, num_heads, head_size = q.shape
    group = num_heads // problem.k_pool.shape[1]
    scale = head_size**-0.5 if problem.scale is None else problem.scale
    for b in range(batch):
        rows = problem.slots[b, : problem.counts[b]]
        for n in range(num_heads if len(rows) else 0):
            scores = problem.k_pool[rows, n // group] @ q[b, n] * scale
            weights = np.exp(scores - scores.max())
            out[b, n] = weights @ problem.v_pool[rows, n // group] / weights.sum()
    return out


def round_to(problem: Problem, dtype) -> Problem:
    """The same problem with floats that `dtype` can hold, so that only the kernel's error is seen."""
    rounded = [np.asarray(x).astype(dtype).astype(np.float64) for x in (problem.q, problem.k_pool, problem.v_pool)]
    return Problem(*rounded, problem.slots, problem.counts, problem.scale)


def run(problem: Problem, dtype, implementation, interpret=False):
    q, k_pool, v_pool = (jnp.asarray(x, dtype) for x in (problem.q, problem.k_pool, problem.v_pool))

    @jax.jit
    def attend(q, k_pool, v_pool, slots, counts):
        return span_decode_attention(
            q,
            k_pool,
            v_pool,
            slots,
            counts,
            scale=problem.scale,
            implementation=implementation,
            interpret=interpret,
        )

    out = attend(q, k_pool, v_pool, jnp.asarray(problem.slots), jnp.asarray(problem.counts))
    assert out.dtype == q.dtype and out.shape == q.shape
    return np.asarray(out, np.float64)


@pytest.mark.parametrize("implementation, interpret", ON_ANY_MACHINE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_matches_oracle(case: Case, implementation, interpret):
    problem = round_to(make_problem(case), np.float32)
    out = run(problem, jnp.float32, implementation, interpret)
    np.testing.assert_allclose(out, oracle(problem), atol=2e-6, rtol=2e-5)
