"""Shape checks on every array, hypothesis profiles, and the fixtures that all tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from beartype import beartype
from hypothesis import settings
from jaxtyping import install_import_hook


def check_calls(function: Callable) -> Callable:
    """Check arguments and results of every function, but not the fields of dataclasses.

    JAX rebuilds its pytrees with placeholders, stacked arrays and bare shapes in place of arrays, so the
    constructor of a dataclass that is a pytree must take anything.
    """
    return function if function.__name__ == "__init__" else beartype(function)


# The hook takes the checker by name, and a conftest has no name that can be imported for certain.
sys.modules["shape_checks"] = ModuleType("shape_checks")
sys.modules["shape_checks"].check_calls = check_calls

# One of several test processes has one core to itself.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Most of what tests wait for is compiling: programs are kept, for other processes and for the next time.
KEPT = Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(KEPT))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# A shell lets what it starts in the background ignore Ctrl-C, and so would every process that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# This must come before the first import of any of these packages; one that nobody imports costs nothing.
install_import_hook(
    ("emutune.step", "emutune.world", "emutune.policies", "emutune.learning"), "shape_checks.check_calls"
)

from emutune.scenario import Scenario, load_scenario  # noqa: E402  (after the hook)

# The first example of a test compiles a program, so no example has a deadline.
settings.register_profile("local", deadline=None)
# What fails in CI must fail again on the machine of whoever looks into it.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


# Where tests compile much and compute little.
HASTY = {"bounds", "learning", "policies", "step", "study", "world"}
_IN_HASTE = pytest.StashKey[bool]()


@pytest.fixture(scope="module", autouse=True)
def _compile_in_haste(request: pytest.FixtureRequest) -> None:
    """Programs that are compiled in haste serve most tests as well."""
    room, stash = request.path.relative_to(Path(__file__).parent).parts[0], request.session.stash
    hasty = room in HASTY
    if hasty == stash.get(_IN_HASTE, False):
        return
    import jax

    # What was compiled in another way rounds in another way.
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", hasty)
    stash[_IN_HASTE] = hasty


@pytest.fixture(scope="session")
def paper() -> Scenario:
    """The shipped world of the paper."""
    return load_scenario("paper")
