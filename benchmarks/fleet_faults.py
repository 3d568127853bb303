"""A small fleet whose runs are disturbed: what is lost, counted twice, or otherwise differs from an undisturbed run.

    python benchmarks/fleet_faults.py --repeats 5 --json faults.json

Two devices and a server do two steps, half of the runs with training on the devices (the rule ``fixed``), half with
training at the server (``all_server``). Faults come at random moments; each repeat has a seed of its own.

With processes of their own over TLS, ``repeats`` runs of each: ``kill_server``, ``kill_device``, ``kill_worker`` and
``kill_decider`` (kill -9, once or twice, of the server, of a device, of a process that trains or judges, of the one
that decides, which is stopped for a while before; what was killed starts again with the same command), ``decay`` (kill
-9 of a device, of whose cache a shard is damaged before it starts again; always ``fixed``), ``cut`` and ``alter``
(connections that end, or in which a bit flips, at random bytes), ``fill`` (the disk of all of them, a real one of 6 MB,
is full for a while; root only). Their processes are forked from one that has imported what is slow to import.

Within one process, which for these makes no difference, ``repeats`` runs of each: ``duplicate`` (requests that arrive
again, most of them late, and answers that get lost), ``reorder`` (requests that overtake each other), ``damage``
(shards and data that arrive altered or cut short), ``jump_clock`` (wall clocks that are set by up to fifty years, a
machine that is started anew), ``fill_device`` and ``fill_server`` (the same of one of them).

A lease is lost if it is not there, not closed as without the fault, or without its adapter; so are data of a task that
stay at the server. Leases, tasks and bytes that are there more often are duplicated. A ledger differs if any of its
counters does. A run that does not end, or that fails in any other way, counts as lost. ``injected`` says in how many
runs the fault came before the end; there are more runs, at most twice as many, until that is so in ``repeats`` of them.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

POLICIES = ("fixed", "all_server")
PROCESSES = ("kill_server", "kill_device", "kill_worker", "kill_decider", "decay", "cut", "alter", "fill")
MEMORY = ("duplicate", "reorder", "damage", "jump_clock", "fill_device", "fill_server")
COUNTS = ("runs", "lost", "duplicated", "differing_ledgers")


def measure(work, repeats=50, faults=(*PROCESSES, *MEMORY), first_seed=0, say=print):
    """Run every fault so often, below a folder; a run that came to what it should leaves nothing there."""
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests / "fleet"), str(tests / "tuning")]
    from warm_start import WarmStart
    from whole_fleet import catalogue_at

    work.mkdir(parents=True, exist_ok=True)
    model = work / "model"
    model.mkdir(exist_ok=True)
    catalogue = catalogue_at(model)
    warm = WarmStart(work / "jax")
    try:
        runs = Runs(work, catalogue, warm)
        by_fault = {}
        for fault in faults:
            if fault.startswith("fill") and not can_mount(work):
                say(f"{fault}: left out, small disks cannot be mounted here")
                continue
            by_fault[fault] = runs.repeat(fault, range(first_seed, first_seed + repeats), say)
            say(f"{fault}: {by_fault[fault]}")
    finally:
        warm.close()
    totals = {name: sum(row[name] for row in by_fault.values()) for name in COUNTS}
    return {"faults": {**totals, "by_fault": by_fault}}


class Runs:
    """Runs beside those without a fault, which both kinds of fleet must agree on."""

    def __init__(self, work, catalogue, warm):
        from faulty_fleet import ProcessFleet, judge
        from faulty_memory import MemoryFleet

        self.work, self.catalogue, self.warm = work, catalogue, warm
        self.expected, self.process_s, self.memory_s = {}, {}, {}
        for policy in POLICIES:
            fleet = ProcessFleet(self._folder("whole"), catalogue, policy, warm=warm)
            self.expected[policy] = fleet.run()
            self.process_s[policy] = fleet.span_s
            for _ in range(2):  # The first compiles.
                begun = time.monotonic()
                found = MemoryFleet(self._folder("whole"), catalogue, policy).run()
                self.memory_s[policy] = time.monotonic() - begun
            verdict = judge(self.expected[policy], found)
            assert verdict.good, verdict.reasons

    def repeat(self, fault, seeds, say):
        from faulty_fleet import judge

        row = dict.fromkeys((*COUNTS, "injected"), 0)
        for seed in range(seeds.start, seeds.stop + len(seeds)):
            if row["injected"] == len(seeds):
                break
            policy = "fixed" if fault == "decay" else POLICIES[seed % 2]
            folder = self._folder(f"{fault}-{seed}")
            row["runs"] += 1
            try:
                found, did = (self._process if fault in PROCESSES else self._memory)(
                    fault, seed, policy, folder
                )
            except Exception:
                row["lost"] += 1
                row["differing_ledgers"] += 1
                say(f"{fault} {seed} {policy}: {traceback.format_exc()}")
                continue
            verdict = judge(self.expected[policy], found)
            row["lost"] += verdict.lost
            row["duplicated"] += verdict.duplicated
            row["differing_ledgers"] += verdict.differing
            row["injected"] += did
            if not did and fault in PROCESSES:
                # The run that the moments are drawn from was a slow one.
                self.process_s[policy] *= 0.8
            if verdict.good:
                shutil.rmtree(folder)
            else:
                say(f"{fault} {seed} {policy}: {verdict.reasons}")
        return row

    def _process(self, fault, seed, policy, folder):
        """One run as processes; what it came to, and whether something was done to it."""
        from faulty_fleet import Injector, ProcessFleet, Wire
        from small_disks import small_disk

        if fault in ("cut", "alter"):
            fleet = ProcessFleet(
                folder,
                self.catalogue,
                policy,
                lambda port: Wire(port, seed, alter=fault == "alter"),
                self.warm,
            )
            found = fleet.run()
            return found, fleet.wire.hits > 0
        injector = Injector(seed, self.process_s[policy])
        fleet = ProcessFleet(folder, self.catalogue, policy, warm=self.warm)
        with small_disk(fleet.directory) if fault == "fill" else nullcontext():
            found = fleet.run(getattr(injector, fault))
        return found, bool(injector.did)

    def _memory(self, fault, seed, policy, folder):
        from faulty_memory import MemoryFleet, MemoryInjector

        injector = MemoryInjector(seed, self.memory_s[policy])
        fleet = MemoryFleet(folder, self.catalogue, policy)
        found = getattr(injector, fault)(fleet)
        return found, bool(injector.did) and not injector.did[-1].startswith("0 ")

    def _folder(self, name):
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def can_mount(work):
    from small_disks import small_disk

    try:
        with small_disk(work / "probe"):
            return True
    except PermissionError:
        return False


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=(*PROCESSES, *MEMORY), default=(*PROCESSES, *MEMORY))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(
            arguments.work or Path(temporary),
            arguments.repeats,
            arguments.faults,
            arguments.first_seed,
            lambda text: print(text, flush=True),
        )
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
