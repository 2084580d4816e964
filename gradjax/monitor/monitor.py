"""`Monitor`: the host side of `gradjax.watch` in a training loop of one's own.

    tx, monitor = gradjax.watch(optax.adam(1e-3)), gradjax.Monitor("runs/mine")
    for step in range(num_steps):
        params, opt_state, loss = train_step(params, opt_state, batch)      # jitted, donated, as you have it
        monitor.update(opt_state, loss, key=batch_key)
    monitor.flush()                                                         # or `with gradjax.Monitor(...) as monitor:`

History. `watch` keeps the rows of the last steps in its state, so the monitor looks at one state in
`every` and has every step all the same. It copies those few numbers on the device (the next step
may be given the state's own buffers) and reads the copy when it is ready, by the next look at the
latest: the device does not wait for it.

Early warning. A norm of the gradient, the update or the parameters, of a leaf or of the whole tree,
that is far above the median of the last steps: the rule is in `gradjax.monitor.alarm`. One line
each, not one per step.

Failure is a step whose update or parameters are not finite (a gradient that a guard caught is a
warning). It leaves `crash-<step>.json`: the step and the leaf, the key of its batch, the leaves in
the order in which they left their history (what is NaN at last is everything), the last good
telemetry, the history's end, and the diagnosis, of the parameters before that step wherever an
episode had begun.

Cost: on the host about half of what dispatching the step itself costs (40 leaves), and on the
device the copy.
"""

import json
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradjax.monitor.alarm import QUANTITIES, Alarm
from gradjax.transforms import RuleState, telemetry

PyTree = Any

TAIL = 32  # rows of the history in a crash file


class _Call(NamedTuple):
    """What one call of `update` left for later."""

    number: int
    loss: Any
    key: Any
    args: tuple


class _Look(NamedTuple):
    """Copies of one state's telemetry, on the device until they are read, and the calls since the
    look before.
    """

    copies: list[Any]
    calls: list[_Call]


class Monitor:
    """Follows the telemetry of `gradjax.watch`: history, early warnings, and a crash file on
    failure; see the module.

    Args:
      folder: where a crash file goes. It is made when it is needed, and no file in it is ever
        overwritten.
      every: look at one state in so many calls. Up to watch's `keep` no step is missed. A failure is noticed by the
        second look after it, and attributed to its own step.
      window: steps whose medians are the history that a step is compared with; half of them are
        needed first.
      history: steps that are kept.
      deviations: 6, as in `transforms.skip_spikes`.
      factor: the smallest growth over the median that counts, at least 1.
      on_failure: "raise" (FloatingPointError, after the file is written) or "warn" and go on.
      on_warning: what is called with each line; None for `warnings.warn`.
      diagnose: called as diagnose(params, *args, history=history) on failure, e.g. `functools.partial(gradjax.diagnose,
        loss_fn)`. It needs `params` and `args` in `update`, and memory for two copies of the parameters.

    Attributes:
      warnings: the lines given so far, as (step, text).
      crash: the path of the last crash file; None before a failure.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int = 8,
        window: int = 64,
        history: int = 1024,
        deviations: float = 6.0,
        factor: float = 4.0,
        on_failure: str = "raise",
        on_warning: Callable[[str], Any] | None = None,
        diagnose: Callable[..., Any] | None = None,
    ):
        for name, value, low in (
            ("every", every, 1),
            ("window", window, 4),
            ("history", history, 1),
        ):
            if not isinstance(value, int) or value < low:
                raise ValueError(
                    f"Monitor: {name} is {value}; an integer in [{low}, inf) is needed."
                )
        if not deviations >= 0 or not factor >= 1:
            raise ValueError(
                f"Monitor: deviations is {deviations}, factor {factor}; at least 0 and 1 are needed."
            )
        if on_failure not in ("raise", "warn"):
            raise ValueError(f'Monitor: on_failure is {on_failure!r}; "raise" or "warn" is needed.')
        self.warnings: list[tuple[int, str]] = []
        self.crash: Path | None = None
        self._folder, self._every, self._raises, self._diagnose = (
            Path(folder),
            every,
            on_failure == "raise",
            diagnose,
        )
        self._on_warning = on_warning
        self._alarm = Alarm(window, deviations, math.log2(factor))
        self._snapshots: deque[tuple[int, PyTree]] = deque(
            maxlen=2
        )  # (call, the parameters after its step)
        self._steps, self._losses, self._rows = (deque(maxlen=history) for _ in range(3))
        self._calls: list[_Call] = []  # since the last look
        self._number = 0  # of the last call
        self._state: PyTree = None  # of the last call
        self._look: _Look | None = None  # not read yet
        self._taken: int | None = None  # steps of the optimiser at the last look that was read
        self._good: PyTree = None  # the last look without a failure
        self._failed = np.zeros(0, bool)  # lanes
        self._names: _Names  # of the first state

    def update(
        self,
        opt_state: PyTree,
        loss: Any,
        *,
        key: Any = None,
        params: PyTree = None,
        args: tuple = (),
    ) -> None:
        """Takes what one training step returned.

        Args:
          opt_state: the new optimiser state, with one `gradjax.watch` in it.
          loss: of this step, () (or of the shape of a vmap over the state).
          key: of this step's batch: a PRNG key, or whatever else finds it again. Only a crash file
            reads it.
          params: the new parameters, for `diagnose`.
          args: the batch, for `diagnose`: its further arguments.

        Raises:
          FloatingPointError: after a failure, with the path of the crash file.
          ValueError: if the state holds no `watch`, or several; if the loss has another shape.
        """
        if not self._number:
            self._names = _Names.of(opt_state)
            self._alarm.labels = self._names.labels
        if jnp.shape(loss) != self._names.lanes:
            raise ValueError(
                f"Monitor: the loss has shape {jnp.shape(loss)}, the optimiser state {self._names.lanes}; one loss "
                "per optimiser is needed: take its mean over the batch."
            )
        self._number += 1
        self._state = opt_state
        self._calls.append(_Call(self._number, loss, key, args if self._diagnose else ()))
        if self._look is not None and self._look.copies[0].is_ready():
            self._read()
        if (self._number - 1) % self._every == 0 or self._alarm.is_on:
            self._copy_state()
        if self._alarm.is_on:  # now every step counts
            self._read()
        wanted = self._alarm.is_on or (self._number - 1) % self._alarm.window == 0
        if self._diagnose and params is not None and wanted:
            self._snapshots.append((self._number, _copy(params)))

    def flush(self) -> None:
        """Reads all there is, up to the last call; for the end of a loop that is no `with`
        block.
        """
        self._read()
        if self._calls and not any(x.is_deleted() for x in self._names.pick(self._state)):
            self._copy_state()
            self._read()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Reads all there is. The loop's own error goes on; a failure found now then leaves its
        file only.
        """
        try:
            self.flush()
        except FloatingPointError:
            if kind is None:
                raise

    @property
    def history(self) -> dict[str, np.ndarray]:
        """Of the last steps: "step", "loss", and watch's figures under their keys in `telemetry`.

        Each is (steps,), behind it the axes of a vmap and (layers,) of a stacked leaf. A loss that is not known is NaN.
        """
        if not self._number:
            return {"step": np.zeros(0, int), "loss": np.zeros(0)}
        self.flush()
        return self._tail(len(self._steps))

    def _tail(self, count: int) -> dict[str, np.ndarray]:
        names, first = self._names, len(self._steps) - min(count, len(self._steps))
        found: dict[str, np.ndarray] = {"step": np.asarray(list(self._steps)[first:], int)}
        lanes = (len(found["step"]), *names.lanes)
        found["loss"] = np.asarray(list(self._losses)[first:], float).reshape(lanes)
        if lanes[0]:
            rows = np.stack(list(self._rows)[first:])
            rows = rows.reshape(*lanes, *rows.shape[2:])
            found |= names.figures(rows)
        return found

    # -- reading -----------------------------------------------------------------------------------------

    def _copy_state(self) -> None:
        self._read()
        self._look, self._calls = _Look(_copy(self._names.pick(self._state)), self._calls), []

    def _read(self) -> None:
        if self._look is None:
            return
        (copies, calls), self._look = self._look, None
        state = jax.tree.unflatten(self._names.structure, [np.asarray(x) for x in copies])
        seen = next(_watches(state)).telemetry
        count, gap, rows = (
            int(np.max(seen["count"], initial=0)),
            seen["figures"].every,
            seen["figures"].values,
        )
        if (
            self._taken is None or count < self._taken
        ):  # the first look; or the loop went back, and only this is new
            new = len(calls) if self._taken is None else 1
            self._taken, self._failed = (
                max(count - new, 0),
                np.zeros(math.prod(np.shape(seen["count"])), bool),
            )
        is_whole = count - self._taken == len(
            calls
        )  # one step for each call: then their losses and keys are known
        of_step = {
            count - 1 - k: call for k, call in enumerate(reversed(calls)) if is_whole or k == 0
        }
        rows = rows.reshape(-1, *rows.shape[-3:]).swapaxes(0, 1)  # (rows, lanes, fields, groups)
        newest = (count - 1) // gap * gap
        steps = [newest - gap * k for k in reversed(range(len(rows)))]
        old = sum(step < self._taken for step in steps)
        before, self._taken = self._taken, count
        self._follow(steps[old:], rows[old:], of_step, state, before)

    def _follow(
        self,
        steps: list[int],
        rows: np.ndarray,
        of_step: dict[int, _Call],
        state: PyTree,
        before: int,
    ) -> None:
        unknown = np.full(rows.shape[1], np.nan)
        losses = [
            np.asarray(of_step[s].loss, float).reshape(-1) if s in of_step else unknown
            for s in steps
        ]
        has_failed = ~(rows[:, :, 1:3] < np.inf).all((2, 3)) & ~self._failed
        end = int(np.argmax(has_failed.any(1))) if has_failed.any() else len(steps)
        self._steps.extend(steps[:end])
        self._losses.extend(losses[:end])
        self._rows.extend(rows[:end])
        for at, lane, text in self._alarm.new_alerts(steps[:end], rows[:end], ~self._failed):
            self._warn(
                at,
                f"gradjax.Monitor: step {at}: {f'seed {lane}: ' if self._names.lanes else ''}{text}",
            )
        if end == len(steps):
            self._good = state
            return
        step, lanes = steps[end], np.flatnonzero(has_failed[end])
        mark = int(next(_watches(state)).telemetry["first_bad_step"].reshape(-1)[lanes[0]])
        if end == 0 and before <= mark < step:  # rows between were not kept: the state knows better
            step = mark
        self._failed = self._failed | has_failed[end]
        self._fail(step, lanes, rows[end], losses[end], of_step.get(step))
        self._follow(steps[end:], rows[end:], of_step, state, step)

    def _warn(self, step: int, text: str) -> None:
        self.warnings.append((step, text))
        if self._on_warning:
            self._on_warning(text)
        else:
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    # -- failure -----------------------------------------------------------------------------------------

    def _fail(
        self, step: int, lanes: np.ndarray, row: np.ndarray, loss: np.ndarray, call: _Call | None
    ) -> None:
        names, lane = self._names, int(lanes[0])
        bad, suspects = names.first_bad(row[lane]), self._alarm.suspects(lane)
        good = self._tail(1)
        report: dict[str, Any] = {
            "step": step,
            "seeds": lanes.tolist() if names.lanes else None,
            "noticed_after_calls": self._number,
            "key": _plain(call.key) if call else None,
            "loss": loss[lane],
            "first_non_finite": bad,
            "suspects": suspects,
            "warnings": [text for _, text in self.warnings],
            "last_good_telemetry": telemetry(self._good)
            | {k: v[-1] for k, v in good.items() if len(v)},
            "history": self._tail(TAIL),
            "diagnosis": None,
        }
        seeds = f"seeds {lanes.tolist()}: " if names.lanes else ""
        text = (
            f"gradjax.Monitor: step {step}: {seeds}{bad['quantity']} of {bad['leaf']} not finite "
        )
        text += f"({bad['leaves']} of {len(names.labels)} leaves), loss {loss[lane]:.3g}."
        if suspects and suspects[0]["out_since"] is not None:
            first = suspects[0]
            text += f" First out of its history, at step {first['out_since']}: {first['quantity']} of {first['leaf']}."
        text += self._write(step, report, call)
        if self._raises:
            raise FloatingPointError(text)
        self._warn(step, text)

    def _write(self, step: int, report: dict[str, Any], call: _Call | None) -> str:
        """The crash file, first without the diagnosis, which may take long, or fail."""
        from gradjax.report import (
            files,  # it loads xarray, which a loop without a failure does not need
        )

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.crash = path = _new_file(self._folder, f"crash-{step}")
            report = report | {"versions": files.provenance()}
            files.write_text(path, files.dumps(report))
            if call and self._diagnose:
                files.write_text(path, files.dumps(report | self._diagnosis(call)))
        except OSError as error:
            return f" The crash file could not be written: {error}"
        return f" See {path}"

    def _diagnosis(self, call: _Call) -> dict[str, Any]:
        number, params = next(
            (s for s in reversed(self._snapshots) if s[0] < call.number), (0, None)
        )
        if params is None:
            return {
                "diagnosis_error": "no parameters from before the failure: pass params= to update."
            }
        about = {
            "diagnosis_of": f"the parameters {call.number - number} calls before the failure, its batch"
        }
        try:
            diagnosis = self._diagnose(params, *call.args, history=self._tail(len(self._steps)))  # type: ignore[misc]
            return about | {"diagnosis": json.loads(diagnosis.to_json())}
        except (
            Exception
        ) as error:  # whatever it is: the failure of the training is what has to be told
            return about | {"diagnosis_error": f"{type(error).__name__}: {error}"}


# -- names, states and files -----------------------------------------------------------------------------


class _Names(NamedTuple):
    """What is static in a watched state."""

    prefix: str  # of watch's keys in the telemetry
    lanes: tuple[int, ...]
    fields: tuple[str, ...]
    columns: list[tuple[str, int | slice]]  # key path of a leaf -> its groups
    labels: list[str]  # of the groups
    picked: list[int]  # the leaves of the state that are telemetry
    structure: Any  # which they make

    @classmethod
    def of(cls, opt_state: PyTree) -> "_Names":
        states = list(_watches(opt_state))
        if len(states) != 1:
            raise ValueError(
                f"Monitor: the optimiser state holds {len(states)} gradjax.watch; one is needed: put it around the "
                "optimiser, tx = gradjax.watch(tx), and pass the state that tx.update returned."
            )
        figures, count = states[0].telemetry["figures"], states[0].telemetry["count"]
        if isinstance(count, Tracer):
            raise ValueError(
                "Monitor: update was traced; call it outside of jit, with what the jitted step returned."
            )
        prefix = next(
            k for k in telemetry(_telemetry_only(opt_state)) if k.endswith(".watch/count")
        )
        layers = lambda name, n: [f"{name}[{i}]" for i in range(n)] if n else [name]
        labels = [label for name, n in figures.leaves for label in layers(name, n)]
        columns = [
            (name, part) for (name, _), part in zip(figures.leaves, figures.columns(), strict=True)
        ]
        leaves, structure = jax.tree.flatten(opt_state)
        picked, small = jax.tree.flatten(
            _telemetry_only(jax.tree.unflatten(structure, range(len(leaves))))
        )
        return cls(
            prefix.removesuffix("count"),
            jnp.shape(count),
            figures.fields,
            columns,
            labels,
            picked,
            small,
        )

    def pick(self, opt_state: PyTree) -> list[Any]:
        leaves = jax.tree.leaves(opt_state)
        return [leaves[i] for i in self.picked]

    def figures(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Telemetry keys -> columns of (..., fields, groups)."""
        fields = enumerate(self.fields)
        return {
            f"{self.prefix}{f}/{name}": rows[..., i, part]
            for i, f in fields
            for name, part in self.columns
        }

    def first_bad(self, row: np.ndarray) -> dict[str, Any]:
        """Of (fields, groups); parameters first: they were there before the gradient and the
        update.
        """
        is_bad = ~(row < np.inf)
        quantity = next(q for q in (2, 0, 1) if is_bad[q].any())
        group = int(np.argmax(is_bad[quantity]))
        value = {
            "quantity": QUANTITIES[quantity],
            "leaf": self.labels[group],
            "log2_norm": row[quantity, group],
        }
        return value | {"leaves": int(is_bad[quantity].sum())}


def _watches(tree: PyTree) -> Iterator[RuleState]:
    is_rule = lambda x: isinstance(x, RuleState)
    for node in filter(is_rule, jax.tree.leaves(tree, is_leaf=is_rule)):
        if node.rule == "watch":
            yield node
        yield from _watches(node.memory)


def _telemetry_only(tree: PyTree) -> PyTree:
    """An optimiser state without all that is no telemetry; every rule keeps its place."""
    is_rule = lambda x: isinstance(x, RuleState)
    keep = lambda x: (
        RuleState(x.telemetry, _telemetry_only(x.memory), x.rule) if is_rule(x) else None
    )
    return jax.tree.map(keep, tree, is_leaf=is_rule)


@jax.jit
def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)  # the step that follows may be given the buffers themselves


def _plain(key: Any) -> Any:
    """A key as JSON: the numbers of a PRNG key or an array, else itself or its `repr`."""
    try:
        if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return {
                "impl": str(jax.random.key_impl(key)),
                "data": np.asarray(jax.random.key_data(key)).tolist(),
            }
        if isinstance(key, jax.Array | np.ndarray | np.generic):
            return np.asarray(key).tolist()
    except RuntimeError as error:  # deleted
        return f"unreadable: {error}"
    return key if isinstance(key, str | int | float | None) else repr(key)


def _new_file(folder: Path, name: str) -> Path:
    """An empty `name.json`, or the first of `name-2.json` ... that does not exist yet."""
    count = 1
    while True:
        path = folder / f"{name}{'' if count == 1 else f'-{count}'}.json"
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            count += 1
