"""What the benchmarks share: ratios of interleaved rounds, the machine, a section of RESULTS.md."""

import os
import platform
import statistics
from pathlib import Path

import jax

RESULTS = Path(__file__).with_name("RESULTS.md")


def ratio(times, base):
    """Median and quartiles of the ratios within each round; None without a base."""
    if base is None:
        return None
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times, base, strict=True)], n=4)
    return {"median": middle, "low": low, "high": high}


def text(r):
    return f"{r['median']:.3f} [{r['low']:.2f}, {r['high']:.2f}]" if r else ""


def machine(**more):
    """What stands with the figures; the load counts, since other work on the machine does."""
    about = {"cpu": cpu_name(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    return about | more | {"jax": jax.__version__}


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def in_words(about):
    return ", ".join(str(v) if k == "cpu" else f"{k} {v}" for k, v in about.items())


def write(section, lines):
    """Put lines of markdown between a section's markers in RESULTS.md, where other benchmarks have
    theirs.
    """
    begin, end = f"<!-- {section} -->\n", f"<!-- /{section} -->\n"
    before, _, rest = RESULTS.read_text().partition(begin)
    after = rest.partition(end)[2]
    RESULTS.write_text(
        before.rstrip("\n") + "\n\n" + begin + "\n".join(lines).rstrip("\n") + "\n" + end + after
    )
