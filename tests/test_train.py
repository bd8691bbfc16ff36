"""The training loop against the plain formulation, settings, what a run leaves, its repetition, many runs."""
import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import losses
import models
import train

ROOT = Path(__file__).parent.parent
WEIGHTED_LOSS = losses.weighted_loss
pytestmark = pytest.mark.usefixtures("undrawn")


def phases(words=""):
    return train.phases(train.parse(["--precision", "fp32", *shlex.split(words)])[0])


def run(tiny, out, *flags):
    """A short run of train.py in this process; returns its folder."""
    before = set(Path(out).glob("*"))
    argv = ["--dataset", tiny, "--epochs", "2", "--output", str(out), "--device", "cpu", *flags]
    assert train.main(argv) == 0
    folder, = {each for each in set(Path(out).glob("*")) - before if each.is_dir()}
    return folder


def fails(*argv):
    """The exit status of a command that cannot end well."""
    with pytest.raises(SystemExit) as exit:
        train.main([*map(str, argv)])
    return exit.value.code


def weights(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def log(folder, times=False):
    with open(folder / "log.csv", newline="") as file:
        return [{key: value for key, value in row.items() if times or "second" not in key}
                for row in csv.DictReader(file)]


def assert_equal(one, other):
    """Two state dicts agree to the last bit."""
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def shapes(count, labelled=None, side=32):
    """A Dataset of so many training images, some of them labelled."""
    dataset = data.shapes(train=count, test=10, side=side)
    dataset.labelled = data.take(dataset.train, labelled, 0) if labelled else None
    return dataset


def epoch(model, dataset, phase, number=0):
    return train.train_epoch(model, dataset, train.make_optimizer(model, phase), phase, number)


@pytest.fixture
def steps(monkeypatch):
    """What each step's loss was computed from and its terms: a list of (tensors, terms)."""
    calls = []

    def recorded(weights, **tensors):
        total, terms = WEIGHTED_LOSS(weights, **tensors)
        calls.append((tensors, {name: term.detach() for name, term in terms.items()}))
        return total, terms
    monkeypatch.setattr(losses, "weighted_loss", recorded)
    return calls


# ---------------------------------------------------------------- the loop

@pytest.mark.parametrize("version, optimizer, lr, dtype, tolerance", [
    ("v3", "sgd", 0.01, torch.float32, 1e-5),
    # In v2 and v4 a rounded last digit grows; Adam and Adagrad divide by tiny gradients. In double all agree.
    ("v2", "sgd", 0.01, torch.float64, 1e-9), ("v4-plain", "sgd", 0.01, torch.float64, 1e-9),
    ("v3", "adam", 0.001, torch.float64, 1e-9), ("v3", "adagrad", 0.01, torch.float64, 1e-9)])
def test_fifty_steps_are_the_plain_formulation(version, optimizer, lr, dtype, tolerance, steps, monkeypatch):
    """Gamma as weight decay, fused optimizers and the layers of models.py, against the sum of the losses
    written out, PyTorch's layers and the optimizer's plain form."""
    dataset = shapes(300, side=16)
    phase, = phases(f"--version {version} --gamma 0.01 --optimizer {optimizer} --lr {lr} --batch-size 6")
    torch.manual_seed(0)
    model = models.build(version, (3, 16, 16)).to(dtype, memory_format=torch.channels_last)
    plain = models.build(version, (3, 16, 16)).to(dtype)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain.load_state_dict(start)
    for module in plain.modules():
        if isinstance(module, models.ConvTranspose2d):
            module.__class__ = torch.nn.ConvTranspose2d
    expected = []
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor.to(dtype))  # the batches' and the losses'

    means = epoch(model, dataset, phase)
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    kind = train.OPTIMIZERS[optimizer][0]
    step = kind(plain.parameters(), lr=lr, weight_decay=1e-4, foreach=False, **momentum)
    for images, labels in data.batches(dataset.train, 6, epoch_seed=train.stream(0, 0, "order"), flip=True):
        logits, rebuilt = plain(images.contiguous())
        classifier, autoencoder = F.cross_entropy(logits, labels), F.mse_loss(rebuilt, images)
        l2 = sum((p ** 2).sum() for p in plain.parameters()) / 2
        step.zero_grad()
        (classifier + autoencoder + 0.01 * l2).backward()
        step.step()
        expected.append(torch.stack([classifier, autoencoder]).detach())
    expected = torch.stack(expected)
    found = torch.stack([torch.stack(list(terms.values())) for _, terms in steps])
    assert found.dtype == dtype and len(found) == 50
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert means["classifier"] == pytest.approx(expected[:, 0].mean().item(), abs=1e-5)
    way = torch.cat([(p - start[name]).flatten() for name, p in plain.named_parameters()]).norm()
    apart = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), plain.parameters())]).norm()
    assert apart < 1e-3 * way


def test_an_orthogonal_update_keeps_the_singular_vectors_and_evens_the_values():
    """The polynomial of the iteration, three times, on each singular value over their norm."""
    torch.manual_seed(0)
    for shape in ((6, 10), (10, 6)):
        matrix = torch.randn(shape, dtype=torch.float64)
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        values = values / values.square().sum().sqrt()
        for _ in range(3):
            values = 3.4445 * values - 4.775 * values ** 3 + 2.0315 * values ** 5
        torch.testing.assert_close(train.orthogonal(matrix), u * values @ v, rtol=0, atol=1e-5)
        assert 0.5 < values.min() and values.max() < 1.25


def muon_step(weight, gradient, momentum, m, lr, decay=0.0):
    """(weight, momentum) after a step of Muon, by its formula."""
    momentum = m * momentum + gradient
    update = gradient + m * momentum
    if weight.ndim > 1:
        update = train.orthogonal(update.flatten(1)).view(weight.shape)
    return weight * (1 - lr * decay) - lr * update, momentum


def test_muon_is_nesterovs_sgd_but_for_the_matrices():
    """Two steps: a vector against PyTorch's SGD, a convolution's weights against the formula."""
    torch.manual_seed(0)
    vector, kernel = torch.randn(5, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    ours = [tensor.clone().requires_grad_() for tensor in (vector, kernel)]
    muon = train.Muon(ours, lr=0.1, momentum=0.8, weight_decay=0.01)
    plain, momentum = vector.clone().requires_grad_(), torch.zeros_like(kernel)
    sgd = torch.optim.SGD([plain], lr=0.1, momentum=0.8, nesterov=True)
    for _ in range(2):
        plain.grad, ours[1].grad = torch.randn_like(vector), torch.randn_like(kernel)
        ours[0].grad = plain.grad
        muon.step()
        plain.data *= 1 - 0.1 * 0.01  # decoupled
        sgd.step()
        kernel, momentum = muon_step(kernel, ours[1].grad, momentum, 0.8, 0.1, 0.01)
    torch.testing.assert_close(ours[0], plain)
    torch.testing.assert_close(ours[1].detach(), kernel)


def test_the_steps_of_v5_are_the_plain_formulation(steps, monkeypatch):
    """A rate for each step, smoothed labels and Muon, against their formulas; the second epoch of three, 12
    steps of 5 images."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    dataset, m = shapes(60, side=16), 0.85
    phase, = phases("--version v5-small --batch-size 5 --epochs 3 --lr 0.02")
    torch.manual_seed(0)
    model, plain = (models.build("v5-small", (3, 16, 16)).double() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    epoch(model, dataset, phase, 1)

    batches = data.batches(dataset.train, 5, epoch_seed=train.stream(0, 1, "order"), flip=True, shifts=2)
    buffers, expected = {}, []
    for step, (images, labels) in enumerate(batches):
        logits, rebuilt = plain(images)
        target = F.one_hot(labels, 10).double() * 0.8 + 0.2 / 10
        classifier = -(target * logits.log_softmax(1)).sum(1).mean()
        autoencoder = F.mse_loss(rebuilt, images)
        expected.append(torch.stack([classifier, autoencoder]).detach())
        plain.zero_grad()
        (classifier + autoencoder).backward()
        done = (1 + step / 12) / 3  # of the run, before this step; the peak is at 0.23
        rate = 0.02 * (1 - (done - 0.23) / 0.77)
        for name, weight in plain.named_parameters():
            with torch.no_grad():
                changed, buffers[name] = muon_step(weight, weight.grad, buffers.get(name, 0), m, rate)
                weight.copy_(changed)
    found = torch.stack([torch.stack(list(terms.values())) for _, terms in steps])
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-9)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-8)


def test_the_learning_rate_falls_in_steps_or_rises_and_falls():
    phase, = phases("--schedule onecycle --lr 2 --epochs 100")
    assert [train.learning_rate(phase, moment) for moment in (0, 11.5, 23, 61.5, 100)] == pytest.approx(
        [0.4, 1.2, 2.0, 1.0, 0.0])
    phase, = phases("--lr 0.5 --lr-step 2")
    assert [train.learning_rate(phase, moment) for moment in (0, 1.9, 2, 3.5, 4)] == pytest.approx(
        [0.5, 0.5, 0.05, 0.05, 0.005])


def test_each_half_of_separate_training_has_a_schedule_of_its_own():
    first, second = phases("--separate --epochs 12 --lr-step 4 --lr 1 --first-decay 0.5")
    assert (first.start, first.end, second.start, second.end) == (0, 6, 6, 12)
    rates = [train.learning_rate(phase, number) for phase in (first, second)
             for number in range(phase.start, phase.end)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01] * 2)
    assert (first.weight_decay, second.weight_decay) == (0.5, 1e-4)
    for phase in phases("--separate --schedule onecycle --epochs 20"):
        rates = [train.learning_rate(phase, phase.start + part * 10) for part in (0, 0.23, 1)]
        assert rates == pytest.approx([0.002, 0.01, 0])
    for epochs, end in ((30, 20), (3, 2), (2, 1)):  # the MNIST study's autoencoder has two thirds
        assert [phase.end for phase in phases(f"--version mnist --separate --epochs {epochs}")] == [end, epochs]


def moved(before, model):
    """The parts of a model of which any value differs, buffers (BatchNorm's statistics) included."""
    return {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("flags, second", [
    ("", {"classifier"}), ("--no-freeze-encoder", {"encoder", "classifier"}),
    ("--delta 0.5 --jigsaw-grid 2 --labels 10", {"classifier"})])
@pytest.mark.parametrize("version", ["v3", "v5-small"])
def test_each_half_of_separate_training_moves_its_parts_alone(version, flags, second):
    """Not by a bit the others; v5-small has BatchNorm, whose statistics a frozen encoder keeps."""
    dataset, model = shapes(24, 10 if "labels" in flags else None), models.build(version)
    both = phases(f"--version {version} --separate --epochs 2 --batch-size 8 {flags}")
    for number, (phase, expected) in enumerate(zip(both, [{"encoder", "decoder"}, second], strict=True)):
        before = copied(model)
        means = epoch(model, dataset, phase, number)
        assert moved(before, model) == expected
        assert ("classifier" not in means) == (means["accuracy"] is None) == (number == 0)
        assert ("autoencoder" not in means) == (number == 1)


def test_beta_0_trains_what_no_decoder_trains_and_leaves_the_decoder(tiny, tmp_path):
    """The study measured 84.01 against 85.27 % for these two; they are one function."""
    with_decoder, without = run(tiny, tmp_path, "--beta", "0"), run(tiny, tmp_path, "--no-decoder")
    assert (with_decoder.name, without.name) == ("v4_dataset-tiny_beta0_epochs2", "v4_dataset-tiny_epochs2_no-decoder")
    a, b = weights(with_decoder), weights(without)
    assert_equal(b, {name: a[name] for name in b})
    torch.manual_seed(0)
    fresh = models.build("v4").state_dict()
    for name in set(a) - set(b):
        assert name.startswith("decoder") and torch.equal(a[name], fresh[name])
    assert not torch.equal(a["encoder.0.weight"], fresh["encoder.0.weight"])
    assert "reconstruction" not in metrics_of(with_decoder)


def test_alpha_0_trains_the_autoencoder_alone(tiny, tmp_path):
    folder = run(tiny, tmp_path, "--version", "v3", "--alpha", "0")
    torch.manual_seed(0)
    fresh = models.build("v3")
    changed = moved(weights(folder), fresh)
    assert changed == {"encoder", "decoder"}
    assert "accuracy" not in metrics_of(folder) and metrics_of(folder)["reconstruction"]["mse"] > 0


def test_the_jigsaw_loss_is_of_jumbled_inputs_and_whole_targets(steps):
    dataset, model, seen = shapes(20), models.build("v3"), []
    phase, = phases("--version v3 --alpha 0 --beta 0 --delta 2 --no-flip --batch-size 10")
    forward = model.forward
    model.forward = lambda x, **which: (seen.append((x, which)), forward(x, **which))[1]
    before = copied(model)
    means = epoch(model, dataset, phase)
    jumbled = [x for x, which in seen if which == {"classify": False}]
    assert len(jumbled) == len(steps) == 2
    for tiles, (tensors, _) in zip(jumbled, steps):
        whole = tensors["images"]
        assert torch.equal(tiles.flatten(1).sort().values, whole.flatten(1).sort().values)
        assert not torch.equal(tiles, whole)
    assert moved(before, model) == {"encoder", "decoder"}
    assert means["loss"] == pytest.approx(2 * means["jigsaw"]) and "autoencoder" not in means


@pytest.mark.parametrize("flags", ["--delta 1", "--labels 20"])
def test_the_statistics_of_batch_norm_are_of_whole_images(flags):
    """One step without learning: with the jigsaw's pass, or that of the labelled images, an encoder's statistics
    are those of the pass of all images alone."""
    found = []
    for words in ("", flags):
        torch.manual_seed(0)
        model = models.build("v5-small")
        phase, = phases(f"--version v5-small --lr 1e-30 --batch-size 40 {words}")
        epoch(model, shapes(40, 20 if "labels" in words else None), phase)
        found.append({name: value for name, value in model.encoder.state_dict().items() if "running" in name})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_noise_is_on_the_input_and_the_clean_image_is_the_target(monkeypatch):
    """A network that gives back what it gets is off by the noise: its variance in normalised pixels."""
    dataset, model, (phase,) = shapes(200), models.build("v3"), phases("--version v3 --alpha 0 --noise 0.1")
    optimizer = train.make_optimizer(model, phase)
    model.forward = lambda x, **_: (None, x.requires_grad_(), None, None)
    monkeypatch.setattr(optimizer, "step", lambda: None)
    expected = sum((0.1 / std) ** 2 for std in data.STD) / 3
    trained = train.train_epoch(model, dataset, optimizer, phase, 0)["autoencoder"]
    assert trained == pytest.approx(expected, rel=0.02)
    assert train.train_epoch(model, dataset, optimizer, phase, 1)["autoencoder"] != trained  # other noise


def test_class_weights_make_small_classes_count(steps):
    dataset = shapes(200)
    dataset.train = data.resample(dataset.train, [20] * 5 + [5] * 5, 0)
    epoch(models.build("v3"), dataset, *phases("--version v3 --beta 0 --class-weights balanced"))
    assert steps[0][0]["class_weights"].tolist() == pytest.approx([125 / 10 / 20] * 5 + [125 / 10 / 5] * 5)


def test_few_labels_against_the_plain_formulation(steps):
    """The classifier's loss is the mean over the labelled images alone, the reconstruction's over all."""
    dataset, (phase,) = shapes(60, 10), phases("--version v3 --labels 10 --batch-size 20 --no-flip")
    torch.manual_seed(0)
    model = models.build("v3").to(memory_format=torch.channels_last)
    start = copied(model)
    means = epoch(model, dataset, phase)
    known = {image.sum().item() for image in data.normalise(dataset.labelled.images)}
    model.load_state_dict(start)
    tensors, terms = steps[0]
    inputs = tensors["labelled_inputs"]
    assert {image.sum().item() for image in inputs} <= known
    logits = model(inputs)[0]
    torch.testing.assert_close(terms["classifier"], F.cross_entropy(logits, tensors["labels"]))
    torch.testing.assert_close(terms["autoencoder"], F.mse_loss(model(tensors["images"])[1], tensors["images"]))
    assert len(steps) == 3 and means["classifier"] == pytest.approx(
        torch.stack([terms["classifier"] for _, terms in steps]).mean().item(), rel=1e-5)
    steps.clear()
    epoch(model, dataset, *phases("--version v3 --labels 10 --batch-size 20 --beta 0"))
    assert len(steps) == 3 and all("labelled_inputs" not in tensors for tensors, _ in steps)  # labelled ones alone
    rounds = torch.cat([tensors["images"] for tensors, _ in steps])[:60].unflatten(0, (6, 10))
    assert all(len(each.flatten(1).unique(dim=0)) == 10 for each in rounds)  # each round has every image once


def test_a_short_last_batch_is_joined_to_the_one_before(steps):
    """Seven images more than two batches of 16, then eight more: half a batch is one of its own."""
    for count, sizes in ((39, [16, 23]), (40, [16, 16, 8])):
        steps.clear()
        epoch(models.build("v3"), shapes(count), *phases("--version v3 --batch-size 16"))
        assert [len(tensors["images"]) for tensors, _ in steps] == sizes


def test_all_streams_of_random_numbers_differ():
    """Of seeds that differ by 2**31 too, although a generator on the CPU uses 32 bits alone."""
    found = [train.stream(seed, number, purpose, rank) for seed in (0, 1, 5, 2**31 - 1, 5 + 2**31)
             for number in range(40) for purpose in ("dropout", "noise", "tiles", "labelled") for rank in range(4)]
    found += [train.stream(seed, number, "order") for seed in (0, 1, 5, 5 + 2**31) for number in range(40)]
    assert len(found) == len(set(found)) and all(0 <= seed < 2**32 for seed in found)
    assert train.stream(3, 1, "order", 0) == train.stream(3, 1, "order", 1)  # one order for all processes


@pytest.mark.parametrize("flags, name", [
    ("--lr 1e30", r"epoch 1, step \d: the (classifier|autoencoder) loss is (nan|inf)"),
    ("--lr 1e18 --batch-size 60", "epoch 1: .* is not finite"),
    ("--beta 1e39 --alpha 0", r"step 2: the autoencoder loss is (nan|inf)")])  # the first one's weighted sum is inf
def test_a_run_that_explodes_ends_with_status_1_and_saves_nothing(flags, name, tiny, tmp_path, capsys):
    """Also in an epoch's last step, whose loss is of the weights before it."""
    argv = ["--version", "v3", "--dataset", tiny, "--output", tmp_path, "--device", "cpu", *flags.split()]
    assert fails(*argv) == 1
    error, (folder,) = capsys.readouterr().err, tmp_path.iterdir()
    assert error.count("\n") == 1 and "no epoch was completed" in error
    assert re.search(name, error), error
    assert [each.name for each in folder.iterdir()] == ["config.json"]


# ---------------------------------------------------------------- settings

@pytest.mark.parametrize("version", train.RECIPES)
def test_every_recipe_fits_its_version(version):
    """Its flags are parsed, none equals the default, and its network can be built and trained."""
    args, typed = train.parse(["--version", version] + ["--encoder", "C(8)"] * (version == "custom"))
    base = train.defaults("v1")
    assert all(value != base[key] or key in ("alpha", "beta", "epochs") for key, value in train.RECIPES[version].items())
    row = models.VERSIONS.get(version, models.Version("C(8)", "L'(10)"))
    assert ("classifier" in args.trained) == bool(row.classifier) or not args.alpha
    assert ("decoder" in args.trained) <= bool(row.decoder)
    assert {key: args.weights[key] for key in ("alpha", "beta", "kl")} == {
        key: getattr(args, key) for key in ("alpha", "beta", "kl")}


def test_the_help_begins_with_what_matters_and_has_the_versions_defaults():
    texts = [train.make_parser(version).format_help() for version in ("v4", "vae")]
    flags = [line.split()[0] for line in texts[0].splitlines() if line.startswith("  --")]
    assert flags[:10] == ["--version", "--dataset", "--alpha", "--beta", "--epochs", "--lr", "--batch-size",
                          "--seed", "--output", "--resume"]
    v4, vae = (" ".join(text.split()) for text in texts)
    assert "learning rate (0.01)" in v4 and "learning rate (0.001)" in vae
    assert "s^2 for pixels of standard deviation s (0.02)" in vae


@pytest.mark.parametrize("words, name", [
    ("", "v4"), ("--beta 0", "v4_beta0"), ("--version v1 --beta 0.5 --seed 3", "v1_beta0.5_seed3"),
    ("--no-decoder", "v4_no-decoder"), ("--dataset shapes --epochs 3", "v4_dataset-shapes_epochs3"),
    ("--dataset cifar10", "v4"), ("--version vae --dataset fashionmnist", "vae"), ("--skip", "v4_skip"),
    ("--encoder C'(16)>C(16)", "custom_encoder-Cp16-C16"), ("--name mine --seed 2", "mine_seed2"),
    ("--variant smote --constrain bird=0.5,deer=0.25", "v4_variant-smote_constrain-bird0.5-deer0.25"),
    ("--version joint5 --flip", "joint5_flip"), ("--version v4 --no-flip", "v4_no-flip")])
def test_a_run_is_named_after_what_differs(words, name):
    assert train.run_name(train.parse(words.split())[0]) == name


def test_long_names_stay_apart():
    words = ["--encoder", ">".join(["C'(16)"] * 30), "--seed", "2", "--blur"]
    one, two = (train.run_name(train.parse([*words, blur])[0]) for blur in ("1", "2"))
    assert one != two and one[:110] == two[:110] and len(one) <= 130 and one.endswith("_seed2")


def test_a_folder_named_as_a_set_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("shapes", "mnist", "photos"):
        Path(name).mkdir()
    found = [train.parse(["--dataset", name])[0].dataset for name in ("shapes", "mnist", "photos", "./shapes")]
    assert found == ["shapes", "mnist", str(tmp_path / "photos"), str(tmp_path / "shapes")]


def test_the_classes_of_a_recipe_are_those_of_its_own_data_set():
    """joint5's are CIFAR-10's: with another set all of its classes are taken, unless some are named."""
    assert train.parse(["--version", "joint5"])[0].classes == "automobile,cat,dog,horse,truck"
    assert train.parse(["--version", "joint5", "--dataset", "fashionmnist"])[0].classes is None
    assert train.parse("--version joint5 --dataset shapes --classes ring,star".split())[0].classes == "ring,star"


# ---------------------------------------------------------------- what a run leaves

def test_a_run_folder_has_everything_and_agrees_with_itself(tiny, tmp_path, capsys):
    folder = run(tiny, tmp_path, "--version", "v3", "--val-share", "0.2", "--noise", "0.05", "--gamma", "0.001")
    printed, rows, metrics, config = capsys.readouterr().out, log(folder, True), metrics_of(folder), config_of(folder)
    assert {each.name for each in folder.iterdir()} == {"config.json", "log.csv", "metrics.json", "predictions.csv",
                                                        "best.pt", "last.pt"}
    assert config["images"] == {"train": 48, "test": 30} and config["settings"]["noise"] == 0.05
    assert config["command"][:2] == ["python", "train.py"] and config["torch"] == torch.__version__
    best = max(reversed(rows), key=lambda row: float(row["val_accuracy"]))
    assert metrics["accuracy"]["best_chosen_on"] == "val" and metrics["accuracy"]["best_epoch"] == int(best["epoch"])
    assert metrics["accuracy"]["test"] == pytest.approx(float(rows[-1]["test_accuracy"]))
    assert metrics["training_images"]["images"] == 48
    columns = printed[printed.index("epoch  "):].splitlines()
    assert columns[0].split() == ["epoch", "lr", "classifier", "autoencoder", "l2", "acc.", "%", "PSNR", "time",
                                  "images"]
    assert columns[2].split()[2:4] == [f"{float(rows[0][f'{part}_classifier']):.4f}" for part in ("train", "test")]
    for row in rows:
        for part in ("train", "test"):
            loss = float(row[f"{part}_classifier"]) + float(row[f"{part}_autoencoder"])
            assert float(row[f"{part}_loss"]) == pytest.approx(loss + 0.001 * float(row["train_l2"]))


def test_best_pt_is_of_the_best_epoch_and_last_pt_of_the_last(tiny, tmp_path, monkeypatch):
    """The accuracies are given here: the second epoch's is the best one."""
    measure, given = evaluate.measure, iter([20.0, 50.0, 40.0])

    def measured(model, split, args, **more):
        found = measure(model, split, args, **more)
        return found | {"accuracy": next(given, 0.0)}
    monkeypatch.setattr(evaluate, "measure", measured)
    folder = run(tiny, tmp_path, "--version", "v3", "--epochs", "3")
    assert [torch.load(folder / name, weights_only=True)["epoch"] for name in ("best.pt", "last.pt")] == [2, 3]
    assert not torch.equal(*(weights(folder, name)["encoder.0.weight"] for name in ("best.pt", "last.pt")))


def test_a_variational_run_trains_both_its_terms(tiny, tmp_path):
    for row in log(run(tiny, tmp_path, "--version", "vae", "--kl", "0.5")):
        for part in ("train", "test"):
            loss = float(row[f"{part}_autoencoder"]) + 0.5 * float(row[f"{part}_kl"])
            assert float(row[f"{part}_loss"]) == pytest.approx(loss)


def test_both_halves_of_separate_training_are_in_the_log(tiny, tmp_path):
    rows = log(run(tiny, tmp_path, "--version", "v3", "--separate", "--epochs", "4", "--lr-step", "2"))
    assert [row["train_autoencoder"] != "" for row in rows] == [True, True, False, False]
    assert [row["test_accuracy"] != "" for row in rows] == [False, False, True, True]
    mse = [row["test_mse"] for row in rows]
    assert mse[0] != mse[1] == mse[2] == mse[3]  # measured to the end; frozen, so it stays


def test_a_run_starts_from_another_ones_weights(tiny, tmp_path, capsys):
    """Encoder and decoder of an autoencoder; the classifier, of another number of classes, from the seed."""
    source = run(tiny, tmp_path, "--version", "v3", "--alpha", "0")
    args, _ = train.parse(["--version", "v3", "--dataset", tiny, "--classes", "ring,star", "--device", "cpu",
                           "--init", str(source / "last.pt")])
    _, model = train.prepare(args)
    assert "encoder, decoder; all else" in capsys.readouterr().out
    taken, fresh = weights(source), models.build("v3", num_classes=2)
    assert moved(taken | {name: value for name, value in model.state_dict().items() if "classifier" in name},
                 model) == set()
    assert model.classifier[-1].weight.shape == fresh.classifier[-1].weight.shape
    args.scale = "0..1"
    with pytest.raises(train.UsageError, match="was trained with imagenet; expected --scale=imagenet"):
        train.prepare(args)
    assert fails("--version", "v1", "--dataset", tiny, "--init", source / "last.pt", "--output", tmp_path / "no") == 2
    assert "--init" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_v5_is_whitened_from_its_training_images(tiny):
    """The outputs of its first twelve filters are uncorrelated."""
    dataset, model = train.prepare(train.parse(["--version", "v5-small", "--dataset", tiny, "--device", "cpu"])[0])
    layer, images = model.encoder[0], data.normalise(dataset.train.images)
    outputs = layer(images).detach().permute(0, 2, 3, 1).flatten(0, 2)[:, :12].double()
    products = outputs.T @ outputs / len(outputs)
    assert (products - products.diag().diag()).abs().max() < 0.01
    assert 0 < products.diag().min() and products.diag().max() < 1.01


# ---------------------------------------------------------------- repetition

def test_the_same_command_gives_the_same_bits_in_another_process(tiny, tmp_path, python):
    """bf16 where the machine has it, dropout, flips, both losses; and nothing heavy is imported at the start."""
    flags = ["--dataset", tiny, "--epochs", "2", "--device", "cpu", "--labels", "20", "--output", tmp_path]
    code = ("import sys, train; heavy = {'torchvision', 'matplotlib', 'PIL'} & set(sys.modules); "
            "assert not heavy, heavy; sys.exit(train.main(sys.argv[1:]))")
    done = python("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = tmp_path / "v4_dataset-tiny_epochs2_labels20", run(tiny, tmp_path, "--labels", "20")
    assert two.name == one.name + "_run2" and log(one) == log(two)  # a run never overwrites another
    assert_equal(weights(one), weights(two))
    other = weights(run(tiny, tmp_path, "--labels", "20", "--seed", "1"))
    assert not torch.equal(weights(one)["encoder.0.weight"], other["encoder.0.weight"])


def interrupted(monkeypatch, at):
    """train_epoch that Ctrl-C ends in its call number `at` (from 0)."""
    calls, train_epoch = iter(range(99)), train.train_epoch

    def call(*args):
        if next(calls) == at:
            raise KeyboardInterrupt
        return train_epoch(*args)
    monkeypatch.setattr(train, "train_epoch", call)


@pytest.mark.parametrize("flags", ["--version v4 --delta 0.5 --labels 20 --noise 0.1",
                                   "--version v5-small --batch-size 20", "--version v3 --separate"])
@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_run_resumes_bit_for_bit(flags, at, tiny, tmp_path, monkeypatch, capsys):
    words = [*flags.split(), "--epochs", "4"]
    whole = run(tiny, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        interrupted(patch, at)
        assert fails("--dataset", tiny, "--device", "cpu", *words, "--output", tmp_path / "half") == 130
    half, = (tmp_path / "half").iterdir()
    assert f"resume with: python train.py --resume {half}" in capsys.readouterr().err and len(log(half)) == at
    assert fails("--resume", half, "--lr", "3") == 2
    assert train.main(["--resume", str(half)]) == 0
    assert_equal(weights(half), weights(whole))
    assert log(half) == log(whole) and len(config_of(half)["resumed"]) == 1
    assert metrics_of(half)["accuracy"] == metrics_of(whole)["accuracy"]


def test_a_run_can_be_lengthened_by_its_epochs_alone(tiny, tmp_path, capsys):
    longer = run(tiny, tmp_path / "longer", "--version", "v3", "--epochs", "3")
    folder = run(tiny, tmp_path, "--version", "v3")
    assert fails("--resume", folder) == 2 and "has completed 2 epochs" in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--epochs", "3"]) == 0
    assert_equal(weights(folder), weights(longer))
    fixed = run(tiny, tmp_path, "--version", "v3", "--separate")
    assert fails("--resume", fixed, "--epochs", "4") == 2 and "depend on the total" in capsys.readouterr().err


def test_a_run_resumes_on_its_own_data_alone(tiny, tmp_path, capsys):
    """One pixel of one image differs."""
    path = tmp_path / "tiny.npz"
    shutil.copy(tiny, path)
    folder = run(str(path), tmp_path / "out", "--version", "v3")
    with np.load(path) as file:
        arrays = dict(file)
    arrays["x_train"][0, 0, 0, 0] ^= 1
    np.savez(path, **arrays)
    assert fails("--resume", folder, "--epochs", "3") == 2
    assert "has changed" in capsys.readouterr().err and len(log(folder)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_killed_run_and_a_killed_sweep_go_on(tiny, tmp_path):
    """Killed as soon as a checkpoint is there; the same command of a sweep resumes its runs."""
    words = ["--version", "v3", "--dataset", tiny, "--device", "cpu", "--batch-size", "4", "--epochs", "4",
             "--output", str(tmp_path), "--seeds", "1"]
    folder = tmp_path / "v3_dataset-tiny_epochs4_batch-size4"
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *words], start_new_session=True,
                               stdout=subprocess.DEVNULL)
    while not (folder / "last.pt").exists():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    models.load(folder / "last.pt")
    assert train.main(words) == 0
    whole = run(tiny, tmp_path / "whole", "--version", "v3", "--batch-size", "4", "--epochs", "4")
    assert_equal(weights(folder), weights(whole))
    assert log(folder) == log(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo on Windows needs another set-up")
def test_two_processes_train_what_one_does(tiny, tmp_path):
    """As torchrun starts them: each its share of every batch, the first one measures and writes."""
    words = ["--version", "v3", "--dataset", tiny, "--device", "cpu", "--precision", "fp32", "--epochs", "2",
             "--batch-size", "20"]
    alone = run(tiny, tmp_path / "one", *words)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [subprocess.Popen([sys.executable, ROOT / "train.py", *words, "--output", str(tmp_path / "two")],
                                  env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                                  stdout=subprocess.PIPE, text=True) for rank in range(2)]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and printed[1] == ""
    both, = (tmp_path / "two").iterdir()
    assert config_of(both)["processes"] == 2
    for name, weight in weights(alone).items():
        torch.testing.assert_close(weights(both)[name], weight, rtol=0, atol=1e-5)
    for one, two in zip(log(alone), log(both)):
        assert float(two["train_loss"]) == pytest.approx(float(one["train_loss"]), rel=1e-4)
        assert float(two["test_mse"]) == pytest.approx(float(one["test_mse"]), rel=1e-4)


# ---------------------------------------------------------------- many runs

@pytest.mark.parametrize("words, count", [
    *((f"--sweep {name}", None) for name in train.SWEEPS), ("--seeds 3 --version vae", 3),
    ("--sweep beta=0,0.5,1 --seeds 2 --version v1 --seed 5", 6), ("--sweep help --lr 0.3 --no-flip", 10),
    ("--sweep version=v1,v3 --dataset shapes", 2)])
def test_the_listed_commands_are_the_runs(words, count, capsys):
    """Each line is a command of one run, of another folder than the others."""
    assert train.main([*words.split(), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [train.parse(shlex.split(line)[2:])[0] for line in lines]
    assert count in (None, len(lines)) and len({train.run_name(args) for args in found}) == len(lines)
    assert all(shlex.split(line)[:2] == [sys.executable, str(ROOT / "train.py")] for line in lines)
    assert all(args.dataset for args in found)  # no substitute among many


def test_a_sweep_of_a_setting_takes_its_values_as_they_are():
    """Quotes, signs, and settings that have an effect in the runs alone, which are compared with the first."""
    for sweep, words, key, values in (
            ("encoder=C'(8)>L(8),C(8)>L(8)", "--version v1", "encoder", ["C'(8)>L(8)", "C(8)>L(8)"]),
            ("lr=1e-3,.01", "", "lr", [0.001, 0.01]), ("scale=-1..1,0..1", "", "scale", ["-1..1", "0..1"]),
            ("jigsaw-grid=2,4", "--delta 1", "jigsaw_grid", [2, 4]), ("flip=yes,no", "", "flip", [True, False])):
        runs, _, against = train.plan(Namespace(sweep=sweep, seeds=None), words.split())
        assert [getattr(args, key) for _, args in runs.values()] == values and against is None


def test_an_interrupted_sweep_ends_its_runs(tiny, tmp_path, monkeypatch):
    """By SIGTERM, that reaches the sweep alone."""
    ended = threading.Event()
    child = mock.Mock(wait=lambda: os.kill(os.getpid(), signal.SIGTERM) or ended.wait(60), terminate=ended.set)
    monkeypatch.setattr(train.subprocess, "Popen", lambda *_, **__: child)
    assert fails("--version", "v3", "--dataset", tiny, "--seeds", "2", "--output", tmp_path) == 130
    assert ended.is_set()


def test_a_failed_run_does_not_change_what_the_others_are_compared_with(tmp_path, monkeypatch):
    monkeypatch.setattr(train.subprocess, "Popen", lambda *_, **__: mock.Mock(wait=lambda: 1))
    monkeypatch.setattr(evaluate, "read_run", lambda folder: folder.name.startswith("v1"))
    monkeypatch.setattr(evaluate, "compare", mock.Mock())
    assert train.main(["--sweep", "help", "--dataset", "shapes", "--output", str(tmp_path)]) == 1
    folders, _, against = evaluate.compare.call_args.args
    assert len(folders) == 2 and against == "beta=0"


def test_runs_that_would_share_a_folder_are_refused(tiny, tmp_path, capsys):
    words = ["--dataset", tiny, "--output", str(tmp_path), "--sweep"]
    for more in (["beta=0,1", "--name", "both"], ["seed=1,2"], ["lr=0.1,0.10"]):
        assert fails(*words, *more) == 2 and "is of two runs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_whose_data_set_is_missing_starts_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.subprocess, "Popen", None)
    assert fails("--dataset", "photos", "--seeds", "2", "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("no data set 'photos'") == 1 and list(tmp_path.iterdir()) == []


def test_a_sweeps_first_run_that_fails_by_its_own_setting_stops_no_other(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.subprocess, "Popen", lambda *_, **__: mock.Mock(wait=lambda: 1))
    assert train.main(["--dataset", tiny, "--sweep", "train-size=1000000,10", "--output", str(tmp_path)]) == 1
    assert "2 of 2 runs to train" in capsys.readouterr().out


def test_the_sweeps_are_those_of_the_results():
    def settings(name):
        many = Namespace(sweep=name, seeds=None)
        return [args for _, args in train.plan(many, [])[0].values()]
    found = [(args.version, args.beta, args.blur, args.epochs, args.lr_step) for args in settings("help")]
    assert found == [(version, beta, blur, 12, 3) for version, blur in (
        ("v1", 0), ("v2", 0), ("v3", 0), ("v4", 0), ("v4", 6.5)) for beta in (1, 0)]
    found = [(args.version, args.labels, args.beta, args.epochs) for args in settings("labels")]
    assert found == [("v4", count, beta, 12) for count in (100, 1000, 10_000) for beta in (1, 0)]
    assert len(settings("study")) == 43
    assert [args.version for args in settings("latent")] == ["cnn10", "cnn32", "cnn100", "cnn1000"]


def test_a_sweep_of_a_setting_with_seeds_is_trained_compared_and_not_repeated(tiny, tmp_path, capsys):
    """Two runs at once in processes of their own; each has the bits of one alone. A run that fails stops no other,
    and a folder of the same name with other settings is refused."""
    words = ["--version", "v3", "--dataset", tiny, "--epochs", "1", "--device", "cpu", "--jobs", "2", "--output",
             str(tmp_path), "--sweep", "encoder=C(8),C(8)>C(8)>C(8)>C(8)>C(8)>C(8)", "--seeds", "2"]
    assert train.main(words) == 1
    printed = capsys.readouterr().out
    out = tmp_path / "sweep-encoder-C8-C8-C8-C8-C8-C8-C8"
    assert printed.count("cannot pool a map of 1x1") == 2 and "4 of 4 runs to train, 2 at once" in printed
    folders = sorted(each.parent for each in out.glob("v3*/metrics.json"))
    assert [each.name for each in folders] == [f"v3_dataset-tiny_epochs1_encoder-C8{seed}" for seed in ("", "_seed1")]
    alone = run(tiny, tmp_path / "alone", "--version", "v3", "--epochs", "1", "--encoder", "C(8)", "--seed", "1")
    assert_equal(weights(folders[1]), weights(alone))
    assert "| v3_dataset-tiny_epochs1_encoder-C8 | 2 |" in (out / f"comparison-{folders[0].name}" / "comparison.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.glob("v3*/*.pt")}
    words[words.index("--sweep") + 1] = "encoder=C(8)"
    out.rename(tmp_path / "sweep-encoder-C8")
    assert train.main(words) == 0 and "0 of 2 runs to train" in capsys.readouterr().out
    assert sorted(before.values()) == sorted(path.stat().st_mtime_ns for path in
                                             (tmp_path / "sweep-encoder-C8").glob("v3*/*.pt"))
    other = tmp_path / "other" / "tiny.npz"
    other.parent.mkdir()
    shutil.copy(tiny, other)
    words[words.index("--dataset") + 1] = str(other)
    assert fails(*words) == 2 and "holds a run with dataset" in capsys.readouterr().err
