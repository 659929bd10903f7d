"""Fails when a hot kernel keeps registers in local memory ("spills").

Usage: check_spills.py BUILD_LOG HOT_KERNELS

BUILD_LOG holds what `nvcc -Xptxas=-v` printed. HOT_KERNELS has one regular expression a line ('#'
starts a comment), searched for in the demangled kernel names. A line that matches no kernel is an
error as well: a renamed kernel must not leave the check by accident.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess
import sys

ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<arch>[^']+)'")
# The line of the report below an entry, not the warnings of --warn-on-spills, which come before all
# entries of their file and would count for the last kernel of the file before.
SPILLS = re.compile(
    r"bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")


@dataclasses.dataclass
class Kernel:
    """What ptxas says of one kernel on one architecture."""

    mangled: str
    arch: str
    name: str = ""
    spilled: int = 0
    registers: int = 0


def read_log(text: str) -> list[Kernel]:
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(entry["name"], entry["arch"]))
        elif kernels and (spills := SPILLS.search(line)):
            kernels[-1].spilled = int(spills["stores"]) + int(spills["loads"])
        elif kernels and (used := REGISTERS.search(line)):
            kernels[-1].registers = int(used["registers"])
    names = subprocess.run(
        ["c++filt"],
        input="\n".join(kernel.mangled for kernel in kernels),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for kernel, name in zip(kernels, names, strict=True):
        kernel.name = name
    return kernels


def main(log: str, hot_kernels: str) -> int:
    kernels = read_log(pathlib.Path(log).read_text(errors="replace"))
    lines = pathlib.Path(hot_kernels).read_text().splitlines()
    patterns = [line.split("#")[0].strip() for line in lines]
    patterns = [pattern for pattern in patterns if pattern]
    ok = True
    for pattern in patterns:
        hot = [kernel for kernel in kernels if re.search(pattern, kernel.name)]
        spilling = [kernel for kernel in hot if kernel.spilled]
        most = max((kernel.registers for kernel in hot), default=0)
        print(f"{pattern}: {len(hot)} kernels, {most} registers at most, {len(spilling)} spill")
        if not hot:
            print(f"    no kernel of the build matches '{pattern}'")
            ok = False
        for kernel in spilling:
            print(f"    {kernel.spilled} bytes of spills on {kernel.arch}: {kernel.name}")
            ok = False
    return 0 if ok else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2]))
