"""The whole model in its catalogue, of which all emulators are made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from emutune.errors import CatalogueError
from emutune.tuning.catalogue import Catalogue, open_catalogue
from emutune.tuning.foundation import Foundation, combine_digests, unit_digest
from emutune.tuning.inventory import BASE, CatalogueInfo
from emutune.tuning.manifest import Emulator, LayerEntry


def catalogue_for(foundation: Foundation, out: Path, bottom: int, top: int, text: str) -> Catalogue:
    """The catalogue of a model in a directory, a new one if there is none; nothing is written.

    Args:
        foundation: the model.
        out: the catalogue's directory.
        bottom: adapter layers below its middle.
        top: adapter layers above.
        text: what its emulators are measured on.

    Raises:
        CatalogueError: the directory holds the catalogue of another model, layers or text.
    """
    digests = [unit_digest(unit) for unit in foundation.units()]
    # Where the model was is no part of it.
    config = {key: value for key, value in foundation.config.to_dict().items() if key != "_name_or_path"}
    info = CatalogueInfo(
        base=combine_digests(foundation.config, digests),
        # As a device reads it, so that what is compared with transformers is what devices assemble.
        config=json.loads(json.dumps(config)),
        layers=len(foundation.layers),
        bottom=bottom,
        top=top,
        text=hashlib.sha256(text.encode()).hexdigest(),
    )
    if not (out / "catalogue.json").exists():
        return Catalogue(out, info)
    catalogue = open_catalogue(out)
    for field in ("base", "bottom", "top", "text"):
        if (found := getattr(catalogue.info, field)) != (wanted := getattr(info, field)):
            raise CatalogueError(
                f"{out}: belongs to another build: {field} is {found} there and {wanted} here; choose another --out"
            )
    return catalogue


def save_base(foundation: Foundation, catalogue: Catalogue, seed: int) -> None:
    """Put the whole model into a catalogue, one layer in memory at a time.

    Raises:
        CatalogueError: it cannot be written.
    """
    catalogue.save_info()
    outer, *layers = [catalogue.save_shard(unit) for unit in foundation.units()]
    catalogue.save_emulator(
        Emulator(
            base=catalogue.info.base,
            name=BASE,
            recipe=BASE,
            method=(),
            order=None,
            retention=1.0,
            kept=tuple(catalogue.info.middle),
            seed=seed,
            outer=outer,
            layers=tuple(LayerEntry(index=index, shard=shard) for index, shard in enumerate(layers)),
        )
    )
