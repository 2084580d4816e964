"""Every test runs on the CPU, with strict promotion of dtypes and ranks."""

import os
import shutil
import tempfile

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


def pytest_configure(config):
    """Keep compiled programs for this run only, in one folder for all workers.

    Modules compile many small programs that others have compiled before. The command line gets a
    folder of its own, so that it neither reads nor fills the user's.
    """
    if "GRADJAX_TESTS_FOLDER" not in os.environ:
        os.environ["GRADJAX_TESTS_FOLDER"] = tempfile.mkdtemp(prefix="gradjax-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop("GRADJAX_TESTS_FOLDER")))
    folder = os.environ["GRADJAX_TESTS_FOLDER"]
    os.environ["GRADJAX_CACHE_DIR"] = f"{folder}/command_line"
    jax.config.update("jax_compilation_cache_dir", f"{folder}/programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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
