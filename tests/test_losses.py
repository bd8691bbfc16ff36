"""Each term against its formula, and the weighted sum against its terms."""
import math

import pytest
import torch

import losses


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return dict(logits=torch.randn(5, 7, requires_grad=True), labels=torch.tensor([0, 3, 6, 3, 1]),
                reconstruction=torch.randn(5, 3, 4, 4, requires_grad=True),
                images=torch.randn(5, 3, 4, 4),
                parameters=[torch.randn(3, 4, requires_grad=True), torch.randn(6, requires_grad=True)])


def test_classifier_loss_is_minus_the_log_of_the_right_class(batch):
    by_hand = [-math.log(row.softmax(0)[label])
               for row, label in zip(batch["logits"].detach().double(), batch["labels"])]
    assert losses.classifier_loss(batch["logits"], batch["labels"]).item() == pytest.approx(
        sum(by_hand) / 5, rel=1e-6)


def test_autoencoder_loss_and_its_gradient(batch):
    loss = losses.autoencoder_loss(batch["reconstruction"], batch["images"])
    loss.backward()
    difference = (batch["reconstruction"] - batch["images"]).detach()
    assert loss.item() == pytest.approx((difference ** 2).sum().item() / 240, rel=1e-6)
    torch.testing.assert_close(batch["reconstruction"].grad, 2 * difference / 240)


def test_l2_is_half_the_squares_and_its_gradient_the_parameter(batch):
    loss = losses.l2_reg_loss(batch["parameters"])
    loss.backward()
    squares = sum(value ** 2 for p in batch["parameters"] for value in p.flatten().tolist())
    assert loss.item() == pytest.approx(squares / 2, rel=1e-6)
    for p in batch["parameters"]:
        torch.testing.assert_close(p.grad, p.detach())


def test_weighted_loss_is_the_sum_of_its_weighted_terms(batch):
    total, terms = losses.weighted_loss(0.5, 2.0, 0.01, **batch)
    assert list(terms) == ["classifier", "autoencoder", "l2"]
    expected = (0.5 * losses.classifier_loss(batch["logits"], batch["labels"])
                + 2.0 * losses.autoencoder_loss(batch["reconstruction"], batch["images"])
                + 0.01 * losses.l2_reg_loss(batch["parameters"]))
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("weights, needed, left", [
    ((1, 0, 0), ("logits", "labels"), ["classifier"]),
    ((0, 1, 0), ("reconstruction", "images"), ["autoencoder"]),
    ((0, 0, 1), ("parameters",), ["l2"])])
def test_a_term_without_weight_is_not_computed(batch, weights, needed, left):
    total, terms = losses.weighted_loss(*weights, **{key: batch[key] for key in needed})
    assert list(terms) == left and total.item() == terms[left[0]].item()


def test_no_weight_at_all_is_refused():
    with pytest.raises(ValueError, match="nothing to train on"):
        losses.weighted_loss(0, 0, 0)


def test_losses_of_bfloat16_are_computed_in_float32(batch):
    half = batch["logits"].detach().to(torch.bfloat16)
    loss = losses.classifier_loss(half, batch["labels"])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, losses.classifier_loss(half.float(), batch["labels"]))
