"""The order of the house: imports run one way, the core depends on torch only, files stay short."""

import ast
import graphlib
import pathlib
import re
import sys

import pytest
from trace_a_step import walk

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = ROOT / "src" / "singd"
FILES = sorted(SOURCE.rglob("*.py"))
LINES = 4_362
"""Of code, in all: what there is, and little slack. The aim is less."""


def module_of(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path):
    """The modules that a file imports, also those under ``if TYPE_CHECKING`` and inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in names if name in MODULES]
            yield from modules or [node.module]


def code_lines(path):
    """The lines that are no comment, no docstring and not empty."""
    text = path.read_text()
    words = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            words |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        1 for i, s in lines if i not in words and s.strip() and not s.strip().startswith("#")
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_core_depends_on_torch_only(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert roots <= {"torch", "singd"} | sys.stdlib_module_names


def test_there_is_no_circle():
    """Type hints count: whoever reads a file has to follow them, too."""
    graph = {m: {i for i in imports(path) if i in MODULES} for m, path in MODULES.items()}
    for module in MODULES:  # a package's own files are not behind its front door
        graph[module] -= {module, *(p for p in MODULES if module.startswith(p + "."))}
    list(graphlib.TopologicalSorter(graph).static_order())


FLOORS = [
    ["torch_private", "precision", "kernels", "fisher"],
    ["rows", "scaler"],
    ["structures", "layers"],
    ["rules"],
    ["groups", "state", "statistics"],
    ["blocks"],
    ["processes", "witness", "hooks", "alike", "weight_steps"],
    ["advance", "plan", "checkpoint"],
    ["report"],
    ["optimizer"],
]
"""From the cellar to the roof. What is on one floor may import what is below and beside it."""


def test_imports_run_downward():
    height = {place: i for i, floor in enumerate(FLOORS) for place in floor}
    places = {m.split(".")[1] for m in MODULES if "." in m}
    assert places == set(height)
    for module, path in MODULES.items():
        if "." not in module:
            continue  # the front door
        for name in imports(path):
            if name in MODULES and "." in name:
                above, below = (height[m.split(".")[1]] for m in (module, name))
                assert below <= above, f"{module} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_the_optimizers_file_knows_the_optimizer(path):
    """Modules are handed values: a layer, a group's options, a layer's state."""
    if path.name != "optimizer.py":
        assert not re.search(
            r"\boptimizer\._|\bSINGD\b.*=.*import|from singd.optimizer", path.read_text()
        ) or (path == SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_file_is_so_long_that_a_reader_loses_the_thread(path):
    assert code_lines(path) <= 300


def test_the_house_does_not_grow():
    assert sum(map(code_lines, FILES)) <= LINES


def test_the_readers_path_is_short():
    """The files that CONTRIBUTING names to understand the method: at most ten, and 900 lines."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    sentence = re.search(r"To understand the method, read in this order: (.*?)`\.\s", text, re.S)
    files = [SOURCE / name for name in re.findall(r"`([\w/]+\.py)", sentence[1])]
    assert 5 < len(files) <= 10
    assert sum(map(code_lines, files)) <= 900


def test_a_step_does_not_wander_more():
    """The files that one step of a linear layer runs through, and its changes of file: what is reached so far."""
    _, changes = walk()
    assert len(set(changes)) <= 21
    assert len(changes) <= 130


def test_the_optimizer_stays_a_table_of_contents():
    assert code_lines(SOURCE / "optimizer.py") <= 250


PRIVATE = re.compile(
    r"torch\._|\._C\b|_per_optimizer|_orig_mod|_active_ddp|_saved_self|_local_tensor|\._version"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_what_torch_keeps_private_is_in_one_file(path):
    if path.name != "torch_private.py":
        code = "\n".join(s.split("#")[0] for s in path.read_text().splitlines())
        assert not PRIVATE.search(code)
