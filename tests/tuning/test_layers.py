"""Cut models against models that were built small, for every architecture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from tuning_models import ARCHITECTURES, LAYERS, tokens

from emutune.errors import ModelError
from emutune.tuning.layers import keep_layers, layer_stack, shorten_config, stack_name, text_config, view

STACKS = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "bloom": "transformer.h",
    "bert": "bert.encoder.layer",
}
CAUSAL = sorted(set(ARCHITECTURES) - {"bert"})
KEPT = [0, 2, 5]
TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

every_architecture = pytest.mark.parametrize("name", sorted(ARCHITECTURES))


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: build() for name, build in ARCHITECTURES.items()}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    options = {"use_cache": False} if is_causal(model) else {}
    return model(input_ids=tokens(), **options).logits


def is_causal(model: PreTrainedModel) -> bool:
    return not type(model).__name__.endswith("MaskedLM")


def positions(model: PreTrainedModel) -> list[set[int]]:
    """What the parts of each layer take for the position of the layer."""
    return [
        {
            module.layer_idx
            for module in layer.modules()
            if isinstance(getattr(module, "layer_idx", None), int)
        }
        for layer in layer_stack(model)
    ]


def built_small(model: PreTrainedModel, kept: list[int], **changes: Any) -> PreTrainedModel:
    """A new model with fewer layers, its weights copied name by name."""
    config = copy.deepcopy(model.config)
    changes[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    if config.model_type == "qwen2":
        changes.setdefault("layer_types", ["full_attention"] * len(kept))
    small = type(model)(type(config).from_dict(config.to_dict() | changes))
    prefix = STACKS[config.model_type] + "."
    weights = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(prefix):
            weights[name] = tensor
            continue
        index, rest = name.removeprefix(prefix).split(".", 1)
        if int(index) in kept:
            weights[f"{prefix}{kept.index(int(index))}.{rest}"] = tensor
    small.load_state_dict(weights, strict=True)
    return small.eval()


@every_architecture
def test_the_stack_is_found(models, name):
    assert stack_name(models[name]) == STACKS[name]
    assert len(layer_stack(models[name])) == LAYERS


@every_architecture
def test_all_layers_are_the_model(models, name):
    model = models[name]
    cut = keep_layers(model, range(LAYERS))
    assert torch.equal(logits(cut), logits(model))
    assert cut.config.to_dict() == model.config.to_dict()


@every_architecture
@pytest.mark.parametrize("kept", [KEPT, [1, 4], [3]])
def test_some_layers_are_the_model_that_is_built_of_them(models, name, kept):
    model = models[name]
    cut, small = keep_layers(model, kept), built_small(model, kept)
    assert torch.equal(logits(cut), logits(small))
    assert not torch.equal(logits(cut), logits(model))
    assert {key: value.shape for key, value in cut.state_dict().items()} == {
        key: value.shape for key, value in small.state_dict().items()
    }
    assert cut.config.to_dict() == small.config.to_dict() | {"dtype": cut.config.to_dict()["dtype"]}
    assert positions(cut) == positions(small)


@every_architecture
def test_parameters_are_shared_and_the_model_stays_as_it_was(models, name):
    model = models[name]
    before = (model.config.to_dict(), logits(model), positions(model), list(model.state_dict()))
    layers = list(layer_stack(model))
    cut = keep_layers(model, KEPT)

    own, shared = dict(model.named_parameters()), list(cut.parameters())
    assert {id(parameter) for parameter in shared} < {id(parameter) for parameter in own.values()}
    for position, index in enumerate(KEPT):
        for mine, theirs in zip(
            layer_stack(cut)[position].parameters(), layers[index].parameters(), strict=True
        ):
            assert mine is theirs
            assert mine.data_ptr() == theirs.data_ptr()
    assert cut.config is not model.config
    assert all(cut.get_submodule(part) is not model.get_submodule(part) for part, _ in cut.named_modules())

    after = (model.config.to_dict(), logits(model), positions(model), list(model.state_dict()))
    assert after[0] == before[0]
    assert torch.equal(after[1], before[1])
    assert after[2:] == before[2:]
    assert list(layer_stack(model)) == layers


def test_training_the_cut_model_trains_the_whole_one():
    model = ARCHITECTURES["gpt2"]()
    before = logits(model)
    with torch.no_grad():
        for parameter in layer_stack(keep_layers(model, [1]))[0].parameters():
            parameter.mul_(2)
    assert not torch.equal(logits(model), before)


@every_architecture
def test_a_view_shares_every_tensor_and_no_module(models, name):
    model = models[name]
    second = view(model)
    for first, other in ((model.parameters(), second.parameters()), (model.buffers(), second.buffers())):
        assert [id(tensor) for tensor in first] == [id(tensor) for tensor in other]
    second.train()
    assert not model.training
    assert torch.equal(logits(second.eval()), logits(model))


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kept", [KEPT, [4]])
def test_generation_with_a_cache_is_that_without(models, name, kept):
    cut = keep_layers(models[name], kept)
    prompt = tokens(rows=2, length=5)
    options: dict[str, Any] = {
        "do_sample": False,
        "min_new_tokens": 10,
        "max_new_tokens": 10,
        "attention_mask": torch.ones_like(prompt),
    }
    cached = cut.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, cut.generate(prompt, use_cache=False, **options))
    assert cached.shape == (2, 15)
    assert len(cut(prompt, use_cache=True).past_key_values) == len(kept)


@every_architecture
@pytest.mark.parametrize("kept", [KEPT, [2]])
def test_a_cut_model_is_saved_and_loaded_as_any_other(models, name, kept, tmp_path):
    cut = keep_layers(models[name], kept)
    cut.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if is_causal(cut) else AutoModelForMaskedLM
    loaded, said = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values())
    assert type(loaded) is type(cut)
    assert torch.equal(logits(loaded.eval()), logits(cut))


@pytest.mark.parametrize(("name", "tied"), [("gpt2", True), ("llama", False), ("qwen2", True)])
def test_heads_stay_tied_or_untied(models, name, tied, tmp_path):
    model = models[name]
    cut = keep_layers(model, [0, 1])
    head, embedding = cut.get_output_embeddings().weight, cut.get_input_embeddings().weight
    assert head is model.get_output_embeddings().weight
    assert (head is embedding) is tied
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = loaded.get_output_embeddings().weight
    assert torch.equal(again, head)
    assert (again is loaded.get_input_embeddings().weight) is tied


@settings(max_examples=15)
@given(st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted))
def test_any_layers(kept):
    model = built_once()
    assert torch.equal(logits(keep_layers(model, kept)), logits(built_small(model, kept)))


@settings(max_examples=15)
@given(st.data())
def test_cutting_twice_is_cutting_once(data):
    model = built_once()
    first = data.draw(st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted))
    second = data.draw(st.sets(st.integers(0, len(first) - 1), min_size=1).map(sorted))
    twice = keep_layers(keep_layers(model, first), second)
    assert torch.equal(logits(twice), logits(keep_layers(model, [first[index] for index in second])))


_ONCE: list[PreTrainedModel] = []


def built_once() -> PreTrainedModel:
    if not _ONCE:
        _ONCE.append(ARCHITECTURES["llama"]())
    return _ONCE[0]


def test_lists_of_every_layer_are_shortened(tmp_path):
    sliding, full = "sliding_attention", "full_attention"
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            num_key_value_heads=2,
            num_hidden_layers=4,
            **TINY,
            use_sliding_window=True,
            sliding_window=3,
            layer_types=[full, sliding, full, sliding],
        )
    ).eval()
    kept = [1, 2]
    cut = keep_layers(model, kept)
    assert cut.config.layer_types == [sliding, full]
    assert model.config.layer_types == [full, sliding, full, sliding]
    small = built_small(model, kept, layer_types=[sliding, full])
    assert torch.equal(logits(cut), logits(small))
    # The other way round it is another model, so the window is felt.
    wrong = built_small(model, kept, layer_types=[full, sliding])
    assert not torch.equal(logits(cut), logits(wrong))
    cut.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(cut))


@pytest.mark.parametrize(
    ("architecture", "config", "kept", "key", "shortened"),
    [
        (
            SmolLM3ForCausalLM,
            SmolLM3Config(num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0], num_key_value_heads=2, **TINY),
            [1, 2],
            "no_rope_layers",
            [0, 1],
        ),
        (
            GPTNeoForCausalLM,
            GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]], window_size=3, **TINY),
            [1, 2],
            "attention_layers",
            ["local", "global"],
        ),
    ],
    ids=["smollm3", "gpt_neo"],
)
def test_a_list_of_every_layer_under_another_name(architecture, config, kept, key, shortened, tmp_path):
    torch.manual_seed(0)
    model = architecture(config).eval()
    cut = keep_layers(model, kept)
    assert getattr(cut.config, key) == shortened
    cut.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(cut))


@pytest.mark.parametrize("kept", [[], [1, 1], [2, 1], [-1], [LAYERS], [0, LAYERS + 3]])
def test_layers_that_are_not_there_are_refused(models, kept):
    with pytest.raises(ModelError, match="give at least one, rising, of 0 to 5"):
        keep_layers(models["gpt2"], kept)


@pytest.mark.parametrize("setting", ["scale_attn_by_inverse_layer_idx", "first_k_dense_replace"])
def test_layers_that_depend_on_their_position_are_refused(setting):
    model = ARCHITECTURES["gpt2"]()
    setattr(model.config, setting, True)
    before = model.config.to_dict()
    with pytest.raises(ModelError, match=f"{setting}: .* absolute position"):
        keep_layers(model, [0, 2])
    assert model.config.to_dict() == before
    # Where nothing is dropped, nothing moves.
    assert torch.equal(logits(keep_layers(model, range(LAYERS))), logits(model))


def test_the_configuration_alone_is_refused_too():
    config = GPT2Config(n_layer=4, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx"):
        shorten_config(config, [0])
    assert config.num_hidden_layers == 4


class Periodic(Qwen2Config):
    """Ignores what it is given, as some configurations do: every other layer has a window."""

    def __post_init__(self, **kwargs: Any) -> None:
        count = self.num_hidden_layers
        self.layer_types = ["full_attention", "sliding_attention"] * (count // 2) + ["full_attention"] * (
            count % 2
        )
        super().__post_init__(**kwargs)


class Even(Qwen2Config):
    """Accepts an even number of layers only."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_hidden_layers % 2:
            raise ValueError("an even number, please")
        super().__post_init__(**kwargs)


@pytest.mark.parametrize(
    ("config", "kept", "match"),
    [
        (Periodic(num_hidden_layers=4), [1, 2], "Periodic: layer_types cannot describe 2 of 4 layers"),
        (Even(num_hidden_layers=4), [0, 1, 2], "Even: cannot describe 3 of 4 layers: an even number"),
    ],
)
def test_a_configuration_that_cannot_describe_the_rest_is_refused(config, kept, match):
    before = config.to_dict()
    with pytest.raises(ModelError, match=match):
        shorten_config(config, kept)
    assert config.to_dict() == before
    shorten_config(config, [0, 3])
    assert config.num_hidden_layers == len(config.layer_types) == 2


def test_a_model_with_two_stacks_is_refused():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=3, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration: expected one list of 3 layers, found"):
        keep_layers(model, [0])


def test_a_model_without_a_stack_is_refused():
    model = ARCHITECTURES["gpt2"]()
    model.config.n_layer = LAYERS + 1
    with pytest.raises(ModelError, match=r"expected one list of 7 layers, found none"):
        stack_name(model)


def test_two_language_models_in_one_are_refused(models, monkeypatch):
    def ambiguous(*_: object) -> None:
        raise ValueError("Multiple valid text configs were found")

    monkeypatch.setattr(type(models["gpt2"].config), "get_text_config", ambiguous)
    with pytest.raises(ModelError, match="not one language model"):
        text_config(models["gpt2"])
