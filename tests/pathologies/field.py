"""The field: code as others write it, each with its right answer, diagnosed and judged.

    python tests/pathologies/field.py [--kind N ...] [--only NAME ...]

prints for each case right or wrong with what came out, then a table of the kinds. The kinds are
those of `../shared/field.md`.
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax

import gradjax
from pathologies.field_case import FieldCase, MonitorCase, come_out
from pathologies.field_cases import CASES, MONITOR_CASES


def answer(case: FieldCase | MonitorCase) -> tuple[str, str]:
    """(what is wrong, what came out); nothing is wrong if the answer is right."""
    if isinstance(case, MonitorCase):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return case.right(case.run()), ""
    # Optax's own rules mix dtypes.
    with jax.numpy_dtype_promotion("standard"):
        loss_fn, params, args, options = case.make()
    with case.context():
        diagnosis = gradjax.diagnose(loss_fn, params, *args, **options)
    return case.right(diagnosis), come_out(diagnosis)


def judge(case: FieldCase | MonitorCase) -> bool:
    """Whether the answer is right; prints one line about it."""
    started = time.perf_counter()
    try:
        wrong, out = answer(case)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        wrong, out = f"{type(error).__name__}: {text}", ""
    seconds = time.perf_counter() - started
    verdict = f"wrong: {wrong}" if wrong else f"right: {out}"
    print(f"{case.kind:2} {case.name} ({seconds:.1f} s) {verdict}", flush=True)
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", nargs="+", type=int, help="numbers of kinds")
    parser.add_argument("--only", nargs="+", help="names of cases")
    chosen = parser.parse_args()
    cases = sorted([*CASES, *MONITOR_CASES], key=lambda case: case.kind)
    if chosen.kind:
        cases = [case for case in cases if case.kind in chosen.kind]
    if chosen.only:
        cases = [case for case in cases if case.name in chosen.only]
    started = time.perf_counter()
    results = [(case.kind, judge(case)) for case in cases]
    print(f"\n{time.perf_counter() - started:.0f} s\n| kind | right | of |\n| --- | --- | --- |")
    for kind in sorted({kind for kind, _ in results}):
        right = [good for each, good in results if each == kind]
        print(f"| {kind} | {sum(right)} | {len(right)} |")
    total = sum(good for _, good in results)
    print(f"| all | {total} | {len(results)} |")
    sys.exit(total < len(results))


if __name__ == "__main__":
    main()
