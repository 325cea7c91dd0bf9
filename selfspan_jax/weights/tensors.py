"""Named tensors in files: shapes are compared with what is wanted before a tensor is read, and tensors are read one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from selfspan_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Tensors of a file or a directory."""

    where: Path
    """The file or directory, which errors name."""
    shapes: dict[str, tuple[int, ...]]
    """By name."""
    read: Callable[[str], Array]

    def check(self, wanted: Mapping[str, Any], ignored: Container[str] = ()) -> None:
        """Compare names and shapes with those of `wanted` (arrays, or shapes in their place); no tensor is read.

        Args:
          ignored: names that may be there although they are not wanted.

        Raises: UserError that names the first tensor that is missing, unknown or of another shape.
        """
        if missing := sorted(wanted.keys() - self.shapes.keys()):
            raise UserError(f"{self.where}: {len(missing)} tensors missing, {missing[0]} among them")
        if unknown := sorted(name for name in self.shapes.keys() - wanted.keys() if name not in ignored):
            raise UserError(f"{self.where}: {len(unknown)} tensors that the config does not know, {unknown[0]} among them")
        for name, array in wanted.items():
            if self.shapes[name] != array.shape:
                raise UserError(f"{self.where}: {name} is {list(self.shapes[name])}, but the config asks for {list(array.shape)}")


def open_safetensors(where: Path, files: Sequence[Path]) -> Tensors:
    """Open safetensors files, the shards of one model, and read their names and shapes.

    Raises: UserError for a file that is not in this format; FileNotFoundError.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    file_of: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "flax") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a mapping)
                    shapes[name], file_of[name] = tuple(shard.get_slice(name).get_shape()), file
        except SafetensorError as error:
            raise UserError(f"{file}: not a safetensors file ({error})") from error

    def read(name: str) -> Array:
        with safe_open(file_of[name], "flax") as shard:
            return shard.get_tensor(name)

    return Tensors(where, shapes, read)


def save_safetensors(file: Path, arrays: Mapping[str, jax.Array], metadata: dict[str, str] | None = None) -> None:
    """Write arrays to a safetensors file that everyone may read."""
    save_file(dict(arrays), file, metadata=metadata)
    file.chmod(0o644)  # the library gives it to its owner only
