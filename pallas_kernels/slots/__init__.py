"""Lists of the pool rows that each sequence attends to, kept up to date on the device."""

from pallas_kernels.slots.api import Rule, unsupported_reason, update_slots, write_elements

__all__ = ["Rule", "unsupported_reason", "update_slots", "write_elements"]
