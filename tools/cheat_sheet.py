"""Print the cheat sheet of the built site to docs/_static/cheat_sheet.pdf, one page of A4.

python tools/cheat_sheet.py [SITE]
"""

from __future__ import annotations

import hashlib
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "docs" / "cheat_sheet.md"
PDF = ROOT / "docs" / "_static" / "cheat_sheet.pdf"


def digest() -> str:
    """Of the text that is printed, to tell whether the PDF is in step with it."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]


def recorded(pdf: bytes) -> str:
    """The digest that was kept in a PDF."""
    found = re.search(rb"% cheat sheet (\w{16})\s*$", pdf)
    return found[1].decode() if found else ""


def pages(pdf: bytes) -> int:
    """How many pages a PDF has."""
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf))


def print_page(browser, address: str) -> bytes:
    """The PDF of a page at an address."""
    page = browser.new_page()
    page.goto(address)
    page.evaluate("document.fonts.ready")
    return page.pdf(
        format="A4",
        prefer_css_page_size=False,
        margin=dict.fromkeys(("top", "bottom", "left", "right"), "10mm"),
    )


def main(site: pathlib.Path) -> int:
    import chromium
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = chromium.launch(p)
        pdf = print_page(browser, (site / "cheat_sheet.html").resolve().as_uri())
        browser.close()
    if (n := pages(pdf)) != 1:
        raise SystemExit(f"the cheat sheet takes {n} pages, not one: shorten it")
    PDF.write_bytes(pdf + f"% cheat sheet {digest()}\n".encode())
    print(f"wrote {PDF.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs/_build/site")))
