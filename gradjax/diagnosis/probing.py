"""The program that measures one loss function: loss, parameters, data -> `Evidence`.

A cotangent that leaves the range of float32 is measured once more, with the cotangents along the
chain rescaled by powers of two on their way. Every gradient passes through the chain, so that the
exponents add up: depth 10,000 has its C_l. Cost: one gradient, two where something left the range,
and the compilation of the statistics.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradjax.core import scale
from gradjax.core.checks import without_debug_checks
from gradjax.diagnosis import underflow
from gradjax.diagnosis.evidence import Evidence
from gradjax.replay.gradient import gradient_jaxpr
from gradjax.replay.nonfinite import Names, NonFinite, search
from gradjax.taps import statistics as stats
from gradjax.taps.interpret import Site, run, watching
from gradjax.taps.probe import Traced, arrays_of, trace
from gradjax.taps.structure import Recurrence, Structure, analyse

PyTree = Any
RANGE = 80.0  # nats: within it a float32 and its square root are safe
SMALL = 2**20  # entries; larger arrays are measured where they are, not copied together


class _Seen(NamedTuple):
    """What the program returns; statistics of many arrays of one shape are stacked (`_grouped`)."""

    out: list
    values: dict
    spread: dict
    special: dict
    sinks: dict
    grads: dict
    params: dict


def _grouped(function: Callable, arrays: dict) -> dict:
    """{keys: the function of each array, stacked}: arrays of one shape and dtype share one piece of
    program, without which it compiles for minutes.
    """
    groups: dict = {}
    for key, x in arrays.items():
        groups.setdefault((x.shape, x.dtype, key if x.size > SMALL else None), []).append(key)
    return {
        tuple(keys): jax.vmap(function)(jnp.stack([arrays[key] for key in keys]))
        for keys in groups.values()
    }


def _ungrouped(results: dict) -> dict:
    """{key: a result} in the form of `_grouped`."""
    return {(key,): jax.tree.map(lambda x: x[None], result) for key, result in results.items()}


def _split(grouped: dict) -> dict:
    """{key: what the function returned for it}."""
    return {
        key: jax.tree.map(lambda x, i=i: x[i], result)
        for keys, result in grouped.items()
        for i, key in enumerate(keys)
    }


def _num_rows(structure: Structure, shapes: list[tuple[int, ...]]) -> list[int]:
    """For every leaf the number of rows if it holds the layers of a scan, else 0."""
    rows = [0] * len(shapes)
    for layer in structure.layers:
        for leaf in layer.leaves:
            if layer.row is not None and shapes[leaf][:1] == layer.site.lead[:1]:
                rows[leaf] = layer.site.lead[0]
    return rows


def _special(kind: str) -> Callable:
    """What is measured of the output of an activation function of that kind."""
    if kind == "relu":
        return stats.dead
    return stats.logits if kind == "softmax" else functools.partial(stats.flat, kind=kind)


class Measurement:
    """The measurement of one loss function, compiled once; call it with other parameters of the
    same shapes.

    Args:
      loss_fn, params, args, has_aux: as in `gradjax.diagnose`.
      where: begins the messages of errors.
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
        self.names = Names(self.traced, loss_fn, args)
        leaves = self.traced.leaves[: self.traced.num_params]
        self.rows = _num_rows(self.structure, [np.shape(x) for x in leaves])
        layers = {layer.site.path: layer.site for layer in self.structure.layers}
        named = {site.path: site for site in self.traced.sites}
        states = {site.path: site for r in self.structure.recurrences for site in r.sites}
        self.sites: dict[tuple, Site] = named | layers | states
        self.chain = set(layers)
        # Where cotangents can be rescaled on their way: along the chain; without one, over time.
        states_of_one = [r.sites[0].path for r in self.structure.recurrences if len(r.sites) == 1]
        self.rescaled = self.chain if len(self.structure.layers) > 1 else set(states_of_one)
        self.special = {a.site.path: a.site for a in self.structure.activations}
        # compiled once and run a few times: the time goes into compiling
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self.program = jax.jit(self._measure, static_argnums=1, compiler_options=options)
        self.input_gradient = jax.jit(
            self._input_gradient, static_argnums=1, compiler_options=options
        )

    # The compiled program

    def _measure(self, leaves: list, rescale: bool) -> _Seen:
        count = self.traced.num_params
        sinks = {
            path: self._sink(path, rescale)
            for path, site in self.sites.items()
            if not site.values_only
        }

        def attach(path, value, sink):
            if rescale and path in self.rescaled:
                return stats.rescaled(value, sink)
            return stats.observed(value, sink) if self.sites[path].lead else value + sink

        watch = watching(set(self.sites) | set(self.special), attach, self._reduce)

        def evaluate(floats, sinks):
            out, seen = run(self.traced.jaxpr, [*floats, *leaves[count:]], watch, sinks)
            return out[0], (out, seen)

        gradient = jax.value_and_grad(evaluate, argnums=(0, 1), has_aux=True)
        (_, (out, seen)), (grads, found) = gradient(leaves[:count], sinks)
        return _Seen(
            out,
            *self._statistics(seen),
            self._cotangents(found),
            self._sizes(grads),
            self._sizes(leaves[:count]),
        )

    def _reduce(self, path: tuple, value: Any) -> dict:
        """What is kept of a value: statistics inside a scan, the value itself outside."""
        value = jax.lax.stop_gradient(value)
        site = self.sites.get(path) or self.special[path]
        if not site.lead:
            return {"raw": value}
        kept = {}
        if path in self.sites:
            kept["values"] = stats.statistics(value)
        if path in self.chain:
            kept["spread"] = stats.spread(value)
        if path in self.special:
            kept["special"] = _special(self.special[path].kind)(value)
        return kept

    def _statistics(self, seen: dict) -> tuple[dict, dict, dict]:
        """Grouped values, spread and special statistics of what `_reduce` kept."""
        raw = {path: kept["raw"] for path, kept in seen.items() if "raw" in kept}

        def kept_in_scans(name: str) -> dict:
            return _ungrouped({path: kept[name] for path, kept in seen.items() if name in kept})

        def of(function: Callable, paths: Any) -> dict:
            return _grouped(function, {path: raw[path] for path in paths if path in raw})

        special = kept_in_scans("special")
        for kind in sorted({site.kind for site in self.special.values()}):
            paths = [path for path, site in self.special.items() if site.kind == kind]
            special |= of(_special(kind), paths)
        values = kept_in_scans("values") | of(stats.statistics, self.sites)
        spread = kept_in_scans("spread") | of(stats.spread, self.chain)
        return values, spread, special

    def _cotangents(self, found: dict) -> dict:
        """Grouped statistics of the cotangents; those of scans and of rescaled sites are
        reduced already.
        """
        reduced = {path: c for path, c in found.items() if isinstance(c, stats.Cotangent)}
        arrays = {path: c for path, c in found.items() if path not in reduced}
        return _ungrouped(reduced) | _grouped(stats.cotangent, arrays)

    def _sink(self, path: tuple, rescale: bool) -> Any:
        """What the cotangent at a site is differentiated with respect to."""
        site = self.sites[path]
        if not site.lead and not (rescale and path in self.rescaled):
            return jnp.zeros(site.shape, site.dtype)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, site.lead), stats.blank())

    def _sizes(self, leaves: list) -> dict:
        """Log rms of every leaf, of every row of a stacked one."""
        whole = {i: x for i, x in enumerate(leaves) if not self.rows[i]}
        rows = {i: x for i, x in enumerate(leaves) if self.rows[i]}
        return _grouped(stats.log_rms, whole) | _grouped(jax.vmap(stats.log_rms), rows)

    # The change of the gradient with the input

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

        def loss(inputs):
            merged = list(leaves)
            for i, x in zip(which, inputs, strict=True):
                merged[i] = x
            out, seen = run(self.traced.jaxpr, merged, watch, {})
            return out[0], [seen[path] for path in first]

        grads, values = jax.grad(loss, has_aux=True)([leaves[i] for i in which])
        return [scale.to_unit(g)[0] for g in grads], values

    def shattering(self, relative: float = 1e-2) -> tuple[float, float] | None:
        """How the loss's gradient changes between x and x + relative * rms(x) * noise.

        Returns:
          The median cosine over examples between the two dL/dx, which is 1 for a smooth loss and 0
          for one whose gradient is white noise in x (Balduzzi et al. 2017, arXiv 1702.08591); and
          the relative change of the second layer's value. None without floating inputs.
        """
        which = tuple(self._inputs())
        if not which:
            return None
        moved = list(self.traced.leaves)
        for i in which:
            x = jnp.asarray(moved[i])
            noise = jax.random.normal(jax.random.key(i), x.shape, jnp.float32)
            moved[i] = x + (relative * jnp.sqrt(jnp.mean(jnp.square(x))) * noise).astype(x.dtype)
        grads, before = self.input_gradient(self.traced.leaves, which)
        moved_grads, after = self.input_gradient(moved, which)
        with np.errstate(all="ignore"):
            cosine = _dot(grads, moved_grads) / np.sqrt(
                _dot(grads, grads) * _dot(moved_grads, moved_grads)
            )
            changes = [
                np.linalg.norm(_rows(x) - _rows(y)) / np.linalg.norm(_rows(x))
                for x, y in zip(before, after, strict=True)
            ]
        known = cosine[np.isfinite(cosine)]
        if not known.size:
            return None
        return float(np.median(known)), float(max(changes, default=0.0))

    # From the program's output to evidence

    def _run(self, leaves: list, rescale: bool) -> _Seen:
        seen = jax.device_get(self.program(leaves, rescale))
        return _Seen(seen.out, *(_split(part) for part in seen[1:]))

    @without_debug_checks()
    def __call__(self, params: PyTree | None = None, args: tuple | None = None) -> Evidence:
        """Measure at `params` and `args`, of the same shapes as those it was made with, which are
        the default.
        """
        count = self.traced.num_params
        leaves = self.traced.leaves[:count] if params is None else jax.tree.leaves(params)
        leaves = leaves + (self.traced.leaves[count:] if args is None else arrays_of(args))
        seen = self._run(leaves, False)
        cotangent = self._along(lambda c: c.log_rms, seen.sinks)
        gradient = self._layer_gradients(leaves, seen.grads)
        safe = np.isfinite(cotangent) & (np.abs(cotangent) < RANGE)
        if len(safe) > 1 and np.isfinite(float(seen.out[0])) and not safe.all():
            again = self._run(leaves, True)
            exponents = self._along(lambda c: c.exponent, again.sinks) * scale.LOG2
            # what this layer and those after it were divided by
            behind = np.cumsum(exponents[::-1])[::-1]
            cotangent = self._along(lambda c: c.log_rms, again.sinks) + np.append(behind[1:], 0.0)
            gradient = self._layer_gradients(leaves, again.grads) + behind
        over_time = [_over_time(r, seen) for r in self.structure.recurrences]
        if not self.chain and np.isfinite(float(seen.out[0])) and not _all_in_range(over_time):
            again = self._run(leaves, True)
            over_time = [_over_time(r, seen, again) for r in self.structure.recurrences]
        return self._evidence(leaves, args or self.args, seen, cotangent, gradient, over_time)

    def _along(self, field: Callable, found: dict) -> np.ndarray:
        """A field of what was found at the layers' sites, along the chain."""
        values = []
        for layer in self.structure.layers:
            x = np.asarray(field(found[layer.site.path]) if layer.site.path in found else np.nan)
            values.append(float(x if layer.row is None else x[layer.row]))
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
                    squares.append(2 * float(one) + np.log(max(size, 1) / (rows or 1)))
            with np.errstate(invalid="ignore"):
                out.append(0.5 * np.logaddexp.reduce(squares))
        return np.array(out)

    def _evidence(
        self,
        leaves: list,
        given: tuple,
        seen: _Seen,
        cotangent: np.ndarray,
        gradient: np.ndarray,
        over_time: list,
    ) -> Evidence:
        traced, layers, values = self.traced, self.structure.layers, seen.values
        name_of = {path: site.name for path, site in self.sites.items()}
        out = jax.tree.unflatten(traced.out_tree, seen.out)
        log_size = [np.log(np.prod(layer.site.shape, dtype=float)) for layer in layers]
        return Evidence(
            loss=float(seen.out[0]),
            half=underflow.is_half(traced, layers),
            aux=out[1] if self.has_aux else None,
            structure=self.structure,
            layers=layers,
            log_activation=self._along(lambda s: s.log_rms, values),
            log_cotangent=cotangent,
            log_gradient=gradient,
            size=np.exp(np.array(log_size)),
            examples=self._along(lambda s: s.examples, seen.spread),
            tokens=self._along(lambda s: s.tokens, seen.spread),
            units=self._along(lambda s: s.units, seen.spread),
            values={name_of[path]: value for path, value in values.items()},
            cotangents={name_of[path]: sink for path, sink in seen.sinks.items()},
            activations=[(a, seen.special.get(a.site.path)) for a in self.structure.activations],
            recurrences=over_time,
            skipped=traced.skipped,
            shattering=self.shattering,
            underflow=functools.cache(lambda: underflow.measure(traced, leaves)),
            culprit=self._culprit(leaves, seen),
            **self._leaf_fields(leaves, seen),
            **_argument_fields(given),
        )

    def _leaf_fields(self, leaves: list, seen: _Seen) -> dict[str, Any]:
        """The fields of `Evidence` about parameters."""
        paths = jax.tree_util.tree_flatten_with_path(self.traced.params)[0]
        params = [np.asarray(x) for x in leaves[: self.traced.num_params]]
        norms = [
            np.asarray(seen.grads[i], float) + 0.5 * np.log(max(x.size / (rows or 1), 1))
            for i, (x, rows) in enumerate(zip(params, self.rows, strict=True))
        ]
        return {
            "leaf_names": [jax.tree_util.keystr(path) for path, _ in paths],
            "leaf_shapes": [x.shape for x in params],
            "leaf_log_rms": [np.asarray(seen.params[i], float) for i in range(len(params))],
            "leaf_log_gradient": norms,
            "leaf_bad": [not bool(np.all(np.isfinite(x.astype(np.float64)))) for x in params],
            "params": params,
        }

    def _culprit(self, leaves: list, seen: _Seen) -> NonFinite | None:
        """What makes the loss or a gradient inf or NaN; asked only where one is."""
        sizes = [np.max(x) for x in seen.grads.values()]
        if np.isfinite(float(seen.out[0])) and all(x < np.inf for x in sizes):
            return None
        return search(self.traced, self.gradient, leaves, self.names)[0]

    @functools.cached_property
    def gradient(self) -> Any:
        """The program of the loss and its gradient, for the search."""
        return gradient_jaxpr(self.traced)


def _argument_fields(given: tuple) -> dict[str, Any]:
    """The fields of `Evidence` about arguments."""
    floats = [np.asarray(x, np.float64) for x in jax.tree.leaves(given) if _is_float(x)]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_rms = [float(0.5 * np.log(np.mean(np.square(x)))) for x in floats]
    return {"arg_log_rms": log_rms}


def _over_time(
    recurrence: Recurrence, seen: _Seen, rescaled: _Seen | None = None
) -> tuple[Recurrence, np.ndarray, np.ndarray]:
    """The recurrence with the log rms of its state and of the state's cotangent, in the order of
    its steps.

    `rescaled` is what was seen with cotangents rescaled on their way; it is used for a state of one
    array.
    """
    sizes = [np.prod(site.shape, dtype=float) for site in recurrence.sites]

    def joint(found: dict) -> np.ndarray:
        """Log rms over all arrays of the state, from those of each."""
        log_rms = [np.asarray(found[site.path].log_rms, float) for site in recurrence.sites]
        squares = [2 * x + np.log(size) for x, size in zip(log_rms, sizes, strict=True)]
        with np.errstate(invalid="ignore"):
            return 0.5 * (np.logaddexp.reduce(squares, axis=0) - np.log(sum(sizes)))

    state, cotangent = joint(seen.values), joint(seen.sinks)
    exponents = np.zeros(len(cotangent))
    if rescaled is not None and len(recurrence.sites) == 1:
        cotangent = joint(rescaled.sinks)
        found = rescaled.sinks[recurrence.sites[0].path]
        exponents = np.asarray(found.exponent, float) * scale.LOG2
    if recurrence.reverse:
        state, cotangent, exponents = state[::-1], cotangent[::-1], exponents[::-1]
    # what the cotangents of the steps after this one were divided by
    behind = np.cumsum(exponents[::-1])[::-1]
    return recurrence, state, cotangent + np.append(behind[1:], 0.0)


def _all_in_range(over_time: list) -> bool:
    return all((np.abs(back) < RANGE).all() for _, _, back in over_time)


def _is_float(x: Any) -> bool:
    is_array = isinstance(x, jax.Array | np.ndarray | np.generic)
    return is_array and jnp.issubdtype(x.dtype, jnp.floating)


def _rows(x: Any) -> np.ndarray:
    """An array of examples as one row each, float64."""
    return np.asarray(x, np.float64).reshape(len(x), -1)


def _dot(a: list, b: list) -> np.ndarray:
    """Inner products per example of two lists of arrays."""
    return np.sum([(_rows(x) * _rows(y)).sum(1) for x, y in zip(a, b, strict=True)], axis=0)
