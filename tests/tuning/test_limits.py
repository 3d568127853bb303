"""A tokenizer, a block and a model that do not fit each other are refused at once, by every command alike."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import TEXT, VOCABULARY, catalogue_of, model_directory, recipe, tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CamembertConfig,
    CamembertForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)
from tuning_models import ARCHITECTURES, POSITIONS

from emutune.errors import EmutuneError, ModelError, UsageError
from emutune.tuning.adapters import AdapterManifest, save_adapter
from emutune.tuning.build import build_catalogue
from emutune.tuning.curve import calibrate
from emutune.tuning.foundation import positions
from emutune.tuning.plugging import plug
from emutune.tuning.reference import build_tokenizer
from emutune.tuning.text import block_length, fitting_block
from emutune.tuning.tuner import AdapterTraining, TuneConfig, tune

SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "pad_token_id": 1,
}
RESERVING = {
    "roberta": (RobertaConfig, RobertaForMaskedLM),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaForMaskedLM),
    "camembert": (CamembertConfig, CamembertForMaskedLM),
    "mpnet": (MPNetConfig, MPNetForMaskedLM),
    "esm": (EsmConfig, EsmForMaskedLM),
}


def reserving(family: str, table: int) -> PreTrainedModel:
    made, model = RESERVING[family]
    torch.manual_seed(0)
    config = made(**SIZE, max_position_embeddings=table, architectures=[model.__name__])
    return model(config).eval()


@pytest.mark.parametrize("family", RESERVING)
def test_reserved_positions_are_counted(family: str) -> None:
    model = reserving(family, table=34)
    assert positions(model.config) == 32
    tokens = torch.full((1, 33), 7)
    model(input_ids=tokens[:, :32])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=tokens)


def test_positions_of_other_architectures(architecture: str) -> None:
    config = ARCHITECTURES[architecture]().config
    assert positions(config) == (None if architecture == "bloom" else POSITIONS)


def test_blocks_are_as_long_as_the_model_takes() -> None:
    config = reserving("roberta", table=130).config
    assert block_length(config) == fitting_block(config, 512) == block_length(config, 128) == 128
    with pytest.raises(UsageError, match=r"^the model has 128 positions; give --block 128 or less$"):
        block_length(config, 129)
    free = ARCHITECTURES["bloom"]().config
    assert (block_length(free), block_length(free, 1000), fitting_block(free, 1000)) == (256, 1000, 1000)


def test_model_that_reserves_positions_is_built_and_tuned(tmp_path: Path) -> None:
    source = tmp_path / "model"
    reserving("roberta", table=66).save_pretrained(source)
    tokenizer().save_pretrained(source)
    catalogue = catalogue_of(tmp_path, made=recipe(retentions=(0.25, 0.5, 1.0)))
    assert len(catalogue.emulators()) == 3
    for call in (
        lambda: tune(catalogue, TEXT, TuneConfig(block=65), tmp_path / "a.safetensors"),
        lambda: calibrate(catalogue, TEXT, AdapterTraining(block=65)),
    ):
        with pytest.raises(UsageError, match="64 positions; give --block 64"):
            call()


def _no_mask(directory: Path) -> str:
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SIZE)).save_pretrained(directory)
    build_tokenizer(TEXT, vocabulary=300).save_pretrained(directory)
    return "the model fills masked tokens, its tokenizer has no mask token; set tokenizer.mask_token and save"


def _too_many_tokens(directory: Path) -> str:
    model_directory(directory)
    made = build_tokenizer(TEXT, vocabulary=300)
    made.add_tokens([f"<|{number}|>" for number in range(VOCABULARY + 1 - len(made))], special_tokens=True)
    made.save_pretrained(directory)
    return (
        f"the tokenizer has tokens up to {VOCABULARY}, the model's embedding {VOCABULARY} rows; "
        "resize_token_embeddings and save"
    )


@pytest.mark.parametrize("spoil", [_no_mask, _too_many_tokens])
def test_tokenizers_that_do_not_fit_are_refused_everywhere(spoil: Any, tmp_path: Path) -> None:
    source, adapter = tmp_path / "model", tmp_path / "a.safetensors"
    message = re.escape(spoil(source))
    with pytest.raises(ModelError, match=message):
        build_catalogue(source, tmp_path / "catalogue", recipe(), TEXT)
    assert not (tmp_path / "catalogue").exists()
    save_adapter(
        adapter,
        AdapterManifest(
            base="", layers=6, layer_map=(0, 5), kind="layers", width=0, retention=0.5, emulator="e"
        ),
        {},
    )
    with pytest.raises(ModelError, match=message):
        plug(source, adapter, tmp_path / "out", TEXT)
    # A catalogue that got such a tokenizer in another way.
    architecture = "bert" if spoil is _no_mask else "gpt2"
    catalogue = catalogue_of(tmp_path / "good", architecture, recipe(retentions=(0.25, 0.5, 1.0)))
    for file in source.glob("*token*"):
        (catalogue.directory / "tokenizer" / file.name).write_bytes(file.read_bytes())
    for call in (
        lambda: tune(catalogue, TEXT, TuneConfig(), tmp_path / "b.safetensors"),
        lambda: calibrate(catalogue, TEXT),
    ):
        with pytest.raises(EmutuneError, match=message):
            call()
