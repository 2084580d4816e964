"""`Monitor`: the host side of `gradjax.watch` in a training loop of one's own.

    tx, monitor = gradjax.watch(optax.adam(1e-3)), gradjax.Monitor("runs/mine")
    for step in range(num_steps):
        # jitted, with donated buffers if you like
        params, opt_state, loss = train_step(params, opt_state, batch)
        monitor.update(opt_state, loss, key=batch_key)
    # or `with gradjax.Monitor(...) as monitor:` around the loop
    monitor.flush()

History. `watch` keeps the rows of the last steps in its state, so the monitor looks at one state in
`every` and still has every step. It copies those few numbers on the device (the next step may be
given the state's own buffers) and reads the copy when it is ready, by the next look at the latest:
the device does not wait for it.

Early warning. A norm of the gradient, the update or the parameters, of a leaf or of the whole tree,
that is far above the median of the last steps gives one line, not one per step
(`gradjax.monitor.alarm`); so does what a median that follows cannot see: slow growth, a loss that
is not finite, gradients of 0 (`gradjax.monitor.trend`), a state that never advances.

Failure is a step whose update or parameters are not finite (a gradient that a guard caught is a
warning). It leaves `crash-<step>.json` with the step and the leaf, the key of its batch, the leaves
in the order in which they left their history (what is NaN in the end is everything), the last good
telemetry, the end of the history, and the diagnosis. Where an episode had begun, that is of the
parameters before the failing step.

Cost: on the host about half of what dispatching the step itself costs (40 leaves), and on the
device the copy.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradjax.core.unwrap import optimizer_state
from gradjax.monitor import crash
from gradjax.monitor.alarm import Alarm
from gradjax.monitor.trend import Trend
from gradjax.monitor.watched import WatchedState, watches
from gradjax.report import files
from gradjax.transforms import telemetry

PyTree = Any

# Rows of the history in a crash file.
TAIL = 32


class _Call(NamedTuple):
    """What one call of `update` left for later."""

    number: int
    loss: Any
    key: Any
    args: tuple


class _Look(NamedTuple):
    """Copies of one state's telemetry, on the device until they are read."""

    copies: list[Any]
    calls: list[_Call]  # since the look before


class Monitor:
    """History, early warnings and crash files from the telemetry of `gradjax.watch`.

    The module's docstring describes them.

    Args:
      folder: where a crash file goes. It is made when it is needed, and no file in it is ever
        overwritten.
      every: look at one state in so many calls. Up to watch's `keep` no step is missed. A failure
        is noticed by the second look after it, and attributed to its own step.
      window: number of steps that a step is compared with; half of them are needed first.
      history: number of steps that are kept.
      deviations: 6, as in `transforms.skip_spikes`.
      factor: the smallest growth over the median that counts, at least 1.
      on_failure: "raise" (FloatingPointError, after the file is written) or "warn" and go on.
      on_warning: a function that is called with each line; None for `warnings.warn`.
      diagnose: is called as diagnose(params, *args, history=history) on failure, for example
        `functools.partial(gradjax.diagnose, loss_fn)`. It needs `params` and `args` in `update`,
        and memory for two copies of the parameters.

    Attributes:
      warnings: the lines given so far, as (step, text).
      crash: the path of the last crash file; None before a failure.

    Raises:
      ValueError: an argument that is out of its range.
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
                f"Monitor: deviations is {deviations}, factor {factor}; "
                "at least 0 and 1 are needed."
            )
        if on_failure not in ("raise", "warn"):
            raise ValueError(f'Monitor: on_failure is {on_failure!r}; "raise" or "warn" is needed.')
        self.warnings: list[tuple[int, str]] = []
        self.crash: Path | None = None
        self._folder = Path(folder)
        self._every = every
        self._raises = on_failure == "raise"
        self._on_warning = on_warning
        self._diagnose = diagnose
        self._alarm = Alarm(window, deviations, math.log2(factor))
        self._trend = Trend(window)
        # calls in a row that left the state as it was
        self._idle = 0
        # (call, the parameters after its step)
        self._snapshots: deque[tuple[int, PyTree]] = deque(maxlen=2)
        self._steps, self._losses, self._rows = (deque(maxlen=history) for _ in range(3))
        # calls since the last look
        self._calls: list[_Call] = []
        # number and state of the last call
        self._number = 0
        self._state: PyTree = None
        # the look that is not read yet
        self._look: _Look | None = None
        # steps of the optimiser at the last look that was read
        self._taken: int | None = None
        # the last look without a failure
        self._good: PyTree = None
        # which lanes, the members of a vmap, have failed
        self._failed = np.zeros(0, bool)
        # of the first state
        self._names: WatchedState

    def update(
        self,
        opt_state: PyTree,
        loss: Any,
        *,
        key: Any = None,
        params: PyTree = None,
        args: tuple = (),
    ) -> None:
        """Take what one training step returned.

        Args:
          opt_state: the new optimiser state, with one `gradjax.watch` in it; also an
            `nnx.Optimizer` or a `TrainState`.
          loss: this step's loss, of shape () or of the shape of a vmap over the state.
          key: identifies this step's batch: a PRNG key, or anything else that finds it again. Only
            a crash file reads it.
          params: the new parameters, for `diagnose`.
          args: the batch, passed to `diagnose` after the parameters.

        Raises:
          FloatingPointError: after a failure, with the path of the crash file.
          ValueError: if the state holds no `watch`, or several; if the loss has another shape.
        """
        opt_state = optimizer_state(opt_state)
        if not self._number:
            self._names = WatchedState.of(opt_state)
            self._alarm.labels = self._names.labels
        if jnp.shape(loss) != self._names.lanes:
            raise ValueError(
                f"Monitor: the loss has shape {jnp.shape(loss)}, the optimiser state "
                f"{self._names.lanes}; one loss per optimiser is needed: take its mean over the "
                "batch."
            )
        self._number += 1
        self._state = opt_state
        self._calls.append(_Call(self._number, loss, key, args if self._diagnose else ()))
        if self._look is not None and self._look.copies[0].is_ready():
            self._read()
        if (self._number - 1) % self._every == 0 or self._alarm.is_on:
            self._copy_state()
        # During an episode every step counts.
        if self._alarm.is_on:
            self._read()
        is_wanted = self._alarm.is_on or (self._number - 1) % self._alarm.window == 0
        if self._diagnose and params is not None and is_wanted:
            self._snapshots.append((self._number, _copy(params)))

    def flush(self) -> None:
        """Read up to the last call; for the end of a loop outside a `with` block."""
        self._read()
        if self._calls and not any(x.is_deleted() for x in self._names.pick(self._state)):
            self._copy_state()
            self._read()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Read up to the last call.

        The loop's own error is not replaced: a failure found now then only leaves its file.
        """
        try:
            self.flush()
        except FloatingPointError:
            if kind is None:
                raise

    @property
    def history(self) -> dict[str, np.ndarray]:
        """The last steps: "step", "loss", and watch's rows under their keys in `telemetry`.

        Each is (steps,), followed by the axes of a vmap and (layers,) of a stacked leaf. A loss
        that is not known is NaN.
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
            found |= names.named(rows)
        return found

    # Reading

    def _copy_state(self) -> None:
        self._read()
        self._look, self._calls = _Look(_copy(self._names.pick(self._state)), self._calls), []

    def _read(self) -> None:
        """Read the rows of the last look that are new."""
        if self._look is None:
            return
        (copies, calls), self._look = self._look, None
        state = self._names.restore(copies)
        seen = next(watches(state)).telemetry
        count, buffer = int(np.max(seen["count"], initial=0)), seen["figures"]
        if self._taken is None or count < self._taken:
            # The first look; or the loop went back, and only its last step is new.
            new = len(calls) if self._taken is None else 1
            self._taken = max(count - new, 0)
            self._failed = np.zeros(math.prod(np.shape(seen["count"])), bool)
        self._check_advance(count, len(calls))
        # With one step for each call their losses and keys are known, else only the last one's.
        known = calls if count - self._taken == len(calls) else calls[-1:]
        of_step = {count - 1 - k: call for k, call in enumerate(reversed(known))}
        # (rows, lanes, fields, groups)
        rows = buffer.values.reshape(-1, *buffer.values.shape[-3:]).swapaxes(0, 1)
        newest = (count - 1) // buffer.every * buffer.every
        steps = [newest - buffer.every * k for k in reversed(range(len(rows)))]
        old = sum(step < self._taken for step in steps)
        before, self._taken = self._taken, count
        self._follow(steps[old:], rows[old:], of_step, state, before)

    def _check_advance(self, count: int, num_calls: int) -> None:
        """Warn, once, of a state that stays the same over a window of calls."""
        was_idle = self._idle
        self._idle = self._idle + num_calls if count == self._taken else 0
        if was_idle < self._alarm.window <= self._idle:
            self._warn(
                count,
                f"gradjax.Monitor: step {count}: the optimiser's state has not advanced in "
                f"{self._idle} calls; pass the new state that tx.update returned",
            )

    def _follow(
        self,
        steps: list[int],
        rows: np.ndarray,
        of_step: dict[int, _Call],
        state: PyTree,
        before: int,
    ) -> None:
        """Append rows to the history, up to the first failure, and go on after that.

        Args:
          steps: one for each row.
          rows: (steps, lanes, fields, groups).
          of_step: step -> its call, where it is known.
          state: the look that the rows are from.
          before: steps of the optimiser at the look before.
        """
        losses = []
        for step in steps:
            loss = of_step[step].loss if step in of_step else np.full(rows.shape[1], np.nan)
            losses.append(np.asarray(loss, float).reshape(-1))
        has_failed = ~(rows[:, :, 1:3] < np.inf).all((2, 3)) & ~self._failed
        end = int(np.argmax(has_failed.any(1))) if has_failed.any() else len(steps)
        self._steps.extend(steps[:end])
        self._losses.extend(losses[:end])
        self._rows.extend(rows[:end])
        alive = ~self._failed
        alerts = list(self._alarm.new_alerts(steps[:end], rows[:end], alive))
        if end:
            known = np.array([step in of_step for step in steps[:end]])
            seen, totals = np.stack(losses[:end]), self._alarm.totals
            alerts += self._trend.new_alerts(steps[:end], totals, seen, known, alive)
        for at, lane, text in alerts:
            whose = f"seed {lane}: " if self._names.lanes else ""
            self._warn(at, f"gradjax.Monitor: step {at}: {whose}{text}")
        if end == len(steps):
            self._good = state
            return
        step, lanes = steps[end], np.flatnonzero(has_failed[end])
        mark = int(next(watches(state)).telemetry["first_bad_step"].reshape(-1)[lanes[0]])
        if end == 0 and before <= mark < step:
            # Intermediate rows were overwritten, so use the step recorded in the state.
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

    # Failure

    def _fail(
        self, step: int, lanes: np.ndarray, row: np.ndarray, loss: np.ndarray, call: _Call | None
    ) -> None:
        names, lane = self._names, int(lanes[0])
        bad, suspects = names.first_bad(row[lane]), self._alarm.suspects(lane)
        last = {key: values[-1] for key, values in self._tail(1).items() if len(values)}
        report: dict[str, Any] = {
            "step": step,
            "seeds": lanes.tolist() if names.lanes else None,
            "noticed_after_calls": self._number,
            "key": crash.plain_key(call.key) if call else None,
            "loss": loss[lane],
            "first_non_finite": bad,
            "suspects": suspects,
            "warnings": [text for _, text in self.warnings],
            "last_good_telemetry": telemetry(self._good) | last,
            "history": self._tail(TAIL),
            "diagnosis": None,
        }
        seeds = f"seeds {lanes.tolist()}: " if names.lanes else ""
        text = (
            f"gradjax.Monitor: step {step}: {seeds}{bad['quantity']} of {bad['leaf']} not finite "
            f"({bad['leaves']} of {len(names.labels)} leaves), loss {loss[lane]:.3g}."
        )
        if suspects and suspects[0]["out_since"] is not None:
            first = suspects[0]
            text += (
                f" First out of its history, at step {first['out_since']}: "
                f"{first['quantity']} of {first['leaf']}."
            )
        text += self._write(step, report, call)
        if self._raises:
            raise FloatingPointError(text)
        self._warn(step, text)

    def _write(self, step: int, report: dict[str, Any], call: _Call | None) -> str:
        """Write the crash file; returns the sentence that says where it is."""
        try:
            self.crash = crash.new_file(self._folder, f"crash-{step}")
            report = report | {"versions": files.provenance()}
            # First without the diagnosis, which may take long, or end the process.
            files.write_text(self.crash, files.dumps(report))
            if call and self._diagnose:
                files.write_text(self.crash, files.dumps(report | self._diagnosis(call)))
        except OSError as error:
            return f" The crash file could not be written: {error}"
        return f" See {self.crash}"

    def _diagnosis(self, call: _Call) -> dict[str, Any]:
        before = [(number, params) for number, params in self._snapshots if number < call.number]
        if not before:
            return {
                "diagnosis_error": "no parameters from before the failure: pass params= to update."
            }
        number, params = before[-1]
        about = f"the parameters {call.number - number} calls before the failure, its batch"
        history = self._tail(len(self._steps))
        found = crash.diagnose(self._diagnose, params, call.args, history)  # type: ignore[arg-type]
        return {"diagnosis_of": about} | found


@jax.jit
def _copy(tree: PyTree) -> PyTree:
    """Copies that stay valid when the step that follows is given the buffers themselves."""
    return jax.tree.map(jnp.copy, tree)
