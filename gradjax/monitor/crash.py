"""The parts of a crash file: its name, the key of the batch, the diagnosis.

A crash file is JSON, which needs NumPy and the standard library only: no optional package that is
missing can lose what was recorded.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def new_file(folder: Path, name: str) -> Path:
    """Create the folder and `name.json`, or the first new one of `name-2.json`, `name-3.json` ...

    Raises:
      OSError: if it cannot be created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 1
    while True:
        path = folder / (f"{name}.json" if count == 1 else f"{name}-{count}.json")
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            count += 1


def diagnose(
    function: Callable[..., Any], params: Any, args: tuple, history: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The diagnosis, or why there is none: its failure never hides that of the training."""
    try:
        return {"diagnosis": json.loads(function(params, *args, history=history).to_json())}
    except Exception as error:
        return {"diagnosis_error": f"{type(error).__name__}: {error}"}


def plain_key(key: Any) -> Any:
    """The key of a batch for JSON: the numbers of a PRNG key or array, else itself or its repr."""
    try:
        if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(key)).tolist()
            return {"impl": str(jax.random.key_impl(key)), "data": data}
        if isinstance(key, jax.Array | np.ndarray | np.generic):
            return np.asarray(key).tolist()
    except RuntimeError as error:
        # The loop has donated or deleted the key's buffer.
        return f"unreadable: {error}"
    return key if isinstance(key, str | int | float | None) else repr(key)
