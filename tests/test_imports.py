"""Who may import whom: one direction only, so that each file can be read without those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gradjax"

# module or subpackage -> what it may import of gradjax. A name may import itself (a subpackage's
# files).
MAY_IMPORT = {
    # what is measured: no model, no config
    "scale": set(),
    "step": {"scale"},
    "factors": set(),
    "product": set(),
    "grading": {"product"},
    "growth": {"factors", "product"},
    "jacobi": {"factors", "product", "grading"},
    "spectrum": {"step", "scale", "factors", "product", "grading", "jacobi", "growth"},
    "matrix_free": {"step", "scale"},
    "activations": set(),
    "initializers": {"scale"},
    "meanfield": {"activations", "scale"},
    "random_matrix": {"activations", "scale"},
    "taps": set(),
    "blocks": {"scale", "taps"},
    "evidence": {"taps"},
    "rules": {"evidence", "taps"},
    "theory": {"activations"},
    # what is trained
    "config": set(),
    "models": {"activations", "initializers", "scale", "step"},
    "pretraining": {"models", "tasks"},
    "transforms": {"scale"},
    "tasks": set(),
    "optimizers": {"config", "transforms"},
    "remedies": {"tasks", "config", "meanfield", "models"},
    "grid": {"config"},
    "training": {
        "config",
        "models",
        "pretraining",
        "step",
        "tasks",
        "optimizers",
        "transforms",
        "scale",
    },
    # what is run and written down
    "checkpoint": set(),
    "results": {"config"},
    "alarm": set(),
    "monitor": {"alarm", "transforms", "results"},
    "diagnosis": {
        "evidence",
        "rules",
        "results",
        "matrix_free",
        "scale",
        "taps",
        "transforms",
        "plots",
    },
    "measure": {
        "config",
        "models",
        "training",
        "tasks",
        "step",
        "spectrum",
        "theory",
        "evidence",
        "diagnosis",
    },
    "program": {"config", "models", "tasks", "training"},
    "ablation": {
        "config",
        "program",
        "grid",
        "models",
        "training",
        "transforms",
        "checkpoint",
        "results",
        "monitor",
        "tasks",
        "scale",
    },
    "coordinate": {"taps", "scale", "results"},
    "cure": {"config", "ablation", "measure", "diagnosis", "remedies", "results"},
    "plots": set(),
    "plots_cure": {"plots"},
    "report": {"config", "results", "plots", "diagnosis"},
    "cli": {
        "config",
        "grid",
        "measure",
        "diagnosis",
        "remedies",
        "ablation",
        "cure",
        "results",
        "plots",
        "plots_cure",
    }
    | {"report", "tasks"},
    "__main__": {"cli"},
}

# third-party packages that only some files may name
ONLY_IN = {
    "flax": {"models", "taps"},
    "xarray": {
        "ablation",
        "results",
        "plots",
        "plots_cure",
        "report",
        "measure",
        "diagnosis",
        "coordinate",
        "cure",
    },
    "matplotlib": {"plots", "plots_cure", "cli"},  # the command line chooses the backend
    "optax": {"transforms", "optimizers", "training", "measure", "coordinate", "diagnosis"},
    "orbax": {"checkpoint"},
    "sklearn": {"tasks"},
    "pooch": {"tasks"},
    "h5py": {"results"},
    "h5netcdf": {"results"},
    "tyro": {"config", "cli"},
    "optimistix": {"meanfield", "random_matrix"},
    "matfree": {"matrix_free", "spectrum"},
}

# the mathematics: jax and numpy, and of ONLY_IN what names them
BARE = {
    "scale",
    "step",
    "factors",
    "product",
    "grading",
    "jacobi",
    "growth",
    "spectrum",
    "matrix_free",
    "meanfield",
    "random_matrix",
}

HEAVY = {"matplotlib", "xarray", "pooch", "sklearn", "h5py", "h5netcdf", "orbax"}


def owner(path: Path) -> str:
    """The name in the table that a file belongs to: its module or its subpackage."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a file, lazy ones inside functions included."""
    package = ("gradjax", *path.relative_to(PACKAGE).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            # `from gradjax import step` names a module only in its second half
            found += [
                (node.lineno, f"{origin}.{alias.name}" if origin == "gradjax" else origin)
                for alias in node.names
            ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    me = owner(path)
    assert me in MAY_IMPORT, (
        f"gradjax/{me} is not in the table of who may import whom. Add it to MAY_IMPORT in "
        f"{Path(__file__).name} with the modules below it that it needs (and to ONLY_IN, if it is one of the "
        f"few that may use a third-party package named there)."
    )
    for line, name in imported(path):
        top, *rest = name.split(".")
        where = f"gradjax/{path.relative_to(PACKAGE)}:{line} imports {name}"
        if top == "gradjax":
            below = rest[0] if rest else "__version__"  # `import gradjax` serves its version alone
            if below in ("__version__", me):
                continue
            assert below in MAY_IMPORT[me], (
                f"{where}; {me} may import {sorted(MAY_IMPORT[me]) or 'nothing'}."
            )
        elif top in ONLY_IN:
            assert me in ONLY_IN[top], f"{where}; only {sorted(ONLY_IN[top])} may use {top}."
        elif me in BARE and top not in sys.stdlib_module_names:
            assert top in ("jax", "numpy"), f"{where}; the mathematics needs jax and numpy alone."


def test_the_table_has_no_cycle():
    def reach(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"imports may run in a circle: {' -> '.join((*above, name))}"
        for below in MAY_IMPORT[name]:
            reach(below, (*above, name))

    for name in MAY_IMPORT:
        reach(name, ())


def loaded_after(statement: str) -> set[str]:
    """The top-level packages in sys.modules of a fresh interpreter that ran `statement`."""
    code = f"import sys\n{statement}\nprint('\\n' + ' '.join({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_importing_gradjax_loads_nothing_heavy():
    assert not loaded_after("import gradjax") & HEAVY


def test_help_loads_nothing_heavy():
    ask = "\n".join(
        [
            "sys.argv = ['gradjax', '--help']",
            "from gradjax.cli.main import main",
            "try:",
            "    main()",
            "except SystemExit as stop:",
            "    assert not stop.code",
        ]
    )
    assert not loaded_after(ask) & (HEAVY | {"jax"})
