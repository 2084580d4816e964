"""The Python blocks of the README and of docs/, and every module's examples, run as they stand."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import gradjax
from gradjax.diagnosis.rules import CAUSAL

README = Path(__file__).parent.parent / "README.md"
PAGES = sorted((README.parent / "docs").glob("*.md"))
# Pages that show a file of the repository, whose links are those of the page.
SHOWN = ("CHANGELOG.md", "CONTRIBUTING.md")
MODULES = sorted(m.name for m in pkgutil.walk_packages(gradjax.__path__, "gradjax."))


def blocks(page=README):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def run(text, name, names):
    """Blocks with prompts are doctests; others run as a script in which no exception may escape."""
    if ">>>" in text:
        test = doctest.DocTestParser().get_doctest(text, names, name, name, 0)
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0
    else:
        exec(compile(text, name, "exec"), names)


def test_there_are_python_blocks():
    assert blocks()


def with_marks(number, text):
    """A sweep compiles for half a minute; tests/experiment/test_sweep.py has a fast one."""
    return pytest.param(number, marks=[pytest.mark.slow] if "sweep(" in text else [])


@pytest.mark.parametrize("number", [with_marks(*item) for item in enumerate(blocks())])
def test_readme_block(number):
    run(blocks()[number], f"README block {number}", {"__name__": "__readme__"})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_of_docs(page, tmp_path, monkeypatch):
    """One after the other, as a reader runs them: what one block defines the next may use."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__page__"}
    # as readers have it, and Optax needs it
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for number, text in enumerate(blocks(page)):
            run(text, f"{page.name} block {number}", names)


@pytest.mark.parametrize("page", ["diagnosis", "my-loss-is-nan"])
def test_every_pathology_is_in_its_table(page):
    text = (README.parent / "docs" / f"{page}.md").read_text()
    assert set(CAUSAL) <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


@pytest.mark.parametrize(
    "page", [README, *PAGES, *map(README.with_name, SHOWN)], ids=lambda page: page.stem
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0
