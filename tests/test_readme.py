"""The README's Python blocks, and every module's examples, run as they stand."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import gradjax

README = Path(__file__).parent.parent / "README.md"
MODULES = sorted(m.name for m in pkgutil.walk_packages(gradjax.__path__, "gradjax."))


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_are_python_blocks():
    assert blocks()


@pytest.mark.parametrize("number", range(len(blocks())))
def test_readme_block(number):
    """Blocks with prompts are doctests; others run as a script in which no exception may escape."""
    text = blocks()[number]
    if ">>>" in text:
        test = doctest.DocTestParser().get_doctest(text, {}, f"README block {number}", str(README), 0)
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0
    else:
        exec(compile(text, f"README block {number}", "exec"), {"__name__": "__readme__"})


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0
