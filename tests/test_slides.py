"""Slides: all of a notebook's text and code is on them, and in a browser nothing is cut off at 16:9."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shutil

import pytest

nbformat = pytest.importorskip("nbformat")
ROOT = pathlib.Path(__file__).parent.parent
REQUIRED = bool(os.environ.get("SINGD_BROWSER"))  # CI: what would be skipped fails


@pytest.fixture(scope="module")
def tool():
    if not REQUIRED:
        for needed in ("markdown_it", "mdit_py_plugins", "pygments", "sphinxcontrib.katex"):
            pytest.importorskip(needed)
        if shutil.which("node") is None:
            pytest.skip("no node on this machine, which sets the mathematics")
    spec = importlib.util.spec_from_file_location("slides", ROOT / "tools" / "slides.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(*sources):
    notebook = nbformat.v4.new_notebook()
    for source in sources:
        is_code = not source.startswith("#")
        make = nbformat.v4.new_code_cell if is_code else nbformat.v4.new_markdown_cell
        notebook.cells.append(make(source))
    return notebook


def test_a_heading_starts_a_slide_and_so_does_what_would_not_fit(tool):
    long = "\n\n".join(["A sentence of some length that says what is the case. " * 4] * 8)
    body = tool.deck(cells(f"# One\n\nText with $x^2$.\n\n## Two\n\n{long}"))
    titles = re.findall(r"<h[12]>(.*?)</h[12]>", body)
    assert titles[:2] == ["One", "Two"] and set(titles[2:]) == {"Two"} and len(titles) > 2
    assert body.count("katex-html") == 1 and body.count("says what is the case") == 32


def test_code_is_cut_between_statements(tool):
    statements = [f"def f{i}():\n    a = {i}\n\n    return a\n" for i in range(9)]
    parts = tool.chunks("\n".join(statements))
    assert all(p.count("\n") < tool.ROWS for p in parts)
    assert all(p.startswith("def ") and p.rstrip().endswith("return a") for p in parts)
    assert "\n".join(parts).count("def ") == 9


def test_what_a_notebook_folds_is_on_no_slide(tool):
    notebook = cells(
        "# T\n\n<details><summary>Solution</summary>\n\nSecret.\n\n</details>", "a = 1", "b = 2"
    )
    notebook.cells[2].metadata["tags"] = ["hide-input"]
    body = tool.deck(notebook)
    assert "Secret" not in body and ">a<" in body and ">b<" not in body


def test_bad_mathematics_ends_the_build(tool):
    with pytest.raises(SystemExit, match="KaTeX"):
        tool.deck(cells(r"# T" + "\n\n" + r"$\nosuchmacro$"))


# ---- in a browser
@pytest.fixture(scope="module")
def folder(tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    tool.write(folder, tool.names())
    return folder


@pytest.fixture
def show(open_page, folder):
    """show(name) -> the slides of a notebook; fails on errors, and on any request but for files."""

    def go(name, width=1280, height=720, **options):
        address = (folder / f"{name}.html").as_uri()
        page = open_page(address, width=width, height=height, **options)
        page.wait_for_selector("body[data-ready=yes]")
        return page

    return go


NAMES = sorted(
    p.stem for p in (ROOT / "notebooks").glob("plot_*.ipynb") if not p.stem.endswith("_solution")
)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cut_off(show, name):
    """No line of code, no formula, no text; and what was set smaller is still legible from the last row."""
    page = show(name)
    slides = page.evaluate(
        "[...document.querySelectorAll('.slide')].map(s => { const b = s.querySelector('.body'); return {"
        "title: s.querySelector('h1, h2').textContent, size: parseFloat(getComputedStyle(b).fontSize),"
        "high: b.scrollHeight - b.clientHeight, wide: Math.max(b.scrollWidth - b.clientWidth, 0,"
        " ...[...b.querySelectorAll('pre, .math')].map(e => e.scrollWidth - e.clientWidth)),"
        "small: Math.min(999, ...[...b.querySelectorAll('img')].map(i => i.clientHeight)) }; })"
    )
    assert len(slides) >= 8
    for slide in slides:
        assert slide["high"] <= 1 and slide["wide"] <= 1 and slide["size"] >= 18, slide
        assert slide["small"] >= 100, slide


def test_it_is_moved_by_keys_buttons_and_touch(show):
    page = show(NAMES[0], has_touch=True)

    def number():
        return int(page.locator("#count").inner_text().split(" / ")[0])

    for key, expected in [
        ("ArrowRight", 2),
        (" ", 3),
        ("PageUp", 2),
        ("Home", 1),
        ("ArrowLeft", 1),
    ]:
        page.keyboard.press(key)
        assert number() == expected, key
    page.locator("#next").tap()
    assert number() == 2 and page.url.endswith("#2")
    assert page.locator(".slide.now").count() == 1
    page.keyboard.press("End")
    assert number() == page.locator(".slide").count()


@pytest.mark.parametrize("size", [(1920, 1080), (1024, 768), (390, 844)])
def test_it_fits_any_window_at_16_to_9(show, size):
    page = show(NAMES[0], *size)
    box = page.locator(".slide.now").bounding_box()
    assert abs(box["width"] / box["height"] - 16 / 9) < 0.01
    assert box["width"] <= size[0] + 1 and box["height"] <= size[1] + 1
    assert box["width"] >= size[0] - 1 or box["height"] >= size[1] - 1
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
