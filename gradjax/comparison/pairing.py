"""Which values, and which parameters, of two programs belong together.

Names: those that are equal, and those of the mapping. Where few are, the rest is paired in order of
evaluation, if as many values of a shape stand between two pairs in both programs. Parameters: by
the mapping, by equal values, by key path, by order and shape. Shapes may differ by a reshape or a
transposition.
"""

import difflib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Pair = tuple[str, str]
Shape = tuple[int, ...]
# Axes up to which all orders are tried.
_MOST_AXES = 5


def check_mapping(
    mapping: Mapping[str, str], known_a: Sequence[str], known_b: Sequence[str], option: str
) -> None:
    """Check that the names of a mapping exist.

    Args:
      mapping: name in a -> name in b.
      known_a, known_b: the names that exist.
      option: the argument's name.

    Raises:
      ValueError: a name that does not exist; lists the nearest ones.
    """
    for side, given, known in (("a", mapping, known_a), ("b", mapping.values(), known_b)):
        for name in given:
            if name not in known:
                nearest = difflib.get_close_matches(str(name), known, n=4, cutoff=0.3)
                others = nearest or list(known[:4])
                listed = ", ".join(map(repr, others)) or "none, since it has no such names"
                raise ValueError(
                    f"difference: {option}= holds {name!r}, which is not in program {side}. "
                    f"The nearest there: {listed}."
                )
    values = list(mapping.values())
    twice = [name for name in values if values.count(name) > 1]
    if twice:
        raise ValueError(
            f"difference: {option}= gives {twice[0]!r} of program b to more than one name of a; "
            "each can be compared with one."
        )


def pair_names(
    shapes_a: Mapping[str, Shape], shapes_b: Mapping[str, Shape], mapping: Mapping[str, str]
) -> list[Pair]:
    """Pairs of names, in the order of evaluation of a.

    Args:
      shapes_a, shapes_b: name -> shape, in the order of evaluation.
      mapping: name in a -> name in b.
    """
    known = _known_pairs(list(shapes_a), list(shapes_b), mapping)
    known = [(a, b) for a, b in known if a in shapes_a and b in shapes_b]
    order_a = {name: i for i, name in enumerate(shapes_a)}
    if 2 * len(known) < min(len(shapes_a), len(shapes_b)):
        known += _by_order(shapes_a, shapes_b, known)
    return sorted(known, key=lambda pair: order_a[pair[0]])


def _known_pairs(names_a: list[str], names_b: list[str], mapping: Mapping[str, str]) -> list[Pair]:
    taken = set(mapping.values())
    pairs = list(mapping.items())
    for name in names_a:
        if name not in mapping and name in names_b and name not in taken:
            pairs.append((name, name))
    return pairs


def _by_order(
    shapes_a: Mapping[str, Shape], shapes_b: Mapping[str, Shape], known: list[Pair]
) -> list[Pair]:
    """Pairs of the names between those that are known, where shapes leave no choice."""
    place_a = {name: i for i, name in enumerate(shapes_a)}
    place_b = {name: i for i, name in enumerate(shapes_b)}
    fixed = sorted((place_a[a], place_b[b]) for a, b in known)
    # Pairs that cross others give no order.
    fixed = [each for each, later in itertools.pairwise([*fixed, (math.inf, math.inf)])
             if each[1] < later[1]]  # fmt: skip
    ends = [(-1, -1), *fixed, (len(place_a), len(place_b))]
    names_a, names_b = list(shapes_a), list(shapes_b)
    used_a, used_b = {a for a, _ in known}, {b for _, b in known}
    pairs = []
    for (start_a, start_b), (end_a, end_b) in itertools.pairwise(ends):
        own_a = [name for name in names_a[start_a + 1 : end_a] if name not in used_a]
        own_b = [name for name in names_b[start_b + 1 : end_b] if name not in used_b]
        pairs += _same_counts(own_a, own_b, shapes_a, shapes_b)
    return pairs


def _same_counts(
    names_a: Sequence[str],
    names_b: Sequence[str],
    shapes_a: Mapping[str, Shape],
    shapes_b: Mapping[str, Shape],
) -> list[Pair]:
    """Pairs, in order, of the names of each shape of which both have as many."""
    groups_a = _grouped(names_a, lambda name: _long_axes(shapes_a[name]))
    groups_b = _grouped(names_b, lambda name: _long_axes(shapes_b[name]))
    pairs = []
    for shape, group in groups_a.items():
        other = groups_b.get(shape, [])
        if len(group) == len(other):
            pairs += zip(group, other, strict=True)
    return pairs


# Parameters


Leaves = Mapping[str, np.ndarray]


def pair_leaves(
    leaves: tuple[Leaves, Leaves], grads: tuple[Leaves, Leaves], mapping: Mapping[str, str]
) -> list[Pair]:
    """Pairs of key paths, in the order of a.

    Several parameters that are equal, such as biases of zeros, or have one shape are paired such
    that their gradients are nearest.

    Args:
      leaves: of a and of b, key path -> parameter.
      grads: likewise, key path -> gradient.
      mapping: key path in a -> key path in b.
    """
    pairs = dict(mapping)
    for key in (None, entries_key, _shape_key):
        taken = set(pairs.values())
        rest_a = [path for path in leaves[0] if path not in pairs]
        rest_b = [path for path in leaves[1] if path not in taken]
        if key is None:
            pairs |= {path: path for path in rest_a if path in rest_b}
        else:
            pairs |= _of_equal_groups(rest_a, rest_b, leaves, grads, key)
    return [(path, pairs[path]) for path in leaves[0] if path in pairs]


def _of_equal_groups(
    rest_a: list[str],
    rest_b: list[str],
    leaves: tuple[Leaves, Leaves],
    grads: tuple[Leaves, Leaves],
    key: Callable[[np.ndarray], Any],
) -> list[Pair]:
    """Pairs of the parameters with one key, where both programs have as many of them."""
    groups_a = _grouped(rest_a, lambda path: key(leaves[0][path]))
    groups_b = _grouped(rest_b, lambda path: key(leaves[1][path]))
    pairs: list[Pair] = []
    for each, group in groups_a.items():
        other = groups_b.get(each, [])
        if len(group) == len(other):
            pairs += _nearest(group, other, grads)
    return pairs


def _nearest(group_a: list[str], group_b: list[str], grads: tuple[Leaves, Leaves]) -> list[Pair]:
    """Pairs of nearest gradients, the nearest pair first; in order where they are as near."""
    distances = []
    for i, a in enumerate(group_a):
        for j, b in enumerate(group_b):
            distances.append((_distance(grads[0][a], grads[1][b]), abs(i - j), a, b))
    pairs: dict[str, str] = {}
    for _, _, a, b in sorted(distances, key=lambda each: each[:2]):
        if a not in pairs and b not in pairs.values():
            pairs[a] = b
    return list(pairs.items())


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    """Relative distance of the sorted entries of two arrays."""
    x, y = np.sort(np.nan_to_num(x.reshape(-1))), np.sort(np.nan_to_num(y.reshape(-1)))
    size = max(np.max(np.abs(x), initial=0.0), np.max(np.abs(y), initial=0.0))
    return float(np.max(np.abs(x / size - y / size), initial=0.0)) if size > 0 else 0.0


def _grouped(names: Sequence[str], key: Callable[[str], Any]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups


def _shape_key(x: np.ndarray) -> Shape:
    return _long_axes(x.shape)


def _long_axes(shape: Shape) -> Shape:
    """The lengths of the axes, whatever their order, without those of length 1."""
    return tuple(sorted(n for n in shape if n != 1))


def entries_key(x: np.ndarray) -> bytes:
    """A key of an array's entries, whatever their order; 0 has no sign.

    The sum of a hash of each entry's bits (the finalizer of MurmurHash3), of 64 bits.
    """
    flat = np.ascontiguousarray(x.reshape(-1) + 0.0)
    flat[np.isnan(flat)] = np.nan
    bits = flat.view(np.uint64)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        bits = (bits ^ (bits >> np.uint64(33))) * np.uint64(factor)
    bits ^= bits >> np.uint64(33)
    return x.size.to_bytes(8, "little") + np.sum(bits, dtype=np.uint64).tobytes()


# Shapes


def arrangements(shape: Shape, other: Shape) -> list[tuple[int, ...]]:
    """The orders of the axes of an array that give it another shape, the plainest first.

    A reshape is the order as it stands. Axes of length 1 stay where they are.
    """
    plain = tuple(range(len(other)))
    if math.prod(shape) != math.prod(other):
        return []
    found = [plain]
    long = [axis for axis in plain if other[axis] != 1]
    if len(long) > _MOST_AXES:
        return found
    wanted = tuple(n for n in shape if n != 1)
    for order in itertools.permutations(long):
        if tuple(other[axis] for axis in order) == wanted and order != tuple(long):
            found.append((*order, *(axis for axis in plain if axis not in long)))
    return found


def merged_arrangements(shape: Shape, other: Shape) -> list[tuple[int, ...]]:
    """As `arrangements`, with all orders where the ranks differ, as they do after a reshape."""
    found = arrangements(shape, other)
    long = [axis for axis in range(len(other)) if other[axis] != 1]
    same_rank = len([n for n in shape if n != 1]) == len(long)
    if not found or same_rank or len(long) > _MOST_AXES:
        return found
    rest = tuple(axis for axis in range(len(other)) if axis not in long)
    return found + [
        (*order, *rest) for order in itertools.permutations(long) if order != tuple(long)
    ]


def arranged(x: np.ndarray, order: tuple[int, ...], shape: Shape) -> np.ndarray:
    """An array with its axes in another order, in a given shape."""
    return x.transpose(order).reshape(shape)


__all__ = [
    "arranged",
    "arrangements",
    "check_mapping",
    "entries_key",
    "merged_arrangements",
    "pair_leaves",
    "pair_names",
]
