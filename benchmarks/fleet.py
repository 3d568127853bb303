"""A fleet's server: how fast emulators reach a device, how soon a lease does, many devices, and intruders.

    python benchmarks/fleet.py [PART ...] --json fleet.json

Server and devices are processes of their own and talk TLS over loopback. Where something is compared with nginx, the
two take turns, and the ratio of their medians is quoted. What the machine was busy with beside is in ``machine``.
"""

import argparse
import asyncio
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, ENDS = 12, 2  # the reference scenario's eight layers, and two adapter layers at either end
HELD_S = 300.0
MEMORY, ROOM_BYTES = Path("/dev/shm"), 3_000_000_000
FLEET = """
name = "benchmark"
[server]
port = {port}
[steps]
count = {steps}
gather_s = {gather_s}
deadline_s = {deadline_s}
[shaping]
enabled = false
[training]
width = 4
[limits]
connections_per_address = {devices}
"""


# What server and devices have


def random_catalogue(folder, shard_bytes, sizes=(2, 6)):
    """A catalogue of the reference scenario's model in which every shard is noise; its largest emulator.

    ``sizes`` are how many middle layers its emulators keep, rising.
    """
    from emutune.scenario import load_scenario
    from emutune.tuning.adapter_manifest import WIDTH
    from emutune.tuning.catalogue import BASE, Catalogue, CatalogueInfo
    from emutune.tuning.manifest import Emulator, LayerEntry

    base = load_scenario("reference").model.base
    info = CatalogueInfo(
        base=base,
        config={"model_type": "gpt2", "n_layer": LAYERS},
        layers=LAYERS,
        bottom=ENDS,
        top=ENDS,
        text="",
        recipe="noise",
        adapters={"lora": {"weight": (WIDTH, 64)}},
    )
    catalogue = Catalogue(folder, info)
    catalogue.save_info()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "shards").mkdir()
    shards = [noise(folder / "shards", shard_bytes) for _ in range(LAYERS + 1)]
    whole = Emulator(
        base=base,
        name=BASE,
        recipe=BASE,
        method=("layer_drop",),
        order="uniform",
        retention=1.0,
        kept=info.middle,
        seed=0,
        outer=shards[-1],
        layers=[LayerEntry(index=index, shard=shards[index]) for index in range(LAYERS)],
        perplexity=100.0,
    )
    catalogue.save_emulator(whole)
    for kept in sizes:
        indices = {*info.adapter_layers, *info.middle[:kept]}
        emulator = whole.model_copy(
            update={
                "name": f"noise-{kept}",
                "recipe": "noise",
                "retention": kept / len(info.middle),
                "kept": tuple(info.middle[:kept]),
                "layers": tuple(layer for layer in whole.layers if layer.index in indices),
            }
        )
        catalogue.save_emulator(emulator)
    return emulator


def noise(folder, size):
    """A file of random bytes, named by its content."""
    from emutune.tuning.manifest import Shard

    digest, aside = hashlib.sha256(), folder / "aside"
    with aside.open("wb") as file:
        for start in range(0, size, 1 << 22):
            piece = os.urandom(min(1 << 22, size - start))
            digest.update(piece)
            file.write(piece)
    aside.rename(folder / f"{digest.hexdigest()}.safetensors")
    return Shard(sha256=digest.hexdigest(), bytes=size)


def new_fleet(folder, devices, **steps):
    """A fleet's file, and credentials of its devices; returns the file and the server's URL."""
    from emutune.fleet.config import load_fleet
    from emutune.fleet.local import free_port
    from emutune.fleet.security import Credentials, new_secret, secret_sha256, write_credentials
    from emutune.fleet.server.run import certificate_of, opened_ledger

    folder.mkdir(parents=True)
    # All devices are at one address.
    values = {"gather_s": 0.5, "deadline_s": HELD_S, "devices": max(64, len(devices))} | steps
    (folder / "fleet.toml").write_text(FLEET.format(port=free_port("127.0.0.1"), **values))
    config = load_fleet(folder / "fleet.toml")
    url = f"https://127.0.0.1:{config.server.port}"
    authority = certificate_of(config).authority
    with opened_ledger(config) as ledger:
        for device in devices:
            token = new_secret()
            ledger.add_device(device, secret_sha256(token))
            write_credentials(
                folder / f"{device}.json",
                Credentials(fleet=config.name, device=device, url=url, token=token, ca=authority),
            )
    return config, url


def client_of(credentials, attempts=1):
    """A device's own client; at the first failure it gives up."""
    from emutune.fleet.device.client import Backoff, FleetClient
    from emutune.fleet.device.network import tls_transport
    from emutune.fleet.security import trusting

    backoff = Backoff(attempts=attempts)
    return FleetClient(credentials, tls_transport(trusting(credentials.ca)), backoff=backoff)


async def enrolled(client):
    from emutune.fleet.security import new_secret, secret_sha256

    key = new_secret()
    await client.enrol(key, secret_sha256(key))


def report_of(number, cache_bytes=1 << 40):
    from emutune.fleet.protocol import Report

    return Report(
        task=f"task-{number}",
        data_bytes=50_000,
        data_sha256="0" * 64,
        perplexity_ratio=1.2,
        gain=1e-4,
        cache_bytes=cache_bytes,
    )


@contextlib.contextmanager
def server_process(command, config, url):
    """A server, from when it answers until the block ends; yields the process."""
    from emutune.fleet.local import processes, start, wait_for_server

    log = config.server.directory / "server.log"
    with processes() as running:
        server = start(list(map(str, command)), log)
        running.append(server)
        wait_for_server(server, log, url)
        yield server


def own_command(name, *arguments):
    return [sys.executable, __file__, "--alone", name, *arguments]


def started_alone(name, *arguments):
    """A part of this file in a process of its own; its last line, and the most memory that it had."""
    output = subprocess.run(
        list(map(str, own_command(name, *arguments))),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def peak_mb(process="self"):
    """The most memory that a process has had so far, MB of 1e6 bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6


def taken(process="self"):
    """What a process has taken of the machine."""
    times = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return {"peak_mb": peak_mb(process), "cpu_seconds": sum(map(int, times)) / os.sysconf("SC_CLK_TCK")}


def decider_of(server):
    """The process in which a server's policy decides."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    (found,) = [
        child
        for child in children
        if b"emutune.fleet.server.deciding" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return int(found)


# Transfer


def transfer(work, rounds=5):
    """An emulator of 1 GB to a device that hashes and writes it, against nginx to curl; on disk and in memory."""
    on_disk = transfers(work / "transfer", rounds)
    shutil.rmtree(work / "transfer" / "catalogue")
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < ROOM_BYTES:
        return on_disk
    # Without the disk, which the device waits for at the end of every shard and curl never.
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        in_memory = transfers(Path(folder) / "transfer", rounds)
    return on_disk | {f"{key}_in_memory": value for key, value in in_memory.items()}


def transfers(folder, rounds):
    emulator = random_catalogue(folder / "catalogue", 1_000_000_000 // 11)
    names = [f"ue{number}" for number in range(rounds)]
    config, url = new_fleet(folder / "fleet", names, steps=rounds + 1)
    serve = (
        "serve",
        folder / "fleet" / "fleet.toml",
        "--catalogue",
        folder / "catalogue",
        "--policy",
        "fixed",
    )
    command = [sys.executable, "-c", "from emutune.cli.main import run; run()", *serve, "--retention", "0.75"]
    ours, theirs, peaks = [], [], []
    with server_process(command, config, url) as server, nginx(folder, config) as address:
        server_before = peak_mb(server.pid)
        for name in names:
            os.sync()
            fetched = started_alone("fetch", folder / "fleet" / f"{name}.json", folder / "cache")
            assert fetched["result"]["bytes"] == emulator.bytes
            ours.append(fetched["result"]["seconds"])
            peaks.append(fetched["peak_mb"])
            os.sync()
            theirs.append(curl(folder, config, address, emulator))
            print(f"{name}: emutune {ours[-1]:.2f} s, nginx {theirs[-1]:.2f} s", flush=True)
        server_peak, decider_peak = peak_mb(server.pid), peak_mb(decider_of(server.pid))
    return {
        "transfer_ratio_to_nginx": statistics.median(theirs) / statistics.median(ours),
        "transfer_mb_per_s": {
            "emutune": emulator.bytes / 1e6 / statistics.median(ours),
            "nginx": emulator.bytes / 1e6 / statistics.median(theirs),
        },
        "transfer_seconds": {"emutune": ours, "nginx": theirs},
        "transfer_peak_rss_mb": {"server": server_peak, "decider": decider_peak, "device": max(peaks)},
        "transfer_server_grew_mb": server_peak - server_before,
    }


def fetch(credentials, cache):
    """A device fetches its first emulator into an empty cache; seconds from the lease to the last byte on disk."""
    from emutune.fleet.device.cache import Cache
    from emutune.fleet.loop import run
    from emutune.fleet.protocol import Result, Transferred
    from emutune.fleet.security import read_credentials

    async def device():
        client = client_of(read_credentials(Path(credentials)))
        async with client, Cache(Path(cache), 1 << 40) as opened:
            await enrolled(client)
            await opened.prepare(await client.info(), client)
            await client.report(report_of(0))
            while (lease := await client.lease(20.0)) is None:
                pass
            started = time.perf_counter()
            await opened.fetch(lease.emulator, client, lambda done, total: None)
            message = Transferred(seconds=time.perf_counter() - started, bytes=sum(opened.held.values()))
            await client.transferred(lease.lease, message)
            await client.result(lease.lease, Result(outcome="failed", reason="noise cannot be trained"))
            await client.leave()
            return message.model_dump()

    moved = run(device())
    shutil.rmtree(cache)
    return moved


@contextlib.contextmanager
def nginx(folder, config):
    """nginx with the same files and the same certificate, as Debian sets it up; yields its URL."""
    from emutune.fleet.local import free_port
    from emutune.fleet.server.run import certificate_of

    own = folder / "nginx"
    own.mkdir()
    port, made = free_port("127.0.0.1"), certificate_of(config)
    temporary = "\n".join(
        f"  {kind}_temp_path {own}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (own / "nginx.conf").write_text(
        f"""{"user root;" if os.geteuid() == 0 else ""}
worker_processes 1;
daemon off;
pid {own}/pid;
error_log {own}/error.log;
events {{ worker_connections 768; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
{temporary}
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {made.certificate.absolute()};
    ssl_certificate_key {made.key.absolute()};
    ssl_protocols TLSv1.3;
    root {folder}/catalogue/shards;
  }}
}}
"""
    )
    from emutune.fleet.local import wait_for_server

    url, log = f"https://127.0.0.1:{port}", own / "error.log"
    server = subprocess.Popen(["nginx", "-c", own / "nginx.conf", "-e", log])
    try:
        wait_for_server(server, log, url)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def curl(folder, config, url, emulator):
    """Seconds in which curl writes an emulator's shards to files, over one connection."""
    from emutune.fleet.server.run import certificate_of

    (folder / "ca.pem").write_text(certificate_of(config).authority)
    out = folder / "curl"
    out.mkdir()
    files = [f"{sha256}.safetensors" for sha256 in emulator.shards]
    urls = "".join(f'url = "{url}/{name}"\noutput = "{out}/{name}"\n' for name in files)
    started = time.perf_counter()
    subprocess.run(
        ["curl", "-sS", "--fail", "--cacert", folder / "ca.pem", "-K", "-"], input=urls, text=True, check=True
    )
    seconds = time.perf_counter() - started
    assert sum(path.stat().st_size for path in out.iterdir()) == emulator.bytes
    shutil.rmtree(out)
    return seconds


# Latency


def latency(work, steps=100):
    """From a step's leases in the ledger, just before their commit, to a device that waits in a long poll."""
    folder = work / "latency"
    random_catalogue(folder / "catalogue", 1000)
    # The second device never has a task, so that every step waits while the first is idle.
    config, url = new_fleet(folder / "fleet", ["ue1", "ue2"], steps=steps, gather_s=0.2)
    notes = folder / "commits.jsonl"
    command = own_command("noting_server", folder / "fleet" / "fleet.toml", folder / "catalogue", notes)
    with server_process(command, config, url):
        received = started_alone("idle_device", folder / "fleet", steps)["result"]
    committed = {note["step"]: note["at"] for note in map(json.loads, notes.read_text().splitlines())}
    ms = sorted(1000 * (at - committed[step]) for step, at in received)
    assert len(ms) == steps
    assert ms[0] > 0
    return {
        "command_latency_ms_p50": statistics.median(ms),
        "command_latency_ms_p95": ms[int(0.95 * steps)],
        "command_latency_ms_max": ms[-1],
    }


def noting_server(fleet, catalogue, notes):
    """A server that notes when the leases of a step are written; CLOCK_MONOTONIC is the machine's."""
    from emutune.fleet.ledger import Ledger

    begin_step = Ledger.begin_step

    with Path(notes).open("w", buffering=1) as file:

        def noting(self, step, decided):
            began = begin_step(self, step, decided)
            at = time.monotonic()
            file.write(json.dumps({"step": step, "at": at}) + "\n")
            return began

        Ledger.begin_step = noting
        serve_until_done(fleet, catalogue)


def serve_until_done(fleet, catalogue, judge=None):
    """As ``emutune serve`` does it; what server and decider had taken when devices could come, and at the end."""
    from emutune.cli.jax_setup import prepare_jax

    prepare_jax()
    from emutune.fleet.config import load_fleet
    from emutune.fleet.loop import run
    from emutune.fleet.server.choices import opening_of
    from emutune.fleet.server.deciding import deciding
    from emutune.fleet.server.run import run_server
    from emutune.scenario import load_scenario
    from emutune.tuning.inventory import open_inventory

    config, catalogue, noted = load_fleet(fleet), open_inventory(Path(catalogue)), {}

    async def serving():
        async with deciding(opening_of(config, "fixed", load_scenario(config.scenario), 0.75)) as decider:

            def note(when):
                noted[when] = {"server": taken(), "decider": taken(decider.pid)}

            try:
                await run_server(config, [catalogue], decider, started=lambda url: note("idle"), judge=judge)
            finally:
                note("ended")

    # An interrupt is how a benchmark that has seen enough ends its server.
    with contextlib.suppress(KeyboardInterrupt):
        run(serving())
    return noted


def idle_device(folder, steps):
    """When each step's lease arrived, on the clock that the server notes."""
    from emutune.fleet.loop import run
    from emutune.fleet.protocol import Result
    from emutune.fleet.security import read_credentials

    async def devices():
        idle, absent = (client_of(read_credentials(Path(folder) / f"{name}.json")) for name in ("ue1", "ue2"))
        received = []
        async with idle, absent:
            await enrolled(absent)
            await enrolled(idle)
            for number in range(int(steps)):
                await idle.report(report_of(number))
                while (lease := await idle.lease(20.0)) is None:
                    pass
                received.append((lease.step, time.monotonic()))
                await idle.result(lease.lease, Result(outcome="failed", reason="only here to wait"))
        return received

    return run(devices())


# Load


def load(work):
    return {"load": loaded(work / "load", devices=300, steps=5)}


def scale(work):
    """A step of a thousand devices, from the last result of the step before to the last of its own."""
    return {"scale": loaded(work / "scale", devices=1000, steps=4)}


def loaded(folder, devices, steps):
    """Many devices on one server: every route of a device that trains, without the training."""
    emulator = random_catalogue(folder / "catalogue", 10_000)
    config, url = new_fleet(
        folder / "fleet",
        [f"ue{number}" for number in range(devices)],
        steps=steps,
        gather_s=60.0,
        deadline_s=60.0,
    )
    command = own_command("unjudging_server", folder / "fleet" / "fleet.toml", folder / "catalogue")
    with server_process(command, config, url) as server:
        alone = started_alone("many_devices", folder / "fleet", devices, steps)
        result = alone["result"]
        server.wait(HELD_S)
    lines = (config.server.directory / "server.log").read_text().splitlines()
    noted = json.loads(next(line for line in reversed(lines) if line.startswith('{"result"')))["result"]
    idle, last = noted["idle"], noted["ended"]
    from emutune.fleet.server.run import opened_ledger

    with opened_ledger(config) as ledger:
        totals = ledger.totals()
        ended = sum(ledger.step_ended(step) for step in range(ledger.last_step() + 1))
    lost = devices * steps - totals.get("leases.train.done", 0)
    assert totals["bytes.train"] in (0, devices * emulator.bytes) or result["errors"]
    seconds_of = [end - begin for begin, end in itertools.pairwise([0.0, *result["over_s"]])]
    return {
        "devices": devices,
        "steps_completed": ended,
        # The first has in it that all join, shake hands and fetch an emulator.
        "first_step_s": seconds_of[0],
        "step_s": statistics.median(seconds_of[1:]),
        "errors": len(result["errors"]) + lost,
        "server_rss_mb": last["server"]["peak_mb"],
        "decider_rss_mb": last["decider"]["peak_mb"],
        "idle_rss_mb_of": {name: part["peak_mb"] for name, part in idle.items()},
        "seconds": result["seconds"],
        "cpu_seconds_of": {name: last[name]["cpu_seconds"] - idle[name]["cpu_seconds"] for name in last}
        | {"devices": alone["cpu_seconds"]},
        "first_errors": result["errors"][:3],
    }


class Unjudging:
    """A pool that finds every adapter better than the one before."""

    async def run(self, job):
        return {"perplexity": [100.0 - place for place in range(len(job.adapters))]}

    async def close(self):
        pass


def unjudging_server(fleet, catalogue):
    return serve_until_done(fleet, catalogue, Unjudging())


def many_devices(folder, devices, steps):
    """All devices, each with a client and a connection of its own; what failed, and when each step was over."""
    # Now, and not while the server waits.
    import emutune.tuning.adapters  # noqa: F401
    from emutune.fleet.loop import run
    from emutune.fleet.security import read_credentials

    folder = Path(folder)
    credentials = [read_credentials(folder / f"ue{number}.json") for number in range(int(devices))]

    async def all_devices():
        errors, over = [], [0.0] * int(steps)
        started = time.perf_counter()
        await asyncio.gather(*(one_of_many(each, folder / "out", over, errors) for each in credentials))
        seconds = time.perf_counter() - started
        return {"errors": errors, "seconds": seconds, "over_s": [at - started for at in over]}

    return run(all_devices())


async def one_of_many(credentials, folder, over, errors):
    """A device, which notes when its steps are over, and what fails."""
    from emutune.errors import EmutuneError

    client = client_of(credentials)
    try:
        async with client:
            await enrolled(client)
            info, held = await client.info(), {}
            for number in range(len(over)):
                await client.report(report_of(number))
                while (lease := await client.lease(20.0)) is None:
                    await client.report(report_of(number))
                await carry_out(client, info, lease, held, folder / f"{credentials.device}.safetensors")
                over[number] = time.perf_counter()
            while (lease := await client.lease(20.0)) is None:
                pass
            assert lease.kind == "stop"
    except (EmutuneError, AssertionError, OSError) as error:
        errors.append(f"{credentials.device}: {error!r}")


async def carry_out(client, info, lease, held, adapter):
    """Fetch what is missing, and put an adapter that a tiny model of that shape might have."""
    from emutune.fleet.device.cache import shards_of
    from emutune.fleet.protocol import Result, Transferred

    started, moved = time.perf_counter(), 0
    for sha256, size in shards_of(lease.emulator).items():
        if sha256 not in held:
            sink = Hashed()
            await client.download(f"/v1/shards/{sha256}", size, sink)
            assert sink.digest.hexdigest() == sha256
            held[sha256] = size
            moved += size
    seconds = time.perf_counter() - started
    await client.transferred(lease.lease, Transferred(seconds=seconds, bytes=moved))
    sha256 = write_adapter(adapter, info, lease)
    await client.put_adapter(lease.lease, adapter)
    result = Result(outcome="trained", adapter=sha256, before=100.0, after=99.0, training_s=0.0)
    await client.result(lease.lease, result)


class Hashed:
    """Where a download goes that nobody keeps."""

    def __init__(self):
        self.size, self.digest = 0, hashlib.sha256()

    async def write(self, piece):
        self.size += len(piece)
        self.digest.update(piece)

    async def restart(self):
        self.__init__()


def write_adapter(path, info, lease):
    import torch

    from emutune.tuning.adapters import AdapterManifest, save_adapter

    ends = (*range(info.bottom), *range(info.layers - info.top, info.layers))
    manifest = AdapterManifest(
        base=info.base,
        layers=info.layers,
        layer_map=ends,
        kind="lora",
        width=4,
        retention=lease.emulator["retention"],
        emulator=lease.emulator["name"],
    )
    save_adapter(path, manifest, {"weight": torch.rand(4, 64)})
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Intruders


def intruders(work):
    """Attacks on the server's application: tried, let in, and not noted in the ledger."""
    import logging

    # Every refusal is logged, which is what they are tried for.
    logging.disable(logging.CRITICAL)
    tests = Path(__file__).parents[1] / "tests" / "fleet"
    sys.path.append(str(tests))
    counted = asyncio.run(importlib.import_module("intruders").count(work / "intruders"))
    logging.disable(logging.NOTSET)
    return {"intruders": counted}


def elsewhere(module):
    """A part that has a file of its own."""

    def measure(work):
        return importlib.import_module(module).measure(work)

    return measure


prediction = elsewhere("fleet_prediction")
PARTS = {
    "transfer": transfer,
    "latency": latency,
    "load": load,
    "scale": scale,
    "intruders": intruders,
    "prediction": prediction,
    "delta": prediction,
    "faults": elsewhere("fleet_faults"),
}


def machine(load_before):
    """Figures of a busy machine are not those of an idle one."""
    return {"cores": os.cpu_count(), "load_before": load_before, "load_after": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"{', '.join(PARTS)}; all if not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--work", type=Path, help="where to work, an empty directory; a temporary one if not given"
    )
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.alone:
        name, *rest = arguments.alone
        result = globals()[name](*rest)
        print(json.dumps({"result": result} | taken()))
        return
    if unknown := set(arguments.part) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    figures = {}
    if arguments.json and arguments.json.exists():
        figures = json.loads(arguments.json.read_text())
    wanted = dict.fromkeys(PARTS[name] for name in arguments.part or PARTS)
    with tempfile.TemporaryDirectory() as directory:
        for measure in wanted:
            before = os.getloadavg()[0]
            measured = measure((arguments.work or Path(directory)).absolute())
            print(json.dumps(measured, indent=2), flush=True)
            names = ",".join(name for name, part in PARTS.items() if part is measure)
            figures |= measured
            figures.setdefault("machine", {})[names] = machine(before)
            if arguments.json:
                arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
