"""What fits into the memory of a device, and the error of what does not."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from selfspan_jax.errors import UserError
from selfspan_jax.parallel import layout

T = TypeVar("T")
_LIMIT, PINNED_LIMIT_GIB = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", 64  # of host memory, unless that variable says something else
_MEMORY_INFO, _CONTROL_GROUP = "/proc/meminfo", "/sys/fs/cgroup"
# What a container may take and has taken, and how much of that are files that may be dropped: in control groups of version 2, and of 1.
_CONTAINER_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")


@dataclasses.dataclass
class _Host:
    """What this process knows of host memory."""

    taken_bytes: int = 0  # the most that its arrays took at once
    num_processes: int = 1  # that begin at the same time and take host memory each, this one among them


_HOST = _Host()


class DoesNotFit(UserError):
    """What was asked for needs more memory than the device or its host has."""


@contextlib.contextmanager
def catch_out_of_memory(advice: str = "") -> Iterator[None]:
    """Raise DoesNotFit, with advice at its end, in place of JAX's error where the device runs out of memory.

    Raises: UserError too, where no device can be used.
    """
    try:
        yield
    except RuntimeError as error:
        if "Unable to initialize backend" in str(error):
            said = str(error).partition(" (you may")[0]
            raise UserError(f"no device can be used: {said}; other programs may have all of its memory") from None
        if not isinstance(error, jax.errors.JaxRuntimeError) or not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        if "host memory" in str(error):
            limit = f"{_LIMIT} allows {PINNED_LIMIT_GIB} GiB of it unless set otherwise"
            raise DoesNotFit(f"does not fit: host memory ran out that a GPU may read: {limit}") from None
        raise DoesNotFit(f"does not fit: the device ran out of memory{advice}") from None


def attempt(function: Callable[[], T]) -> T | DoesNotFit:
    """Call a function; return its result, or the error that says why memory does not suffice."""
    try:
        with catch_out_of_memory():
            return function()
    except DoesNotFit as reason:
        return DoesNotFit(str(reason))  # a new one: the traceback of this one keeps arrays alive


def check_fits(needed_bytes: int) -> None:
    """Raise DoesNotFit for more bytes than the device has for this process."""
    limit = device_memory_bytes()
    if limit is not None and needed_bytes > limit:
        raise DoesNotFit(f"does not fit: needs {needed_bytes / 2**30:.1f} GiB of memory, the device has {limit / 2**30:.1f}")


def device_memory_bytes() -> int | None:
    """Return the memory that this process may take of the first device; None where the device does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


def free_memory_bytes() -> int | None:
    """Return what of `device_memory_bytes` is not in use; None where the device does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None


def free_host_memory_bytes() -> int:
    """Return how much host memory a device's arrays may take: what is free or was taken before, and at most JAX's limit for GPUs.

    Raises: UserError where the system does not say what is free.
    """
    try:
        with open(_MEMORY_INFO, encoding="ascii") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        raise UserError(f"kv_memory is 'host', which needs Linux: {_MEMORY_INFO} says what host memory is free") from None
    return min(min(free, _container_free_bytes()) // _HOST.num_processes + _HOST.taken_bytes, host_memory_limit_bytes())


def _container_free_bytes() -> int:
    """Return what a container leaves this process, which the system would end without a word if it took more."""
    for limit, used, stat, droppable in _CONTAINER_FILES:
        with contextlib.suppress(OSError, ValueError):  # no control groups of this version, or "max": no limit
            given, taken, stats = (pathlib.Path(_CONTROL_GROUP, name).read_text(encoding="ascii") for name in (limit, used, stat))
            dropped = sum(int(line.split()[1]) for line in stats.splitlines() if line.startswith(f"{droppable} "))
            return int(given) - int(taken) + dropped
    return 2**63


def share_host_memory(num_processes: int) -> None:
    """Leave room for others: so many processes like this one begin at the same time."""
    _HOST.num_processes = num_processes


def host_memory_limit_bytes() -> int:
    """Return how much host memory JAX lets a GPU read, whatever the machine has; on other devices there is no limit."""
    if jax.default_backend() != "gpu":
        return 2**63
    limit = os.environ.get(_LIMIT, str(PINNED_LIMIT_GIB))
    if not limit.isdecimal():
        raise UserError(f"{_LIMIT} is {limit!r}; allowed: a whole number of GiB")
    return int(limit) * 2**30


def take_host_memory(needed_bytes: int, what: str) -> None:
    """Check that host memory has room for a device's arrays, which the caller then allocates, and note that they are taken.

    JAX keeps what it has taken, for this process to take again.

    Raises: DoesNotFit, with what is free or allowed.
    """
    free, limit = free_host_memory_bytes(), host_memory_limit_bytes()
    if needed_bytes > free:
        why = f"{_LIMIT} allows {limit / 2**30:.1f}" if free == limit else f"{free / 2**30:.1f} are free"
        raise DoesNotFit(f"does not fit: {what} take {needed_bytes / 2**30:.1f} GiB of host memory, {why}")
    _HOST.taken_bytes = max(_HOST.taken_bytes, needed_bytes)


def bytes_of(tree: Any) -> int:
    """Count the bytes of arrays or shapes; on a mesh those of one device's shards."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(layout.shard_shape(leaf)) * leaf.dtype.itemsize for leaf in leaves)
