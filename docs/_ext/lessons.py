"""The role ``lesson``: :lesson:`5` or :lesson:`damping <5>` links to a lesson of the course by its number."""

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


def setup(app):
    app.add_role("lesson", lesson)
    return {"parallel_read_safe": True}
