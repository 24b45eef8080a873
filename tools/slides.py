"""Slides from the notebooks: one HTML file each, with all that it needs inside but the fonts of its mathematics.

python tools/slides.py FOLDER [NAME ...]     write FOLDER/NAME.html and the files that the slides share

A heading starts a slide, and so does what would not fit: text is cut between paragraphs, code between statements,
so that no line is cut off at 16:9. What a notebook folds (checks, solutions) is left out.
"""

from __future__ import annotations

import argparse
import ast
import functools
import html
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import nbformat
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
STATIC = ROOT / "docs" / "_static"
ROWS = 20  # of code on one slide
ROOM = 17.0  # lines of text on one slide, below its title
LINE = 74  # letters on a line of text
READING = 4.5  # as many lines stand below a figure
STILL = 11.5  # lines that the still picture of a figure takes, which the text goes on around
CODE_LINE = 0.72  # the height of a line of code, in lines of text
MACROS = {r"\E": r"\operatorname{\mathbb{E}}"}


# ---- mathematics, set by the script that also sets the site's
def _katex() -> str:
    import sphinxcontrib.katex as katex

    return str(pathlib.Path(katex.__file__).with_name("katex.min.js"))


def set_maths(formulas: list[tuple[str, bool]]) -> list[str]:
    """Each formula, inline or displayed, as HTML; one run of node for all."""
    if not formulas:
        return []
    program = (
        f"const k = require({json.dumps(_katex())}), macros = {json.dumps(MACROS)};"
        "const all = JSON.parse(require('fs').readFileSync(0));"
        "console.log(JSON.stringify(all.map(([t, displayMode]) => "
        "k.renderToString(t, {displayMode, throwOnError: true, macros: {...macros}}))))"
    )
    done = subprocess.run(
        ["node", "-e", program], input=json.dumps(formulas), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"KaTeX: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


class Maths:
    """Formulas leave a mark where they stand, and are set together at the end."""

    def __init__(self) -> None:
        self.formulas: list[tuple[str, bool]] = []

    def mark(self, tex: str, options: dict) -> str:
        self.formulas.append((tex.strip(), bool(options.get("display_mode"))))
        return f"\x02{len(self.formulas) - 1}\x03"

    def fill(self, text: str) -> str:
        done = set_maths(self.formulas)
        return re.sub("\x02(\\d+)\x03", lambda m: done[int(m[1])], text)


# ---- text
def _blocks(tokens: list[Token]) -> Iterator[list[Token]]:
    """The top-level elements of a text."""
    start, depth = 0, 0
    for i, token in enumerate(tokens):
        depth += token.nesting
        if depth == 0:
            yield tokens[start : i + 1]
            start = i + 1


def _height(block: list[Token]) -> float:
    """About how many lines of a slide an element takes."""
    total = 0.0
    for token in block:
        if token.type == "inline":
            plain = re.sub(r"\$[^$]*\$", "xxxxxx", token.content)
            plain = re.sub(r"\]\([^)]*\)|[*`\[]", "", plain)
            total += 0.6 + max(1, -(-len(plain) // LINE))
            total += STILL * token.content.count("](attachment:")
        elif token.type.startswith("math_block"):
            total += 1.6 + 1.5 * (1 + token.content.count(r"\\"))
        elif token.type == "fence":
            total += 1 + 1.05 * token.content.count("\n")
        elif token.type == "tr_open":
            total += 0.4
    if block[0].type == "table_open":  # cells stand side by side
        rows = sum(t.type == "tr_open" for t in block)
        letters = sum(len(t.content) for t in block if t.type == "inline")
        total = 1.6 * rows + letters / LINE / 2
    return total


def _glued(blocks: list[list[Token]]) -> list[list[Token]]:
    """A paragraph that ends in the midst of a sentence stays with what it leads to."""
    result: list[list[Token]] = []
    for block in blocks:
        before = result[-1] if result else []
        words = next((t.content for t in reversed(before) if t.type == "inline"), "")
        leads = (
            before and before[-1].type == "paragraph_close" and words.rstrip().endswith((":", ","))
        )
        if leads and _height([*before, *block]) <= ROOM:
            result[-1] = [*before, *block]
        else:
            result.append(block)
    return result


def _pieces(block: list[Token]) -> Iterator[list[Token]]:
    """An element that is too long for a slide, cut between paragraphs or items."""
    if _height(block) <= ROOM or block[0].nesting != 1:
        yield block
        return
    first, inside, last = block[0], list(_blocks(block[1:-1])), block[-1]
    part: list[list[Token]] = []
    for piece in inside:
        if part and _height([t for p in [*part, piece] for t in p]) > ROOM:
            yield [first, *[t for p in part for t in p], last]
            part = []
        part.append(piece)
    yield [first, *[t for p in part for t in p], last]


# ---- code
def chunks(source: str) -> list[str]:
    """Code in parts of at most ROWS lines, cut between statements where that is possible."""
    lines = source.splitlines()
    starts = {0}
    for node in ast.parse(source).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].lstrip().startswith("#"):
            first -= 1  # comments belong to what follows
        starts.add(first)
        if node.end_lineno - first > ROWS:  # a long definition is cut between its own statements
            starts.update(n.lineno - 1 for n in ast.walk(node) if isinstance(n, ast.stmt))
    cuts, begin = [], 0
    while len(lines) - begin > ROWS:
        possible = [s for s in starts if begin < s <= begin + ROWS]
        begin = max(possible, default=begin + ROWS)
        cuts.append(begin)
    edges = [0, *cuts, len(lines)]
    parts = ["\n".join(lines[a:b]).strip("\n") for a, b in itertools.pairwise(edges)]
    return [p for p in parts if p.strip()]


@functools.cache
def _formatter() -> HtmlFormatter:
    return HtmlFormatter(nowrap=True)


def _code(source: str) -> str:
    return f'<pre class="code">{highlight(source, PythonLexer(), _formatter())}</pre>'


def _outputs(cell: nbformat.NotebookNode) -> Iterator[str]:
    printed = "".join(
        o.get("text", "") or o.get("data", {}).get("text/plain", "")
        for o in cell.outputs
        if "image/png" not in o.get("data", {}) and "text/html" not in o.get("data", {})
    )
    lines = printed.rstrip().splitlines()
    for i in range(0, len(lines), ROWS):
        yield f'<pre class="output">{html.escape(chr(10).join(lines[i : i + ROWS]))}</pre>'
    for output in cell.outputs:
        if png := output.get("data", {}).get("image/png"):
            yield f'<img alt="figure" src="data:image/png;base64,{"".join(png.split())}">'


# ---- slides
class Deck:
    """Collects slides: a title and what stands below it."""

    def __init__(self) -> None:
        self.slides: list[tuple[str, list[str]]] = []
        self.title, self.used = "", ROOM

    def heading(self, title: str) -> None:
        self.title, self.used = title, ROOM

    def add(self, content: str, height: float = ROOM) -> None:
        if self.used + height > ROOM + 1e-6:
            self.slides.append((self.title, []))
            self.used = 0.0
        self.slides[-1][1].append(content)
        self.used += height

    def ends_with_figure(self) -> bool:
        """Whether the last slide has nothing but a figure."""
        return bool(self.slides) and len(body := self.slides[-1][1]) == 1 and "<img" in body[0]


def _links(text: str) -> str:
    """Links to notebooks become links to pages beside the slides; the site has both."""
    return re.sub(r'href="(plot_\w+)\.ipynb"', r'href="\1.html"', text)


def _with_pictures(text: str, cell: nbformat.NotebookNode) -> str:
    """A picture that is attached to the cell becomes part of the page."""

    def data(m: re.Match) -> str:
        png = cell.attachments[m[1]]["image/png"]
        return f'src="data:image/png;base64,{"".join(png.split())}"'

    return re.sub(r'src="attachment:([\w.]+)"', data, text)


def deck(notebook: nbformat.NotebookNode) -> str:
    """The slides of a notebook, as the body of a page."""
    maths, slides = Maths(), Deck()
    md = MarkdownIt("commonmark", {"html": True}).enable("table")
    dollarmath_plugin(md, renderer=maths.mark, double_inline=True)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            text = re.sub(r"<details>.*?</details>", "", cell.source, flags=re.S)
            blocks = _glued(list(_blocks(md.parse(text))))
            height = sum(map(_height, blocks))
            # A short text below a figure reads it. Any other starts a slide, with what follows it.
            reads = slides.ends_with_figure() and height <= READING
            slides.used = ROOM - height if reads else ROOM
            for block in blocks:
                if block[0].type == "heading_open":
                    slides.heading(md.renderer.render(block[1:-1], md.options, {}))
                    continue
                for piece in _pieces(block):
                    shown = _with_pictures(md.renderer.render(piece, md.options, {}), cell)
                    slides.add(shown, _height(piece))
        elif "hide-input" not in tags and "answer" not in tags:
            for part in chunks(cell.source):
                slides.add(_code(part), CODE_LINE * (part.count("\n") + 3))
            for output in _outputs(cell):
                picture = output.startswith("<img")
                slides.add(output, ROOM if picture else CODE_LINE * (output.count("\n") + 3))
    pages = [
        f'<section class="slide"><h2>{title}</h2><div class="body">{"".join(body)}</div></section>'
        for title, body in slides.slides
    ]
    first = pages[0].replace("<h2>", "<h1>").replace("</h2>", "</h1>") if pages else ""
    return _links(maths.fill("\n".join([first, *pages[1:]])))


def page(notebook: nbformat.NotebookNode, title: str) -> str:
    """The whole file."""
    colours = HtmlFormatter(style="default").get_style_defs(".code")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}: slides</title>
<link rel="stylesheet" href="katex/katex.min.css"><link rel="stylesheet" href="deck.css">
<style>{colours}</style></head>
<body><main id="deck">
{deck(notebook)}
</main>
<nav><button id="back" aria-label="previous slide">&lsaquo;</button><span id="count"></span>
<button id="next" aria-label="next slide">&rsaquo;</button></nav>
<script src="deck.js"></script></body></html>
"""


def title_of(notebook: nbformat.NotebookNode) -> str:
    """The first heading, without its marks."""
    return re.sub(r"[*`$\\]", "", re.search(r"^# (.+)$", notebook.cells[0].source, re.M)[1])


def names() -> list[str]:
    """The notebooks that become slides: all pages, none of the solutions."""
    stems = sorted(p.stem for p in NOTEBOOKS.glob("plot_*.ipynb"))
    return [s for s in stems if not s.endswith("_solution")]


def write(folder: pathlib.Path, chosen: list[str]) -> None:
    """Write the slides, and beside them what they share."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(STATIC / "katex", folder / "katex", dirs_exist_ok=True)
    for name in ("deck.css", "deck.js"):
        shutil.copyfile(ROOT / "tools" / name, folder / name)
    for name in chosen:
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        (folder / f"{name}.html").write_text(page(notebook, title_of(notebook)), encoding="utf-8")


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", type=pathlib.Path)
    p.add_argument("names", nargs="*")
    a = p.parse_args()
    write(a.folder, a.names or names())
    print(f"wrote {len(a.names or names())} sets of slides to {a.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
