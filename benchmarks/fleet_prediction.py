"""A fleet with shaped links: what was predicted against what happened; what raising an emulator sends.

python benchmarks/fleet_prediction.py --json prediction.json
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-c", "from emutune.cli.main import run; run()"]
FLEET = """
name = "prediction"
scenario = "reference"
[server]
directory = "fleet"
port = 0
[steps]
count = {steps}
gather_s = 30.0
deadline_s = 120.0
[training]
steps = 4
batch = 2
block = 128
"""


def measure(work, parts=("prediction", "delta")):
    figures = {}
    for part in parts:
        figures |= {"prediction": prediction, "delta": delta}[part](work / part)
    return figures


def prediction(work, steps=8):
    """Errors over a run whose policy draws at random, so that every kind of transfer occurs."""
    from emutune.fleet.comparison import compare_steps, errors
    from emutune.fleet.ledger import Ledger

    work.mkdir(parents=True)
    (work / "fleet.toml").write_text(FLEET.format(steps=steps))
    started = time.perf_counter()
    subprocess.run(
        [*COMMAND, "fleet", str(work / "fleet.toml"), "--devices", "3", "--policy", "random"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - started
    with Ledger(work / "fleet" / "ledger.sqlite") as ledger:
        leases = ledger.comparison()
    apart = errors(leases)
    compared = [step for step in compare_steps(leases) if step.predicted_delay_s]
    return {
        "median_delay_error_percent": apart.delay_percent,
        "bytes_error_percent": apart.bytes_percent,
        "median_perplexity_error_percent": apart.perplexity_percent,
        "steps_compared": len(compared),
        "leases": len(leases),
        "run_seconds": seconds,
    }


def delta(work):
    """Bytes on the wire, TLS and HTTP included, when a device with E = 0.4 is given 0.6, over the missing layers'."""
    return asyncio.run(raise_emulator(work))


async def raise_emulator(work):
    from emutune.fleet.config import load_fleet
    from emutune.fleet.device.cache import Cache
    from emutune.fleet.device.client import FleetClient
    from emutune.fleet.device.network import tls_transport
    from emutune.fleet.local import free_port
    from emutune.fleet.security import new_secret, read_credentials, secret_sha256, trusting
    from emutune.fleet.server.run import enrol_device
    from emutune.tuning.build import Recipe, build_catalogue
    from emutune.tuning.manifest import missing

    work.mkdir(parents=True)
    catalogue = await asyncio.to_thread(build_catalogue, "reference", work / "catalogue", Recipe())
    (work / "fleet.toml").write_text(FLEET.format(steps=1))
    config, port = load_fleet(work / "fleet.toml"), free_port("127.0.0.1")
    relay = Relay(port)
    async with await asyncio.start_server(relay.connected, "127.0.0.1", 0) as listening:
        url = f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        enrol_device(config, "ue1", work / "ue1.json", url)
        options = ("--catalogue", str(work / "catalogue"), "--policy", "all_server", "--port", str(port))
        server = subprocess.Popen(
            [*COMMAND, "serve", str(work / "fleet.toml"), *options], stdout=subprocess.DEVNULL
        )
        try:
            credentials, key = read_credentials(work / "ue1.json"), new_secret()
            small, large = catalogue.find(0.4), catalogue.find(0.6)
            client = FleetClient(credentials, tls_transport(trusting(credentials.ca)))
            async with client, Cache(work / "cache", 10**9) as cache:
                await client.enrol(key, secret_sha256(key))
                await cache.prepare(await client.info(), client)
                await cache.fetch(small.model_dump(mode="json"), client, lambda done, total: None)
                before = relay.bytes
                await cache.fetch(large.model_dump(mode="json"), client, lambda done, total: None)
                sent = relay.bytes - before
        finally:
            server.terminate()
            server.wait()
    needed = sum(missing(small, large).values())
    return {
        "delta_overhead_ratio": sent / needed,
        "delta_bytes": {"sent": sent, "missing_layers": needed, "emulator": large.bytes},
    }


class Relay:
    """Passes connections on to a port, and counts the bytes of both directions."""

    def __init__(self, port):
        self.port, self.bytes = port, 0

    async def connected(self, reader, writer):
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))

    async def _pass(self, reader, writer):
        try:
            while piece := await reader.read(1 << 16):
                self.bytes += len(piece)
                writer.write(piece)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["prediction", "delta"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(Path(directory), arguments.parts)
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
