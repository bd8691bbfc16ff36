"""Measures against their formulas by hand, checkpoints, comparisons, and the command itself."""
import contextlib
import csv
import functools
import itertools
import json
import math
import os
import re
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import nn

import data
import evaluate
import losses
import models
import train


class Fixed(nn.Module):
    """Logits and reconstructions that a test has chosen, in the order of the images."""

    def __init__(self, logits, rebuilt):
        super().__init__()
        self.classifier, self.decoder, self.variational = logits, rebuilt, False
        self.num_classes, self.seen = logits.shape[1], 0

    def forward(self, images, classify=True, reconstruct=True, posterior=False):
        now = slice(self.seen, self.seen + len(images))
        self.seen += len(images)
        return self.classifier[now], self.decoder[now]


def settings(**changes):
    """What an evaluation needs to know, with its defaults."""
    return Namespace(**{name: needed.default for name, needed in evaluate.NEEDED.items()} | {"precision": "fp32"}
                     | changes)


def quick(main, argv):
    """A program's main, with empty files in place of its figures, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "save_figure", lambda figure, path: path.touch())
        patch.setattr(evaluate, "draw_sheet", lambda rows, names, path, title: path.touch())
        return main(argv)


def train_in(folder, *flags):
    """A run of train.py in this process, of one epoch; returns its folder."""
    assert quick(train.main, ["--epochs", "1", "--device", "cpu", "--precision", "fp32", "--output", str(folder),
                              *flags]) == 0
    made, = folder.iterdir()
    return made


def evaluate_in(folder, *flags):
    """A run of evaluate.py in this process; returns its report."""
    assert quick(evaluate.main, ["--device", "cpu", "--output", str(folder), *map(str, flags)]) == 0
    report, = folder.rglob("report.json")
    return json.loads(report.read_text())


# ---------------------------------------------------------------- measures

@pytest.mark.parametrize("vendor, flags, expected", [
    ("GenuineIntel", "avx512f amx_bf16 avx512_bf16", "bf16"),
    ("GenuineIntel", "avx512f avx512_bf16 avx512_fp16", "fp32"),  # measured: 73 GFLOP/s in bfloat16, 136 in float32
    ("AuthenticAMD", "avx512f avx512_bf16", "bf16"),
    ("AuthenticAMD", "avx2 fma", "fp32"),
])
def test_bfloat16_is_chosen_where_it_is_the_faster(vendor, flags, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "CPUINFO", tmp_path / "cpuinfo")
    assert evaluate.pick_precision("auto", torch.device("cpu")) == "fp32"  # not Linux: unknown
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n")
    assert evaluate.pick_precision("auto", torch.device("cpu")) == expected
    assert evaluate.pick_precision("bf16", torch.device("cpu")) == "bf16"


def test_measures_by_hand():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 1, 1])
    logits, rebuilt = torch.randn(5, 3), 2 * torch.randn(5, 3, 4, 6)
    result = evaluate.measure(Fixed(logits, rebuilt), data.Split(images, labels), settings(), batch_size=2)

    pixels = images.double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (data.MEAN, data.STD))
    error = (rebuilt.double() * std + mean).clamp(0, 1) - pixels
    per_image = [(e ** 2).mean().item() for e in error]
    expected = {
        "mse": sum(per_image) / 5,
        "mae": error.abs().mean().item(),
        "psnr": sum(10 * math.log10(1 / e) for e in per_image) / 5,
        "absolute_error": error.abs().sum().item() / 5,
        "net_error": sum(abs(e.sum().item()) for e in error) / 5,
        "autoencoder": ((rebuilt - (pixels - mean) / std) ** 2).mean().item(),
        "classifier": -sum(row.log_softmax(0)[label].item() for row, label in zip(logits, labels)) / 5,
        "accuracy": 20 * sum(row.argmax().item() == label for row, label in zip(logits, labels.tolist()))}
    assert result.keys() == expected.keys() | {"confusion"}
    for key, value in expected.items():
        assert result[key] == pytest.approx(value, rel=1e-4), key
    confusion = np.zeros((3, 3), int)
    for row, label in zip(logits, labels):
        confusion[label, row.argmax()] += 1
    assert result["confusion"] == confusion.tolist()


def test_a_perfect_reconstruction_has_no_error():
    images = torch.randint(0, 256, (4, 1, 5, 5), dtype=torch.uint8)
    split = data.Split(images, torch.zeros(4, dtype=torch.int64))
    result = evaluate.measure(Fixed(torch.zeros(4, 2), data.normalise(images)), split, settings())
    assert result["absolute_error"] == 0 and result["psnr"] == 100  # the cap for mse 0


def test_noise_is_measured_against_the_clean_images_and_clean_test_switches_it_off():
    """A network that returns what it sees has the error of the noise itself."""
    split = data.shapes(train=8, test=60).test
    model = models.build("v3")
    model.forward = lambda x, **_: (torch.zeros(len(x), 10), x)
    result = evaluate.measure(model, split, settings(noise=0.1))
    assert result["autoencoder"] == pytest.approx(sum((0.1 / std) ** 2 for std in data.STD) / 3, rel=0.02)
    assert result["psnr"] == result["noisy_psnr"] == pytest.approx(20, abs=0.6)  # 10 log10(1 / 0.1^2), and clamped
    assert result == evaluate.measure(model, split, settings(noise=0.1))
    clean = evaluate.measure(model, split, settings(noise=0.1, clean_test=True))
    assert clean["autoencoder"] == 0 and "noisy_psnr" not in clean


def test_measuring_is_the_same_in_every_batch_size_and_leaves_the_mode():
    split = data.shapes(train=8, test=30).test
    model = models.build("v4").train()
    s = settings(delta=1.0)
    a, b = (evaluate.measure(model, split, s, batch_size=size) for size in (7, 30))
    assert model.training
    assert a["confusion"] == b["confusion"] and a.keys() == b.keys() >= {"jigsaw", "psnr"}
    for key in ("mse", "jigsaw", "classifier"):
        assert a[key] == pytest.approx(b[key], rel=1e-5), key
    assert set(evaluate.measure(model, split, s, reconstruct=False)) == {"classifier", "accuracy", "confusion"}
    assert not {"classifier", "accuracy"} & set(evaluate.measure(model, split, s, classify=False))


@pytest.mark.parametrize("kind", ["codes", "pixels"])
def test_knn_is_a_brute_force_search_in_float64(kind):
    torch.manual_seed(0)
    points, queries = ((torch.randn(400, 10), torch.randn(90, 10)) if kind == "codes" else
                       (torch.randint(0, 4, (400, 6), dtype=torch.uint8),
                        torch.randint(0, 4, (90, 6), dtype=torch.uint8)))
    labels, answers = torch.randint(0, 5, (400,)), torch.randint(0, 5, (90,))
    exact, right = points.double().numpy(), dict.fromkeys((1, 4, 7), 0)
    for query, answer in zip(queries.double().numpy(), answers.tolist()):
        nearest = labels[np.argsort(((exact - query) ** 2).sum(1), kind="stable")].tolist()
        for k in right:
            most = max(map(nearest[:k].count, nearest[:k]))
            right[k] += next(label for label in nearest[:k] if nearest[:k].count(label) == most) == answer
    for k, count in right.items():
        found = evaluate.knn(points, labels, queries, answers, [k], 5, seed=0)
        assert found["accuracy"] == pytest.approx(100 * count / 90) and found["k"] == k


def test_the_best_k_is_chosen_on_held_out_training_images():
    """Two clusters of which a quarter of the labels is wrong: one neighbour is too few, 15 are enough."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 2
    points = torch.randn(400, 2) * 0.1 + labels[:, None]
    flipped = torch.rand(400) < 0.25
    noisy = torch.where(flipped, 1 - labels, labels)
    found = evaluate.knn(points, noisy, points[:50] + 0.01, labels[:50], [1, 15], 2, seed=0)
    assert found["k"] == 15 and found["accuracy"] == 100
    assert evaluate.knn(points, noisy, points[:50] + 0.01, labels[:50], [1], 2, seed=0)["accuracy"] < 90


def test_the_mirrored_accuracy_averages_the_logits_of_both_images():
    torch.manual_seed(1)
    model = models.build(models.Version("L(64)", "L'(10)")).eval()
    split = data.shapes(train=10, test=250).test
    s = Namespace(**{name: needed.default for name, needed in evaluate.NEEDED.items()} | {"precision": "fp32"})
    images = data.normalise(split.images)
    with torch.no_grad():
        logits, mirrored = (model(each, reconstruct=False)[0] for each in (images, images.flip(3)))
    right = [(each.argmax(1) == split.labels).sum().item() / 2.5 for each in (logits, logits + mirrored)]
    found = evaluate.measure(model, split, s, mirrored=True)
    assert [found["accuracy"], found["accuracy_mirrored"]] == pytest.approx(right) and right[0] != right[1]
    assert "accuracy_mirrored" not in evaluate.measure(model, split, s)
    assert "accuracy_mirrored" not in evaluate.measure(model, split, s, classify=False, mirrored=True)


# ---------------------------------------------------------------- the command

def test_the_checkpoint_alone_gives_the_figures_of_its_training(trained, capsys, monkeypatch, tmp_path):
    npz, folder = trained
    monkeypatch.chdir(tmp_path)  # from another folder than the training's
    assert evaluate.main(["--ckpt", str(folder / "last.pt"), "--device", "cpu"]) == 0
    report = json.loads((folder / "evaluation-last" / "report.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert report["accuracy"] == metrics["accuracy"]["last"]
    assert report["accuracy_mirrored"] == metrics["accuracy"]["mirrored"]
    assert sum(map(sum, report["confusion"])) == 20  # --test-size, with the run's seed
    for key, value in metrics["reconstruction"].items():
        assert report[key] == pytest.approx(value, rel=1e-6)
    assert report["per_class"] == metrics["per_class_accuracy"]
    for name in ("confusion.png", "recon.png", "codes.png"):
        assert min(Image.open(folder / "evaluation-last" / name).size) > 200
    out = capsys.readouterr().out
    assert f"{metrics['accuracy']['last']:.2f} %" in out and "PSNR" in out
    assert list(tmp_path.iterdir()) == []  # nothing in the folder that it was called from


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Noise in three colours, 12x12, which a small network tells apart at once, and a run on it: (npz, arrays,
    checkpoint, accuracy). The classes have unequal numbers of test images."""
    root = tmp_path_factory.mktemp("colours")
    draw = np.random.default_rng(0)
    arrays = {"classes": np.array(["Deep red", "green", "blue"])}
    for part, labels in (("train", np.arange(90) % 3), ("test", np.repeat([0, 1, 2], [10, 14, 6]))):
        images = draw.integers(0, 120, (len(labels), 12, 12, 3))
        images[np.arange(len(labels)), ..., labels] += 130
        arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": labels}
    np.savez(root / "colours.npz", **arrays)
    folder = train_in(root / "out", "--dataset", str(root / "colours.npz"), "--encoder", "C(8)>L(16)", "--classifier",
                      "L'(10)", "--optimizer", "adam", "--lr", "0.01", "--epochs", "4", "--batch-size", "10")
    accuracy = json.loads((folder / "metrics.json").read_text())["accuracy"]["last"]
    assert accuracy > 90
    return root / "colours.npz", arrays, folder / "last.pt", accuracy


def with_classes(arrays, order, names):
    """The same images with their classes in another order, under other names (None: without names)."""
    number = np.argsort(order)
    made = arrays | {key: number[arrays[key]] for key in ("y_train", "y_test")}
    return {key: value for key, value in made.items() if key != "classes"} | ({"classes": names} if names else {})


@pytest.mark.parametrize("order, names", [
    ([0, 1, 2], None), ([1, 2, 0], ["green", "blue", "Deep red"]), ([2, 0, 1], ["BLUE", "deep-red", "Green"]),
    ([0, 2, 1], ["deep_red", "blue.", " green"])])
def test_classes_are_matched_by_their_names(colours, order, names, tmp_path):
    """In another order, case and punctuation; a set without names keeps its numbers."""
    npz, arrays, ckpt, accuracy = colours
    np.savez(tmp_path / "other.npz", **with_classes(arrays, order, names))
    report = evaluate_in(tmp_path / "out", "--ckpt", ckpt, "--dataset", tmp_path / "other.npz")
    assert report["accuracy"] == pytest.approx(accuracy)
    assert list(map(sum, report["confusion"])) == [10, 14, 6]
    assert list(report["per_class"]) == ["Deep red", "green", "blue"]


@pytest.mark.parametrize("names, message", [
    (["green", "blue", "yellow"], "its class 'yellow' is none of the checkpoint's: Deep red green blue"),
    (["green", "blue", "red"], "'red'"), (["green", "green", "blue"], "'green'")])
def test_other_classes_are_refused(colours, names, message, tmp_path, capsys):
    npz, arrays, ckpt, _ = colours
    np.savez(tmp_path / "other.npz", **with_classes(arrays, [1, 2, 0], names))
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--ckpt", str(ckpt), "--dataset", str(tmp_path / "other.npz")])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("classes", [
    ["кот", "пёс", "ёж"], ["C", "C++", "C#"], ["猫", "犬", "鳥"], ["-1", "0", "1"]])
def test_names_that_differ_in_other_characters_are_different_classes(classes):
    """Characters that the comparison ignores must not make two classes one."""
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    made = evaluate.match_classes(data.Dataset("set", "test", [classes[2], classes[0], classes[1]],
                                               *[data.Split(images, torch.tensor([0, 1, 2]))] * 2), classes)
    assert made.test.labels.tolist() == made.train.labels.tolist() == [2, 0, 1]
    assert made.classes == classes


def test_another_data_set_is_scaled_to_the_network_and_used_whole(colours, tmp_path):
    """What made the checkpoint's own training set (--labels, --variant, --val-share) is not done to another one."""
    npz, arrays, ckpt, accuracy = colours
    content = torch.load(ckpt, weights_only=True)
    content["settings"] |= {"labels": 80, "val_share": 0.5, "variant": "smote", "constrain": {"green": 0.1},
                            "train_size": 90, "test_size": 20}
    torch.save(content, tmp_path / "changed.pt")
    larger = {key: arrays[key].repeat(2, 1).repeat(2, 2)[:30] for key in ("x_train", "x_test")}
    np.savez(tmp_path / "other.npz", **arrays | larger | {"y_train": arrays["y_train"][:30]})
    report = evaluate_in(tmp_path / "out", "--ckpt", tmp_path / "changed.pt", "--dataset", tmp_path / "other.npz",
                         "--codes", tmp_path / "codes.npz", "--knn", "1,25")
    assert report["accuracy"] == pytest.approx(accuracy, abs=4) and sum(map(sum, report["confusion"])) == 30
    assert report["knn"]["codes"]["accuracy"] > 90
    with np.load(tmp_path / "codes.npz") as made:
        assert sorted(made["train_labels"].tolist()) == sorted(arrays["y_train"][:30].tolist())


def test_pictures_of_a_folder_are_prepared_as_its_test_images_are(tmp_path, monkeypatch):
    """Of unequal sizes and kinds: grey, transparent, turned by their EXIF data; scaled and cropped by --size."""
    draw = np.random.default_rng(0)
    for part, number in itertools.product(("train", "test"), range(4)):
        place = tmp_path / "set" / part / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (20 + 3 * number, 30, 3), np.uint8)
        image = Image.fromarray(pixels).convert(("RGB", "L", "RGBA", "RGB")[number])
        if number == 2:
            image.putalpha(120)
        exif = Image.Exif()
        exif[274] = 6 if number == 3 else 1  # turned by a quarter
        image.save(place / f"{number}.png", exif=exif)
    folder = train_in(tmp_path / "run", "--dataset", str(tmp_path / "set"), "--size", "16", "--encoder", "C(4)>L(8)",
                      "--batch-size", "2", "--blur", "0.5")
    inputs, forward = [], models.Autoencoder.forward

    def recorded(model, x, **which):
        inputs.append(x)
        return forward(model, x, **which)
    monkeypatch.setattr(models.Autoencoder, "forward", recorded)
    evaluate_in(tmp_path / "out", "--ckpt", folder / "last.pt")
    tested = inputs[0]
    inputs.clear()
    paths = [tmp_path / f"set/test/{name}.png" for name in ("a/0", "a/2", "b/1", "b/3")]
    evaluate_in(tmp_path / "pictures", "--ckpt", folder / "last.pt", "--images", *paths)
    assert tested.shape == (4, 3, 16, 16) and torch.equal(torch.cat(inputs[::2]), tested)


def test_images_are_prepared_as_the_test_images_are(tiny, tmp_path, monkeypatch):
    """With --size, --margin and --blur, to the bit: what the network sees, and so its logits and codes."""
    folder = train_in(tmp_path / "run", "--version", "v3", "--dataset", tiny, "--size", "24", "--margin", "--blur",
                      "0.7", "--scale", "0..1")
    inputs, forward = [], models.Autoencoder.forward

    def recorded(model, x, **which):
        inputs.append(x)
        return forward(model, x, **which)
    monkeypatch.setattr(models.Autoencoder, "forward", recorded)
    with np.load(tiny) as arrays:
        pictures = arrays["x_test"][[4, 0, 21]].transpose(0, 2, 3, 1)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, picture in zip(paths, pictures):
        Image.fromarray(picture).save(path)
    report = evaluate_in(tmp_path / "pictures", "--ckpt", folder / "last.pt", "--codes", tmp_path / "pictures.npz",
                         "--images", *paths)
    seen = torch.cat(inputs[::2])  # each is classified, then rebuilt
    inputs.clear()
    evaluate_in(tmp_path / "test", "--ckpt", folder / "last.pt", "--codes", tmp_path / "test.npz")
    assert seen.shape == (3, 3, 24, 24) and torch.equal(seen, inputs[0][[4, 0, 21]])
    assert torch.equal(inputs[0], data.normalise(data.load(tiny, blur=0.7).test.images, 24, True, scale="0..1"))
    with np.load(tmp_path / "pictures.npz") as made, np.load(tmp_path / "test.npz") as test:
        np.testing.assert_allclose(made["codes"], test["codes"][[4, 0, 21]], rtol=1e-5, atol=1e-6)
        assert made["files"].tolist() == list(map(str, paths)) and made["classes"].tolist() == data.SHAPES
    model, _ = evaluate.load_checkpoint(folder / "last.pt")
    with torch.no_grad():
        chances = model(inputs[0][[4, 0, 21]])[0].softmax(1)
    for picture, row in zip(report, chances):
        best = row.argsort(descending=True)[:3].tolist()
        assert picture["classes"] == {data.SHAPES[label]: pytest.approx(row[label].item(), rel=1e-4)
                                      for label in best}


def test_pictures_by_path(trained, capsys, tmp_path):
    """A picture of the set's size is taken as it is; another one is scaled and cropped, a grey one made RGB."""
    npz, folder = trained
    with np.load(npz) as arrays:
        square = arrays["x_test"][2].transpose(1, 2, 0)
    Image.fromarray(square).save(tmp_path / "square.png")
    Image.new("L", (50, 40), 77).save(tmp_path / "grey.jpg")
    report = evaluate_in(tmp_path / "out", "--ckpt", folder / "best.pt", "--images", tmp_path / "square.png",
                         tmp_path / "grey.jpg")
    name, chance = next(iter(report[0]["classes"].items()))
    assert f"square.png: {name} {100 * chance:.1f}%" in capsys.readouterr().out
    images = tmp_path / "out/images"
    assert np.array_equal(np.asarray(Image.open(images / "0_square.png")), square)
    assert np.abs(np.asarray(Image.open(images / "1_grey.png")).astype(int) - 77).max() <= 1
    assert Image.open(images / "1_grey_recon.png").size == (32, 32)


def test_codes_are_plain_arrays_of_test_and_training_images(trained, tmp_path):
    npz, folder = trained
    evaluate_in(tmp_path / "out", "--ckpt", folder / "last.pt", "--codes", tmp_path / "codes.npz")
    model, content = evaluate.load_checkpoint(folder / "last.pt")
    dataset = evaluate.load_test(model, content, torch.device("cpu"), with_train=True)
    with np.load(tmp_path / "codes.npz", allow_pickle=False) as made:
        assert set(made) == {"codes", "labels", "train_codes", "train_labels", "classes"}
        for part, split in (("", dataset.test), ("train_", dataset.train)):
            codes = evaluate.encode(model, split, content["settings"])
            assert codes.shape == (len(split.labels), 64 * 2 * 2) and made[f"{part}codes"].dtype == np.float32
            np.testing.assert_array_equal(made[f"{part}codes"], codes)
            np.testing.assert_array_equal(made[f"{part}labels"], split.labels)
        assert made["classes"].tolist() == data.SHAPES
    assert sorted(each.name for each in tmp_path.iterdir()) == ["codes.npz", "out"]


def test_knn_of_a_checkpoint(trained, tmp_path, capsys):
    npz, folder = trained
    found = evaluate_in(tmp_path / "out", "--ckpt", folder / "last.pt", "--knn", "1,3")["knn"]
    assert found["codes"]["values"] == 64 * 2 * 2 and found["pixels"]["values"] == 3072
    dataset = data.load(npz, test_size=20)
    points, queries = (split.images.flatten(1) for split in (dataset.train, dataset.test))
    expected = evaluate.knn(points, dataset.train.labels, queries, dataset.test.labels, [1, 3], 10, 0)
    assert found["pixels"]["accuracy"] == expected["accuracy"]
    printed = capsys.readouterr().out
    for name in ("codes", "pixels"):
        assert f"kNN on {name}" in printed and f"{found[name]['accuracy']:.2f} %" in printed


def test_codes_are_of_the_labelled_images_alone(tiny, tmp_path):
    folder = train_in(tmp_path / "run", "--encoder", "C(4)", "--dataset", tiny, "--labels", "20")
    evaluate_in(tmp_path / "out", "--ckpt", folder / "last.pt", "--codes", tmp_path / "codes.npz")
    with np.load(tmp_path / "codes.npz") as made:
        assert made["train_labels"].tolist() == data.load(tiny, labels=20).labelled.labels.tolist()
        assert len(made["train_codes"]) == 20


def test_knn_learns_from_the_labelled_images_alone(tiny, tmp_path):
    folder = train_in(tmp_path, "--encoder", "C(4)", "--dataset", tiny, "--labels", "20")
    model, content = evaluate.load_checkpoint(folder / "last.pt")
    dataset = data.load(tiny, labels=20)
    found = evaluate.report_knn(model, dataset, content["settings"], [3])["pixels"]
    points, queries = dataset.labelled.images.flatten(1), dataset.test.images.flatten(1)
    expected = evaluate.knn(points, dataset.labelled.labels, queries, dataset.test.labels, [3], 10, 0)
    everything = evaluate.knn(dataset.train.images.flatten(1), dataset.train.labels, queries, dataset.test.labels,
                              [3], 10, 0)
    assert found["accuracy"] == expected["accuracy"] != everything["accuracy"]


@pytest.fixture(scope="module")
def without_bars(tiny, tmp_path_factory):
    """A run on all classes but the last, `bars`."""
    return train_in(tmp_path_factory.mktemp("without"), "--version", "cnn10", "--dataset", tiny, "--classes",
                    ",".join(data.SHAPES[:-1]))


def test_the_roc_curve_has_the_area_that_its_title_names(without_bars, tmp_path, figures):
    model, content = evaluate.load_checkpoint(without_bars / "last.pt")
    found = evaluate.report_anomaly(model, content, torch.device("cpu"), "bars", tmp_path / "out")
    axis = figures["anomaly.png"].axes[1]
    x, y = axis.lines[0].get_data()
    assert found["auc"] != 0.5 and axis.get_title() == f"ROC, AUC {found['auc']:.3f}"
    assert (np.diff(x, prepend=0) * y).sum() == pytest.approx(found["auc"])  # of steps, as no two errors are equal


def test_an_anomaly_is_a_class_that_was_left_out(tiny, without_bars):
    folder, ckpt = without_bars, str(without_bars / "best.pt")
    assert evaluate.main(["--ckpt", ckpt, "--anomaly", "bars", "--device", "cpu"]) == 0
    result = json.loads((folder / "evaluation-best/anomaly-bars/report.json").read_text())
    model, content = evaluate.load_checkpoint(ckpt)
    whole = data.load(tiny).test
    errors = evaluate.image_errors(model, whole, content["settings"])
    assert result["mse"] == pytest.approx(errors[whole.labels == 9].mean().item(), rel=1e-5)
    assert result["mse_others"] == pytest.approx(errors[whole.labels != 9].mean().item(), rel=1e-5)
    assert result["auc"] == pytest.approx(losses.roc_auc(errors[whole.labels == 9], errors[whole.labels != 9]))
    assert min(Image.open(folder / "evaluation-best/anomaly-bars/anomaly.png").size) > 400


def test_an_anomaly_without_test_images_is_refused(tiny, tmp_path, capsys):
    """Of three test images none is of that class: its errors would be the mean of nothing."""
    folder = train_in(tmp_path, "--encoder", "C(4)", "--alpha", "0", "--dataset", tiny, "--test-size", "3",
                      "--classes", ",".join(data.SHAPES[:-1]))
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--ckpt", str(folder / "best.pt"), "--anomaly", "bars", "--device", "cpu"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "--anomaly bars: " in error and "expected test images of that" in error
    grey = data.shapes(train=20, test=20)
    images = grey.test.images[:, :1].numpy()
    np.savez(tmp_path / "grey.npz", x_train=images, y_train=grey.test.labels, x_test=images, y_test=grey.test.labels,
             classes=np.array(data.SHAPES))
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--ckpt", str(folder / "best.pt"), "--anomaly", "bars", "--device", "cpu", "--dataset",
                       str(tmp_path / "grey.npz")])
    assert end.value.code == 2 and "has images of 1x32x32, the checkpoint takes 3x" in capsys.readouterr().err


def noise_classes(root, *names, count=10):
    """Folders <class>/* of noise, each picture once in the world."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            draw = np.random.default_rng([*name.encode(), i])
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name / f"{i}.png")


def test_training_images_are_never_drawn_for_the_test(tmp_path, capsys):
    """Of a folder without test/ that has got another picture since the training."""
    noise_classes(tmp_path / "set", "ant", "bee")
    folder = train_in(tmp_path / "run", "--dataset", str(tmp_path / "set"), "--encoder", "C(4)", "--seed", "3")
    ckpt = str(folder / "last.pt")
    whole = evaluate_in(tmp_path / "whole", "--ckpt", ckpt)
    noise_classes(tmp_path / "set", "aphid")
    after = evaluate_in(tmp_path / "anomaly", "--ckpt", ckpt, "--anomaly", "aphid")
    assert after["mse_others"] == pytest.approx(whole["mse"], rel=1e-4)  # of the same test images as before
    assert evaluate_in(tmp_path / "chosen", "--ckpt", ckpt) == whole  # without the new class
    content = torch.load(ckpt, weights_only=True)
    del content["pool"]  # a checkpoint that does not say what its test images were drawn from
    torch.save(content, tmp_path / "older.pt")
    with pytest.raises(SystemExit):
        evaluate.main(["--ckpt", str(tmp_path / "older.pt")])
    assert "of class 'ant' are not those" in capsys.readouterr().err
    shutil.copy(tmp_path / "set/bee/0.png", tmp_path / "set/bee/00.png")
    for flags in ([], ["--anomaly", "aphid"]):
        with pytest.raises(SystemExit) as end:
            evaluate.main(["--ckpt", ckpt, *flags])
        error = capsys.readouterr().err
        assert end.value.code == 2 and "the files of class 'bee' are not those of the training" in error
    noise_classes(tmp_path / "place/set", "ant", "bee", count=20)  # another set, although of the same name
    report = evaluate_in(tmp_path / "out", "--ckpt", ckpt, "--dataset", tmp_path / "place/set")
    assert sum(map(sum, report["confusion"])) == 8
    assert f"the test images of {tmp_path / 'place/set'} are drawn from it; " in capsys.readouterr().err
    (tmp_path / "set/train").mkdir()  # split after the training
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).rename(tmp_path / "set/train" / name)
    shutil.rmtree(tmp_path / "set/aphid")
    shutil.copytree(tmp_path / "set/train", tmp_path / "set/test")
    with pytest.raises(SystemExit):
        evaluate.main(["--ckpt", ckpt])
    assert "of class 'ant' are not those of the training" in capsys.readouterr().err


def test_data_that_has_moved_is_used_as_in_the_training(tiny, tmp_path):
    """With the run's --classes and --test-size; another set has its classes alone."""
    for place in ("before", "after"):
        (tmp_path / place).mkdir()
    own = shutil.copy(tiny, tmp_path / "before/set.npz")
    folder = train_in(tmp_path / "run", "--dataset", str(own), "--encoder", "C(4)", "--classes", "ring,star",
                      "--test-size", "3")
    before = evaluate_in(tmp_path / "1", "--ckpt", folder / "last.pt")
    own.rename(tmp_path / "after/moved.npz")
    moved = tmp_path / "after/moved.npz"
    assert evaluate_in(tmp_path / "2", "--ckpt", folder / "last.pt", "--dataset", moved) == before
    with np.load(tiny) as file:
        np.savez(tmp_path / "before/set.npz", **dict(file) | {"x_test": file["x_test"] ^ 1})  # of the same name
    for place in (tmp_path / "before/set.npz", "shapes"):
        other = evaluate_in(tmp_path / f"3{place}".replace("/", "-"), "--ckpt", folder / "last.pt", "--dataset", place)
        count = 3 if place != "shapes" else 200
        assert list(map(sum, other["confusion"])) == [count] * 2 and list(other["per_class"]) == ["ring", "star"]


def test_the_first_part_of_separate_training_has_no_accuracy(tiny, trained, tmp_path, monkeypatch, capsys):
    """Its classifier is not trained: a figure would be chance's."""
    train_epoch = train.train_epoch

    def interrupted(model, dataset, optimizer, s, epoch, *more):
        if epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(model, dataset, optimizer, s, epoch, *more)
    monkeypatch.setattr(train, "train_epoch", interrupted)
    with pytest.raises(SystemExit) as end:
        train_in(tmp_path / "run", "--version", "v3", "--dataset", tiny, "--separate", "--epochs", "2")
    assert end.value.code == 130
    folder, = (tmp_path / "run").iterdir()
    capsys.readouterr()
    report = evaluate_in(tmp_path / "out", "--ckpt", folder / "best.pt")
    assert not {"accuracy", "confusion", "per_class", "classifier"} & set(report) and report["psnr"] > 0
    assert "accuracy: none, the classifier is not trained yet" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("confusion.png"))
    picture = next(trained[1].glob("recon/*_ring.png"))
    report, = evaluate_in(tmp_path / "pictures", "--ckpt", folder / "best.pt", "--images", picture)
    assert set(report) == {"image", "reconstruction"}


def test_an_untrained_decoder_has_no_reconstruction(colours, tmp_path, capsys):
    folder = train_in(tmp_path / "run", "--dataset", str(colours[0]), "--encoder", "C(4)", "--beta", "0")
    capsys.readouterr()
    report = evaluate_in(tmp_path / "out", "--ckpt", folder / "best.pt")
    assert "accuracy" in report and not {"mse", "psnr", "autoencoder"} & set(report)
    assert "reconstruction: none, the decoder is not trained" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("recon*"))


@pytest.fixture(scope="module")
def variational(tiny, tmp_path_factory):
    """A run of a small variational autoencoder, tested on five images."""
    folder = tmp_path_factory.mktemp("variational")
    return train_in(folder, "--encoder", "C(4)>N(3)", "--kl", "0.1", "--test-size", "5", "--dataset", tiny)


def test_few_test_images_are_enough(variational, tiny, tmp_path):
    """Two pairs of five images make two rows of walk.png; one image makes none, and no plane of codes."""
    assert {"prior.png", "walk.png"} <= {each.name for each in variational.iterdir()}
    evaluate_in(tmp_path / "five", "--ckpt", variational / "last.pt")
    names = {each.name for each in (tmp_path / "five").iterdir()}
    assert {"codes.png", "prior.png", "walk.png", "recon.png"} <= names
    with np.load(tiny) as arrays:
        np.savez(tmp_path / "one.npz", **dict(arrays) | {key: arrays[key][:1] for key in ("x_test", "y_test")})
    assert evaluate.main(["--ckpt", str(variational / "last.pt"), "--dataset", str(tmp_path / "one.npz"), "--device",
                          "cpu", "--output", str(tmp_path / "one")]) == 0
    report = json.loads((tmp_path / "one/report.json").read_text())
    assert report["accuracy"] in (0, 100) and report["kl"] > 0
    assert report["per_class"] == dict.fromkeys(data.SHAPES) | {"circle": report["accuracy"]}
    names = {each.name for each in (tmp_path / "one").iterdir()}
    assert {"prior.png", "recon.png", "confusion.png"} <= names and not {"walk.png", "codes.png"} & names


def test_the_walk_is_from_one_code_to_another_in_even_steps(variational, tiny, tmp_path, monkeypatch):
    """Its first and last columns are what the decoder makes of two test images' codes."""
    model, content = evaluate.load_checkpoint(variational / "last.pt")
    dataset = evaluate.load_test(model, content, torch.device("cpu"))
    sheets = {}
    monkeypatch.setattr(evaluate, "draw_sheet", lambda rows, names, path, title: sheets.update({path.name: rows}))
    evaluate.draw_variational(model, dataset, content["settings"], tmp_path)
    rebuilt = evaluate.rebuild(model, data.normalise(dataset.test.images), content["settings"])
    assert len(sheets["walk.png"]) == 2 and {len(row) for _, row in sheets["walk.png"]} == {10}
    for _, row in sheets["walk.png"]:
        for end in (row[0], row[-1]):
            assert any(torch.allclose(end, each, atol=1e-5) for each in rebuilt)
        assert not torch.allclose(row[0], row[-1])


def test_a_plane_of_longer_codes_has_their_principal_components(tmp_path, monkeypatch):
    """Points on an ellipse in a plane of ten dimensions: the drawn ones keep its axes."""
    torch.manual_seed(0)
    angle = torch.rand(300) * 2 * math.pi
    plane = torch.stack([5 * angle.cos(), 2 * angle.sin()], 1)
    basis = torch.linalg.qr(torch.randn(10, 10)).Q[:2]
    seen = []
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: seen.append(figure))
    evaluate.draw_plane(plane @ basis + 3, torch.zeros(300), ["one"], tmp_path / "a.png", "")
    drawn = torch.tensor(np.array([line.get_data() for line in seen[0].axes[0].lines][0])).T
    expected, found = (torch.cdist(points.double(), points.double()) for points in (plane, drawn))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert "(8" in seen[0].axes[0].get_xlabel()  # 25 of 29 parts of the variance, 86 %, or near it


def test_a_plane_of_many_classes_names_how_many_it_shows(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: seen.append(figure))
    for classes in (20, 30):
        evaluate.draw_plane(torch.rand(90, 2), torch.arange(90) % classes, [f"{i}" for i in range(classes)],
                            tmp_path / "a.png", "codes of 90 test images")
    titles = [figure.axes[0].get_title() for figure in seen]
    assert titles == ["codes of 90 test images",
                      "codes of 90 test images,\nshown are the 60 of the first 20 of 30 classes"]


SAVE_FIGURE = evaluate.save_figure


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn instead of saved, by file name."""
    drawn = {}
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    return drawn


def test_a_sheet_of_many_classes_continues_in_further_bands(figures, tmp_path):
    """23 columns of two rows: three bands of ten columns, each picture below its name."""
    rows = [(name, torch.arange(23.).div(100).add(start).view(23, 1, 1, 1).expand(-1, 1, 2, 2))
            for name, start in (("original", 0), ("reconstruction", 0.5))]
    evaluate.draw_sheet(rows, [f"class {i}" for i in range(23)], tmp_path / "a.png", "title")
    axes = np.array(figures["a.png"].axes).reshape(6, 10)
    for i in range(23):
        band, column = 2 * (i // 10), i % 10
        assert axes[band, column].get_title() == f"class {i}"
        for row, start in ((band, 0), (band + 1, 0.5)):
            assert np.allclose(axes[row, column].images[0].get_array(), start + i / 100)
    assert not any(axis.images for axis in axes[4:, 3:].flat)
    assert [axis.texts[0].get_text() for axis in axes[:, 0]] == ["original", "reconstruction"] * 3


@pytest.mark.parametrize("count, name", [
    (2, "a class name of many more words than fit into two lines of a column " * 2), (10, "n" * 40),
    (13, "class number 1234"), (13, "from $4 to $5")])
def test_long_names_overlap_nothing_in_a_sheet(count, name, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "save_figure",
                        lambda figure, path: seen.append(figure) or SAVE_FIGURE(figure, path))
    pictures = torch.zeros(count, 1, 2, 2)
    evaluate.draw_sheet([("original", pictures), ("code", pictures)], [name] * count, tmp_path / "a.png", "title")
    figure, = seen
    figure.draw_without_rendering()
    axes = np.array(figure.axes).reshape(-1, min(count, 10))
    above = figure.texts[0].get_window_extent().y0
    for row in range(0, len(axes), 2):
        names = [axis.title for axis in axes[row] if axis.get_title()]
        boxes = [title.get_window_extent() for title in names]
        assert len(boxes) == min(count - 5 * row, 10)
        assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
        assert max(box.y1 for box in boxes) < above
        assert not any(title.get_parse_math() for title in names)  # of two $
        above = axes[row + 1, 0].get_window_extent().y0


def test_the_classes_of_a_plane_are_all_in_its_legend(figures, tmp_path):
    """matplotlib leaves out a label that begins with an underscore."""
    evaluate.draw_plane(torch.rand(4, 2), torch.arange(4) % 2, ["_x", "y"], tmp_path / "a.png", "title")
    texts = figures["a.png"].axes[0].get_legend().get_texts()
    assert [text.get_text().strip() for text in texts] == ["_x", "y"]


def test_the_curves_name_what_the_training_loss_alone_has(figures, tmp_path):
    row = {"val_mse": None, "val_accuracy": None, "test_mse": None, "train_classifier": 1.5, "test_classifier": 1.2,
           "train_accuracy": 50.0, "test_accuracy": 60.0}
    rows = [row | {"epoch": epoch} for epoch in (1, 2)]
    for note, first in (("smoothed labels", "train (smoothed labels)"), ("", "train")):
        evaluate.draw_curves(rows, tmp_path / "c.png", "title", note)
        labels = [[text.get_text() for text in axis.get_legend().get_texts()][:2] for axis in figures["c.png"].axes]
        assert labels == [[first, "test"], ["train", "test"]]


def test_a_saved_picture_is_whole(figures, tmp_path):
    """The layout alone cut off the label of these curves' first axis."""
    columns = [f"{part}_{key}" for key in ("classifier", "autoencoder", "accuracy") for part in ("train", "test")]
    values = [(2.32, 2.3, 1.36, 1.24, 11.5, 9.5), (2.17, 2.85, 0.99, 0.68, 24.1, 19.15), (1.98, 4.07, 0.62,
              0.58, 37.6, 26.7), (1.66, 1.18, 0.4, 0.43, 63.9, 58.0), (1.37, 0.85, 0.24, 0.26, 83.5, 79.95),
              (1.2, 0.76, 0.17, 0.17, 92.3, 88.45)]
    rows = [dict(zip(columns, row), epoch=epoch + 1, test_mse=None, val_mse=None, val_accuracy=None)
            for epoch, row in enumerate(values)]
    evaluate.draw_curves(rows, tmp_path / "c.png", "title", "smoothed labels")
    figure = figures["c.png"]
    SAVE_FIGURE(figure, tmp_path / "c.png")
    width = figure.get_tightbbox().width + 2 * 0.1  # inches
    assert Image.open(tmp_path / "c.png").size[0] == pytest.approx(150 * width, abs=4)


def test_the_curves_are_the_columns_of_the_log(figures, tmp_path):
    """Training solid, test dashed; the mark at the best epoch."""
    keys = ("train_classifier", "test_classifier", "train_accuracy", "test_accuracy")
    rows = [dict(zip(keys, values), epoch=epoch + 1, val_mse=None, val_accuracy=None, test_mse=None)
            for epoch, values in enumerate([(1.5, 1.25, 50, 60), (1.0, 0.75, 55, 70), (0.5, 1.0, 80, 65)])]
    evaluate.draw_curves(rows, tmp_path / "c.png", "title")
    for axis, name in zip(figures["c.png"].axes, ("classifier", "accuracy"), strict=True):
        for line, part, style in zip(axis.lines, ("train", "test"), ("-", "--")):
            assert list(line.get_xdata()) == [1, 2, 3] and line.get_linestyle() == style
            assert list(line.get_ydata()) == [row[f"{part}_{name}"] for row in rows]
    *_, best = figures["c.png"].axes[1].lines
    assert (best.get_xdata(), best.get_ydata()) == ([2], [70])


def test_the_confusion_picture_is_in_percent_of_each_true_class(figures, tmp_path):
    evaluate.draw_confusion([[3, 1, 0], [0, 0, 0], [0, 2, 6]], ["a", "b", "c"], tmp_path / "c.png", "title")
    axis = figures["c.png"].axes[0]
    assert {text.get_position(): text.get_text() for text in axis.texts} == {
        (0, 0): "75.0", (1, 0): "25.0", (1, 2): "25.0", (2, 2): "75.0"}  # (predicted, true)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")


# ---------------------------------------------------------------- settings of a checkpoint

SETTINGS = {row.name: row for rows in train.SETTINGS.values() for row in rows}


@pytest.mark.parametrize("name", evaluate.NEEDED)
def test_what_an_evaluation_needs_is_what_training_sets(name):
    """The same default, the same kind of value, the same bounds or choices as in train.py's table."""
    needed, row = evaluate.NEEDED[name], SETTINGS[name]
    assert needed.default == row.default
    if isinstance(row.accepts, train.Number):
        assert (needed.accepts, needed.low, needed.high) == (row.accepts.kind, row.accepts.low, row.accepts.high)
    else:
        kinds = {train.names: list, train.shares: dict, evaluate.nonempty: str}
        assert needed.accepts == kinds.get(row.accepts, row.accepts)


def test_every_value_that_training_accepts_an_evaluation_reads():
    given = train.parse(["--size", "24", "--margin", "--scale=-1..1", "--classes", "a,b", "--train-size", "3",
                         "--test-size", "2", "--val-share", "0.5", "--labels", "1", "--variant", "smote",
                         "--constrain", "a=1,b=0.25", "--blur", "10", "--noise", "1e-3", "--clean-test",
                         "--jigsaw-grid", "32", "--seed", "2147483648", "--precision", "bf16", "--beta", "1e9",
                         "--test-share", "0.9"])
    assert len(given) == 18
    for name, value in given.items():
        assert evaluate.fits(value, *evaluate.NEEDED[name][1:]), name
    for name, value in (("size", 24.0), ("size", True), ("margin", 1), ("seed", -1), ("classes", "a,b"),
                        ("classes", ["a", 1]), ("constrain", {"a": 2.0}), ("constrain", {1: 0.5}), ("blur", math.nan),
                        ("blur", "1"), ("scale", "foo"), ("scale", []), ("alpha", -1.0), ("alpha", True)):
        assert not evaluate.fits(value, *evaluate.NEEDED[name][1:]), (name, value)


# ---------------------------------------------------------------- runs and their comparison

COLUMNS = [f"{part}_{name}" for part in ("train", "test")
           for name in ("loss", "classifier", "autoencoder", "accuracy")]


def write_run(folder, accuracy=None, psnr=20.0, epochs=2, **changes):
    """The folder of a finished run, as small as evaluate.py reads it."""
    folder.mkdir(parents=True)
    chosen = {"seed": 0, "name": None, "device": "auto", "data_dir": "data"} | train.recipe("v3") | changes
    chosen["epochs"] = epochs
    (folder / "config.json").write_text(json.dumps({"settings": chosen, "precision": "fp32"}))
    with open(folder / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", *COLUMNS, "test_mse", "val_accuracy", "val_mse"])
        writer.writeheader()
        for epoch in range(1, epochs + 1):
            row = {"epoch": epoch, "test_accuracy": accuracy, "test_mse": 0.01}
            writer.writerow(dict.fromkeys(COLUMNS, 1 / epoch) | row)
    metrics = {"epochs": epochs, "reconstruction": {"mse": 0.01, "psnr": psnr} if psnr else None,
               "code": 256, "parameters": 1234,
               "megabytes": 0.005, "seconds_per_epoch": 1.0}
    if accuracy is not None:
        metrics["accuracy"] = {"last": accuracy, "best": accuracy + 1}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def write_origin(folder, **changes):
    """Changes the config.json of a run."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def compared(monkeypatch, tmp_path, capsys):
    """compared(*paths, flags): evaluate.py --compare; returns the table as a list of dicts. Draws no pictures."""
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: path.write_text("drawn"))

    def run(*flags):
        assert evaluate.main(["--compare", *map(str, flags), "--output", str(tmp_path / "comparison")]) == 0
        lines, printed = (tmp_path / "comparison/comparison.md").read_text().splitlines(), capsys.readouterr().out
        assert max(map(len, printed.splitlines()[:-1])) <= 80  # but for the last line, a path
        assert (tmp_path / "comparison/comparison.png").exists()
        head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:2] == "| "]
        shown = [title for title in head if title in evaluate.PRINTED]
        rows = [dict(zip(head, row)) for row in rows]
        words = [" ".join([row[title] for title in shown]).split() for row in (dict(zip(head, head)), *rows)]
        assert [line.split() for line in printed.splitlines()[:len(words)]] == words
        return rows
    return run


def test_a_table_of_two_runs(trained, tmp_path, capsys):
    """Of real runs, with their pictures."""
    npz, folder = trained
    out, other = tmp_path / "out", train_in(tmp_path / "other", "--version", "v3", "--dataset", npz, "--lr", "0.02",
                                            "--test-size", "20")
    capsys.readouterr()
    assert evaluate.main(["--compare", str(folder), str(other), "--output", str(out)]) == 0
    table = (out / "comparison.md").read_text()
    for each in (folder, other):
        metrics = json.loads((each / "metrics.json").read_text())
        row, = re.findall(rf"\| 1 \| {metrics['accuracy']['last']:.2f} \| {metrics['accuracy']['best']:.2f} \| "
                          rf"{metrics['accuracy']['mirrored']:.2f} \| "
                          rf"{metrics['reconstruction']['mse']:.6f} \|", table)
    for name in ("comparison.png", "sheet.png"):
        assert min(Image.open(out / name).size) > 200


def test_the_sheet_of_a_denoising_run_shows_what_the_network_saw(tiny, tmp_path, monkeypatch):
    folder = train_in(tmp_path / "run", "--version", "v3", "--dataset", tiny, "--noise", "0.2")
    sheets = {}
    monkeypatch.setattr(evaluate, "draw_sheet", lambda rows, names, path, title: sheets.update({path.name: dict(rows)}))
    model, content = evaluate.load_checkpoint(folder / "last.pt")
    dataset = evaluate.prepare_data(content["settings"], True)
    evaluate.draw_reconstructions(model, dataset, content["settings"], folder)
    group = {"v3": {0: evaluate.read_run(folder)}}
    evaluate.draw_all(group, tmp_path / "sheet.png")
    for there, here in (("reconstruction", "v3"), ("with noise", "with noise"), ("original", "original")):
        assert torch.equal(sheets["recon.png"][there], sheets["sheet.png"][here])
    assert not torch.equal(sheets["sheet.png"]["with noise"], sheets["sheet.png"]["original"])


def test_runs_of_one_name_and_other_settings_are_two_groups(compared, tmp_path):
    write_run(tmp_path / "a/v3", 50.0)
    write_run(tmp_path / "b/v3", 60.0, lr=0.5)
    rows = compared(tmp_path / "a", tmp_path / "b/v3")
    assert [(row["run"], row["n"], row["accuracy (%)"]) for row in rows] == [
        ("v3", "1", "50.00"), ("b/v3", "1", "60.00")]
    assert "difference" not in rows[0]  # one run each: no interval


def test_the_picture_shows_the_differences(tmp_path, monkeypatch):
    """Accuracy 50, 52, 54 against 51, 54, 57: the mean 2 with its interval, beside the second group."""
    figures = []
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: figures.append(figure))
    for seed, (a, b) in enumerate(((50, 51), (52, 54), (54, 57))):
        write_run(tmp_path / f"runs/v3_seed{seed}", float(a), seed=seed)
        write_run(tmp_path / f"runs/v3_lr0.5_seed{seed}", float(b), seed=seed, lr=0.5)
    evaluate.compare([tmp_path / "runs"], tmp_path / "out", against="v3")
    accuracy, psnr, difference, *_ = figures[0].axes
    points, _, (bars,) = difference.containers[0]
    label, = [text.get_text() for text, y in zip(accuracy.get_yticklabels(), accuracy.get_yticks())
              if y == points.get_ydata()[0]]
    assert label == "v3_lr0.5" and points.get_xdata() == pytest.approx([2.0])
    (low, _), (high, _) = bars.get_segments()[0]
    assert (low, high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)), abs=1e-3)
    assert difference.get_xlabel() == "accuracy (%): difference from v3"


def test_axes_of_wide_intervals_and_close_values_are_readable(figures, tmp_path):
    """Of two runs the interval may reach beyond 0 and 100 %; equal figures have a deviation too, fixed ones none."""
    for seed, accuracy in enumerate((30.0, 70.0)):
        write_run(tmp_path / f"runs/v3_seed{seed}", accuracy, psnr=12.5, seed=seed)
        write_run(tmp_path / f"runs/v3_lr0.5_seed{seed}", accuracy, psnr=12.5001, seed=seed, lr=0.5)
    evaluate.compare([tmp_path / "runs"], tmp_path / "out")
    accuracy, psnr, *_ = figures["comparison.png"].axes
    assert accuracy.get_xlim() == (-2, 102)
    figures["comparison.png"].draw_without_rendering()
    assert psnr.xaxis.get_offset_text().get_text() == ""
    head, _, row, *_ = (tmp_path / "out/comparison.md").read_text().splitlines()
    row = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (head, row))))
    assert row["PSNR (dB)"] == "12.50 ± 0.00" and row["MB"] == "0.0" and row["parameters"] == "1,234"


def test_the_picture_shows_the_losses_of_all_runs(figures, tmp_path):
    """Of two runs the mean as a line and a band between them, for training and test."""
    losses_of = {0: (2.0, 1.0), 1: (4.0, 1.5)}
    for seed, values in losses_of.items():
        folder = write_run(tmp_path / f"runs/v3_seed{seed}", 50.0, seed=seed)
        rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
        for row, value in zip(rows, values):
            row |= {"train_classifier": value, "test_classifier": value + 10}
        with open(folder / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    evaluate.compare([tmp_path / "runs"], tmp_path / "out")
    axis, = [axis for axis in figures["comparison.png"].findobj(Axes) if axis.get_title().startswith("classifier")]
    for line, band, more in zip(axis.lines, axis.collections, (0, 10), strict=True):
        assert line.get_ydata() == pytest.approx(np.add([3, 1.25], more))
        heights = {(x, y) for x, y in band.get_paths()[0].vertices.tolist()}
        assert {(1, 2 + more), (1, 4 + more), (2, 1 + more), (2, 1.5 + more)} <= heights


ORIGIN = {"network": {"encoder": "C(8)"}, "digests": {"train": "0", "test": "0"}}
OTHER = [{"network": {"encoder": "C(9)"}}, {"digests": {"train": "0", "test": "1"}},
         {"digests": {"train": "1", "test": "0"}}]


@pytest.mark.parametrize("differs", OTHER, ids=["network", "test", "train"])
def test_runs_of_another_network_or_data_set_are_another_group(differs, tmp_path):
    """Where a row of VERSIONS or the files of a data set have changed, the settings are the same."""
    for seed in range(2):
        folder = write_run(tmp_path / f"v3_seed{seed}", 50.0, seed=seed)
        write_origin(folder, **ORIGIN)
    assert len(evaluate.group_runs(evaluate.collect([tmp_path]))) == 1
    write_origin(folder, source="/drawn/set.npz (.npz)", **differs)  # a path
    assert len(evaluate.group_runs(evaluate.collect([tmp_path]))) == 2


@pytest.mark.parametrize("drawn", [{"train_size": 9}, {"val_share": 0.1}, {"variant": "smote"}], ids=str)
def test_seeds_that_draw_other_training_images_are_one_group(drawn, tmp_path):
    for seed in range(2):
        folder = write_run(tmp_path / f"v3_seed{seed}", 50.0, seed=seed, **drawn)
        write_origin(folder, digests={"train": f"{seed}", "test": "0"})
    assert len(evaluate.group_runs(evaluate.collect([tmp_path]))) == 1


@pytest.mark.parametrize("differs", OTHER, ids=["network", "test", "train"])
def test_only_runs_of_one_network_on_the_same_images_are_a_pair(differs, tmp_path):
    """Beta 1 and 0, before and after a row of VERSIONS or the files of a data set have changed."""
    for beta in (1.0, 0.0):
        write_origin(write_run(tmp_path / "old" / f"v3_beta{beta:g}", 50.0, beta=beta), **ORIGIN)
        write_origin(write_run(tmp_path / "new" / f"v3_beta{beta:g}", 60.0, beta=beta), **ORIGIN | differs)
    groups = evaluate.group_runs(evaluate.collect([tmp_path / "old", tmp_path / "new"]))
    pairs = {groups[name][0].folder: groups[other][0].folder
             for name, other in evaluate.references(groups, "beta=0").items()}
    assert pairs == {tmp_path / place / "v3_beta1": tmp_path / place / "v3_beta0" for place in ("old", "new")}
    shutil.rmtree(tmp_path / "old/v3_beta0")  # then the old one has no reference
    groups = evaluate.group_runs(evaluate.collect([tmp_path / "old", tmp_path / "new"]))
    assert [groups[name][0].folder for name in evaluate.references(groups, "beta=0")] == [tmp_path / "new/v3_beta1"]


def test_a_file_that_two_processes_write_is_of_one_of_them(tmp_path, monkeypatch):
    def slow(part):
        part.write_text("slow")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        evaluate.write_whole(tmp_path / "report.json", lambda other: other.write_text("fast"))
        assert (tmp_path / "report.json").read_text() == "fast" and part.read_text() == "slow"
    evaluate.write_whole(tmp_path / "report.json", slow)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["slow"]


def test_a_log_that_is_no_table_is_one_line(tmp_path):
    folder = write_run(tmp_path / "v3", 50.0)
    with open(folder / "log.csv", "a") as file:
        file.write(f"{'1' * 200_000}\n")  # above csv's limit
    with pytest.raises(evaluate.UsageError, match="not the folder of a finished run"):
        evaluate.read_run(folder)


def test_an_evaluation_says_that_the_test_images_have_changed(tiny, tmp_path, capsys):
    npz = tmp_path / "set.npz"
    shutil.copy(tiny, npz)
    assert train.main(["--version", "v3", "--dataset", str(npz), "--epochs", "1", "--name", "run", "--output",
                       str(tmp_path)]) == 0
    model, content = evaluate.load_checkpoint(tmp_path / "run/best.pt")
    evaluate.load_test(model, content, "cpu")
    assert capsys.readouterr().err == ""
    with np.load(npz) as file:
        np.savez(npz, **dict(file) | {"x_test": file["x_train"][:30], "y_test": file["y_train"][:30]})
    evaluate.load_test(model, content, "cpu")
    assert "set.npz (.npz) are not those of the training" in capsys.readouterr().err


def test_a_comparison_does_without_a_damaged_checkpoint(trained, compared, tmp_path):
    for name in ("v3", "v3_lr0.5"):
        (write_run(tmp_path / name, 50.0, lr=len(name)) / "last.pt").write_bytes(b"damaged")
    assert len(compared(tmp_path / "v3", tmp_path / "v3_lr0.5")) == 2
    assert not (tmp_path / "comparison/sheet.png").exists()


@pytest.mark.parametrize("size", [10, None])  # None: of a folder without test/
def test_seeds_that_draw_other_test_images_are_one_group(size, compared, tmp_path):
    """Of one data set alone."""
    for name, pool, seed in (("a", "one", 0), ("b", "one", 1), ("c", "two", 2), ("d", "two", 3)):
        folder = write_run(tmp_path / "runs" / name, 50.0 + seed, seed=seed, test_size=size)
        write_origin(folder, digests={"train": name, "test": name}, pool={"ant": pool})
    assert [row["n"] for row in compared(tmp_path / "runs")] == ["2", "2"]
    assert "different test images" in (tmp_path / "comparison/comparison.md").read_text()


def test_a_comparison_of_some_runs_leaves_that_of_their_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: None)
    for seed in range(2):
        write_run(tmp_path / f"runs/v3_seed{seed}", 50.0, seed=seed)
    assert evaluate.main(["--compare", str(tmp_path / "runs")]) == 0
    before = (tmp_path / "runs/comparison/comparison.md").read_text()
    assert evaluate.main(["--compare", str(tmp_path / "runs/v3_seed1")]) == 0
    assert (tmp_path / "runs/comparison/comparison.md").read_text() == before
    assert (tmp_path / "runs/comparison-v3_seed1/comparison.md").exists()


def test_a_repeated_run_is_named_and_left_out(compared, tmp_path, capsys):
    for name in ("v3", "v3_run2"):
        write_run(tmp_path / "runs" / name, 50.0)
    runs = evaluate.collect([tmp_path / "runs", tmp_path / "runs/v3"])
    assert len(runs) == 2  # the folder that is named twice counts once
    evaluate.group_runs(runs)
    assert f"{tmp_path / 'runs/v3'} is left out: v3_run2 repeats it" in capsys.readouterr().err


def test_seeds_are_grouped_and_paired(compared, tmp_path):
    """Accuracy 50, 52, 54 against 51, 54, 57: differences 1, 2, 3; t is 4.303 for two degrees of freedom."""
    for seed, (a, b) in enumerate(((50, 51), (52, 54), (54, 57))):
        suffix = f"_seed{seed}" * (seed > 0)
        write_run(tmp_path / f"runs/v3{suffix}", float(a), seed=seed)
        write_run(tmp_path / f"runs/v3_lr0.5{suffix}", float(b), seed=seed, lr=0.5, device="cpu", data_dir=f"{seed}")
    first, second = compared(tmp_path / "runs")
    assert (first["run"], first["n"], second["run"], second["n"]) == ("v3", "3", "v3_lr0.5", "3")
    assert first["accuracy (%)"] == "52.00 ± 2.00" and second["accuracy (%)"] == "54.00 ± 3.00"
    half = 4.303 / math.sqrt(3)
    assert (second["difference"], second["result"]) == (f"+2.00 ± {half:.2f}", "not shown")
    assert second["compared with"] == "v3"
    assert not first["difference"] and first["PSNR (dB)"].startswith("20.00")
    back, _ = compared(tmp_path / "runs", "--against", "v3_lr0.5")
    assert (back["difference"], back["compared with"]) == (f"-2.00 ± {half:.2f}", "v3_lr0.5")


def test_a_difference_of_some_of_the_runs_says_of_how_many_pairs(compared, tmp_path):
    for seed in range(4):
        write_run(tmp_path / f"runs/v3_seed{seed}", 50.0, seed=seed)
        write_run(tmp_path / f"runs/v4_seed{seed + 2}", 50.0 + seed, seed=seed + 2, version="v4")
    _, row = compared(tmp_path / "runs")  # seeds 2 and 3: differences 0 and 1
    assert row["difference"] == f"+0.50 ± {12.706 * 0.5:.2f} (2 pairs)" and row["n"] == "4"


def test_against_a_setting_never_pairs_runs_on_different_data(compared, tmp_path):
    """Two folders of data: in each of them beta 1 is compared with beta 0."""
    for place, accuracy in (("a", 50.0), ("b", 60.0)):
        for seed in range(2):
            for beta, gain in ((1.0, 1), (0.0, 0)):
                folder = write_run(tmp_path / place / f"v3_{place}_beta{beta:g}_seed{seed}", accuracy + gain,
                                   psnr=20.0 if beta else None, seed=seed, beta=beta, data_dir=place)
                write_origin(folder, digests={"train": place, "test": place})
    rows = {row["run"]: row for row in compared(tmp_path / "a", tmp_path / "b", "--against", "beta=0")}
    pairs = {name: (row["difference"], row["compared with"]) for name, row in rows.items() if row["compared with"]}
    assert pairs == {f"v3_{place}_beta1": ("+1.00 ± 0.00", f"v3_{place}_beta0") for place in "ab"}
    assert "different test images" not in (tmp_path / "comparison/comparison.md").read_text()
    compared(tmp_path / "a", tmp_path / "b")  # against the first one, whatever its data
    assert "have different test images" in (tmp_path / "comparison/comparison.md").read_text()
    # The setting may be the one that makes the test images different.
    for seed in range(2):
        folder = write_run(tmp_path / "a" / f"v3_a_beta1_blur1_seed{seed}", 40.0, seed=seed, beta=1.0, blur=1.0)
        write_origin(folder, digests={"train": "a", "test": "blurred"})
    rows = {row["run"]: row for row in compared(tmp_path / "a", "--against", "blur=0")}
    assert rows["v3_beta1_blur1"]["difference"] == "-11.00 ± 0.00"
    # With a second set of data, which of the two is meant is open.
    with pytest.raises(SystemExit):
        evaluate.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--against", "blur=0"])


def test_runs_of_other_seeds_are_compared_unpaired(compared, tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"runs/v3_seed{seed}", 50.0 + seed, seed=seed)
        write_run(tmp_path / f"runs/v4_seed{seed + 3}", 60.0 + seed, seed=seed + 3, version="v4")
    _, row = compared(tmp_path / "runs")
    # Welch: variances 1 and 1, so 4 degrees of freedom, t 2.776.
    assert row["difference"] == f"+10.00 ± {2.776 * math.sqrt(2 / 3):.2f} (unpaired)" and row["result"] == "better"


def test_against_a_setting_pairs_groups_that_differ_in_it_alone(compared, tmp_path, capsys):
    for version, gain in (("v1", 1), ("v2", -1)):
        for seed in range(2):
            write_run(tmp_path / f"runs/{version}_seed{seed}", 50.0 + seed + gain * (1 + seed / 50), seed=seed,
                      version=version)
            write_run(tmp_path / f"runs/{version}_beta0_seed{seed}", 50.0 + seed, psnr=None, seed=seed,
                      version=version, beta=0.0)
    write_run(tmp_path / "runs/v1_beta0_blur1", 40.0, version="v1", beta=0.0, blur=1.0)  # it differs in two settings
    rows = {row["run"]: row for row in compared(tmp_path / "runs", "--against", "beta=0")}
    pairs = {name: row["compared with"] for name, row in rows.items() if row["compared with"]}
    assert pairs == {"v1": "v1_beta0", "v2": "v2_beta0"}
    # Differences 1 and 1.02; t is 12.706 for one degree of freedom.
    assert rows["v1"]["difference"] == "+1.01 ± 0.13" and rows["v1"]["result"] == "better"
    assert rows["v2"]["difference"] == "-1.01 ± 0.13" and rows["v2"]["result"] == "worse"
    for against, message in (("v5", "expected SETTING=VALUE or one"), ("siz=0", "siz is no setting of these runs"),
                             ("beta=7", "no two groups differ in beta alone, one of them with 7")):
        with pytest.raises(SystemExit) as end:
            evaluate.main(["--compare", str(tmp_path / "runs"), "--against", against])
        assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("ks, count, variant, refused", [
    ([5], 5, "complete", False), ([6], 5, "complete", True), ([1, 3], 5, "complete", True),  # a tenth of 5 is none
    ([1, 9], 10, "complete", False), ([1, 10], 10, "complete", True),  # one of ten is held out
    ([1, 3], 100, "smote", True), ([3], 100, "smote", False)])
def test_the_ks_that_knn_can_choose_among(ks, count, variant, refused):
    with pytest.raises(evaluate.UsageError, match="--knn") if refused else contextlib.nullcontext():
        evaluate.check_knn(ks, count, variant)


@pytest.mark.parametrize("text, value, same", [
    ("ring,star", ["ring", "star"], True), ("ring", ["ring", "star"], False), ("a=0.5,b=1", {"a": 0.5, "b": 1.0}, True),
    ("a=0.4", {"a": 0.5}, False), ("0.20", 0.2, True), ("no", False, True), ("0", False, False), ("v4", "v4", True)])
def test_a_settings_value_as_its_flag_has_it(text, value, same):
    assert evaluate.names_value(text, value) == same


@pytest.mark.parametrize("against", ["label-smoothing=0.0", "label_smoothing=0", "skip=no", "class-weights=None"])
def test_against_takes_a_setting_as_its_flag_has_it(compared, tmp_path, against):
    changed = {"label-smoothing": dict(label_smoothing=0.2), "label_smoothing": dict(label_smoothing=0.2),
               "skip": dict(skip=True), "class-weights": dict(class_weights="balanced")}[against.split("=")[0]]
    for seed in range(2):
        write_run(tmp_path / f"runs/v4_seed{seed}", 50.0 + seed, seed=seed)
        write_run(tmp_path / f"runs/v4_changed_seed{seed}", 53.0 + seed, seed=seed, **changed)
    rows = {row["run"]: row for row in compared(tmp_path / "runs", "--against", against)}
    assert {name: row["difference"] for name, row in rows.items()} == {"v4": "", "v4_changed": "+3.00 ± 0.00"}


def test_runs_without_a_classifier_are_compared_by_their_psnr(compared, tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"runs/cnn_seed{seed}", psnr=20.0 + seed, seed=seed)
        write_run(tmp_path / f"runs/cnn_lr0.5_seed{seed}", psnr=22.0 + seed, seed=seed, lr=0.5)
    rows = compared(tmp_path / "runs", "--against", "cnn")
    assert [row["difference"] for row in rows] == ["+2.00 ± 0.00", ""] and "accuracy (%)" not in rows[0]
    assert "in PSNR (dB)" in (tmp_path / "comparison/comparison.md").read_text()


def test_no_group_is_lost_in_the_names(tmp_path):
    """Groups keep names of their own where their folders have the same parts."""
    for place, name, lr in (("a", "x_long_deep", 0.1), ("a", "x_deep_long", 0.2), ("b", "x_long_deep", 0.3),
                            ("c_d", "x_long_deep", 0.4), ("a", "x_long_deep_run2", 0.5)):
        write_run(tmp_path / place / name, 50.0, lr=lr)
    groups = evaluate.group_runs(evaluate.collect([tmp_path / place for place in ("a", "b", "c_d")]))
    assert sorted(group[0].settings["lr"] for group in groups.values()) == [0.1, 0.2, 0.3, 0.4, 0.5]
    repeated = [evaluate.read_run(write_run(tmp_path / f"again/v3{suffix}", accuracy))
                for suffix, accuracy in (("", 50.0), ("_run2", 70.0))]
    group, = evaluate.group_runs(repeated).values()
    assert group[0].metrics["accuracy"]["last"] == 70.0  # of the same seed the last one


def test_a_comparison_needs_no_data_set(trained, compared, tmp_path):
    """Of runs whose data set is no longer there the table and the curves are still made."""
    for name in ("v3", "v3_lr0.5"):
        folder = write_run(tmp_path / name, 50.0, lr=len(name))
        content = torch.load(trained[1] / "last.pt", weights_only=True)
        content["settings"]["dataset"] = str(tmp_path / "nowhere.npz")
        torch.save(content, folder / "last.pt")
    assert [row["run"] for row in compared(tmp_path / "v3", tmp_path / "v3_lr0.5")] == ["v3", "v3_lr0.5"]
    assert not (tmp_path / "comparison/sheet.png").exists()


def test_unfinished_runs_of_a_folder_are_named_and_left_out(tmp_path, capsys):
    write_run(tmp_path / "runs/v3", 50.0)
    (write_run(tmp_path / "runs/v4", 60.0, version="v4") / "metrics.json").unlink()
    run, = evaluate.collect([tmp_path / "runs"])
    assert run.folder.name == "v3" and len(run.rows) == 2 and run.rows[0]["val_mse"] is None
    assert "v4 is left out: it has not finished" in capsys.readouterr().err
    with pytest.raises(evaluate.UsageError, match="v4: not the folder of a finished run"):
        evaluate.collect([tmp_path / "runs/v4"])
    (tmp_path / "runs/v3/metrics.json").unlink()
    with pytest.raises(evaluate.UsageError, match="no finished run there"):
        evaluate.collect([tmp_path / "runs"])


def rows_with(**columns):
    """Rows of a log with these columns, the others empty."""
    empty = dict.fromkeys(("test_accuracy", "test_mse", "val_accuracy", "val_mse"))
    return [empty | dict(zip(columns, values)) for values in zip(*columns.values())]


@pytest.mark.parametrize("columns, best, part", [
    (dict(test_accuracy=[50, 70, 70, 60]), 2, "test"),  # of equal epochs the last one
    (dict(test_accuracy=[50, 70, 60], val_accuracy=[41, 40, 41]), 2, "val"),
    (dict(test_mse=[3, 1, 1, 2]), 2, "test"), (dict(test_mse=[3, 1, 2], val_mse=[1, 2, 1]), 2, "val"),
    (dict(test_accuracy=[None, None, 40, 40, 30], test_mse=[3, 1, 2, 2, 2]), 3, "test"),  # separate training
    (dict(test_accuracy=[None, 40, 30], val_accuracy=[None, 20, 21], val_mse=[3, 1, 1]), 2, "val")])
def test_the_best_epoch(columns, best, part):
    rows = rows_with(**columns)
    assert evaluate.best_row(rows) is rows[best] and evaluate.chosen_on(rows) == part


# ---------------------------------------------------------------- intervals

@pytest.mark.parametrize("freedom, level, published", [
    (1, 0.95, 12.706), (2, 0.95, 4.303), (4, 0.95, 2.776), (9, 0.95, 2.262), (30, 0.95, 2.042), (120, 0.95, 1.980),
    (5, 0.99, 4.032), (10_000, 0.95, 1.960)])
def test_quantiles_of_students_distribution(freedom, level, published):
    assert evaluate.t_quantile(freedom, level) == pytest.approx(published, abs=1e-3)


def test_intervals_by_hand():
    mean, half = evaluate.mean_interval([1, 2, 6])
    assert (mean, half) == (3, pytest.approx(4.3027 * math.sqrt(7) / math.sqrt(3), rel=1e-4))
    paired = evaluate.difference_interval({0: 5.0, 1: 7.0, 2: 6.0, 9: 100.0}, {2: 4.0, 1: 4.0, 0: 4.0, 5: 0.0})
    assert paired == (pytest.approx(2), pytest.approx(4.3027 / math.sqrt(3), rel=1e-4), 3)  # differences 1, 3, 2
    mean, half, pairs = evaluate.difference_interval({0: 1.0, 1: 3.0}, {5: 10.0, 6: 14.0, 7: 18.0})
    # Variances of the means 2/2 and 16/3; Welch's degrees of freedom (19/3)^2 / (1 + (16/3)^2 / 2).
    freedom = (19 / 3) ** 2 / (1 + (16 / 3) ** 2 / 2)
    assert (mean, pairs) == (-12, 0) and 2 < freedom < 3
    assert half == pytest.approx(evaluate.t_quantile(freedom) * math.sqrt(19 / 3)) and 3.182 < half / 2.5166 < 4.303
    assert evaluate.difference_interval({0: 1.0}, {0: 2.0}) is None
    assert evaluate.difference_interval({0: 1.0}, {1: 2.0, 2: 3.0}) is None
    assert evaluate.difference_interval({0: 1.0, 1: 2.0}, {1: 1.0, 2: 3.0})[2] == 0  # one common seed is no pair


@pytest.mark.parametrize("interval, expected", [
    ((2.0, 1.0, 3), "better"), ((-2.0, 1.0, 0), "worse"), ((1.0, 2.0, 3), "not shown"),
    ((1.0, 0.0, 2), "not shown"), ((1.0, 1.0, 3), "not shown"), ((-1.0, 1.0, 3), "not shown"),
    ((0.0, 0.0, 3), "not shown"),
    (None, "not shown")])
def test_a_difference_is_shown_where_its_interval_excludes_zero(interval, expected):
    assert evaluate.verdict(interval) == expected


def test_intervals_cover_the_true_value_as_often_as_they_say(monkeypatch):
    """95 % of 10,000 draws: a mean of 4, paired differences of 3 seeds (whose runs share a part that depends on the
    seed), and unpaired ones of 4 and 7 with unequal spreads."""
    exact = functools.cache(evaluate.t_quantile)
    grid = np.linspace(1, 12, 400)
    quantiles = [exact(freedom) for freedom in np.linspace(1, 12, 45)]
    table = np.interp(grid, np.linspace(1, 12, 45), quantiles)
    monkeypatch.setattr(evaluate, "t_quantile", lambda freedom: exact(int(freedom)) if freedom == int(freedom) else
                        np.interp(freedom, grid, table))
    draw, count, hits = np.random.default_rng(0), 10_000, np.zeros(3)
    singles, shared = draw.normal(7, 2, (count, 4)), draw.normal(0, 5, (count, 3))
    ones, others = shared + draw.normal(3, 1, (count, 3)), shared + draw.normal(1, 2, (count, 3))
    fews, manys = draw.normal(3, 1, (count, 4)), draw.normal(1, 3, (count, 7))
    for single, one, other, few, many in zip(singles, ones, others, fews, manys):
        mean, half = evaluate.mean_interval(single)
        paired = evaluate.difference_interval(dict(enumerate(one)), dict(enumerate(other)))
        unpaired = evaluate.difference_interval(dict(enumerate(few)), dict(enumerate(many, 100)))
        assert paired[2] and not unpaired[2]
        hits += abs(mean - 7) < half, abs(paired[0] - 2) < paired[1], abs(unpaired[0] - 2) < unpaired[1]
    assert np.all(abs(hits / count - 0.95) < 0.01), hits


# ---------------------------------------------------------------- files and errors

def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    evaluate.write_json(path, {"a": 1})

    def fail_half_way(part):
        part.write_text("half")
        raise OSError("disk full")
    with pytest.raises(evaluate.Stopped, match="a.json cannot be written: disk full"):
        evaluate.write_whole(path, fail_half_way)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error, status, line", [
    (evaluate.UsageError("--x 1: expected 2"), 2, "error: --x 1: expected 2"),
    (data.DataError("no data set"), 2, "error: no data set"), (models.NotationError("token 1"), 2, "error: token 1"),
    (models.CheckpointError("a.pt: no such file"), 2, "error: a.pt: no such file"),
    (FileNotFoundError(2, "No such file or directory", "a.png"), 2, "error: a.png: No such file or directory"),
    (evaluate.Stopped("epoch 1: loss"), 1, "stopped: epoch 1: loss"), (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError("x\ny"), 1, "stopped: out of memory (x y); a smaller --batch-size, --size or --train-size needs"),
    (FileNotFoundError(2, "No such file or directory", "igloo.png"), 2, "error: igloo.png: No such file or directory"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "stopped: out of memory (CUDA out of memory); a smaller"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "stopped: out of memory")])
def test_an_error_is_one_line_and_a_status(error, status, line, capsys):
    error.advice = "; advice"
    with pytest.raises(SystemExit) as end, evaluate.errors("train.py"):
        raise error
    printed = capsys.readouterr().err
    assert end.value.code == status and printed.startswith(f"train.py: {line}")
    assert printed.endswith("; advice\n") and printed.count("\n") == 1


def test_a_defect_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), evaluate.errors("train.py"):
        1 / 0
