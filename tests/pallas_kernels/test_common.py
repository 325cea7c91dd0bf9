"""The choice of an implementation, and what importing the kernels costs."""

import ast
from pathlib import Path

import pytest

import pallas_kernels
from pallas_kernels.common import choose_implementation, device_reason

PACKAGE = Path(pallas_kernels.__file__).parent


def choose(implementation, reasons):
    def reason(name):
        return device_reason(name, ("xla", "fast", "fastest"), interpret=True) or reasons.get(name)

    return choose_implementation(implementation, ("fastest", "fast", "xla"), reason)


def test_the_best_that_can_do_it_is_chosen():
    assert choose(None, {}) == "fastest"
    assert choose(None, {"fastest": "no"}) == "fast"
    assert choose(None, {"fastest": "no", "fast": "no"}) == "xla"
    assert choose("fast", {"fastest": "no"}) == "fast"


def test_what_is_named_is_never_replaced():
    with pytest.raises(NotImplementedError, match="implementation='fast': needs a faster device"):
        choose("fast", {"fast": "needs a faster device"})
    with pytest.raises(ValueError, match="unknown implementation 'cuda', choose from xla, fast, fastest"):
        choose("cuda", {})


def imported_at_once(path: Path) -> set[str]:
    """Modules that a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_mosaic_and_triton_are_imported_where_they_are_launched():
    """Mosaic GPU takes more time to import than everything else here; triton is an extra."""
    slow = (
        "jax.experimental.pallas.mosaic_gpu",
        "triton",
        "pallas_kernels.span_decode.mosaic",
        "pallas_kernels.prompt_attention.mosaic",
        "pallas_kernels.sequence_attention.mosaic",
    )
    users = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if imported_at_once(path) & set(slow)}
    assert users == {"linear/mosaic.py", "span_decode/mosaic.py", "prompt_attention/mosaic.py", "sequence_attention/mosaic.py"}
