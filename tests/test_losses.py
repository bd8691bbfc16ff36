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


# ---------------------------------------------------------------- the jigsaw

@pytest.mark.parametrize("grid, side", [(1, 6), (2, 6), (4, 8)])
def test_the_inverse_order_gives_the_picture_back(grid, side):
    torch.manual_seed(0)
    images = torch.rand(7, 3, side, side)
    order = torch.rand(7, grid * grid).argsort(1)
    jumbled = losses.jumble(images, grid, order)
    assert torch.equal(losses.jumble(jumbled, grid, order.argsort(1)), images)
    assert grid == 1 or not torch.equal(jumbled, images)
    assert torch.equal(jumbled.flatten(1).sort().values, images.flatten(1).sort().values)


def test_jumbling_by_hand():
    """A 4x6 picture in 2x2 tiles of 2x3; each picture has an order of its own."""
    picture = torch.arange(24.).view(1, 1, 4, 6)
    tiles = [picture[..., :2, :3], picture[..., :2, 3:], picture[..., 2:, :3], picture[..., 2:, 3:]]
    orders = [[2, 0, 3, 1], [1, 0, 2, 3]]
    made = losses.jumble(picture.expand(2, 1, 4, 6), 2, torch.tensor(orders))
    for jumbled, (a, b, c, d) in zip(made, orders):
        expected = torch.cat([torch.cat([tiles[a], tiles[b]], 3), torch.cat([tiles[c], tiles[d]], 3)], 2)
        assert torch.equal(jumbled, expected[0])


def test_the_jigsaw_term_compares_with_the_whole_pictures(batch):
    total, terms = losses.weighted_loss(0, 0, 0, 0.5, images=batch["images"],
                                        jigsaw_reconstruction=batch["reconstruction"])
    expected = (batch["reconstruction"] - batch["images"]).square().mean()
    torch.testing.assert_close(total, 0.5 * expected)
    assert list(terms) == ["jigsaw"]


# ---------------------------------------------------------------- class weights

def test_balanced_weights_make_every_class_count_the_same():
    labels = torch.tensor([0] * 6 + [1] * 2 + [3] * 4)
    weights = losses.balanced_weights(labels, 4)
    assert losses.balanced_weights(labels, 256)[:4].tolist() == weights.tolist()  # scores of no class
    assert weights.tolist() == pytest.approx([12 / 18, 12 / 6, 0, 12 / 12])
    logits = torch.randn(12, 4)
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    means = torch.stack([each[:6].mean(), each[6:8].mean(), each[8:].mean()])
    torch.testing.assert_close(losses.classifier_loss(logits, labels, weights), means.mean())


# ---------------------------------------------------------------- the variational term

def test_the_kl_term_is_the_expected_log_ratio_of_the_densities():
    """Its closed form against the mean of log q(z) - log p(z) over a million draws of q."""
    torch.manual_seed(0)
    mean, log_variance = torch.tensor([[0.5, -1.0, 0.0]]), torch.tensor([[0.3, -1.0, 0.0]])
    q, p = torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    z = q.sample((1_000_000,))
    expected = (q.log_prob(z) - p.log_prob(z)).sum(-1).mean().item()
    assert losses.kl_loss(mean, log_variance, 7).item() == pytest.approx(expected / 7, rel=0.01)
    assert losses.kl_loss(torch.zeros(4, 5), torch.zeros(4, 5), 7).item() == 0
    total, terms = losses.weighted_loss(0, 0, kl=2.0, images=torch.zeros(1, 1, 1, 7), mean=mean,
                                        log_variance=log_variance)
    assert list(terms) == ["kl"] and total.item() == pytest.approx(2 * terms["kl"].item())
