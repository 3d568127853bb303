"""A child that imports nothing: it repeats what it is asked, fails as it is told to, or dies."""

from __future__ import annotations

import errno
import json
import os
import sys
from typing import Any

from emutune.errors import FleetError
from emutune.fleet.server.child import answer_lines, errors_as_answers


def answer(line: str) -> dict[str, Any]:
    question = json.loads(line)
    return errors_as_answers(lambda: done(question))


def done(question: dict[str, Any]) -> dict[str, Any]:
    match question["do"]:
        case "die":
            print("never", file=sys.stderr, flush=True)
            os._exit(3)
        case "die in the middle of an answer":
            os.write(1, b'{"said": "ha')
            os._exit(3)
        case "fail":
            raise FleetError("policy: no such policy; choose another")
        case "fill":
            raise OSError(errno.ENOSPC, "No space left on device")
    return {"said": question["what"], "by": os.getpid()}


if __name__ == "__main__":
    answer_lines(answer)
