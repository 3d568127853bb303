"""The key that a device draws once and keeps."""

from __future__ import annotations

import re
from pathlib import Path

from emutune.errors import FleetError
from emutune.fleet.security import new_secret, write_secret

_KEY = re.compile("[0-9a-f]{64}")


def device_key(path: Path) -> str:
    """The device's key, drawn when it is first asked for; on disk before anybody learns of it.

    Returns:
        64 hexadecimal digits.

    Raises:
        FleetError: the file cannot be read or written, or is damaged.
    """
    if not path.exists():
        write_secret(path, new_secret())
    try:
        key = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FleetError(f"{path}: the device's key cannot be read; join with new credentials") from error
    if not _KEY.fullmatch(key):
        raise FleetError(
            f"{path}: the device's key is damaged; delete it, and join with new credentials from emutune enroll"
        )
    return key
