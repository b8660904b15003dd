"""The gallery prints what it says, and its pictures are there."""

import importlib.util
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "mixtures"
NUMBER = re.compile(r"-?\d+\.?\d*%?")
PAGES = sorted(path.stem for path in FOLDER.glob("*.md"))


@pytest.fixture(scope="module")
def build():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("gallery_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(text):
    return [float(found.rstrip("%")) for found in NUMBER.findall(text)]


@pytest.mark.parametrize("name", [name for name in PAGES if name != "million_rows"])
def test_a_page_says_what_it_computes(build, name):
    page, pictures = (FOLDER / f"{name}.md").read_text(), []
    again = build.rebuild(page, name, pictures.append)
    assert NUMBER.sub("#", again) == NUMBER.sub("#", page)
    if name != "gradients":  # where training by small batches carries the last digit of a machine far
        assert numbers(again) == pytest.approx(numbers(page), rel=0.02, abs=0.02)
    assert "?<!--/-->" not in page
    assert all((FOLDER / "pictures" / picture).exists() for picture in pictures)


@pytest.mark.parametrize("rows", ["20_000", pytest.param("1_000_000", marks=pytest.mark.nightly)])
def test_the_page_of_a_million_rows_finds_what_was_planted(build, rows):
    page = (FOLDER / "million_rows.md").read_text()
    assert "1_000_000" in page
    again = build.rebuild(page.replace("1_000_000", rows), "million_rows", lambda picture: None)
    assert "worst of 160 slopes" in again  # the page itself asserts how far off they may be


def test_every_page_is_linked_and_every_picture_shown(build):
    index = (FOLDER.parent / "mixtures.md").read_text()
    assert all(f"(mixtures/{name}.md)" in index for name in PAGES)
    pages = [(FOLDER / f"{name}.md").read_text() for name in PAGES]
    shown = {picture for page in pages for picture in re.findall(r"pictures/([\w-]+\.png)", page)}
    there = {path.name for path in (FOLDER / "pictures").glob("*")}
    assert shown == there
    assert sum(path.stat().st_size for path in (FOLDER / "pictures").glob("*")) < 1_500_000


def test_a_page_that_draws_what_it_does_not_show_is_refused(build):
    page = "```python\nimport matplotlib.pyplot as plt\nplt.figure()\n```\n"
    with pytest.raises(ValueError, match=r"draws p-1.png but does not show it"):
        build.rebuild(page, "p", lambda picture: None)


def test_a_page_is_rewritten(build):
    page = "```python\nx = 2\nprint(x)\n```\n\n```text\nold\n```\n\nTwice <!--=2 * x-->old<!--/-->.\n"
    assert build.rebuild(page, "p", print) == page.replace("old\n", "2\n").replace("old", "4")
