"""Which devices a kernel can run on."""

import jax


def device_reason(least_capability: int) -> str | None:
    """Why the default device cannot run a kernel that needs a compute capability (80: Ampere, 90: Hopper); None when it can."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "").replace(".", "")  # "90"; "gfx942" on AMD devices
    if device.platform != "gpu" or not capability.isdigit():
        return f"needs a CUDA device, the default device is a {device.device_kind} (interpret=True runs anywhere)"
    if int(capability) < least_capability:
        return f"needs compute capability {least_capability / 10}, {device.device_kind} has {int(capability) / 10}"
    return None
