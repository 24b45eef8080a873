"""Every Python block of the README and of the documentation runs, as a reader would paste it."""

import pathlib
import re
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.rst")]
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)^ *```", re.M)
# What may stand in a fence that is not run: what a shell or another program reads, and MyST's directives.
NOT_PYTHON = {"", "bibtex", "console", "text"}


def snippets(page):
    """The blocks in order, whatever their indentation; lines keep their numbers in a traceback."""
    text = page.read_text()
    for fence in FENCE.finditer(text):
        language = fence[2].strip()
        assert language == "python" or language in NOT_PYTHON or language.startswith("{"), language
        assert not re.match(r"{code(-block|-cell)?} *\w*python", language), "use ```python"
        if language == "python":
            yield "\n" * (text[: fence.start(3)].count("\n")) + textwrap.dedent(fence[3])
    assert not re.search(r"^\.\. code", text, re.M), f"{page.name}: a code block that no test runs"


def pages_with_code():
    return sorted(p for p in PAGES if any(snippets(p)))


@pytest.mark.parametrize("page", pages_with_code(), ids=lambda p: p.name)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "snippet"}
    for block in snippets(page):
        exec(compile(block, str(page), "exec"), names)


def test_the_readme_and_the_landing_page_are_among_them():
    assert {"README.md", "index.md"} <= {p.name for p in pages_with_code()}
