"""What the emulators of a catalogue cost and are worth, and which of them no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emutune.tuning.catalogue import Catalogue, prepare_layer
from emutune.tuning.foundation import skeleton
from emutune.tuning.inventory import FRONTIER
from emutune.tuning.layers import empty_copy, layer_stack, stack_name
from emutune.tuning.manifest import Emulator, LayerEntry, missing

# Perplexities nearer than that are one: what calibration text can tell apart.
_SAME = 1.01
_SINGLE_BYTES = 4
# Weight, gradient and AdamW's two moments.
_TRAINED = 4


@dataclass(frozen=True)
class Level:
    """An emulator, what it costs and what it is worth.

    Attributes:
        bytes: to send it to a device that has nothing.
        memory_bytes: to train in it on a CPU: weights, and of the adapter layers gradients and moments, in single
            precision; rounded weights as they are stored. Activations, which depend on the batch, come on top.
        operations: floating-point ones of a token on its way through all layers and the head, two for each weight.
        perplexity: on the calibration text.
    """

    emulator: Emulator
    bytes: int
    memory_bytes: int
    operations: int
    perplexity: float

    def beats(self, other: Level) -> bool:
        """Whether it costs no more in anything, is worth no less, and is better in something.

        A perplexity that is less than one per cent higher is not worse.
        """
        costs, others = self._costs, other._costs
        return (
            all(cost <= another for cost, another in zip(costs, others, strict=True))
            and self.perplexity <= _SAME * other.perplexity
            and (costs != others or self.perplexity < other.perplexity)
        )

    @property
    def _costs(self) -> tuple[int, int, int]:
        return self.bytes, self.memory_bytes, self.operations


def levels(catalogue: Catalogue) -> list[Level]:
    """All emulators of a catalogue whose perplexity was measured, of whatever recipe, the whole model among them."""
    sizes = _Sizes(catalogue)
    return [
        Level(one, one.bytes, sizes.memory_bytes(one), sizes.operations(one), one.perplexity)
        for one in catalogue.all_emulators()
        if one.perplexity is not None and one.recipe != FRONTIER
    ]


def frontier(found: Sequence[Level]) -> list[Level]:
    """The levels that no other beats, by rising bytes; of two that are made of the same shards, the first."""
    distinct = {frozenset(level.emulator.shards): level for level in reversed(found)}.values()
    kept = [level for level in distinct if not any(other.beats(level) for other in distinct)]
    return sorted(kept, key=lambda level: (level.bytes, level.operations, level.perplexity))


def ladder(kept: Sequence[Level]) -> list[Level]:
    """At most one level for each number of layers, by rising number: the one for which least has to be sent.

    So each level extends the one below, where one does. Those that are worth no more than the one below are left out.

    Args:
        kept: levels of which none beats another.
    """
    steps: list[Level] = []
    for count in sorted({len(level.emulator.layers) for level in kept}):
        below = steps[-1].emulator if steps else None
        better = [
            level
            for level in kept
            if len(level.emulator.layers) == count and (not steps or level.perplexity < steps[-1].perplexity)
        ]
        if better:
            steps.append(min(better, key=lambda level: (_sent(below, level.emulator), level.perplexity)))
    return steps


def _sent(below: Emulator | None, emulator: Emulator) -> int:
    return sum(missing(below, emulator).values())


def save_ladder(catalogue: Catalogue) -> None:
    """Make the ladder of a catalogue's frontier the levels of its recipe ``frontier``, in place of earlier ones.

    Raises:
        CatalogueError: it cannot be written.
    """
    chosen = [level.emulator for level in ladder(frontier(levels(catalogue)))]
    renamed = [
        one.model_copy(update={"name": f"{FRONTIER}-{one.retention:.4f}", "recipe": FRONTIER})
        for one in chosen
    ]
    for emulator in renamed:
        if catalogue.emulator(emulator.name) != emulator:
            catalogue.save_emulator(emulator)
    names = {emulator.name for emulator in renamed}
    for emulator in catalogue.emulators(FRONTIER):
        if emulator.name not in names:
            catalogue.manifest_path(emulator.name).unlink()


class _Sizes:
    """Numbers of weights in the parts of a model, by which they are compressed."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        model = skeleton(catalogue.config)
        self._stack = layer_stack(model)
        # What is tied to another tensor takes no memory of its own.
        apart = (stack_name(model) + ".", *model.all_tied_weights_keys)
        self._outer = sum(
            parameter.numel() for name, parameter in model.named_parameters() if not name.startswith(apart)
        )
        head = model.get_output_embeddings()
        self._head = sum(parameter.numel() for parameter in head.parameters()) if head is not None else 0
        self._known: dict[tuple[int, object], int] = {}

    def memory_bytes(self, emulator: Emulator) -> int:
        total = _SINGLE_BYTES * self._outer
        adapters = self.catalogue.info.adapter_layers
        for entry in emulator.layers:
            if entry.bits is not None:
                total += entry.shard.bytes
            else:
                held = _TRAINED if entry.index in adapters else 1
                total += held * _SINGLE_BYTES * self._weights(entry)
        return total

    def operations(self, emulator: Emulator) -> int:
        return 2 * (self._head + sum(self._weights(entry) for entry in emulator.layers))

    def _weights(self, entry: LayerEntry) -> int:
        """Of a layer, whatever their bits."""
        key = (entry.index, entry.widths)
        if key not in self._known:
            layer = empty_copy(self._stack[entry.index])
            prepare_layer(layer, entry.model_copy(update={"bits": None}), self.catalogue.heads)
            self._known[key] = sum(parameter.numel() for parameter in layer.parameters())
        return self._known[key]
