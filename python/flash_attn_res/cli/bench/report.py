"""`flash-attn-res report`: tables and plots from result files alone.

In a page of README or docs a table stands between "<!-- generated: NAME -->" and
"<!-- end of generated: NAME -->"; NAME is one of :data:`tables.TABLES`, or `demo`, `demo gpu`,
`torch_versions` or `plots`. It is that of the GPU that was measured last; "NAME all" has the tables
of all GPUs.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flash_attn_res.cli.bench.harness import load_results
from flash_attn_res.cli.bench.plots import (
    PLOTS,
    Picture,
    Plot,
    demo_pictures,
    lens_picture,
    picture,
)
from flash_attn_res.cli.bench.tables import TABLES, demo, missing, torch_versions
from flash_attn_res.cli.checkpoint import make_folder, write_atomically
from flash_attn_res.cli.device import checkout
from flash_attn_res.cli.errors import CliError, need

BLOCK = re.compile(
    r"<!-- generated: (\w+(?: all| gpu)?) -->\n.*?<!-- end of generated: \1 -->", re.S
)
IMAGES = "docs/images"
Made = TypeVar("Made")


def run_report(arguments: argparse.Namespace) -> int:
    """0, or 1 where --check finds a table or a picture that is not that of the results."""
    need("matplotlib")
    folder = Path(arguments.results) if arguments.results else default_folder()
    if not folder.is_dir():
        raise CliError(f"--results: {folder} is no folder; flash-attn-res bench makes one")
    found = load_all(folder)
    pages = folder.resolve().parent.parent  # of a checkout: ROOT/benchmarks/results
    if folder.resolve().parent.name == "benchmarks" and (pages / "README.md").is_file():
        return _fill_pages(Results(folder, found), pages, check=arguments.check)
    if not found:
        quick = folder / "quick"
        hint = f"; those of a quick run are in {quick}" if quick.is_dir() else ""
        raise CliError(f"--results: {folder} has no result files of flash-attn-res bench{hint}")
    return _write_report(folder, found, check=arguments.check)


def default_folder() -> Path:
    """What `bench` has left here; else, for who is inside of the checkout, its results.

    From elsewhere the pages of a checkout are nobody's business.
    """
    here, root = Path("benchmark-results"), checkout()
    if here.is_dir() or root is None or not Path.cwd().is_relative_to(root):
        return here
    return root / "benchmarks" / "results"


DEMOS = {"demo": "demo.json", "demo gpu": "demo-gpu.json"}
"""Runs of `train`, on a CPU and on a GPU."""


class Results:
    """The result files of a folder: of a GPU rather than of a CPU, the newest first."""

    def __init__(self, folder: Path, found: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self._found = found

    def of(self, suite: str) -> list[dict[str, Any]]:
        """Those of a suite."""
        there = [document for document in self._found.values() if document["suite"] == suite]
        there = [document for document in there if not document.get("quick")]
        there.sort(key=lambda document: str(document["date"]), reverse=True)
        return sorted(there, key=lambda document: bool(document["driver"] == "none"))

    def for_plot(self, plot: Plot) -> dict[str, Any] | None:
        """The first that has what the plot shows."""
        return next((d for d in self.of(plot.suite) if made(d, "plot", plot.select, d)), None)

    def demo(self, name: str = "demo") -> dict[str, Any] | None:
        """What the demo has left: the summary.json of a run of `train`."""
        return self._other(DEMOS[name])

    def tested(self) -> dict[str, Any] | None:
        """The outcome of the Python tests by PyTorch: what tools/test_with_torch has left."""
        return self._other("torch-versions.json")

    def _other(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return {**read_json(path), "file": str(path)} if path.exists() else None

    def pictures(self) -> list[Picture]:
        """All that there is something to draw from."""
        found = [
            picture(name, document)
            for name, plot in PLOTS.items()
            if (document := self.for_plot(plot))
        ]
        if summary := self.demo():
            found += made(summary, "figures", demo_pictures, summary)
        if seen := self._other("depth-lens.json"):
            found.append(made(seen, "picture", lens_picture, seen))
        return found


def made(document: Mapping[str, Any], what: str, make: Callable[..., Made], *given: Any) -> Made:
    """What is made of a document, or an error that names its file."""
    try:
        return make(*given)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        lacks = f"a row lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CliError(
            f"{document['file']}: the {what} of {document.get('suite', 'the file')} cannot be "
            f"made: {lacks}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CliError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CliError(f"{path}: cannot be read: no JSON object")
    return value


def load_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Result files by their name without suffix; other JSON files are passed over."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if "rows" in read_json(path):  # neither the demo's summary nor the C++ benchmark's
            found[path.stem] = {**load_results(path), "file": str(path)}
    return found


def block(name: str, results: Results) -> str:
    """What stands in the place called ``name``."""
    if name == "plots":
        return plots_block(results)
    if name in DEMOS:
        summary = results.demo(name)
        return made(summary, "table", demo, summary) if summary else "Run `make demo`."
    if name == "torch_versions":
        tested = results.tested()
        return made(tested, "table", torch_versions, tested) if tested else "Not tested yet."
    name, _, everywhere = name.partition(" ")
    if name not in TABLES:
        raise CliError(f"a page asks for the table {name!r}; known: {', '.join(TABLES)}")
    suite, table, command = TABLES[name]
    documents = [document for document in results.of(suite) if document["rows"]]
    if not documents:
        return missing(command)
    shown = documents[: None if everywhere else 1]
    return "\n\n".join(made(document, "table", table, document) for document in shown)


def plots_block(results: Results) -> str:
    """All pictures, and which have no data."""
    lines = []
    for name, plot in PLOTS.items():
        if results.for_plot(plot):
            lines.append(f"![{plot.text}](images/{name}.png)")
        else:
            lines.append(f"{plot.text}. {missing(plot.command)}")
    return "\n\n".join(lines)


def _fill_pages(results: Results, root: Path, *, check: bool) -> int:
    stale = []
    for page in [root / "README.md", *sorted(root.glob("docs/*.md"))]:
        text = page.read_text()
        filled = BLOCK.sub(
            lambda match: (
                f"<!-- generated: {match[1]} -->\n{block(match[1], results)}\n"
                f"<!-- end of generated: {match[1]} -->"
            ),
            text,
        )
        if filled != text:
            stale.append(str(page.relative_to(root)))
            if not check:
                write_atomically(page, filled.encode())
    drawn = {f"{IMAGES}/{each.name}.png": each for each in results.pictures()}
    if check:
        stale += [name for name, each in drawn.items() if not each.is_at(root / name)]
        if stale:
            print(f"report: {', '.join(stale)} differ from the results: run make report")
        return 1 if stale else 0
    print(f"filled {', '.join(stale)}" if stale else "all tables were up to date")
    for name, plot in PLOTS.items():
        if results.for_plot(plot) is None:
            print(f"skipped {name}: {missing(plot.command)}")
    _draw(root, drawn)
    return 0


def _draw(folder: Path, pictures: Mapping[str, Picture]) -> None:
    """Into files that their names place in the folder."""
    for name, each in pictures.items():
        path = folder / name
        make_folder("report", path.parent)
        made(each.document, "plot", each.save, path)
        print(f"drew {name}")


def _write_report(folder: Path, found: dict[str, dict[str, Any]], *, check: bool) -> int:
    """`report.md` and the plots beside the results, file by file."""
    parts = ["# Benchmark results"]
    pictures = {}
    for stem, document in found.items():
        suite = document["suite"]
        parts.append(f"## {suite}, {document['device']}")
        if document.get("quick"):
            parts.append("A quick run: small cases, few rounds.")
        for own, table, _ in TABLES.values():
            if own == suite and document["rows"]:
                parts.append(made(document, "table", table, document))
        for name, plot in PLOTS.items():
            if plot.suite != suite:
                continue
            if not made(document, "plot", plot.select, document):
                print(f"skipped {name} of {stem}: {missing(plot.command)}")
                continue
            pictures[f"{stem}-{name}.png"] = picture(name, document)
            parts.append(f"![{plot.text}]({stem}-{name}.png)")
        parts += _failures(document["rows"])
    text = "\n\n".join(parts) + "\n"
    path = folder / "report.md"
    if check:
        stale = [name for name, each in pictures.items() if not each.is_at(folder / name)]
        if not path.exists() or path.read_text() != text:
            stale.insert(0, path.name)
        if stale:
            names = ", ".join(str(folder / name) for name in stale)
            print(f"report: {names} differ from the results: run flash-attn-res report")
        return 1 if stale else 0
    _draw(folder, pictures)
    write_atomically(path, text.encode())
    print(f"wrote {path}")
    return 0


def _failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A list of what was not measured, once for each reason."""
    reasons = dict.fromkeys(f"- {row['package']}: {row['error']}" for row in rows if "error" in row)
    return ["Not measured:\n\n" + "\n".join(reasons)] if reasons else []
