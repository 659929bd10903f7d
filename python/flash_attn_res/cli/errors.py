"""The one exception that the commands turn into one line on stderr and an exit code."""

from __future__ import annotations

import importlib.util


class CliError(Exception):
    """Something that the user can correct: `main` prints the message and returns `exit_code`."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def need(package: str) -> None:
    """Finds out before the work whether a package is there that is imported after it."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
