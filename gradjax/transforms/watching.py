"""`watch`: norms of gradients, updates and parameters per leaf and per layer, around any optimiser,
in one line.

For every leaf, and every layer of a leaf that is `stacked`, at every step

    log2_grad    log2 ||g||,    log2_update  log2 ||u||,    log2_param  log2 ||p||,
    log2_ratio   log2 ||u|| / ||p||, the relative step (about -10 in a healthy run by a common rule of thumb)

and, once in a run, the first leaf that held inf or NaN and its step. The optimiser is not changed:
its updates and state are its own. A gradient of 1e30 has a norm, and one of 1e-40 is not zero; -inf
means that all entries are zero, inf and NaN what they say. Read all of it, the rules inside
included, with `gradjax.telemetry(opt_state)`; follow it with `gradjax.Monitor`. The state has a
fixed structure and lives in scans, vmaps and checkpoints; its figures are one array with the rows
of the last `keep` measured steps, so that a loop may look at it less often and miss nothing.

The norms. Where the plain sum of squares S of a group of n entries is below the overflow and above
2^20 n times the smallest normal number, what underflowed does not count, and log2 ||x|| = 1/2 log2
S. A step with any other group takes two more sums, of x scaled down and of x scaled up by powers of
two that bring every float into the range of its square (subnormal numbers as the integers that
their bits are, since arithmetic would flush them to zero).

Cost: three norms of the tree, or that of one in `every` steps, and the update is stored, which XLA
would else fuse into the new parameters; two more passes over a tree in a step in which one of its
groups is zero or leaves the range.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from gradjax.core import scale
from gradjax.transforms.rule import TelemetryBuffer, RuleState, Stacked, stacked_leaves
from gradjax.transforms.wrapping import Inside, count_of

PyTree = Any

FIELDS = ("log2_grad", "log2_update", "log2_param", "log2_ratio")
_SMALL = 256  # groups of so few entries become the rows of one array: a kernel for each costs more than its sum


def watch(
    tx: optax.GradientTransformation, stacked: Stacked = None, every: int = 1, keep: int = 8
) -> optax.GradientTransformationExtraArgs:
    """`tx` and a record of its gradients, updates and parameters; see the module.

    Args:
      tx: any Optax transform or optimiser.
      stacked: the leaves whose first axis is the layer of a scan: a prefix tree of bools or a
        predicate on the path.
      every: measure at steps 0, every, 2 every ... only, and keep the last values between. A NaN is then found at the
        next measured step, by which time it may have spread to other leaves.
      keep: rows in the state, one per measured step; `telemetry` reads the newest,
        `gradjax.Monitor` all.

    >>> import jax.numpy as jnp, optax
    >>> from gradjax.transforms import telemetry, watch
    >>> tx = watch(optax.sgd(0.5))
    >>> params = {"w": jnp.full(4, 2.0)}
    >>> _, state = tx.update({"w": jnp.full(4, 1e20)}, tx.init(params), params)
    >>> {k: round(float(v), 1) for k, v in telemetry(state).items() if "log2" in k}["0.watch/log2_ratio/['w']"]
    64.4
    """
    for name, value in (("every", every), ("keep", keep)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"watch: {name} is {value}; an integer in [1, inf) is needed.")
    inner = optax.with_extra_args_support(tx)

    def names(params):
        flags = jax.tree.leaves(stacked_leaves(stacked, params))
        paths = jax.tree_util.tree_flatten_with_path(params)[0]
        return tuple(
            (jax.tree_util.keystr(path), x.shape[0] if flag else 0)
            for (path, x), flag in zip(paths, flags, strict=True)
        )

    def measure(updates, out, params):
        leaves = [jax.tree.leaves(tree) for tree in lax.stop_gradient((updates, out, params))]
        flags = jax.tree.leaves(stacked_leaves(stacked, updates))
        norms = [log2_norms(tree, flags) for tree in leaves]
        dtype = max((x.dtype for x in norms), key=lambda dtype: dtype.itemsize)
        grad, step, param = (x.astype(dtype) for x in norms)
        ratio = jnp.where(step == -jnp.inf, step, step - param)  # nothing over nothing is no step
        sizes = [x.shape[0] if flag else 1 for x, flag in zip(leaves[0], flags, strict=True)]
        leaf_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        none = jnp.iinfo(jnp.int32).max
        is_bad = jnp.any(
            ~(jnp.stack([grad, step, param]) < jnp.inf), axis=0
        )  # -inf is the norm of zeros
        first = jnp.min(jnp.where(is_bad, leaf_of, none), initial=none)
        return jnp.stack([grad, step, param, ratio]), jnp.where(first == none, -1, first).astype(
            jnp.int32
        )

    def init_fn(params):
        row = jax.eval_shape(lambda: measure(params, params, params)[0])
        figures = TelemetryBuffer(
            jnp.zeros((keep, *row.shape), row.dtype), FIELDS, names(params), every
        )
        marks = {
            "first_bad_leaf": count_of(-1),
            "first_bad_step": count_of(-1),
            "count": count_of(),
        }
        return RuleState({"figures": figures} | marks, Inside(inner.init(params)), "watch")

    def update_fn(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "watch: it measures the parameters too; call update(grads, state, params)."
            )
        out, inner_state = inner.update(updates, state.memory.inner_state, params, **extra)
        old = state.telemetry
        rows = old["figures"].values

        def measured(rows):
            row, bad = measure(updates, out, params)
            return jnp.concatenate([rows[1:], row[None].astype(rows.dtype)]), bad

        if every == 1:
            rows, bad = measured(rows)
        else:  # a loop of none or one turn: XLA would copy what is handed to a `cond`
            turn = lambda carry: (jnp.zeros_like(carry[0]), measured(carry[1][0]))
            start = (old["count"] % every == 0, (rows, count_of(-1)))
            _, (rows, bad) = lax.while_loop(lambda c: c[0], turn, start)
        # never true: it orders the measurement before the step in place, which would else need a
        # copy of the parameters
        out = jax.tree.map(lambda u: jnp.where(bad < -1, jnp.zeros_like(u), u), out)
        first = (old["first_bad_step"] < 0) & (bad >= 0)
        marks = {
            "first_bad_leaf": jnp.where(first, bad, old["first_bad_leaf"]),
            "first_bad_step": jnp.where(first, old["count"], old["first_bad_step"]),
            "count": old["count"] + 1,
        }
        figures = TelemetryBuffer(rows, FIELDS, old["figures"].leaves, every)
        return out, RuleState({"figures": figures} | marks, Inside(inner_state), "watch")

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


# -- norms -----------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Groups of equal size, float32 or float64: all of an array, or the entries behind each index
    of its first axis.
    """

    x: Array
    is_stack: bool

    @property
    def groups(self) -> int:
        return self.x.shape[0] if self.is_stack else 1

    @property
    def size(self) -> int:
        return math.prod(self.x.shape[int(self.is_stack) :])


def log2_norms(leaves: Sequence[Array], flags: Sequence[bool]) -> Array:
    """log2 of the Euclidean norms of all groups of some arrays; see the module.

    Args:
      leaves: real or complex floating arrays.
      flags: for each whether its first axis is that of layers, each of which is a group.

    Returns:
      (groups,) in the widest dtype, in the order of the leaves.
    """
    blocks, place = _joined(
        [_Block(scale.widen(x), flag) for x, flag in zip(leaves, flags, strict=True)]
    )
    if not place.size:
        return jnp.zeros(0, jnp.float32)
    total = _sums_of_squares(blocks)
    each = lambda value: np.repeat([value(b) for b in blocks], [b.groups for b in blocks]).astype(
        total.dtype
    )
    low = each(lambda b: b.size * 2.0**20 * float(jnp.finfo(b.x.dtype).tiny))
    safe = (total >= low) & (total < each(lambda b: 2.0 ** _RANGE[b.x.dtype.name].overflow))

    def careful():
        large = _sums_of_squares([b._replace(x=_lowered(b.x)) for b in blocks])
        tiny = _sums_of_squares([b._replace(x=_lifted(b.x)) for b in blocks])
        down, up = (each(lambda b, k=k: _RANGE[b.x.dtype.name][k]) for k in (1, 2))
        return jnp.where(total < 1, 0.5 * jnp.log2(tiny) - up, 0.5 * jnp.log2(large) + down)

    # a loop of none or one turn: XLA copies the operands of a `cond`, and those of a loop it does
    # not change stay put
    turn = lambda carry: (jnp.zeros_like(carry[0]), jnp.where(safe, carry[1], careful()))
    start = (jnp.any(~safe), 0.5 * jnp.log2(jnp.where(safe, total, 1)))
    return lax.while_loop(lambda carry: carry[0], turn, start)[1][place]


class _Range(NamedTuple):
    """Exponents of two: sums of squares below 2^overflow are safe; factors 2^-down and 2^up for
    what is not.
    """

    overflow: int
    down: int
    up: int


# down: finite numbers have finite sums; up: subnormal numbers have normal squares, and what is not
# safe stays finite
_RANGE = {"float32": _Range(126, 80, 90), "float64": _Range(900, 600, 600)}


def _lowered(x: Array) -> Array:
    return x * jnp.asarray(2.0 ** -_RANGE[x.dtype.name].down, x.dtype)


def _lifted(x: Array) -> Array:
    """|x| * 2^up; subnormal numbers by their bits, which are an integer times the smallest of
    them.
    """
    info, up = jnp.finfo(x.dtype), _RANGE[x.dtype.name].up
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    bits = lax.bitcast_convert_type(jnp.abs(x), integer)
    of_bits = bits.astype(x.dtype) * jnp.asarray(2.0 ** (up + info.minexp - info.nmant), x.dtype)
    return jnp.where(bits < 1 << info.nmant, of_bits, jnp.abs(x) * jnp.asarray(2.0**up, x.dtype))


def _joined(blocks: list[_Block]) -> tuple[list[_Block], np.ndarray]:
    """The same groups with the small ones as the rows of one block, and where each of the
    arguments' groups now is.
    """
    small = [b.size <= _SMALL and b.x.dtype == jnp.float32 for b in blocks]
    order = sorted(range(len(blocks)), key=lambda i: not small[i])
    sizes = [blocks[i].groups for i in order]
    starts = dict(zip(order, np.cumsum([0, *sizes[:-1]]), strict=True)) if order else {}
    place = [starts[i] + np.arange(b.groups) for i, b in enumerate(blocks)]
    rows = [
        b.x.reshape(b.groups, b.size) for b, is_small in zip(blocks, small, strict=True) if is_small
    ]
    width = max((x.shape[1] for x in rows), default=0)
    rows = [jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in rows]
    joined = [_Block(jnp.concatenate(rows), True)] if rows else []
    large = [b for b, is_small in zip(blocks, small, strict=True) if not is_small]
    return joined + large, np.concatenate([np.zeros(0, int), *place])


def _sums_of_squares(blocks: Sequence[_Block]) -> Array:
    """(groups,)."""
    sums = [jnp.sum(jnp.square(x), axis=tuple(range(int(stack), x.ndim))) for x, stack in blocks]
    dtype = max((s.dtype for s in sums), key=lambda dtype: dtype.itemsize)
    return jnp.concatenate([s.astype(dtype).reshape(-1) for s in sums])
