"""An opt-in check for overflow: which call, which tensor, and whether it happened there.

float16 ends at 65504. A running sum or a gradient that grows past it becomes infinite when it is
stored, never clipped, and everything after it is infinite or not a number. The check looks at the
results of every call where they arise. It waits for the device after each call: for finding a
fault, not for training.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

_VARIABLE = "FLASH_ATTN_RES_CHECK_FINITE"

Named: TypeAlias = Iterable[tuple[str, Tensor | None]]

# Of the process, not of a thread: autograd runs backward passes on threads of its own.
_depth = 0


def _of_environment() -> bool:
    value = os.environ.get(_VARIABLE, "0")
    if value not in ("0", "1", ""):
        raise ValueError(f"{_VARIABLE} is {value!r}, expected 0 or 1")
    return value == "1"


_always = _of_environment()


@contextlib.contextmanager
def check_finite() -> Iterator[None]:
    """While it is open, every result of ``attend``, ``read`` and a stream must be finite.

    Backward passes that run inside are checked, too. The environment variable
    ``FLASH_ATTN_RES_CHECK_FINITE=1`` opens it for the whole process.

    .. code-block:: python

        with flash_attn_res.check_finite():
            loss = model(tokens)
            loss.backward()

    Raises:
        FloatingPointError: from the call whose result is not finite; the text names the call (of a
            stream: the site), the tensor, its dtype, the first such element, and the inputs that
            were not finite already, if any.
        RuntimeError: a call is being compiled or captured into a CUDA graph, where values cannot be
            looked at.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def enabled() -> bool:
    """Whether results are to be checked."""
    return _always or _depth > 0


def check(where: str, results: Named, inputs: Named) -> None:
    """Raises for the first of ``results`` that is not finite; call it when :func:`enabled`."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing:
        raise RuntimeError(
            f"{where}: check_finite cannot look at values while they are compiled or captured"
        )
    for name, value in results:
        if value is None or _finite(value):
            continue
        bad = ~value.isfinite()
        place = bad.nonzero()[0].tolist()
        dtype = str(value.dtype).removeprefix("torch.")
        text = (
            f"{where}: {name} ({dtype}, shape {list(value.shape)}) is not finite in "
            f"{int(bad.sum())} of {value.numel()} elements, first {value[tuple(place)].item()} at "
            f"{place}"
        )
        already = [n for n, given in inputs if given is not None and not _finite(given)]
        if already:
            text += f"; these inputs were not finite already: {', '.join(already)}"
        else:
            text += (
                f"; all inputs are finite, so it overflowed here: the largest {dtype} is "
                f"{torch.finfo(value.dtype).max:g}"
            )
        raise FloatingPointError(text)


def numbered(name: str, values: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    """``name[i]`` for each of the values."""
    return [(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())
