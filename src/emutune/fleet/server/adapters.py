"""The adapters of a fleet as files, each named by its content."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from emutune.tuning.adapter_manifest import check_belongs, read_manifest
from emutune.tuning.inventory import CatalogueInfo


@dataclass(frozen=True)
class Adapters:
    """A directory of adapters, which must exist before one is kept."""

    directory: Path

    def path(self, sha256: str) -> Path:
        """Where an adapter is."""
        return self.directory / f"{sha256}.safetensors"

    def keep(self, path: Path, info: CatalogueInfo) -> str:
        """Move an adapter to where it is named by its content; returns its SHA-256.

        Args:
            path: its file.
            info: of the foundation model that it is to belong to.

        Raises:
            AdapterError: it belongs to another model, or to other layers.
        """
        manifest = read_manifest(path)
        check_belongs(manifest, base=info.base, layers=info.layers, layer_map=info.adapter_layers)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        # As new as if it had been written now, though a kill may have come after it was.
        os.utime(path)
        os.replace(path, self.path(sha256))
        return sha256
