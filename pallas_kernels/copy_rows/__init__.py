"""Copies of rows from pools in host memory, or of the device, to pools of the device, inside of a compiled program."""

from pallas_kernels.copy_rows.api import Copies, copy_rows, unsupported_reason
from pallas_kernels.copy_rows.reference import SHARES

__all__ = ["SHARES", "Copies", "copy_rows", "unsupported_reason"]
