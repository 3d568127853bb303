"""What a device remembers over its own death: its task, its lease, and how long that has taken."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emutune.errors import FleetError
from emutune.fleet import disk
from emutune.fleet.device.files import hash_file, write_durably
from emutune.fleet.protocol import FleetInfo, Lease, ModelInfo, Result, Transferred

_BOOT = Path("/proc/sys/kernel/random/boot_id")
# A machine without a clock of its own starts in 1970.
_LONGEST_S = 1e9
Answer = TypeVar("Answer")


class StateUnwritableError(FleetError):
    """What a device remembers cannot be written now; it may once there is space."""


class _Remembered(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Task(_Remembered):
    """A task that was reported, or is about to be.

    Attributes:
        task: its name in the protocol.
        file: its text, seen from the data directory.
        model: hash of the foundation model that it is of; None if it was made when there was one.
        bytes, sha256: of that file when the task was made.
    """

    task: str
    file: str
    model: str | None = None
    bytes: int = Field(ge=1)
    sha256: str


class Arrival(_Remembered):
    """When a lease arrived, so that a restart or a clock that is set does not change how long it took.

    Attributes:
        boot: which start of the machine ``monotonic_s`` counts from.
        monotonic_s: of ``time.monotonic``.
        wall_s: since 1970; used only if the machine was started anew.
    """

    boot: str
    monotonic_s: float
    wall_s: float

    @classmethod
    def now(cls) -> Arrival:
        """This moment."""
        return cls(boot=_boot(), monotonic_s=time.monotonic(), wall_s=time.time())

    def seconds(self) -> float:
        """Wall time since then, at least 0, and no more than a message can say."""
        now = Arrival.now()
        same = now.boot == self.boot != ""
        seconds = now.monotonic_s - self.monotonic_s if same else now.wall_s - self.wall_s
        return min(max(0.0, seconds), _LONGEST_S)


class Work(_Remembered):
    """A lease that is being worked on.

    Attributes:
        lease: as it arrived.
        arrival: when.
        bytes: what has to move for it.
        transferred: what was measured, once everything has moved.
        result: what the server is told, or was told if a kill came before the lease was forgotten.
    """

    lease: Lease
    arrival: Arrival
    bytes: int = Field(ge=0)
    transferred: Transferred | None = None
    result: Result | None = None


class State(_Remembered):
    """``state.json`` of a cache.

    Attributes:
        fleet, device: what the cache belongs to.
        nonce: makes tasks of this state different from those of any other.
        number: tasks so far.
        done: tasks whose result the server has, since the device was last told how many to do.
        task: the one at hand.
        work: the lease at hand.
    """

    format_version: Literal["1"] = "1"
    fleet: str
    device: str
    nonce: str = Field(default_factory=lambda: secrets.token_hex(6))
    number: int = Field(default=0, ge=0)
    done: int = Field(default=0, ge=0)
    task: Task | None = None
    work: Work | None = None


class Memory:
    """The state of a device, on disk whenever it matters."""

    def __init__(self, path: Path, fleet: str, device: str) -> None:
        """Read what is there, or begin anew.

        Raises:
            FleetError: it is of another device or fleet, or damaged.
        """
        self.path = path
        self.state = self._read() or State(fleet=fleet, device=device)
        if (self.state.fleet, self.state.device) != (fleet, device):
            raise FleetError(
                f"--cache {path.parent}: belongs to device {self.state.device!r} of fleet {self.state.fleet!r}, the "
                f"credentials are of {device!r} of {fleet!r}; choose another directory, or that device's credentials"
            )

    def change(self, **changes: Any) -> None:
        """Change the state, on disk first.

        Raises:
            StateUnwritableError: it cannot be written; the state stays as it was.
        """
        changed = self.state.model_copy(update=changes)
        try:
            write_durably(self.path, changed.model_dump_json(indent=1) + "\n")
        except OSError as error:
            raise StateUnwritableError(
                f"{self.path}: cannot be written ({error.strerror}); free some space, then the device goes on"
            ) from error
        self.state = changed

    async def written(self, remark: Callable[[str], None], change: Callable[[], Answer]) -> Answer:
        """Make a change, as soon as the disk has room for it; ``remark`` is told why it has to wait."""
        while True:
            try:
                return change()
            except StateUnwritableError as error:
                remark(str(error))
                await asyncio.sleep(disk.LOOK_AGAIN_S)

    def task(self, data: Path, info: FleetInfo) -> Task:
        """The task at hand; if there is none, one is made of the next text, by name and round robin.

        Raises:
            FleetError: there is no text, or it is of a model that the fleet does not serve.
        """
        known = self.state.task
        if known is None or known.model not in (None, *(model.base for model in info.models)):
            texts = texts_of(data)
            path = texts[self.state.number % len(texts)]
            sha256, size = _hashed(path)
            name = f"{self.state.nonce}-{self.state.number}-{sha256[:12]}"
            file, model = path.relative_to(data).as_posix(), model_of(data, path, info).base
            task = Task(task=name, file=file, model=model, bytes=size, sha256=sha256)
            self.change(task=task, number=self.state.number + 1)
        assert self.state.task is not None
        return self.state.task

    def _read(self) -> State | None:
        try:
            return State.model_validate_json(self.path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ValidationError) as error:
            raise FleetError(
                f"{self.path}: damaged; delete it: the device then begins with its first text"
            ) from error


def texts_of(data: Path) -> list[Path]:
    """The texts of a data directory and of the folders in it, by their own names.

    Raises:
        FleetError: there is none, or one cannot be read.
    """
    try:
        folders = [data, *(path for path in data.iterdir() if path.is_dir())]
        inside = [path for folder in folders for path in folder.iterdir()]
        texts = [path for path in inside if path.suffix == ".txt" and path.is_file()]
    except OSError as error:
        raise FleetError(f"--data {data}: cannot be read: {error.strerror}; give a directory") from error
    if not texts:
        raise FleetError(f"--data {data}: holds no text; put files with names that end with .txt there")
    return sorted(texts, key=lambda path: (path.name, path))


def check_texts(data: Path) -> None:
    """Read every text once.

    Raises:
        FleetError: there is none, or one cannot be read, is empty or not UTF-8.
    """
    for path in texts_of(data):
        try:
            with path.open(encoding="utf-8") as file:
                blank = not any(line.strip() for line in file)
        except OSError as error:
            raise FleetError(f"--data {path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise FleetError(f"--data {path}: not UTF-8 text; convert it, or take it away") from error
        if blank:
            raise FleetError(f"--data {path}: holds no text; write some into it, or take it away")


def model_of(data: Path, text: Path, info: FleetInfo) -> ModelInfo:
    """The foundation model that a text is of: the one whose name its folder has, the first where it has none.

    Raises:
        FleetError: the fleet serves no model of that name.
    """
    if text.parent == data:
        return info
    folder = text.parent.name
    named = {name: model for model in info.models for name in (model.base[:12], model.called)}
    if folder not in named:
        names = ", ".join(model.called for model in info.models)
        raise FleetError(
            f"--data {text.parent}: the fleet serves no model {folder!r}, but {names}; give the folder such a name, or "
            f"put its texts directly into {data}, where they are of {info.called}"
        )
    return named[folder]


def unchanged(data: Path, task: Task) -> Path:
    """The file of a task.

    Raises:
        FleetError: it is no longer what was reported.
    """
    path = data / task.file
    if _hashed(path) != (task.sha256, task.bytes):
        raise FleetError(
            f"--data {path}: was changed after its task was reported; the next task takes it as it is"
        )
    return path


def _hashed(path: Path) -> tuple[str, int]:
    try:
        return hash_file(path)
    except OSError as error:
        raise FleetError(f"--data {path}: cannot be read: {error.strerror}") from error


def _boot() -> str:
    try:
        return _BOOT.read_text("ascii").strip()
    except OSError:
        return ""
