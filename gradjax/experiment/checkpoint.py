"""Checkpoints that are never restored wrong: Orbax, asynchronous, with a sha256 of every leaf.

A folder holds one sub-folder per step, committed by a rename; the newest two are kept. Orbax itself
restores nearly every flipped bit without a word, so the bytes of every leaf are hashed on the way
in and compared on the way out; the hashes and the caller's metadata are one more leaf, which ends
with its own hash. A checkpoint that fails is passed over with a warning that names it, and the one
before it is used.

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
_DIGEST = 32  # bytes of a sha256


class CheckpointError(OSError):
    """A state could not be written; the message names the last good one."""


class Restored(NamedTuple):
    """A verified checkpoint."""

    step: int
    tree: PyTree
    meta: dict[str, Any]


def _plain(leaf: Any) -> np.ndarray:
    """A copy of a leaf as NumPy (the program may reuse its buffer while it is written); PRNG keys
    as their data.
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


_ORBAX = threading.Lock()  # two of its saves in one process take each other's signals


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """Orbax for this process alone: no barrier, so one that dies holds up no other."""
    mine = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process_{mine}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with _ORBAX:
        checkpointer = ocp.Checkpointer(handler, multiprocessing_options=alone)
        try:
            yield checkpointer
        finally:
            checkpointer.close()


def steps(folder: str | Path) -> list[int]:
    """Steps of the committed checkpoints in a folder, ascending; not verified."""
    folder = Path(folder)
    return (
        sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    )


class Writer:
    """Saves the states of one folder in the background, one at a time; close it, or use it with
    `with`.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        """`keep` newest checkpoints stay; two, because the newest may turn out damaged."""
        self.folder, self.keep = Path(folder).absolute(), keep
        self._thread, self._pending = ThreadPoolExecutor(1, thread_name_prefix="checkpoint"), None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def save(self, step: int, tree: PyTree, meta: Mapping[str, Any]) -> None:
        """Copy `tree` to the host and start writing it; waits for the save before.

        Args:
          step: names the checkpoint; an older one of the same step is replaced.
          tree: arrays, PRNG keys among them.
          meta: JSON.

        Raises:
          CheckpointError: the save before could not be written (a full disk, a read-only folder).
        """
        arrays = {name: _plain(leaf) for name, leaf in _named(tree).items()}
        self.wait()
        self._pending = self._thread.submit(self._write, step, arrays, dict(meta))

    def _write(self, step: int, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        table = {name: [x.dtype.name, x.shape, _hash(name, x)] for name, x in arrays.items()}
        text = json.dumps({"leaves": table, "meta": meta}).encode()
        saved = {
            f"{i:05d}": x for i, x in enumerate(arrays.values()) if x.size
        }  # Orbax takes no empty array
        saved[META] = np.frombuffer(text + hashlib.sha256(text).digest(), np.uint8)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear()  # what a killed process has left
        with _orbax() as orbax:
            orbax.save(self.folder / f"{step:012d}", args=ocp.args.StandardSave(saved), force=True)
        for old in steps(self.folder)[: -self.keep]:
            shutil.rmtree(self.folder / f"{old:012d}", ignore_errors=True)

    def _clear(self) -> None:
        for left in self.folder.glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)

    def wait(self) -> None:
        """Until what was started is committed.

        Raises:
          CheckpointError: it could not be written; the newest older state is untouched, and named.
        """
        pending, self._pending = self._pending, None
        if pending is None or (error := pending.exception()) is None:
            return
        with contextlib.suppress(OSError):
            self._clear()
        good = steps(self.folder)
        last = (
            f"the last good state is {self.folder / f'{good[-1]:012d}'}"
            if good
            else "no state has been written yet"
        )
        reason = (
            getattr(error, "strerror", None)
            or (str(error).strip().splitlines() or [type(error).__name__])[0]
        )
        raise CheckpointError(
            f"checkpoint: cannot write to {self.folder}: {reason[:200]}; {last}. Make room or permission, then resume."
        ) from error

    def close(self) -> None:
        """Wait for the last save."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The verified leaves by name, and the metadata; raises ValueError with what is wrong."""
    try:
        # of a damaged file its parts print dozens of tracebacks
        with _orbax() as orbax, contextlib.redirect_stderr(io.StringIO()):
            raw = {
                key: np.asarray(x)
                for key, x in orbax.restore(path, args=ocp.args.StandardRestore()).items()
            }
    except Exception as error:  # whatever a damaged file makes of Orbax's parts
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"Orbax cannot read it ({reason[0][:120] if reason else type(error).__name__})"
        ) from error
    blob = raw.pop(META, np.empty(0, np.uint8)).tobytes()
    if len(blob) <= _DIGEST or hashlib.sha256(blob[:-_DIGEST]).digest() != blob[-_DIGEST:]:
        raise ValueError("its table of hashes is damaged")
    described = json.loads(blob[:-_DIGEST])
    arrays = {}
    for i, (name, (dtype, shape, sha256)) in enumerate(described["leaves"].items()):
        array = raw.get(f"{i:05d}")
        array = np.empty(shape, np.dtype(dtype)) if array is None and 0 in shape else array
        if array is None or _hash(name, array) != sha256:
            raise ValueError(f"the bytes of {name} do not have their sha256")
        arrays[name] = array
    return arrays, described["meta"]


def restore(folder: str | Path, like: PyTree | Callable[[int], PyTree]) -> Restored | None:
    """The newest checkpoint whose every byte is as it was written; None where there is none.

    Args:
      folder: as given to `Writer`.
      like: a tree of arrays or `jax.ShapeDtypeStruct`s of the structure to restore, or a function
        of the step to one.

    Raises:
      ValueError: the newest good checkpoint is of another structure; the message says at which
        leaf.
    """
    folder = Path(folder).absolute()
    for step in reversed(steps(folder)):
        path = folder / f"{step:012d}"
        try:
            arrays, meta = _read(path)
        except ValueError as error:
            warnings.warn(
                f"checkpoint: {path} is damaged and is passed over: {error}.", stacklevel=2
            )
            continue
        return Restored(step, _fill(like(step) if callable(like) else like, arrays, path), meta)
    return None


def _fill(like: PyTree, arrays: Mapping[str, np.ndarray], path: Path) -> PyTree:
    """The arrays in the structure of `like`, judged by the metadata that went with them."""
    wanted = _named(like)
    for name in [*wanted, *arrays]:
        if name not in arrays or name not in wanted:
            side = "holds no" if name not in arrays else "holds a"
            raise ValueError(
                f"checkpoint: {path} {side} {name}, unlike this program's state; was the config changed?"
            )
    leaves = []
    for name, want in wanted.items():
        array = arrays[name]
        is_key = jnp.issubdtype(want.dtype, jax.dtypes.prng_key)
        leaf = jax.random.wrap_key_data(jnp.asarray(array)) if is_key else array
        if leaf.shape != want.shape or leaf.dtype != want.dtype:
            raise ValueError(
                f"checkpoint: in {path} {name} is {leaf.dtype}{leaf.shape}; this program's state needs "
                f"{want.dtype}{tuple(want.shape)}. Was the config changed?"
            )
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def remove(folder: str | Path) -> None:
    """Delete a folder of checkpoints that is no longer needed."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.isdir(folder):
        warnings.warn(f"checkpoint: {folder} could not be removed.", stacklevel=2)
