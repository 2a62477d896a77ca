"""Which files the site is made of: a hook of mkdocs.yml.

The site mirrors the repository, README.md and CHANGELOG.md at its root and docs/ below, so that one relative link works
on the site and where the repository is browsed. Files that a page links to are put beside the pages; a link to a
directory, which a site cannot show, becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "RELEASE.md", "SECURITY.md"),
    *("benchmarks/README.md", "examples/c_api/README.md"),
)
# [text](target) and ![text](target), where the target is a path of the repository and not an address or an anchor.
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#:]+)(#[^()\s]*)?\)")


def pages() -> list[str]:
    """Paths of all pages, from the root of the repository."""
    return [*PAGES, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


def targets(page: str) -> list[str]:
    """Paths, from the root of the repository, that a page links to."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [posixpath.normpath(posixpath.join(posixpath.dirname(page), link[3])) for link in LINK.finditer(text)]


def on_files(files: Files, config: Any) -> Files:
    """The theme's own files, the pages, and the files that they link to."""
    own = [file for file in files if not file.src_uri.endswith((".md", ".py", ".json", ".svg"))]
    named = pages()
    linked = {target for page in named for target in targets(page) if (ROOT / target).is_file()}
    paths = [*named, *sorted(linked - set(named))]
    return Files([*own, *(File.generated(config, path, abs_src_path=str(ROOT / path)) for path in paths)])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text with links to directories as text."""
    here = posixpath.dirname(page.file.src_uri)

    def keep(link: re.Match[str]) -> str:
        directory = (ROOT / posixpath.join(here, link[3])).is_dir()
        return link[2] if directory and not link[1] else link[0]

    return LINK.sub(keep, markdown)
