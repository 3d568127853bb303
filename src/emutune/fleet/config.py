"""A fleet's file: where the server listens, who takes part, how a step runs."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from emutune.errors import FleetError
from emutune.fleet.protocol import Training

EVERY_ADDRESS = ("0.0.0.0", "::", "")
# In the server's directory.
LEDGER, LOCK = "ledger.sqlite", "server.lock"

Positive = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Server(_Section):
    """Where the server listens and keeps its files.

    Attributes:
        directory: of ledger, certificates, uploads and adapters; seen from the fleet's file.
        host, port: where it listens; port 0 takes a free one.
        names: host names and addresses that devices reach it by, the usual one first; ``host`` if not given.
        certificate, key: PEM files of one's own; made by a CA of the fleet's own if not given.
        authority: PEM file of the CA that signed ``certificate``; the last certificate in it if not given.
    """

    directory: Path = Path("fleet")
    host: str = "127.0.0.1"
    port: int = Field(default=8443, ge=0, le=65535)
    names: tuple[str, ...] = ()
    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None

    @property
    def reached_as(self) -> tuple[str, ...]:
        """Names and addresses that devices may use.

        Raises:
            FleetError: the server listens at every address of its machine, and none is named.
        """
        if self.names:
            return self.names
        if self.host in EVERY_ADDRESS:
            raise FleetError(
                f"server.host: {self.host!r} is every address of this machine; say in server.names how devices reach it"
            )
        return (self.host,)

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together; give both or neither")
        if self.authority is not None and self.certificate is None:
            raise ValueError("authority is that of a certificate of your own; give certificate and key too")
        return self


class Steps(_Section):
    """How a step runs.

    Attributes:
        count: steps, after which the devices are told to stop.
        episode: how many belong together, for which energy has a budget; as many as the scenario has tasks, if not
            given.
        fresh: every task is tuned from nothing, as in the simulator, instead of from the adapter in service.
        devices: how many reports a step waits for; all enrolled devices that did not leave, if not given.
        gather_s: a step that has at least one report starts after so long without the others; no longer does it wait
            for what is judged or measured.
        deadline_s: a device that needs longer is late: the next step does not wait for it, its result is kept.
    """

    count: int = Field(default=50, ge=1, le=1_000_000)
    episode: int | None = Field(default=None, ge=1, le=100_000)
    fresh: bool = False
    devices: int | None = Field(default=None, ge=1)
    gather_s: Positive = 30.0
    deadline_s: Positive = 600.0


class Shaping(_Section):
    """Links of simulated rates (Eq. 2, 6) over a network that is faster.

    Attributes:
        enabled: off on a real network, where rates are those of the transfers that were measured.
        time_scale: simulated seconds that pass in one second.
        byte_scale: simulated bytes that one byte stands for.
        seed: of distances, powers and fading.
    """

    enabled: bool = True
    time_scale: Positive = 1.0
    byte_scale: Positive = 1.0
    seed: int = Field(default=0, ge=0)


class LinkSharing(_Section):
    """Whether devices' links share a bottleneck, such as the server's own.

    Attributes:
        sharing: those who send in one direction split it equally, or each has a link of its own; if not given, as the
            scenario says where links are shaped, and none on real ones.
    """

    sharing: Literal["equal", "none"] | None = None


class Acceptance(_Section):
    """Whether an adapter enters service: only if the whole model does not get worse on held-back text.

    Attributes:
        held_back: folder with the text of each device and model, ``DEVICE/MODEL.txt``, or ``DEVICE.txt`` for the first
            model, and of all others, ``default.txt``; Python's documentation where there is none. The folder
            ``held_back`` in the server's directory if not given.
    """

    held_back: Path | None = None

    def text_of(self, device: str, model: str = "", first: bool = True) -> Path | None:
        """The text that an adapter of a device is judged on; None stands for Python's documentation.

        Args:
            device: whose.
            model: what the adapter's foundation model is called.
            first: that is the fleet's first.
        """
        if self.held_back is None:
            return None
        names = [f"{device}/{model}.txt", *([f"{device}.txt"] if first else []), "default.txt"]
        return next((path for name in names if (path := self.held_back / name).is_file()), None)


class ServerTraining(_Section):
    """How the server trains the tasks that are uploaded.

    Attributes:
        pool: processes of this machine, or a Ray cluster.
        workers: tasks trained at the same time.
        model: the whole one (D12), or the emulator that the device has.
    """

    pool: Literal["processes", "ray"] = "processes"
    workers: int = Field(default=1, ge=1, le=1024)
    model: Literal["full", "cached"] = "full"


class JobLimits(_Section):
    """What a job of the server may take, the training of an uploaded task or a judgement; one that takes more fails.

    Attributes:
        train_s, judge_s: so many seconds, from when a worker or a Ray cluster gets it.
        memory_mb: of its process, in MB of 1e6 bytes; half of the machine's if not given. Kept on Linux.
    """

    train_s: Positive = 3600.0
    judge_s: Positive = 600.0
    memory_mb: Positive | None = None


class Limits(_Section):
    """The most that is taken from outside, in MB of 1e6 bytes.

    Attributes:
        request_s: from a connection, its TLS handshake included, to the end of its first request's head, and as long
            for every later one.
        connections_per_address: that bring no device's key, from an IPv4 address or a 64 bit network of IPv6.
        open_tasks: that one device may report before anything is decided about them.
    """

    data_mb: Positive = 1000.0
    adapter_mb: Positive = 500.0
    request_s: Positive = 15.0
    connections_per_address: int = Field(default=64, ge=1, le=1_000_000)
    open_tasks: int = Field(default=8, ge=1, le=1_000_000)


class Keep(_Section):
    """What stays of what is not needed any more.

    Attributes:
        days: for which superseded and rejected adapters stay, and uploads that late devices do not go on with.
    """

    days: float = Field(default=30.0, ge=0.01, le=36500)


class FleetConfig(_Section):
    """What ``FLEET.toml`` says.

    Attributes:
        scenario: the world that rules decide in and links are shaped by, by name or by its file, seen from the fleet's;
            a learned policy brings its own.
    """

    name: str = Field(pattern="^[0-9A-Za-z][0-9A-Za-z -]{0,63}$")
    scenario: str = "reference"
    server: Server = Server()
    steps: Steps = Steps()
    shaping: Shaping = Shaping()
    links: LinkSharing = LinkSharing()
    training: Training = Training()
    acceptance: Acceptance = Acceptance()
    at_server: ServerTraining = ServerTraining()
    jobs: JobLimits = JobLimits()
    limits: Limits = Limits()
    keep: Keep = Keep()

    @property
    def time_scale(self) -> float:
        """Seconds of the scenario in one second."""
        return self.shaping.time_scale if self.shaping.enabled else 1.0

    @property
    def sharing(self) -> Literal["equal", "none"] | None:
        """Who shares links, where that is not as the scenario says."""
        return self.links.sharing or (None if self.shaping.enabled else "none")


def load_fleet(source: str | Path) -> FleetConfig:
    """Read a fleet's file, whose paths are seen from where it is, or the shipped one that is called ``demo``.

    Raises:
        FleetError: it cannot be read, or a field is wrong; the message names the field.
    """
    path = Path(source)
    try:
        if str(source) == "demo":
            text = (resources.files("emutune.fleet") / "demo.toml").read_text("utf-8")
        else:
            text = path.read_text("utf-8")
        config = FleetConfig.model_validate(tomllib.loads(text))
    except FileNotFoundError as error:
        raise FleetError(f"{path}: no such file; give one, or the shipped fleet: demo") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FleetError(f"{path}: cannot be read as TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}" for problem in error.errors()
        )
        raise FleetError(f"{path}: {problems}") from error
    return _seen_from(config, path.parent)


def _seen_from(config: FleetConfig, folder: Path) -> FleetConfig:
    server, acceptance = config.server, config.acceptance
    directory = folder / server.directory
    held_back = acceptance.held_back
    server = server.model_copy(
        update={
            "directory": directory,
            "certificate": None if server.certificate is None else folder / server.certificate,
            "key": None if server.key is None else folder / server.key,
            "authority": None if server.authority is None else folder / server.authority,
        }
    )
    acceptance = acceptance.model_copy(
        update={"held_back": directory / "held_back" if held_back is None else folder / held_back}
    )
    beside = folder / config.scenario
    scenario = str(beside) if beside.is_file() else config.scenario
    return config.model_copy(update={"server": server, "acceptance": acceptance, "scenario": scenario})
