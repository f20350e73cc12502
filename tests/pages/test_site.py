"""The documentation is a site: it builds without a warning, and needs nothing from elsewhere."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from support import REPO


def build(source: Path, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", *options, str(source), str(target)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(REPO, target, "-c", "docs")
    assert (done.returncode, done.stderr) == (0, "")
    return target


class Loaded(HTMLParser):
    """What a browser loads to show a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in {"script", "img", "iframe", "object", "source"}:
            self.found.append(attributes.get("src") or attributes.get("data") or "")
        if tag == "link" and attributes.get("rel") in {"stylesheet", "preload", "icon"}:
            self.found.append(attributes.get("href") or "")


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    loaded = {one for page in pages for one in Loaded(page.read_text()).found}
    assert len(pages) > 40
    assert any(one.partition("?")[0].endswith(".css") for one in loaded)
    assert [one for one in loaded if re.match(r"(\w+:)?//", one)] == []
    styles = [style.read_text() for style in site.rglob("*.css")]
    assert [found for style in styles for found in re.findall(r"url\(\s*['\"]?(?:https?:)?//", style)] == []


def test_options_in_running_text_keep_their_hyphens(site: Path) -> None:
    page = (site / "docs/from-docker.html").read_text()
    assert "use --platform; only" in page
    assert re.findall(r"[\u2013\u2014\u2018\u2019\u201c\u201d]", page) == []


def test_the_navigation_has_the_sections_and_pages_of_the_index(site: Path) -> None:
    index = (site / "docs/index.html").read_text()
    assert re.findall(r'caption-text">([^<]*)<', index)[:4] == [
        "Tutorials", "How-to", "Reference", "Explanation",
    ]  # fmt: skip
    assert "docs/index.html" in (site / "index.html").read_text()


def test_a_page_enters_the_navigation_by_one_line_of_the_index() -> None:
    navigation = runpy.run_path(str(REPO / "docs/conf.py"))["navigation"]
    text = (
        "# Title\n\n- [Before](before.md)\n\n## One\n\n- [A page](a.md): [this](b.md)\n\n## None\n\nText.\n"
    )
    assert list(navigation(text)) == ["```{toctree}\n:hidden:\n:caption: One\n\nA page <a>\n```\n"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# One\n\n[two](two.md)\n", "'two.md'"),
        ("# One\n\n[two](#two)\n", "'two'"),
    ],
)
def test_a_link_to_a_page_or_a_heading_that_is_not_there_ends_the_build(
    tmp_path: Path, text: str, complaint: str
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(text)
    done = build(tmp_path, tmp_path / "site", "-c", str(REPO / "docs"))
    assert done.returncode != 0
    assert complaint in done.stderr
