"""The optional parts of emutune, and what is said where one of them is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from emutune.errors import EmutuneError, UsageError

Extra = Literal["tuning", "fleet", "ray"]

_TUNING = ("accelerate", "peft", "psutil", "tokenizers", "torch", "transformers")
_FLEET = (*_TUNING, "cryptography", "fastapi", "filelock", "httptools", "httpx2", "uvicorn")
# What each extra of pyproject.toml brings, by the names under which it is imported.
MODULES: dict[Extra, tuple[str, ...]] = {"tuning": _TUNING, "fleet": _FLEET, "ray": (*_FLEET, "ray")}


def expect_extra(extra: Extra, what: str, error: type[EmutuneError] = UsageError) -> None:
    """Refuse what needs an extra that is not installed, or only in part; nothing is imported.

    Args:
        extra: which.
        what: needs it, as the user calls it.
        error: what is raised if it is not there.
    """
    missing = [name for name in MODULES[extra] if not _is_there(name)]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise error(f"{what}: needs {missing[0]}{more}, not installed; pip install 'emutune[{extra}]'")


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:  # of a finder that forbids it
        return False
