"""`gradjax.difference` on planted pairs of programs, and on pairs that agree: what is judged."""

from gradjax import difference
from pathologies.difference_cases import Pair, marked_lines


def compare(pair: Pair):
    """What `difference` finds for a pair."""
    loss_a, params_a, loss_b, params_b, args, *rest = pair.make()
    options = rest[0] if rest else {}
    return difference(loss_a, params_a, loss_b, params_b, *args, **options)


def misses(pair: Pair, found) -> list[str]:
    """What is wrong with the answer, in words; nothing if it is right."""
    if not pair.kind:
        return ["a difference"] if found else []
    first = found.first
    if first is None:
        return ["no difference"]
    wrong = []
    # A dtype between two casts shows as a value, and may be called either.
    if first.kind not in (pair.kind, "dtype"):
        wrong.append(f"kind {first.kind!r}, not {pair.kind!r}")
    if pair.value and pair.value != first.name_a.split("[")[0] and pair.value != first.name_a:
        wrong.append(f"value {first.name_a!r}, not {pair.value!r}")
    for side, place in marked_lines(pair).items():
        line = getattr(first, f"line_{side}")
        if line is None or (line.file, line.line) != tuple(place):
            wrong.append(f"line of {side} {line}, not {place[1]}")
    return wrong
