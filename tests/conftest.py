"""What every test runs under: eight CPU devices, strict ranks and dtypes, warnings as errors."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bestiary.data.cores import usable_cores

# Must be in the environment before JAX is first imported, and must also reach the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
# Most of a test's time is XLA's. What it compiles for CPUs without its slow passes answers the same questions, in two
# thirds of the time; `optimised` is for tests of exact numbers.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Workers and the processes that tests start share the programs they compile, the smallest too.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# The tests start dozens of processes, each of which would otherwise compile some 1,500 modules, 4 s, again.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core that this process may use; none for one core, and for tests that are named one by one."""
    named = all("::" in argument for argument in config.args)
    return 0 if named or usable_cores() == 1 else usable_cores()


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder of compiled programs, for as long as the tests run; one that is already named is kept."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers inherit it
        folder = tempfile.TemporaryDirectory(prefix="bestiary-compiled-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The project's root folder."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference fixtures beside the checkout; tests skip where it is absent."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name}/ beside the checkout (real data and reference fixtures)")
    return folder


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """Compile as for users, here and in the processes that tests start: for exact numbers and compilers' reports."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()
        yield
        jax.config.update("jax_disable_most_optimizations", before)
        jax.clear_caches()
