"""Losses against log-softmax by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config
from tuning_models import ARCHITECTURES, MASK_TOKEN, VOCABULARY, tokens

from emutune.tuning import perplexity as perplexity_module
from emutune.tuning.perplexity import is_masked, perplexity, token_losses
from emutune.tuning.text import Blocks


def as_blocks(rows: torch.Tensor) -> Blocks:
    return Blocks(rows.flatten().numpy().astype(np.uint16), rows.shape[1], np.arange(len(rows)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@torch.no_grad()
def by_hand(model, rows: torch.Tensor) -> np.ndarray:
    """Loss of every token from those before it, one prefix at a time: (rows, length - 1)."""
    losses = np.empty((rows.shape[0], rows.shape[1] - 1))
    for end in range(1, rows.shape[1]):
        last = model(input_ids=rows[:, :end]).logits[:, -1].double().numpy()
        losses[:, end - 1] = -log_softmax(last)[np.arange(len(rows)), rows[:, end].numpy()]
    return losses


class Fixed(nn.Module):
    """A model that says the same whatever it reads."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.config = GPT2Config(vocab_size=len(logits))
        self.logits = nn.Parameter(logits)
        self.seen: list[torch.Tensor] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        self.seen.append(input_ids)
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


class FixedForMaskedLM(Fixed):
    pass


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_causal_losses_are_those_by_hand(name):
    model, rows = ARCHITECTURES[name](), tokens(rows=5, length=9)
    expected = by_hand(model, rows)
    with torch.no_grad():
        losses = token_losses(model, rows)
    assert losses.shape == (5 * 8,)
    np.testing.assert_allclose(losses.numpy(), expected.flatten(), rtol=2e-5, atol=2e-5)
    assert perplexity(model, as_blocks(rows)) == pytest.approx(np.exp(expected.mean()), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_causal_perplexity_does_not_depend_on_the_batch(batch):
    model, blocks = ARCHITECTURES["gpt2"](), as_blocks(tokens(rows=7, length=9))
    assert perplexity(model, blocks, batch=batch) == pytest.approx(perplexity(model, blocks), rel=1e-6)


@pytest.mark.parametrize(("room", "largest"), [(1, 1), (VOCABULARY * 8 * 3, 3), (1 << 24, 4)])
def test_logits_never_outgrow_their_room(monkeypatch, room, largest):
    monkeypatch.setattr(perplexity_module, "_LOGITS_AT_ONCE", room)
    model, rows = Fixed(torch.linspace(-1, 1, VOCABULARY)), tokens(rows=7, length=8)
    value = perplexity(model, as_blocks(rows), batch=4)
    assert max(len(seen) for seen in model.seen) == largest
    assert torch.equal(torch.cat(model.seen), rows)
    assert value == pytest.approx(perplexity(model, as_blocks(rows), batch=1), rel=1e-6)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    rows = tokens(rows=20, length=11)
    assert perplexity(Fixed(torch.zeros(VOCABULARY)), as_blocks(rows)) == pytest.approx(VOCABULARY, rel=1e-6)
    masked = FixedForMaskedLM(torch.zeros(VOCABULARY))
    assert perplexity(masked, as_blocks(rows), mask_token=MASK_TOKEN) == pytest.approx(VOCABULARY, rel=1e-6)


def test_a_model_that_knows_all_has_perplexity_one():
    logits = torch.zeros(VOCABULARY)
    logits[5] = 100.0
    assert perplexity(Fixed(logits), as_blocks(torch.full((3, 8), 5))) == 1.0


def test_a_hopeless_model_has_a_finite_perplexity():
    logits = torch.zeros(VOCABULARY)
    logits[5] = 1e6
    value = perplexity(Fixed(logits), as_blocks(torch.full((3, 8), 6)))
    assert np.isfinite(value)
    assert value > 1e300


def test_every_predicted_token_has_the_same_weight():
    logits = torch.linspace(-1, 1, VOCABULARY)
    rows = tokens(rows=5, length=6)
    expected = np.exp(-log_softmax(logits.double().numpy())[rows[:, 1:].numpy()].mean())
    assert perplexity(Fixed(logits), as_blocks(rows), batch=2) == pytest.approx(expected, rel=1e-6)


def test_half_precision_is_summed_in_single():
    logits = torch.linspace(-8, 8, VOCABULARY).to(torch.bfloat16)
    rows = tokens(rows=2, length=6)
    losses = token_losses(Fixed(logits), rows)
    expected = -log_softmax(logits.double().numpy())
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.detach().numpy(), expected[rows[:, 1:].flatten().numpy()], rtol=1e-5)


def test_gradients_flow_through_the_losses():
    model = ARCHITECTURES["gpt2"]()
    token_losses(model, tokens()).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# masked models


def test_only_masked_models_are_masked():
    assert [name for name, build in ARCHITECTURES.items() if is_masked(build())] == ["bert"]


def test_a_masked_model_is_shown_the_others_and_asked_for_the_hidden():
    rows = tokens(rows=40, length=30)
    logits = torch.linspace(-1, 1, VOCABULARY)
    model = FixedForMaskedLM(logits)
    losses = token_losses(model, rows, mask_token=MASK_TOKEN, seed=3)
    (shown,) = model.seen
    hidden = shown == MASK_TOKEN
    assert torch.equal(shown[~hidden], rows[~hidden])
    assert losses.shape == (int(hidden.sum()),)
    expected = -log_softmax(logits.double().numpy())[rows[hidden].numpy()]
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-5)
    assert 0.12 < hidden.float().mean() < 0.18
    assert hidden.any(dim=1).all()


def test_bert_losses_are_those_by_hand():
    model, rows = ARCHITECTURES["bert"](), tokens(rows=6, length=20)
    watched = FixedForMaskedLM(torch.zeros(VOCABULARY))
    token_losses(watched, rows, mask_token=MASK_TOKEN, seed=0)
    hidden = (watched.seen[0] == MASK_TOKEN).numpy()
    with torch.no_grad():
        logits = model(input_ids=watched.seen[0]).logits.double().numpy()
    expected = -log_softmax(logits[hidden])[np.arange(hidden.sum()), rows.numpy()[hidden]]
    with torch.no_grad():
        losses = token_losses(model, rows, mask_token=MASK_TOKEN, seed=0)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=2e-5, atol=2e-5)
    assert perplexity(model, as_blocks(rows), mask_token=MASK_TOKEN) == pytest.approx(
        np.exp(expected.mean()), rel=1e-5
    )


def test_every_short_row_hides_a_token():
    for seed in range(20):
        model = FixedForMaskedLM(torch.zeros(VOCABULARY))
        token_losses(model, tokens(rows=16, length=2), mask_token=MASK_TOKEN, seed=seed)
        assert (model.seen[0] == MASK_TOKEN).any(dim=1).all()


def test_the_hidden_tokens_depend_on_the_seed_alone():
    model, rows = FixedForMaskedLM(torch.zeros(VOCABULARY)), tokens(rows=8, length=30)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for seed in (0, 0, 1):
        token_losses(model, rows, mask_token=MASK_TOKEN, seed=seed)
    assert torch.equal(model.seen[0], model.seen[1])
    assert not torch.equal(model.seen[0], model.seen[2])
    assert torch.equal(torch.get_rng_state(), before)


# modes


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back(training):
    model = ARCHITECTURES["gpt2"]().train(training)
    model.transformer.h[1].train(not training)
    before = [part.training for part in model.modules()]
    perplexity(model, as_blocks(tokens()))
    assert [part.training for part in model.modules()] == before


def test_dropout_is_off_and_no_gradient_is_kept():
    model, blocks = ARCHITECTURES["gpt2"](), as_blocks(tokens())
    expected = perplexity(model, blocks)
    assert perplexity(model.train(), blocks) == expected
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_put_back_after_an_error():
    model = ARCHITECTURES["gpt2"]().train()
    with pytest.raises(IndexError):
        perplexity(model, as_blocks(torch.full((1, 4), VOCABULARY + 5)))
    assert all(part.training for part in model.modules())
