"""The figures that a reader can move: their mathematics, their still pictures, and their controls in a browser.

They are read from a page of their own, so that no site has to be built.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest
import stills
import torch

ROOT = pathlib.Path(__file__).parent.parent
STATIC = ROOT / "docs" / "_static"
REQUIRED = bool(os.environ.get("SINGD_BROWSER"))  # CI: what would be skipped fails
FIGURES = ["divergence", "damping", "closure"]


def node(expression: str):
    """The value of an expression over what interactive.js exports."""
    if shutil.which("node") is None and not REQUIRED:
        pytest.skip("no node on this machine")
    code = f"const f = require({json.dumps(str(STATIC / 'interactive.js'))});"
    code += f"console.log(JSON.stringify({expression}))"
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", FIGURES)
def test_the_still_picture_is_in_step(name):
    still = (STATIC / f"interactive_{name}.svg").read_text()
    assert still == node(f"f.still('{name}')"), "run: make stills"


@pytest.mark.parametrize("name", FIGURES)
def test_a_lesson_has_the_figure_and_its_notebooks_the_still_picture(name):
    """Where notebooks are shown nothing can be moved, and a file beside them may be missing: so it is inside."""
    svg = STATIC / f"interactive_{name}.svg"
    assert stills.recorded(svg.with_suffix(".png")) == stills.digest(svg), "run: make stills"
    lessons = [
        p
        for p in (ROOT / "gallery" / "0_course").glob("plot_*.py")
        if f"# .. interactive:: {name}\n" in p.read_text()
    ]
    assert len(lessons) == 1
    for end in ("", "_solution"):
        notebook = json.loads((ROOT / "notebooks" / f"{lessons[0].stem}{end}.ipynb").read_text())
        taken = [c["attachments"] for c in notebook["cells"] if c.get("attachments")]
        kept = base64.b64encode(svg.with_suffix(".png").read_bytes()).decode()
        assert taken == [{f"interactive_{name}.png": {"image/png": kept}}]


def test_a_factor_diverges_exactly_above_the_limit():
    for beta in (0.01, 0.03, 0.1, 0.5, 1.0):
        limit = node(f"f.limit({beta})")
        assert limit == pytest.approx(1 + 4 / beta)
        for s, guard, result in [
            (0.5, "false", "stays"),
            (0.99 * limit, "false", "stays"),
            (1.01 * limit, "false", "diverges"),
            (100 * limit, "true", "stays"),
        ]:
            assert node(f"f.outcome(f.iterate({beta}, {s}, {guard}, 5000))") == result


def test_the_iteration_is_that_of_the_text():
    k, beta, s = 1.0, 0.1, 20.0
    for given in node(f"f.iterate({beta}, {s}, false, 30)"):
        assert given == pytest.approx(k)
        k -= beta * k * 0.5 * (s * k * k - 1)


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_the_filters_are_those_of_the_text(c):
    """Against dense matrices: a filter is what a damped inverse leaves of the undamped one."""
    lam = 1e-3
    given = node(f"f.filters({{lam: {lam}, c: {c}}})")
    eigenvalues = 10 ** torch.linspace(0.5, -3, 16, dtype=torch.float64)
    U, G = torch.diag(c * eigenvalues), torch.diag(eigenvalues / 10 / c)
    I = torch.eye(16, dtype=torch.float64)
    F = torch.kron(G, U)
    pi = (U.trace() / G.trace()).sqrt()
    assert given["pi"] == pytest.approx(pi.item())
    damped = {
        "full": F + lam * torch.eye(256),
        "factored": torch.kron(G + lam**0.5 * I, U + lam**0.5 * I),
        "withPi": torch.kron(G + lam**0.5 / pi * I, U + lam**0.5 * pi * I),
    }
    for name, matrix in damped.items():
        expected = torch.linalg.solve(matrix, F).diagonal().view(16, 16)
        torch.testing.assert_close(torch.tensor(given[name], dtype=torch.float64), expected)


def test_scale_moves_only_the_factored_filter():
    at = {c: node(f"f.filters({{lam: 1e-3, c: {c}}})") for c in (1, 30)}
    one, other = ({k: torch.tensor(v) for k, v in f.items() if k != "pi"} for f in at.values())
    torch.testing.assert_close(one["full"], other["full"])
    torch.testing.assert_close(one["withPi"], other["withPi"])
    assert (one["factored"] - other["factored"]).abs().max() > 0.05


def test_a_closure_is_the_pattern_of_products():
    """Against products of random members, and closed ones against inverses as well."""
    torch.manual_seed(0)
    drawn = [torch.rand(6, 6) < p for p in (0.05, 0.1, 0.15, 0.2, 0.3) for _ in range(4)]
    masks = [m | torch.eye(6, dtype=torch.bool) for m in drawn]
    presets = node("f.PRESETS")
    masks += [torch.tensor(p).view(6, 6) for p in presets.values()]
    for mask in masks:
        pattern = json.dumps(mask.flatten().tolist())
        whole = torch.tensor(node(f"f.closure({pattern}).pattern")).view(6, 6)
        A = torch.eye(6, dtype=torch.float64)
        for _ in range(6):
            A = A @ (mask * (0.5 + torch.rand(6, 6, dtype=torch.float64)))
        assert torch.equal(A != 0, whole)
        member = torch.rand(6, 6, dtype=torch.float64) + 3 * torch.eye(6, dtype=torch.float64)
        assert torch.linalg.inv(member * whole)[~whole].abs().sum() < 1e-12
    is_closed = {name for name in presets if node(f"f.closure(f.PRESETS['{name}']).rounds") == 0}
    assert is_closed == {"diagonal", "blocks", "lower triangular", "hierarchical"}


# ---- in a browser
@pytest.fixture
def visit(open_page, tmp_path):
    """visit(...) -> a page with the three figures; fails on errors of the script."""
    places = "".join(
        f'<div class="interactive" id="{n}" data-figure="{n}">'
        f'<noscript><img src="{(STATIC / f"interactive_{n}.svg").as_uri()}"></noscript></div>'
        for n in FIGURES
    )
    css, js = ((STATIC / f"interactive.{kind}").read_text() for kind in ("css", "js"))
    path = tmp_path / "page.html"
    path.write_text(
        '<!doctype html><html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<style>body{{font:16px sans-serif;margin:1rem}}{css}</style>{places}<script>{js}</script></html>"
    )
    return functools.partial(open_page, path.as_uri())


def says(page, name):
    return page.locator(f"#{name} output").inner_text()


def test_sliders_move_by_the_keyboard(visit):
    page = visit()
    before = says(page, "divergence")
    assert "limit is 1 + 4/β₁ = 41" in before and "within 1 %" in before
    page.locator("#divergence input[name=s]").focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    assert "diverges" in says(page, "divergence")
    assert page.locator("#divergence circle.b").count() > 0
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert "Only the guard saves it" in says(page, "divergence")


def test_the_map_is_dragged(visit):
    page = visit()
    plane = page.locator("#divergence svg.drag").bounding_box()
    page.mouse.move(plane["x"] + 0.5 * plane["width"], plane["y"] + 0.7 * plane["height"])
    page.mouse.down()
    low = says(page, "divergence")
    page.mouse.move(plane["x"] + 0.9 * plane["width"], plane["y"] + 0.12 * plane["height"], steps=4)
    page.mouse.up()
    assert "diverges" not in low and "diverges" in says(page, "divergence")


def test_the_scale_moves_one_filter_only(visit):
    page = visit()

    def distances():
        return re.findall(r"(?:factored|with π) ([\d.]+)", says(page, "damping"))

    factored, with_pi = distances()
    page.locator("#damping input[name=c]").focus()
    page.keyboard.press("End")
    assert distances()[1] == with_pi and distances()[0] != factored
    page.locator("#damping input[name=lam]").focus()
    page.keyboard.press("Home")
    assert distances()[1] != with_pi


def test_a_pattern_is_drawn_by_mouse_keyboard_and_touch(visit):
    page = visit(has_touch=True)
    page.locator("#closure .presets button", has_text="diagonal").first.click()
    assert says(page, "closure").startswith("Dimension 6, closed")
    page.get_by_role("button", name="row 1, column 2", exact=True).click()
    page.get_by_role("button", name="row 2, column 3", exact=True).tap()
    assert says(page, "closure").startswith("Dimension 8, not closed: products fill 1 more")
    assert page.locator("#closure svg .b").count() == 1
    page.get_by_role("button", name="row 1, column 2", exact=True).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert says(page, "closure").startswith("Dimension 9, closed")
    page.get_by_role("button", name="row 4, column 4", exact=True).click(
        force=True
    )  # the diagonal stays
    assert says(page, "closure").startswith("Dimension 9, closed")


def test_every_control_is_named_and_reached_by_tab(visit):
    page = visit()
    names, last = set(), None
    for _ in range(30):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "(e => e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent)(document.activeElement)"
        )
        if name == last:
            break
        names.add(name)
        last = name
    assert {"step β₁", "curvature s", "damping λ", "tridiagonal", "row 1, column 2"} <= names


def test_dark_mode_changes_the_colours(visit):
    page = visit()
    colour = "getComputedStyle(document.querySelector('#damping svg .a')).fill"
    light = page.evaluate(colour)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert page.evaluate(colour) != light


def test_a_phone_needs_no_sideways_scroll_and_has_room_for_fingers(visit):
    page = visit(width=390)
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    for name in FIGURES:
        for box in (
            e.bounding_box() for e in page.locator(f"#{name} :is(button, input[type=range])").all()
        ):
            assert box["height"] >= 32


def test_without_scripts_and_on_paper_a_still_picture_remains(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("noscript img").count() == 3
    page = visit()
    page.emulate_media(media="print")
    for name in FIGURES:
        assert not page.locator(f"#{name} .controls").is_visible()
        for svg in page.locator(f"#{name} svg").all():
            assert svg.bounding_box()["width"] >= 200, name
