"""Where things are, for tests that read files of the repository or real data."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SCRIPTS = ROOT / "scripts"


def data_folder(name: str) -> Path:
    """The folder of real data that holds `name`; the test is skipped where there is none."""
    for folder in (os.environ.get("GRADJAX_DATA_DIR"), ROOT.parent / "shared" / "data"):
        if folder and (Path(folder) / name).exists():
            return Path(folder)
    pytest.skip(f"set GRADJAX_DATA_DIR to a folder that holds {name}")
