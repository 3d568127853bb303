"""Shape checks on every array, hypothesis profiles, and the fixtures that all tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
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

# Tests spend most of their time on compiling; programs that are compiled in haste serve them as well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# This must come before the first import of any of these packages; one that nobody imports costs nothing.
install_import_hook(("emutune.world", "emutune.policies", "emutune.learning"), "shape_checks.check_calls")

from emutune.scenario import Scenario, load_scenario  # noqa: E402  (after the hook)

# The first example of a test compiles a program, so no example has a deadline.
settings.register_profile("local", deadline=None)
# What fails in CI must fail again on the machine of whoever looks into it.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def paper() -> Scenario:
    """The shipped world of the paper."""
    return load_scenario("paper")
