"""A fleet on links that are not shaped by it: how far its predictions of transfers are from what is measured.

python benchmarks/fleet_worlds.py [LINK ...] --json fleet_worlds.json

Each link is a network namespace of its own, joined by a veth pair whose ends carry token buckets (``tc tbf``), one for
each direction; it wants root, and says why it skips where it may not make them. A device behind each reports, fetches
emulators of noise and sends text, as a policy that draws at random says; nothing is trained. Errors are those of all
transfers of a direction but its first, of which nothing can be known, beside those of its last rate.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fleet import ENDS, LAYERS, Hashed, client_of, enrolled, random_catalogue

# Mbit/s down and up; None is not limited, and a range is drawn from anew every two seconds.
LINKS = {
    "20/5": (20.0, 5.0),
    "5/1": (5.0, 1.0),
    "2/0.5": (2.0, 0.5),
    "3/3": (3.0, 3.0),
    "changing": ((1.0, 20.0), (1.0, 20.0)),
    "unlimited": (None, None),
}
CHANGES_S, STEPS, WITHIN_PERCENT, SHARD_BYTES = 2.0, 60, 20.0, 100_000
# Of less nothing is trained: there must be 96 blocks to validate and to test on.
TEXT_BYTES = (50_000, 1_000_000)
FLEET = """
name = "benchmark"
[server]
host = "0.0.0.0"
port = {port}
names = ["{address}"]
[steps]
count = {steps}
gather_s = 0.2
deadline_s = 300
[shaping]
enabled = false
"""


def measure(work, links=tuple(LINKS), steps=STEPS):
    """Errors by link, and how many transfers a new device needs; what is limited runs at once, the rest alone."""
    reason = why_not()
    if reason:
        return {"unshaped": {"skipped": reason}}
    found = {}
    for limited in (True, False):
        some = [name for name in links if (LINKS[name][0] is not None) == limited]
        threads = [
            threading.Thread(
                target=lambda name=name: found.update({name: run_link(work, name, steps_on(name, steps))})
            )
            for name in some
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    steady = [found[name] for name in links if not isinstance(LINKS[name][0], tuple)]
    return {
        "unshaped": {name: errors_of(found[name]) for name in links}
        | {"fresh_device_transfers": transfers_needed(steady)}
    }


def steps_on(name, steps):
    """More where errors are of all sizes, so that their median is no accident."""
    return steps * (4 if isinstance(LINKS[name][0], tuple) else 1)


def why_not():
    """Why no links can be made here; "" if they can."""
    try:
        with link("probe", 250, (1.0, 1.0)):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        return f"no namespace with a token bucket can be made here: {said}"


# Links


@contextlib.contextmanager
def link(name, number, rates):
    """A namespace behind a link; yields its name and the address of this side."""
    space, here, there = f"emutune-{os.getpid()}-{number}", f"emu{number}a", f"emu{number}b"
    address = f"10.203.{number}"
    called("ip", "netns", "add", space)
    try:
        called("ip", "link", "add", "name", here, "type", "veth", "peer", "name", there, "netns", space)
        called("ip", "addr", "add", f"{address}.1/24", "dev", here)
        called("ip", "link", "set", here, "up")
        inside = ("ip", "netns", "exec", space)
        called(*inside, "ip", "addr", "add", f"{address}.2/24", "dev", there)
        called(*inside, "ip", "link", "set", there, "up")
        ends = (((), here), (inside, there))
        with changing(ends, rates):
            yield space, f"{address}.1"
    finally:
        called("ip", "netns", "del", space)


@contextlib.contextmanager
def changing(ends, rates):
    """Token buckets at both ends, drawn anew every two seconds where a range is given."""
    over, draw = threading.Event(), random.Random(0)

    def limit(verb):
        for (prefix, device), rate in zip(ends, rates, strict=True):
            if rate is not None:
                low, high = rate if isinstance(rate, tuple) else (rate, rate)
                bits = 1e6 * math.exp(draw.uniform(math.log(low), math.log(high)))
                burst = max(8000, int(bits / 8 * 0.02))
                bucket = ("tbf", "rate", f"{bits:.0f}bit", "burst", str(burst), "latency", "400ms")
                called(*prefix, "tc", "qdisc", verb, "dev", device, "root", *bucket)

    def change():
        while not over.wait(CHANGES_S):
            limit("change")

    limit("add")
    thread = threading.Thread(target=change)
    if isinstance(rates[0], tuple):
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()


def called(*command):
    subprocess.run(command, check=True, capture_output=True, text=True)


def run_link(work, name, steps):
    """What a fleet of one device on a link predicted and measured: direction, bytes, seconds, predicted seconds."""
    from emutune.fleet.config import load_fleet
    from emutune.fleet.local import free_port, processes, start, wait_for_server
    from emutune.fleet.server.run import enrol_device, opened_ledger

    number = list(LINKS).index(name) + 1
    folder = work / f"link{number}"
    # Emulators of every number of middle layers.
    random_catalogue(folder / "catalogue", SHARD_BYTES, range(1, LAYERS - 2 * ENDS + 1))
    with link(name, number, LINKS[name]) as (space, address), processes() as running:
        port = free_port("0.0.0.0")
        (folder / "fleet.toml").write_text(FLEET.format(address=address, port=port, steps=steps))
        config, url = load_fleet(folder / "fleet.toml"), f"https://{address}:{port}"
        enrol_device(config, "ue1", folder / "ue1.json", url)
        log = folder / "server.log"
        server = start(alone("untraining_server", folder / "fleet.toml", folder / "catalogue"), log)
        running.append(server)
        wait_for_server(server, log, url)
        device = alone("device", folder / "ue1.json", number)
        subprocess.run(["ip", "netns", "exec", space, *device], check=True)
    with opened_ledger(config) as ledger:
        rows = ledger.comparison()
    return [
        (row.kind, row.measured_bytes, row.measured_delay_s, row.predicted_delay_s)
        for row in rows
        if row.measured_bytes and row.measured_delay_s
    ]


def alone(name, *arguments):
    return [sys.executable, __file__, "--alone", name, *map(str, arguments)]


# What runs in processes of its own


class Untraining:
    """A pool that trains and judges nothing."""

    async def run(self, job):
        from emutune.errors import FleetError

        raise FleetError("nothing is trained here")

    async def close(self):
        pass


def untraining_server(fleet, catalogue):
    from emutune.cli.jax_setup import prepare_jax

    prepare_jax()
    from emutune.fleet.config import load_fleet
    from emutune.fleet.loop import run
    from emutune.fleet.server import run as server
    from emutune.fleet.server.choices import opening_of
    from emutune.fleet.server.deciding import deciding
    from emutune.scenario import load_scenario
    from emutune.tuning.inventory import open_inventory

    config = load_fleet(fleet)
    server.open_pool = lambda *arguments: Untraining()

    async def serving():
        async with deciding(opening_of(config, "random", load_scenario(config.scenario))) as decider:
            await server.run_server(config, [open_inventory(Path(catalogue))], decider, judge=Untraining())

    with contextlib.suppress(KeyboardInterrupt):
        run(serving())


def device(credentials, seed):
    """A device that keeps nothing of what it is sent, until it is told to stop."""
    from emutune.fleet.device.cache import shards_of
    from emutune.fleet.loop import run
    from emutune.fleet.protocol import Report, Result, Transferred
    from emutune.fleet.security import read_credentials

    draw, text = random.Random(int(seed)), Path(credentials).with_suffix(".txt")
    low, high = map(math.log, TEXT_BYTES)

    async def working():
        async with client_of(read_credentials(Path(credentials)), attempts=100) as client:
            await enrolled(client)
            for number in itertools.count():
                data = draw.randbytes(int(math.exp(draw.uniform(low, high))))
                text.write_bytes(data)
                digest = hashlib.sha256(data).hexdigest()
                report = Report(
                    task=f"task-{number}", data_bytes=len(data), data_sha256=digest, cache_bytes=1 << 40
                )
                await client.report(report)
                while (lease := await client.lease(20.0)) is None:
                    pass
                if lease.kind == "stop":
                    return
                started = time.perf_counter()
                if lease.kind == "upload":
                    moved = len(data)
                    await client.upload(lease.lease, text, moved, None, lambda done: None)
                else:
                    shards = shards_of(lease.emulator)
                    moved = sum(shards.values())
                    for sha256, size in shards.items():
                        await client.download(f"/v1/shards/{sha256}", size, Hashed())
                seconds = time.perf_counter() - started
                await client.transferred(lease.lease, Transferred(seconds=seconds, bytes=moved))
                await client.result(lease.lease, Result(outcome="failed", reason="nothing is trained here"))

    run(working())


# Figures


def errors_of(transfers):
    """Errors of predictions and of the last rate, in percent of what was predicted, and what intervals cover."""
    from emutune.fleet.comparison import error_percent
    from emutune.fleet.rows import Transfer
    from emutune.fleet.server.rates import estimate_link

    found, last, covered = [], [], []
    for kind in ("train", "upload"):
        own = [one[1:] for one in transfers if one[0] == kind]
        for index in range(1, len(own)):
            moved, seconds, predicted = own[index]
            before = [Transfer(*one[:2]) for one in own[:index]]
            found.append(error_percent(predicted, seconds))
            last.append(error_percent(moved * before[-1].seconds / before[-1].bytes, seconds))
            low, high = estimate_link(before[-24:]).within(moved)
            covered.append(low <= seconds <= high)
    return {
        "median_error_percent": statistics.median(found),
        "p90_error_percent": percentile(found, 0.9),
        "last_rate_median_error_percent": statistics.median(last),
        "last_rate_p90_error_percent": percentile(last, 0.9),
        "interval_covers": statistics.mean(covered),
        "transfers": len(found),
    }


def transfers_needed(links):
    """After how many transfers of a direction the middle of all links' next predictions stays within 20 %."""
    from emutune.fleet.comparison import error_percent

    series = [
        [error_percent(predicted, seconds) for of, _, seconds, predicted in transfers if of == kind]
        for transfers in links
        for kind in ("train", "upload")
    ]
    middles = [statistics.median(each) for each in zip(*series, strict=False)]
    beyond = [count for count, middle in enumerate(middles[:12]) if middle > WITHIN_PERCENT]
    return max(beyond, default=-1) + 1


def percentile(values, share):
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("links", nargs="*", help=f"{', '.join(LINKS)}; all if not given")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        name, *rest = arguments.alone
        globals()[name](*rest)
        return
    if unknown := set(arguments.links) - set(LINKS):
        parser.error(f"no such link: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(Path(directory), arguments.links or tuple(LINKS), arguments.steps)
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
