"""Hooks of the documentation site: pages that lie outside docs/, and links that lead there.

README.md is the site's first page. A link that works in the repository works on the site if its
target is a page; a link to a source file becomes the name of that file.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(docs/([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    source = next((s for s, p in OUTSIDE.items() if p == page.file.src_uri), None)
    here = "docs" if source is None else "."

    def replace(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        if not path:
            return match[0]
        target = posixpath.normpath(posixpath.join(here, path))
        uri = OUTSIDE.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(uri) is not None:
            return (
                f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))}{anchor})"
            )
        assert (ROOT / target).exists(), f"{page.file.src_uri} links to {path}"
        return (
            text
            if text.startswith("`")
            else f"{text} (`{target}`)"
            if text != target
            else f"`{text}`"
        )

    # Code is left as it is.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.S | re.M)
    parts[::2] = [IMAGE.sub(r"![\1](\2)", LINK.sub(replace, part)) for part in parts[::2]]
    return "".join(parts)
