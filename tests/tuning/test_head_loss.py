"""The loss in pieces is the loss of the whole batch, with the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel
from tuning_models import ARCHITECTURES, HEADS, LAYERS, MASK_TOKEN, VOCABULARY, WIDTH, tokens

from emutune.tuning import head_loss
from emutune.tuning.head_loss import taught_loss, training_loss
from emutune.tuning.layers import keep_layers, layer_stack
from emutune.tuning.perplexity import is_masked, predictions, token_losses

CAUSAL = [name for name in ARCHITECTURES if name != "bert"]


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(trained, found, strict=True) if gradient is not None}


def with_frozen_head(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    layer_stack(model).requires_grad_(True)
    return model


def is_in_pieces(function: Callable[[Tensor, int], Tensor]) -> bool:
    return function.__name__ == "by_pieces"


@pytest.mark.parametrize("piece", [7, 256])
@pytest.mark.parametrize("name", CAUSAL)
def test_loss_and_gradients_are_those_of_the_whole_batch(
    name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "_PIECE_TOKENS", piece)
    model = with_frozen_head(ARCHITECTURES[name]())
    function = training_loss(model)
    assert is_in_pieces(function)
    expected = token_losses(model, tokens()).mean()
    found = function(tokens(), 0)
    torch.testing.assert_close(found, expected)
    wanted, got = gradients(model, 3 * expected), gradients(model, 3 * found)
    assert wanted.keys() == got.keys()
    assert len(wanted) == len(list(layer_stack(model).parameters()))
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-3, atol=1e-5)


def test_masked_models_get_the_plain_loss() -> None:
    model = with_frozen_head(ARCHITECTURES["bert"]())
    assert is_masked(model)
    function = training_loss(model, MASK_TOKEN)
    assert not is_in_pieces(function)
    for step in (0, 4):
        expected = token_losses(model, tokens(), mask_token=MASK_TOKEN, seed=step).mean()
        assert torch.equal(function(tokens(), step), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_trainable_heads_get_the_plain_loss(name: str) -> None:
    model = with_frozen_head(ARCHITECTURES[name]())
    model.get_output_embeddings().requires_grad_(True)
    function = training_loss(model)
    assert not is_in_pieces(function)
    loss = function(tokens(), 0)
    assert torch.equal(loss, token_losses(model, tokens()).mean())
    (gradient,) = torch.autograd.grad(loss, [model.get_output_embeddings().weight])
    assert gradient.abs().sum() > 0


def test_capped_logits_get_the_plain_loss() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        final_logit_softcapping=1.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = with_frozen_head(Gemma2ForCausalLM(config).eval())
    function = training_loss(model)
    assert not is_in_pieces(function)
    assert torch.equal(function(tokens(), 0), token_losses(model, tokens()).mean())


def test_mode_of_the_model_stays() -> None:
    model = with_frozen_head(ARCHITECTURES["gpt2"]())
    modes = {}
    for number, module in enumerate(model.modules()):
        module.training = modes[module] = number % 2 == 0
    training_loss(model)
    assert {module: module.training for module in model.modules()} == modes


def test_loss_trains_at_a_hidden_state_without_gradient() -> None:
    model = ARCHITECTURES["gpt2"]().requires_grad_(False)
    assert not training_loss(model)(tokens(), 0).requires_grad


def test_head_with_a_bias_counts_it() -> None:
    model = with_frozen_head(ARCHITECTURES["llama"]())
    head = nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)
    model.set_output_embeddings(head)
    function = training_loss(model)
    assert is_in_pieces(function)
    torch.testing.assert_close(function(tokens(), 0), token_losses(model, tokens()).mean())


@pytest.mark.parametrize("piece", [7, 256])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_taught_loss_and_gradients_are_those_against_all_predictions(
    name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "_PIECE_TOKENS", piece)
    teacher = with_frozen_head(ARCHITECTURES[name]())
    student = keep_layers(teacher, range(LAYERS - 2))
    found = taught_loss(student, teacher, MASK_TOKEN)(tokens(), 5)
    wanted, _ = predictions(teacher, tokens(), mask_token=MASK_TOKEN, seed=5)
    said, _ = predictions(student, tokens(), mask_token=MASK_TOKEN, seed=5)
    # The definition, in place of the library's function.
    expected = -(wanted.detach().softmax(dim=1) * said.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(found, expected)
    got = gradients(student, found)
    assert len(got) == len(list(layer_stack(student).parameters()))
    for parameter, gradient in gradients(student, expected).items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-3, atol=1e-5)
