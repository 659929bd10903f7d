"""One hash over every file that decides what the GPU does, to tell whether test results are stale.

Usage: source_hash.py    prints the hash
"""

from __future__ import annotations

import hashlib
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("include", "src/common", "src/cuda", "bindings")
SUFFIXES = {".h", ".in", ".cpp", ".cu", ".cuh"}


# A comment, or a literal that may look like one.
COMMENT = re.compile(rb'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)


def source_hash(root: pathlib.Path = ROOT) -> str:
    """SHA-256 over the names and words of the sources behind the CUDA operators.

    Comments do not count, nor how code is broken into lines: the compiler sees neither.
    """
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                digest.update(path.relative_to(root).as_posix().encode() + b"\0")
                digest.update(hashlib.sha256(_words(path.read_bytes())).digest())
    return digest.hexdigest()


def _words(source: bytes) -> bytes:
    """The words of the code, and where its directives end."""
    code = COMMENT.sub(lambda m: b" " if m[0].startswith(b"/") else m[0], source)
    words: list[bytes] = []
    for line in code.splitlines():
        words += line.split()
        if line.lstrip().startswith(b"#") or line.endswith(b"\\"):
            words.append(b"\n")
    return b" ".join(words)


def has_cuda_kernels(root: pathlib.Path = ROOT) -> bool:
    """Whether there is CUDA code at all."""
    return any((root / "src" / "cuda").rglob("*.cu"))


if __name__ == "__main__":
    print(source_hash())
