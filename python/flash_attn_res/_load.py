"""Loads the compiled operators next to this file."""

from __future__ import annotations

import pathlib

import torch

_NAME = "flash_attn_res_torch.so"


def load_operators() -> pathlib.Path:
    """Registers ``torch.ops.flash_attn_res`` and returns the path of the library that does.

    Raises:
        ImportError: the library is missing or cannot be loaded; the text says which and why.
    """
    path = pathlib.Path(__file__).with_name(_NAME)
    if not path.exists():
        # An editable install keeps the compiled file in the environment, beside its metadata.
        path = _installed_path() or path
    if not path.exists():
        raise ImportError(
            f"flash_attn_res: the compiled operators {_NAME} are missing from {path.parent}; "
            "build and install the package with 'pip install .'"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"flash_attn_res: {path} cannot be loaded by PyTorch {torch.__version__} "
            f"(2.10 or later is needed): {error}"
        ) from error
    return path


def _installed_path() -> pathlib.Path | None:
    from importlib import metadata

    try:
        files = metadata.files("flash-attn-res") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == _NAME:
            return pathlib.Path(str(file.locate()))
    return None
