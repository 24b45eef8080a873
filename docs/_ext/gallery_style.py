"""The gallery's figures in the project's style; sphinx-gallery would start each page with matplotlib's own."""

import pathlib

import matplotlib as mpl

STYLE = pathlib.Path(__file__).parents[2] / "gallery" / "matplotlibrc"


def apply(gallery_conf, fname):
    """Called before each page, after sphinx-gallery's own reset."""
    mpl.rcParams.update(mpl.rc_params_from_file(STYLE, use_default_template=False))
