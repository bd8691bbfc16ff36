"""Measures against their formulas by hand, checkpoints, and the command itself."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import evaluate
import models
import train


class Fixed(nn.Module):
    """Logits and reconstructions that a test has chosen, in the order of the images."""

    def __init__(self, logits, rebuilt):
        super().__init__()
        self.encoder, self.classifier, self.decoder = [None], logits, rebuilt
        self.num_classes, self.version = logits.shape[1], models.Version("", in_shape=rebuilt.shape[1:])
        self.seen = 0

    def forward(self, images, classify, reconstruct):
        now = slice(self.seen, self.seen + len(images))
        self.seen += len(images)
        return self.classifier[now], self.decoder[now]


def test_measures_by_hand():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 1, 1])
    logits, rebuilt = torch.randn(5, 3), 2 * torch.randn(5, 3, 4, 6)
    result = evaluate.measure(Fixed(logits, rebuilt), data._split(images, labels), batch_size=2)

    pixels = images.double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (data.MEAN, data.STD))
    error = (rebuilt.double() * std + mean).clamp(0, 1) - pixels
    per_image = [(e ** 2).mean().item() for e in error]
    expected = {
        "mse": sum(per_image) / 5,
        "mae": error.abs().mean().item(),
        "psnr": sum(10 * math.log10(1 / e) for e in per_image) / 5,
        "absolute_error_total": error.abs().sum().item(),
        "absolute_error_per_image": error.abs().sum().item() / 5,
        "net_error_total": sum(abs(e.sum().item()) for e in error),
        "net_error_per_image": sum(abs(e.sum().item()) for e in error) / 5,
        "autoencoder": ((rebuilt - (pixels - mean) / std) ** 2).mean().item(),
        "classifier": -sum(row.log_softmax(0)[label].item() for row, label in zip(logits, labels)) / 5,
        "accuracy": 20 * sum(row.argmax().item() == label for row, label in zip(logits, labels.tolist()))}
    for key, value in expected.items():
        assert result[key] == pytest.approx(value, rel=1e-4), key
    confusion = np.zeros((3, 3), int)
    for row, label in zip(logits, labels):
        confusion[label, row.argmax()] += 1
    assert result["confusion"] == confusion.tolist()
    shares = evaluate.per_class(result["confusion"], ["a", "b", "c"])
    assert shares["b"] == pytest.approx(100 * confusion[1, 1] / 3)


def test_a_perfect_reconstruction_has_no_error():
    images = torch.randint(0, 256, (4, 1, 5, 5), dtype=torch.uint8)
    split = data._split(images, torch.zeros(4, dtype=torch.int64))
    result = evaluate.measure(Fixed(torch.zeros(4, 2), data.normalise(images)), split)
    assert result["absolute_error_total"] == 0 and result["psnr"] == 100  # the cap for mse 0


def test_measuring_is_the_same_in_every_batch_size_and_leaves_the_mode():
    split = data.shapes(train=8, test=30).test
    model = models.build("v4").train()
    a, b = (evaluate.measure(model, split, batch_size=size) for size in (7, 30))
    assert model.training
    assert a["confusion"] == b["confusion"]
    assert a["mse"] == pytest.approx(b["mse"], rel=1e-5)


# ---------------------------------------------------------------- the command

def test_the_checkpoint_alone_gives_the_figures_of_its_training(trained, capsys, monkeypatch, tmp_path):
    npz, folder = trained
    monkeypatch.chdir(tmp_path)  # from another folder than the training's
    assert evaluate.main(["--ckpt", str(folder / "last.pt"), "--device", "cpu"]) == 0
    report = json.loads((folder / "evaluation-last" / "report.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert report["accuracy"] == metrics["accuracy"]["last"]
    assert sum(map(sum, report["confusion"])) == 20  # --test-size, with the run's seed
    for key, value in metrics["reconstruction"].items():
        assert report[key] == pytest.approx(value, rel=1e-6)
    assert report["per_class"] == metrics["per_class_accuracy"]
    for name in ("confusion.png", "recon.png"):
        assert min(Image.open(folder / "evaluation-last" / name).size) > 200
    out = capsys.readouterr().out
    assert f"{metrics['accuracy']['last']:.2f} %" in out and "PSNR" in out
    assert list(tmp_path.iterdir()) == []  # nothing in the folder it was called from


def test_pictures_by_path(trained, capsys, tmp_path):
    npz, folder = trained
    with np.load(npz) as arrays:
        square = arrays["x_test"][2].transpose(1, 2, 0)
    Image.fromarray(square).save(tmp_path / "square.png")
    Image.new("L", (50, 40), 77).save(tmp_path / "grey.jpg")
    assert evaluate.main(["--ckpt", str(folder / "best.pt"), "--output", str(tmp_path / "out"), "--device",
                          "cpu", "--images", str(tmp_path / "square.png"), str(tmp_path / "grey.jpg")]) == 0
    report = json.loads((tmp_path / "out/images/report.json").read_text())
    model, _ = evaluate.load_checkpoint(folder / "best.pt")
    image = data.normalise(torch.from_numpy(square.copy()).permute(2, 0, 1)[None])
    precision = evaluate.pick_precision("auto", torch.device("cpu"))
    with torch.no_grad(), evaluate.autocast(torch.device("cpu"), precision):
        chances = model.eval()(image)[0][0].float().softmax(0)
    best = chances.argmax().item()
    name, chance = next(iter(report[0]["classes"].items()))
    assert name == data.SHAPES[best] and chance == pytest.approx(chances[best].item(), rel=1e-3)
    assert f"square.png: {name} {100 * chance:.1f}%" in capsys.readouterr().out
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/images/0_square.png")), square)
    assert Image.open(tmp_path / "out/images/1_grey_recon.png").size == (32, 32)


def test_runs_are_compared_in_a_table_and_a_picture(trained, tmp_path, capsys):
    npz, folder = trained
    assert train.main(["--version", "v3", "--dataset", npz, "--epochs", "3", "--separate", "--output",
                       str(tmp_path), "--device", "cpu"]) == 0
    other = tmp_path / "v3_dataset-tiny_epochs3_separate"
    capsys.readouterr()
    out = tmp_path / "out"
    assert evaluate.main(["--compare", str(folder), str(other), "--output", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    metrics = [json.loads((each / "metrics.json").read_text())["accuracy"] for each in (folder, other)]
    for line, name, result in zip(printed[2:], (folder.name, other.name), metrics):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == name and cells[2] == f"{result['last']:.2f}"
        assert cells[3] == f"{result['best']:.2f} (on test, epoch {result['best_epoch']})"
    assert (out / "comparison.md").read_text().splitlines() == printed[:4]
    assert min(Image.open(out / "comparison.png").size) > 400
    with pytest.raises(SystemExit):
        evaluate.main(["--compare", str(folder), str(tmp_path / "none")])
    assert "none: not the folder of a run" in capsys.readouterr().err


# ---------------------------------------------------------------- neighbours, anomalies, codes

@pytest.mark.parametrize("kind", ["codes", "pixels"])
def test_knn_is_a_brute_force_search_in_float64(kind):
    torch.manual_seed(0)
    points, queries = ((torch.randn(400, 10), torch.randn(90, 10)) if kind == "codes" else
                       (torch.randint(0, 4, (400, 6), dtype=torch.uint8), torch.randint(0, 4, (90, 6), dtype=torch.uint8)))
    labels, answers = torch.randint(0, 5, (400,)), torch.randint(0, 5, (90,))
    for k in (1, 4, 7):
        right = 0
        for query, answer in zip(queries.double().tolist(), answers.tolist()):
            distances = [sum((a - b) ** 2 for a, b in zip(query, point)) for point in points.double().tolist()]
            near = [labels[i].item() for i in sorted(range(400), key=lambda i: (distances[i], i))[:k]]
            most = max(map(near.count, near))
            right += next(label for label in near if near.count(label) == most) == answer
        found = evaluate.knn(points, labels, queries, answers, [k], 5, seed=0)
        assert found["accuracy"] == pytest.approx(100 * right / 90) and found["k"] == k


def test_the_best_k_is_chosen_on_held_out_training_images():
    """One class in a tight cluster among scattered ones of another: 1 is the wrong k, 15 the right."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 2
    points = torch.randn(400, 2) * 0.1 + labels[:, None]
    flipped = torch.rand(400) < 0.25  # a quarter of the labels is wrong: one neighbour is not enough
    noisy = torch.where(flipped, 1 - labels, labels)
    found = evaluate.knn(points, noisy, points[:50] + 0.01, labels[:50], [1, 15], 2, seed=0)
    assert found["k"] == 15 and found["accuracy"] == 100
    assert evaluate.knn(points, noisy, points[:50] + 0.01, labels[:50], [1], 2, seed=0)["accuracy"] < 90


def test_roc_auc_counts_the_pairs():
    torch.manual_seed(0)
    scores, others = torch.randint(0, 9, (30,)).double(), torch.randint(0, 7, (40,)).double()
    pairs = [(a > b) + 0.5 * (a == b) for a in scores.tolist() for b in others.tolist()]
    assert evaluate.roc_auc(scores, others) == pytest.approx(sum(pairs) / len(pairs))


def test_knn_and_codes_of_a_checkpoint(trained, tmp_path, capsys):
    npz, folder = trained
    out = tmp_path / "out"
    assert evaluate.main(["--ckpt", str(folder / "last.pt"), "--knn", "1,3", "--output", str(out), "--device",
                          "cpu"]) == 0
    found = json.loads((out / "report.json").read_text())["knn"]
    assert found["codes"]["values"] == 64 * 2 * 2 and found["pixels"]["values"] == 3072
    printed = capsys.readouterr().out
    for name in ("codes", "pixels"):
        assert f"kNN on {name}" in printed and f"{found[name]['accuracy']:.2f} %" in printed
    assert min(Image.open(out / "codes.png").size) > 400


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


def test_an_anomaly_is_a_class_that_was_left_out(tiny, tmp_path, capsys):
    names = ",".join(data.SHAPES[:-1])
    assert train.main(["--version", "cnn10", "--dataset", tiny, "--classes", names, "--epochs", "1", "--output",
                       str(tmp_path), "--device", "cpu"]) == 0
    folder, = tmp_path.glob("cnn10*")
    ckpt = str(folder / "best.pt")
    assert evaluate.main(["--ckpt", ckpt, "--anomaly", "bars", "--device", "cpu"]) == 0
    result = json.loads((folder / "evaluation-best/anomaly-bars/report.json").read_text())
    model, content = evaluate.load_checkpoint(ckpt)
    whole = data.load(tiny).test
    errors = evaluate.image_errors(model.eval(), whole, content["settings"])
    assert result["mse"] == pytest.approx(errors[whole.labels == 9].mean().item(), rel=1e-3)
    assert result["auc"] == pytest.approx(evaluate.roc_auc(errors[whole.labels == 9], errors[whole.labels != 9]))
    assert min(Image.open(folder / "evaluation-best/anomaly-bars/anomaly.png").size) > 400
    with pytest.raises(SystemExit):
        evaluate.main(["--ckpt", ckpt, "--anomaly", "ring"])
    assert "trained with that class" in capsys.readouterr().err


# ---------------------------------------------------------------- files

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
