"""What a diagnosis rests on: per layer of a loss, at given parameters and data, numbers read off
one evaluation.

    A_l = log rms h_l,   C_l = log rms dL/dh_l,   per layer l of the main chain (`gradjax.taps.structure`),

with the share of dead and saturated units, the spread over examples and units, attention logits,
the gradient and weights of every parameter leaf, and for recurrences the carried state's cotangent
at every step.

A cotangent that leaves the range of float32 is measured once more with the chain's cotangents
rescaled by powers of two on their way (they are all there is at such a value, so that the exponents
add up): depth 10,000 has its C_l. Cost: one gradient, twice where something left the range, and
what the statistics cost to compile.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradjax.taps import statistics as stats
from gradjax.taps.interpret import Site, run, watching
from gradjax.taps.jaxprs import outer_scan
from gradjax.taps.probe import Traced, arrays_of, trace
from gradjax.taps.structure import Activation, Layer, Recurrence, Structure, analyse

PyTree = Any
LOG2 = stats.LOG2
RANGE = 80.0  # nats: a float32 is safe within


@dataclass(frozen=True)
class Evidence:
    """Of one network; NumPy, natural logarithms. Arrays over layers run along the chain, read-out
    included.
    """

    loss: float
    half: bool  # the loss or a layer is in float16, whose largest number is 65504
    aux: Any
    structure: Structure
    layers: list[Layer]
    log_activation: np.ndarray  # (layers,) rms
    log_cotangent: np.ndarray  # (layers,) rms
    log_gradient: np.ndarray  # (layers,) norm, of the parameters of that layer; -inf without any
    size: np.ndarray  # (layers,) entries of the value
    examples: np.ndarray  # (layers,) variance over examples as a share of the mean square
    tokens: (
        np.ndarray
    )  # (layers,) variance over the positions of one example as a share, NaN where there are none
    units: np.ndarray  # (layers,) variance over units as a share
    values: dict[str, stats.Statistics]  # by name of the value, rows on the first axis
    order: list[tuple[str, int | None]]  # every (name, row) in the order of evaluation
    cotangents: dict[str, stats.Cotangent]
    activations: list[
        tuple[Activation, Any]
    ]  # with dead share, flat share or Logits, rows on the first axis
    recurrences: list[
        tuple[Recurrence, np.ndarray, np.ndarray]
    ]  # with log rms of the state and of its cotangent (T,)
    leaf_names: list[str]
    leaf_shapes: list[tuple[int, ...]]
    leaf_log_rms: list[np.ndarray]  # of the parameters, rows where they are stacked
    leaf_log_gradient: list[np.ndarray]  # norm of the gradients
    leaf_bad: list[bool]
    arg_log_rms: list[float]  # of the floating arguments
    arg_bad: list[str]  # names of arguments that hold inf or NaN
    skipped: dict[str, str]
    shattering: Callable[[], tuple[float, float] | None] = lambda: (
        None
    )  # measured when asked: it compiles a gradient of its own
    params: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def hidden(self) -> int:
        """How many of the layers are hidden: all but a read-out, which has another shape than what
        it reads.
        """
        last = len(self.layers) - 1
        if last < 1 or self.layers[last].row is not None or self.size[last] == self.size[last - 1]:
            return len(self.layers)
        return last


class _Seen(NamedTuple):
    """What the program returns; what is measured of many arrays of one shape is stacked, see
    `_grouped`.
    """

    out: list
    values: dict
    spread: dict
    special: dict
    sinks: dict
    grads: dict
    params: dict


SMALL = 2**20  # entries; larger arrays are measured where they are, not copied together


def _groups(arrays: dict) -> list[list]:
    """The keys of arrays of one shape and dtype together, small ones only."""
    found: dict = {}
    for key, x in arrays.items():
        found.setdefault((x.shape, x.dtype, key if x.size > SMALL else None), []).append(key)
    return list(found.values())


def _grouped(function: Callable, arrays: dict) -> dict:
    """{keys: function of each, stacked}: one piece of program for all arrays of a shape, or it
    compiles for minutes.
    """
    return {
        tuple(keys): jax.vmap(function)(jnp.stack([arrays[key] for key in keys]))
        for keys in _groups(arrays)
    }


def _split(grouped: dict) -> dict:
    """{key: what `function` returned}, on the host."""
    return {
        key: jax.tree.map(lambda x, i=i: x[i], result)
        for keys, result in grouped.items()
        for i, key in enumerate(keys)
    }


def _is_stacked(structure: Structure, shapes: list[tuple[int, ...]]) -> list[int]:
    """For every leaf the number of rows if it holds the layers of a scan, else 0."""
    rows = [0] * len(shapes)
    for layer in structure.layers:
        for leaf in layer.leaves:
            if layer.row is not None and shapes[leaf][:1] == layer.site.lead[:1]:
                rows[leaf] = layer.site.lead[0]
    return rows


def _special(kind: str) -> Callable:
    """What is measured of an activation function's output of that kind."""
    if kind == "relu":
        return stats.dead
    return stats.logits if kind == "softmax" else functools.partial(stats.flat, kind=kind)


class Measurement:
    """The program that measures one loss function, compiled once; call it with other parameters of
    the same shapes.
    """

    def __init__(
        self,
        loss_fn: Callable,
        params: PyTree,
        args: tuple,
        has_aux: bool = False,
        where: str = "diagnose",
    ):
        self.traced: Traced = trace(loss_fn, params, args, has_aux, where)
        self.structure = analyse(self.traced.jaxpr, self.traced.sites, self.traced.num_params)
        self.args, self.has_aux = args, has_aux
        leaves = self.traced.leaves[: self.traced.num_params]
        self.rows = _is_stacked(self.structure, [np.shape(x) for x in leaves])
        layers = {layer.site.path: layer.site for layer in self.structure.layers}
        named = {site.path: site for site in self.traced.sites}
        states = {site.path: site for r in self.structure.recurrences for site in r.sites}
        self.sites: dict[tuple, Site] = named | layers | states
        self.chain = set(layers)
        self.special_sites = {a.site.path: a.site for a in self.structure.activations}
        self.special = set(self.special_sites)
        # compiled once and run a few times: the time goes into compiling
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self.program = jax.jit(self._measure, static_argnums=1, compiler_options=options)
        self.input_gradient = jax.jit(
            self._input_gradient, static_argnums=1, compiler_options=options
        )

    def _measure(self, leaves: list, rescale: bool) -> _Seen:
        count = self.traced.num_params
        sinks = {
            path: self._sink(path, rescale)
            for path, site in self.sites.items()
            if not site.values_only
        }

        def attach(path, value, sink):
            if rescale and path in self.chain:
                return stats.rescaled(value, sink)
            return stats.observed(value, sink) if self.sites[path].lead else value + sink

        def measure(path, value):
            site, value = (
                self.sites.get(path) or self.special_sites[path],
                jax.lax.stop_gradient(value),
            )
            if not site.lead:
                return {"raw": value}
            parts = {
                "values": path in self.sites,
                "spread": path in self.chain,
                "special": path in self.special,
            }
            return {
                name: self._function(name, path)(value) for name, wanted in parts.items() if wanted
            }

        watch = watching(set(self.sites) | set(self.special), attach, measure)

        def evaluate(floats, sinks):
            out, seen = run(self.traced.jaxpr, [*floats, *leaves[count:]], watch, sinks)
            return out[0], (out, seen)

        gradient = jax.value_and_grad(evaluate, argnums=(0, 1), has_aux=True)
        (_, (out, seen)), (grads, found) = gradient(leaves[:count], sinks)
        raw = {path: each.pop("raw") for path, each in seen.items() if "raw" in each}
        split = lambda key: {
            (path,): jax.tree.map(lambda x: x[None], each[key])
            for path, each in seen.items()
            if key in each
        }
        pick = lambda paths: {path: raw[path] for path in paths if path in raw}
        special = {}
        for kind in sorted({site.kind for site in self.special_sites.values()}):
            of_kind = [path for path, site in self.special_sites.items() if site.kind == kind]
            special |= _grouped(_special(kind), pick(of_kind))
        one = lambda x: isinstance(x, stats.Cotangent)
        inside = {
            (path,): jax.tree.map(lambda x: x[None], c) for path, c in found.items() if one(c)
        }
        return _Seen(
            out,
            split("values") | _grouped(stats.statistics, pick(self.sites)),
            split("spread") | _grouped(stats.spread, pick(self.chain)),
            split("special") | special,
            inside
            | _grouped(stats.cotangent, {path: c for path, c in found.items() if not one(c)}),
            self._sizes(grads),
            self._sizes(leaves[:count]),
        )

    def _function(self, name: str, path: tuple) -> Callable:
        if name == "special":
            return _special(self.special_sites[path].kind)
        return stats.statistics if name == "values" else stats.spread

    def _sink(self, path: tuple, rescale: bool) -> Any:
        site = self.sites[path]
        if not site.lead and not (rescale and path in self.chain):
            return jnp.zeros(site.shape, site.dtype)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, site.lead), stats.blank())

    def _sizes(self, leaves: list) -> dict:
        """Log rms of every leaf, of every row of a stacked one."""
        whole = {i: x for i, x in enumerate(leaves) if not self.rows[i]}
        rows = {i: x for i, x in enumerate(leaves) if self.rows[i]}
        return _grouped(stats.log_rms, whole) | _grouped(jax.vmap(stats.log_rms), rows)

    def _inputs(self) -> list[int]:
        """The operands that are floating arrays of examples: as long as the first layer's value."""
        count, leaves = self.traced.num_params, self.traced.leaves
        examples = self.structure.layers[0].site.shape[:1] if self.structure.layers else ()
        return [
            i
            for i in range(count, len(leaves))
            if _is_float(leaves[i])
            and np.ndim(leaves[i]) > 1
            and np.shape(leaves[i])[:1] == examples
        ]

    def _input_gradient(self, leaves: list, which: tuple[int, ...]) -> tuple[list, list]:
        """dL/dx of the inputs, and the values of the first two layers."""
        first = [x.site.path for x in self.structure.layers[:2] if x.row is None and x.site.shape]
        watch = watching(first, lambda path, value, sink: value)

        def of(inputs):
            merged = list(leaves)
            for i, x in zip(which, inputs, strict=True):
                merged[i] = x
            out, seen = run(self.traced.jaxpr, merged, watch, {})
            return out[0], [seen[path] for path in first]

        grads, values = jax.grad(of, has_aux=True)([leaves[i] for i in which])
        return [stats.scaled(g)[0] for g in grads], values

    def shattering(self, relative: float = 1e-2) -> tuple[float, float] | None:
        """How the loss's gradient changes between x and x + relative * rms(x) * noise; None without
        floating inputs.

        Returns:
          the median cosine over examples between the two dL/dx: a smooth loss has 1, one whose gradient is white noise
          in x 0 (Balduzzi et al. 2017, arXiv 1702.08591); and the change of the second layer's value, a share of its
          size.
        """
        which = tuple(self._inputs())
        if not which:
            return None
        moved = list(self.traced.leaves)
        for i in which:
            x = jnp.asarray(moved[i])
            noise = jax.random.normal(jax.random.key(i), x.shape, jnp.float32)
            moved[i] = x + (relative * jnp.sqrt(jnp.mean(jnp.square(x))) * noise).astype(x.dtype)
        (g, before), (h, after) = (
            self.input_gradient(leaves, which) for leaves in (self.traced.leaves, moved)
        )
        flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1)
        dot = lambda a, b: sum((flat(x) * flat(y)).sum(1) for x, y in zip(a, b, strict=True))
        with np.errstate(all="ignore"):
            cosine = dot(g, h) / np.sqrt(dot(g, g) * dot(h, h))
            pairs = [(flat(x), flat(y)) for x, y in zip(before, after, strict=True)]
            change = [np.linalg.norm(x - y) / np.linalg.norm(x) for x, y in pairs]
        known = cosine[np.isfinite(cosine)]
        return (float(np.median(known)), float(max(change, default=0.0))) if known.size else None

    def _run(self, leaves: list, rescale: bool) -> _Seen:
        seen = jax.device_get(self.program(leaves, rescale))
        return _Seen(seen.out, *(_split(part) for part in seen[1:]))

    def __call__(self, params: PyTree | None = None, args: tuple | None = None) -> Evidence:
        """Measure at `params` and `args` (by default those it was made with), of the same
        shapes.
        """
        count = self.traced.num_params
        leaves = self.traced.leaves[:count] if params is None else jax.tree.leaves(params)
        leaves = leaves + (self.traced.leaves[count:] if args is None else arrays_of(args))
        seen = self._run(leaves, False)
        grads, sinks, order = seen.grads, seen.sinks, self.structure.layers
        cotangent = self._along(lambda c: c.log_rms, sinks)
        gradient = self._layer_gradients(leaves, grads)
        safe = np.isfinite(cotangent) & (np.abs(cotangent) < RANGE)
        if len(order) > 1 and np.isfinite(float(seen.out[0])) and not safe.all():
            again = self._run(leaves, True)
            exponents = self._along(lambda c: c.exponent, again.sinks) * LOG2
            behind = np.cumsum(exponents[::-1])[::-1]  # of this layer and those after it
            cotangent = self._along(lambda c: c.log_rms, again.sinks) + np.append(behind[1:], 0.0)
            gradient = self._layer_gradients(leaves, again.grads) + behind
        return self._evidence(leaves, args or self.args, seen, cotangent, gradient)

    def _along(self, field: Callable, found: dict) -> np.ndarray:
        """A field of what was found at the layers' sites, along the chain."""
        values = []
        for layer in self.structure.layers:
            x = np.asarray(field(found[layer.site.path]) if layer.site.path in found else np.nan)
            values.append(float(x[layer.row] if layer.row is not None else x))
        return np.array(values)

    def _layer_gradients(self, leaves: list, log_rms: dict) -> np.ndarray:
        """Log norm of the gradients of every layer's own parameters."""
        out = []
        for layer in self.structure.layers:
            squares = [-np.inf]
            for leaf in layer.leaves:
                rows, size = self.rows[leaf], np.size(leaves[leaf])
                value = np.asarray(log_rms[leaf])
                one = value[layer.row] if rows and layer.row is not None else value
                if np.ndim(one) == 0:
                    squares.append(2 * float(one) + np.log(size / (rows or 1)))
            with np.errstate(invalid="ignore"):
                out.append(0.5 * np.logaddexp.reduce(squares))
        return np.array(out)

    def _evidence(
        self, leaves: list, given: tuple, seen: _Seen, cotangent: np.ndarray, gradient: np.ndarray
    ) -> Evidence:
        traced, structure, count = self.traced, self.structure, self.traced.num_params
        values = seen.values
        name_of = {path: site.name for path, site in self.sites.items()}
        paths = jax.tree_util.tree_flatten_with_path(traced.params)[0]
        args = jax.tree_util.tree_flatten_with_path(given)[0]
        floats = [
            (jax.tree_util.keystr(p), np.asarray(x, np.float64)) for p, x in args if _is_float(x)
        ]
        out = jax.tree.unflatten(traced.out_tree, seen.out)
        log_size = np.array(
            [np.log(np.prod(layer.site.shape, dtype=float)) for layer in structure.layers]
        )
        params = [np.asarray(x) for x in leaves[:count]]
        norms = [
            np.asarray(g, float) + 0.5 * np.log(max(x.size / (rows or 1), 1))
            for g, x, rows in zip(_in_order(seen.grads), params, self.rows, strict=True)
        ]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            arg_rms = [float(0.5 * np.log(np.mean(np.square(x)))) for _, x in floats]
        recurrences = []
        for r in structure.recurrences:
            weight = [np.prod(site.shape, dtype=float) for site in r.sites]
            state = _joint([np.asarray(values[s.path].log_rms, float) for s in r.sites], weight)
            back = _joint([np.asarray(seen.sinks[s.path].log_rms, float) for s in r.sites], weight)
            recurrences.append((r, state[::-1], back[::-1]) if r.reverse else (r, state, back))
        return Evidence(
            loss=float(seen.out[0]),
            half=any(
                x == jnp.float16
                for x in (seen.out[0].dtype, *(s.site.dtype for s in structure.layers))
            ),
            aux=out[1] if self.has_aux else None,
            structure=structure,
            layers=structure.layers,
            log_activation=self._along(lambda s: s.log_rms, values),
            log_cotangent=cotangent,
            log_gradient=gradient,
            size=np.exp(log_size),
            examples=self._along(lambda s: s.examples, seen.spread),
            tokens=self._along(lambda s: s.tokens, seen.spread),
            units=self._along(lambda s: s.units, seen.spread),
            values={name_of[path]: value for path, value in values.items()},
            order=self._order(values),
            cotangents={name_of[path]: sink for path, sink in seen.sinks.items()},
            activations=[(a, seen.special.get(a.site.path)) for a in structure.activations],
            recurrences=recurrences,
            leaf_names=[jax.tree_util.keystr(p) for p, _ in paths],
            leaf_shapes=[x.shape for x in params],
            leaf_log_rms=[np.asarray(x, float) for x in _in_order(seen.params)],
            leaf_log_gradient=norms,
            leaf_bad=[not bool(np.all(np.isfinite(x.astype(np.float64)))) for x in params],
            arg_log_rms=arg_rms,
            arg_bad=[name for name, x in floats if not np.isfinite(x).all()],
            skipped=traced.skipped,
            shattering=self.shattering,
            params=params,
        )

    def _order(self, values: dict) -> list[tuple[str, int | None]]:
        """(name, row) of every value as they were computed: the rows of a scan one after the
        other.
        """
        keyed = []
        for path, site in self.sites.items():
            rows = np.size(values[path].log_rms) if site.lead else 1
            scan = outer_scan(self.traced.jaxpr, path)
            for row in range(rows):
                keyed.append(((scan or path, row, path), site.name, row if site.lead else None))
        return [(name, row) for _, name, row in sorted(keyed, key=lambda each: each[0])]


def _in_order(leaves: dict) -> list:
    return [leaves[i] for i in range(len(leaves))]


def _is_float(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic) and jnp.issubdtype(
        x.dtype, jnp.floating
    )


def _joint(log_rms: list[np.ndarray], sizes: list[float]) -> np.ndarray:
    """Log rms over several arrays from theirs."""
    squares = [2 * x + np.log(n) for x, n in zip(log_rms, sizes, strict=True)]
    with np.errstate(invalid="ignore"):
        return 0.5 * (np.logaddexp.reduce(squares, axis=0) - np.log(sum(sizes)))
