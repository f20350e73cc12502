"""The documentation as a site: `make docs`.

The source directory is the repository, so that a link from one page to another is the same on the site and
on a Git host. The pages are listed once, in docs/index.md; the navigation of the site is made from its lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sphinx.application import Sphinx

INDEX: Final = "docs/index"
_PAGE: Final = re.compile(r"^- \[([^\]]+)\]\(([^)#:]+)\.md\)", re.MULTILINE)

project = "firebuild"
author = "the firebuild authors"
extensions = ["myst_parser"]
root_doc = INDEX
include_patterns = [
    "*.md",
    "docs/**.md",
    "plugins/*/README.md",
    "benchmarks/RESULTS.md",
    "examples/*/README.md",
]
# Without these, Sphinx would walk the virtual environment.
exclude_patterns = [".*", "build", "dist", "protos", "scripts", "src", "tests", "plugins/*/src"]
myst_heading_anchors = 4  # the anchors of headings, as Git hosts make them
myst_links_external_new_tab = False
highlight_language = "none"  # of indented blocks: commands and what they print
suppress_warnings = ["misc.highlighting_failure"]  # an ellipsis in an example is no JSON
nitpicky = True
smartquotes = False  # it makes a dash of the hyphens of `--option`, and quotes that no shell knows
html_theme = "furo"
html_title = "firebuild"
html_copy_source = False
html_show_copyright = False


def navigation(index: str) -> Iterator[str]:
    """Make the navigation of the site from the lists of the index.

    Args:
        index: the text of docs/index.md; the first link of each item is a page, its section the caption.

    Yields:
        a hidden `toctree` for each section with pages.
    """
    for section in index.split("\n## ")[1:]:
        caption, _, text = section.partition("\n")
        pages = "\n".join(f"{title} <{page}>" for title, page in _PAGE.findall(text))
        if pages:
            yield f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


def _add_navigation(_: Sphinx, page: str, source: list[str]) -> None:
    if page == INDEX:
        source[0] = "\n".join([source[0], *navigation(source[0])])


def _lead_to_the_index(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        refresh = f'<meta http-equiv="refresh" content="0; url={INDEX}.html">'
        page = f"<!doctype html><title>firebuild</title>{refresh}\n"
        Path(app.outdir, "index.html").write_text(page, "utf-8")


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _lead_to_the_index)
