"""What commands that use the model libraries or the network ask for first; nothing heavy is imported here."""

from __future__ import annotations

import os

from emutune.extras import Extra, expect_extra


def expect_libraries(extra: Extra, command: str) -> None:
    """See that an extra is there, and keep the model libraries from looking for a hub and writing between our lines.

    That holds for processes that this one starts, too.

    Raises:
        UsageError: the extra is not installed.
    """
    expect_extra(extra, command)
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }.items():
        os.environ.setdefault(name, value)


def quiet_libraries(extra: Extra, command: str) -> None:
    """The same for a command that itself needs the model libraries, which are imported.

    Raises:
        UsageError: the extra is not installed.
    """
    expect_libraries(extra, command)
    from transformers.utils import logging

    logging.disable_progress_bar()
