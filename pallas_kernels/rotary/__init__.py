from pallas_kernels.rotary.api import rotate_and_write

__all__ = ["rotate_and_write"]
