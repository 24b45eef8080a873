"""Sphinx configuration."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import tempfile

import sphinxcontrib.katex as _katex

HERE = pathlib.Path(__file__).parent.resolve()
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "_ext"))
sys.path.insert(0, str(ROOT / "tools"))

project = "singd"
author = "the singd developers"
copyright = "2026, the singd developers"
version = release = "0.1.0"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_autodoc_typehints",  # after napoleon
    "myst_nb",  # also brings MyST Markdown
    "sphinx_gallery.gen_gallery",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    "sphinxcontrib.katex",
    "sphinxext.opengraph",
    "sphinx_sitemap",
    # in docs/_ext
    "interactive",
    "lessons",
    "page_facts",
    "public_names",
    "structures_table",
]
exclude_patterns = [
    "_build",
    "**.ipynb_checkpoints",
    # what sphinx-gallery leaves beside its .rst (myst_nb would take the .ipynb for pages)
    "auto_gallery/**/*.ipynb",
    "auto_gallery/**/*.py",
    "auto_gallery/**/*.md5",
    "auto_gallery/**/*.json",
    "structures_table.md",  # included by a page
    "overrides_table.md",
]
nitpicky = True
nitpick_ignore = [  # of what `SINGD.stats` is made of, and nobody calls
    ("py:class", "singd.blocks.Block"),
    ("py:class", "singd.processes.ownership.Ownership"),
]

# -- reST, MyST, notebooks, bibliography
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3  # so that a page can point at another page's heading
nb_execution_mode = "off"  # notebooks are committed with their outputs; nbval runs them
bibtex_bibfiles = ["refs.bib"]
bibtex_default_style = "unsrt"
math_eqref_format = "({number})"

# -- API
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
always_use_bars_union = True
typehints_defaults = "comma"
typehints_document_rtype_none = False

# -- other projects' names, with no network: plain-text (version 1) inventories kept in docs/_inv
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", str(HERE / "_inv" / "python.inv")),
    "torch": ("https://docs.pytorch.org/docs/stable/", str(HERE / "_inv" / "torch.inv")),
}

# -- maths: set by KaTeX at build time (node), a style sheet and fonts from docs/_static/katex.
# That folder is npm's katex@0.16.22: the release whose katex.min.js is in the sphinxcontrib-katex wheel.
katex_prerender = True
katex_css_path = "katex/katex.min.css"
# `katex_options` is not read when prerendering; this is. throwOnError: bad maths ends the build.
_katex.KATEX_DEFAULT_OPTIONS.update(throwOnError=True, macros={r"\E": r"\operatorname{\mathbb{E}}"})

# The renderer's own start is a race: it connects as soon as the socket exists, before node listens on it. The
# start that it has for Windows tries again. Five seconds are too few on a busy machine.
_katex.KaTeXServer.start_server_process = _katex.KaTeXServer.start_network_socket
_katex.STARTUP_TIMEOUT = 60.0

# -- gallery
if shutil.which("ffmpeg") is None:  # by PATH, since sphinx-gallery resets matplotlib's rcParams
    import imageio_ffmpeg

    _bin = pathlib.Path(tempfile.mkdtemp()) / "ffmpeg"
    _bin.symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    os.environ["PATH"] = f"{_bin.parent}{os.pathsep}{os.environ['PATH']}"

sphinx_gallery_conf = {
    "examples_dirs": [str(ROOT / "gallery")],
    "gallery_dirs": ["auto_gallery"],
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",  # the class itself: an 'unpickleable' warning
    "matplotlib_animations": (
        True,
        "html5",
    ),  # jshtml asks a CDN for Font Awesome and is 60 times larger
    "reset_modules": ("matplotlib", "gallery_style.apply"),
    "backreferences_dir": "gen_modules",
    "doc_module": ("singd",),
    "remove_config_comments": True,
    "abort_on_example_error": True,
    "write_computation_times": False,
    "min_reported_time": 0,  # page_facts shows it at the top
    "image_srcset": ["2x"],
    "download_all_examples": False,
}

# -- HTML
html_theme = "pydata_sphinx_theme"
html_title = "singd"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_baseurl = "https://example.org/singd/"
html_show_sourcelink = False
html_context = {"default_mode": "auto"}  # without it: a console warning on the first visit
html_sidebars = {page.stem: [] for page in HERE.glob("*.md")}  # the gallery alone has one
html_theme_options = {
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 2,
    "navigation_with_keys": True,
    "header_links_before_dropdown": 7,
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
    "secondary_sidebar_items": [
        "page-toc",
        "sg_download_links",
    ],  # sphinx-gallery's downloads in the sidebar
}
sitemap_url_scheme = "{link}"
sitemap_show_lastmod = False
ogp_site_url = html_baseurl
ogp_social_cards = {"enable": False}


def _bring_notebooks(app):
    """The executed notebooks/*.ipynb become the gallery's downloads."""
    for page in HERE.glob("auto_gallery/*/plot_*.rst"):
        shutil.copyfile(ROOT / "notebooks" / f"{page.stem}.ipynb", page.with_suffix(".ipynb"))


def _bring_slides_and_archive(app, exception):
    """What the pages link to, and Sphinx does not make."""
    if exception is None and app.builder.format == "html":
        import archive
        import slides

        out = pathlib.Path(app.outdir)
        slides.write(out / "slides", slides.names())
        archive.write(out / "singd-gallery.zip")
        (out / "solutions").mkdir(exist_ok=True)
        for path in (*ROOT.glob("notebooks/*_solution.ipynb"), ROOT / "notebooks/course_check.py"):
            shutil.copyfile(path, out / "solutions" / path.name)


def setup(app):
    app.connect("builder-inited", _bring_notebooks, priority=900)  # after sphinx-gallery's
    app.connect("build-finished", _bring_slides_and_archive, priority=400)  # before its summary
