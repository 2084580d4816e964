"""The program of a loss and its gradient, whose equations know the user's lines.

It is traced from the loss's jaxpr: the equations of a derivative get the traceback of the forward
equation, which is how a backward operation finds the forward one. What a custom rule (`custom_jvp`,
`custom_vjp`) computes has lines of its own, in the rule; the call is named by a scope.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.extend import linear_util
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from gradjax.replay import source
from gradjax.replay.tape import Step
from gradjax.taps.jaxprs import at_place_of, closed, insides, is_transposed, is_whole
from gradjax.taps.probe import Traced

_RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
# They come with other operations and are not what a user wrote.
_PLUMBING = {"broadcast_in_dim", "reshape", "gradjax_name", "copy"}


def gradient_jaxpr(traced: Traced) -> ClosedJaxpr:
    """The closed jaxpr of (operands of the loss) -> (loss, gradients of the parameters)."""
    loss, count = jaxpr_as_fun(_with_calls_named(traced.jaxpr)), traced.num_params

    def value_and_grad(*operands):
        def of_params(leaves):
            return loss(*leaves, *operands[count:])[0]

        value, grads = jax.value_and_grad(of_params)(list(operands[:count]))
        return [value, *grads]

    return jax.make_jaxpr(value_and_grad)(*traced.leaves)


def _with_calls_named(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The same program, in which the calls of custom rules, and what is around them, have no
    traceback but a scope that leads to it.
    """
    eqns = []
    for eqn in jaxpr.jaxpr.eqns:
        if _has_rule(eqn):
            scope = source.named_call(eqn)
            params = {key: _inside_named(value) for key, value in eqn.params.items()}
            if isinstance(params.get("bwd"), linear_util.WrappedFun):
                params["bwd"] = _traced_apart(params["bwd"])
            eqn = at_place_of(eqn.replace(params=params), scope)
        eqns.append(eqn)
    return ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns), jaxpr.consts)


def _inside_named(value: Any) -> Any:
    """A parameter of an equation, with the jaxprs in it treated likewise."""
    if type(value) in (tuple, list):
        return type(value)(_inside_named(each) for each in value)
    if not is_whole(value):
        return value
    named = _with_calls_named(closed(value))
    return named if hasattr(value, "consts") else named.jaxpr


def _has_rule(eqn: Any) -> bool:
    if eqn.primitive.name in _RULES:
        return True
    return any(_has_rule(each) for _, jaxpr in insides(eqn) for each in jaxpr.jaxpr.eqns)


def _traced_apart(rule: linear_util.WrappedFun) -> linear_util.WrappedFun:
    """The backward rule of a `custom_vjp`, traced to a jaxpr before it is applied.

    JAX gives what such a rule computes the traceback of the call. A thread of its own has none, so
    that the equations get the frames of the rule.
    """

    def apply(*operands):
        if not all(isinstance(x, jax.Array) for x in operands):
            return rule.call_wrapped(*operands)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        given: list[Any] = []

        def arrays(*operands):
            # In which containers the arrays come depends on the version of JAX.
            given[:] = jax.tree.flatten(rule.call_wrapped(*operands))
            return [x for x in given[0] if isinstance(x, jax.Array)]

        with ThreadPoolExecutor(1) as threads:
            jaxpr = threads.submit(jax.make_jaxpr(arrays), *shapes).result()
        found = iter(jaxpr_as_fun(jaxpr)(*operands))
        leaves = [next(found) if isinstance(x, jax.Array) else x for x in given[0]]
        return jax.tree.unflatten(given[1], leaves)

    return linear_util.wrap_init(apply, debug_info=rule.debug_info)


# Forward and backward


def equations(jaxpr: Any) -> Iterator[tuple[Any, Any]]:
    """(equation, its own jaxpr) of a jaxpr and of all inside, in order."""
    for eqn in jaxpr.jaxpr.eqns:
        yield eqn, jaxpr.jaxpr
        for _, each in insides(eqn):
            yield from equations(each)


def forward_of(loss: Any, step: Step) -> Any | None:
    """The equation of the loss whose derivative, or whose own evaluation, an equation is.

    None where it has a line of its own: in a custom rule.
    """
    traceback = step.eqn.source_info.traceback
    same = [eqn for eqn, _ in equations(loss) if eqn.source_info.traceback is traceback]
    if traceback is None or not same:
        return None
    for rank in (_is_itself(step), _is_operation):
        chosen = [eqn for eqn in same if rank(eqn)]
        if chosen:
            return chosen[0]
    return same[0]


def _is_itself(step: Step) -> Callable[[Any], bool]:
    transposed = any(is_transposed(eqn) for eqn in step.eqns)
    return lambda eqn: not transposed and eqn.primitive.name == step.name


def _is_operation(eqn: Any) -> bool:
    return eqn.primitive.name not in _PLUMBING | {"convert_element_type"}
