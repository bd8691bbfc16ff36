"""Everything that reads a checkpoint: measures it, pictures it, classifies pictures with it.

    python evaluate.py --ckpt outputs/v4/best.pt
    python evaluate.py --ckpt outputs/v4/best.pt --images cat.png boat.jpg
    python evaluate.py --compare outputs/v4 outputs/v4_beta0

The checkpoint knows its network, its data set and its settings. train.py measures after each
epoch with `measure` and draws its pictures with the functions of this file.
"""
import argparse
import contextlib
import csv
import ctypes
import json
import math
import os
import re
import sys
import time
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from torchvision.utils import save_image

import data
import losses
import models

matplotlib.use("Agg")  # draws to files, needs no screen
import matplotlib.pyplot as plt  # noqa: E402

CHECKPOINT = "autoencoder checkpoint, format 1"
# What of train.py's settings an evaluation needs.
SETTINGS = ("version", "dataset", "data_dir", "size", "margin", "scale", "classes", "train_size",
            "test_size", "val_share", "variant", "constrain", "blur", "noise", "clean_test", "alpha", "beta",
            "delta", "jigsaw_grid", "seed", "precision")


class UsageError(ValueError):
    """Something that the user can put right; one line."""


class Stopped(RuntimeError):
    """A run that cannot go on: a loss that is not finite, a disk that is full; one line."""


USER_ERRORS = UsageError, models.NotationError, data.DataError


# ---------------------------------------------------------------- device and precision

def pick_device(name):
    """The device of that name; "auto" is CUDA where there is a GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {name}: not on this machine; expected auto, cpu or, with a GPU, "
                         "cuda") from None
    return device


def keep_freed_memory():
    """Lets glibc keep what is freed. By itself it hands blocks of some MB back to the system and
    gets them anew, page by page, at every step: v1 trained at two thirds of its speed so."""
    with contextlib.suppress(AttributeError, TypeError, OSError):  # not glibc: nothing to do
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at its highest
        mallopt(-1, 2**30)       # M_TRIM_THRESHOLD


def pick_precision(name, device):
    """"bf16" or "fp32"; "auto" is bf16 where the device computes it in hardware."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
        flags = Path("/proc/cpuinfo").read_text()
        return "bf16" if re.search(r"\b(amx_bf16|avx512_bf16)\b", flags) else "fp32"
    return "fp32"


def autocast(device, precision):
    """The context in which a network runs forward."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


# ---------------------------------------------------------------- checkpoints

def write_whole(path, write):
    """Calls write(temporary path) beside `path` and moves the result into place, so that a
    file is either the old one or the new one, never a part. Raises Stopped."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the second one
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        raise Stopped(f"{path} cannot be written: {reason}") from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path, content):
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))


def save_checkpoint(path, model, settings, classes, **more):
    """Weights, notation and settings, and `more`: tensors and plain values only."""
    content = {"kind": CHECKPOINT, "version": asdict(model.version), "classes": classes,
               "settings": settings, "model": model.state_dict(), **more}
    write_whole(path, lambda part: torch.save(content, part))


def load_checkpoint(path):
    """(model, the checkpoint's dict), on the CPU. Runs no code from the file. UsageError."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected a checkpoint such as outputs/v4/best.pt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one line is enough about a file that is none
            with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} is damaged")
            content = torch.load(path, map_location="cpu", weights_only=True)
        if content["kind"] != CHECKPOINT:
            raise ValueError(f"its kind is {content['kind']!r}")
        settings = content["settings"]
        content["settings"] = {key: settings[key] for key in SETTINGS}
        model = models.build(models.Version(**content["version"]), num_classes=len(content["classes"]),
                             pretrained=False)  # the weights are in the file
        model.load_state_dict(content["model"])
    except Exception as error:  # a stranger's file fails in any way that it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path}: not a checkpoint of train.py ({reason[:100]})") from None
    return model.to(memory_format=torch.channels_last), content


def load_data(settings, device="cpu", test_only=False):
    """The Dataset that settings (a dict of train.py's) name, with all that they make of it, on the
    device. test_only: of the test part alone; the training part may be empty."""
    s = settings | ({"train_size": None, "val_share": 0, "variant": "complete"} if test_only else {})
    dataset = data.load(s["dataset"], s["data_dir"], s["size"], test_only)

    def apply(flag, change, *arguments):
        try:
            return change(*arguments)
        except data.DataError as error:
            raise UsageError(f"--{flag}: {error}") from None
    if s["classes"]:
        dataset = apply("classes", data.choose, dataset, s["classes"])
    for part in ("train", "test"):
        if s[f"{part}_size"]:
            split = getattr(dataset, part)
            setattr(dataset, part, apply(f"{part}-size", data.take, split, s[f"{part}_size"], s["seed"]))
    if s["val_share"]:
        dataset.train, dataset.val = apply("val-share", data.hold_out, dataset.train, s["val_share"], s["seed"])
    dataset.train, dataset.synthetic = apply(f"variant {s['variant']}", data.vary, dataset.train,
                                             dataset.classes, s["variant"], s["constrain"], s["seed"])
    for part in ("train", "val", "test"):
        split = getattr(dataset, part)
        if split is not None:
            if s["blur"] and len(split.labels):
                split = data.blur(split, s["blur"])
            setattr(dataset, part, data.Split(*(tensor.to(device) for tensor in split)))
    return dataset


# ---------------------------------------------------------------- measuring

def view(settings):
    """How settings (a dict of train.py's) have a picture brought to the network: arguments for
    data.batches and data.normalise."""
    return {key: settings[key] for key in ("size", "margin", "scale")}


def noise_in_tests(settings):
    """The noise on test images."""
    return 0.0 if settings["clean_test"] else settings["noise"]


def mine():
    """(rank, processes): this process and how many train together (torchrun); else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def measure(model, split, precision="fp32", classify=True, reconstruct=True, batch_size=100, noise=0.0,
            grid=None, scale="imagenet", **how):
    """A model's losses and errors on a Split, as plain numbers in a dict.

    classifier, autoencoder: the two losses (None where not asked for or not there).
    accuracy: percent. confusion: counts, [true class][predicted class].
    On pixels of 0-1, the reconstruction clamped to them as in a saved picture: mse, mae (per
    value), psnr (dB, mean over the images), absolute_error_total (over all values of the
    whole split) and absolute_error_per_image; net_error_total and net_error_per_image are
    |sum(x - reconstruction)| of each image, in which errors of opposite sign cancel: what the
    FashionMNIST study calls its mean absolute error. kl: a variational code's divergence.
    noise: the network sees noisy images (the same at every call), the errors are against the
    clean ones. grid: also the jigsaw loss of images in grid x grid tiles. how: as `view` gives it.
    """
    training = model.training
    model.eval()
    device, n, (rank, processes) = split.labels.device, len(split.labels), mine()
    classify = classify and model.classifier is not None
    reconstruct = reconstruct and model.decoder is not None
    gaussian, width = models.gaussian(model), model.num_classes + (model.version.scores is not None)
    sums = torch.zeros(8, device=device, dtype=torch.float64)
    confusion = torch.zeros(model.num_classes * width, device=device, dtype=torch.int64)
    generator, orders = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)
    own = data.Split(*(tensor[rank::processes] for tensor in split)) if processes > 1 else split
    for images, labels in data.batches(own, batch_size, scale=scale, **how):
        inputs = data.add_noise(images, noise, generator, scale) if noise else images
        with autocast(device, precision):
            logits, rebuilt = model(inputs, classify=classify, reconstruct=reconstruct)
        if classify:
            sums[0] += len(labels) * losses.classifier_loss(logits, labels)
            cells = labels * width + logits.argmax(1).clamp(max=width - 1)  # the last: no class
            confusion += torch.bincount(cells, minlength=len(confusion))
        if reconstruct:
            sums[1] += len(labels) * losses.autoencoder_loss(rebuilt, images)
            error = (data.to_pixels(rebuilt, scale) - data.to_pixels(images, scale)).flatten(1)
            mse = error.square().mean(1)
            sums[2] += mse.sum()
            sums[3] += error.abs().sum()
            sums[4] += -10 * mse.clamp(min=1e-10).log10().sum()
            sums[6] += error.sum(1).abs().sum()
        if gaussian:
            sums[7] += len(labels) * losses.kl_loss(gaussian.mean, gaussian.log_variance, images[0].numel())
        if grid:
            order = torch.rand(len(labels), grid * grid, generator=orders).argsort(1).to(device)
            with autocast(device, precision):
                _, mended = model(losses.jumble(inputs, grid, order), classify=False)
            sums[5] += len(labels) * losses.jigsaw_recon_loss(mended, images)
    model.train(training)
    if processes > 1:
        dist.all_reduce(sums)
        dist.all_reduce(confusion)
    cross_entropy, autoencoder, mse, absolute, psnr, jigsaw, net, kl = (sums / n).tolist()
    result = dict.fromkeys(["classifier", "accuracy", "confusion", "autoencoder", "mse", "mae", "psnr",
                            "absolute_error_total", "absolute_error_per_image", "net_error_total",
                            "net_error_per_image", "jigsaw", "kl"])
    if classify:
        confusion = confusion.view(model.num_classes, width)
        result.update(classifier=cross_entropy, confusion=confusion.tolist(),
                      accuracy=100 * confusion.trace().item() / n)
    if reconstruct:
        values = math.prod(model.version.in_shape)
        result.update(autoencoder=autoencoder, mse=mse, mae=absolute / values, psnr=psnr,
                      absolute_error_total=sums[3].item(), absolute_error_per_image=absolute,
                      net_error_total=sums[6].item(), net_error_per_image=net)
    if gaussian:
        result["kl"] = kl
    if grid:
        result["jigsaw"] = jigsaw
    return result


@torch.no_grad()
def encode(model, split, settings, batch_size=100):
    """The codes of a Split's images, flat: (N, values) float32, on its device."""
    model.eval()
    codes = []
    for images, _ in data.batches(split, batch_size, **view(settings)):
        with autocast(images.device, settings["precision"]):
            codes.append(model.encoder(images).flatten(1).float())
    return torch.cat(codes)


def vote(labels, classes):
    """The class that most of the neighbours have, of equal ones the nearest's: labels (Q, k),
    nearest first -> (Q,)."""
    votes = torch.zeros(len(labels), classes, device=labels.device)
    votes.scatter_add_(1, labels, torch.ones_like(labels, dtype=votes.dtype))
    leads = votes.gather(1, labels) == votes.amax(1, keepdim=True)
    rank = torch.arange(labels.shape[1], 0, -1, device=labels.device)
    return labels.gather(1, (leads * rank).argmax(1, keepdim=True)).squeeze(1)


def knn(points, labels, queries, answers, ks, classes, seed):
    """Accuracy of the k nearest neighbours, and its seconds: {"k", "accuracy", "seconds"}.

    points (N, D) and queries (Q, D) with their labels (N,) and answers (Q,). Of several ks the best
    on a tenth of the points, held out by the seed, is taken.
    """
    k = ks[0]
    if len(ks) > 1:
        rest, held = data.hold_out(data.Split(points, labels), 0.1, seed)
        near = rest.labels[data.nearest(held.images, rest.images, max(ks))]
        right = [(vote(near[:, :k], classes) == held.labels).sum().item() for k in ks]
        k = ks[right.index(max(right))]
    start = time.perf_counter()
    near = labels[data.nearest(queries, points, k)]
    right = (vote(near, classes) == answers).sum().item()
    return {"k": k, "accuracy": 100 * right / len(answers), "seconds": time.perf_counter() - start}


@torch.no_grad()
def image_errors(model, split, settings, batch_size=100):
    """The mean squared error of each image's reconstruction, on pixels of 0-1: (N,)."""
    scale, errors = settings["scale"], []
    for images, _ in data.batches(split, batch_size, **view(settings)):
        error = rebuild(model, images, settings) - data.to_pixels(images, scale)
        errors.append(error.square().flatten(1).mean(1))
    return torch.cat(errors)


def roc_auc(scores, others):
    """The probability that one of `scores` is above one of `others` (both 1-d), ties counted half."""
    others = others.sort().values
    below = torch.searchsorted(others, scores) + torch.searchsorted(others, scores, right=True)
    return below.double().mean().item() / (2 * len(others))


def per_class(confusion, classes):
    """Accuracy in percent by class name, from counts [true][predicted]; None without images."""
    return {name: 100 * row[i] / sum(row) if sum(row) else None
            for i, (name, row) in enumerate(zip(classes, confusion))}


# ---------------------------------------------------------------- pictures

def save_figure(figure, path):
    write_whole(path, lambda part: figure.savefig(part, dpi=150, bbox_inches="tight", format="png"))
    plt.close(figure)


def _save_picture(pixels, path):
    write_whole(path, lambda part: save_image(pixels, part, format="png"))


def _file_name(text):
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-") or "_"


def draw_sheet(rows, names, path, title, beside=()):
    """Pictures in columns, a name above each; rows: tensors (N, C, H, W) of 0-1, one below the
    other, in bands of ten columns. beside: a name for each row of the first band."""
    columns = min(10, len(names))
    bands = math.ceil(len(names) / columns)
    height = 1.1 * len(rows) * bands + 0.5
    figure, axes = plt.subplots(len(rows) * bands, columns, squeeze=False, figsize=(max(columns, 4), height))
    for axis in axes.flat:
        axis.axis("off")
    for i, name in enumerate(names):
        band, column = len(rows) * (i // columns), i % columns
        axes[band, column].set_title(name, fontsize=8, pad=3)
        for row, pictures in enumerate(rows):
            shown = pictures[i].permute(1, 2, 0).expand(-1, -1, 3).cpu().numpy()
            axes[band + row, column].imshow(shown, interpolation="nearest")
    for axis, name in zip(axes[:, 0], beside):
        axis.text(-0.08, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=1 - 0.66 / height, wspace=0.06,
                           hspace=0.06 if bands == 1 else 0.25)  # room for the names
    save_figure(figure, path)


@torch.no_grad()
def rebuild(model, inputs, settings):
    """The pixels (B, C, H, W) of 0-1 that the model makes of normalised images."""
    model.eval()
    with autocast(inputs.device, settings["precision"]):
        _, rebuilt = model(inputs, classify=False)
    return data.to_pixels(rebuilt, settings["scale"])


def first_of_each(dataset):
    """(rows, class names) of the first test image of each class that has one."""
    labels = dataset.test.labels.tolist()
    rows = [labels.index(label) for label in range(len(dataset.classes)) if label in labels]
    return rows, [dataset.classes[labels[row]] for row in rows]


def draw_reconstructions(model, dataset, settings, folder, note=""):
    """recon.png: the first test image of each class above its reconstruction (between them with
    its noise, where the settings have any); recon/ with each pair as files <index>_<class>.png and
    <index>_<class>_recon.png; and jigsaw.png where the jigsaw loss was trained."""
    chosen, names = first_of_each(dataset)
    raw, device = dataset.test.images[chosen], dataset.test.images.device
    scale, noise = settings["scale"], noise_in_tests(settings)
    images, generator = data.normalise(raw, **view(settings)), torch.Generator(device).manual_seed(0)
    inputs = data.add_noise(images, noise, generator, scale) if noise else images
    rows = [data.to_pixels(images, scale), rebuild(model, inputs, settings)]
    order = "originals above, reconstructions below"
    if noise:
        rows.insert(1, data.to_pixels(inputs, scale))
        order = "originals, with noise, reconstructions"
    draw_sheet(rows, names, folder / "recon.png", f"{dataset.name}, test images: {order}{note}")

    (folder / "recon").mkdir(exist_ok=True)
    for index, name, original, picture in zip(chosen, names, rows[0], rows[-1]):
        stem = f"{index}_{_file_name(name)}"
        _save_picture(original, folder / "recon" / f"{stem}.png")
        _save_picture(picture, folder / "recon" / f"{stem}_recon.png")

    if settings["delta"]:
        grid = settings["jigsaw_grid"]
        tiles = torch.rand(len(chosen), grid * grid, generator=torch.Generator().manual_seed(0)).argsort(1)
        jumbled = losses.jumble(inputs, grid, tiles.to(device))
        draw_sheet([rows[0], data.to_pixels(jumbled, scale), rebuild(model, jumbled, settings)], names,
                   folder / "jigsaw.png", f"{dataset.name}, test images: originals, jumbled, reconstructed")


def draw_synthetic(dataset, folder):
    """smote.png: of each class that SMOTE filled up, a column of synthetic pictures."""
    images, labels = (tensor[-dataset.synthetic:].cpu() for tensor in dataset.train)
    columns = [images[labels == label][:6] / 255 for label in range(len(dataset.classes)) if label in labels]
    names = [name for label, name in enumerate(dataset.classes) if label in labels]
    rows = [torch.stack(row) for row in zip(*columns)]
    draw_sheet(rows, names, folder / "smote.png", f"{dataset.name}: synthetic training images")


def draw_variational(model, dataset, settings, folder):
    """prior.png: pictures decoded from draws of the prior; walk.png: between the codes of two test
    images, in even steps."""
    device = dataset.test.images.device
    gaussian, generator = models.gaussian(model), torch.Generator().manual_seed(0)
    units = gaussian.linear.out_features // 2

    @torch.no_grad()
    def decode(codes):
        with autocast(device, settings["precision"]):
            return data.to_pixels(model.eval().decoder(codes.to(device)), settings["scale"])
    rows = [decode(torch.randn(10, units, generator=generator)) for _ in range(6)]
    draw_sheet(rows, [""] * 10, folder / "prior.png", "pictures decoded from draws of the prior")
    chosen = _drawn_rows(dataset.test, 12)
    codes = encode(model, data.Split(*(tensor[chosen] for tensor in dataset.test)), settings).cpu()
    steps = torch.linspace(0, 1, 10)[:, None]
    rows = [decode(one.lerp(two, steps)) for one, two in codes.view(6, 2, units)]
    draw_sheet(rows, [f"{step:.2f}" for step in steps.flatten().tolist()], folder / "walk.png",
               f"{dataset.name}: from one test image's code to another's")


def _drawn_rows(split, count):
    """Rows of that many images of a Split, always the same."""
    return torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(0))[:count]


def draw_plane(codes, labels, classes, path, title):
    """Codes (N, D) as points in the plane, by class: as they are where D is 2, else on their first
    two principal components."""
    x, axes = codes.double().cpu(), ("first value of the code", "second value of the code")
    if x.shape[1] != 2:
        x = x - x.mean(0)
        values, vectors = torch.linalg.eigh(x @ x.T)  # of N x N: codes may be longer than many
        total = values.clamp(min=0).sum().item() or 1.0
        x = vectors[:, -2:].flip(1) * values[-2:].flip(0).clamp(min=0).sqrt()
        axes = [f"{which} principal component ({100 * value / total:.0f} % of the variance)"
                for which, value in zip(("first", "second"), values[-2:].flip(0).tolist())]
    figure, axis = plt.subplots(figsize=(7, 6))
    labels = labels.cpu()
    for label, name in enumerate(classes[:20]):
        own = x[labels == label]
        axis.plot(own[:, 0], own[:, 1], "os^Dv<>p*hXP+x1234|_"[label], markersize=3, linestyle="", alpha=0.6,
                  label=name, color=plt.cm.tab10.colors[label % 10])
    axis.set(title=title, xlabel=axes[0], ylabel=axes[1])
    axis.legend(fontsize=8, markerscale=2, bbox_to_anchor=(1.01, 1), loc="upper left")
    save_figure(figure, path)


def draw_confusion(confusion, classes, path, title):
    """Counts [true][predicted] as a picture, in percent of each true class."""
    counts = np.asarray(confusion, dtype=float)
    share = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    few = len(classes) <= 20
    side = 1.6 + 0.5 * len(classes) if few else 9
    figure, axis = plt.subplots(figsize=(side + 1, side))
    picture = axis.imshow(share, cmap="Greys", vmin=0, vmax=100)
    if few:
        predicted = [*classes, "no class"][:counts.shape[1]]  # scores that belong to none
        axis.set_xticks(range(len(predicted)), predicted, rotation=45, ha="right")
        axis.set_yticks(range(len(classes)), classes)
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.05:
                axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7,
                          color="white" if value > 55 else "black")
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.colorbar(picture, label="% of the true class", fraction=0.046)
    save_figure(figure, path)


# ---------------------------------------------------------------- runs, by their logs

def chosen_on(rows):
    """"val" or "test": which images choose the best epoch."""
    return "test" if rows[0]["val_accuracy"] is None and rows[0]["val_mse"] is None else "val"


def best_row(rows):
    """The first row of a log with the highest accuracy or, where no classifier was trained, the
    least MSE: on the held-out images where there are any, else on the test images."""
    part = chosen_on(rows)
    classified = [row for row in rows if row[f"{part}_accuracy"] is not None]
    if classified:
        return max(classified, key=lambda row: row[f"{part}_accuracy"])
    return min(rows, key=lambda row: row[f"{part}_mse"])


def draw_curves(rows, path, title):
    """Train and test losses and accuracy over the epochs, one panel for each that there is."""
    panels = [("classifier loss", "classifier", "cross entropy (nats)"),
              ("autoencoder loss", "autoencoder", "MSE (normalised pixels)"),
              ("jigsaw loss", "jigsaw", "MSE (normalised pixels)"),
              ("accuracy", "accuracy", "accuracy (%)")]
    panels = [panel for panel in panels if any(row[f"test_{panel[1]}"] is not None for row in rows)]
    epochs = [row["epoch"] for row in rows]
    alone = sum(row["test_accuracy"] is None for row in rows)  # separate training's first half
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    for axis, (name, key, unit) in zip(axes[0], panels):
        for part, style, colour in (("train", "-", "C0"), ("test", "--", "C1")):
            values = [row[f"{part}_{key}"] for row in rows]
            axis.plot(epochs, values, style, color=colour, label=part,
                      marker="o" if len(rows) - alone == 1 else None)
        if key == "accuracy":
            best = best_row(rows)
            axis.plot(best["epoch"], best["test_accuracy"], "k^", markersize=6,
                      label=f"best (on {chosen_on(rows)}): {best['test_accuracy']:.2f} %")
        if 0 < alone < len(rows):
            axis.axvline(alone + 0.5, color="0.5", linestyle=":", label="classifier from here")
            axis.set_xlim(0.5, len(rows) + 0.5)
        axis.set(title=name, xlabel="epoch", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path)


def read_run(folder):
    """(log rows, metrics) of a run folder, as train.py left them. UsageError."""
    try:
        with open(Path(folder, "log.csv"), newline="") as file:
            rows = [{key: float(value) if value else None for key, value in row.items()}
                    for row in csv.DictReader(file)]
        best_row(rows)["train_classifier"]
        return rows, json.loads(Path(folder, "metrics.json").read_text())
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise UsageError(f"{folder}: not the folder of a run that has ended; expected log.csv and "
                         f"metrics.json ({getattr(error, 'strerror', None) or 'unreadable'})") from None


def compare(folders, output):
    """Prints a markdown table of runs and draws their classifier losses, train and test, in one
    picture; both go into the folder `output` too."""
    runs = {Path(folder).resolve().name: read_run(folder) for folder in folders}
    lines = ["| run | epochs | accuracy, last | best | classifier loss, train | test | PSNR | parameters "
             "| s per epoch |", "|---|---|---|---|---|---|---|---|---|"]
    for name, (rows, metrics) in runs.items():
        last, best = rows[-1], best_row(rows)

        def text(value, digits=2, unit=""):
            return "–" if value is None else f"{value:.{digits}f}{unit}"
        chosen = f" (on {chosen_on(rows)}, epoch {best['epoch']:.0f})" if best["test_accuracy"] else ""
        lines.append(f"| {name} | {len(rows)} | {text(last['test_accuracy'])} "
                     f"| {text(best['test_accuracy'])}{chosen} "
                     f"| {text(last['train_classifier'], 4)} | {text(last['test_classifier'], 4)} "
                     f"| {text(last['test_psnr'], 1, ' dB')} | {metrics['parameters']:,} "
                     f"| {metrics['seconds_per_epoch']:.1f} |")
    print("\n".join(lines))
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for i, (name, (rows, _)) in enumerate(runs.items()):
        epochs = [row["epoch"] for row in rows]
        for part, style in (("train", "-"), ("test", "--")):
            axis.plot(epochs, [row[f"{part}_classifier"] for row in rows], style, color=f"C{i}",
                      marker="osv^Dx+*"[i % 8], markevery=max(1, len(rows) // 8), markersize=4,
                      label=f"{name}, {part}")
    axis.set(title="classifier loss", xlabel="epoch", ylabel="cross entropy (nats)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    output.mkdir(parents=True, exist_ok=True)
    save_figure(figure, output / "comparison.png")
    write_whole(output / "comparison.md", lambda part: part.write_text("\n".join(lines) + "\n"))


def draw_sweep(folders, output, title):
    """Prints a markdown table of runs of autoencoders; draws their errors against code size, depth or
    kind, whichever differs (sweep.png), and what each makes of the same test images (sheet.png), into `output`."""
    lines = ["| version | code | layers | parameters | MB | s per epoch | MSE | PSNR |",
             "|---|---|---|---|---|---|---|---|"]
    points, rows = [], []
    for folder in folders:
        (_, metrics), (model, content) = read_run(folder), load_checkpoint(folder / "last.pt")
        settings, errors = content["settings"], metrics["reconstruction"]
        depth = sum(bool(list(layer.parameters(recurse=False))) for layer in model.encoder.modules())
        points.append((settings["version"], math.prod(model.code_shape), depth, errors["mse"]))
        lines.append("| {} | {} | {} + {} | {:,} | {:.1f} | {:.1f} | {:.6f} | {:.2f} dB |".format(
            *points[-1][:3], depth, metrics["parameters"], metrics["megabytes"], metrics["seconds_per_epoch"],
            errors["mse"], errors["psnr"]))
        if not rows:
            dataset = load_data(settings, test_only=True)
            chosen, names = (each[:10] for each in first_of_each(dataset))
            images = data.normalise(dataset.test.images[chosen], **view(settings))
        rows.append(rebuild(model, images, settings))
    print("\n".join(lines))
    write_whole(output / "sweep.md", lambda part: part.write_text("\n".join(lines) + "\n"))
    draw_sheet([*rows, data.to_pixels(images, settings["scale"])], names, output / "sheet.png",
               f"{title} on {dataset.name}: test images, their originals below",
               [*(point[0] for point in points), "original"])
    names, codes, depths, errors = zip(*points)
    figure, axis = plt.subplots(figsize=(5.5, 3.8))
    if len(set(codes)) > 1:
        axis.plot(codes, errors, "ko-", markersize=5)
        axis.set(xlabel="values of the code", xscale="log", xticks=codes, xticklabels=codes)
        axis.minorticks_off()
    elif len(set(depths)) > 1:
        axis.plot(depths, errors, "ko-", markersize=5)
        axis.set(xlabel="layers in the encoder, and in the decoder", xticks=depths)
    else:
        axis.bar(names, errors, color="0.6")
        axis.set(xlabel="kind")
    axis.set(title=f"{title} on {dataset.name}", ylabel="MSE of the test images (pixels of 0-1)", ylim=(0, None))
    axis.grid(axis="y", alpha=0.3)
    save_figure(figure, output / "sweep.png")


# ---------------------------------------------------------------- python evaluate.py

def rebuilds(settings):
    """Whether a run of these settings trains its decoder."""
    return settings["beta"] > 0 or settings["delta"] > 0


def classify_pictures(model, content, paths, device, folder):
    """Prints each picture's most likely classes and saves it as the network saw it, with its
    reconstruction. Returns a list of plain dicts, one for each picture."""
    settings, (channels, height, width) = content["settings"], model.version.in_shape
    arrays = [data.read_image(path, channels, fit=(height, width)) for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for i, (path, array) in enumerate(zip(paths, arrays)):
        image = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].to(device)
        image = data.normalise(image, scale=settings["scale"])
        result = {"image": str(path)}
        if settings["alpha"]:
            with torch.no_grad(), autocast(device, settings["precision"]):
                logits, _ = model(image, reconstruct=False)
            chances = logits[0].float().softmax(0)[:model.num_classes]
            best = chances.argsort(descending=True)[:3].tolist()
            result["classes"] = {content["classes"][k]: chances[k].item() for k in best}
            print(f"{path}: " + ", ".join(f"{name} {100 * chance:.1f}%"
                                          for name, chance in result["classes"].items()))
        if rebuilds(settings):
            stem = folder / f"{i}_{_file_name(Path(path).stem)}"
            _save_picture(data.to_pixels(image, settings["scale"])[0], Path(f"{stem}.png"))
            _save_picture(rebuild(model, image, settings)[0], Path(f"{stem}_recon.png"))
            result["reconstruction"] = f"{stem}_recon.png"
            print(f"{path}: reconstruction in {stem}_recon.png")
        results.append(result)
    return results


def report(model, content, settings, device, folder, ks):
    """Measures the checkpoint on the test images, draws, prints. ks: for kNN, or None. Returns plain
    values."""
    dataset = load_data(settings, device, test_only=not ks)
    if len(dataset.classes) != len(content["classes"]):
        raise UsageError(f"--dataset {settings['dataset']}: has {len(dataset.classes)} classes, the "
                         f"checkpoint {len(content['classes'])}")
    if ks and max(ks) > len(dataset.train.labels) * (1 if len(ks) == 1 else 0.9):
        raise UsageError(f"--knn {max(ks)}: more than the training images ({len(dataset.train.labels):,})")
    channels, height, width = model.version.in_shape
    shape = dataset.test.images.shape[1:]
    if settings["size"] is None and shape[1:] != (height, width):
        settings["size"] = height
    if shape[0] != channels or (settings["size"] and height != width):
        raise UsageError(f"--dataset {settings['dataset']}: has images of {'x'.join(map(str, shape))}, "
                         f"the checkpoint takes {channels}x{height}x{width}")
    result = measure(model, dataset.test, settings["precision"], settings["alpha"] > 0, rebuilds(settings),
                     noise=noise_in_tests(settings), **view(settings))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{settings['version']} after epoch {content['epoch']}, on {len(dataset.test.labels):,} test "
          f"images of {dataset.name} ({dataset.source})")
    if result["accuracy"] is not None:
        print(f"accuracy                  {result['accuracy']:>10.2f} %")
        result["per_class"] = per_class(result["confusion"], dataset.classes)
        for name, value in result["per_class"].items():
            print(f"  {name:<24}{value:>10.2f} %" if value is not None else f"  {name:<24}         -")
        draw_confusion(result["confusion"], dataset.classes, folder / "confusion.png",
                       f"{settings['version']} on {dataset.name}: accuracy {result['accuracy']:.2f} %")
    if result["mse"] is not None:
        print(f"reconstruction, on pixels of 0-1\n"
              f"  MSE                     {result['mse']:>10.6f}\n"
              f"  MAE                     {result['mae']:>10.5f}\n"
              f"  PSNR                    {result['psnr']:>10.2f} dB\n"
              f"  absolute error per image{result['absolute_error_per_image']:>10.2f}\n"
              f"  absolute error in total {result['absolute_error_total']:>10.0f}\n"
              f"  |sum of errors| per image{result['net_error_per_image']:>9.2f}\n"
              f"  MSE as trained, {settings['scale']:<9}{result['autoencoder']:>9.5f}")
        draw_reconstructions(model, dataset, settings, folder)
    elif model.decoder is not None:
        print("reconstruction: none, the decoder was not trained (beta 0)")
    if models.gaussian(model) and rebuilds(settings):
        draw_variational(model, dataset, settings, folder)
    some = _drawn_rows(dataset.test, 2000)
    some = data.Split(*(tensor[some] for tensor in dataset.test))
    draw_plane(encode(model, some, settings), some.labels, dataset.classes, folder / "codes.png",
               f"{settings['version']} on {dataset.name}: codes of {len(some.labels):,} test images")
    if ks:
        result["knn"] = report_knn(model, dataset, settings, ks)
    return result


def report_knn(model, dataset, settings, ks):
    """kNN on the codes and on the raw pixels of the training images, printed side by side."""
    results = {}
    for name in ("codes", "pixels"):
        start = time.perf_counter()
        points, queries = ([encode(model, split, settings) for split in (dataset.train, dataset.test)]
                           if name == "codes" else
                           [split.images.flatten(1) for split in (dataset.train, dataset.test)])
        encoding = time.perf_counter() - start
        found = knn(points, dataset.train.labels, queries, dataset.test.labels, ks, len(dataset.classes),
                    settings["seed"])
        results[name] = found | {"values": points.shape[1], "seconds_to_encode": encoding}
        print(f"kNN on {name:<7}{points.shape[1]:>6} values, k {found['k']:<4}{found['accuracy']:>8.2f} %"
              f"{found['seconds']:>9.2f} s" + f" (and {encoding:.1f} s to encode)" * (name == "codes"))
    return results


def report_anomaly(model, content, settings, device, name, folder):
    """How well the reconstruction error tells a class that the training left out: ROC AUC, with
    anomaly.png. Returns plain values."""
    if not rebuilds(settings):
        raise UsageError(f"--anomaly {name}: the checkpoint's decoder was not trained (beta 0)")
    if name in content["classes"]:
        others = ",".join(each for each in content["classes"] if each != name)
        raise UsageError(f"--anomaly {name}: the checkpoint was trained with that class; train one without "
                         f"it: --classes {others}")
    dataset = load_data(settings | {"classes": [*content["classes"], name]}, device, test_only=True)
    errors = image_errors(model, dataset.test, settings)
    odd = dataset.test.labels == dataset.classes.index(name)
    auc = roc_auc(errors[odd], errors[~odd])
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4))
    bins = torch.linspace(0, errors.quantile(0.99).item(), 40).numpy()
    for own, label, style in ((~odd, "the trained classes", "-"), (odd, name, "--")):
        axes[0].hist(errors[own].cpu().numpy(), bins, density=True, histtype="step", label=label,
                     linestyle=style)
    axes[0].set(title="reconstruction error", xlabel="MSE of an image (pixels of 0-1)", ylabel="density")
    axes[0].legend()
    order = odd[errors.argsort(descending=True)].cpu().double()
    axes[1].plot(((1 - order).cumsum(0) / (1 - order).sum()).numpy(), (order.cumsum(0) / order.sum()).numpy())
    axes[1].plot([0, 1], [0, 1], ":", color="0.5")
    axes[1].set(title=f"ROC, AUC {auc:.3f}", xlabel="share of the others above the threshold",
                ylabel=f"share of {name} above it")
    figure.suptitle(f"{settings['version']} on {dataset.name}, trained without {name}")
    figure.tight_layout()
    save_figure(figure, folder / "anomaly.png")
    result = {"class": name, "auc": auc, "mse": errors[odd].mean().item(),
              "mse_others": errors[~odd].mean().item()}
    print(f"{settings['version']} on {dataset.name}: mean squared error of {name} {result['mse']:.6f}, of "
          f"the trained classes {result['mse_others']:.6f}\nROC AUC {auc:.4f}")
    return result


def numbers(text):
    """An argparse type: "1,3,5" as a list of whole numbers of at least 1."""
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers of at least 1, such as 5 or 1,3,5")
    return [int(each) for each in text.split(",")]


def main(argv):
    parser = argparse.ArgumentParser(description="Measures a checkpoint of train.py, or compares runs.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", help="a checkpoint, e.g. outputs/v4/best.pt")
    source.add_argument("--compare", nargs="+", metavar="RUN", help="draw the classifier losses of these run "
                        "folders in one picture, with a table of their results")
    parser.add_argument("--images", nargs="+", metavar="PICTURE",
                        help="classify and rebuild these pictures, instead of the test images")
    parser.add_argument("--knn", type=numbers, metavar="K[,K...]",
                        help="also classify by the k nearest training images, on codes and on raw pixels; of "
                        "several k the best on held-out training images")
    parser.add_argument("--anomaly", metavar="CLASS", help="how well the reconstruction error tells this "
                        "class, which the training left out, from the others")
    parser.add_argument("--dataset", help="another data set than the checkpoint's")
    parser.add_argument("--data-dir", help="where named sets lie (default: where training found them)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--output", help="where the report goes (default: a folder evaluation-best "
                        "beside best.pt; a folder comparison beside the first run)")
    parser.error = lambda message: stop("evaluate.py", message)
    args = parser.parse_args(argv)
    try:
        if args.compare:
            folder = Path(args.output or Path(args.compare[0]).resolve().parent / "comparison")
            compare(args.compare, folder)
        else:
            folder = Path(args.output or Path(args.ckpt).parent / f"evaluation-{Path(args.ckpt).stem}")
            folder = evaluate(args, folder)
    except (*USER_ERRORS, Stopped) as error:
        stop("evaluate.py", error)
    except OSError as error:
        stop("evaluate.py", f"{error.filename}: {error.strerror}")
    print(f"saved in {folder}")
    return 0


def evaluate(args, folder):
    """What --ckpt asks for: a report of the test images or of --images. Returns its folder."""
    keep_freed_memory()
    model, content = load_checkpoint(args.ckpt)
    device, settings = pick_device(args.device), content["settings"]
    if settings["precision"] != "fp32":
        settings["precision"] = pick_precision("auto", device)
    if args.dataset:
        settings |= {"dataset": args.dataset, "classes": None, "test_size": None}
    if args.data_dir or not Path(settings["data_dir"]).is_dir():
        settings["data_dir"] = args.data_dir or "data"
    model = model.to(device).eval()
    if args.images:
        folder /= "images"
        result = classify_pictures(model, content, args.images, device, folder)
    elif args.anomaly:
        folder /= f"anomaly-{_file_name(args.anomaly)}"
        result = report_anomaly(model, content, settings, device, args.anomaly, folder)
    else:
        result = report(model, content, settings, device, folder, args.knn)
    write_json(folder / "report.json", result)
    return folder


def stop(program, message):
    """Ends the program with one line on stderr and status 2."""
    print(f"{program}: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
