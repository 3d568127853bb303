"""A child that imports nothing: it repeats what it is asked, fails as it is told to, or dies."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from typing import Any

from emutune.errors import FleetError
from emutune.fleet.server.child import answer_lines, errors_as_answers


def answer(line: str) -> dict[str, Any]:
    question = json.loads(line)
    return errors_as_answers(lambda: done(question))


def done(question: dict[str, Any]) -> dict[str, Any]:
    # A job of the server's pools says it in place of a catalogue.
    match question.get("do") or question["catalogue"]:
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
        case "print":
            print("Downloading ...")
        case "hang":
            time.sleep(60)
        case "recurse":
            done(question)
        case "leave":
            sys.exit("no more")
        case "assert":
            raise AssertionError("never so")
        case "look up":
            return {}["weight"]
        case "allocate":
            bytearray(1 << 60)
        case "answer otherwise":
            return "no object"  # type: ignore[return-value]
    return {"said": question.get("what"), "by": os.getpid()}


if __name__ == "__main__":
    answer_lines(answer)
