"""The course on the site.

The role ``lesson``: :lesson:`5` or :lesson:`damping <5>` links to a lesson by its number. And what a lesson prints
in bold, if the glossary has it, links there.
"""

from __future__ import annotations

import pathlib
import re

from docutils import nodes
from sphinx import addnodes

COURSE = pathlib.Path(__file__).parents[2] / "gallery" / "0_course"


def lesson(name, rawtext, text, lineno, inliner, options=None, content=None):
    """A link to the page whose name starts with the lesson's number."""
    match = re.fullmatch(r"(?:(.+?)\s*<)?(\d+)>?", text)
    number = int(match[2])
    shown = match[1] or f"lesson {number}"
    pages = sorted(COURSE.glob(f"plot_{number:02d}_*.py"))
    if len(pages) != 1:
        problem = f"lesson {number} has {len(pages)} pages in {COURSE.name}, not one"
        message = inliner.reporter.warning(problem, line=lineno)
        return [nodes.inline(rawtext, shown)], [message]
    link = addnodes.pending_xref(
        rawtext,
        nodes.inline(rawtext, shown),
        refdomain="std",
        reftype="ref",
        reftarget=f"sphx_glr_auto_gallery_{COURSE.name}_{pages[0].name}".lower(),
        refexplicit=True,
        refwarn=True,
    )
    return [link], []


def link_terms(app, doctree, docname):
    """A lesson's bold words become links to the glossary, each at its first use."""
    if not docname.startswith(f"auto_gallery/{COURSE.name}/plot_"):
        return
    objects = app.env.get_domain("std").objects
    terms = {name.casefold(): place for (kind, name), place in objects.items() if kind == "term"}
    seen = set()
    for bold in list(doctree.findall(nodes.strong)):
        words = " ".join(bold.astext().casefold().split())
        found = next((w for w in (words, words.removesuffix("s")) if w in terms), None)
        if found is None or found in seen or isinstance(bold.parent, nodes.reference):
            continue
        seen.add(found)
        page, anchor = terms[found]
        uri = app.builder.get_relative_uri(docname, page) + f"#{anchor}"
        link = nodes.reference("", "", internal=True, refuri=uri, classes=["term"])
        bold.replace_self(link)
        link += bold


def setup(app):
    app.connect("doctree-resolved", link_terms)
    app.add_role("lesson", lesson)
    return {"parallel_read_safe": True}
