"""The built site, read as a person would: a real browser with no network."""

from __future__ import annotations

import functools
import html.parser
import http.server
import importlib.util
import json
import os
import pathlib
import re
import threading
import urllib.parse
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SITE = pathlib.Path(os.environ.get("SINGD_SITE", ROOT / "docs/_build/site"))
REQUIRED = bool(os.environ.get("SINGD_BROWSER"))  # CI: what would be skipped fails
if not REQUIRED and not (SITE / "index.html").exists():
    pytest.skip("no site to read: run `make browser`, which builds it", allow_module_level=True)
PAGES = sorted(
    p.relative_to(SITE).as_posix()
    for p in SITE.rglob("*.html")
    if not p.relative_to(SITE).parts[0].startswith(("_", "genindex", "search", "slides"))
)
assert PAGES or not REQUIRED, f"no page in {SITE}"


# ---- links, without a browser
class _Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.refs, self.ids = [], set()

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if "id" in a:
            self.ids.add(a["id"])
        if tag == "a" and "name" in a:
            self.ids.add(a["name"])
        for k in ("href", "src", "poster"):
            if a.get(k) and not (tag == "link" and a.get("rel") in ("canonical", "search")):
                self.refs.append(a[k])


@functools.lru_cache(None)
def _read(path: pathlib.Path) -> _Links:
    p = _Links()
    p.feed(path.read_text(encoding="utf-8"))
    return p


def test_internal_links():
    bad = []
    for page in (p for p in SITE.rglob("*.html") if "_static" not in p.parts):
        for ref in _read(page).refs:
            u = urllib.parse.urlsplit(ref)
            if u.scheme or u.netloc:
                continue
            target = (page.parent / urllib.parse.unquote(u.path)).resolve() if u.path else page
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                bad.append(f"{page.relative_to(SITE)}: {ref}: no such file")
            elif (
                u.fragment
                and target.suffix == ".html"
                and urllib.parse.unquote(u.fragment) not in _read(target).ids
            ):
                bad.append(f"{page.relative_to(SITE)}: {ref}: no such anchor")
    assert not bad, "\n".join(sorted(set(bad)))


# ---- the browser
@pytest.fixture(scope="module")
def base():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(open_page, base):
    """visit(path, ...) -> page; fails at the end on console errors, failed or outside requests."""

    def go(path, *, scheme="light", **options):
        inside = (base, "data:", "blob:")
        options = {"color_scheme": scheme, "accept_downloads": True, **options}
        return open_page(base + path, inside=inside, **options)

    return go


@pytest.mark.parametrize("path", PAGES)
def test_every_page(visit, path):
    page = visit(path)
    assert page.locator("h1").count() >= 1
    assert page.locator(".katex-error, mjx-merror").count() == 0
    broken = page.evaluate(
        "[...document.images].filter(i => i.loading !== 'lazy' && !(i.complete && i.naturalWidth)).map(i => i.src)"
    )
    assert broken == []


@pytest.mark.parametrize("path", PAGES)
def test_no_sideways_scroll_on_a_phone(visit, path):
    page = visit(path, width=390, height=844)
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    cut = page.evaluate(
        "[...document.querySelectorAll('div.math')].filter(m => m.querySelector('.base').getBoundingClientRect()"
        ".left < m.getBoundingClientRect().left - 1).map(m => m.textContent.slice(0, 80))"
    )
    assert cut == [], "formulas whose start cannot be scrolled to"


@pytest.mark.parametrize(
    "path", ["concepts.html", "auto_gallery/1_start/plot_11_replace_adamw.html"]
)
def test_a_formula_breaks_on_a_phone_where_it_can(visit, path):
    """One whose lines are aligned cannot, and scrolls; a shade at its edge shows that it goes on."""
    page = visit(path, width=390, height=844)
    hidden = page.evaluate(
        "[...document.querySelectorAll('div.math')].filter(m => m.scrollWidth > m.clientWidth + 1 &&"
        " !m.querySelector('.mtable, .minner')).map(m => m.textContent.slice(0, 80))"
    )
    assert hidden == []
    shades = page.evaluate(
        "[...document.querySelectorAll('div.math, div.highlight pre')].filter(e => e.scrollWidth > e.clientWidth)"
        ".map(e => getComputedStyle(e).backgroundImage)"
    )
    assert shades and all("gradient" in shade for shade in shades)


@pytest.mark.parametrize("path", ["index.html", "api.html", PAGES[3], PAGES[-2]])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(visit, path, scheme):
    """By the ratio of 4.5 that readers with weak eyes need; code is coloured by a style of its own."""
    page = visit(path, scheme=scheme)
    weak = page.evaluate("""() => {
      const rgb = s => { const c = s.match(/[\\d.]+/g).map(Number); return c.length > 3 ? c : [...c, 1]; };
      const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], .05);
      const behind = e => { for (; e; e = e.parentElement) {
        const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] > .5) return c; } return [255, 255, 255]; };
      const found = {}, walk = document.createTreeWalker(document.querySelector('.bd-article'), NodeFilter.SHOW_TEXT);
      while (walk.nextNode()) {
        const e = walk.currentNode.parentElement;
        if (!walk.currentNode.textContent.trim() || e.closest('.katex-mathml, svg, script, style')) continue;
        if (!e.getBoundingClientRect().width) continue;
        const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
        const ratio = Math.max(a, b) / Math.min(a, b);
        if (ratio < 4.5) found[e.tagName + '.' + e.className] = ratio.toFixed(2);
      }
      return found;
    }""")
    assert weak == {}


def test_maths(visit):
    page = visit("api.html")
    n = page.locator(".katex").count()
    assert n > 5 and page.locator(".katex .katex-html").count() == n
    page.evaluate("document.fonts.ready")
    assert page.evaluate(
        "document.fonts.check('16px KaTeX_Main') && [...document.fonts].some(f => f.family.includes('KaTeX_Main') && f.status == 'loaded')"
    )
    # a superscript is smaller than its base: catches a style sheet of another KaTeX
    small = page.evaluate(
        "[...document.querySelectorAll('.katex .msupsub .mtight')].length && "
        "parseFloat(getComputedStyle(document.querySelector('.katex .msupsub .sizing')).fontSize) < "
        "parseFloat(getComputedStyle(document.querySelector('.katex')).fontSize)"
    )
    assert small


def test_search(visit):
    page = visit("search.html?q=mnist")
    page.wait_for_selector("#search-results li a")
    hrefs = page.eval_on_selector_all(
        "#search-results li a", "es => es.map(e => e.getAttribute('href'))"
    )
    assert any("plot_10_first_steps" in h for h in hrefs)
    page = visit("search.html?q=register_structure")
    page.wait_for_selector("#search-results li a[href*='api.html']")


def test_search_by_keyboard(visit):
    page = visit("index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("kronecker")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")


def test_gallery_thumbnails(visit):
    page = visit("auto_gallery/index.html")
    thumbs = page.locator(".sphx-glr-thumbcontainer img")
    assert thumbs.count() == len(list((SITE / "auto_gallery").glob("*/plot_*.html")))
    for i in range(thumbs.count()):
        thumbs.nth(i).scroll_into_view_if_needed()
    page.wait_for_function(
        "[...document.querySelectorAll('.sphx-glr-thumbcontainer img')].every(i => i.complete && i.naturalWidth > 50)"
    )
    page.locator(".sphx-glr-thumbcontainer a").first.click()
    page.wait_for_url("**/plot_01_*.html")


@pytest.mark.parametrize("path", [p for p in PAGES if "/plot_" in p])
def test_notebook_download(visit, tmp_path, path):
    import nbformat

    page = visit(path)
    with page.expect_download() as d:
        page.locator("a.reference.download:has-text('.ipynb')").last.click()
    d.value.save_as(tmp_path / "n.ipynb")
    nb = nbformat.read(tmp_path / "n.ipynb", as_version=4)
    nbformat.validate(nb)
    name = pathlib.Path(path).with_suffix(".ipynb").name
    committed = pathlib.Path(__file__).parent.parent / "notebooks" / name
    assert json.loads((tmp_path / "n.ipynb").read_text()) == json.loads(committed.read_text())
    assert any(o.get("data", {}).get("image/png") for c in nb.cells for o in c.get("outputs", []))


def test_videos_play(visit):
    for path in PAGES:
        if "<video" in (SITE / path).read_text(encoding="utf-8"):
            page = visit(path)
            page.evaluate("document.querySelector('video').play()")
            page.wait_for_function(
                "(v => v.currentTime > 0.2 && v.videoWidth > 100)(document.querySelector('video'))"
            )


def test_folded_solutions_open(visit):
    page = visit("auto_gallery/1_start/plot_10_first_steps.html")
    solution = page.locator("details.sd-dropdown").first
    assert not solution.locator("p").first.is_visible()
    solution.locator("summary").click()
    assert solution.locator("p").last.is_visible()


def test_the_landing_page_has_three_doors(visit):
    for number in range(3):
        page = visit("index.html")
        page.locator(".sd-card").nth(number).click(position={"x": 10, "y": 10})
        page.wait_for_url(lambda url: not url.endswith("/index.html") or "auto_gallery" in url)
        assert page.locator("h1").count() == 1


# ---- ways in: what a new reader asks, from the landing page by clicks alone, in at most three
WAYS = {
    "What is the empirical Fisher?": (["What is the empirical Fisher?"], "labels of the data"),
    "Which structure should I take?": (
        ["Which structure should I take?"],
        "How to choose a structure",
    ),
    "Why did my run diverge?": (["Why did my run diverge?"], "When it does not work"),
    "the same, by the map": (["Which page do I need?", "When it does not work"], "damping x 10"),
    "What is a structure?": (["Which page do I need?", "Glossary"], "closed under sums, multiples"),
    "the plan of the course": (["I want to teach it"], "Two hours"),
    "a figure to move": (["I want to teach it", "the figure"], "Three figures to move"),
}


@pytest.mark.parametrize("question", WAYS)
@pytest.mark.parametrize("width", [1280, 390])
def test_an_answer_is_at_most_three_clicks_away(visit, question, width):
    clicks, answer = WAYS[question]
    assert len(clicks) <= 3
    page = visit("index.html", width=width)
    for text in clicks:
        before = page.url
        link = page.locator(".bd-article a, .bd-article .sd-card").get_by_text(text, exact=False)
        link.first.click(force=True)  # a card is covered by its link
        page.wait_for_url(lambda url, before=before: url != before)
        page.wait_for_load_state("load")
    assert " ".join(answer.split()) in " ".join(page.locator(".bd-article").inner_text().split())
    if page.url.count("#"):  # and the answer is what one sees, not somewhere below
        top = page.evaluate(
            "document.getElementById(decodeURIComponent(location.hash.slice(1))).getBoundingClientRect().top"
        )
        assert -5 <= top < 500


SEARCHES = {  # what is typed: the page to click on, and words of the answer on it
    "empirical fisher": ("glossary", "with the labels of the data"),
    "choose structure": ("structures", "How to choose a structure"),
    "diverge": ("choosing", "it starts well, then explodes"),
    "pi-damping": ("glossary", "It does not depend on how scale is divided"),
    "quiz": ("teach", "Twelve questions"),
    # asked as one would ask a colleague
    "What is the empirical Fisher?": ("which_page", "the definition"),
    "Which structure should I take?": ("which_page", "How to choose a structure"),
    "Why did my run diverge?": ("which_page", "When it does not work"),
}


@pytest.mark.parametrize("words", SEARCHES)
def test_an_answer_is_one_search_away(visit, words):
    found, answer = SEARCHES[words]
    page = visit("index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type(words)
    page.keyboard.press("Enter")
    link = page.locator(f"#search-results li a[href*='{found}.html']").first
    link.wait_for()
    link.click()
    page.wait_for_url(f"**/{found}.html*")
    assert answer in " ".join(page.locator(".bd-article").inner_text().split())


@pytest.mark.parametrize("path", [p for p in PAGES if "/plot_" in p])
def test_a_page_of_the_gallery_says_what_it_needs_and_has_slides(visit, path):
    page = visit(path)
    needs = page.locator("p.page-facts").first.inner_text()
    assert "Needs" in needs and "matplotlib" in needs  # (two pages need no torch of their own)
    assert re.search(r"Runs in about \d+ s", needs), "the site was built without running the page"
    page.locator("p.page-facts a", has_text="Slides").click()
    page.wait_for_selector("body[data-ready=yes]")
    assert page.locator(".slide").count() >= 8


def test_the_gallery_comes_as_one_archive(visit, tmp_path):
    page = visit("auto_gallery/index.html")
    with page.expect_download() as d:
        page.get_by_role("link", name="Download the whole gallery").click()
    d.value.save_as(tmp_path / "gallery.zip")
    names = zipfile.ZipFile(tmp_path / "gallery.zip").namelist()
    assert "singd-gallery/requirements.txt" in names
    assert sum(n.endswith(".ipynb") for n in names) >= len([p for p in PAGES if "/plot_" in p])


def test_the_cheat_sheet_is_one_printed_page(browser, base):
    spec = importlib.util.spec_from_file_location("cheat_sheet", ROOT / "tools" / "cheat_sheet.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    kept = tool.PDF.read_bytes()
    assert tool.pages(kept) == 1
    assert tool.recorded(kept) == tool.digest(), "the text has changed: run `make sheet`"
    assert tool.pages(tool.print_page(browser, base + "cheat_sheet.html")) == 1


IN_LESSONS = {  # figure: its lesson, and a control that changes what the figure says
    "damping": ("plot_05_damping", "input[name=c]", "End"),
    "divergence": ("plot_07_without_an_inverse", "input[name=s]", "End"),
    "closure": ("plot_10_structures", "button[aria-label='row 1, column 4']", "Space"),
}


def figure_of(name, page):
    """The figure, and a function for what it says."""
    figure = page.locator(f"#figure-{name}")
    return figure, figure.locator("output").inner_text


@pytest.mark.parametrize("name", IN_LESSONS)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_lesson_has_its_figure_and_keys_move_it(visit, name, width, scheme):
    lesson, control, key = IN_LESSONS[name]
    page = visit(f"auto_gallery/0_course/{lesson}.html", width=width, scheme=scheme)
    page.locator("p.page-facts a", has_text="A figure to move").click()
    figure, says = figure_of(name, page)
    assert 0 <= figure.bounding_box()["y"] < 400
    before, address = says(), page.url
    figure.locator(control).focus()
    page.keyboard.press(key)
    assert says() != before
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(200)
    assert page.url == address, "an arrow key turned the page"


@pytest.mark.parametrize("name", IN_LESSONS)
def test_a_finger_moves_the_figure_of_a_lesson(visit, name):
    lesson, control, _ = IN_LESSONS[name]
    page = visit(f"auto_gallery/0_course/{lesson}.html", width=390, has_touch=True)
    figure, says = figure_of(name, page)
    before = says()
    touched = figure.locator(control)
    box = touched.bounding_box()
    assert box["height"] >= 32, "too low for a finger"
    touched.tap(position={"x": 0.9 * box["width"], "y": 0.5 * box["height"]})
    assert says() != before
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


@pytest.mark.parametrize("name", IN_LESSONS)
def test_the_figure_of_a_lesson_is_dark_in_the_dark(visit, name):
    def colours(scheme):
        page = visit(f"auto_gallery/0_course/{IN_LESSONS[name][0]}.html", scheme=scheme)
        return page.evaluate(
            "name => [...document.querySelectorAll(`#figure-${name} svg :is(.a, .b, .title, .axis, .mark)`)]"
            ".map(e => [e.getAttribute('class'), getComputedStyle(e).fill, getComputedStyle(e).stroke])",
            name,
        )

    for (kind, *light), (_, *dark) in zip(colours("light"), colours("dark"), strict=True):
        assert light != dark, f"{kind} has one colour"


@pytest.mark.parametrize("name", IN_LESSONS)
def test_on_paper_and_without_scripts_a_lesson_keeps_a_still_picture(visit, name):
    path = f"auto_gallery/0_course/{IN_LESSONS[name][0]}.html"
    page = visit(path)
    page.emulate_media(media="print")
    figure, _ = figure_of(name, page)
    assert figure.locator("svg").first.is_visible()
    assert not figure.locator(".controls").is_visible()
    page = visit(path, java_script_enabled=False)
    still = page.locator(f"#figure-{name} noscript img")
    still.scroll_into_view_if_needed()
    assert still.bounding_box()["height"] > 50
    assert still.evaluate("i => i.complete && i.naturalWidth > 100")


def test_the_interactive_figures_are_on_their_page(visit):
    page = visit("interactive.html", width=390, scheme="dark")
    assert page.locator(".interactive output").count() == 3
    before = page.locator("#figure-damping output").inner_text()
    page.locator("#figure-damping input[name=c]").focus()
    page.keyboard.press("End")
    assert page.locator("#figure-damping output").inner_text() != before
    assert "interactive.html" in page.url, "an arrow key turned the page"


def test_the_quiz_folds_its_answers(visit):
    page = visit("teach.html")
    answers = page.locator("details.sd-dropdown")
    assert answers.count() == 12
    assert not answers.first.locator("p").last.is_visible()
    answers.first.locator("summary").click()
    assert answers.first.locator("p").last.is_visible()


def test_dark_mode(visit):
    lum = "(() => {const c = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number); return c[0] + c[1] + c[2]})()"
    assert visit("index.html", scheme="light").evaluate(lum) > 600
    page = visit("index.html", scheme="dark")
    assert page.evaluate(lum) < 200
    page.locator(
        "button.theme-switch-button:visible"
    ).first.click()  # opens a menu, or goes to the next mode
    item = page.locator(
        "[data-mode='light']:visible, button:has-text('Light'):visible, .dropdown-item:has-text('Light'):visible"
    )
    if item.count():
        item.first.click()
    page.wait_for_function(f"{lum} > 600")
    page.reload()
    assert page.evaluate(lum) > 600  # remembered


def test_code_can_be_copied(visit):
    page = visit("auto_gallery/1_start/plot_10_first_steps.html")
    assert page.locator("button.copybtn").count() > 3
