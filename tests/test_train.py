"""The training loop against the plain formulation, what a run leaves, and its repetition."""
import csv
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import models
import evaluate
import train
from evaluate import best_row, chosen_on, measure
from losses import weighted_loss

ROOT = Path(__file__).parent.parent


def run(tiny, out, *flags):
    """A short run of train.py in this process; returns its folder."""
    argv = ["--dataset", tiny, "--epochs", "2", "--output", str(out), "--device", "cpu", *flags]
    before = set(Path(out).iterdir()) if Path(out).exists() else set()
    assert train.main(argv) == 0
    folder, = set(Path(out).iterdir()) - before
    return folder


def settings(**changes):
    """A phase's settings: the study's, and changes."""
    phase, = train.phases(Namespace(**train.STUDY | dict(precision="fp32") | changes))
    return phase


# ---------------------------------------------------------------- the loop

@pytest.mark.parametrize("version, optimizer, lr, dtype, tolerance", [
    ("v1", "sgd", 0.01, torch.float32, 1e-5), ("v3", "sgd", 0.01, torch.float32, 1e-5),
    # In v2 and v4 a rounded last digit grows (in fp32 v2 comes to differ by up to 2e-5, v4 by 2e-4, as the
    # library's own two memory layouts do); Adam and Adagrad divide by tiny gradients. In double all agree.
    ("v2", "sgd", 0.01, torch.float64, 1e-9), ("v4-plain", "sgd", 0.01, torch.float64, 1e-9),
    ("v3", "adam", 0.001, torch.float64, 1e-9), ("v3", "adagrad", 0.01, torch.float64, 1e-9)])
def test_fifty_steps_are_the_plain_formulation(version, optimizer, lr, dtype, tolerance, monkeypatch):
    """Gamma as weight decay, fused optimizers and our layers, against the sum of the losses
    written out, the library's layers and the optimizer's plain form."""
    split = data.shapes(train=800, test=10).train
    s = settings(gamma=0.01, optimizer=optimizer, lr=lr, batch_size=16)
    torch.manual_seed(0)
    model = models.build(version).to(dtype, memory_format=torch.channels_last)
    plain = models.build(version).to(dtype)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain.load_state_dict(start)
    for module in plain.modules():
        if isinstance(module, models.ConvTranspose2d):
            module.__class__ = torch.nn.ConvTranspose2d
    ours, theirs = [], []

    normalise = data.normalise
    monkeypatch.setattr(data, "normalise", lambda *args: normalise(*args).to(dtype))
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor.to(dtype))  # the losses' own

    def recorded(*args, **kwargs):
        loss, terms = weighted_loss(*args, **kwargs)
        ours.append(torch.stack(list(terms.values())).detach())
        return loss, terms
    monkeypatch.setattr(train, "weighted_loss", recorded)
    means = train.train_epoch(model, split, train.make_optimizer(model, s), s, 0)

    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    step = train.OPTIMIZERS[optimizer](plain.parameters(), lr=lr, weight_decay=1e-4, foreach=False,
                                       **momentum)
    for images, labels in data.batches(split, 16, epoch_seed=0, flip=True):
        logits, rebuilt = plain(images.contiguous())
        classifier, autoencoder = F.cross_entropy(logits, labels), F.mse_loss(rebuilt, images)
        l2 = sum((p ** 2).sum() for p in plain.parameters()) / 2
        step.zero_grad()
        (classifier + autoencoder + 0.01 * l2).backward()
        step.step()
        theirs.append(torch.stack([classifier, autoencoder]).detach())
    assert len(ours) == len(theirs) == 50
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=tolerance)
    assert means["classifier"] == pytest.approx(torch.stack(theirs)[:, 0].mean().item(), abs=1e-5)
    way = torch.cat([(p - start[name]).flatten() for name, p in plain.named_parameters()]).norm()
    apart = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), plain.parameters())]).norm()
    assert apart < 1e-3 * way


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_repeats_itself_and_agrees_with_the_cpu(tiny, tmp_path):
    flags = ["--precision", "fp32", "--version", "v3"]
    a, b, cpu = (torch.load(run(tiny, tmp_path, *flags, "--device", device) / "last.pt", map_location="cpu",
                            weights_only=True) for device in ("cuda", "cuda", "cpu"))
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    assert a["rows"][-1]["train_loss"] == pytest.approx(cpu["rows"][-1]["train_loss"], rel=1e-3)


def test_the_learning_rate_drops_in_steps():
    split = data.shapes(train=8, test=8).train
    s = settings(lr=0.5, lr_step=2, lr_decay=0.1)
    model = models.build("v3")
    optimizer = train.make_optimizer(model, s)
    rates = []
    for epoch in range(5):
        train.train_epoch(model, split, optimizer, s, epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005])


def test_beta_0_trains_what_no_decoder_trains_and_leaves_the_decoder(tiny, tmp_path):
    """The study measured 84.01 against 85.27 % for these two; they are one function."""
    with_decoder = run(tiny, tmp_path, "--beta", "0")
    without = run(tiny, tmp_path, "--no-decoder")
    assert (with_decoder.name, without.name) == ("v4_dataset-tiny_beta0_epochs2",
                                                 "v4_dataset-tiny_no-decoder_epochs2")
    a, b = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (with_decoder, without))
    for name, weight in b.items():
        assert torch.equal(weight, a[name]), name
    torch.manual_seed(0)
    fresh = models.build("v4").state_dict()
    for name in set(a) - set(b):
        assert name.startswith("decoder") and torch.equal(a[name], fresh[name])
    assert not torch.equal(a["encoder.0.weight"], fresh["encoder.0.weight"])
    assert (with_decoder / "recon.png").exists() and not (without / "recon.png").exists()
    assert json.loads((with_decoder / "metrics.json").read_text())["reconstruction"] is None


def test_alpha_0_trains_the_autoencoder_alone(tiny, tmp_path):
    folder = run(tiny, tmp_path, "--version", "v3", "--alpha", "0")
    weights = torch.load(folder / "last.pt", weights_only=True)["model"]
    torch.manual_seed(0)
    fresh = models.build("v3").state_dict()
    moved = {name for name in fresh if not torch.equal(weights[name], fresh[name])}
    assert moved == {name for name in fresh if not name.startswith("classifier")}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert "accuracy" not in metrics and metrics["reconstruction"]["mse"] > 0


def test_the_same_command_twice_gives_the_same_bits(tiny, tmp_path):
    """Two processes; bf16 where the machine has it, dropout, flips, both losses."""
    command = [sys.executable, ROOT / "train.py", "--dataset", tiny, "--epochs", "2", "--device", "cpu",
               "--output", "runs"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True)
            for name in ("v4_dataset-tiny_epochs2", "v4_dataset-tiny_epochs2_run2"))
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    other = torch.load(run(tiny, tmp_path / "runs", "--seed", "1") / "last.pt", weights_only=True)
    assert not torch.equal(a["model"]["encoder.0.weight"], other["model"]["encoder.0.weight"])


def test_training_learns(tiny, tmp_path):
    """Sixty images are learnt by heart: far more right answers than chance's ten percent."""
    folder = run(tiny, tmp_path, "--version", "v3", "--epochs", "40", "--lr-step", "40", "--no-flip",
                 "--batch-size", "10", "--optimizer", "adam", "--lr", "0.002")
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert float(rows[-1]["train_accuracy"]) > 80
    assert float(rows[-1]["train_autoencoder"]) < 0.8 * float(rows[0]["train_autoencoder"])


# ---------------------------------------------------------------- the rest of the CIFAR study

def moved(before, model):
    """The parts of a model of which any value differs, buffers (BatchNorm's statistics) included."""
    return {name.split(".")[0] for name, value in model.state_dict().items()
            if not torch.equal(value, before[name])}


@pytest.mark.parametrize("changes, second", [
    ({}, {"classifier"}), ({"freeze_encoder": False}, {"encoder", "classifier"}),
    ({"delta": 0.5, "jigsaw_grid": 2}, {"classifier"})])
@pytest.mark.parametrize("version", ["v3", "mobilenet"])
def test_each_half_of_separate_training_moves_its_parts_alone(version, changes, second):
    """Not by a bit the others; MobileNetV2 has BatchNorm, whose statistics a frozen encoder keeps."""
    split = data.shapes(train=24, test=10).train
    s = Namespace(**train.STUDY | dict(separate=True, epochs=2, precision="fp32", batch_size=8) | changes)
    model = models.build(version, (3, 32, 32), pretrained=False)
    for epoch, (phase, expected) in enumerate(zip(train.phases(s), [{"encoder", "decoder"}, second])):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        means = train.train_epoch(model, split, train.make_optimizer(model, phase), phase, epoch)
        assert moved(before, model) == expected
        assert (means["classifier"] is None) == (epoch == 0)
        assert (means["autoencoder"] is None) == (epoch == 1)


def test_the_learning_rate_starts_anew_in_each_half_and_drops_twice_as_often():
    s = Namespace(**train.STUDY | dict(separate=True, epochs=12, lr_step=4, lr=1.0, precision="fp32"))
    split, model, rates = data.shapes(train=8, test=8).train, models.build("v3"), []
    for phase in train.phases(s):
        optimizer = train.make_optimizer(model, phase)
        for epoch in range(phase.start, phase.end):
            train.train_epoch(model, split, optimizer, phase, epoch)
            rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01] * 2)


def test_both_halves_are_in_the_log(tiny, tmp_path):
    folder = run(tiny, tmp_path, "--version", "v3", "--separate", "--epochs", "4")
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["train_autoencoder"] != "" for row in rows] == [True, True, False, False]
    assert [row["test_accuracy"] != "" for row in rows] == [False, False, True, True]
    mse = [row["test_mse"] for row in rows]
    assert mse[0] != mse[1] == mse[2] == mse[3]  # measured to the end; frozen, so it stays
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["epoch"] == json.loads((folder / "metrics.json").read_text())["accuracy"]["best_epoch"] > 2


def test_the_jigsaw_loss_is_of_jumbled_inputs_and_whole_targets(monkeypatch):
    split = data.shapes(train=20, test=10).train
    s = settings(alpha=0.0, beta=0.0, delta=2.0, jigsaw_grid=4, flip=False, batch_size=10)
    model, seen, compared = models.build("v3"), [], []
    forward = model.forward
    model.forward = lambda x, **which: (seen.append((x, which)), forward(x, **which))[1]

    def recorded(*weights, images, **tensors):
        compared.append(images)
        return weighted_loss(*weights, images=images, **tensors)
    monkeypatch.setattr(train, "weighted_loss", recorded)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    means = train.train_epoch(model, split, train.make_optimizer(model, s), s, 0)
    jumbled = [x for x, which in seen if which == {"classify": False}]
    assert len(jumbled) == len(compared) == 2
    for tiles, whole in zip(jumbled, compared):
        assert torch.equal(tiles.flatten(1).sort().values, whole.flatten(1).sort().values)
        assert not torch.equal(tiles, whole)
    assert moved(before, model) == {"encoder", "decoder"}
    assert means["loss"] == pytest.approx(2 * means["jigsaw"]) and means["autoencoder"] is None


def test_noise_goes_in_and_the_clean_picture_is_the_target(monkeypatch):
    """A network that gives back what it gets is off by the noise: its variance in normalised pixels."""
    split = data.shapes(train=200, test=10).train
    s = settings(alpha=0.0, noise=0.1)
    model = models.build("v3")
    optimizer = train.make_optimizer(model, s)
    model.forward = lambda x, **_: (torch.zeros(len(x), 10), x.requires_grad_())
    monkeypatch.setattr(optimizer, "step", lambda: None)
    expected = sum((0.1 / std) ** 2 for std in data.STD) / 3
    assert train.train_epoch(model, split, optimizer, s, 0)["autoencoder"] == pytest.approx(expected, rel=0.02)
    measured = measure(model, split, noise=0.1)
    assert measured["autoencoder"] == pytest.approx(expected, rel=0.02)
    assert measured["autoencoder"] == measure(model, split, noise=0.1)["autoencoder"]
    assert measure(model, split)["autoencoder"] == 0


def test_class_weights_make_small_classes_count(monkeypatch):
    split = data.resample(data.shapes(train=200, test=10).train, [20] * 5 + [5] * 5, 0)
    s, seen = settings(beta=0.0, class_weights="balanced"), []
    monkeypatch.setattr(train, "weighted_loss", lambda *weights, class_weights, **tensors: (
        seen.append(class_weights), weighted_loss(*weights, class_weights=class_weights, **tensors))[1])
    model = models.build("v3")
    train.train_epoch(model, split, train.make_optimizer(model, s), s, 0)
    assert seen[0].tolist() == pytest.approx([125 / 10 / 20] * 5 + [125 / 10 / 5] * 5)


def test_a_run_with_everything_leaves_its_pictures_and_repeats_itself(tiny, tmp_path, capsys):
    flags = ["--variant", "smote", "--constrain", "circle=0.5,star=0.5", "--blur", "0.5", "--noise", "0.05",
             "--delta", "0.5", "--skip", "--class-weights", "balanced", "--val-share", "0.2", "--batch-size", "8"]
    first, second = run(tiny, tmp_path, *flags), run(tiny, tmp_path, *flags)
    other = run(tiny, tmp_path, *flags, "--seed", "1")
    a, b, c = (torch.load(folder / "last.pt", weights_only=True) for folder in (first, second, other))
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    assert not torch.equal(a["model"]["classifier.lower.0.weight"], c["model"]["classifier.lower.0.weight"])
    for picture in ("jigsaw.png", "smote.png", "recon.png", "curves.png"):
        assert min(Image.open(first / picture).size) > 200
    config = json.loads((first / "config.json").read_text())
    assert config["images_per_class"] == dict.fromkeys(data.SHAPES, 5)  # 48 of 60: 4 to 5 a class
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["accuracy"]["best_chosen_on"] == "val"
    assert set(metrics["per_class_accuracy"]) == set(data.SHAPES)
    assert "best (on val)" in capsys.readouterr().out


def test_a_sweep_goes_on_where_it_stopped(tiny, tmp_path, capsys, monkeypatch):
    command = ["--sweep", "latent", "--dataset", tiny, "--epochs", "2", "--train-size", "20", "--device", "cpu",
               "--output", str(tmp_path)]
    epochs, train_epoch, trained = iter(range(99)), train.train_epoch, []

    def counted(model, *args):
        if next(epochs) == 3:  # the second member's second epoch
            raise KeyboardInterrupt
        trained.append(model.code_shape[0])
        return train_epoch(model, *args)
    monkeypatch.setattr(train, "train_epoch", counted)
    assert train.main(command) == 130
    assert "the same command goes on with cnn32" in capsys.readouterr().err
    assert train.main(command) == 0
    assert trained == [10, 10, 32, 32, 100, 100, 1000, 1000]
    folder, = tmp_path.iterdir()
    assert folder.name == "sweep-latent_dataset-tiny_train-size20_epochs2"
    lines = (folder / "sweep.md").read_text().splitlines()
    for line, code in zip(lines[2:], (10, 32, 100, 1000)):
        run_folder, = folder.glob(f"cnn{code}_*")
        metrics = json.loads((run_folder / "metrics.json").read_text())
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:4] == [f"cnn{code}", str(code), "3 + 3", f"{metrics['parameters']:,}"]
        assert cells[6] == f"{metrics['reconstruction']['mse']:.6f}"
    for picture in ("sheet.png", "sweep.png"):
        assert min(Image.open(folder / picture).size) > 300
    assert train.main(command) == 0 and len(trained) == 8  # nothing is trained twice


def test_a_variational_run_trains_both_its_terms(tiny, tmp_path):
    folder = run(tiny, tmp_path, "--version", "vae", "--kl", "0.5")
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for part in ("train", "test"):
            loss = float(row[f"{part}_autoencoder"]) + 0.5 * float(row[f"{part}_kl"])
            assert float(row[f"{part}_loss"]) == pytest.approx(loss)
    assert float(rows[1]["train_kl"]) > 0
    assert {"prior.png", "walk.png"} <= {each.name for each in folder.iterdir()}


def test_the_joint_model_reports_a_true_accuracy(tiny, tmp_path):
    """Its scores of no class are wrong answers; noise is in training alone."""
    folder = run(tiny, tmp_path, "--version", "joint5", "--classes", "ring,star,heart,bars,arrow")
    config = json.loads((folder / "config.json").read_text())
    assert config["network"]["scores"] == 256 and config["clean_test"] and config["noise"] == 0.05
    model, content = evaluate.load_checkpoint(folder / "last.pt")
    dataset = evaluate.load_data(content["settings"])
    with torch.no_grad(), evaluate.autocast(torch.device("cpu"), content["settings"]["precision"]):
        logits, rebuilt = model.eval()(data.normalise(dataset.test.images, scale="-1..1"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert logits.shape == (15, 256)
    assert metrics["accuracy"]["last"] == pytest.approx(
        100 * (logits.argmax(1) == dataset.test.labels).float().mean().item())
    error = rebuilt.float() - data.normalise(dataset.test.images, scale="-1..1")
    assert metrics["reconstruction"]["autoencoder"] == pytest.approx(error.square().mean().item(), rel=1e-2)
    assert 2 * metrics["reconstruction"]["mae"] == pytest.approx(error.abs().mean().item(), rel=1e-2)


def test_the_best_epoch_is_chosen_on_held_out_images_where_there_are_any():
    rows = [dict(test_accuracy=test, val_accuracy=val, test_mse=None, val_mse=None)
            for test, val in ((50, 40), (70, 39), (60, 41))]
    assert best_row(rows) is rows[2] and chosen_on(rows) == "val"
    for row in rows:
        row["val_accuracy"] = None
    assert best_row(rows) is rows[1] and chosen_on(rows) == "test"


# ---------------------------------------------------------------- what a run leaves

def test_a_run_folder_has_everything_and_agrees_with_itself(tiny, tmp_path, capsys):
    folder = run(tiny, tmp_path)
    assert folder.name == "v4_dataset-tiny_epochs2"
    assert sorted(each.name for each in folder.iterdir()) == [
        "best.pt", "config.json", "curves.png", "last.pt", "log.csv", "metrics.json", "recon", "recon.png"]
    config = json.loads((folder / "config.json").read_text())
    assert config["epochs"] == 2 and config["gamma"] == 0.001 and config["network"]["encoder"] == "C'(32)>C(32)"
    assert config["torch"] == torch.__version__ and config["images"] == {"train": 60, "test": 30}
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        loss = sum(weight * float(row[f"train_{term}"]) for weight, term in
                   ((1, "classifier"), (1, "autoencoder"), (0.001, "l2")))
        assert float(row["train_loss"]) == pytest.approx(loss)
    metrics = json.loads((folder / "metrics.json").read_text())
    accuracies = [float(row["test_accuracy"]) for row in rows]
    assert metrics["accuracy"]["last"] == accuracies[-1]
    assert metrics["accuracy"]["best"] == max(accuracies)
    assert metrics["accuracy"]["best_epoch"] == accuracies.index(max(accuracies)) + 1
    assert metrics["parameters"] == 670_797
    assert metrics["reconstruction"]["mse"] == pytest.approx(float(rows[-1]["test_mse"]))
    assert torch.load(folder / "best.pt", weights_only=True)["epoch"] == metrics["accuracy"]["best_epoch"]
    pairs = sorted(each.name for each in (folder / "recon").iterdir())
    assert len(pairs) == 20 and pairs[:2] == ["0_circle.png", "0_circle_recon.png"]
    original = np.asarray(Image.open(folder / "recon" / "0_circle.png"))
    with np.load(tiny) as arrays:
        assert np.array_equal(original, arrays["x_test"][0].transpose(1, 2, 0))
    out = capsys.readouterr().out
    assert f"next: python evaluate.py --ckpt {folder / 'best.pt'}" in out
    assert "best (on test)" in out and "\r" not in out  # no progress line outside a terminal


def test_a_run_never_overwrites_another(tiny, tmp_path):
    first = run(tiny, tmp_path, "--version", "v3")
    before = (first / "log.csv").read_bytes()
    assert run(tiny, tmp_path, "--version", "v3").name == first.name + "_run2"
    assert (first / "log.csv").read_bytes() == before


@pytest.mark.parametrize("flags, name", [
    ([], "v4"),
    (["--beta", "0"], "v4_beta0"),
    (["--beta", "1", "--gamma", "0.001"], "v4"),  # what the recipe says anyway
    (["--version", "v2.3", "--seed", "3", "--no-flip"], "v2.3_no-flip_seed3"),
    (["--encoder", "C'(8)>C(8)", "--optimizer", "adam", "--lr", "1e-3"],
     "v4_encoder-Cp-8-C-8_optimizer-adam_lr0.001"),
    (["--no-decoder"], "v4_no-decoder"),
    (["--separate", "--no-freeze-encoder", "--skip"], "v4_skip_separate_no-freeze-encoder"),
    (["--version", "resnet", "--no-pretrained", "--size", "64"], "resnet_size64_no-pretrained"),
    (["--dataset", "mnist", "--classes", "1,2"], "v4_dataset-mnist_classes1-2"),
    (["--variant", "smote", "--constrain", "cat=0.25,dog=0.5"], "v4_variant-smote_constrain-cat0.25-dog0.5")])
def test_a_run_is_named_after_what_differs(flags, name):
    s = train.settle(train.make_parser().parse_args(flags))
    s.dataset = s.dataset or "cifar10"
    assert train.run_name(s, train.RECIPES[s.version]) == name


def test_every_recipe_fits_its_version():
    assert set(train.RECIPES) == set(models.VERSIONS)
    for name, recipe in train.RECIPES.items():
        side = {"cifar10": 32, "mnist": 28, "fashionmnist": 28}[recipe["dataset"]]
        assert models.VERSIONS[name].in_shape[1] == (recipe["size"] or side)
        train.settle(train.make_parser().parse_args(["--version", name]))  # no contradiction in it
        assert models.VERSIONS[name].pretrained == bool(recipe["pretrained"])
    assert [name for name, recipe in train.RECIPES.items() if recipe["gamma"]] == ["v4", "v4-stride2"]


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path, capsys):
    status = train.main(["--dataset", tiny, "--lr", "1e30", "--output", str(tmp_path), "--device", "cpu"])
    assert status == 1
    error = capsys.readouterr().err
    assert "epoch 1, step " in error and "loss is nan" in error and "--lr" in error


def test_digits_are_never_flipped(monkeypatch, tmp_path):
    grey = data._split(torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.arange(20) % 10)
    monkeypatch.setattr(data, "_named", lambda name, *_: data.Dataset(
        name, "test", [str(digit) for digit in range(10)], grey, grey))
    for name, flip in (("mnist", False), ("fashionmnist", True)):
        args = train.make_parser().parse_args(["--dataset", name, "--data-dir", str(tmp_path)])
        s = train.settle(args)
        train.prepare(s)
        s.precision = "auto"  # as given, for the name
        assert s.flip is flip and train.run_name(s, train.RECIPES["v4"]) == f"v4_dataset-{name}"
