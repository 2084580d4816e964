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
        pairs += _same_counts(own_a, own_b, lambda n: shapes_a[n], lambda n: shapes_b[n])
    return pairs


def _same_counts(
    names_a: Sequence[str],
    names_b: Sequence[str],
    shape_a: Callable[[str], Shape],
    shape_b: Callable[[str], Shape],
) -> list[Pair]:
    """Pairs, in order, of the names of each shape of which both have as many."""
    groups_a, groups_b = _groups(names_a, shape_a), _groups(names_b, shape_b)
    pairs = []
    for shape, group in groups_a.items():
        other = groups_b.get(shape, [])
        if len(group) == len(other):
            pairs += zip(group, other, strict=True)
    return pairs


def _groups(names: Sequence[str], shape_of: Callable[[str], Shape]) -> dict[Shape, list[str]]:
    groups: dict[Shape, list[str]] = {}
    for name in names:
        shape = tuple(sorted(n for n in shape_of(name) if n != 1))
        groups.setdefault(shape, []).append(name)
    return groups


# Parameters


def pair_leaves(
    leaves_a: Mapping[str, np.ndarray],
    leaves_b: Mapping[str, np.ndarray],
    mapping: Mapping[str, str],
) -> list[Pair]:
    """Pairs of key paths, in the order of a.

    Args:
      leaves_a, leaves_b: key path -> parameter.
      mapping: key path in a -> key path in b.
    """
    pairs = dict(mapping)
    rest_a = [path for path in leaves_a if path not in pairs]
    rest_b = [path for path in leaves_b if path not in set(pairs.values())]
    for path in list(rest_a):
        if path in rest_b:
            _take(pairs, rest_a, rest_b, (path, path))
    for pair in _by_value(rest_a, rest_b, leaves_a, leaves_b):
        _take(pairs, rest_a, rest_b, pair)
    pairs |= _same_counts(
        rest_a, rest_b, lambda path: leaves_a[path].shape, lambda path: leaves_b[path].shape
    )
    return [(path, pairs[path]) for path in leaves_a if path in pairs]


def _take(pairs: dict[str, str], rest_a: list[str], rest_b: list[str], pair: Pair) -> None:
    pairs[pair[0]] = pair[1]
    rest_a.remove(pair[0])
    rest_b.remove(pair[1])


def _by_value(
    rest_a: list[str],
    rest_b: list[str],
    leaves_a: Mapping[str, np.ndarray],
    leaves_b: Mapping[str, np.ndarray],
) -> list[Pair]:
    """Pairs of parameters with the same entries, where only one pair has them."""
    groups_a = _equal_entries(rest_a, leaves_a)
    groups_b = _equal_entries(rest_b, leaves_b)
    pairs = []
    for key, group in groups_a.items():
        other = groups_b.get(key, [])
        if len(group) == len(other):
            pairs += zip(group, other, strict=True)
    return pairs


def _equal_entries(paths: list[str], leaves: Mapping[str, np.ndarray]) -> dict[bytes, list[str]]:
    groups: dict[bytes, list[str]] = {}
    for path in paths:
        groups.setdefault(entries_key(leaves[path]), []).append(path)
    return groups


def entries_key(x: np.ndarray) -> bytes:
    """A key of an array's entries, whatever their order; 0 has no sign."""
    return np.sort(x.reshape(-1) + 0.0).tobytes()


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
    return found + [(*order, *rest) for order in itertools.permutations(long) if order != tuple(long)]


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
