"""What every page of the gallery has, as far as a machine can count it.

The limits are those of a page that one can read, run and teach from: 300 to 600 words, 60 to 120 lines of code
of at most 79 characters, three to five figures, four links or more, and a solution that runs. Whether the page
is clear, no test can tell.
"""

import ast
import importlib.util
import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat")
sphinx_gallery = pytest.importorskip("sphinx_gallery.py_source_parser")

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted((ROOT / "gallery").glob("*/plot_*.py"))
INDENTED = r"(?:\n(?:[ \t]*\n)*\1[ \t]+[^\n]*)*"  # the lines below a directive in group 1
# As gallery/matplotlibrc says; structures only where a page names them so.
COLOURS = {
    "SINGD": "C0",
    "AdamW": "C1",
    "KFAC": "C2",
    "Shampoo": "C4",
    "Muon": "C5",
    "SOAP": "C6",
    "SGD": "C7",
    "IKFAC": "C9",
    "dense": "C0",
    "hierarchical": "C5",
    "diagonal": "C9",
}
ROLE = re.compile(r":(?:ref|doc|class|func|meth|attr|mod):`(?:[^`<]*<)?([^`>]*)>?`")


def _tool():
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page:
    """A page's text and code."""

    def __init__(self, path):
        _, blocks = sphinx_gallery.split_code_and_text_blocks(str(path))
        self.text = "\n\n".join(b[1] for b in blocks if b[0] == "text")
        self.blocks = [b[1] for b in blocks if b[0] == "code"]
        self.code = "\n".join(b[1] for b in blocks if b[0] == "code")
        self.shown = sphinx_gallery.remove_config_comments(
            sphinx_gallery.remove_ignore_blocks(self.code)
        )
        self.code = sphinx_gallery.remove_config_comments(self.code)
        self.folder = path.parent.name
        self.is_lesson = self.folder == "0_course"
        answered = "_solution" if self.is_lesson else ""
        self.notebook = nbformat.read(
            ROOT / "notebooks" / f"{path.stem}{answered}.ipynb", as_version=4
        )

    def directive(self, kind, title=""):
        """The body of the first directive of this kind with this title."""
        return re.search(rf"^()\.\. {kind}:: {title}\n({INDENTED})", self.text, re.M)[2]

    def words(self):
        """The words that are read: a formula or a piece of code in a sentence counts as one."""
        text = re.sub(
            rf"^( *)\.\. (math|code-block|list-table)::[^\n]*{INDENTED}", "", self.text, flags=re.M
        )
        text = re.sub(r"^ *\.\. [\w-]+::|^\s+:[\w-]+:", "", text, flags=re.M)
        text = re.sub(r":\w+:`[^`]*`|``[^`]*``", "X", text)
        return re.findall(r"[A-Za-z0-9][\w'’.%-]*", text)


@pytest.fixture(scope="module", params=PAGES, ids=lambda p: p.stem)
def page(request):
    return Page(request.param)


def test_no_mark_of_a_cell_is_left_in_its_text(page):
    """Where one text follows another, the second mark is text, too, and its heading is none."""
    assert not re.search(r"^%%", page.text, re.M)


def test_its_length(page):
    assert 300 <= len(page.words()) <= 600
    code = [line.strip() for line in page.shown.splitlines()]
    code = [line for line in code if line and not line.startswith("#")]
    assert 60 <= len(code) <= 120


def test_lines_fit_a_narrow_column(request, page):
    for line in (page.code + page.text).splitlines():
        assert len(line) <= 79, line


def test_it_draws_three_to_five_figures(page):
    outputs = [o for c in page.notebook.cells for o in c.get("outputs", [])]
    assert 3 <= sum("image/png" in o.get("data", {}) for o in outputs) <= 5


def test_it_says_what_one_learns_and_needs(page):
    learn = page.directive("admonition", "What you will learn")
    assert len(re.findall(r"^ +- \*\*[A-Z][a-z]+\*\*", learn, re.M)) == 3, "three verbs, in bold"
    assert re.search("You (need|should)", learn), "what to know before"


def test_no_block_hides_all_that_it_has(page):
    """It would be an empty box on the page."""
    for block in page.blocks:
        shown = sphinx_gallery.remove_config_comments(sphinx_gallery.remove_ignore_blocks(block))
        assert shown.strip(), block


def test_it_has_mathematics(page):
    assert re.search(r"^\.\. math::", page.text, re.M)


def test_it_asks_once_for_an_expectation(page):
    assert len(re.findall(r"before (?:you run|running) on", page.text, re.I)) == 1


def test_it_asserts_what_it_claims(page):
    assert sum(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(page.code))) >= 3


def test_it_says_when_not_to_use_this(page):
    assert re.search(r"^When not to use (this|it)\n-+$", page.text, re.M)


def test_it_ends_with_a_few_lessons(page):
    lessons = page.directive("admonition", "Lessons learned")
    assert 3 <= len(re.findall(r"^ +- ", lessons, re.M)) <= 5


def test_its_exercise_has_a_solution_that_runs(page):
    assert page.directive("admonition", "Exercise").strip()
    assert page.directive("dropdown", "Solution").strip()
    solutions = _tool().solutions(page.text)
    assert solutions, "no code in the solution"
    assert any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse("\n".join(solutions))))
    run = {c.source: c.execution_count for c in page.notebook.cells if c.cell_type == "code"}
    assert all(run[s] for s in solutions), "not run in the notebook"


def test_a_lesson_has_two_exercises(page):
    if page.is_lesson:
        for kind in ("admonition:: Exercise", "dropdown:: Solution"):
            assert len(re.findall(rf"^\.\. {kind}", page.text, re.M)) == 2


def test_it_has_four_links_and_says_where_to_go_next(page):
    links = set(ROLE.findall(page.text))
    assert len(links) >= 4
    assert re.search(r"^(Where to go next|Next):\s.*`", page.text, re.M | re.S)
    stems = {p.stem for p in PAGES}
    linked = [re.search(r"(plot_\w+)\.py$", link) for link in links]
    assert {m[1] for m in linked if m} <= stems


def test_it_runs_without_a_download_or_a_gpu(page):
    """What a page needs comes with the packages that the gallery installs."""
    assert not re.search(r"urllib|requests|download=True|fetch_\w+\(|\.cuda\(|\"cuda", page.code)


def test_no_output_is_an_address(page):
    """As of a last line that is a call: ``<Legend at 0x7f...>`` says nothing, and changes with every run."""
    for cell in page.notebook.cells:
        for output in cell.get("outputs", []):
            shown = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r" at 0x|<bound method", shown), cell.source.splitlines()[-1]


def test_each_optimizer_and_structure_has_its_colour(page):
    """Where a page gives colours in a dictionary by these names, as its figures should."""
    for mapping in (n for n in ast.walk(ast.parse(page.code)) if isinstance(n, ast.Dict)):
        for key, value in zip(mapping.keys, mapping.values, strict=True):
            name = key.value if isinstance(key, ast.Constant) else None
            colours = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant)]
            colours = [c for c in colours if isinstance(c, str) and re.fullmatch(r"C\d", c)]
            if name in COLOURS:
                assert set(colours) <= {COLOURS[name]}, f"{name} is {COLOURS[name]}"


def test_its_figures_can_be_read_on_a_phone(page):
    """A column of 390 px leaves letters of 9 points in a figure of 5.5 inches about 8 px high."""
    calls = [n for n in ast.walk(ast.parse(page.code)) if isinstance(n, ast.Call)]
    given = [(k.arg, k.value) for c in calls for k in c.keywords]
    widths = [ast.literal_eval(v.elts[0]) for name, v in given if name == "figsize"]
    sizes = [ast.literal_eval(v) for name, v in given if name == "fontsize"]
    drawn = [c for c in calls if getattr(c.func, "attr", "") in ("subplots", "figure")]
    assert len(widths) == len(drawn) and max(widths) <= 5.5
    assert min(sizes, default=9) >= 9


def test_a_page_starts_with_the_defaults_of_torch():
    """All pages are run in one process for the site; what one sets must not reach the next."""
    import matplotlib as mpl
    import torch

    spec = importlib.util.spec_from_file_location("style", ROOT / "docs/_ext/gallery_style.py")
    style = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(style)
    torch.set_default_dtype(torch.float64)
    with mpl.rc_context():
        style.apply({}, "plot_07_without_an_inverse.py")
    assert torch.get_default_dtype() is torch.float32
