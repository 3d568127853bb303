"""How emulators are made."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from emutune.tuning.compression.distill import DISTILLATION
from emutune.tuning.inventory import FRONTIER
from emutune.tuning.manifest import Method, Order
from emutune.tuning.trainer import TrainerConfig


class Recipe(BaseModel):
    """How emulators are made.

    Attributes:
        methods: applied in the order layer_drop, prune, distill, quantize. With layer_drop an emulator's
            retention is its share of layers; without, the share of heads and channels that pruning leaves.
        retentions: which to make; all k/n if not given.
        calibration_tokens: of the text, on which the order by loss is found.
        bottom, top: adapter layers at either end.
        width_share: heads and channels that pruning leaves in an emulator that also lost layers.
        bits: of quantised weights.
        frontier: makes each emulator three times, as it is and rounded to 8 and to ``bits``, and levels of those that
            no other of the catalogue beats.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: tuple[Method, ...] = Field(default=("layer_drop",), min_length=1)
    order: Order = "loss"
    calibration_tokens: int = Field(default=512, ge=1)
    retentions: tuple[float, ...] | None = None
    bottom: int = Field(default=2, ge=0)
    top: int = Field(default=2, ge=0)
    width_share: float = Field(default=0.75, gt=0, le=1)
    bits: Literal[3, 4, 8] = 4
    seed: int = Field(default=0, ge=0)
    distillation: TrainerConfig = DISTILLATION
    frontier: bool = False

    @property
    def made(self) -> tuple[Recipe, ...]:
        """The recipes that are made: itself, or those whose emulators compete."""
        if not self.frontier:
            return (self,)
        plain = self.without("quantize").model_copy(update={"frontier": False})
        rounded = {"methods": (*plain.methods, "quantize")}
        return (
            plain,
            *(plain.model_copy(update=rounded | {"bits": bits}) for bits in sorted({8, self.bits})),
        )

    @property
    def label(self) -> str:
        """What tells the recipe from others in the same catalogue."""
        if self.frontier:
            return FRONTIER
        words: dict[Method, str] = {
            "layer_drop": f"layer_drop-{self.order}",
            "prune": f"prune-{self.width_share:g}" if "layer_drop" in self.methods else "prune",
            "distill": f"distill-{self.distillation.steps}-{self.seed}{self._distillation_mark}",
            # Below 8 bits, the name says that rounding compensates for its errors.
            "quantize": f"quantize-{self.bits}" if self.bits == 8 else f"gptq-{self.bits}",
        }
        return "+".join(text for method, text in words.items() if method in self.methods)

    def without(self, method: Method) -> Recipe:
        """The same without a method."""
        return self.model_copy(update={"methods": tuple(one for one in self.methods if one != method)})

    @property
    def _distillation_mark(self) -> str:
        """Empty if only the steps differ from the default."""
        if self.distillation == DISTILLATION.model_copy(update={"steps": self.distillation.steps}):
            return ""
        return "-" + hashlib.sha256(self.distillation.model_dump_json().encode()).hexdigest()[:8]
