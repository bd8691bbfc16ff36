"""Each term against its formula, the weighted sum, the table of terms, error measures by hand."""
import csv
import importlib
import json
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import losses
from conftest import simulated_cuda


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


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2, 3, 4, 5, 6, 7])])
def test_smoothed_labels_give_every_class_an_equal_share(batch, weights):
    by_hand = 0
    for row, label in zip(batch["logits"].detach().double(), batch["labels"].tolist()):
        for name, logarithm in enumerate(row.log_softmax(0).tolist()):
            share = 0.3 / 7 + 0.7 * (name == label)  # the image counts by its own class
            by_hand -= share * logarithm * (1 if weights is None else weights[label].item()) / 5
    loss = losses.classifier_loss(batch["logits"], batch["labels"], weights, label_smoothing=0.3)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


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


# ---------------------------------------------------------------- the weighted sum

def test_weighted_loss_is_the_sum_of_its_weighted_terms(batch):
    total, terms = losses.weighted_loss({"alpha": 0.5, "beta": 2.0, "gamma": 0.01}, **batch)
    assert list(terms) == ["classifier", "autoencoder", "l2"]
    expected = (0.5 * losses.classifier_loss(batch["logits"], batch["labels"])
                + 2.0 * losses.autoencoder_loss(batch["reconstruction"], batch["images"])
                + 0.01 * losses.l2_reg_loss(batch["parameters"]))
    torch.testing.assert_close(total, expected)


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
    ({}, "nothing to train on"), ({"alpha": 0, "beta": 0.0}, "nothing to train on"),
    ({"alpha": 1, "gama": 1}, "no weight 'gama'; there are alpha beta gamma delta kl"),
    ({"alpha": 1, "classifier": 0}, "no weight 'classifier'")])
def test_weights_that_are_unknown_or_all_zero_are_refused(batch, weights, message):
    with pytest.raises(ValueError, match=message):
        losses.weighted_loss(weights, **batch)


def test_a_weighted_sum_leaves_out_terms_that_are_missing_or_none():
    weights = {"alpha": 2.0, "beta": 3.0, "gamma": 5.0}
    assert losses.weighted_sum(weights, {"classifier": 1.0, "autoencoder": None}) == 2.0
    assert losses.weighted_sum(weights, {"classifier": 1.0, "l2": 0.5, "other": 9.0}) == 4.5
    assert losses.weighted_sum(weights, {}) == 0


def test_losses_of_bfloat16_are_computed_in_float32(batch):
    half = {name: tensor.detach().to(torch.bfloat16) for name, tensor in batch.items()
            if name in ("logits", "reconstruction", "images")}
    pairs = [(losses.classifier_loss, ("logits", "labels")), (losses.autoencoder_loss, ("reconstruction", "images")),
             (losses.jigsaw_recon_loss, ("reconstruction", "images"))]
    for loss, names in pairs:
        found = loss(*(half.get(name, batch[name]) for name in names))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(*(half[name].float() if name in half else batch[name]
                                                 for name in names)))
    mean = torch.full((2, 3), 0.3, dtype=torch.bfloat16)
    assert losses.kl_loss(mean, mean, torch.zeros(2, 1, 2, 2)).dtype == torch.float32


# ---------------------------------------------------------------- the table of terms

@pytest.fixture
def programs(monkeypatch):
    """train and evaluate as they are with one more row in losses.TERMS: the mean absolute error."""
    monkeypatch.setitem(losses.TERMS, "mu", losses.Term(
        "absolute", lambda reconstruction, images: F.l1_loss(reconstruction.float(), images.float()),
        ("reconstruction", "images"), "MAE (normalised pixels)", "weight of the mean absolute error"))
    for name in ("train", "evaluate"):
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("train"), importlib.import_module("evaluate")


def rows_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_of_the_table_is_a_whole_term(programs, tiny, tmp_path, monkeypatch):
    """Its flag and help, its part of the loss in training and test, its column and its curve."""
    train, evaluate = programs
    figures = {}
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: figures.update({path.name: figure}))
    assert train.parse(["--mu", "0.5"]) == {"mu": 0.5}
    text = " ".join(train.make_parser().format_help().split())
    assert "--mu X weight of the mean absolute error (0" in text
    assert train.main(["--version", "v3", "--dataset", tiny, "--mu", "0.5", "--beta", "0.25", "--epochs", "1",
                       "--output", str(tmp_path), "--device", "cpu"]) == 0
    folder, = tmp_path.iterdir()
    assert folder.name == "v3_dataset-tiny_beta0.25_mu0.5_epochs1"
    row, = rows_of(folder)
    for part in ("train", "test"):
        classifier, autoencoder, absolute, loss = (
            float(row[f"{part}_{name}"]) for name in ("classifier", "autoencoder", "absolute", "loss"))
        assert 0.5 < absolute < autoencoder ** 0.5  # Jensen's inequality, near it for these images
        assert loss == pytest.approx(classifier + 0.25 * autoencoder + 0.5 * absolute, rel=1e-5)
    panels = {axis.get_title(): axis.get_ylabel() for axis in figures["curves.png"].axes}
    assert panels["absolute loss"] == "MAE (normalised pixels)"
    assert json.loads((folder / "config.json").read_text())["settings"]["mu"] == 0.5
    assert evaluate.load_checkpoint(folder / "last.pt")[1]["settings"].mu == 0.5


def test_a_new_term_alone_trains_the_parts_that_it_needs(programs, tiny, tmp_path):
    train, _ = programs
    s = train.settle({"version": "v3", "dataset": tiny, "alpha": 0.0, "beta": 0.0, "mu": 1.0, "device": "cpu"})
    dataset, model = train.prepare(s)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    phase, = train.phases(s)
    means = train.train_epoch(model, dataset, train.make_optimizer(model, phase), phase, 0)
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"encoder", "decoder"}
    assert means["loss"] == means["absolute"] and means["autoencoder"] is None
    first, second = train.phases(train.settle({"dataset": tiny, "mu": 1.0, "separate": True}))
    assert (first.mu, second.mu) == (1.0, 0.0)  # a term of images, not of labels


def test_a_new_term_is_refused_where_the_network_lacks_its_part(programs, tiny):
    train, _ = programs
    with pytest.raises(train.UsageError, match="--mu 1: .*no decoder"):
        train.settle({"version": "v3", "dataset": tiny, "decoder": "none", "mu": 1.0})


def test_a_run_from_before_the_new_term_can_still_be_evaluated_and_resumed(programs, trained, tmp_path, monkeypatch):
    train, evaluate = programs
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: None)
    folder = tmp_path / trained[1].name
    shutil.copytree(trained[1], folder)
    assert "mu" not in json.loads((folder / "config.json").read_text())["settings"]
    assert evaluate.main(["--ckpt", str(folder / "last.pt"), "--device", "cpu"]) == 0
    report = json.loads((folder / "evaluation-last/report.json").read_text())
    assert report["accuracy"] == json.loads((folder / "metrics.json").read_text())["accuracy"]["last"]
    assert train.main(["--resume", str(folder), "--epochs", "3"]) == 0
    resumed, = tmp_path.iterdir()
    before, after = rows_of(trained[1]), rows_of(resumed)
    assert [row["epoch"] for row in after] == ["1", "2", "3"]
    for old, new in zip(before, after):
        assert old.items() <= new.items()


# ---------------------------------------------------------------- the jigsaw

@pytest.mark.parametrize("grid, side", [(1, 6), (2, 6), (4, 8)])
def test_the_inverse_order_gives_the_image_back(grid, side):
    torch.manual_seed(0)
    images = torch.rand(7, 3, side, side)
    order = torch.rand(7, grid * grid).argsort(1)
    jumbled = losses.jumble(images, grid, order)
    assert torch.equal(losses.jumble(jumbled, grid, order.argsort(1)), images)
    assert grid == 1 or not torch.equal(jumbled, images)
    assert torch.equal(jumbled.flatten(1).sort().values, images.flatten(1).sort().values)


def test_jumbling_by_hand():
    """A 4x6 image in 2x2 tiles of 2x3; each image has an order of its own."""
    image = torch.arange(24.).view(1, 1, 4, 6)
    tiles = [image[..., :2, :3], image[..., :2, 3:], image[..., 2:, :3], image[..., 2:, 3:]]
    orders = [[2, 0, 3, 1], [1, 0, 2, 3]]
    made = losses.jumble(image.expand(2, 1, 4, 6), 2, torch.tensor(orders))
    for jumbled, (a, b, c, d) in zip(made, orders):
        expected = torch.cat([torch.cat([tiles[a], tiles[b]], 3), torch.cat([tiles[c], tiles[d]], 3)], 2)
        assert torch.equal(jumbled, expected[0])


def test_the_jigsaw_term_compares_with_the_whole_images(batch):
    total, terms = losses.weighted_loss({"delta": 0.5}, images=batch["images"],
                                        jigsaw_reconstruction=batch["reconstruction"])
    expected = (batch["reconstruction"] - batch["images"]).square().mean()
    torch.testing.assert_close(total, 0.5 * expected)
    assert list(terms) == ["jigsaw"]


# ---------------------------------------------------------------- the variational term

def test_the_kl_term_is_the_expected_log_ratio_of_the_densities():
    """Its closed form against the mean of log q(z) - log p(z) over 200,000 draws of q."""
    torch.manual_seed(0)
    mean, log_variance = torch.tensor([[0.5, -1.0, 0.0]]), torch.tensor([[0.3, -1.0, 0.0]])
    q, p = torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    z = q.sample((200_000,))
    expected = (q.log_prob(z) - p.log_prob(z)).sum(-1).mean().item()
    images = torch.zeros(1, 1, 1, 7)  # divided by the number of an image's values
    assert losses.kl_loss(mean, log_variance, images).item() == pytest.approx(expected / 7, rel=0.02)
    assert losses.kl_loss(torch.zeros(4, 5), torch.zeros(4, 5), images).item() == 0
    total, terms = losses.weighted_loss({"kl": 2.0}, images=images, mean=mean, log_variance=log_variance)
    assert list(terms) == ["kl"] and total.item() == pytest.approx(2 * terms["kl"].item())


# ---------------------------------------------------------------- class weights

def test_balanced_weights_make_every_class_count_the_same():
    labels = torch.tensor([0] * 6 + [1] * 2 + [3] * 4)
    weights = losses.balanced_weights(labels, 4)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([12 / 18, 12 / 6, 0, 12 / 12])
    assert losses.balanced_weights(labels, 6)[:4].tolist() == weights.tolist()  # classes without images
    torch.manual_seed(0)
    logits = torch.randn(12, 4)
    each = F.cross_entropy(logits, labels, reduction="none")
    means = torch.stack([each[:6].mean(), each[6:8].mean(), each[8:].mean()])
    torch.testing.assert_close(losses.classifier_loss(logits, labels, weights), means.mean())


# ---------------------------------------------------------------- what is reported

def test_a_tensor_that_a_weight_needs_is_named():
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="no tensor 'reconstruction', which these weights need; got recon images"):
        losses.weighted_loss({"beta": 1.0}, recon=images, images=images)


def test_class_counts_and_confusion_matrix_by_hand():
    labels, predicted = torch.tensor([0, 2, 2, 0, 2]), torch.tensor([0, 1, 2, 2, 1])
    assert losses.class_counts(labels, 4).tolist() == [2, 0, 3, 0]
    confusion = losses.confusion_matrix(labels, predicted, 4)
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0]]
    assert losses.per_class(confusion.tolist(), ["a", "b", "c", "d"]) == {
        "a": 50, "b": None, "c": pytest.approx(100 / 3), "d": None}


def test_reconstruction_errors_by_hand():
    """Two images of four values: errors 0.1, -0.1, 0.3, 0 and none at all."""
    pixels = torch.tensor([[0.5, 0.5, 0.2, 1.0], [0.0, 1.0, 0.25, 0.75]]).view(2, 1, 2, 2)
    rebuilt = pixels + torch.tensor([[0.1, -0.1, 0.3, 0.0], [0.0] * 4]).view(2, 1, 2, 2)
    errors = losses.reconstruction_errors(rebuilt, pixels)
    mse = (0.01 + 0.01 + 0.09) / 4
    expected = {"mse": [mse, 0], "mae": [0.125, 0], "psnr": [10 * math.log10(1 / mse), 100],  # 100: the highest
                "absolute_error": [0.5, 0], "net_error": [0.3, 0]}  # 0.1 and -0.1 cancel in the last one
    assert errors.keys() == expected.keys()
    for name, values in expected.items():
        assert errors[name].tolist() == pytest.approx(values, rel=1e-5, abs=1e-7), name


def test_roc_auc_counts_the_pairs():
    torch.manual_seed(0)
    scores, others = torch.randint(0, 9, (30,)).double(), torch.randint(0, 7, (40,)).double()
    pairs = [(a > b) + 0.5 * (a == b) for a in scores.tolist() for b in others.tolist()]
    assert losses.roc_auc(scores, others) == pytest.approx(sum(pairs) / len(pairs))
    assert losses.roc_auc(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])) == 1


@simulated_cuda
def test_nothing_waits_for_a_gpu():
    """Under FakeTensorMode no tensor has values: an operation that reads one on the CPU raises an error."""
    with FakeTensorMode():
        labels = torch.zeros(8, dtype=torch.int64, device="cuda")
        images = torch.zeros(8, 3, 4, 4, device="cuda")
        made = [losses.class_counts(labels, 5), losses.balanced_weights(labels, 5),
                losses.confusion_matrix(labels, labels, 5),
                losses.jumble(images, 2, torch.zeros(8, 4, dtype=torch.int64, device="cuda")),
                losses.kl_loss(images.flatten(1), images.flatten(1), images),
                *losses.reconstruction_errors(images, images).values()]
        total, terms = losses.weighted_loss(
            {"alpha": 1.0, "beta": 0.5}, logits=torch.zeros(8, 5, device="cuda"), labels=labels, images=images,
            reconstruction=images, class_weights=made[1])
        with pytest.raises(Exception):
            torch.bincount(labels)  # what class_counts replaces
    assert {tensor.device.type for tensor in (*made, total, *terms.values())} == {"cuda"}
    assert [tuple(tensor.shape) for tensor in made[:4]] == [(5,), (5,), (5, 5), (8, 3, 4, 4)]
