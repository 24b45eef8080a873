"""Each page of the gallery starts as a script does: sphinx-gallery runs all pages in one process.

Its figures are in the project's style, where sphinx-gallery would start with matplotlib's own, and what an earlier
page has set in torch is undone.
"""

import pathlib

import matplotlib as mpl
import torch

STYLE = pathlib.Path(__file__).parents[2] / "gallery" / "matplotlibrc"


def apply(gallery_conf, fname):
    """Called before each page, after sphinx-gallery's own reset."""
    mpl.rcParams.update(mpl.rc_params_from_file(STYLE, use_default_template=False))
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
