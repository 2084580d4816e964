"""Names on values: by `tap`, and on the outputs of modules while a function is traced.

A name is an equation of the jaxpr, the identity. It survives jit, scan, remat and vmap, where a
Python dictionary that collects values would hold leaked tracers. Outside a probe only `tap` names
values, and a name changes no bit of the result. While a probe traces, the axes that a vmap maps
come first in a named value.

Linen: `nn.intercept_methods` names each module's output with its path. NNX and Equinox: the
`__call__` of the model's classes is wrapped while tracing; a module is identified by its Python
`id`, so its name is the attribute path from the model, `blocks[2].attention.query`. Tracing such
models in several threads at once is not supported.
"""

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gradjax.taps.jaxprs import named

PyTree = Any
_SEPARATOR = "\x1f"
# Begins the `jax.named_scope` that is opened around a module's call while a probe traces.
SCOPE = "module:"


def _marked(x: Any, kind: str, name: str, label: str = "", leaf: str = "") -> Any:
    return named(x, _SEPARATOR.join((kind, name, label, leaf)), front=_known is not None)


def parse(text: str) -> tuple[str, str, str]:
    """(kind, name with the leaf of the output, class of the module) of a name in a jaxpr."""
    kind, name, label, leaf = text.split(_SEPARATOR)
    return kind, name + leaf, label


def tap(x: Array, name: str) -> Array:
    """Name a value for `gradjax.probe` and `gradjax.diagnose`; the identity.

    In a scan one name has a row for every iteration. A name may be used once in a loss function;
    inside a function that is called several times, make it differ: `tap(h, f"block{i}")`.

    Args:
      x: floating array, or a pytree of them: each leaf gets the name and its key path.
      name: any text that is not empty.

    Returns:
      `x`.

    Raises:
      ValueError: if the name is empty or not a string.

    >>> import jax.numpy as jnp
    >>> float(tap(jnp.float32(2.0), "h"))
    2.0
    """
    if not isinstance(name, str) or not name or _SEPARATOR in name:
        raise ValueError(f"tap: the name is {name!r}; a string that is not empty is needed.")
    return _name_leaves(x, "tap", name)


def _name_leaves(out: PyTree, kind: str, name: str, label: str = "") -> PyTree:
    """`out` with every floating leaf named by `name` and the leaf's key path."""

    def mark(path, x):
        if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return _marked(x, kind, name, label, jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(mark, out)


# Linen


def _intercept(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    method = context.method_name
    with jax.named_scope(SCOPE + "/".join(context.module.path)):
        out = next_fun(*args, **kwargs)
    # Private helpers, and the lambdas that nn.scan lifts, get no name.
    if method.startswith(("_", "<")) and method != "__call__":
        return out
    name = "/".join(context.module.path) or type(context.module).__name__
    if method != "__call__":
        name += "." + method
    return _name_leaves(out, "module", name, type(context.module).__name__)


# NNX and Equinox

# While a probe traces: id -> (path, module), which also keeps the module alive.
_known: dict[int, tuple[str, Any]] | None = None
# (module, path) of the modules that are being called, outermost first.
_stack: list[Any] = []
# class -> its own __call__, or None if it is inherited.
_wrapped: dict[type, Any] = {}


def _bases() -> tuple[type, ...]:
    """The base classes of the module systems that are loaded."""
    found = [getattr(sys.modules.get(name), "Module", None) for name in ("flax.nnx", "equinox")]
    return tuple(base for base in found if isinstance(base, type))


def is_module(x: Any) -> bool:
    """Whether `x` is an NNX or Equinox module."""
    return bool(bases := _bases()) and isinstance(x, bases)


def _parts(x: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """(path, module) of a module and of all modules in it, through lists, tuples and dicts.

    `seen` holds the ids of modules to leave out, and grows: NNX models may contain themselves.
    """
    if isinstance(x, list | tuple) or (is_module(x) and type(x).__name__ == "List"):
        for i, part in enumerate(x):
            yield from _parts(part, f"{path}[{i}]", seen)
    elif isinstance(x, dict):
        for key, part in x.items():
            yield from _parts(part, f"{path}[{key!r}]", seen)
    elif is_module(x) and id(x) not in seen:
        seen.add(id(x))
        yield path, x
        for key, part in vars(x).items():
            if not key.startswith("_"):
                yield from _parts(part, f"{path}.{key}" if path else key, seen)


def register(model: Any, path: str = "") -> None:
    """Make the modules of `model` known to the probe that is tracing, if one is."""
    if _known is None:
        return
    for name, module in _parts(model, path, set()):
        if id(module) not in _known:
            _known[id(module)] = name, module
            _wrap(type(module))


def _wrap(cls: type) -> None:
    if cls in _wrapped or not callable(getattr(cls, "__call__", None)):  # noqa: B004
        return
    original = cls.__call__
    _wrapped[cls] = cls.__dict__.get("__call__")

    def call(self, *args, **kwargs):
        # super().__call__ is the same call of the same module.
        if _stack and _stack[-1][0] is self:
            return original(self, *args, **kwargs)
        # jit, vmap and scan call copies of a module.
        if _known is not None and id(self) not in _known:
            outside = _stack[-1][1] if _stack else None
            register(self, "" if outside is None else f"{outside}.{cls.__name__}".lstrip("."))
        path = _known[id(self)][0] if _known is not None else ""
        _stack.append((self, path))
        try:
            with jax.named_scope(SCOPE + path):
                out = original(self, *args, **kwargs)
            return _name_leaves(out, "module", path or cls.__name__, cls.__name__)
        finally:
            _stack.pop()

    cls.__call__ = call  # type: ignore[method-assign]


def _unwrap() -> None:
    for cls, own in _wrapped.items():
        if own is None:
            del cls.__call__
        else:
            cls.__call__ = own
    _wrapped.clear()


def functional(loss_fn: Callable[..., Any], model: Any) -> tuple[Callable[..., Any], PyTree]:
    """Turn a loss of an NNX or Equinox model into a pure function of the model's parameters.

    A probe of that function finds the outputs of the model's modules named.

    Args:
      loss_fn: (model, *args) -> loss, or (loss, aux).
      model: an `nnx.Module` or `eqx.Module`.

    Returns:
      loss: (params, *args) -> what `loss_fn` returns. State that the model changes (BatchNorm,
        dropout keys) starts every call as it is in `model`.
      params: the `nnx.Param` state, or the Equinox model with only its floating arrays.

    Raises:
      ValueError: another kind of model: a Linen module needs no wrapping.
    """
    if not is_module(model):
        raise ValueError(
            f"functional: model is {type(model).__name__}; an nnx.Module or eqx.Module is needed. "
            "A Linen module and a plain function need no wrapping: pass loss_fn(params, *args) and "
            "params to probe or diagnose."
        )
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(model, nnx.Module):
        params, merge = _split_nnx(nnx, model)
    else:
        params, merge = _split_equinox(model)

    def loss(params, *args):
        whole = merge(params)
        register(whole)
        return loss_fn(whole, *args)

    return loss, params


def _split_nnx(nnx: Any, model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The parameters of an NNX module, and the function that makes a module of them."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    # Flax 0.10 has no such option and always copies.
    has_copy = "copy" in inspect.signature(nnx.merge).parameters
    options = {"copy": True} if has_copy else {}
    return params, lambda params: nnx.merge(graph, params, rest, **options)


def _split_equinox(model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The floating arrays of an Equinox module, and the function that makes a module of them."""
    import equinox as eqx

    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params: eqx.combine(params, rest)


# While tracing

_probes = itertools.count()


@contextlib.contextmanager
def naming() -> Iterator[None]:
    """Name the outputs of modules that are called inside, and trace every jitted function anew.

    A function that the user has jitted and called was traced without names, and jit would return
    that trace from its cache. Metadata that differs for each probe is part of the cache's key, and
    of nothing else.
    """
    from jax.experimental.xla_metadata import set_xla_metadata

    global _known
    linen = sys.modules.get("flax.linen")
    _known, before = {}, _known
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(set_xla_metadata(gradjax=str(next(_probes))))
            if linen is not None:
                stack.enter_context(linen.intercept_methods(_intercept))
            yield
    finally:
        _known = before
        if before is None:
            _unwrap()
