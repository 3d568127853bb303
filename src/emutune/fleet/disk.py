"""Disks that are full: how to tell, whichever library met it first."""

from __future__ import annotations

import errno
import os
import sqlite3

# Between two looks whether a full disk has room again.
LOOK_AGAIN_S = 5.0
_CODES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SQLITE = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")
# The writer of safetensors gives the number in its text alone, that of arrays only how much was written.
_SAFETENSORS = tuple(f"(os error {code})" for code in _CODES)
_ARRAYS = "requested and"


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that a disk has no room."""
    while error is not None:
        if isinstance(error, OSError) and (error.errno in _CODES or _ARRAYS in str(error)):
            return True
        if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorname", "").startswith(_SQLITE):
            return True
        if str(error).endswith(_SAFETENSORS):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_room() -> OSError:
    """What a full disk raises."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
