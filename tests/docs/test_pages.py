"""Every page: links and paths that exist, lines and pages of readable length."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT / "docs", ROOT / ".github")
PAGES = [ROOT / "README.md", *sorted(page for folder in FOLDERS for page in folder.rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACE = re.compile(r"(?<![\w/.:-])(?:dcod_jax|tools|configs|tests|docs)/[\w./-]*\w")
# Written by the reader, not part of the checkout.
MADE = {"configs/my_recipe.py"}


def prose(page: Path) -> list[str]:
    """Lines outside fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S).splitlines()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the page's headings."""
    heads = [line.lstrip("#").strip() for line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    for target in LINK.findall("\n".join(prose(page))):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_of_the_checkout_that_a_page_names_exists(page):
    for name in PLACE.findall(page.read_text(encoding="utf-8")):
        assert name in MADE or (ROOT / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_and_pages_can_be_read(page):
    """At most 100 columns of prose; 200 lines a page (README 160), generated tables aside."""
    lines = prose(page)
    long = [line for line in lines if len(line) > 100 and not re.match(r"\s*\||<!--", line)]
    assert not long, f"{page}: {long[0]}"
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<!-- (?:study|from)[^>]*-->.*?<!-- end[^>]*-->", "", text, flags=re.S)
    most = 160 if page.name == "README.md" else 200
    assert len(text.splitlines()) <= most, f"{page}: {len(text.splitlines())} lines"


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    named = {target.partition("#")[0] for target in LINK.findall(index)}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= named


def test_every_name_that_contributors_look_for_is_in_a_file_of_its_row():
    rows = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    rows = [row for row in rows if row.startswith("|") and PLACE.search(row)]
    assert len(rows) > 5
    for row in rows:
        files = "".join((ROOT / name).read_text(encoding="utf-8") for name in PLACE.findall(row))
        assert not [name for name in re.findall(r"`(\w+)`", row) if name not in files], row


def test_a_page_with_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n[here](#a-page) and [there](nowhere.md)\n")
    test = test_every_relative_link_leads_somewhere
    with pytest.raises(AssertionError, match="nowhere"):
        test(page)
