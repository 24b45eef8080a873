"""Every test starts from the same random state and leaves the defaults of torch as they were.

And for the tests that read pages in a browser: the browser, and pages that must make no trouble.
"""

import os
import pathlib
import sys

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).parent.parent / "tools"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() is torch.float32


# ---- a browser


@pytest.fixture(scope="session")
def browser_required():
    """Whether what a browser test needs must be here: then it fails where it would be skipped."""
    return bool(os.environ.get("SINGD_BROWSER"))


@pytest.fixture(
    scope="module"
)  # not longer: while it is open, no other test could run an event loop
def browser(browser_required):
    import chromium

    if not browser_required:
        if not chromium.is_here():
            pytest.skip("no Chromium on this machine")
        pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        opened = chromium.launch(p)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """open_page(address, ...) -> page, in a context of its own.

    The test fails at its end if a page asked for anything but what starts with ``inside``, if an answer was an
    error, or if the page's console has errors or warnings.
    """
    contexts, trouble = [], []

    def go(address, *, inside=("file:", "data:", "blob:"), width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)

        def outside(route):
            trouble.append(f"asked for {route.request.url}")
            route.abort()

        context.route(lambda url: not url.startswith(inside), outside)
        page = context.new_page()
        page.set_default_timeout(15000)
        page.on(
            "console",
            lambda m: (
                trouble.append(f"console: {m.text}") if m.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda e: trouble.append(f"script: {e}"))
        page.on(
            "requestfailed",  # of a server's files also those that a next click no longer needs
            lambda r: trouble.append(f"no {r.url}") if r.url.startswith("file:") else None,
        )
        page.on(
            "response", lambda r: trouble.append(f"{r.status} {r.url}") if r.status >= 400 else None
        )
        page.goto(address)
        page.wait_for_load_state("load")
        return page

    yield go
    for context in contexts:
        context.close()
    assert not trouble, "\n".join(trouble)
