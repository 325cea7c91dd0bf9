from pallas_kernels.slots.api import update_row_lists

__all__ = ["update_row_lists"]
