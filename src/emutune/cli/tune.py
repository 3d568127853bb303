"""The commands around adapters: ``tune`` and ``plug``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emutune.cli.grouped import grouped
from emutune.cli.libraries import quiet_libraries
from emutune.cli.options import (
    CatalogueArgument,
    Data,
    JsonFile,
    Learning,
    ModelArgument,
    RecipeName,
    Seed,
    chosen,
    validated,
)
from emutune.cli.terminal import advance, going_on, interruptible, print_table, stage_bar, write_json
from emutune.errors import UsageError

if TYPE_CHECKING:
    from emutune.tuning.tuner import TuneConfig


@dataclass(frozen=True)
class Tuning:
    """Options of what is tuned and how."""

    retention: Annotated[float, typer.Option(help="Of the emulator to train against.")] = 0.5
    adapter: Annotated[str, typer.Option(help="layers, lora or bottleneck.")] = "layers"
    where: Annotated[str, typer.Option(help="device (the emulator) or server (the whole model).")] = "device"
    server_model: Annotated[
        str, typer.Option(help="With --where server: full, or cached for the device's emulator.")
    ] = "full"
    width: Annotated[int, typer.Option(min=1, help="Rank of LoRA, width of bottlenecks.")] = 8
    steps: Learning = 120
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 1e-3
    batch: Annotated[int, typer.Option(min=1, help="Blocks in one forward pass.")] = 8
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes a step.")] = 1
    block: Annotated[int | None, typer.Option(min=8, help="Tokens in a block; 256 if not given.")] = None
    recipe: RecipeName = None
    seed: Seed = 0

    def config(self) -> TuneConfig:
        """The configuration that they say."""
        from emutune.tuning.trainer import TrainerConfig
        from emutune.tuning.tuner import TuneConfig

        given = asdict(self)
        trained = {name: given.pop(name) for name in TrainerConfig.model_fields.keys() & given.keys()}
        score_every = max(1, min(20, self.steps // 4))
        return validated(
            TuneConfig, **given, training=validated(TrainerConfig, **trained, score_every=score_every)
        )


@grouped
def tune(
    directory: CatalogueArgument,
    data: Data,
    tuning: Tuning,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[
        Path, typer.Option(help="The adapter; one that is there is where training starts.")
    ] = Path("adapter.safetensors"),
    json_file: JsonFile = None,
) -> None:
    """Tune an adapter; it is kept only if the whole model with it plugged in gets better."""
    quiet_libraries("tuning", "tune")
    from emutune.tuning.catalogue import open_catalogue
    from emutune.tuning.text import read_text
    from emutune.tuning.tuner import tune as run_tuning

    config = tuning.config()
    usable(device)
    opened, text = open_catalogue(directory), read_text(data)
    with going_on(out), stage_bar() as stage:
        result = run_tuning(
            opened,
            text,
            config,
            out,
            device=device,
            report=lambda progress: advance(stage, "tuning", progress, tuning.steps),
        )
    print_table(
        ("perplexity, test text", "before", "after"),
        [
            ("plugged into the whole model", f"{result.before:.2f}", f"{result.after:.2f}"),
            (
                f"emulator at {result.retention:.3f}",
                f"{result.emulator_before:.2f}",
                f"{result.emulator_after:.2f}",
            ),
        ],
    )
    print(f"{result.trainable:,} parameters trained, {result.tokens_per_s:,.0f} tokens/s")
    print(
        f"accepted: {out}"
        if result.accepted
        else "rejected: plugged in, no state was better; nothing was written"
    )
    write_json(json_file, asdict(result) | {"adapter": str(out) if result.accepted else None})


def plug(
    model: ModelArgument,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="From emutune tune.")],
    out: Annotated[Path, typer.Option(help="A new directory, which transformers or PEFT loads.")],
    data: Annotated[
        Path | None, typer.Option(help="Text to evaluate on; a worse model is not written.")
    ] = None,
    form: Annotated[
        str, typer.Option("--as", help="model, or peft for the adapter alone (of kind lora).")
    ] = "model",
    json_file: JsonFile = None,
) -> None:
    """Write the foundation model with an adapter plugged in, once it was evaluated."""
    quiet_libraries("tuning", "plug")
    from emutune.tuning.plugging import FORMS
    from emutune.tuning.plugging import plug as run_plug
    from emutune.tuning.text import read_text

    chosen(form, "--as", FORMS)
    wanted: Any = form
    with interruptible(f"{out} was not written"), stage_bar() as stage:
        stage("evaluating", 0, 1)
        plugged = run_plug(model, adapter, out, None if data is None else read_text(data), wanted)
    print(f"perplexity {plugged.before:.2f} before, {plugged.after:.2f} plugged in; written to {out}")
    write_json(json_file, {**plugged._asdict(), "out": str(out)})


def usable(device: str) -> None:
    """Refuse a device that is unknown, or that this machine does not have."""
    import torch

    chosen(device.partition(":")[0], "--device", ("cpu", "cuda"))
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {device}: cannot be used ({str(error).splitlines()[0]}); choose cpu"
        ) from error
