"""The choice of what a working set holds: which rows of host memory get a row on the device, and which give theirs up."""

from pallas_kernels.place_rows.api import Placement, Wanted, place_rows, unsupported_reason

__all__ = ["Placement", "Wanted", "place_rows", "unsupported_reason"]
