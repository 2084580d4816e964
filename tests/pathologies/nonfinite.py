"""The search for inf and NaN on planted programs, and on programs whose inf or NaN is harmless.

    python tests/pathologies/nonfinite.py [--only NAME ...]

prints both tables, each miss with its text. The tests run the same cases.
"""

import argparse
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
from pathologies.nonfinite_case import Broken, Harmless, marked_line
from pathologies.nonfinite_cases import BROKEN, HARMLESS


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="names of cases")
    only = parser.parse_args().only
    broken = [case for case in BROKEN if not only or case.name in only]
    harmless = [case for case in HARMLESS if not only or case.name in only]
    right = wrong_lines = flagged = 0
    started = time.perf_counter()
    for case in broken:
        if case.device_count > jax.device_count():
            print(f"{case.name}: needs {case.device_count} devices")
            continue
        try:
            found = search(case)
            wrong = misses(case, found)
        except Exception as error:
            found, wrong = None, [f"{type(error).__name__}: {error}"]
        right += not wrong
        wrong_lines += found is not None and is_wrong_line(case, found)
        if wrong or only:
            print(f"\n{case.name}: {'; '.join(wrong) or 'right'}\n{found}")
    for case in harmless:
        try:
            found = search(case)
            failed = bool(found)
        except Exception as error:
            found, failed = f"{type(error).__name__}: {error}", True
        flagged += failed
        if failed or only:
            print(f"\n{case.name} (harmless): {'reported' if failed else 'right'}\n{found}")
    print(f"\n{time.perf_counter() - started:.0f} s")
    print("| | right | of | goal |\n| --- | --- | --- | --- |")
    print(f"| planted: operation, line and reason | {right} | {len(broken)} | 57 of 60 |")
    print(f"| planted: a wrong line | {wrong_lines} | {len(broken)} | 0 |")
    print(f"| harmless: reported | {flagged} | {len(harmless)} | 0 |")
    sys.exit(right < 0.95 * len(broken) or wrong_lines > 0 or flagged > 0)


if __name__ == "__main__":
    main()
