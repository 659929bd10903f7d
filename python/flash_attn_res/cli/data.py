"""Text as bytes: which files, how they are split, and the batch of every step.

Everything here is a pure function of its arguments. Files are put in the order of a hash of their
names, so that neither the file system nor the machine decides what is trained on; the batch of a
step depends on the seed and the step alone, so that a resumed run needs no data position.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash_attn_res.cli.errors import CliError

#: Stands between two files, and before the first: where a text begins.
BOUNDARY = b"\0"

#: Of the default text at most this much is used; named files are used whole.
DEFAULT_TEXT_LIMIT = 16 * 2**20

_VALIDATION_SHARE = 0.05
_VALIDATION_SHARE_LIMIT = 0.10

# Folders of the standard library that are no readable library code: tests, tables, vendored tools.
_SKIPPED_FOLDERS = {
    *("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"),
    *("encodings", "ensurepip", "lib2to3", "pydoc_data", "turtledemo"),
}


@dataclass(frozen=True)
class TextFile:
    """A file and the name that it is ordered by."""

    name: str
    path: Path


@dataclass(frozen=True)
class Corpus:
    """Training and validation bytes, and what they were made of."""

    train: Tensor  # [bytes] uint8
    validation: Tensor  # [bytes] uint8
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]  # empty when the split is by position
    digest: str  # SHA-256 of both parts: tells a resumed run that the text is the same


def standard_library_files() -> list[TextFile]:
    """The Python sources of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        skipped = _SKIPPED_FOLDERS.intersection(relative.parts[:-1])
        if not skipped and not path.name.startswith("_sysconfigdata") and path.is_file():
            files.append(TextFile(relative.as_posix(), path))
    if not files:
        raise CliError(f"--text: no Python sources in {root}; name text files with --text")
    return files


def named_files(arguments: Sequence[str]) -> list[TextFile]:
    """The files that `--text` names; a folder stands for all files in it that hold text."""
    files = []
    for argument in arguments:
        root = Path(argument)
        if root.is_dir():
            inside = [
                TextFile(path.relative_to(root).as_posix(), path)
                for path in root.rglob("*")
                if path.is_file()
                and not any(part.startswith(".") for part in path.relative_to(root).parts)
            ]
            inside = [file for file in inside if BOUNDARY not in _read(file.path)]
            if not inside:
                raise CliError(f"--text: the folder {argument} holds no text files")
            files += inside
        elif not root.exists():
            raise CliError(f"--text: the file {argument} does not exist")
        elif not _read(root):
            raise CliError(f"--text: the file {argument} is empty")
        else:
            files.append(TextFile(root.name, root))
    return files


def load_corpus(arguments: Sequence[str], seq_len: int) -> Corpus:
    """Reads, orders and splits the text; no arguments: the standard library.

    The split is by file. One file, or files of which none is small enough for the validation
    part, are split by position: the last tenth validates.
    """
    files = named_files(arguments) if arguments else standard_library_files()
    files.sort(key=lambda file: (_hash(file.name), str(file.path)))
    texts = [(file.name, _read(file.path)) for file in files]
    if not arguments:
        texts = _limited(texts, DEFAULT_TEXT_LIMIT)

    train, validation = _split_by_file(texts)
    joined_train, joined_validation = _join(train), _join(validation)
    if len(joined_validation) <= seq_len:
        whole = _join(texts)
        cut = len(whole) - len(whole) // 10
        train, validation = texts, []
        joined_train, joined_validation = whole[:cut], whole[cut:]
    needed = seq_len + 1
    if len(joined_train) < needed or len(joined_validation) < needed:
        raise CliError(
            f"--text: too short: {len(joined_train)} bytes to train on and "
            f"{len(joined_validation)} to validate on, each must hold at least one sequence of "
            f"--seq-len + 1 = {needed} bytes"
        )
    digest = hashlib.sha256(_hash_bytes(joined_train) + _hash_bytes(joined_validation)).hexdigest()
    return Corpus(
        train=_tensor(joined_train),
        validation=_tensor(joined_validation),
        train_files=tuple(name for name, _ in train),
        validation_files=tuple(name for name, _ in validation),
        digest=digest,
    )


def training_batch(
    text: Tensor, *, seed: int, step: int, batch: int, seq_len: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets [batch, seq_len] int64 of a step: windows at random places."""
    generator = torch.Generator().manual_seed(int(_hash(f"{seed}/{step}")[:15], 16))
    starts = torch.randint(len(text) - seq_len, (batch,), generator=generator)  # [batch]
    return _windows(text, starts, seq_len)


def validation_batches(
    text: Tensor, *, windows: int, batch: int, seq_len: int
) -> list[tuple[Tensor, Tensor]]:
    """At most `windows` evenly spread windows without overlap, as a list of batches."""
    fitting = (len(text) - 1) // seq_len
    count = max(1, min(windows, fitting))
    starts = (torch.arange(count) * fitting // count) * seq_len  # [windows]
    return [_windows(text, part, seq_len) for part in torch.split(starts, batch)]


def _windows(text: Tensor, starts: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    positions = starts[:, None] + torch.arange(seq_len + 1)  # [batch, seq_len + 1]
    window = text[positions].long()
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def _split_by_file(
    texts: list[tuple[str, bytes]],
) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """Gives files to the validation part, in order, until it has its share."""
    total = sum(len(text) for _, text in texts)
    train, validation, taken = [], [], 0
    for name, text in texts:
        fits = taken + len(text) <= total * _VALIDATION_SHARE_LIMIT
        if taken < total * _VALIDATION_SHARE and fits:
            validation.append((name, text))
            taken += len(text)
        else:
            train.append((name, text))
    return train, validation


def _limited(texts: list[tuple[str, bytes]], limit: int) -> list[tuple[str, bytes]]:
    kept, total = [], 0
    for name, text in texts:
        if total + len(text) <= limit:
            kept.append((name, text))
            total += len(text)
    return kept


def _join(texts: list[tuple[str, bytes]]) -> bytes:
    return b"".join(BOUNDARY + text for _, text in texts)


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CliError(f"--text: cannot read {path}: {error.strerror}") from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_bytes(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
