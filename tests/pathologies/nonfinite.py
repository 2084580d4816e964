"""The search for inf and NaN on planted programs and on harmless ones, and the comparison of two
programs on planted differences and on pairs that agree.

    python tests/pathologies/nonfinite.py [--only NAME ...]

prints the table, each miss with its text. The tests run the same cases.
"""

import argparse
import functools
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax

from gradjax import find_nonfinite
from gradjax.replay import Search
from pathologies import differences
from pathologies.difference_cases import EQUAL, PLANTED
from pathologies.nonfinite_case import Broken, Harmless, marked_line
from pathologies.nonfinite_cases import BROKEN, HARMLESS

PAIRS = (*PLANTED, *EQUAL)


def search(case: Broken | Harmless) -> Search:
    """The search on a case."""
    # Optax's own rules mix dtypes.
    with jax.numpy_dtype_promotion("standard"):
        loss_fn, params, args, *rest = case.make()
    options = dict(zip(("tx", "opt_state"), rest, strict=False))
    return find_nonfinite(loss_fn, params, *args, **options)


def misses(case: Broken, found: Search) -> list[str]:
    """What is wrong with the answer, in words; nothing if it is right."""
    culprit = found.culprit
    if culprit is None:
        return ["nothing found"]
    checks = [("phase", culprit.phase, case.phase), ("reason", culprit.reason, case.reason)]
    wrong = [f"{what} {got!r}, not {wanted!r}" for what, got, wanted in checks if got != wanted]
    if case.primitives and culprit.forward not in case.primitives:
        wrong.append(f"operation {culprit.forward!r}, not one of {sorted(case.primitives)}")
    wanted, line = marked_line(case), culprit.line
    if wanted is not None and (line is None or (line.file, line.line) != wanted):
        wrong.append(f"line {line}, not {wanted[1]}")
    if case.iteration is not None and case.iteration not in [i for _, i in culprit.iterations]:
        wrong.append(f"iteration {culprit.iterations}, not {case.iteration}")
    if case.module not in culprit.module:
        wrong.append(f"module {culprit.module!r}, not {case.module!r}")
    if case.leaf not in culprit.name:
        wrong.append(f"leaf {culprit.name!r}, not {case.leaf!r}")
    return wrong


def is_wrong_line(case: Broken, found: Search) -> bool:
    """Whether a line is named, and another one than that of the operation."""
    wanted = marked_line(case)
    line = found.culprit.line if found.culprit else None
    return wanted is not None and line is not None and (line.file, line.line) != wanted


def judged(cases, run, judge, only) -> tuple[int, int]:
    """(right, number) of some cases; prints each miss, and everything with `only`."""
    right = 0
    chosen = [case for case in cases if not only or case.name in only]
    for case in chosen:
        try:
            found = run(case)
            wrong = judge(case, found)
        except Exception as error:
            found, wrong = None, [f"{type(error).__name__}: {error}"]
        right += not wrong
        if wrong or only:
            print(f"\n{case.name}: {'; '.join(wrong) or 'right'}\n{found}", flush=True)
    return right, len(chosen)


def reported(_: Harmless, found: Search) -> list[str]:
    """What is wrong with an answer about a harmless program."""
    return ["reported"] if found else []


def wrong_line(case: Broken, found: Search) -> list[str]:
    """What is wrong with the line, if there is one."""
    return ["another line"] if is_wrong_line(case, found) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="names of cases")
    only = parser.parse_args().only
    started = time.perf_counter()
    again = functools.cache(search)

    planted = [pair for pair in PAIRS if pair.kind]
    equal = [pair for pair in PAIRS if not pair.kind]
    table = [
        ("planted programs: operation, line and reason", judged(BROKEN, again, misses, only), 0.95),
        ("planted programs: no wrong line", judged(BROKEN, again, wrong_line, only), 1.0),
        ("harmless programs: not reported", judged(HARMLESS, search, reported, only), 1.0),
        (
            "planted differences: first value and lines",
            judged(planted, differences.compare, differences.misses, only),
            0.95,
        ),
        (
            "equal pairs: no difference",
            judged(equal, differences.compare, differences.misses, only),
            1.0,
        ),
    ]
    print(f"\n{time.perf_counter() - started:.0f} s")
    print("| | right | of | goal |\n| --- | --- | --- | --- |")
    for what, (right, number), goal in table:
        print(f"| {what} | {right} | {number} | {goal:.0%} |")
    sys.exit(any(right < goal * number for _, (right, number), goal in table))


if __name__ == "__main__":
    main()
