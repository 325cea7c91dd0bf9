"""Bookkeeping of sequences on the device, in one launch: numbers of theirs, and lists of the pool rows that each of them attends to."""

from pallas_kernels.slots.api import Rule, per_sequence, read_elements, read_largest, unsupported_reason, update_slots, write_elements
from pallas_kernels.slots.reference import ELSEWHERE

__all__ = ["ELSEWHERE", "Rule", "per_sequence", "read_elements", "read_largest", "unsupported_reason", "update_slots", "write_elements"]
