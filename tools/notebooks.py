"""Make notebooks/*.ipynb from gallery/*.py, and check that they are in step.

python tools/notebooks.py build [NAME ...]   convert and execute (only what changed, unless --force; where
                                             the text alone changed, outputs are kept)
python tools/notebooks.py check              exit 1 if a notebook differs from its script, was not
                                             executed, or holds an error or a warning

A lesson of the course (gallery/0_course) becomes two notebooks: NAME.ipynb asks, with an empty cell for each
answer, and NAME_solution.ipynb answers. All other pages become one, with their solutions folded.
"""

from __future__ import annotations

import argparse
import ast
import base64
import copy
import functools
import hashlib
import importlib.util
import itertools
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Iterator

import nbformat
from sphinx_gallery.gen_gallery import DEFAULT_GALLERY_CONF
from sphinx_gallery.notebook import jupyter_notebook
from sphinx_gallery.py_source_parser import remove_config_comments, split_code_and_text_blocks

ROOT = pathlib.Path(__file__).resolve().parent.parent
GALLERY, NOTEBOOKS, DOCS = ROOT / "gallery", ROOT / "notebooks", ROOT / "docs"
STATIC = DOCS / "_static"  # with the still pictures, which tools/stills.py draws
CHECKER = NOTEBOOKS / "course_check.py"
QUOTE = "\x01"  # stands for ">", which sphinx-gallery would take for a heading's underline
# `# sphinx_gallery_nbval = "nbval-ignore-output"` in a code block: a tag of its cell (and nothing on the page)
TAG = re.compile(r'^# sphinx_gallery_nbval = "([a-z-]+)"$', re.M)
# An indented block below a directive.
BLOCK = r"((?:\n(?:[ \t]*\n)*[ \t]+[^\n]*)*)"
DROPDOWN = re.compile(r"^\.\. dropdown::[^\n]*" + BLOCK, re.M)
# The title of a page, in Markdown or in reStructuredText.
HEADING = re.compile(r"^# (.+)$|^(.+)\n={3,}$", re.M)
# A part of a code block that guards the text: not on the page, folded in the notebook, and run in both.
GUARD = re.compile(
    r"^[ \t]*# ?sphinx_gallery_start_ignore\n(.*?)^[ \t]*# ?sphinx_gallery_end_ignore[ \t]*\n?",
    re.M | re.S,
)
COURSE = "0_course"  # the folder whose solutions go into notebooks of their own
SOLUTION = re.compile(r"\n( +)\.\. code-block:: python\n((?:\1 +[^\n]*\n?|[ \t]*\n)*)")
ADMONITIONS = "admonition|note|warning|tip|important|hint|seealso|caution|attention|danger|error"


def _role(m: re.Match) -> str:
    role, text = m.group(1), m.group(2)
    title = re.match(r"(.*?)\s*<(.+)>$", text, re.S)
    label = (title.group(1) if title else text).strip()
    if role in {"func", "meth"}:
        label = label.removeprefix("~") if not text.startswith("~") else text[1:].rsplit(".", 1)[-1]
        return f"`{label}()`"
    if role in {"class", "mod", "attr", "data", "exc", "obj"}:
        return f"`{text[1:].rsplit('.', 1)[-1] if text.startswith('~') else label}`"
    if role in {"ref", "doc", "term"}:
        target = title.group(2) if title else text
        ex = re.match(r"sphx_glr_auto_gallery_\w*?(plot_\w+)\.py$", target)
        if ex:
            (page,) = GALLERY.glob(f"*/{ex.group(1)}.py")
            return f"[{label if title else _heading(page)}]({ex.group(1)}.ipynb)"
        if role == "doc" and not title:
            (page,) = DOCS.glob(f"{target.removeprefix('/')}.*")
            return f"*{_heading(page)}*"
        return f"*{label}*"
    if role.startswith("cite"):
        return f"[{label}]"
    if role == "eq":
        return f"({label})"
    raise SystemExit(f"no Markdown known for the role :{role}:`{text}`")


def _heading(page: pathlib.Path) -> str:
    """The title of a page of the gallery, or of one of the site."""
    return next(filter(None, HEADING.search(page.read_text(encoding="utf-8")).groups()))


def _still(m: re.Match) -> str:
    """The picture that stands for a figure that only the site can move."""
    name = m.group(1)
    return f"![The figure {name}](attachment:interactive_{name}.png)\n\n*On the site, this figure can be moved.*"


def _attachments(source: str) -> dict[str, dict[str, str]]:
    """The pictures that a Markdown cell has to take along, since a notebook may be read far from here."""
    names = re.findall(r"\]\(attachment:([\w.]+)\)", source)
    return {
        name: {"image/png": base64.b64encode((STATIC / name).read_bytes()).decode()}
        for name in names
    }


def _rst(text: str) -> str:
    """What sphinx-gallery's own rst2md leaves alone."""

    def math(m: re.Match) -> str:
        body = textwrap.dedent(m.group(2)) if m.group(2) else ""
        body = "\n".join(
            l
            for l in body.strip("\n").splitlines()
            if not re.match(r":(label|nowrap|no-wrap|name|class):", l)
        )
        body = "\n\n".join(filter(None, [m.group(1).strip(), body.strip()]))
        return f"$$\n{body}\n$$\n"

    def admonition(m: re.Match) -> str:
        kind, rest, body = m.group(1), m.group(2).strip(), textwrap.dedent(m.group(3) or "").strip()
        head = rest if kind == "admonition" else kind.capitalize()
        if kind != "admonition" and rest:
            body = f"{rest}\n{body}".strip()
        quoted = "\n".join(f"{QUOTE} {l}".rstrip() for l in body.splitlines())
        return f"{QUOTE} **{head}**\n{QUOTE}\n{quoted}\n"

    def code(m: re.Match) -> str:
        body = textwrap.dedent(m.group(2) or "").strip()
        return f"```{m.group(1).strip()}\n{body}\n```\n"

    def dropdown(m: re.Match) -> str:
        lines = textwrap.dedent(m.group(2) or "").strip("\n").splitlines()
        while lines and re.match(r":[\w-]+:", lines[0]):  # options
            lines.pop(0)
        body = "\n".join(lines).strip()
        head = f"<details{QUOTE}<summary{QUOTE}{m.group(1).strip()}</summary{QUOTE}"
        return f"{head}\n\n{body}\n\n</details{QUOTE}\n"

    def table(m: re.Match) -> str:
        rows = re.split(r"^\* - ", textwrap.dedent(m.group(1)), flags=re.M)[1:]  # options before
        cells = [[" ".join(c.split()) for c in re.split(r"^  - ", r, flags=re.M)] for r in rows]
        cells.insert(1, ["---"] * len(cells[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"

    text = re.sub(r"^\.\. math::([^\n]*)" + BLOCK, math, text, flags=re.M)
    text = re.sub(rf"^\.\. ({ADMONITIONS})::([^\n]*)" + BLOCK, admonition, text, flags=re.M)
    text = re.sub(r"^\.\. dropdown::([^\n]*)" + BLOCK, dropdown, text, flags=re.M)
    text = re.sub(r"^\.\. list-table::[^\n]*" + BLOCK, table, text, flags=re.M)
    text = re.sub(r"^\.\. code-block::([^\n]*)" + BLOCK, code, text, flags=re.M)
    text = re.sub(r"^\.\. interactive:: (\w+)$", _still, text, flags=re.M)
    text = re.sub(r":(?!math\b)([a-z]+(?::[a-z]+)?):`([^`]+)`", _role, text)
    text = re.sub(r"(?<!`)``(?!`)", "`", text)
    return re.sub(r"\n{3,}", "\n\n", text)


def solutions(text: str) -> list[str]:
    """The Python blocks of a text's folded solutions."""
    return [
        textwrap.dedent(c[2]).strip()
        for d in DROPDOWN.finditer(text)
        for c in SOLUTION.finditer(d[0])
    ]


def _code(content: str, line: int, script: str) -> list[tuple[str, str, int, list[str]]]:
    """The cells of a code block: what the page shows, and, folded, what it hides."""
    tags = TAG.findall(content)
    cells = []
    for i, part in enumerate(GUARD.split(content)):
        hidden = i % 2
        try:
            ast.parse(part)
        except SyntaxError:
            raise SystemExit(
                f"{script}: the ignored lines in the block at line {line} must be whole statements "
                "that are not indented, because they become a cell of their own"
            ) from None
        part = remove_config_comments(part)
        if part.strip():
            cells.append(("code", part, line, [*tags, "hide-input"] if hidden else tags))
    return cells


@functools.cache
def _exercises() -> dict:
    """What the checker knows of the course's exercises."""
    spec = importlib.util.spec_from_file_location("course_check", CHECKER)
    module = importlib.util.module_from_spec(spec)
    sys.modules["course_check"] = module
    spec.loader.exec_module(module)
    return module.EXERCISES


def _answer(name: str, script: str) -> str:
    """The empty cell in place of a solution: what to give to the checker, and where the solution is."""
    lines = ["# Your answer", "", ""]
    if exercise := _exercises().get(name):
        asks = textwrap.wrap(f"Is it right? Give the checker {exercise.asks}.", 76)
        lines += [f"# {line}" for line in asks]
        lines += ["# from course_check import check", f'# check("{name}", ...)']
    lines.append(f"# A solution is in {script.removesuffix('.py')}_solution.ipynb")
    return "\n".join(lines)


def _cells(
    block: tuple, names: Iterator[str] | None, script: str
) -> list[tuple[str, str, int, list[str]]]:
    """What a block of a script becomes: kind, content, line, tags.

    A solution that is code becomes a folded cell of its own, below the text that folds it on the site. So it is
    run with the notebook, after the page, and its asserts hold. Where ``names`` of exercises are given, the
    notebook only asks, and an empty cell stands in the solution's place.
    """
    kind, content, line = tuple(block)[:3]
    if kind == "code":
        return _code(content, line, script)
    cells, start = [], 0
    for dropdown in DROPDOWN.finditer(content):
        code = solutions(dropdown[0])
        if names and dropdown[0].startswith(".. dropdown:: Solution"):
            cells.append(("text", _rst(content[start : dropdown.start()]), line, []))
            cells.append(("code", _answer(next(names), script), line, ["answer"]))
            start = dropdown.end()
        elif code:
            prose = SOLUTION.sub("\n", dropdown[0])
            cells.append(("text", _rst(content[start : dropdown.start()] + prose), line, []))
            cells.extend(("code", c, line, ["hide-input"]) for c in code)
            start = dropdown.end()
    if content[start:].strip():
        cells.append(("text", _rst(content[start:].lstrip("\n")), line, []))
    return cells


def convert(script: pathlib.Path, asks: bool = False) -> nbformat.NotebookNode:
    """A page as a notebook that is not executed yet; with ``asks``, answers are left to the reader."""
    _, blocks = split_code_and_text_blocks(str(script))
    new, tags = [], []
    lesson = script.stem.split("_")[1]
    names = (f"{lesson}.{i}" for i in itertools.count(1)) if asks else None
    for b in blocks:
        for *cell, cell_tags in _cells(b, names, script.name):
            new.append(type(b)(*cell) if hasattr(b, "_fields") else tuple(cell))
            tags.append(cell_tags)
    conf = copy.deepcopy(DEFAULT_GALLERY_CONF)
    raw = jupyter_notebook(new, conf, str(script.parent))
    nb = nbformat.v4.new_notebook()
    nb.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for i, c in enumerate(raw["cells"]):
        source = "".join(c["source"]).strip("\n").replace(QUOTE, ">")
        make = (
            nbformat.v4.new_code_cell if c["cell_type"] == "code" else nbformat.v4.new_markdown_cell
        )
        cell = make(source)
        if taken := _attachments(source) if c["cell_type"] == "markdown" else None:
            cell["attachments"] = taken
        if tags[i]:
            cell["metadata"]["tags"] = tags[i]
        if "hide-input" in tags[i]:
            cell["metadata"]["jupyter"] = {"source_hidden": True}
        cell["id"] = f"{script.stem.replace('_', '-')[:40]}-{i:02d}"
        nb.cells.append(cell)
    nbformat.validate(nb)
    return nb


def notebooks(script: pathlib.Path) -> dict[pathlib.Path, nbformat.NotebookNode]:
    """The notebooks of a page, by the path at which they are kept."""
    path = NOTEBOOKS / f"{script.stem}.ipynb"
    if script.parent.name != COURSE:
        return {path: convert(script)}
    return {
        path: convert(script, asks=True),
        path.with_name(f"{script.stem}_solution.ipynb"): convert(script),
    }


def key(nb: nbformat.NotebookNode) -> str:
    s = repr(
        [
            (c.cell_type, c.id, c.source, c.metadata.get("tags"), c.get("attachments", {}))
            for c in nb.cells
        ]
    )
    return hashlib.sha256(s.encode()).hexdigest()


def execute(nb: nbformat.NotebookNode) -> None:
    from nbclient import NotebookClient

    os.environ["MATPLOTLIBRC"] = str(GALLERY)  # the kernel's figures look as the site's
    NotebookClient(
        nb,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    ).execute()
    nb.metadata["language_info"] = {"name": "python"}  # no versions, no churn


def taken_over(nb: nbformat.NotebookNode, old: nbformat.NotebookNode | None) -> bool:
    """Take over the outputs of a notebook with the same code, if they are sound; the text does not change them."""
    new, before = (
        [c for c in cells if c.cell_type == "code"]
        for cells in (nb.cells, old.cells if old else [])
    )
    if [c.source for c in new] != [c.source for c in before]:
        return False
    for cell, known in zip(new, before, strict=True):
        cell.outputs, cell.execution_count = known.outputs, known.execution_count
    return not faults(nb, nb)


def write(nb: nbformat.NotebookNode, path: pathlib.Path) -> None:
    path.write_text(nbformat.writes(nb, version=4) + "\n", encoding="utf-8")


def faults(old: nbformat.NotebookNode | None, new: nbformat.NotebookNode) -> list[str]:
    """What is wrong with a committed notebook, given its script's conversion."""
    if old is None:
        return ["is missing"]
    if key(old) != key(new):
        return ["differs from its script"]
    code = [c for c in old.cells if c.cell_type == "code"]
    outputs = [o for c in code for o in c.outputs]
    found = {
        "was not executed": any(c.execution_count is None for c in code),
        "holds an error": any(o.output_type == "error" for o in outputs),
        "holds warnings": any(o.get("name") == "stderr" for o in outputs),  # nbval compares none
    }
    return [what for what, is_so in found.items() if is_so]


def scripts() -> list[pathlib.Path]:
    return sorted(GALLERY.glob("*/plot_*.py"))


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("command", choices=["build", "check"])
    p.add_argument("names", nargs="*")
    p.add_argument("--force", action="store_true")
    p.add_argument("--no-execute", action="store_true")
    a = p.parse_args(argv)
    bad = []
    for s in scripts():
        if a.names and s.stem not in a.names:
            continue
        for path, nb in notebooks(s).items():
            old = nbformat.read(path, 4) if path.exists() else None
            wrong = faults(old, nb)
            if a.command == "check":
                bad += [f"{path.relative_to(ROOT)}: {what}" for what in wrong]
            elif wrong or a.force:
                if not a.no_execute and (a.force or not taken_over(nb, old)):
                    execute(nb)
                write(nb, path)
                print("wrote", path.relative_to(ROOT))
    ours = {path.name for s in scripts() for path in notebooks(s)}
    extra = {q.name for q in NOTEBOOKS.glob("plot_*.ipynb")} - ours
    bad += [f"notebooks/{e}: has no script" for e in sorted(extra)]
    print("\n".join(bad) or "ok", file=sys.stderr if bad else sys.stdout)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
