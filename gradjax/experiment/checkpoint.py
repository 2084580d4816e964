"""Checkpoints that are never restored wrong: Orbax, asynchronous, with a sha256 of every leaf.

A folder holds one sub-folder per step, committed by a rename; the newest two are kept. Orbax itself
restores nearly every flipped bit silently, so the bytes of every leaf are hashed when they are
written and compared when they are read; the hashes and the caller's metadata are one more leaf,
which ends with its own hash. A damaged checkpoint is skipped with a warning that names it, and the
one before it is used.

Every writer has a folder of its own and no barrier with other processes, so that what P processes
wrote restores in Q. Cost: about 0.1 s per save in the background, one copy of the state on the
host.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any
META = "meta"
# Bytes of a sha256.
_DIGEST = 32


class CheckpointError(OSError):
    """A state could not be written; the message names the last good one."""


class Restored(NamedTuple):
    """A verified checkpoint."""

    step: int
    tree: PyTree
    meta: dict[str, Any]


def _plain(leaf: Any) -> np.ndarray:
    """A copy of a leaf as NumPy, a PRNG key as its data.

    It is a copy because the program may reuse the leaf's buffer while the copy is written.
    """
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.array(leaf)


def _hash(name: str, array: np.ndarray) -> str:
    head = f"{name} {array.dtype.name} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _named(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


# Concurrent saves in one process interfere with each other.
_ORBAX = threading.Lock()


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """Orbax without barriers between processes, so that one that dies blocks no other."""
    mine = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process_{mine}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    with _ORBAX:
        checkpointer = ocp.Checkpointer(handler, multiprocessing_options=options)
        try:
            yield checkpointer
        finally:
            checkpointer.close()


def steps(folder: str | Path) -> list[int]:
    """Steps of the committed checkpoints in a folder, ascending; not verified."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


class Writer:
    """Saves states into one folder in the background, one at a time; close it, or use `with`."""

    def __init__(self, folder: str | Path, keep: int = 2):
        """Keep the `keep` newest checkpoints; two, because the newest may turn out damaged."""
        self.folder, self.keep = Path(folder).absolute(), keep
        self._thread, self._pending = ThreadPoolExecutor(1, thread_name_prefix="checkpoint"), None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def save(self, step: int, tree: PyTree, meta: Mapping[str, Any]) -> None:
        """Copy `tree` to the host and start writing it, once the previous save is done.

        Args:
          step: names the checkpoint; an older one of the same step is replaced.
          tree: arrays and PRNG keys.
          meta: metadata that JSON can hold.

        Raises:
          CheckpointError: the previous save could not be written (a full disk, a read-only folder).
        """
        arrays = {name: _plain(leaf) for name, leaf in _named(tree).items()}
        self.wait()
        self._pending = self._thread.submit(self._write, step, arrays, dict(meta))

    def _write(self, step: int, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        table = {name: [x.dtype.name, x.shape, _hash(name, x)] for name, x in arrays.items()}
        text = json.dumps({"leaves": table, "meta": meta}).encode()
        # Orbax does not take empty arrays.
        saved = {f"{i:05d}": x for i, x in enumerate(arrays.values()) if x.size}
        saved[META] = np.frombuffer(text + hashlib.sha256(text).digest(), np.uint8)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear()
        with _orbax() as orbax:
            orbax.save(self.folder / f"{step:012d}", args=ocp.args.StandardSave(saved), force=True)
        for old in steps(self.folder)[: -self.keep]:
            shutil.rmtree(self.folder / f"{old:012d}", ignore_errors=True)

    def _clear(self) -> None:
        """Remove what a killed process has left."""
        for left in self.folder.glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)

    def wait(self) -> None:
        """Wait until the save in progress is committed.

        Raises:
          CheckpointError: it could not be written; the newest older state, which the message names,
            is untouched.
        """
        pending, self._pending = self._pending, None
        if pending is None or (error := pending.exception()) is None:
            return
        with contextlib.suppress(OSError):
            self._clear()
        good = steps(self.folder)
        last = "no state has been written yet"
        if good:
            last = f"the last good state is {self.folder / f'{good[-1]:012d}'}"
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise CheckpointError(
            f"checkpoint: cannot write to {self.folder}: {reason[:200]}; {last}. Make room or "
            "permission, then resume."
        ) from error

    def close(self) -> None:
        """Wait for the last save."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The verified leaves by name, and the metadata; raises ValueError with what is wrong."""
    try:
        # Given a damaged file, parts of Orbax print dozens of tracebacks.
        with _orbax() as orbax, contextlib.redirect_stderr(io.StringIO()):
            found = orbax.restore(path, args=ocp.args.StandardRestore())
            raw = {key: np.asarray(x) for key, x in found.items()}
    except Exception as error:  # parts of Orbax raise many kinds for a damaged file
        raise ValueError(f"Orbax cannot read it ({_first_line(error)[:120]})") from error
    blob = raw.pop(META, np.empty(0, np.uint8)).tobytes()
    if len(blob) <= _DIGEST or hashlib.sha256(blob[:-_DIGEST]).digest() != blob[-_DIGEST:]:
        raise ValueError("its table of hashes is damaged")
    described = json.loads(blob[:-_DIGEST])
    arrays = {}
    for i, (name, (dtype, shape, sha256)) in enumerate(described["leaves"].items()):
        array = raw.get(f"{i:05d}")
        if array is None and 0 in shape:
            array = np.empty(shape, np.dtype(dtype))
        if array is None or _hash(name, array) != sha256:
            raise ValueError(f"the bytes of {name} do not have their sha256")
        arrays[name] = array
    return arrays, described["meta"]


def restore(folder: str | Path, like: PyTree | Callable[[int], PyTree]) -> Restored | None:
    """The newest intact checkpoint; None if there is none.

    Args:
      folder: as given to `Writer`.
      like: a tree of arrays or `jax.ShapeDtypeStruct`s with the structure to restore, or a function
        of the step that returns one.

    Raises:
      ValueError: the newest intact checkpoint has another structure; the message names the leaf.
    """
    folder = Path(folder).absolute()
    for step in reversed(steps(folder)):
        path = folder / f"{step:012d}"
        try:
            arrays, meta = _read(path)
        except ValueError as error:
            message = f"checkpoint: {path} is damaged and is passed over: {error}."
            warnings.warn(message, stacklevel=2)
            continue
        return Restored(step, _fill(like(step) if callable(like) else like, arrays, path), meta)
    return None


def _fill(like: PyTree, arrays: Mapping[str, np.ndarray], path: Path) -> PyTree:
    """The arrays in the structure of `like`, checked for names, shapes and dtypes."""
    wanted = _named(like)
    for name in [*wanted, *arrays]:
        if name not in arrays or name not in wanted:
            side = "holds no" if name not in arrays else "holds a"
            raise ValueError(
                f"checkpoint: {path} {side} {name}, unlike this program's state; was the config "
                "changed?"
            )
    leaves = []
    for name, want in wanted.items():
        array = arrays[name]
        is_key = jnp.issubdtype(want.dtype, jax.dtypes.prng_key)
        leaf = jax.random.wrap_key_data(jnp.asarray(array)) if is_key else array
        if leaf.shape != want.shape or leaf.dtype != want.dtype:
            raise ValueError(
                f"checkpoint: in {path} {name} is {leaf.dtype}{leaf.shape}; this program's state "
                f"needs {want.dtype}{tuple(want.shape)}. Was the config changed?"
            )
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def remove(folder: str | Path) -> None:
    """Delete a folder of checkpoints that is no longer needed."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.isdir(folder):
        warnings.warn(f"checkpoint: {folder} could not be removed.", stacklevel=2)
