"""Draw the still pictures of the figures that a reader can move, for paper and for notebooks.

python tools/stills.py      write docs/_static/interactive_*.svg (by node) and the same as .png (by Chromium)

A notebook takes a PNG along as an attachment, because Jupyter shows no attached SVG.
"""

from __future__ import annotations

import hashlib
import io
import pathlib
import re
import subprocess

from PIL import Image, PngImagePlugin

STATIC = pathlib.Path(__file__).resolve().parent.parent / "docs" / "_static"
COLOURS = 64  # of the palette: flat areas and the edges of letters need no more


def digest(svg: pathlib.Path) -> str:
    """Of the drawing, to tell whether its PNG is in step with it."""
    return hashlib.sha256(svg.read_bytes()).hexdigest()[:16]


def recorded(png: pathlib.Path) -> str:
    """The digest that was kept in a PNG."""
    with Image.open(png) as image:
        return image.info.get("drawing", "")


def write_png(browser, svg: pathlib.Path) -> pathlib.Path:
    """The drawing at twice its size, so that it is sharp on a projector."""
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg.read_text()).groups())
    page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=2)
    page.goto(svg.as_uri())
    image = Image.open(io.BytesIO(page.screenshot()))
    page.close()
    note = PngImagePlugin.PngInfo()
    note.add_text("drawing", digest(svg))
    path = svg.with_suffix(".png")
    image.convert("RGB").quantize(COLOURS).save(path, pnginfo=note, optimize=True)
    return path


def main() -> None:
    import chromium
    from playwright.sync_api import sync_playwright

    subprocess.run(["node", STATIC / "interactive.js", STATIC], check=True)
    with sync_playwright() as p:
        browser = chromium.launch(p)
        for svg in sorted(STATIC.glob("interactive_*.svg")):
            print("wrote", write_png(browser, svg).name)
        browser.close()


if __name__ == "__main__":
    main()
