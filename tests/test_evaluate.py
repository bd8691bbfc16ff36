"""Measures against plain formulations, the report of a run, its pictures, the command, comparisons."""
import copy
import csv
import itertools
import json
import math
import shutil
import zlib
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid

import data
import evaluate
import losses
import models
import train

SAVE_FIGURE, CPU = evaluate.save_figure, torch.device("cpu")


def settings(*words):
    """A run's settings, as train.py has them."""
    return train.parse(["--version", "v3", "--precision", "fp32", *words])[0]


def small(encoder="C(4)"):
    """An untrained network for images (3, 12, 12) of three classes."""
    torch.manual_seed(0)
    return models.build(models.Version(encoder, "L'(3)"), (3, 12, 12), 3)


def noise(n):
    """A Split of n images (3, 12, 12) of noise, of three classes in turn."""
    images = torch.randint(0, 256, (n, 3, 12, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return data.Split(images.contiguous(memory_format=torch.channels_last), torch.arange(n) % 3)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by file name; making files of them takes most of a report's time."""
    drawn = {}
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    return drawn


def assert_sheet(figure, pictures, columns):
    """That a sheet shows these pictures (N, C, H, W), so many in a row."""
    expected = make_grid(pictures, nrow=columns, pad_value=1).permute(1, 2, 0)
    torch.testing.assert_close(torch.tensor(figure.axes[0].images[0].get_array()), expected)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def refused(capsys, *argv):
    """The line with which evaluate.py refuses a command."""
    with pytest.raises(SystemExit) as end:
        evaluate.main(list(map(str, argv)))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize("error, status, line", [
    (evaluate.UsageError("--x 1: expected 2"), 2, "error: --x 1: expected 2"),
    (data.DataError("no set"), 2, "error: no set"), (models.NotationError("token"), 2, "error: token"),
    (models.CheckpointError("a.pt"), 2, "error: a.pt"), (evaluate.Stopped("nan"), 1, "stopped: nan"),
    (FileNotFoundError(2, "No such file", "a.png"), 2, "error: [Errno 2] No such file: 'a.png'"),
    (MemoryError("x\ny"), 1, "stopped: out of memory; a smaller --batch-size or --size needs less"),
    (KeyboardInterrupt(), 130, "interrupted")])
def test_an_error_is_one_line_and_a_status(error, status, line, capsys):
    error.advice = "; advice"
    with pytest.raises(SystemExit) as end, evaluate.errors("train.py"):
        raise error
    assert (end.value.code, capsys.readouterr().err) == (status, f"train.py: {line}; advice\n")
    with pytest.raises(ZeroDivisionError), evaluate.errors("train.py"):  # a defect keeps its traceback
        1 / 0


def test_devices_and_precision(monkeypatch, tmp_path):
    for name in ("gpu", "cuda:x", "cuda:99"):
        with pytest.raises(evaluate.UsageError, match=f"--device {name}: unavailable .* expected auto, cpu,"):
            evaluate.pick_device(name)
    monkeypatch.setattr(evaluate, "Path", lambda _: tmp_path / "cpuinfo")
    assert evaluate.pick_precision("auto", CPU) == "fp32"  # not Linux: unknown
    for text, expected in (("GenuineIntel amx_bf16", "bf16"), ("AuthenticAMD avx512_bf16", "bf16"),
                           ("GenuineIntel avx512_bf16", "fp32"), ("AuthenticAMD avx2", "fp32")):
        (tmp_path / "cpuinfo").write_text(text)
        assert evaluate.pick_precision("auto", CPU) == expected


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.json"
    evaluate.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError):
        evaluate.write_whole(path, lambda part: part.write_text("half") / 0)
    assert json.loads(path.read_text()) == {"a": 1} and list(path.parent.iterdir()) == [path]


@torch.no_grad()
def test_measures_are_the_plain_formulas():
    """Of 160 images, two batches, in float64; the pixels clamped to 0-1; always the same order of tiles."""
    model, split, args = small(), noise(160), settings("--delta", "1")
    model.decoder[-1].weight *= 20  # so that pixels are outside of 0-1
    found, labels = evaluate.measure(model, split, args, mirrored=True), split.labels
    assert model.training  # as it was
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (data.MEAN, data.STD))
    pixels = split.images.double() / 255
    images = (pixels - mean) / std
    order = torch.rand(160, 16, generator=torch.Generator().manual_seed(0)).argsort(1)
    model.eval().double()
    (logits, rebuilt), mirrored = model(images), model(images.flip(3))[0]
    restored = model(losses.jumble(images, 4, order))[1]
    clamped, chances = (rebuilt * std + mean).clamp(0, 1), logits.softmax(1)
    error = clamped - pixels
    mse, hits = error.square().mean((1, 2, 3)), 100 * (logits.argmax(1) == labels).double()
    both = 100 * ((logits + mirrored).argmax(1) == labels).double()
    assert hits.mean() != both.mean() and (clamped == 1).any()
    expected = {
        "mse": mse.mean(), "mae": error.abs().mean(), "psnr": (10 * (1 / mse).log10()).mean(),
        "absolute_error": error.abs().sum() / 160, "net_error": error.sum((1, 2, 3)).abs().mean(),
        "autoencoder": (rebuilt - images).square().mean(), "jigsaw": (restored - images).square().mean(),
        "classifier": -chances[range(160), labels].log().mean(),
        "accuracy": hits.mean(), "accuracy_mirrored": both.mean()}
    assert {key: found.pop(key) for key in expected} == pytest.approx(
        {key: value.item() for key, value in expected.items()}, rel=1e-4)
    assert torch.equal(found.pop("predicted"), chances.argmax(1))
    torch.testing.assert_close(found.pop("probability").double(), chances.amax(1), rtol=1e-4, atol=0)
    assert found == {"confusion": losses.confusion_matrix(labels, logits.argmax(1), 3).tolist()}
    codes = model.encode(images).flatten(1).float()
    torch.testing.assert_close(evaluate.encode(model.float(), split, args), codes, rtol=1e-4, atol=1e-5)
    for flag, absent in (("--beta", {"mse", "autoencoder"}), ("--alpha", {"accuracy", "classifier"})):
        assert not absent & set(evaluate.measure(model, split, settings(flag, "0")))


def test_noise_is_measured_against_the_clean_images():
    """A network that returns what it sees has the error of the noise itself, the same at every call."""
    split, model = data.shapes(train=8, test=60).test, models.build("v3")
    model.forward = lambda x, **_: (torch.zeros(len(x), 10), x)
    found, again = (evaluate.measure(model, split, settings("--noise", "0.1")) for _ in range(2))
    assert found["psnr"] == again["psnr"] == found["noisy_psnr"] == pytest.approx(20, abs=0.6)  # clamped
    assert found["autoencoder"] == pytest.approx(sum((0.1 / std) ** 2 for std in data.STD) / 3, rel=0.02)
    clean = evaluate.measure(model, split, settings("--noise", "0.1", "--clean-test"))
    assert clean["autoencoder"] == 0 and "noisy_psnr" not in clean and clean["psnr"] == 100  # the cap


def test_batch_norm_has_the_statistics_of_whole_images_alone():
    """Not those of a second pass, of jumbled or of labelled images."""
    model, images, other = small("B(4)>B'(4)"), data.normalise(noise(8).images), torch.randn(8, 3, 12, 12)
    plain, tiles = copy.deepcopy(model), torch.arange(15, -1, -1).expand(8, 16)
    plain(images)
    needed = {"logits", "reconstruction", "jigsaw_reconstruction"}
    batch = {"inputs": images, "order": tiles, "labelled_inputs": other}
    tensors = evaluate.forward(model, batch, settings(), needed)
    for name, value in model.state_dict().items():
        assert "running" not in name or torch.equal(value, plain.state_dict()[name])
    torch.testing.assert_close(tensors["logits"], plain(other)[0])
    assert not torch.equal(model.encoder[2].running_mean, plain.encoder[2].running_mean)


def test_knn_is_a_plain_loop():
    """Pixels of 0 to 7 have equal distances, of which the first counts; so have the votes."""
    torch.manual_seed(0)
    train, test = (data.Split(torch.randint(0, 8, (n, 3, 1, 2), dtype=torch.uint8), torch.randint(0, 3, (n,)))
                   for n in (400, 90))
    model = models.build(models.Version("L(4)", "L'(3)"), (3, 1, 2), 3)
    for k in (1, 4, 7):
        right = 0
        for query, answer in zip(test.images, test.labels.tolist()):
            distances = (train.images.double() - query).square().sum((1, 2, 3))
            nearest = train.labels[distances.sort(stable=True).indices[:k]].tolist()
            right += max(nearest, key=nearest.count) == answer  # of equally frequent ones the first
        found = evaluate.report_knn(model, data.Dataset("set", "", [*"abc"], train, test), settings(), k)
        assert found["pixels"]["accuracy"] == pytest.approx(100 * right / 90)


@pytest.mark.parametrize("columns, best, part", [
    (dict(test_accuracy=[50, 70, 70, 60]), 2, "test"),  # of equal epochs the last one
    (dict(test_accuracy=[50, 70, 60], val_accuracy=[41, 40, 41]), 2, "val"),
    (dict(test_mse=[3, 1, 1, 2]), 2, "test"), (dict(test_mse=[3, 1, 2], val_mse=[1, 2, 1]), 2, "val"),
    (dict(test_accuracy=[None, 40, 40, 30], test_mse=[3, 1, 2, 2]), 2, "test")])  # separate training
def test_the_best_epoch(columns, best, part):
    empty = dict.fromkeys(("test_accuracy", "test_mse", "val_accuracy", "val_mse"))
    rows = [empty | dict(zip(columns, values)) for values in zip(*columns.values())]
    row, on = evaluate.best_row(rows)
    assert row is rows[best] and on == part


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on noise in three colours, which it tells apart; the classes have 10, 14 and 6 test images."""
    root, draw, figures = tmp_path_factory.mktemp("run"), np.random.default_rng(0), {}
    arrays = {"classes": np.array(["Deep red", "green", "blue"])}
    for part, labels in (("train", np.arange(90) % 3), ("test", np.repeat([0, 1, 2], [10, 14, 6]))):
        images = draw.integers(0, 120, (len(labels), 12, 12, 3))
        images[np.arange(len(labels)), ..., labels] += 90
        arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": labels}
    np.savez(root / "set.npz", **arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "save_figure", lambda figure, path: figures.update({path.name: figure}))
        train.run(dataset=root / "set.npz", encoder="C(8)>L(16)", classifier="D(0.5)>L'(10)", optimizer="adam",
                  epochs=4, batch_size=10, device="cpu", precision="fp32", output=root, name="run")
    model, content = models.load(root / "run/last.pt")
    args = Namespace(**content["settings"])
    return Namespace(arrays=arrays, folder=root / "run", ckpt=root / "run/last.pt", model=model, args=args,
                     content=content, figures=figures, data=evaluate.load_data(args),
                     metrics=evaluate.read_run(root / "run").metrics)


def report_of(folder, *flags):
    """The metrics.json of a command of evaluate.py."""
    evaluate.main(["--device", "cpu", "--output", str(folder), *map(str, flags)])
    path, = folder.rglob("metrics.json")
    return json.loads(path.read_text())


def test_the_report_of_a_run(run):
    accuracy, rows = run.metrics["accuracy"], evaluate.read_run(run.folder).rows
    column = [row["test_accuracy"] for row in rows]
    assert (accuracy["test"], accuracy["best"]) == (column[-1], max(column)) and column[-1] > 90
    assert (accuracy["best_chosen_on"], accuracy["at_chance"]) == ("test", False)
    assert all(value == rows[-1][f"test_{key}"] for key, value in run.metrics["reconstruction"].items())
    measured, sample = evaluate.measure(run.model, run.data.train, run.args), run.metrics["training_images"]
    assert sample == {"images": 90} | {key: pytest.approx(measured[key]) for key in ("accuracy", "mse", "psnr")}
    assert sample["accuracy"] > rows[-1]["train_accuracy"] + 1  # a mean over the epoch, under dropout
    assert set(run.figures) == {"confusion.png", "curves.png", "recon.png", "codes.png"}
    # The curves are the columns of the log: training solid, test dashed; the mark is at the best epoch.
    for axis, name in zip(run.figures["curves.png"].axes, ("classifier", "autoencoder", "accuracy"), strict=True):
        for line, part, style in zip(axis.lines, ("train", "test"), ("-", "--")):
            assert line.get_xydata().tolist() == [[row["epoch"], row[f"{part}_{name}"]] for row in rows]
            assert line.get_linestyle() == style
    assert axis.lines[2].get_xydata().tolist() == [[accuracy["best_epoch"], accuracy["best"]]]


def test_the_checkpoint_alone_gives_the_same_figures(run, figures, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # from another folder
    evaluate.main(["--ckpt", str(run.ckpt), "--device", "cpu"])
    folder, printed = run.folder / "evaluation-last", capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["accuracy"].items() <= run.metrics["accuracy"].items() and len(metrics["accuracy"]) == 4
    assert metrics["reconstruction"] == run.metrics["reconstruction"] and list(tmp_path.iterdir()) == []
    assert "% of 30 images (always the largest class: 47 %)" in printed and evaluate.CHANCE not in printed
    rows, labels, names = read_csv(folder / "predictions.csv"), run.data.test.labels, run.data.classes
    chances, guesses = run.model(data.normalise(run.data.test.images))[0].softmax(1).max(1)
    assert rows == read_csv(run.folder / "predictions.csv") == [
        {"image": str(i), "true": names[labels[i]], "predicted": names[guesses[i]],
         "probability": f"{chances[i]:.4f}"} for i in range(30)]


def test_a_changed_data_set_is_noted_and_another_one_used_whole(run, tmp_path, capsys):
    args = Namespace(**vars(run.args) | {"dataset": str(tmp_path / "set.npz")})
    for change, noted in ((0, False), (1, True)):
        np.savez(tmp_path / "set.npz", **run.arrays | {"x_test": run.arrays["x_test"] ^ change})
        evaluate.load_test(run.model, args, run.content, None, CPU)
        assert ("set.npz (.npz) has changed since the training" in capsys.readouterr().err) is noted
    own = evaluate.load_test(run.model, args, run.content, args.dataset, CPU)  # by its own name: as in training
    assert "has changed" in capsys.readouterr().err and len(own.test.labels) == len(run.data.test.labels)
    args = Namespace(**vars(args) | dict(variant="smote", labels=30, val_share=0.5, train_size=60))
    np.savez(tmp_path / "other.npz", **{name: run.arrays[name] for name in run.arrays if name != "classes"})
    other = evaluate.load_test(run.model, args, run.content, str(tmp_path / "other.npz"), CPU)
    assert len(other.train.labels) == 90 and other.labelled is other.val is None
    assert other.classes == run.data.classes  # by their numbers


def test_sheets_have_each_picture_in_its_place(run, figures, tmp_path):
    """The first image of each class; draws of the prior, ten in a row."""
    args = Namespace(**vars(run.args) | {"noise": 0.1})
    evaluate.draw_reconstructions(run.model, run.data, args, tmp_path)
    images = run.data.test.images[[0, 10, 24]]
    seen = data.add_noise(data.normalise(images), 0.1, torch.Generator().manual_seed(0))
    rebuilt = data.to_pixels(run.model(seen)[1].detach())
    assert_sheet(figures["recon.png"], torch.cat([images / 255, data.to_pixels(seen), rebuilt]), 3)
    assert np.array_equal(Image.open(tmp_path / "recon/10_green.png"), images[1].permute(1, 2, 0))
    model = small("C(4)>N(3)")
    evaluate.draw_prior(model, data.Dataset("set", "", [*"abc"], None, noise(5)), settings(), tmp_path)
    codes = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    assert_sheet(figures["prior.png"], data.to_pixels(model.decoder(codes).detach()), 10)


def test_a_plane_of_longer_codes_keeps_their_principal_axes(figures, tmp_path):
    """Points on an ellipse in a plane of ten dimensions keep their distances."""
    torch.manual_seed(0)
    angle = torch.rand(300) * 2 * math.pi
    plane = torch.stack([5 * angle.cos(), 2 * angle.sin()], 1)
    basis = torch.linalg.qr(torch.randn(10, 10)).Q[:2]
    evaluate.draw_plane(plane @ basis + 3, torch.zeros(300), ["_one"], tmp_path / "a.png", "")
    axis, = figures["a.png"].axes
    drawn = torch.tensor(axis.lines[0].get_xydata())
    torch.testing.assert_close(F.pdist(drawn), F.pdist(plane.double()), rtol=1e-3, atol=1e-3)
    assert "(8" in axis.get_xlabel()  # 25 of 29 parts of the variance, 86 %, or near it
    assert axis.get_legend().get_texts()[0].get_text().strip() == "_one"  # matplotlib leaves out such labels


@pytest.mark.filterwarnings("error")
def test_the_confusion_picture_is_in_percent_of_each_true_class(tmp_path, monkeypatch):
    """A name that the font lacks is drawn as a number, without a warning; "$a$" as it is, no formula."""
    seen = []
    monkeypatch.setattr(evaluate, "save_figure", lambda *both: seen.append(both[0]) or SAVE_FIGURE(*both))
    names = ["$a$", "猫", "Öl"]
    evaluate.draw_confusion([[3, 1, 0], [0, 0, 0], [0, 2, 6]], names, tmp_path / "c.png", "水果: 1")
    axis = seen[0].axes[0]
    assert {text.get_position(): text.get_text() for text in axis.texts} == {
        (0, 0): "75.0", (1, 0): "25.0", (1, 2): "25.0", (2, 2): "75.0"}  # (predicted, true)
    labels = axis.get_yticklabels()
    assert [label.get_text() for label in labels] == ["$a$", "class 1", "Öl"] and axis.get_title() == "??: 1"
    dollars, _, oil = (label.get_window_extent().width for label in labels)
    assert dollars > 1.5 * oil  # as a formula, it is one letter


def test_of_a_folder_no_training_image_is_measured(run, figures, tmp_path, capsys):
    """Without test/, a fifth is, wherever the folder lies: it may be the training's, moved. Some pictures are
    of another size; classes by name, in another order; one is missing."""
    files = [f"{('deep red', 'GREEN', 'yellow')[label]}/{i:02}.png" for i, label in enumerate(run.arrays["y_test"])]
    for file, pixels in zip(files, run.arrays["x_test"]):
        (tmp_path / "mine" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.repeat(1 + (file > "a"), 0)).save(tmp_path / "mine" / file)
    command = "--ckpt", run.ckpt, "--dataset", tmp_path / "mine"
    assert "mine: has a class yellow; expected the checkpoint's: Deep red green blue" in refused(capsys, *command)
    shutil.rmtree(tmp_path / "mine/yellow")
    report = report_of(tmp_path / "out", *command)
    tested = [file for file in files[:24] if zlib.crc32(file.encode()) < 0.2 * 2**32]
    assert [row["images"] for row in report["per_class"].values()] == [1, len(tested) - 1, 0]
    assert report["per_class"]["blue"]["recall"] is None and report["accuracy"]["test"] > 90
    assert {row["image"] for row in read_csv(tmp_path / "out/predictions.csv")} == set(tested)


def test_a_checkpoint_before_its_classifier_is_measured_without_it():
    """Of separate training: the settings have all weights, `trained` has the decoder alone."""
    args, _ = train.parse("--version v3 --separate --epochs 2 --delta 1 --precision fp32".split())
    args.trained = ["decoder"]
    measured = evaluate.measure(models.build("v3"), data.shapes(10, 10).test, args)
    assert {"autoencoder", "jigsaw", "psnr"} <= set(measured) and not {"accuracy", "classifier"} & set(measured)


def test_pictures_are_prepared_as_the_test_images_are(tmp_path, figures, monkeypatch, capsys):
    """To the bit, of unequal sizes, from a folder and files; one that is damaged is left out."""
    draw = np.random.default_rng(0)
    for part, i in itertools.product(("train", "test"), range(4)):
        path = tmp_path / "set" / part / ("猫", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20 + 3 * i, 30, 3), np.uint8)).save(path)
    _, _, folder = train.run(dataset=tmp_path / "set", size=16, margin=True, blur=0.5, encoder="C(4)>L(8)",
                             batch_size=2, epochs=1, device="cpu", precision="fp32", output=tmp_path)
    assert evaluate.CHANCE in capsys.readouterr().out
    inputs, forward = [], models.Autoencoder.forward
    monkeypatch.setattr(models.Autoencoder, "forward",
                        lambda model, x, **which: inputs.append(x) or forward(model, x, **which))
    ckpt, test = folder / "last.pt", tmp_path / "set/test"
    report_of(tmp_path / "out", "--ckpt", ckpt)
    tested, count = inputs[0], len(inputs)
    (test / "dog/notes.txt").touch()
    (test / "dog/2.png").touch()
    results = report_of(tmp_path / "pictures", "--ckpt", ckpt, "--images", test / "dog", *sorted(test.glob("猫/*")))
    assert f"left out: {test / 'dog/2.png'}: cannot identify" in capsys.readouterr().out
    seen = torch.cat(inputs[count:])  # each is classified alone, then all are rebuilt
    assert tested.shape == (4, 3, 16, 16) and torch.equal(seen, torch.cat([tested, tested]))
    chances = models.load(ckpt)[0](tested)[0].softmax(1).tolist()
    assert [result["classes"] for result in results] == [
        {"dog": pytest.approx(dog, rel=1e-4), "猫": pytest.approx(cat, rel=1e-4)} for dog, cat in chances]
    names = figures["pictures.png"].axes[0].get_xticklabels()
    assert [name.get_text().split("\n")[0] for name in names] == ["1.png", "3.png", "0.png", "2.png"]


def test_knn_of_a_checkpoint(run, figures, tmp_path):
    """Of the training images whose labels are used."""
    found = report_of(tmp_path, "--ckpt", run.ckpt, "--knn", "3")["knn"]
    assert [found[name]["values"] for name in ("codes", "pixels")] == [16, 432] and found["codes"]["accuracy"] > 90
    few = replace(run.data, labelled=data.Split(run.data.train.images[:9], torch.zeros(9, dtype=torch.int64)))
    assert evaluate.report_knn(run.model, few, run.args, 3)["codes"]["accuracy"] == pytest.approx(100 / 3)


def write_run(folder, accuracy=None, psnr=20.0, images=10_000, network="C(8)", **changes):
    """The folder of a finished run of two epochs on ten classes, as small as evaluate.py reads it."""
    args = vars(settings("--epochs", "2")) | changes
    evaluate.write_json(folder / "config.json", {"settings": args, "network": {"encoder": network},
                                                 "images": {"train": 60, "test": 30}})
    row = {"test_accuracy": accuracy, "test_psnr": psnr}
    evaluate.write_csv(folder / "log.csv", [{"epoch": 1} | row, {"epoch": 2} | row])
    metrics = {"epochs": 2, "test_images": images, "parameters": 1234}
    metrics |= {"reconstruction": {"psnr": psnr}} if psnr else {}
    metrics |= {"accuracy": {"test": accuracy, "at_chance": accuracy < 17}} if accuracy else {}
    evaluate.write_json(folder / "metrics.json", metrics)


@pytest.fixture
def compared(figures, tmp_path):
    """compared(*flags): the rows of a comparison's table, dicts, by run."""
    def run(*flags):
        evaluate.main(["--compare", *map(str, flags), "--output", str(tmp_path / "out")])
        lines = (tmp_path / "out/comparison.md").read_text().splitlines()
        head, *rows = [line[2:-2].split(" | ") for line in lines if line[:2] == "| "]
        return {row[0]: dict(zip(head, row)) for row in rows}
    return run


def test_seeds_are_grouped_and_paired(compared, figures, tmp_path):
    """Accuracy 50, 52, 54 against 51, 54, 57: differences 1, 2, 3; t is 4.303 for two degrees of freedom."""
    for seed, (a, b) in enumerate(((50.0, 51.0), (52.0, 54.0), (54.0, 57.0))):
        write_run(tmp_path / f"runs/v3_seed{seed}", a, seed=seed)
        write_run(tmp_path / f"runs/v4_seed{seed}", b, seed=seed, version="v4", device="cuda")
    write_run(tmp_path / "runs/v4", 9.0, version="v4")  # of the same seed, the last name counts
    write_run(tmp_path / "runs/v5", 60.0, version="v5", epochs=9)  # it has been lengthened
    write_run(tmp_path / "runs/v6", 60.0, version="v6")
    (tmp_path / "runs/v6/metrics.json").unlink()  # it has not finished
    rows, half = compared(tmp_path / "runs"), 4.303 / math.sqrt(3)
    keys = ("run", "n", "accuracy (%)", "difference", "result")
    assert [[row[key] for key in keys] for row in rows.values()] == [
        ["v3", "3", "52.00 ± 2.00", "", ""], ["v4", "3", "54.00 ± 3.00", f"+2.00 ± {half:.2f}", "not shown"]]
    _, difference, epochs = figures["comparison.png"].axes
    points, _, (bars,) = difference.containers[0]
    assert points.get_xydata().tolist() == [[2, 1]]
    assert bars.get_segments()[0][:, 0] == pytest.approx([2 - half, 2 + half], abs=1e-3)
    assert [line.get_ydata().tolist() for line in epochs.lines] == [[52, 52], [54, 54]]


def test_against_a_setting_pairs_groups_that_differ_in_it_alone(compared, tmp_path, capsys):
    for (version, gain), seed in itertools.product((("v1", 1), ("v2", -1)), range(2)):
        own = dict(version=version, network=version, seed=seed)
        write_run(tmp_path / f"runs/{version}_seed{seed}", 50 + seed + gain * (1 + seed / 50), **own)
        write_run(tmp_path / f"runs/{version}_beta0_seed{seed}", 50 + seed, None, beta=0.0, **own)
    write_run(tmp_path / "runs/v1_beta0_blur1", 40.0, version="v1", beta=0.0, blur=1.0)  # it differs in two
    rows = compared(tmp_path / "runs", "--against", "beta=0")
    # Differences 1 and 1.02; t is 12.706 for one degree of freedom.
    assert {name: (row["difference"], row["result"]) for name, row in rows.items()} == {
        "v1": ("+1.01 ± 0.13", "better"), "v2": ("-1.01 ± 0.13", "worse"),
        **dict.fromkeys(["v1_beta0", "v2_beta0", "v1_beta0_blur1"], ("", ""))}
    assert "replaced" not in capsys.readouterr().out
    rows = compared(tmp_path / "runs", "--against", "version=v1")
    assert "out/comparison.md: the comparison that was there is replaced" in capsys.readouterr().out
    assert [rows[name]["difference"] for name in ("v2", "v2_beta0")] == ["-2.02 ± 0.25", "+0.00 ± 0.00"]
    for value in ("v5", "siz=0", "beta=7"):
        assert "SETTING=VALUE" in refused(capsys, "--compare", tmp_path / "runs", "--against", value)


def test_few_seeds_chance_and_other_networks_of_a_name(compared, tmp_path):
    """Seeds 1 and 2 are in both groups, with differences of 0 and 1. Another network or data is another group."""
    for seed in range(3):
        write_run(tmp_path / f"a/v3_seed{seed}", 50.0, images=100, seed=seed)
        write_run(tmp_path / f"a/v4_seed{seed + 1}", 50.0 + seed, images=100, seed=seed + 1, version="v4")
    write_run(tmp_path / "a/v5", 16.0, images=100, version="v5")
    write_run(tmp_path / "b/v3", 50.0, network="C(9)")
    write_run(tmp_path / "b/v3_run2", 50.0, data_dir="elsewhere")
    rows = compared(tmp_path / "a", tmp_path / "b")
    assert list(rows) == ["v3", "v4", "v5", "v3'", "v3''"] and rows["v5"]["result"] == "at chance"
    assert rows["v4"]["difference"] == "+0 ± 6 (2 pairs)" and rows["v4"]["n"] == "3"  # without decimals


def test_runs_without_a_classifier_are_compared_by_their_psnr(compared, figures, tmp_path):
    for seed, gain in enumerate((2.0, 2.2)):
        write_run(tmp_path / f"runs/cnn_seed{seed}", psnr=20.0 + seed, seed=seed)
        write_run(tmp_path / f"runs/cnn_lr0.5_seed{seed}", psnr=20.0 + seed + gain, seed=seed, lr=0.5)
        write_run(tmp_path / f"runs/both_seed{seed}", 9.0, psnr=20.0 + seed + gain, images=99, seed=seed, alpha=1)
    write_run(tmp_path / "runs/v3", 50.0, psnr=None, lr=0.1)  # a classifier alone
    rows = compared(tmp_path / "runs", "--against", "lr=0.01")
    assert [rows[name]["difference"] for name in ("cnn", "cnn_lr0.5", "v3")] == ["", "+2.10 ± 1.27", ""]
    assert figures["comparison.png"].axes[1].get_xlabel() == "→ dB of PSNR more than with lr=0.01"
    rows = compared(*sorted((tmp_path / "runs").glob("cnn_seed*")), *(tmp_path / "runs").glob("both*"))
    assert rows["both"]["difference"] == "+2.10 ± 1.27" and rows["both"]["result"] == "better"


@pytest.mark.parametrize("right, largest, chance", [(68.2, 15, True), (68.3, 15, False), (95.0, 30, False)])
def test_chance_by_hand(right, largest, chance, run, figures, tmp_path):
    """Of 30 images, half of a class: the standard error is sqrt(50 * 50 / 30) = 9.13; one class tells nothing."""
    labels, counts = run.data.test.labels, [[largest, 0, 0], [0, 30 - largest, 0], [0, 0, 0]]
    tested = {"accuracy": right, "confusion": counts, "predicted": labels, "probability": labels}
    found = evaluate.report_classes(run.data, run.args, tmp_path, tested, None)
    assert found["accuracy"]["at_chance"] is chance


def test_digits_and_intervals_by_hand():
    assert [evaluate.digits(n) for n in (1, 100, 101, 1000, 10_000)] == [0, 0, 1, 1, 2]
    # Intervals of means of 3 draws cover the truth in 95 % of 2,000 samples.
    samples = np.random.default_rng(0).normal(7, 2, (2000, 3))
    t = evaluate.mean_interval(samples[0])[1] / samples[0].std(ddof=1)  # over sqrt(3): it depends on n alone
    assert 0.935 < (abs(samples.mean(1) - 7) < t * samples.std(axis=1, ddof=1)).mean() < 0.965
