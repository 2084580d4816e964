"""Every test runs on the CPU, with strict promotion of dtypes and ranks."""

import os
import tempfile

# Before jax is imported: both are read once, at its start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# The command line's compilation cache is not the user's here, nor one of an earlier run.
os.environ["GRADJAX_CACHE_DIR"] = tempfile.mkdtemp(prefix="gradjax-tests-")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes a first example slow, so no deadline; `ci` draws the same examples every time.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(request):
    """Compile without LLVM's expensive passes, except for modules marked `optimized`.

    Those spend their time running programs, or are about the code that XLA makes.
    """
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drop what a module has compiled: the next one does not need it, and it adds up."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    """A typed PRNG key, the same for every test."""
    return jax.random.key(0)


@pytest.fixture
def report(record_property):
    """`report(name, error)` puts the figure into the summary at the end of the run."""
    # A plain float, because xdist cannot send NumPy's numbers and ends with an error.
    return lambda name, error: record_property(f"error: {name}", float(error))


def pytest_terminal_summary(terminalreporter):
    """Print the largest error measured of each kind, which is the name up to a colon."""
    largest = {}
    for test in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in test.user_properties if test.when == "call" else ():
            if name.startswith("error: "):
                kind = name.removeprefix("error: ").split(":")[0]
                largest[kind] = max(value, largest.get(kind, 0.0))
    if largest:
        terminalreporter.section("largest errors")
    for kind, value in sorted(largest.items()):
        terminalreporter.write_line(f"{value:10.1e}  {kind}")
