"""CUDA programs without a CUDA device."""

import contextlib

import jax


def cuda_lowering(function, *args) -> str:
    """The program that a CUDA machine would compile, made on any machine."""
    device = contextlib.nullcontext()
    if hasattr(jax.sharding, "AbstractDevice"):
        h200 = jax.sharding.AbstractDevice("NVIDIA H200", 132, "cuda")
        device = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h200))
    with device:
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
