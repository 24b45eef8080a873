"""The tool that makes notebooks of the gallery's pages, and finds those that are out of step."""

import importlib.util
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGE = '''"""
A claim
=======

.. note::

   In :math:`K` with :term:`damping`, see :ref:`sphx_glr_auto_gallery_1_start_plot_1_claim.py`, :doc:`/concepts`
   and :ref:`here <sphx_glr_auto_gallery_1_start_plot_1_claim.py>`.

.. math::
   :label: one

   a > b

.. dropdown:: Solution
   :icon: check

   Use ``two``:

   .. code-block:: python

       two = 2
       for _ in range(2):

           two += 1

   .. code-block:: text

       not run

.. list-table::
   :header-rows: 1

   * - name
     - meaning
   * - ``T``
     - how
       often

After.
"""

one = 1

# %%
# Text with ``code`` and :class:`~singd.SINGD`.

print(one)
'''


@pytest.fixture
def tool(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "GALLERY", tmp_path / "gallery")
    monkeypatch.setattr(module, "NOTEBOOKS", tmp_path / "notebooks")
    (tmp_path / "gallery" / "1_start").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "gallery" / "1_start" / "plot_1_claim.py").write_text(PAGE)
    return module


@pytest.fixture
def notebook(tool):
    """Converted, and filled as if it had been executed."""
    nb = tool.convert(tool.scripts()[0])
    for count, cell in enumerate(c for c in nb.cells if c.cell_type == "code"):
        cell.execution_count = count + 1
    return nb


def test_text_becomes_markdown(notebook):
    kinds = ["markdown", "code", "markdown", "code", "markdown", "code"]
    assert [c.cell_type for c in notebook.cells] == kinds
    assert (
        notebook.cells[0].source
        == """# A claim

> **Note**
>
> In $K$ with *damping*, see [A claim](plot_1_claim.ipynb), *From gradient descent to SINGD*
> and [here](plot_1_claim.ipynb).

$$
a > b
$$

<details><summary>Solution</summary>

Use `two`:

```text
not run
```

</details>"""
    )
    assert (
        notebook.cells[2].source
        == """| name | meaning |
| --- | --- |
| `T` | how often |

After."""
    )
    assert notebook.cells[4].source == "Text with `code` and `SINGD`."


def test_a_solution_becomes_a_folded_cell(tool, notebook):
    cell = notebook.cells[1]
    assert cell.source == "two = 2\nfor _ in range(2):\n\n    two += 1"
    assert cell.metadata["jupyter"] == {"source_hidden": True}
    assert [c for c in notebook.cells if "jupyter" in c.metadata] == [cell]


GUARDED = '''"""
A claim
=======

.. admonition:: Exercise

   Double one.

.. dropdown:: Solution

   Add it to itself:

   .. code-block:: python

       assert one + one == 2

After.
"""

one = 1
# sphinx_gallery_start_ignore
assert one == 1
# sphinx_gallery_end_ignore
two = 2
'''


def cells(nb):
    return [(c.source, c.metadata.get("tags")) for c in nb.cells if c.cell_type == "code"]


def test_what_the_page_hides_is_folded_and_still_run(tool):
    page = tool.scripts()[0]
    page.write_text(GUARDED)
    assert cells(tool.convert(page))[1:] == [
        ("one = 1", None),
        ("assert one == 1", ["hide-input"]),
        ("two = 2", None),
    ]


def test_hidden_lines_that_are_no_whole_statements_are_refused(tool):
    page = tool.scripts()[0]
    indented = re.sub(r"^(# sphinx_gallery|assert one)", r"    \1", GUARDED, flags=re.M)
    page.write_text(indented.replace("one = 1\n", "one = 1\nif one:\n"))
    with pytest.raises(
        SystemExit, match=r"plot_1_claim\.py: the ignored lines in .* line 19 must be"
    ):
        tool.convert(page)


def test_a_lesson_asks_in_one_notebook_and_answers_in_another(tool):
    page = tool.GALLERY / "0_course" / "plot_02_lesson.py"
    page.parent.mkdir()
    page.write_text(GUARDED)
    tool.scripts()[1].unlink()
    made = {path.name: nb for path, nb in tool.notebooks(page).items()}
    asks, answers = made["plot_02_lesson.ipynb"], made["plot_02_lesson_solution.ipynb"]
    assert cells(asks)[0] == (
        "# Your answer\n\n\n"
        "# Is it right? Give the checker a function of residuals [n] and sigma:\n"
        "# empirical Fisher over Fisher, if J is constant.\n"
        '# from course_check import check\n# check("02.1", ...)\n'
        "# A solution is in plot_02_lesson_solution.ipynb",
        ["answer"],
    )
    assert "Add it" not in str(asks) and "Double one" in str(asks) and "After." in str(asks)
    assert cells(asks)[1:] == cells(answers)[1:]
    assert cells(answers)[0][0] == "assert one + one == 2"

    for name, nb in made.items():
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.execution_count = 1
        tool.write(nb, tool.NOTEBOOKS / name)
    assert check(tool) == 0
    (tool.NOTEBOOKS / "plot_02_lesson_solution.ipynb").unlink()
    assert check(tool) == 1


def check(tool):
    return tool.main(["check"])


def test_a_notebook_in_step_passes(tool, notebook):
    tool.write(notebook, tool.NOTEBOOKS / "plot_1_claim.ipynb")
    assert check(tool) == 0


def test_outputs_are_kept_where_the_text_alone_changed(tool, notebook, monkeypatch):
    path, page = tool.NOTEBOOKS / "plot_1_claim.ipynb", tool.scripts()[0]
    notebook.cells[5].outputs.append(stream("stdout"))
    tool.write(notebook, path)
    executed = []
    monkeypatch.setattr(tool, "execute", executed.append)
    page.write_text(PAGE.replace("After.", "Afterwards."))
    assert tool.main(["build"]) == 0 and not executed
    kept = sys.modules["nbformat"].read(path, 4)
    assert (
        "Afterwards." in kept.cells[2].source and kept.cells[5].outputs == notebook.cells[5].outputs
    )
    page.write_text(PAGE.replace("print(one)", "print(one, one)"))
    assert tool.main(["build"]) == 0 and len(executed) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda nb: nb.cells[3].update(source="one = 2"), "differs from its script"),
        (lambda nb: nb.cells[1].update(source="two = 3"), "differs from its script"),
        (lambda nb: nb.cells[4].update(source="Other text."), "differs from its script"),
        (lambda nb: nb.cells[5].update(execution_count=None), "was not executed"),
        (lambda nb: nb.cells[5].outputs.append(stream("stderr")), "holds warnings"),
        (lambda nb: nb.cells[5].outputs.append(error()), "holds an error"),
    ],
)
def test_a_spoilt_notebook_fails(tool, notebook, spoil, message, capsys):
    spoil(notebook)
    tool.write(notebook, tool.NOTEBOOKS / "plot_1_claim.ipynb")
    assert check(tool) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["not executed", "an error", "a warning"])
def test_outputs_at_fault_are_not_kept(tool, notebook, monkeypatch, fault):
    cell = notebook.cells[5]
    if fault == "not executed":
        cell.execution_count = None
    else:
        cell.outputs.append(error() if fault == "an error" else stream("stderr"))
    tool.write(notebook, tool.NOTEBOOKS / "plot_1_claim.ipynb")
    executed = []
    monkeypatch.setattr(tool, "execute", executed.append)
    assert tool.main(["build"]) == 0 and len(executed) == 1


def test_a_missing_and_an_orphaned_notebook_fail(tool, notebook, capsys):
    assert check(tool) == 1
    assert "plot_1_claim.ipynb: is missing" in capsys.readouterr().err
    tool.write(notebook, tool.NOTEBOOKS / "plot_1_claim.ipynb")
    tool.write(notebook, tool.NOTEBOOKS / "plot_2_gone.ipynb")
    assert check(tool) == 1
    assert "plot_2_gone.ipynb: has no script" in capsys.readouterr().err


def stream(name):
    nbformat = sys.modules["nbformat"]
    return nbformat.v4.new_output("stream", name=name, text="hm")


def error():
    nbformat = sys.modules["nbformat"]
    return nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])
