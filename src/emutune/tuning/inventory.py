"""What a catalogue holds: its description and its manifests, read without its tensors, and so without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from emutune.errors import CatalogueError
from emutune.tuning.adapter_manifest import AdapterManifest, Asked, Kind, Shape, shapes_at
from emutune.tuning.manifest import Emulator

BASE = "base"
# The recipe of the levels that were chosen among the emulators of all others.
FRONTIER = "frontier"
Content = TypeVar("Content", bound=BaseModel)


class CatalogueInfo(BaseModel):
    """``catalogue.json``: the model a catalogue belongs to.

    Attributes:
        base: the model's hash.
        config: its transformers configuration.
        layers: how many layers it has.
        bottom, top: how many of them are adapter layers at either end.
        text: SHA-256 of the calibration text.
        importance: the middle layers by falling importance, once measured: the emulator that keeps k of
            them keeps the first k.
        spared: the middle layers in the order in which they can be spared by the loss, as far as it was needed yet.
        recipe: of the emulators built last.
        adapters: by the kinds of adapter that the adapter layers can take, the shapes of its tensors by their names,
            in which ``WIDTH`` stands for its width; empty on a device, which needs none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal["1"] = "1"
    base: str
    config: dict[str, Any]
    layers: int
    bottom: int
    top: int
    text: str
    importance: tuple[int, ...] | None = None
    spared: tuple[int, ...] = ()
    recipe: str = ""
    adapters: dict[Kind, dict[str, Shape]] = {}

    @property
    def middle(self) -> range:
        """Indices of the layers between the adapter layers."""
        return range(self.bottom, self.layers - self.top)

    @property
    def adapter_layers(self) -> tuple[int, ...]:
        """Indices of the adapter layers."""
        return tuple(index for index in range(self.layers) if index not in self.middle)


class Inventory:
    """A catalogue directory as somebody sees it who hands its files out; see ``open_inventory``.

    Args:
        directory: where it is.
        info: its description.
        shards: the folder of its shards; ``shards`` in its directory if not given.
    """

    def __init__(self, directory: Path, info: CatalogueInfo, shards: Path | None = None) -> None:
        self.directory = directory
        self.info = info
        self.shards = directory / "shards" if shards is None else shards

    def shard_path(self, sha256: str) -> Path:
        """Where a shard is."""
        return self.shards / f"{sha256}.safetensors"

    def manifest_path(self, name: str) -> Path:
        """Where an emulator's manifest is."""
        return self.directory / "emulators" / f"{name}.json"

    def emulator(self, name: str) -> Emulator | None:
        """The emulator of a name, if the catalogue has it.

        Raises:
            CatalogueError: its manifest is damaged.
        """
        path = self.manifest_path(name)
        return _read(path, Emulator) if path.exists() else None

    def emulators(self, recipe: str | None = None) -> list[Emulator]:
        """The emulators of a recipe, of the one built last if not given, by rising retention."""
        wanted = self.info.recipe if recipe is None else recipe
        return [emulator for emulator in self.all_emulators() if emulator.recipe == wanted]

    def all_emulators(self) -> list[Emulator]:
        """Those of all recipes, by rising retention, the whole model among them."""
        found = [_read(path, Emulator) for path in (self.directory / "emulators").glob("*.json")]
        return sorted(found, key=lambda emulator: (emulator.retention, emulator.name))

    def find(self, retention: float, recipe: str | None = None) -> Emulator:
        """The emulator whose retention is nearest.

        Raises:
            CatalogueError: the retention is outside (0, 1], or there is no emulator of that recipe.
        """
        if not 0 < retention <= 1:
            raise CatalogueError(f"retention: must be above 0 and at most 1, got {retention:g}")
        emulators = self.emulators(recipe)
        if not emulators:
            raise CatalogueError(
                f"{self.directory}: no emulators of recipe {recipe or self.info.recipe!r}; run emutune catalogue build"
            )
        return min(emulators, key=lambda emulator: abs(emulator.retention - retention))

    def base(self) -> Emulator:
        """The whole model as an emulator: retention 1, nothing compressed.

        Raises:
            CatalogueError: the catalogue was never finished.
        """
        emulator = self.emulator(BASE)
        if emulator is None:
            raise CatalogueError(f"{self.directory}: not finished; run emutune catalogue build again")
        return emulator

    def adapter_manifest(self, emulator: Emulator, kind: Kind, width: int) -> AdapterManifest:
        """The manifest of an adapter that is to be tuned against an emulator; whole layers have no width."""
        return AdapterManifest(
            base=self.info.base,
            layers=self.info.layers,
            layer_map=self.info.adapter_layers,
            kind=kind,
            width=0 if kind == "layers" else width,
            retention=emulator.retention,
            emulator=emulator.name,
        )

    def asked(self, emulator: Emulator, kind: Kind, width: int) -> Asked:
        """What such an adapter's file must be.

        Raises:
            CatalogueError: this model takes no adapter of that kind, or nobody noted what one is made of.
        """
        form = self.info.adapters.get(kind)
        if form is None:
            known = ", ".join(self.info.adapters)
            raise CatalogueError(
                f"{self.directory}: does not say what an adapter of kind {kind} is made of; "
                + (f"choose one of {known}" if known else "run emutune catalogue build again, which adds it")
            )
        return Asked(self.adapter_manifest(emulator, kind, width), shapes_at(form, width))


def open_inventory(directory: str | Path) -> Inventory:
    """Open a catalogue for reading what it holds.

    Raises:
        CatalogueError: there is none, or its description is damaged.
    """
    return Inventory(Path(directory), read_info(directory))


def read_info(directory: str | Path) -> CatalogueInfo:
    """The description of a catalogue.

    Raises:
        CatalogueError: there is none, or it is damaged.
    """
    path = Path(directory) / "catalogue.json"
    if not path.is_file():
        raise CatalogueError(f"{directory}: no catalogue; make one with emutune catalogue build")
    return _read(path, CatalogueInfo)


def _read(path: Path, kind: type[Content]) -> Content:
    try:
        return kind.model_validate_json(path.read_text("utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        raise CatalogueError(
            f"{path}: damaged ({str(error).splitlines()[0]}); build the catalogue again"
        ) from error
