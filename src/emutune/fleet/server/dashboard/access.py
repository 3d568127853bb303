"""Who may watch: one key for the page, made at the first start and kept beside the ledger."""

from __future__ import annotations

import re
from pathlib import Path

from emutune.errors import FleetError
from emutune.fleet.security import new_secret, warn_of_readers, write_secret

KEY_FILE = "dashboard.key"
PAGE = "/dashboard"
_KEY = re.compile("[0-9a-f]{64}")
_KEY_BYTES = 200


def dashboard_key(directory: Path) -> str:
    """The key of the dashboard, 64 hexadecimal digits; made, for its owner's eyes alone, if there is none.

    Args:
        directory: the server's.

    Raises:
        FleetError: its file is damaged, or cannot be read or written.
    """
    path = directory / KEY_FILE
    try:
        with path.open("rb") as file:
            content = file.read(_KEY_BYTES)
        warn_of_readers(path)
    except FileNotFoundError:
        key = new_secret()
        write_secret(path, f"{key}\n")
        return key
    except OSError as error:
        raise FleetError(f"{path}: cannot be read ({error.strerror}); allow yourself to read it") from error
    key = content.decode("ascii", errors="replace").strip()
    if not _KEY.fullmatch(key):
        raise FleetError(f"{path}: is no key; remove it, and the next start makes another")
    return key


def dashboard_url(url: str, key: str | None = None) -> str:
    """Where the page is.

    Args:
        url: of the server.
        key: opens the page without being asked for; it stands in the fragment, which no browser sends.
    """
    return f"{url}{PAGE}" if key is None else f"{url}{PAGE}#key={key}"
