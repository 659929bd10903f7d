"""The C API on torch tensors, for what the PyTorch operators do not reach.

Every function of ``flash_attn_res/c_api.h`` takes a struct; :class:`Call` fills one from keyword
arguments: a 2-D tensor becomes a view, a list of tensors a list of views, and the device of the
tensors the device of the call. float64 tensors on the CPU get the double-precision reference.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parents[2]

DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}
STATUS = {1: "invalid argument", 2: "workspace too small", 3: "unsupported device", 4: "CUDA error"}


class NativeError(RuntimeError):
    """A call returned a status that is not OK."""


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class Context(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("device", Device),
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("executor", ctypes.c_void_p),
    ]


_LIST = ctypes.POINTER(Matrix)
_DEFAULTS = {"scale": 1.0, "eps": 1e-6, "norm_eps": 1e-6}


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A struct from a list of members: ``m`` a view, ``l`` a list and its count, ``d`` a double,
    ``i`` an int32."""
    kinds = {"m": Matrix, "d": ctypes.c_double, "i": ctypes.c_int32}
    members: list[tuple[str, type]] = [("struct_size", ctypes.c_size_t)]
    for field in fields.split():
        kind, member = field.split(":")
        if kind == "l":
            members += [(member, _LIST), (f"num_{member}", ctypes.c_int64)]
        else:
            members.append((member, kinds[kind]))
    return type(name, (ctypes.Structure,), {"_fields_": members})


ARGS = {
    "attend": _struct(
        "AttendArgs",
        "l:sources m:queries d:scale d:eps l:out m:lse m:logits m:inv_rms m:probs",
    ),
    "attend_backward": _struct(
        "AttendBackwardArgs",
        "l:sources m:queries d:scale m:lse m:logits m:inv_rms l:dout m:gate m:dlse l:dsources "
        "i:accumulate_dsources i:accumulate_dqueries m:dqueries",
    ),
    "read": _struct(
        "ReadArgs",
        "m:phase1_out m:phase1_lse l:sources m:partial l:updates m:query d:scale d:eps i:norm "
        "i:mix_rounding m:norm_weight d:norm_eps m:x m:partial_out m:mix m:logits m:inv_rms "
        "m:mix_inv_rms m:probs",
    ),
    "read_backward": _struct(
        "ReadBackwardArgs",
        "m:phase1_out l:sources m:partial m:query d:scale i:norm i:mix_rounding m:norm_weight "
        "m:logits m:inv_rms m:mix_inv_rms m:dx m:dmix m:dpartial_out m:dphase1_out m:dphase1_lse "
        "m:dh m:gate l:dsources m:dpartial m:dquery m:dnorm_weight i:accumulate_dsources "
        "i:accumulate_dquery i:accumulate_dnorm_weight i:reserved",
    ),
}


def library_path() -> pathlib.Path | None:
    """The shared C++ library: $FLASH_ATTN_RES_LIBRARY, or the newest one below build/."""
    if named := os.environ.get("FLASH_ATTN_RES_LIBRARY"):
        return pathlib.Path(named)
    found = [path for path in ROOT.glob("build/**/libflash_attn_res.so") if path.exists()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


@functools.cache
def library() -> ctypes.CDLL:
    path = library_path()
    assert path is not None
    loaded = ctypes.CDLL(str(path))
    loaded.flash_attn_res_last_error.restype = ctypes.c_char_p
    for op in ARGS:
        getattr(loaded, f"flash_attn_res_{op}_workspace_bytes").restype = ctypes.c_int64
    return loaded


def _view(tensor: Tensor) -> Matrix:
    assert tensor.dim() == 2, tensor.shape
    assert tensor.shape[1] <= 1 or tensor.stride(1) == 1, tensor.stride()
    return Matrix(tensor.data_ptr(), *tensor.shape, max(tensor.stride(0), 0), DTYPES[tensor.dtype])


class Call:
    """One call of ``op``, ready to run any number of times on the same arguments.

    Its workspace is filled with NaN first, so that reading what was not written shows.
    """

    def __init__(self, op: str, **given: object) -> None:
        self._op = op
        self._args = ARGS[op]()
        self._args.struct_size = ctypes.sizeof(self._args)
        self._keep: list[object] = [given.copy()]
        device = torch.device("cpu")
        for member, kind in self._args._fields_:
            value = given.pop(member, _DEFAULTS.get(member))
            if value is None or member == "struct_size":
                continue
            if kind is Matrix:
                assert isinstance(value, Tensor)
                device = value.device
                setattr(self._args, member, _view(value))
            elif kind is _LIST:
                assert isinstance(value, Sequence)
                array = (Matrix * max(len(value), 1))(*[_view(item) for item in value])
                self._keep.append(array)
                setattr(self._args, member, ctypes.cast(array, _LIST))
                setattr(self._args, f"num_{member}", len(value))
            elif not member.startswith("num_"):
                setattr(self._args, member, value)
        assert not given, f"{op} has no argument {', '.join(given)}"

        self._context = Context(struct_size=ctypes.sizeof(Context))
        if device.type == "cuda":
            self._context.device = Device(1, device.index or 0)
            self._context.stream = torch.cuda.current_stream(device).cuda_stream
        needed = getattr(library(), f"flash_attn_res_{op}_workspace_bytes")(
            ctypes.byref(self._args), self._context.device
        )
        workspace = torch.full((max(needed, 0) + 64,), 0xFF, dtype=torch.uint8, device=device)
        self._keep.append(workspace)
        self._context.workspace = workspace.data_ptr() + -workspace.data_ptr() % 64
        self._context.workspace_bytes = needed
        self._function = getattr(library(), f"flash_attn_res_{op}")

    def run(self) -> None:
        """Raises NativeError with the kind of error and the message of the library."""
        status = self._function(ctypes.byref(self._args), ctypes.byref(self._context))
        if status != 0:
            message = library().flash_attn_res_last_error().decode()
            raise NativeError(f"{STATUS.get(status, status)}: {message}")


def call(op: str, **given: object) -> None:
    """Runs ``op`` once."""
    Call(op, **given).run()
