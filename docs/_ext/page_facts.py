"""What a reader wants to know before starting a page of the gallery, below its title: how long it runs, what it
needs, and where its notebook and slides are.
"""

from __future__ import annotations

import ast
import math
import pathlib
import re
import sys

GALLERY = pathlib.Path(__file__).parents[2] / "gallery"
NOTEBOOKS = GALLERY.parent / "notebooks"
TIME = re.compile(
    r"\n\.\. rst-class:: sphx-glr-timing\n\n.*?\((?:(\d+) hours? )?(\d+) minutes? ([\d.]+) seconds?\)\n",
    re.S,
)
TITLE = re.compile(r"(\n[^\n]+\n([=*#])\2{2,}\n)")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where a package is installed by another name

FIGURE = re.compile(r"^# \.\. interactive:: (\w+)$", re.M)  # one to move, in a page's text


def packages(script: str) -> list[str]:
    """What a script imports, besides the standard library, by the names that pip knows."""
    roots = set()
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.split(".")[0])
    roots -= sys.stdlib_module_names
    return sorted(DISTRIBUTIONS.get(root, root) for root in roots)


def facts(name: str, section: str, seconds: float | None) -> str:
    """The line, in reST; the links are those of the built page."""
    script = (GALLERY / section / f"{name}.py").read_text(encoding="utf-8")
    needs = ", ".join(packages(script))
    time = ""
    if seconds:
        time = f"**Runs in** about {max(1, math.ceil(seconds))} s. "
    links = [f'<a href="../../slides/{name}.html">Slides</a>']
    if (NOTEBOOKS / f"{name}_solution.ipynb").exists():
        links.append(f'<a href="../../solutions/{name}_solution.ipynb" download>Solutions</a>')
    if figure := FIGURE.search(script):
        links.append(f'<a href="#figure-{figure[1]}">A figure to move</a>')
    links.append('<a href="../../singd-gallery.zip" download>The whole gallery</a>')
    return (
        "\n.. rst-class:: page-facts\n\n"
        f"{time}**Needs** {needs}.\n\n"
        '.. raw:: html\n\n    <p class="page-facts">' + " &middot; ".join(links) + "</p>\n"
    )


def add(app, docname, source):
    parts = docname.split("/")
    if len(parts) != 3 or parts[0] != "auto_gallery" or not parts[2].startswith("plot_"):
        return
    text, seconds = source[0], None
    if found := TIME.search(text):
        hours, minutes, rest = found.groups(default="0")
        seconds = 3600 * int(hours) + 60 * int(minutes) + float(rest)
        text = text[: found.start()] + "\n" + text[found.end() :]
    source[0] = TITLE.sub(lambda m: m[1] + facts(parts[2], parts[1], seconds), text, count=1)


def setup(app):
    app.connect("source-read", add)
    return {"parallel_read_safe": True}
