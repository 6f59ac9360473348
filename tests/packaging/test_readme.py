"""README and docs: as short as an artist reads, every link leads somewhere, figures are counted."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import urlparse

import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from flexip_core.files.ip_adapter import BASES

README = REPO / "README.md"
PAGES = [README, REPO / "CHANGELOG.md", *sorted((REPO / "docs").glob("*.md"))]
MOST_LINES = 200
TOKENS = {"two IP-Adapter files": 16 + 4, "a FlexIP file": 20 + 77}
HALF = 2  # bytes


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path, content: str) -> list[str]:
    """Links into the tree whose file or heading is not there."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", content):
        path, _, heading = link.partition("#")
        if urlparse(link).scheme:
            continue
        target = page.parent / path if path else page
        if not target.exists() or (heading and heading not in anchors(content if not path else text(target))):
            dead.append(link)
    return dead


def test_the_readme_is_short() -> None:
    assert len(text(README).splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page, text(page))


def test_a_dead_link_is_seen() -> None:
    planted = "# A heading\n[a](docs/none.md) [b](#a-heading) [c](#none) [d](docs/files.md#none) [e](https://a.b/none)"
    assert dead_links(README, planted) == ["docs/none.md", "#none", "docs/files.md#none"]


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_a_page_begins_with_its_purpose(page: Path) -> None:
    heading, empty, purpose = text(page).splitlines()[:3]
    assert heading.startswith("# ") and not empty and purpose.startswith("This page ")


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", text(README)))
    assert linked == {f"docs/{page.name}" for page in (REPO / "docs").glob("*.md")}


def test_the_readme_counts_k_and_v_right() -> None:
    """K and V of one prompt: a number per token and channel in each block, twice."""
    table = text(README).split("## Memory", 1)[1].split("\n## ", 1)[0]
    assert [base for base in re.findall(r"SD\w+(?:\.5)?", table.splitlines()[2])] == list(BASES)
    told = re.findall(
        r"^\| .*?(two IP-Adapter files|a FlexIP file).*? \| ([\d.]+) MiB \| ([\d.]+) MiB \|$", table, re.MULTILINE
    )
    counted = {
        what: [2 * tokens * sum(blocks.values()) * HALF / 2**20 for _, blocks in BASES.values()]
        for what, tokens in TOKENS.items()
    }
    assert {what: numbers for what, *numbers in told} == {
        what: [f"{n:.1f}" for n in numbers] for what, numbers in counted.items()
    }


@pytest.mark.parametrize(("key", "size"), [("Icon", (400, 400)), ("Banner", (1260, 540))])
def test_the_registrys_pictures_are_in_the_tree(key: str, size: tuple[int, int]) -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    repository = urlparse(project["project"]["urls"]["Repository"]).path
    url = urlparse(project["tool"]["comfy"][key])
    assert url.netloc == "raw.githubusercontent.com" and url.path.startswith(f"{repository}/main/")
    with Image.open(REPO / url.path.removeprefix(f"{repository}/main/")) as image:
        assert image.size == size and image.format == "PNG"


def test_the_changelog_begins_with_the_version() -> None:
    version = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert re.findall(r"^## (.+)$", text(REPO / "CHANGELOG.md"), re.MULTILINE)[0] == version
