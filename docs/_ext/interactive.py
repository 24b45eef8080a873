"""The directive ``interactive``: a figure of ``_static/interactive.js``, and its still picture without scripts."""

from __future__ import annotations

import posixpath

from docutils import nodes
from docutils.parsers.rst import Directive

FIGURES = {
    "divergence": "A step and a curvature: where the inverse-free update of a factor diverges.",
    "damping": "Three ways to damp a Kronecker product, over its eigenvalues.",
    "closure": "A pattern of zeros, and the smallest structure that holds it.",
}


class interactive(nodes.General, nodes.Element):
    """Stands for one figure until its page is written."""


class Interactive(Directive):
    """``.. interactive:: divergence``."""

    required_arguments = 1

    def run(self):
        name = self.arguments[0]
        if name not in FIGURES:
            raise self.error(
                f"no interactive figure is called {name!r}; there are {', '.join(FIGURES)}"
            )
        return [interactive(figure=name)]


def visit(self, node):
    name = node["figure"]
    static = posixpath.relpath("_static", posixpath.dirname(self.builder.current_docname) or ".")
    still = f'<img src="{static}/interactive_{name}.svg" alt="{FIGURES[name]}">'
    self.body.append(
        f'<div class="interactive" id="figure-{name}" data-figure="{name}">'
        f"<noscript>{still}</noscript></div>\n"
    )
    raise nodes.SkipNode


def add_files(app, pagename, templatename, context, doctree):
    """Only pages that hold a figure load its script."""
    if doctree is not None and any(doctree.findall(interactive)):
        app.add_js_file("interactive.js", loading_method="defer")
        app.add_css_file("interactive.css")


def setup(app):
    app.add_node(interactive, html=(visit, None))
    app.add_directive("interactive", Interactive)
    app.connect("html-page-context", add_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
