"""Pack the gallery, its notebooks and the package into one archive, with what is needed to run them.

python tools/archive.py PATH.zip
"""

from __future__ import annotations

import pathlib
import sys
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAME = "singd-gallery"  # the folder in the archive
KEPT = {
    "gallery": ("*.py", "matplotlibrc"),
    "notebooks": ("*.ipynb", "*.py"),
    "src": ("*.py", "py.typed"),
    "docs/_data": ("*.json",),
    "tools": ("run_page.py",),
}
FILES = ("pyproject.toml", "README.md", "LICENSE", "constraints.txt")
README = """The gallery of singd: scripts in gallery/, the same as executed notebooks in notebooks/.

Install all that they need, and open the course, with one line. It takes Python 3.10 or newer. The default build
of torch is large on Linux, so install its CPU build first if you have no GPU.

    pip install -r requirements.txt && jupyter lab notebooks

A lesson of the course asks in plot_01_....ipynb, and answers in plot_01_..._solution.ipynb.
"""
REQUIREMENTS = "# Run in this folder: the first line is the package itself.\n.[gallery,lab]\n"


def members() -> dict[str, bytes]:
    """The archive's files by their names."""
    found = {
        NAME + "/START.txt": README.encode(),
        NAME + "/requirements.txt": REQUIREMENTS.encode(),
    }
    paths = [ROOT / f for f in FILES]
    for folder, patterns in KEPT.items():
        paths += [p for pattern in patterns for p in (ROOT / folder).rglob(pattern)]
    for path in paths:
        if "egg-info" not in str(path) and ".ipynb_checkpoints" not in path.parts:
            found[f"{NAME}/{path.relative_to(ROOT).as_posix()}"] = path.read_bytes()
    return dict(sorted(found.items()))


def write(path: pathlib.Path) -> None:
    """Write the archive; the same files give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members().items():
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, data)


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
