"""`flash-attn-res report`: tables and plots from result files alone.

In a page of README or docs a table stands between "<!-- generated: NAME -->" and
"<!-- end of generated: NAME -->"; NAME is one of :data:`tables.TABLES`, or `demo`, or `plots`. It
is that of the GPU that was measured last; "NAME all" has the tables of all GPUs.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flash_attn_res.cli.bench.harness import load_results
from flash_attn_res.cli.bench.plots import PLOTS, Plot, save
from flash_attn_res.cli.bench.tables import TABLES, demo, missing
from flash_attn_res.cli.checkpoint import write_atomically
from flash_attn_res.cli.device import checkout
from flash_attn_res.cli.errors import CliError

BLOCK = re.compile(r"<!-- generated: (\w+(?: all)?) -->\n.*?<!-- end of generated: \1 -->", re.S)
IMAGES = "docs/images"


def run_report(arguments: argparse.Namespace) -> int:
    """0, or 1 where --check finds a table that is not that of the results."""
    root = checkout()
    if arguments.results:
        folder = Path(arguments.results)
    else:
        folder = root / "benchmarks" / "results" if root else Path("benchmark-results")
    if not folder.is_dir():
        raise CliError(f"--results: {folder} is no folder; flash-attn-res bench makes one")
    found = load_all(folder)
    pages = folder.resolve().parent.parent  # of a checkout: ROOT/benchmarks/results
    if folder.resolve().parent.name == "benchmarks" and (pages / "README.md").is_file():
        return _fill_pages(Results(folder, found), pages, check=arguments.check)
    if not found:
        raise CliError(f"--results: {folder} has no result files of flash-attn-res bench")
    return _write_report(folder, found, check=arguments.check)


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
        return next((document for document in self.of(plot.suite) if plot.select(document)), None)


def load_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Result files by their name without suffix; other JSON files are passed over."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            rows = json.loads(path.read_text()).get("rows")
        except (OSError, ValueError, AttributeError) as error:
            raise CliError(f"{path}: cannot be read: {error}") from None
        if rows is not None:  # neither the demo's summary nor the C++ benchmark's
            found[path.stem] = load_results(path)
    return found


def block(name: str, results: Results) -> str:
    """What stands in the place called ``name``."""
    if name == "plots":
        return plots_block(results)
    if name == "demo":
        path = results.folder / "demo.json"
        return demo(json.loads(path.read_text())) if path.exists() else "Run `make demo`."
    name, _, everywhere = name.partition(" ")
    if name not in TABLES:
        raise CliError(f"a page asks for the table {name!r}; known: {', '.join(TABLES)}")
    suite, table, command = TABLES[name]
    documents = [document for document in results.of(suite) if document["rows"]]
    if not documents:
        return missing(command)
    return "\n\n".join(table(document) for document in documents[: None if everywhere else 1])


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
    if check:
        if stale:
            print(f"report: {', '.join(stale)} differ from the results: run make report")
        return 1 if stale else 0
    print(f"filled {', '.join(stale)}" if stale else "all tables were up to date")
    for name, plot in PLOTS.items():
        document = results.for_plot(plot)
        if document is None:
            print(f"skipped {name}: {missing(plot.command)}")
            continue
        save(plot, document, root / IMAGES / f"{name}.png")
        print(f"drew {IMAGES}/{name}.png")
    return 0


def _write_report(folder: Path, found: dict[str, dict[str, Any]], *, check: bool) -> int:
    """`report.md` and the plots beside the results, file by file."""
    parts = ["# Benchmark results"]
    pictures = []
    for stem, document in found.items():
        suite = document["suite"]
        parts.append(f"## {suite}, {document['device']}")
        if document.get("quick"):
            parts.append("A quick run: small cases, few rounds.")
        for own, table, _ in TABLES.values():
            if own == suite and document["rows"]:
                parts.append(table(document))
        for name, plot in PLOTS.items():
            if plot.suite != suite:
                continue
            if not plot.select(document):
                print(f"skipped {name} of {stem}: {missing(plot.command)}")
                continue
            pictures.append((plot, document, f"{stem}-{name}.png"))
            parts.append(f"![{plot.text}]({stem}-{name}.png)")
        parts += _failures(document["rows"])
    text = "\n\n".join(parts) + "\n"
    path = folder / "report.md"
    if check:
        same = path.exists() and path.read_text() == text
        if not same:
            print(f"report: {path} differs from the results: run flash-attn-res report")
        return 0 if same else 1
    for plot, document, picture in pictures:
        save(plot, document, folder / picture)
        print(f"drew {folder / picture}")
    write_atomically(path, text.encode())
    print(f"wrote {path}")
    return 0


def _failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A list of what was not measured, once for each reason."""
    reasons = dict.fromkeys(f"- {row['package']}: {row['error']}" for row in rows if "error" in row)
    return ["Not measured:\n\n" + "\n".join(reasons)] if reasons else []
