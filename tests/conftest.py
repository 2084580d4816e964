"""Every test runs on the CPU, with strict promotion of dtypes and ranks."""

import os

# Before jax is imported: both are read once, at its start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

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
    """Without LLVM's expensive passes, unless the module is marked `optimized`: its time goes into
    running programs, or it is about the code that XLA makes.
    """
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """What a module has compiled is of no use to the next one, and of all modules together it is
    gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    """A typed PRNG key, the same for every test."""
    return jax.random.key(0)


@pytest.fixture
def report(record_property):
    """`report(name, error)`: the figure stands in the summary at the end of the run, through xdist
    too."""
    # a plain float: xdist cannot send NumPy's numbers, and dies of them
    return lambda name, error: record_property(f"error: {name}", float(error))


def pytest_terminal_summary(terminalreporter):
    """The errors that the tests measured: the largest of each kind, which is its name up to a
    colon."""
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
