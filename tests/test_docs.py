"""The docs site is whole: every page is in its navigation, every public name in its reference."""

import importlib
import re
import tomllib

import yaml

import gradjax
from support import ROOT

DOCS = ROOT / "docs"
CONFIG = (ROOT / "mkdocs.yml").read_text()


def test_every_page_is_in_the_navigation():
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert pages == set(re.findall(r"[\w./-]+\.md", CONFIG))


def test_every_public_name_is_in_the_reference():
    """`::: module` shows a module; docs/.hooks/reference.py hides what is not in `__all__`."""
    for name in gradjax._MODULES:
        page = (DOCS / "api" / f"{name}.md").read_text()
        shown = {
            importlib.import_module(module) for module in re.findall(r"^::: (\S+)", page, re.M)
        }
        assert shown, name
        package = getattr(gradjax, name)
        for public in getattr(package, "__all__", []):
            value = getattr(package, public)
            if callable(value):
                home = {module.__name__ for module in shown if hasattr(module, public)}
                assert home, f"{name}.{public} is on no page of docs/api/"
    start = (DOCS / "api" / "index.md").read_text()
    for public in gradjax._HOME:
        assert f"`{public}`" in start, public


def test_nothing_comes_from_another_server():
    assert "font: false" in CONFIG and "http" not in CONFIG


def test_one_place_for_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()


def test_lower_bounds_are_the_oldest_versions_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints" / "oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for wanted in project["dependencies"] + project["optional-dependencies"]["lab"]:
        name, bound = wanted.split(">=")
        assert f"{oldest[name]}.".startswith(f"{bound}."), wanted


def test_workflows_are_yaml_and_call_make():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    assert ".ci/run" in commands and any("make test-oldest" in command for command in commands)
