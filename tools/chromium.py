"""The browser that prints, draws and tests: the system's Chromium, which asks no network for anything."""

from __future__ import annotations

import os
import pathlib
import shutil

PATH = os.environ.get("CHROMIUM", shutil.which("chromium") or "chromium")
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def is_here() -> bool:
    """Whether this machine has it."""
    return pathlib.Path(PATH).exists()


def launch(playwright):
    """The browser, to be closed by the caller."""
    return playwright.chromium.launch(executable_path=PATH, args=ARGS)
