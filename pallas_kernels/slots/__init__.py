"""Lists of the pool rows that each sequence attends to, kept up to date on the device."""

from pallas_kernels.slots.api import unsupported_reason, update_slots

__all__ = ["unsupported_reason", "update_slots"]
