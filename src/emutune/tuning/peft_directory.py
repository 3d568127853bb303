"""A trained adapter as a directory that PEFT loads onto the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from emutune.errors import AdapterError
from emutune.tuning.adapter_manifest import AdapterManifest
from emutune.tuning.adapters import LORA_SCALE

# How PEFT names a module of the model that it wraps, and the one adapter that there is.
_WRAPPED = "base_model.model."
_ADAPTER = ".default."


def check_peft_holds(manifest: AdapterManifest) -> None:
    """Refuse an adapter that PEFT has no form for.

    Raises:
        AdapterError: it is not LoRA.
    """
    if manifest.kind != "lora":
        raise AdapterError(
            f"adapter: is of kind {manifest.kind}, which PEFT cannot hold; tune with --adapter lora, or plug it into "
            "a model directory (--as model)"
        )


def write_peft(
    out: Path,
    manifest: AdapterManifest,
    values: Mapping[str, Tensor],
    stack: str,
    *,
    transposed: bool,
    base: str,
) -> None:
    """Write LoRA as ``PeftModel.from_pretrained`` reads it.

    Args:
        out: a directory that does not exist.
        manifest: of the adapter.
        values: its tensors, by ``<index of the layer>.<name in the layer>``.
        stack: dotted name of the model's layer stack.
        transposed: whether the maps are GPT-2's.
        base: where the model is, which PEFT notes.

    Raises:
        OSError: it cannot be written.
        SafetensorError: the same of the weights.
    """
    tensors = {
        f"{_WRAPPED}{stack}.{name.replace(_ADAPTER, '.')}": value.contiguous()
        for name, value in values.items()
    }
    # Whole names, so that no map of another layer is meant.
    maps = sorted({f"{stack}.{name.rpartition('.lora_')[0]}" for name in values})
    config = LoraConfig(
        r=manifest.width,
        lora_alpha=LORA_SCALE * manifest.width,
        target_modules=maps,
        fan_in_fan_out=transposed,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    out.mkdir(parents=True)
    config.save_pretrained(str(out))
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
