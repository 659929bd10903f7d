"""Argument checks of the Python API: what is wrong, with which argument, in shapes.

The compiled library checks again, in the same words; these run first so that a user sees
``ValueError`` or ``TypeError``, also under ``torch.compile`` and with fake tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

MAX_SOURCES = 512
MAX_QUERIES = 128
MAX_UPDATES = 2
MAX_STOCHASTIC_TERMS = 4
MAX_QUANTIZE_TERMS = 4

_STORAGE = (torch.float32, torch.bfloat16, torch.float16)


def shape_text(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def tensor(op: str, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected a torch.Tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} is {value.layout}, expected a dense tensor")
    no_tangent(op, name, value)
    return value


def no_tangent(op: str, name: str, given: Tensor) -> None:
    """Refuses a dual tensor: PyTorch drops tangents at an operator without a forward-mode rule."""
    if forward_ad._current_level < 0:  # none is under way
        return
    if forward_ad.unpack_dual(given).tangent is not None:
        raise NotImplementedError(
            f"{op}: {name} carries a tangent of forward-mode differentiation, which this package "
            "does not have; use backward or torch.autograd.grad"
        )


def is_fine(given: object, shape: torch.Size, like: Tensor) -> TypeGuard[Tensor]:
    """Whether a tensor of ``shape``, beside ``like``, passes every check: told in a microsecond."""
    return (
        isinstance(given, Tensor)
        and given.shape == shape
        and given.dtype == like.dtype
        and given.device == like.device
        and given.layout == torch.strided
        and forward_ad._current_level < 0
    )


def value(op: str, name: str, given: object, like_name: str, like: Tensor) -> Tensor:
    """A tensor [..., D] of the shape, device and kind of ``like``."""
    if is_fine(given, like.shape, like):
        return given
    checked = tensor(op, name, given)
    if checked.shape != like.shape:
        raise ValueError(
            f"{op}: {name} has shape {shape_text(checked)}, expected {shape_text(like)} like "
            f"{like_name}"
        )
    same_device(op, name, checked, like_name, like)
    value_dtype(op, name, checked)
    if (checked.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(
            f"{op}: {name} is {checked.dtype} but {like_name} is {like.dtype}: float64 does not "
            "mix with other dtypes"
        )
    return checked


def value_dtype(op: str, name: str, given: Tensor) -> None:
    if given.dtype not in _STORAGE and given.dtype != torch.float64:
        raise TypeError(
            f"{op}: {name} is {given.dtype}, expected float32, bfloat16, float16 "
            "(or float64, on the CPU)"
        )


def stream_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in _STORAGE and dtype != torch.float64:
        raise TypeError(f"{op}: dtype is {dtype}, expected float32, bfloat16, float16 or float64")


def result_dtype(op: str, name: str, dtype: object) -> None:
    """A dtype for a result; None leaves the choice to the operation."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: {name} is {dtype!r}, expected a torch.dtype")
    if dtype not in _STORAGE and dtype != torch.float64:
        raise TypeError(
            f"{op}: {name} is {dtype}, expected float32, bfloat16, float16 "
            "(or float64, with values of float64)"
        )


def leading(op: str, name: str, given: object) -> Tensor:
    """The value that the others are held against."""
    checked = tensor(op, name, given)
    if checked.dim() == 0 or checked.shape[-1] == 0:
        raise ValueError(
            f"{op}: {name} has shape {shape_text(checked)}, expected [..., D] with D >= 1"
        )
    value_dtype(op, name, checked)
    if checked.dtype == torch.float64 and checked.device.type != "cpu":
        raise TypeError(f"{op}: {name} is float64, which is computed on the CPU alone")
    return checked


def rounding_seed(op: str, name: str, given: int | Tensor, like_name: str, like: Tensor) -> Tensor:
    """Seed and step of stochastic rounding, an int64 tensor [2] on the device of ``like``."""
    if not isinstance(given, Tensor):
        return torch.tensor([integer(op, name, given), 0], dtype=torch.int64, device=like.device)
    state = given
    if state.dtype != torch.int64:
        raise TypeError(f"{op}: {name} is {state.dtype}, expected torch.int64")
    if state.shape != (2,):
        raise ValueError(f"{op}: {name} has shape {shape_text(state)}, expected [2]: seed and step")
    same_device(op, name, state, like_name, like)
    return state.contiguous()


def integer(op: str, name: str, given: object) -> int:
    if not isinstance(given, int) or isinstance(given, bool):
        raise TypeError(f"{op}: {name} is a {type(given).__name__}, expected an int")
    if not -(2**63) <= given < 2**63:
        raise ValueError(f"{op}: {name} is {given}, expected a number of 64 bits")
    return given


def same_device(op: str, name: str, given: Tensor, like_name: str, like: Tensor) -> None:
    if given.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {given.device} but {like_name} is on {like.device}: all tensors "
            "of a call must be on one device"
        )


def same_dtype(op: str, name: str, given: Tensor, like_name: str, like: Tensor) -> None:
    if given.dtype != like.dtype:
        raise TypeError(f"{op}: {name} is {given.dtype} but {like_name} is {like.dtype}")


def count(op: str, name: str, number: int, low: int, high: int) -> None:
    if not low <= number <= high:
        raise ValueError(f"{op}: {name} has {number} items, expected {low} to {high}")


def query(op: str, name: str, given: object, rank: int, like_name: str, like: Tensor) -> Tensor:
    """A query [R] (rank 1) or a stack of them [S, R] (rank 2) for values like ``like``."""
    checked = tensor(op, name, given)
    dim = like.shape[-1]
    wanted = "[R]" if rank == 1 else "[S, R]"
    if checked.dim() != rank or not 1 <= checked.shape[-1] <= dim:
        raise ValueError(
            f"{op}: {name} has shape {shape_text(checked)}, expected {wanted} with R from 1 to "
            f"{dim}, the width of {like_name} {shape_text(like)}"
        )
    if rank == 2:
        count(op, name, checked.shape[0], 1, MAX_QUERIES)
    if not checked.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} is {checked.dtype}, expected a floating dtype")
    same_device(op, name, checked, like_name, like)
    return checked


def key_weight(op: str, given: object, like_name: str, like: Tensor) -> Tensor:
    """A key weight that broadcasts over the query it is folded into: the same shape, or [R]."""
    checked = tensor(op, "key_weight", given)
    if checked.shape != like.shape and checked.shape != like.shape[-1:]:
        raise ValueError(
            f"{op}: key_weight has shape {shape_text(checked)}, expected {shape_text(like)} like "
            f"{like_name}, or [{like.shape[-1]}]"
        )
    same_device(op, "key_weight", checked, like_name, like)
    return checked


def weight(op: str, name: str, given: object, like_name: str, like: Tensor) -> Tensor:
    """A norm weight [D]."""
    if is_fine(given, like.shape[-1:], like):
        return given
    checked = tensor(op, name, given)
    if checked.shape != like.shape[-1:]:
        raise ValueError(
            f"{op}: {name} has shape {shape_text(checked)}, expected [{like.shape[-1]}], the width "
            f"of {like_name} {shape_text(like)}"
        )
    same_device(op, name, checked, like_name, like)
    value_dtype(op, name, checked)
    return checked


def no_transform(op: str) -> None:
    """Refuses ``torch.func`` transforms, which know no rule for the operators: jvp would give 0."""
    if torch.compiler.is_compiling():  # the transform itself is traced, and refuses them
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{op}: a transform of torch.func (grad, vmap, jvp, ...) is active, expected none: "
            "gradients are those of torch.autograd; torch.func.functional_call works"
        )


# Comparisons rather than math.isfinite: torch.compile may trace these with symbolic numbers.


def number_of(op: str, name: str, given: object) -> None:
    known = isinstance(given, (int, float, torch.SymFloat, torch.SymInt))
    if not known and not hasattr(given, "__float__"):
        raise TypeError(f"{op}: {name} is {given!r}, expected a number")


def positive(op: str, name: str, number: float) -> float:
    number_of(op, name, number)
    if not 0 < number < math.inf:
        raise ValueError(f"{op}: {name} is {number}, expected a number > 0")
    return number


def finite(op: str, name: str, number: float) -> float:
    number_of(op, name, number)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{op}: {name} is {number}, expected a finite number")
    return number


def positive_int(op: str, name: str, number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{op}: {name} is {number!r}, expected an integer")
    if number < 1:
        raise ValueError(f"{op}: {name} is {number}, expected at least 1")
    return number


def sequence(op: str, name: str, given: object) -> Sequence[object]:
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        raise TypeError(f"{op}: {name} is a {type(given).__name__}, expected a list of tensors")
    return given
