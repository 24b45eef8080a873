"""The order of the house: imports run one way, the core depends on torch only, files stay short."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = ROOT / "src" / "singd"
FILES = sorted(SOURCE.rglob("*.py"))


def runtime_imports(path):
    """The modules that a file imports when it runs: not those under ``if TYPE_CHECKING``."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for n in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_core_depends_on_torch_only(path):
    roots = {name.split(".")[0] for name in runtime_imports(path)}
    assert roots <= {"torch", "singd"} | sys.stdlib_module_names


ALLOWED = {
    "kernels": {"kernels"},
    "rows.py": {"kernels"},
    "structures": {"structures", "rows", "kernels"},
    "layers": {"layers", "rows", "kernels"},
    "update.py": set(),
    "options.py": {"structures"},
    "blocks.py": {"structures", "layers", "options"},
    "statistics.py": {"blocks"},
}


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_run_one_way(place):
    files = [f for f in FILES if f.relative_to(SOURCE).parts[0] == place]
    assert files
    for path in files:
        ours = {n.split(".")[1] for n in runtime_imports(path) if n.startswith("singd.")}
        assert ours <= ALLOWED[place], path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_file_is_so_long_that_a_reader_loses_the_thread(path):
    assert len(path.read_text().splitlines()) < 600
