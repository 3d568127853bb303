"""Where an emulator, or what was tuned in one, is not to be trusted."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from emutune.tuning.inventory import Inventory
from emutune.tuning.manifest import Emulator

log = logging.getLogger(__name__)

# Of the whole model's perplexity: 1.6 nats a token, about what separates a model from one a hundred times smaller.
WORST_MULTIPLE = 5.0
# Of a training's steps, at either end, over which its loss is compared.
_END_SHARE = 0.2


def doubt(emulator: Emulator, whole: Emulator) -> str | None:
    """Why an emulator is no language model to tune in: more than five times the whole's perplexity; None if it is."""
    if emulator.perplexity is None or whole.perplexity is None:
        return None
    multiple = emulator.perplexity / whole.perplexity
    if multiple <= WORST_MULTIPLE:
        return None
    return (
        f"{emulator.name}: is no language model: its perplexity of {emulator.perplexity:.4g} on calibration text is "
        f"{multiple:.3g} times the whole model's {whole.perplexity:.4g}, and more than {WORST_MULTIPLE:g} times is too "
        "much to tune in; distil it (--compress layer_drop,distill), keep more layers, or round them instead "
        "(--compress layer_drop,quantize)"
    )


def warn_of(inventory: Inventory, recipe: str) -> None:
    """Warn of the emulators of a recipe that are no language models."""
    whole = inventory.base()
    for emulator in inventory.emulators(recipe):
        if (why := doubt(emulator, whole)) is not None:
            log.warning("%s", why)


def misled(losses: Sequence[float], plugged: dict[int, float]) -> bool:
    """Whether a training's loss in the emulator fell while what it taught made the whole model worse.

    Args:
        losses: of each step, in the emulator.
        plugged: perplexity of the whole model with the adapter, by step; that of step 0 is from before.
    """
    count = max(1, round(_END_SHARE * len(losses)))
    fell = sum(losses[-count:]) < sum(losses[:count])
    return fell and not plugged[max(plugged)] <= plugged[0]


def warn_misled(emulator: Emulator, plugged: dict[int, float]) -> None:
    """Warn of an emulator whose loss did not point the way of the whole model's."""
    log.warning(
        "%s: its loss does not point the way of the whole model's: training lowered it, and the whole model's "
        "perplexity with the adapter plugged in went from %.4g to %.4g; take an emulator of lower perplexity (a higher "
        "--retention, or one distilled), a lower --learning-rate, or fewer --steps",
        emulator.name,
        plugged[0],
        plugged[max(plugged)],
    )
