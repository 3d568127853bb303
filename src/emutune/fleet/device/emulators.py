"""Which emulators a device holds as a whole: one of each foundation model, and which was used last.

CACHE/held.json             the models that were used, the last first, each with its emulator's manifest or null
CACHE/models/<base>/        of one model: catalogue.json and tokenizer/ as a catalogue has them, and its newest adapter
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from emutune.errors import FleetError
from emutune.fleet.device.files import write_durably
from emutune.fleet.protocol import Sha256

Manifest = dict[str, Any]
# Where a device noted its emulator that knew of one model.
_ALONE = "current.json"


class _Shard(BaseModel):
    sha256: Sha256
    bytes: int = Field(ge=1)


class _Layer(BaseModel):
    shard: _Shard


class _Manifest(BaseModel):
    """What of an emulator's manifest concerns a cache; the rest needs torch to be read."""

    base: Sha256
    name: str = Field(min_length=1, max_length=200)
    outer: _Shard
    layers: list[_Layer] = Field(min_length=1)


class _Used(BaseModel):
    base: Sha256
    emulator: Manifest | None


_USED = TypeAdapter(list[_Used])


def shards_of(emulator: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each distinct shard of an emulator, by its SHA-256.

    Args:
        emulator: its manifest, as JSON of ``emutune.tuning.manifest.Emulator``.

    Raises:
        FleetError: it is no manifest.
    """
    try:
        manifest = _Manifest.model_validate(emulator)
    except ValidationError as error:
        first = error.errors()[0]
        raise FleetError(f"emulator.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return {
        shard.sha256: shard.bytes for shard in (manifest.outer, *(layer.shard for layer in manifest.layers))
    }


def model_folder(cache: Path, base: str) -> Path:
    """Where a cache keeps what is of one foundation model alone."""
    return cache / "models" / base


class Emulators:
    """The emulators of a cache.

    Attributes:
        used: manifests by the base of their model, the model used last first; None where an emulator made room.
    """

    def __init__(self, directory: Path) -> None:
        self.used: dict[str, Manifest | None] = {}
        self._path, self._directory = directory / "held.json", directory

    @property
    def whole(self) -> dict[str, Manifest]:
        """Those that are there, the last used first."""
        return {base: emulator for base, emulator in self.used.items() if emulator is not None}

    def read(self, held: Collection[str]) -> None:
        """Read what is on disk; emulators some of whose shards are not held are not there."""
        self.used = {
            base: emulator if emulator is not None and _complete(emulator, held) else None
            for base, emulator in self._noted()
        }

    def use(self, emulator: Manifest) -> None:
        """An emulator that is there as a whole is the one used last, in the place of its model's other one."""
        base = emulator["base"]
        if next(iter(self.used.items()), None) != (base, emulator):
            others = {other: manifest for other, manifest in self.used.items() if other != base}
            self._write({base: dict(emulator), **others})

    def give_up(self, leaving: Collection[str]) -> None:
        """Some shards are about to go, and the emulators with them: what the disk names is there as a whole."""
        used = {
            base: None if emulator is None or leaving & shards_of(emulator).keys() else emulator
            for base, emulator in self.used.items()
        }
        if used != self.used:
            self._write(used)

    def serve(self, bases: Collection[str]) -> None:
        """Forget the models that are not among these."""
        used = {base: emulator for base, emulator in self.used.items() if base in bases}
        if used != self.used:
            self._write(used)

    def _write(self, used: dict[str, Manifest | None]) -> None:
        rows = [{"base": base, "emulator": emulator} for base, emulator in used.items()]
        write_durably(self._path, json.dumps(rows))
        (self._directory / _ALONE).unlink(missing_ok=True)
        self.used = used

    def _noted(self) -> list[tuple[str, Manifest | None]]:
        try:
            return [(row.base, row.emulator) for row in _USED.validate_json(self._path.read_text("utf-8"))]
        except FileNotFoundError:
            return self._noted_alone()
        except (OSError, ValueError):
            return []

    def _noted_alone(self) -> list[tuple[str, Manifest | None]]:
        """What a device noted that knew of one model."""
        try:
            emulator: Manifest = json.loads((self._directory / _ALONE).read_text("utf-8"))
            shards_of(emulator)
        except (OSError, ValueError, FleetError):
            return []
        return [(emulator["base"], emulator)]


def _complete(emulator: Manifest, held: Collection[str]) -> bool:
    try:
        return shards_of(emulator).keys() <= set(held)
    except FleetError:
        return False
