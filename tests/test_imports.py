"""Imports run one way: a folder may import from the folders above it in the table, never back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradjax
from support import ROOT

PACKAGE = ROOT / "gradjax"
PUBLIC = PACKAGE / "__init__.py"  # it names every folder, lazily
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PUBLIC)

# folder -> the third-party packages that its files may name beside jax and numpy; lowest first.
# Folders in one row do not import each other.
LAYERS: list[dict[str, set[str]]] = [
    {"core": set()},
    {"spectrum": set(), "matrix_free": {"matfree"}, "taps": {"equinox"}},
    {"transforms": {"optax"}, "replay": {"optax"}},
    {"comparison": set()},
    {"theory": set()},
    {"report": {"xarray", "matplotlib", "scipy", "h5netcdf"}},
    {"diagnosis": {"optax", "xarray"}},
    {"monitor": set()},
    {"experiment": {"flax", "optax", "orbax", "xarray", "sklearn", "pooch"}},
    {"cure": {"xarray", "scipy"}},
    {"cli": {"rich", "matplotlib"}},
]
HEAVY = {"matplotlib", "xarray", "pooch", "sklearn", "h5py", "h5netcdf", "orbax"}
LEVEL = {folder: level for level, row in enumerate(LAYERS) for folder in row}
EXTRA = {folder: packages for row in LAYERS for folder, packages in row.items()}


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of a file: lazy, by `import_module` or by string."""
    found = []
    tree = ast.parse(path.read_text())
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import; write it from gradjax"
            origin = node.module or ""
            # `from gradjax import taps` names a module only in its second half
            whole = [
                f"{origin}.{alias.name}" if origin == "gradjax" else origin for alias in node.names
            ]
            found += [(node.lineno, name) for name in whole]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            literal = node.args and isinstance(node.args[0], ast.Constant)
            assert literal, f"{path}:{node.lineno}: an import by a name that no reader can see"
            found.append((node.lineno, node.args[0].value))
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts
        ):
            # "gradjax.models:MODELS" and the like: an import by string
            name, colon, _ = node.value.partition(":")
            if colon and name.startswith("gradjax.") and " " not in node.value:
                found.append((node.lineno, name))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    me = folder_of(path)
    if me == "__main__":
        return
    assert me in LEVEL, f"gradjax/{me} is in no row of LAYERS in {Path(__file__).name}: add it."
    for line, name in imports(path):
        top, *rest = name.split(".")
        where = f"gradjax/{path.relative_to(PACKAGE)}:{line} imports {name}"
        if top == "gradjax":
            below = rest[0] if rest else me  # `import gradjax` is for its version
            allowed = below == me or LEVEL[below] < LEVEL[me]
            assert allowed, (
                f"{where}; {me} may import {[f for f in LEVEL if LEVEL[f] < LEVEL[me]]}."
            )
        elif top not in sys.stdlib_module_names:
            allowed = {"jax", "numpy"} | EXTRA[me]
            assert top in allowed, f"{where}; {me} may import {sorted(allowed)}."


@pytest.mark.parametrize("folder", list(LEVEL))
def test_no_permission_is_unused(folder):
    used = set()
    for path in (PACKAGE / folder).rglob("*.py"):
        used |= {name.split(".")[0] for _, name in imports(path)}
    assert not EXTRA[folder] - used


def test_the_top_holds_folders_only():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(LEVEL)


@pytest.mark.parametrize(
    "text",
    [
        "import gradjax.cli",
        "def f():\n    from gradjax.experiment import models",
        "import importlib\nimportlib.import_module('gradjax.cure')",
        "from importlib import import_module\nimport_module('gradjax.cure')",
        "options = 'gradjax.experiment.models:MODELS'",
    ],
)
def test_the_test_sees_an_import(text, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(text)
    assert any(name.startswith("gradjax.") for _, name in imports(path))


def loaded_after(statement: str) -> set[str]:
    """The top-level packages in sys.modules of a fresh interpreter that ran `statement`."""
    code = (
        f"import sys\n{statement}\n"
        "print('\\n' + ' '.join({m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_importing_gradjax_loads_nothing_heavy():
    assert not loaded_after("import gradjax") & (HEAVY | {"jax"})


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


FUNCTIONS = """
Monitor compare coordinate_check diagnose find_cure functional jacobian_spectrum layer_jacobians
links log_singular_values lyapunov_exponents moments per_example probe signals sweep tap telemetry
watch
"""
MODULES = """
config matrix_free meanfield models random_matrix results spectrum tasks taps transforms
"""


def test_public_paths_go_on_working():
    functions, modules = FUNCTIONS.split(), MODULES.split()
    assert len(functions) == 19
    lines = ["import gradjax", *(f"assert gradjax.{name}" for name in [*functions, *modules])]
    lines += [f"import gradjax.{name}" for name in modules]
    lines += ["from gradjax.config import load", "from gradjax.models.mlp import MLP"]
    lines += ["from gradjax.experiment.models import mlp", "assert mlp.MLP is MLP"]
    loaded_after("\n".join(lines))


def test_a_misspelt_module_names_the_nearest():
    code = "import gradjax\ngradjax.tranforms"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "AttributeError" in done.stderr and "'transforms'" in done.stderr


@pytest.mark.parametrize(
    ("module", "wrong", "right"),
    [
        ("config", "laod", "load"),
        ("cure", "find_cures", "find_cure"),
        ("diagnosis", "diagnos", "diagnose"),
        ("matrix_free", "top_singular_value", "top_singular_values"),
        ("meanfield", "qstar", "q_star"),
        ("models", "biuld", "build"),
        ("monitor", "Moniter", "Monitor"),
        ("random_matrix", "newman_exponent", "newman_exponents"),
        ("results", "run_foldr", "run_folder"),
        ("spectrum", "lyapunov_exponent", "lyapunov_exponents"),
        ("taps", "prob", "probe"),
        ("tasks", "avaliable", "available"),
        ("transforms", "clip_by_globl_norm", "clip_by_global_norm"),
    ],
)
def test_every_public_module_suggests_the_nearest_name(module, wrong, right):
    with pytest.raises(AttributeError, match=f"Did you mean '{right}'"):
        getattr(getattr(gradjax, module), wrong)
