"""Shared by the kernels' tests: which implementations run where, and how wrong one may be."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

JAX_TRITON = [pytest.mark.gpu, pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="an extra")]
KERNELS = [("triton", True), pytest.param("triton", False, marks=pytest.mark.gpu, id="triton-gpu")]
INTERPRET = [pytest.param(True, id="interpret"), pytest.param(False, marks=pytest.mark.gpu, id="gpu")]


def run(case, dtype, implementation: str, interpret: bool = False):
    """Parameters of one test: a case, a dtype, an implementation, and whether the interpreter runs it."""
    return pytest.param(case, dtype, implementation, interpret, id=f"{case.name}-{np.dtype(dtype).name}-{implementation}")


def gpu_run(case, dtype, implementation: str):
    """The same on a GPU."""
    mark = pytest.mark.gpu
    return pytest.param(case, dtype, implementation, False, marks=mark, id=f"{case.name}-{np.dtype(dtype).name}-{implementation}-gpu")


def program(function, interpret: bool = False):
    """Compile a function; a program of the interpreter runs for a moment and would compile for seconds."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True} if interpret else None
    return jax.jit(function, compiler_options=options)


def round_to(problem, dtype):
    """The same problem in numbers that `dtype` can hold, so that only the computation's error is seen."""
    arrays = {name: x for name, x in vars(problem).items() if isinstance(x, np.ndarray) and x.dtype == np.float64}
    return dataclasses.replace(problem, **{name: x.astype(dtype).astype(np.float64) for name, x in arrays.items()})


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def error(out: np.ndarray, plain: np.ndarray, exact: np.ndarray) -> float:
    """RMS error against the oracle, in units of what plain arithmetic in the same dtype makes on the same input.

    The budget of every kernel is 2.
    """
    return rms(out - exact) / rms(plain - exact)
