"""Processes that write to a ledger and come to grief; run by the tests, LEDGER and what to do as arguments.

Acknowledges on standard output, a line a call, what has returned.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from ledgers import add_devices, decision, digest, run_step

from emutune.errors import LedgerError
from emutune.fleet import database, pruning
from emutune.fleet.ledger import Ledger

DEVICES = ("ue1", "ue2", "ue3")


def acknowledge(*words: object) -> None:
    """Say that something has returned."""
    print(*words, flush=True)


def write(path: Path) -> None:
    """Go on with steps until somebody ends this process."""
    acknowledge("ready")
    with Ledger(path) as ledger:
        add_devices(ledger, *DEVICES)
        while True:
            step = ledger.last_step() + 1
            ledger.begin_step(step, [decision(step, device) for device in DEVICES])
            acknowledge("begun", step)
            for device in DEVICES:
                lease = f"{step}-{device}"
                ledger.transferred(lease, 1.0, 1000)
                acknowledge("transferred", lease)
                ledger.adapter(lease, digest(lease), 64)
                ledger.evaluation(lease, 25.0, 21.0, True)
                acknowledge("in_service", device, digest(lease))


def fill_disk(path: Path) -> None:
    """Write until no file may grow any more, then go on where there is room again."""
    limit = path.stat().st_size + (1 << 18)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with Ledger(path) as ledger:
        try:
            for step in range(1, 10_000):
                run_step(ledger, step, *DEVICES)
                acknowledge("step", step)
        except LedgerError as error:
            acknowledge("error", error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run_step(ledger, step, *DEVICES)
        acknowledge("step", step)


def die_at_each_statement(path: Path, what: Callable[[Path], None]) -> None:
    """Do something to copies of a ledger, in processes that SIGKILL ends before their 1st, 2nd, ... statement.

    The last of them comes to the end. What they leave behind are the files 1, 2, ... beside the ledger.
    """
    for number in range(1, 1000):
        copy = path.with_name(str(number))
        if path.exists():
            shutil.copy(path, copy)
        child = os.fork()
        if child == 0:
            count_down(number)
            what(copy)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            acknowledge(number)
            return


def count_down(left: int) -> None:
    """Die before the statement of that number, of the connections opened from now on."""
    plain = database.connect

    def connect(path: str) -> object:
        connection = plain(path)

        def trace(_: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        connection.set_trace_callback(trace)
        return connection

    database.connect = connect


def begin_and_evaluate(path: Path) -> None:
    """One step, and an adapter in service."""
    ledger = Ledger(path)
    ledger.begin_step(1, [decision(1, device) for device in DEVICES])
    ledger.adapter("1-ue1", digest("1-ue1"), 64)
    ledger.evaluation("1-ue1", 25.0, 21.0, True)


def prune(path: Path) -> None:
    """Forget all but the last step."""
    with pruning.Prunable(path) as ledger:
        ledger.prune(ledger.old(keep=1))
    pruning.give_space_back(path)


if __name__ == "__main__":
    where = Path(sys.argv[2])
    match sys.argv[1]:
        case "write":
            write(where)
        case "fill":
            fill_disk(where)
        case "die":
            die_at_each_statement(where, begin_and_evaluate)
        case "prune":
            die_at_each_statement(where, prune)
        case "open":
            die_at_each_statement(where, lambda path: Ledger(path).close())
