"""Run a page of the gallery as a script, and keep the figures that it draws.

python tools/run_page.py gallery/1_start/plot_10_first_steps.py [FOLDER]
"""

import os
import pathlib
import runpy
import sys

# The gallery's style, which matplotlib reads when it is imported.
os.environ.setdefault("MATPLOTLIBRC", str(pathlib.Path(__file__).parent.parent / "gallery"))

import matplotlib

matplotlib.use("Agg")


def main(page: pathlib.Path, folder: pathlib.Path | None) -> None:
    runpy.run_path(str(page), run_name="__main__")
    if folder is None:
        return
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for i in plt.get_fignums():
        path = folder / f"{page.stem}_{i}.png"
        plt.figure(i).savefig(path, dpi=150, bbox_inches="tight")
        print(f"wrote {path}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else None)
