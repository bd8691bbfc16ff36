"""Each term against its formula, the weighted sum, the table of terms, error measures by hand."""
import csv
import math

import pytest
import torch
import torch.nn.functional as F

import evaluate
import losses
import train


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return dict(logits=torch.randn(5, 7, requires_grad=True), labels=torch.tensor([0, 3, 6, 3, 1]),
                reconstruction=torch.randn(5, 3, 4, 4, requires_grad=True), images=torch.randn(5, 3, 4, 4),
                parameters=[torch.randn(3, 4, requires_grad=True), torch.randn(6, requires_grad=True)])


# ---------------------------------------------------------------- the terms

@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2, 3, 4, 5, 6, 7])])
@pytest.mark.parametrize("smoothing", [None, 0.3])
def test_classifier_loss_is_the_cross_entropy(batch, weights, smoothing):
    """Smoothed labels give every class an equal share; an image counts by the weight of its own class."""
    spread, expected = smoothing or 0, 0
    for row, label in zip(batch["logits"].detach().double(), batch["labels"].tolist()):
        for i, probability in enumerate(row.softmax(0).tolist()):
            share = spread / 7 + (1 - spread) * (i == label)
            expected -= share * math.log(probability) * (1 if weights is None else weights[label].item()) / 5
    loss = losses.classifier_loss(batch["logits"], batch["labels"], weights, smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_autoencoder_loss_and_its_gradient(batch):
    loss = losses.autoencoder_loss(batch["reconstruction"], batch["images"])
    loss.backward()
    error = (batch["reconstruction"] - batch["images"]).detach()
    assert loss.item() == pytest.approx((error ** 2).sum().item() / 240, rel=1e-6)
    torch.testing.assert_close(batch["reconstruction"].grad, 2 * error / 240)


def test_l2_is_half_the_squares_and_its_gradient_the_parameter(batch):
    loss = losses.l2_reg_loss(batch["parameters"])
    loss.backward()
    squares = sum(value ** 2 for p in batch["parameters"] for value in p.flatten().tolist())
    assert loss.item() == pytest.approx(squares / 2, rel=1e-6)
    for p in batch["parameters"]:
        torch.testing.assert_close(p.grad, p.detach())


def test_kl_loss_is_the_expected_log_ratio_of_the_densities():
    """The closed form against the mean of log q(z) - log p(z) over 200,000 draws of q."""
    torch.manual_seed(0)
    mean, log_variance = torch.tensor([[0.5, -1.0, 0.0]]), torch.tensor([[0.3, -1.0, 0.0]])
    q, p = torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    z = q.sample((200_000,))
    expected = (q.log_prob(z) - p.log_prob(z)).sum(-1).mean().item()
    images = torch.zeros(1, 1, 1, 7)  # divided by the number of an image's values
    assert losses.kl_loss(mean, log_variance, images).item() == pytest.approx(expected / 7, rel=0.02)
    assert losses.kl_loss(torch.zeros(4, 5), torch.zeros(4, 5), images).item() == 0


@pytest.mark.parametrize("term", losses.TERMS.values(), ids=losses.TERMS)
def test_losses_of_bfloat16_are_computed_in_float32(term):
    torch.manual_seed(0)
    tensors = [torch.arange(5) if name == "labels" else torch.randn(5, 6).bfloat16()
               for name in term.needs if name not in losses.OPTIONAL]
    loss = term.loss(*tensors)
    assert loss.dtype == torch.float32
    assert loss == term.loss(*(each.float() if each.is_floating_point() else each for each in tensors))


# ---------------------------------------------------------------- the weighted sum

def test_weighted_loss_is_the_sum_of_its_weighted_terms(batch):
    weights = {"alpha": 0.5, "beta": 2.0, "gamma": 0.01, "delta": 0.25, "kl": 0.0}
    whole = batch["reconstruction"] * 0.5  # rebuilt from jumbled tiles, compared with the whole images
    total, terms = losses.weighted_loss(weights, **batch, jigsaw_reconstruction=whole)
    assert list(terms) == ["classifier", "autoencoder", "l2", "jigsaw"]
    expected = (0.5 * F.cross_entropy(batch["logits"], batch["labels"])
                + 2.0 * F.mse_loss(batch["reconstruction"], batch["images"])
                + 0.01 * losses.l2_reg_loss(batch["parameters"]) + 0.25 * F.mse_loss(whole, batch["images"]))
    torch.testing.assert_close(total, expected)
    assert losses.weighted_sum(weights, terms) == total


@pytest.mark.parametrize("flag, tensors, name", [
    ("alpha", ("logits", "labels"), "classifier"), ("beta", ("reconstruction", "images"), "autoencoder"),
    ("gamma", ("parameters",), "l2")])
def test_a_term_without_weight_is_not_computed(batch, flag, tensors, name):
    """The tensors of the other terms are not there: computing one of them would fail."""
    weights = dict.fromkeys(losses.TERMS, 0.0) | {flag: 3.0}
    total, terms = losses.weighted_loss(weights, **{key: batch[key] for key in tensors})
    assert list(terms) == [name] and total.item() == pytest.approx(3 * terms[name].item())
    assert losses.needed(weights) - set(losses.OPTIONAL) == set(tensors)


@pytest.mark.parametrize("weights, message", [
    ({"alpha": 0, "beta": 0.0}, "nothing to train on"),
    ({"alpha": 1, "gama": 1}, "no weight 'gama'; there are alpha beta gamma delta kl"),
    ({"delta": 1}, "no tensor 'jigsaw_reconstruction', .*; got logits labels reconstruction images")])
def test_wrong_weights_and_missing_tensors_are_named(batch, weights, message):
    with pytest.raises(ValueError, match=message):
        losses.weighted_loss(weights, **batch)


def test_a_weighted_sum_leaves_out_terms_that_are_missing_or_none():
    weights = {"alpha": 2.0, "beta": 3.0, "gamma": 5.0}
    assert losses.weighted_sum(weights, {"classifier": 1.0, "autoencoder": None, "other": 9.0}) == 2.0
    assert losses.weighted_sum(weights, {"classifier": 1.0, "l2": 0.5}) == 4.5


# ---------------------------------------------------------------- the table of terms

def test_a_row_of_the_table_is_a_whole_term(tiny, tmp_path, monkeypatch):
    """With one more row, the mean absolute error: its flag, its share of the loss, its column and curve, and
    the part of the network that it trains."""
    monkeypatch.setitem(losses.TERMS, "mu", losses.Term(
        "absolute", lambda reconstruction, images: F.l1_loss(reconstruction.float(), images.float()),
        ("reconstruction", "images"), "MAE (normalised pixels)", "weight of the mean absolute error"))
    monkeypatch.setattr(train, "defaults", train.defaults.__wrapped__)  # without its cache
    figures = {}
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: figures.update({path.name: figure}))
    _, _, folder = train.run(version="v3", dataset=tiny, mu=0.5, beta=0.25, epochs=1, output=tmp_path)
    with open(folder / "log.csv", newline="") as file:
        row, = csv.DictReader(file)
    for part in ("train", "test"):
        classifier, autoencoder, absolute, loss = (
            float(row[f"{part}_{name}"]) for name in ("classifier", "autoencoder", "absolute", "loss"))
        assert 0.5 < absolute < autoencoder ** 0.5  # Jensen's inequality, near it for these images
        assert loss == pytest.approx(classifier + 0.25 * autoencoder + 0.5 * absolute, rel=1e-5)
    panels = {axis.get_title(): axis.get_ylabel() for axis in figures["curves.png"].axes}
    assert panels["absolute loss"] == "MAE (normalised pixels)"
    assert train.parse(["--alpha", "0", "--beta", "0", "--mu", "1"])[0].trained == ["decoder"]


def test_another_classifier_term_has_its_accuracy(tiny, tmp_path, monkeypatch, undrawn):
    """Alone, and with few labels: a mean over the labelled images, of which there are as many here."""
    monkeypatch.setitem(losses.TERMS, "nu", losses.Term(
        "other", losses.classifier_loss, ("logits", "labels"), "nats", "weight of the same loss again"))
    monkeypatch.setattr(train, "defaults", train.defaults.__wrapped__)
    _, (row,), _ = train.run(version="v3", dataset=tiny, alpha=0.0, nu=1.0, beta=1.0, epochs=1, labels=20,
                             batch_size=24, output=tmp_path)
    assert row["train_accuracy"] is not None and row["train_other"] == pytest.approx(math.log(10), rel=0.05)


# ---------------------------------------------------------------- the jigsaw

@pytest.mark.parametrize("grid, side", [(1, 6), (2, 6), (4, 8)])
def test_the_inverse_order_gives_the_image_back(grid, side):
    torch.manual_seed(0)
    images, order = torch.rand(7, 3, side, side), torch.rand(7, grid * grid).argsort(1)
    jumbled = losses.jumble(images, grid, order)
    assert torch.equal(losses.jumble(jumbled, grid, order.argsort(1)), images)
    assert torch.equal(jumbled, images) == (grid == 1)


def test_jumbling_by_hand():
    """A 4x6 image in 2x2 tiles of 2x3; each image has an order of its own."""
    image = torch.arange(24.).view(1, 1, 4, 6)
    tiles = [image[..., :2, :3], image[..., :2, 3:], image[..., 2:, :3], image[..., 2:, 3:]]
    orders = [[2, 0, 3, 1], [1, 0, 2, 3]]
    for jumbled, order in zip(losses.jumble(image.expand(2, 1, 4, 6), 2, torch.tensor(orders)), orders):
        a, b, c, d = (tiles[i] for i in order)
        assert torch.equal(jumbled, torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)[0])


# ---------------------------------------------------------------- class weights and measures

def test_balanced_weights_make_every_class_count_the_same():
    labels = torch.tensor([0] * 6 + [1] * 2 + [3] * 4)
    weights = losses.balanced_weights(labels, 4)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([12 / 18, 12 / 6, 0, 12 / 12])
    torch.manual_seed(0)
    logits = torch.randn(12, 4)
    each = F.cross_entropy(logits, labels, reduction="none")
    means = torch.stack([each[:6].mean(), each[6:8].mean(), each[8:].mean()])
    torch.testing.assert_close(losses.classifier_loss(logits, labels, weights), means.mean())


def test_confusion_matrix_and_figures_per_class_by_hand():
    """Class b has no image but predictions, class d neither."""
    labels, predicted = torch.tensor([0, 2, 2, 0, 2]), torch.tensor([0, 1, 2, 2, 1])
    confusion = losses.confusion_matrix(labels, predicted, 4).tolist()
    assert confusion == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0]]
    figures = {name: tuple(row.values()) for name, row in losses.per_class(confusion, list("abcd")).items()}
    assert figures == {  # recall, precision, F1, images
        "a": (50, 100, pytest.approx(2 * 100 * 0.5 / 1.5), 2), "b": (None, 0, 0, 0),
        "c": (pytest.approx(100 / 3), 50, pytest.approx(2 * 100 * (1 / 3 * 0.5) / (1 / 3 + 0.5)), 3),
        "d": (None, None, None, 0)}


def test_reconstruction_errors_by_hand():
    """Two images of four values: errors 0.1, -0.1, 0.3, 0 and none at all."""
    pixels = torch.tensor([[0.5, 0.5, 0.2, 1.0], [0.0, 1.0, 0.25, 0.75]]).view(2, 1, 2, 2)
    rebuilt = pixels + torch.tensor([[0.1, -0.1, 0.3, 0.0], [0.0] * 4]).view(2, 1, 2, 2)
    errors = losses.reconstruction_errors(rebuilt, pixels)
    mse = (0.01 + 0.01 + 0.09) / 4
    expected = {"mse": [mse, 0], "mae": [0.125, 0], "psnr": [10 * math.log10(1 / mse), 100],  # at most 100
                "absolute_error": [0.5, 0], "net_error": [0.3, 0]}  # 0.1 and -0.1 cancel in the last one
    assert errors.keys() == expected.keys()
    for name, values in expected.items():
        assert errors[name].tolist() == pytest.approx(values, rel=1e-5, abs=1e-7), name
