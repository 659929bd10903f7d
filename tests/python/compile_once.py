"""A compiler launcher that takes the object file of another build where it would be the same.

    compile_once.py KNOWN.json COMPILER ARGUMENTS...

KNOWN.json is what `known` of this file wrote of the other build. Its object is taken where flags
and preprocessed source are the same, so that a source distribution is configured, preprocessed and
linked as its user would, in a fraction of the time. Everything else is compiled.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

LEFT_OUT = {"-o": 2, "-c": 1, "-MD": 1, "-MT": 2, "-MF": 2}  # and how many arguments each takes up


def known(root: pathlib.Path, build: pathlib.Path, path: pathlib.Path) -> bool:
    """Writes what the Ninja build of the sources in ``root`` runs, by object; false without one.

    The build is brought up to date first.
    """
    cache = build / "CMakeCache.txt"
    ninja = re.search(r"^CMAKE_MAKE_PROGRAM:\w+=(.*ninja.*)$", read(cache), re.MULTILINE)
    if ninja is None or not pathlib.Path(ninja[1]).exists():
        return False
    run = {"cwd": build, "capture_output": True, "text": True, "check": True}
    subprocess.run([ninja[1], "flash_attn_res_torch"], **run)
    answer = subprocess.run([ninja[1], "-t", "compdb"], **run).stdout
    commands = {entry["output"]: entry["command"] for entry in json.loads(answer)}
    path.write_text(json.dumps({"root": str(root), "build": str(build), "commands": commands}))
    return True


def read(path: pathlib.Path) -> str:
    return path.read_text() if path.exists() else ""


def flags_of(command: list[str]) -> list[str]:
    """The command without what differs between preprocessing and compiling."""
    flags, rest = [], iter(command)
    for word in rest:
        if word in LEFT_OUT:
            for _ in range(LEFT_OUT[word] - 1):
                next(rest)
        else:
            flags.append(word)
    return flags


def preprocessed(flags: list[str], folder: str | None = None) -> bytes:
    done = subprocess.run([*flags, "-E", "-P"], cwd=folder, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else b""


def named(words: list[str], names: dict[str, str]) -> list[str]:
    for path, name in names.items():
        words = [word.replace(path, name) for word in words]
    return words


def same_object(other: dict, output: str, command: list[str]) -> pathlib.Path | None:
    """The finished object that compiling would make once more, or None."""
    theirs = shlex.split(other["commands"].get(output, ""))
    if command[0] not in theirs:
        return None
    theirs = flags_of(theirs[theirs.index(command[0]) :])  # before it there may be a launcher
    ours = flags_of(command)
    name = os.path.relpath(theirs[-1], other["root"])
    root = ours[-1].removesuffix(name).rstrip("/")
    # PyTorch may lie in the tree's environment, and so below a root.
    names = {os.getcwd(): "BUILD", other["build"]: "BUILD", root: "ROOT", other["root"]: "ROOT"}
    if named(ours, names) != named(theirs, names):
        return None
    text = preprocessed(ours)
    if not text or text != preprocessed(theirs, other["build"]):
        return None
    return pathlib.Path(other["build"]) / output


if __name__ == "__main__":
    path, *command = sys.argv[1:]
    output = command[command.index("-o") + 1] if "-o" in command else ""
    found = same_object(json.loads(pathlib.Path(path).read_text()), output, command)
    if found is None:
        os.execvp(command[0], command)
    shutil.copyfile(found, output)
