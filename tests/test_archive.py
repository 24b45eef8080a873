"""The archive of the gallery has all that its pages need."""

import importlib.util
import io
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    tool = load(ROOT / "tools" / "archive.py")
    folder = tmp_path_factory.mktemp("archive")
    for name in ("a.zip", "b.zip"):
        tool.write(folder / name)
    assert (folder / "a.zip").read_bytes() == (folder / "b.zip").read_bytes()
    return zipfile.ZipFile(io.BytesIO((folder / "a.zip").read_bytes()))


def test_it_has_every_page_notebook_and_module(archive):
    names = {n.removeprefix("singd-gallery/") for n in archive.namelist()}
    for pattern in ("gallery/*/plot_*.py", "notebooks/plot_*.ipynb", "src/singd/**/*.py"):
        kept = {p.relative_to(ROOT).as_posix() for p in ROOT.glob(pattern)}
        assert kept and kept <= names
    assert {"requirements.txt", "START.txt", "pyproject.toml", "notebooks/course_check.py"} <= names
    assert not any(re.search(r"\.pyc$|egg-info|ipynb_checkpoints", n) for n in names)


def test_its_requirements_cover_what_the_pages_import(archive):
    """Each imported package is torch, this one, or in the extra that requirements.txt names."""
    assert ".[gallery,lab]" in archive.read("singd-gallery/requirements.txt").decode().split()
    project = archive.read("singd-gallery/pyproject.toml").decode()
    extra = re.search(r"^gallery = \[(.*?)^\]", project, re.M | re.S)[1]
    known = {"torch", "singd", "course_check", *re.findall(r'"([\w-]+)"', extra)}
    facts = load(ROOT / "docs" / "_ext" / "page_facts.py")
    for name in archive.namelist():
        if re.search(r"gallery/\d_\w+/plot_\w+\.py$", name):
            needed = set(facts.packages(archive.read(name).decode()))
            assert needed <= known | {"numpy"}, name  # numpy comes with matplotlib


def test_the_packages_of_a_page_are_told_by_the_names_that_pip_knows():
    facts = load(ROOT / "docs" / "_ext" / "page_facts.py")
    script = "import time\nfrom sklearn.datasets import load_digits\nimport torch.nn\nfrom singd import SINGD"
    assert facts.packages(script) == ["scikit-learn", "singd", "torch"]


def test_the_package_is_imported_from_the_archive(archive, tmp_path):
    """And so is the checker of exercises."""
    archive.extractall(tmp_path)
    root = tmp_path / "singd-gallery"
    done = subprocess.run(
        [sys.executable, "-c", "import singd, course_check; print(singd.__file__)"],
        env={"PYTHONPATH": f"{root / 'src'}:{root / 'notebooks'}", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(root))
