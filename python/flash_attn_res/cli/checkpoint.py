"""Checkpoints and weights: safetensors files that are replaced whole and checked when read.

A checkpoint holds every variant of a run at the same step: tensors `<variant>/model/<name>` and
`<variant>/optimizer/<index>/<name>`, and in the metadata, as JSON, the options of the run, the
step and the curves so far. A weights file holds one model under its own names, with the model's
configuration in the metadata. Neither contains code, so that loading one is harmless.

Both carry a SHA-256 over names, shapes, dtypes, bytes and JSON: a flipped bit is found, which
safetensors itself would not notice.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flash_attn_res.cli.errors import CliError

CHECKPOINT = "flash-attn-res checkpoint 1"
WEIGHTS = "flash-attn-res weights 1"


def write(path: Path, kind: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes the file under another name first, so that `path` is never half a file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    metadata = {"kind": kind, "state": text, "sha256": _digest(tensors, text)}
    write_atomically(path, save(tensors, metadata))


def read(path: Path) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Kind, tensors and state of a file; a `CliError` that names the file when it is unusable."""
    if not path.is_file():
        raise CliError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CliError(f"{path}: damaged, or no safetensors file ({error})") from error
    if metadata.get("kind") not in (CHECKPOINT, WEIGHTS) or "state" not in metadata:
        raise CliError(f"{path}: a safetensors file, but not one that this program wrote")
    if _digest(tensors, metadata["state"]) != metadata.get("sha256"):
        raise CliError(f"{path}: damaged (its contents do not match its checksum)")
    state: dict[str, Any] = json.loads(metadata["state"])
    return metadata["kind"], tensors, state


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by a file that holds `data`, or leaves it as it was."""
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise CliError(f"cannot write {path}: {error.strerror}") from error


def check_file(flag: str, path: Path) -> None:
    """Finds out before the work, by writing, whether the file that an option names can be written.

    What permissions say is not enough: root has them all, on a file system that is read-only too.
    """
    if path.is_dir():
        raise CliError(f"{flag}: {path} is a folder, expected a file")
    if not path.parent.is_dir():
        raise CliError(f"{flag}: the folder {path.parent} does not exist")
    _probe(flag, path.parent, path)


def make_folder(flag: str, folder: Path) -> None:
    """Makes the folder that an option names, and finds out now whether files can be written there.

    It is tried before the work whose results it is for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(flag, folder, error) from None
    _probe(flag, folder, folder)


def _probe(flag: str, folder: Path, named: Path) -> None:
    try:
        # With a byte in it: a full disk lets files be made.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable.") as file:
            file.write(b"\0")
    except OSError as error:
        raise _unwritable(flag, named, error) from None


def _unwritable(flag: str, path: Path, error: OSError) -> CliError:
    reason = error.strerror or os.strerror(error.errno or 0)
    return CliError(f"{flag}: cannot write to {path}: {reason}")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under names `<parameter index>/<state name>`."""
    return {
        f"{index}/{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undoes `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
