"""Evaluation: measures a checkpoint, draws what it reconstructs, compares runs.

    python evaluate.py --ckpt outputs/v4/best.pt
    python evaluate.py --ckpt outputs/v4/best.pt --images cat.png holiday/
    python evaluate.py --compare outputs/v4 outputs/v4_beta0

This file has, from top to bottom: errors and devices, files and data, measures, pictures, the report of a
model, runs compared, the command line. train.py calls `measure` after each epoch and `report` at the end.
"""
import argparse
import contextlib
import csv
import ctypes
import io
import json
import math
import os
import re
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import data
import losses
import models


class UsageError(ValueError):
    """An error in the user's input: one line that names the value and what was expected."""


class Stopped(RuntimeError):
    """A run that cannot continue, such as one whose loss is not finite: one line."""


@contextlib.contextmanager
def errors(program):
    """Ends a command line with one line on stderr and a status: 2 for what the user can correct, 1 for a run
    that cannot continue, 130 for Ctrl-C. An attribute `advice` of the exception is appended to the line."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such method
        sys.stdout.reconfigure(errors="replace")  # an output that is not Unicode has no ±
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        text, users = str(error), (UsageError, models.NotationError, models.CheckpointError, data.DataError)
        if isinstance(error, KeyboardInterrupt):
            status, text = 130, "interrupted"
        elif isinstance(error, users) or isinstance(error, OSError) and error.filename:
            status, text = 2, f"error: {text}"
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
            status, text = 1, "stopped: out of memory; a smaller --batch-size or --size needs less"
        elif isinstance(error, Stopped):
            status, text = 1, f"stopped: {text}"
        else:
            raise
        print(f"{program}: {text}{getattr(error, 'advice', '')}", file=sys.stderr)
        sys.exit(status)


def fail(message):
    """An ArgumentParser's `error`."""
    hint = "; a value that begins with - is written --flag=-..." if "expected one argument" in message else ""
    raise UsageError(message + hint)


# ---------------------------------------------------------------- devices and precision

def pick_device(name):
    """The torch.device of that name; "auto" is CUDA where there is a GPU, else the CPU. UsageError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {name}: unavailable on this machine with {torch.cuda.device_count()} "
                         "CUDA GPUs; expected auto, cpu, cuda, cuda:N or mps") from None


def keep_freed_memory():
    """Makes glibc keep what is freed. By default it returns blocks of some MB to the system and requests them
    again, page by page, at every step: v1 trained at two thirds of its speed so."""
    with contextlib.suppress(AttributeError, TypeError, OSError):  # not glibc: nothing to do
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at its highest
        mallopt(-1, 2**30)       # M_TRIM_THRESHOLD


def pick_precision(name, device):
    """"bf16" or "fp32"; "auto" is bf16 where the device computes it faster in hardware: GPUs; CPUs with AMX;
    AMD's with AVX-512. Intel's with AVX-512 alone multiply bfloat16 at about half the speed of float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    cpuinfo = Path("/proc/cpuinfo")  # of Linux alone
    text = cpuinfo.read_text() if device.type == "cpu" and cpuinfo.exists() else ""
    return "bf16" if "amx_bf16" in text or "AuthenticAMD" in text and "avx512_bf16" in text else "fp32"


def autocast(device, precision):
    """The context of a network's forward pass, and of an optimizer's matrix products."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


# ---------------------------------------------------------------- files and data

def write_whole(path, write):
    """Calls write(temporary path) beside `path` and moves the result into place, so that a file is either the
    old one or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # another process may write the same file
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, content):
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))


def write_csv(path, rows):
    """Writes dicts of the same keys as the rows of a table."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda part: part.write_text(table.getvalue(), encoding="utf-8", newline=""))


def load_data(args, whole=None):
    """The data.Dataset of settings, on the CPU; or that of the name or path `whole`, undrawn. DataError."""
    draws = "classes", "train_size", "test_size", "val_share", "labels", "variant", "constrain", "seed"
    settings = {name: getattr(args, name) for name in ("data_dir", "size", "blur", *(() if whole else draws))}
    if args.size and args.margin:
        settings["size"] = args.size * 8 // 7  # of a folder's pictures, as they are read
    return data.load(whole or args.dataset, **settings)


# ---------------------------------------------------------------- measures

@contextlib.contextmanager
def fixed_statistics(*parts):
    """In this block batch norms leave their running statistics alone: those of an image that passes a second
    time, or in pieces, are not what the test images will have."""
    norms = [layer for part in parts for layer in part.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    yield
    for layer, momentum in zip(norms, momenta):
        layer.momentum = momentum


def forward(net, batch, args, needed, model=None):
    """What the loss's terms need from a batch: a dict of tensors, of those named in `needed`.

    batch: a dict of inputs (B, C, H, W), or images where those are the same; where other images are
    classified, labelled_inputs; for the jigsaw loss, order (B, tiles). model: where net wraps it
    (DistributedDataParallel).
    """
    inputs = batch["inputs"] if "inputs" in batch else batch["images"]
    apart, model = "labelled_inputs" in batch, model or net
    with autocast(inputs.device, args.precision):
        outputs = net(inputs, classify="logits" in needed and not apart, posterior="mean" in needed,
                      reconstruct="reconstruction" in needed)
        tensors = dict(zip(("logits", "reconstruction", "mean", "log_variance"), outputs))
        if "jigsaw_reconstruction" in needed:
            with fixed_statistics(model.encoder, *[model.decoder] * ("reconstruction" in needed)):
                jumbled = losses.jumble(inputs, args.jigsaw_grid, batch["order"])
                tensors["jigsaw_reconstruction"] = net(jumbled, classify=False)[1]
        if apart:
            with fixed_statistics(model.encoder):
                tensors["logits"] = net(batch["labelled_inputs"], reconstruct=False)[0]
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def test_batches(split, args):
    """Yields a Split in order, in batches that are not trained on: dicts of images, labels, inputs (with
    noise, the same at every call) and, for the jigsaw loss, order."""
    device, grid = split.labels.device, args.jigsaw_grid if args.delta else 0
    noise, tiles = (torch.Generator(device).manual_seed(0) for _ in range(2))
    # A small batch's kernels take the CPU longer to start than the GPU to run.
    size = 1000 if device.type == "cuda" and (args.size or split.images.shape[3]) <= 64 else 100
    for images, labels in data.batches(split, size, **args.preparation):
        inputs = images if args.clean_test else data.add_noise(images, args.noise, noise, args.scale)
        order = torch.rand(len(images), grid ** 2, generator=tiles, device=device).argsort(1)
        yield {"images": images, "labels": labels, "inputs": inputs, "order": order}


@torch.no_grad()
def measure(model, split, args, mirrored=False):
    """A model's losses and errors on a Split, a dict of plain numbers: its loss terms by name; accuracy in
    percent, with mirrored=True also accuracy_mirrored, of the logits of each image and its mirror image
    averaged; the means over the images of losses.reconstruction_errors, on pixels of 0-1, to which they are
    clamped. Also confusion, counts [true class][predicted class], and the tensors predicted and probability.

    args.trained: the parts that are measured, of "classifier" and "decoder". With noise in the settings the
    network sees noisy images, the errors are against the clean ones, and noisy_psnr is the input's own.
    """
    training, sums, logits, n = model.training, [], [], len(split.labels)
    model.eval()
    needed = {"mean", *losses.needed(args.weights)} - {"logits"}  # a checkpoint may be before its classifier
    needed.update(["logits"] * ("classifier" in args.trained), ["jigsaw_reconstruction"] * bool(args.delta),
                  ["reconstruction"] * ("decoder" in args.trained))
    for batch in test_batches(split, args):
        tensors = batch | forward(model, batch, args, needed)
        found = {term.name: len(batch["labels"]) * term.loss(*(tensors.get(name) for name in term.needs))
                 for term in losses.TERMS.values() if set(term.needs) - set(losses.OPTIONAL) <= set(tensors)}
        if "logits" in tensors:
            logits.append(tensors["logits"].float())
            if mirrored:
                flipped = forward(model, {"inputs": batch["inputs"].flip(3)}, args, {"logits"})["logits"]
                guesses = (logits[-1] + flipped).argmax(1)
                found["accuracy_mirrored"] = 100.0 * (guesses == batch["labels"]).sum()
        if "reconstruction" in tensors:
            pixels = data.to_pixels(batch["images"], args.scale)
            each = losses.reconstruction_errors(data.to_pixels(tensors["reconstruction"], args.scale), pixels)
            if batch["inputs"] is not batch["images"]:
                noisy = data.to_pixels(batch["inputs"], args.scale)
                each["noisy_psnr"] = losses.reconstruction_errors(noisy, pixels)["psnr"]
            found |= {name: values.sum() for name, values in each.items()}
        sums.append(torch.stack(list(found.values())))
    model.train(training)
    result = dict(zip(found, (torch.stack(sums).cpu().double().sum(0) / n).tolist()))
    if logits:
        probability, predicted = torch.cat(logits).softmax(1).cpu().max(1)
        confusion = losses.confusion_matrix(split.labels.cpu(), predicted, model.num_classes)
        result |= {"accuracy": 100 * confusion.trace().item() / n, "confusion": confusion.tolist(),
                   "predicted": predicted, "probability": probability}
    return result


@torch.no_grad()
def encode(model, split, args):
    """The codes of a Split's images without noise, flat: (N, values) float32. model: in eval mode."""
    with autocast(split.labels.device, args.precision):
        codes = [model.encode(batch["images"]) for batch in test_batches(split, args)]
    return torch.cat(codes).flatten(1).float()


def drawn(split, count):
    """At most that many images of a Split, always the same."""
    rows = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(0))[:count]
    return data.Split(split.images[rows], split.labels[rows])


def best_row(rows):
    """(row, part): the row of a log with the highest accuracy or, where no classifier was trained, the least
    MSE, the last one where epochs tie; part: "val" where images are held out to choose it, else "test"."""
    part = "test" if rows[0]["val_accuracy"] is None and rows[0]["val_mse"] is None else "val"
    classified = [row for row in rows if row[f"{part}_accuracy"] is not None]
    if classified:
        return max(reversed(classified), key=lambda row: row[f"{part}_accuracy"]), part
    return min(reversed(rows), key=lambda row: row[f"{part}_mse"]), part


def digits(n):
    """Decimals that an accuracy in percent of n test images carries: 2 of 10,000, 1 of 1,000, none of 100."""
    return max(0, math.ceil(math.log10(n)) - 2)


# ---------------------------------------------------------------- pictures
# matplotlib is imported where something is drawn: it takes a second.
MARKERS = "os^Dv<>p*hXP+x1234|_"  # of classes, of groups of runs


def drawable(text):
    """A text with ? in place of the letters that matplotlib's font lacks, which would be empty boxes."""
    from matplotlib import font_manager
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return "".join(letter if letter == "\n" or font.get_char_index(ord(letter)) else "?" for letter in text)


def shown(names, kind="class"):
    """Names as a picture can show them: by their number where one is not `drawable`."""
    return [name if name == drawable(name) else f"{kind} {i}" for i, name in enumerate(names)]


def save_figure(figure, path):
    """A Figure as a PNG, with all of it inside, which its layout alone does not guarantee."""
    from matplotlib.text import Text
    for text in figure.findobj(Text):
        text.set(parse_math=False, text=drawable(text.get_text()))  # a name may have two $
    write_whole(path, lambda part: figure.savefig(part, dpi=150, bbox_inches="tight", format="png"))


def file_name(text):
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "_"


def draw_sheet(rows, columns, path, title):
    """A sheet of pictures. rows: {name: pictures (N, C, H, W) of 0-1}; columns: N names."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid
    pictures = torch.cat([each.float().cpu().expand(-1, 3, -1, -1) for each in rows.values()])
    height, width = (side + 2 for side in pictures.shape[2:])
    grid = make_grid(pictures, nrow=len(columns), padding=2, pad_value=1).permute(1, 2, 0).numpy()
    longest = max(len(line) for name in columns for line in name.split("\n"))
    inches = max(0.8, 4 / len(columns), min(0.1 * longest, 3))  # of a column with its margin
    figure = Figure(figsize=(inches * len(columns), 0.4 + inches * len(rows) * height / width))
    axis = figure.subplots()
    axis.imshow(grid, interpolation="nearest")
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xticks([width * (i + 0.5) for i in range(len(columns))], columns, fontsize=8)
    axis.set_yticks([height * (i + 0.5) for i in range(len(rows))], list(rows), fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    save_figure(figure, path)


@torch.no_grad()
def draw_reconstructions(model, dataset, args, folder):
    """recon.png: the first test image of up to ten classes, reconstructed; recon/: the pairs as files."""
    from torchvision.utils import save_image
    labels = dataset.test.labels.tolist()
    chosen = [labels.index(label) for label in sorted(set(labels))[:10]]
    names = [shown(dataset.classes)[labels[row]] for row in chosen]
    batch = next(test_batches(data.Split(*(tensor[chosen] for tensor in dataset.test)), args))
    rows = {"original": data.to_pixels(batch["images"], args.scale)}
    if batch["inputs"] is not batch["images"]:
        rows["with noise"] = data.to_pixels(batch["inputs"], args.scale)
    rebuilt = forward(model, batch, args, {"reconstruction"})["reconstruction"]
    rows["reconstruction"] = data.to_pixels(rebuilt, args.scale)
    note = "" if "decoder" in args.trained else " (the decoder is not trained)"
    draw_sheet(rows, names, folder / "recon.png",
               f"{args.version} on {dataset.name}: test images and their reconstructions{note}")
    for i, row in enumerate(chosen):
        stem = f"{Path(str(dataset.files[row])).stem}_{file_name(dataset.classes[labels[row]])}"
        for kind, pixels in (("", rows["original"][i]), ("_recon", rows["reconstruction"][i])):
            write_whole(folder / "recon" / f"{stem}{kind}.png",
                        lambda part: save_image(pixels, part, format="png"))


@torch.no_grad()
def draw_prior(model, dataset, args, folder):
    """prior.png: images decoded from draws of a variational code's prior."""
    device = dataset.test.images.device
    draws = torch.randn(60, *model.code_shape, generator=torch.Generator().manual_seed(0)).to(device)
    with autocast(device, args.precision):
        pixels = data.to_pixels(model.decoder(draws), args.scale)
    rows = {" " * i: row for i, row in enumerate(pixels.split(10))}
    draw_sheet(rows, [""] * 10, folder / "prior.png", f"{args.version} on {dataset.name}: draws of the prior")


def draw_plane(codes, labels, classes, path, title):
    """Codes (N, D) as points in the plane, by class: as they are where D is 2, else on their first two
    principal components."""
    from matplotlib.figure import Figure
    x, axes = codes.cpu().double(), ("first value of the code", "second value of the code")
    if x.shape[1] != 2:
        x = x - x.mean(0)
        values, vectors = torch.linalg.eigh(x @ x.T)  # of N x N: codes may be longer than N
        x = vectors[:, -2:].flip(1) * values[-2:].flip(0).clamp(min=0).sqrt()
        shares = 100 * values / values.sum().clamp(min=1e-12)
        axes = [f"{which} principal component ({share:.0f} % of the variance)"
                for which, share in zip(("first", "second"), shares[-2:].flip(0).tolist())]
    figure = Figure(figsize=(7, 6))
    axis, labels = figure.subplots(), labels.cpu()
    for label, (name, marker) in enumerate(zip(shown(classes), MARKERS)):
        axis.plot(*x[labels == label].T, f"C{label % 10}{marker}", markersize=3, alpha=0.6,
                  label=f" {name}")  # matplotlib leaves out a label that begins with _
    more = f",\nthe first {len(MARKERS)} of {len(classes)} classes" if len(classes) > len(MARKERS) else ""
    axis.set(title=title + more, xlabel=axes[0], ylabel=axes[1])
    axis.legend(fontsize=8, markerscale=2, bbox_to_anchor=(1.01, 1), loc="upper left")
    save_figure(figure, path)


def draw_confusion(confusion, classes, path, title):
    """Counts [true][predicted] as a picture, in percent of each true class."""
    from matplotlib.figure import Figure
    counts = np.array(confusion)
    share = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(2.6 + 0.5 * min(len(classes), 20),) * 2)
    axis = figure.subplots()
    picture = axis.imshow(share, cmap="Greys", vmin=0, vmax=100)
    figure.colorbar(picture, label="% of the true class", fraction=0.046)
    if len(classes) <= 20:
        axis.set_xticks(range(len(classes)), shown(classes), rotation=45, ha="right")
        axis.set_yticks(range(len(classes)), shown(classes))
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.05:
                axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7,
                          color="white" if value > 55 else "black")
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    save_figure(figure, path)


def draw_curves(rows, args, path, title):
    """Train and test losses and accuracy over the epochs, one panel for each that there is."""
    from matplotlib.figure import Figure
    units = {term.name: term.unit for term in losses.TERMS.values()} | {"accuracy": "accuracy (%)"}
    keys = [key for key in units if all(any(row.get(f"{part}_{key}") is not None for row in rows)
                                        for part in ("train", "test"))]
    note = " (smoothed labels)" * bool(args.label_smoothing) + " (class weights)" * bool(args.class_weights)
    notes = {"accuracy": " (while it learns)", "classifier": note}  # of the training's figures alone
    figure = Figure(figsize=(4.2 * len(keys), 4), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for part, style, note in (("train", "C0.-", notes.get(key, "")), ("test", "C1.--", "")):
            values = np.array([row[f"{part}_{key}"] for row in rows], dtype=float)
            axis.plot(range(1, len(rows) + 1), values, style, label=part + note)
        if key == "accuracy":
            best, on = best_row(rows)
            axis.plot(best["epoch"], best["test_accuracy"], "k^", markersize=6,
                      label=f"test at the best epoch (on {on}): {best['test_accuracy']:.2f} %")
        axis.set(title=key + " loss" * (key != "accuracy"), xlabel="epoch", ylabel=units[key])
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))  # below: on no curve
    figure.suptitle(title)
    save_figure(figure, path)


# ---------------------------------------------------------------- the report of a model

MEASURES = [("MSE", "mse", "{:.6f}"), ("MAE", "mae", "{:.5f}"), ("PSNR", "psnr", "{:.2f} dB"),
            ("PSNR of the noisy input", "noisy_psnr", "{:.2f} dB"),
            ("sum of |errors| per image", "absolute_error", "{:.2f}"),
            ("|sum of errors| per image", "net_error", "{:.2f}")]
CHANCE = ("at chance: not above the largest class's share by more than chance explains; in training, more\n"
          "epochs, more images, smaller batches (--batch-size 8) or --optimizer adam --lr 0.001 may help")


def report(model, dataset, args, folder, tested, rows=None):
    """Prints, draws and keeps in `folder` what a model does on the test images: metrics.json, predictions.csv
    and the pictures. tested: of `measure`. rows: the log of the run that has just ended with this model.
    Returns the metrics, a dict."""
    model.eval()
    count = models.parameter_count(model)
    metrics = {"dataset": dataset.name, "source": dataset.source, "test_images": len(dataset.test.labels),
               "code": math.prod(model.code_shape), "parameters": count, "megabytes": count * 4 / 1e6}
    if "accuracy" in tested:
        metrics |= report_classes(dataset, args, folder, tested, rows)
    if "mse" in tested:
        metrics["reconstruction"] = {"autoencoder": tested["autoencoder"]}
        print("reconstruction, on pixels of 0-1")
        for name, key, style in MEASURES:
            if key in tested:
                metrics["reconstruction"][key] = tested[key]
                print(f"  {name:<28}{style.format(tested[key])}")
    if rows:
        # The log's training accuracy is a mean over the epoch, with dropout and distorted images.
        sample = drawn(dataset.labelled or dataset.train, 10_000)
        n, measured = len(sample.labels), measure(model, sample, args)
        styles = {"accuracy": "accuracy {:.1f} %", "psnr": "PSNR {:.2f} dB"}
        texts = [style.format(measured[key]) for key, style in styles.items() if key in measured]
        print(f"{n:,} training images, measured as the test images are: {', '.join(texts)}")
        fit = {key: measured[key] for key in ("accuracy", "mse", "psnr") if key in measured}
        seconds = sorted(row["seconds"] for row in rows)[len(rows) // 2]
        metrics |= {"epochs": len(rows), "training_images": {"images": n} | fit, "seconds_per_epoch": seconds,
                    "seconds": sum(row["seconds"] + row["test_seconds"] for row in rows)}
        draw_curves(rows, args, folder / "curves.png", f"{folder.name} on {dataset.name}")
    if model.decoder is not None:
        draw_reconstructions(model, dataset, args, folder)
    if model.variational and "decoder" in args.trained:
        draw_prior(model, dataset, args, folder)
    sample = drawn(dataset.test, 2000)
    if len(sample.labels) > 2:
        draw_plane(encode(model, sample, args), sample.labels, dataset.classes, folder / "codes.png",
                   f"{args.version} on {dataset.name}: codes of {len(sample.labels):,} test images")
    write_json(folder / "metrics.json", metrics)  # last: with it the run is complete
    return metrics


def report_classes(dataset, args, folder, tested, rows):
    """The metrics of a classifier, printed; confusion.png and predictions.csv."""
    n, names = len(dataset.test.labels), dataset.classes
    largest, places = 100 * max(map(sum, tested["confusion"])) / n, digits(n)
    bound = largest + 2 * math.sqrt(largest * (100 - largest) / n)  # by two standard errors
    accuracy = {"test": tested["accuracy"], "largest_class": largest,
                "at_chance": tested["accuracy"] <= bound and largest < 100}  # one class alone does not tell
    when = " after the last epoch" if rows else ""
    print(f"test accuracy{when}: {tested['accuracy']:.{places}f} % of {n:,} images (always the largest "
          f"class: {largest:.{places}f} %)")
    if accuracy["at_chance"]:
        print(CHANCE)
    if rows:
        best, on = best_row(rows)
        accuracy |= {"best": best["test_accuracy"], "best_epoch": best["epoch"], "best_chosen_on": on}
        print(f"best epoch (on {on}): {best['test_accuracy']:.{places}f} %, epoch {best['epoch']}")
    if "accuracy_mirrored" in tested:
        mirrored = accuracy["mirrored"] = tested["accuracy_mirrored"]
        print(f"with the scores of each image and its mirror image averaged: {mirrored:.{places}f} %")
    per_class, width = losses.per_class(tested["confusion"], names), max(10, *map(len, names))
    if len(names) <= 20:
        print(f"{'class':<{width}}{'images':>8}{'recall %':>10}{'precision %':>13}{'F1 %':>8}")
        for name, row in per_class.items():
            cells = ["-" if row[key] is None else f"{row[key]:.1f}" for key in ("recall", "precision", "f1")]
            print(f"{name:<{width}}{row['images']:>8,}{cells[0]:>10}{cells[1]:>13}{cells[2]:>8}")
    draw_confusion(tested["confusion"], names, folder / "confusion.png",
                   f"{args.version} on {dataset.name}: accuracy {tested['accuracy']:.{places}f} %")
    columns = dataset.files, dataset.test.labels.tolist(), tested["predicted"], tested["probability"]
    write_csv(folder / "predictions.csv", [
        {"image": file, "true": names[label], "predicted": names[guess], "probability": f"{chance:.4f}"}
        for file, label, guess, chance in zip(*columns)])
    return {"accuracy": accuracy, "per_class": per_class}


# ---------------------------------------------------------------- runs compared

INCIDENTAL = "seed", "name", "device", "output", "resume", "digest"  # in which repetitions may differ
COLUMNS = [("accuracy (%)", "accuracy.test", 2), ("best (%)", "accuracy.best", 2),
           ("mirrored (%)", "accuracy.mirrored", 2), ("training images (%)", "training_images.accuracy", 2),
           ("MSE", "reconstruction.mse", 6), ("PSNR (dB)", "reconstruction.psnr", 2), ("code", "code", 0),
           ("parameters", "parameters", 0), ("MB", "megabytes", 1), ("s per epoch", "seconds_per_epoch", 1)]
PRINTED = {"run", "n", "accuracy (%)", "PSNR (dB)", "difference", "result"}  # the others would not fit


def read_run(folder):
    """A run of train.py: its folder, settings, network (with the numbers of images), metrics, and rows (of
    log.csv: dicts of floats, None where a cell is empty). None where its last epoch is not done."""
    try:
        config, metrics = (json.loads((folder / f"{key}.json").read_text()) for key in ("config", "metrics"))
        log = csv.DictReader((folder / "log.csv").read_text().splitlines())
        rows = [{key: float(value) if value else None for key, value in row.items()} for row in log]
        done = metrics["epochs"] == config["settings"]["epochs"]  # of a lengthened run, metrics.json is older
        return argparse.Namespace(
            folder=folder.resolve(), settings=config["settings"], rows=rows, metrics=metrics,
            network=[config["network"], config["images"]]) if done else None
    except (OSError, ValueError, KeyError):
        return None


def kind_of(run, *ignored):
    """What a run has in common with its repetitions, as text: its network and settings, but `ignored`."""
    left_out = {*INCIDENTAL, "weights", "trained", "preparation", *ignored}  # those follow from others
    settings = {key: value for key, value in run.settings.items() if key not in left_out}
    return json.dumps([settings, {} if ignored else run.network], sort_keys=True)


def read_groups(paths):
    """{name: {seed: Run}} of run folders, and of the finished runs in other folders: those that differ in
    their seed alone in one group, named after a folder, without what all have in their names. Of runs with
    the same seed the last one counts. UsageError."""
    kinds, groups, paths = {}, {}, list(map(Path, paths))
    for path in [path for path in paths if not path.is_file()] or paths:  # a pattern may match files, too
        folders = [path] if (path / "config.json").exists() else sorted(path.glob("[!.]*"))
        runs = [run for run in map(read_run, folders) if run]
        if not runs:
            raise UsageError(f"{path}: no finished run of this version of the program there")
        for run in runs:
            kinds.setdefault(kind_of(run), {})[run.settings["seed"]] = run
    names = [re.sub(r"(_seed\d+)?(_run\d+)?$", "", next(iter(group.values())).folder.name).split("_")
             for group in kinds.values()]
    common = set.intersection(*map(set, names)) if len(names) > 1 else set()
    short = ["_".join([first, *(part for part in more if part not in common)]) for first, *more in names]
    for name, group in zip(short, kinds.values()):
        groups[name + "'" * sum(other.rstrip("'") == name for other in groups)] = group
    return groups


def figures(group, key):
    """{seed: the figure of that run} of a group's runs that have it, by its dotted name in metrics.json."""
    part, _, name = key.rpartition(".")
    found = {seed: run.metrics.get(part, {}) if part else run.metrics for seed, run in group.items()}
    return {seed: metrics[name] for seed, metrics in found.items() if name in metrics}


def mean_interval(values):
    """(mean, half the width of its 95 % t interval) of two or more numbers. The quantile t: with t = sqrt(n -
    1) tan(a) the density of the angle a is proportional to cos(a)^(n - 2)."""
    values, angle = np.asarray(values, dtype=float), np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (len(values) - 2)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    t = math.sqrt(len(values) - 1) * math.tan(np.interp(0.95, mass / mass[-1], angle))
    return values.mean(), t * values.std(ddof=1) / math.sqrt(len(values))


def references(groups, against):
    """{name: name of the group that it is compared with}: with None the first one; with SETTING=VALUE the one
    that has this value and differs in that setting alone. UsageError."""
    if against is None:
        return {name: next(iter(groups)) for name in list(groups)[1:]}
    setting, _, value = against.partition("=")
    setting = setting.replace("-", "_")
    with contextlib.suppress(ValueError):
        value = json.loads(value)  # a number, true, false or null
    firsts = {name: next(iter(group.values())) for name, group in groups.items()}
    kinds = {name: kind_of(run, setting) for name, run in firsts.items()}
    those = [name for name, run in firsts.items() if run.settings.get(setting, against) == value]
    pairs = {name: other for other in those for name in groups
             if name not in those and kinds[name] == kinds[other]}
    if not pairs:
        raise UsageError(f"--against {against}: expected SETTING=VALUE, such as beta=0, in which alone two "
                         "groups differ")
    return pairs


def table_row(name, group, found, classified):
    """The row of a group in a comparison, a dict of texts by column. found: (mean difference, half its
    interval, number of pairs), or None; in accuracy (`classified`) or in PSNR."""
    row, n = {"run": name, "n": str(len(group))}, next(iter(group.values())).metrics["test_images"]
    for title, key, decimals in COLUMNS:
        values = list(figures(group, key).values())
        decimals = min(decimals, digits(n)) if "%" in title else decimals
        row[title] = f"{np.mean(values):,.{decimals}f}" if values else ""
        if len(values) > 1 and key not in ("code", "parameters", "megabytes"):  # the same for all seeds
            row[title] += f" ± {np.std(values, ddof=1):.{decimals}f}"
    row |= {"difference": "", "result": ""}
    if found:
        (mean, half, pairs), places = found, digits(n) if classified else 2
        note = f" ({pairs} pairs)" if pairs < len(group) else ""
        row["difference"] = f"{mean:+.{places}f} ± {half:.{places}f}{note}"
        # Without a width: few test images can give equal differences by chance.
        row["result"] = "not shown" if not 0 < half < abs(mean) else "better" if mean > 0 else "worse"
    chance = figures(group, "accuracy.at_chance").values()
    return row | ({"result": "at chance"} if classified and chance and all(chance) else {})


def compare(paths, output, against=None):
    """Prints a table of runs, those that differ in their seed alone as one, with paired differences and 95 %
    intervals; saves it whole in the folder `output`, which it returns, with a picture. UsageError."""
    groups = read_groups(paths)
    pairs = references(groups, against) if len(groups) > 1 else {}
    those = {*pairs, *pairs.values()} or groups  # that are compared
    classified = all("accuracy" in run.metrics for name in those for run in groups[name].values())
    key = "accuracy.test" if classified else "reconstruction.psnr"
    unit = "points of accuracy" if classified else "dB of PSNR"
    found = {}
    for name, other in pairs.items():
        ours, theirs = figures(groups[name], key), figures(groups[other], key)
        each = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if len(each) > 1:
            found[name] = *mean_interval(each), len(each)
    rows = [table_row(name, group, found.get(name), classified) for name, group in groups.items()]
    columns = [title for title in rows[0] if any(row[title] for row in rows)]  # no empty ones
    lines = [columns, *([row[title] for title in columns] for row in rows)]
    widths = [max(map(len, column)) if title in PRINTED else 0 for title, column in zip(columns, zip(*lines))]
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths) if width).rstrip())
    than = against or next(iter(groups))
    notes = ["Of the last epoch; ±: standard deviation of the n runs of a row, which differ in their seed."]
    if found:
        notes += [f"difference: in {unit} from {than}, seeds paired, ± half its 95 % t interval over seeds;",
                  "not corrected for the number of comparisons. not shown: it includes 0, or has no width."]
    elif pairs:
        notes += ["No differences: they need two or more seeds that both rows have (--seeds)."]
    notes += [CHANCE] if any(row["result"] == "at chance" for row in rows) else []
    print("\n".join(["", *notes]))
    table = [f"| {' | '.join(line)} |" for line in lines]
    table.insert(1, "|" + "---|" * len(columns))
    folders = sorted(str(run.folder) for group in groups.values() for run in group.values())
    text, file = "\n".join([*table, "", *notes, "", "Runs:", *folders, ""]), Path(output, "comparison.md")
    if file.exists():
        print(f"{file}: the comparison that was there is replaced")
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))
    draw_comparison(groups, found, key, f"→ {unit} more than with {than}", file.with_suffix(".png"))
    return file.parent


def draw_comparison(groups, found, key, what, path):
    """The groups' figure `key`: each run a stroke, the mean of several with its 95 % interval; beside it
    `found`, their differences, and the figure over the epochs."""
    from matplotlib.figure import Figure
    column, label = {"accuracy.test": ("test_accuracy", "accuracy (% of the test images)"),
                     "reconstruction.psnr": ("test_psnr", "PSNR on the test images (dB)")}[key]
    *texts, what = (textwrap.fill(text.replace("_", "_ "), 50).replace("_ ", "_") for text in (*groups, what))
    height = 1.5 + 0.3 * len("\n".join(texts).split("\n"))
    figure = Figure(figsize=(15 if found else 10, max(3.6, height)), layout="constrained")
    *axes, last = figure.subplots(1, 3 if found else 2)
    for i, (name, group) in enumerate(groups.items()):
        values = list(figures(group, key).values())
        axes[0].plot(values, [i] * len(values), "k|", markersize=12)
        if len(values) > 1:
            mean, half = mean_interval(values)
            axes[0].errorbar(mean, i, xerr=half, fmt="kd", markersize=5, capsize=3)
        if name in found:
            axes[1].errorbar(found[name][0], i, xerr=found[name][1], fmt="kd", markersize=5, capsize=3)
        curve = np.array([[row[column] for row in run.rows] for run in group.values()], dtype=float).mean(0)
        last.plot(range(1, len(curve) + 1), curve, f"C{i % 10}{MARKERS[i % len(MARKERS)]}", label=texts[i],
                  linestyle=("-", "--", ":", "-.")[i % 4], markevery=max(1, len(curve) // 8), markersize=5)
    for axis in axes:
        axis.set(ylim=(len(groups) - 0.5, -0.5), yticks=range(len(groups)), yticklabels=[])
        axis.grid(alpha=0.3)
    axes[0].set(xlabel=label, yticklabels=texts, title="each run; mean, 95 % interval")
    if found:
        axes[1].axvline(0, color="0.5", linestyle=":")
        axes[1].set(xlabel=what, title="mean difference, 95 % interval")
    last.set(xlabel="epoch", ylabel=label, title="over the epochs (means over seeds)")
    last.locator_params(axis="x", integer=True, min_n_ticks=1)
    last.grid(alpha=0.3)
    last.legend(fontsize=8)
    save_figure(figure, path)


# ---------------------------------------------------------------- python evaluate.py

@torch.no_grad()
def classify_pictures(model, args, content, paths, device, folder):
    """Prints the likeliest classes of pictures, files and those in folders, prepared as the test images are;
    keeps them in metrics.json and draws the first 20 in pictures.png. UsageError."""
    classes, (channels, *sides), pictures = content["classes"], content["image_shape"], {}
    for path in map(Path, paths):
        inside = sorted(each for each in path.rglob("[!.]*") if each.suffix.lower() in data.ENDINGS)
        for file in inside if path.is_dir() else [path]:
            try:
                pictures[file] = data.read_picture(file, channels, sides, args.blur)
            except data.DataError as error:
                print(f"left out: {error}")
    if not pictures:
        raise UsageError(f"--images {paths[0]}: no picture there that can be read")
    results, labels = [{"image": str(file)} for file in pictures], shown(classes)
    names = shown([file.name[-14:] for file in pictures], "picture")
    if "classifier" in args.trained:
        print(f"the network knows these classes and nothing else: {' '.join(classes)}")
        for i, (file, image) in enumerate(pictures.items()):
            inputs = data.normalise(image.to(device), **args.preparation)
            logits = forward(model, {"inputs": inputs}, args, {"logits"})["logits"]
            chances, order = logits[0].float().softmax(0).topk(min(3, len(classes)))
            best = list(zip(order.tolist(), chances.tolist()))
            results[i]["classes"] = {classes[k]: chance for k, chance in best}
            names[i] += "".join(f"\n{labels[k][:10]} {100 * chance:.0f} %" for k, chance in best)
            print(f"{file}: " + ", ".join(f"{classes[k]} {100 * chance:.1f} %" for k, chance in best))
    inputs = data.normalise(torch.cat(list(pictures.values())[:20]).to(device), **args.preparation)
    rows = {"as the network sees it": data.to_pixels(inputs, args.scale)}
    if "decoder" in args.trained:
        rebuilt = forward(model, {"inputs": inputs}, args, {"reconstruction"})["reconstruction"]
        rows["reconstruction"] = data.to_pixels(rebuilt, args.scale)
    draw_sheet(rows, names[:20], folder / "pictures.png", f"{args.version}: pictures and likeliest classes")
    write_json(folder / "metrics.json", results)


def match_classes(dataset, classes):
    """The Dataset with its labels in the order of the checkpoint's classes, by name: the same one, else the
    same but for upper and lower case. A set without names of its own keeps its numbers. UsageError."""
    if not dataset.named and len(dataset.classes) == len(classes):
        return replace(dataset, classes=classes)
    number = {name.lower(): i for i, name in enumerate(classes)} | {name: i for i, name in enumerate(classes)}
    numbers = [number.get(name, number.get(name.lower())) for name in dataset.classes]
    if None in numbers:
        raise UsageError(f"--dataset {dataset.name}: has a class {dataset.classes[numbers.index(None)]}; "
                         f"expected the checkpoint's: {' '.join(classes)}")
    number = torch.tensor(numbers)
    return replace(dataset.map(lambda split: data.Split(split.images, number[split.labels])), classes=classes)


def load_test(model, args, content, foreign, device):
    """The checkpoint's Dataset on the device, or another one (`foreign`: its name or path, else None),
    checked against the network. UsageError, DataError."""
    expected = tuple(model.version.in_shape)
    if foreign and args.dataset not in (foreign, str(Path(foreign).resolve())):
        if expected[1] == expected[2]:  # images of other sizes are scaled
            args.size = args.preparation["size"] = expected[1]
        dataset = load_data(args, foreign)
        if "classifier" in args.trained:
            dataset = match_classes(dataset, content["classes"])
    else:
        dataset = load_data(args)
        if data.digest(dataset) != content["digest"]:
            print(f"evaluate.py: note: {dataset.source} has changed since the training; its test images may "
                  "be training images", file=sys.stderr)
    shape = tuple(dataset.test.images.shape[1:])
    if shape[0] != expected[0] or args.size is None and shape != expected:
        raise UsageError(f"--dataset {dataset.name}: has images of {'x'.join(map(str, shape))}, the "
                         f"checkpoint takes {'x'.join(map(str, expected))}")
    return dataset.to(device)


def report_knn(model, dataset, args, k):
    """Classifies by the k nearest training images, on the codes and on the raw pixels, and prints the results
    side by side. Of equally frequent classes the nearest image's counts."""
    train, results = dataset.labelled or dataset.train, {}
    # A vote each, and a fraction that decides between equally many: more than those of all after it.
    weights = 1 + 0.5 ** torch.arange(1.0, k + 1, dtype=torch.float64, device=train.labels.device)
    for name in ("codes", "pixels"):
        points, queries = (encode(model, split, args) if name == "codes" else split.images.flatten(1)
                           for split in (train, dataset.test))
        start = time.perf_counter()
        neighbours = train.labels[data.nearest(queries, points, k)]  # (Q, k), nearest first
        votes = weights.new_zeros(len(queries), model.num_classes)
        votes.scatter_add_(1, neighbours, weights.expand_as(neighbours))
        accuracy = 100 * (votes.argmax(1) == dataset.test.labels).double().mean().item()
        seconds = time.perf_counter() - start
        results[name] = {"k": k, "accuracy": accuracy, "seconds": seconds, "values": points.shape[1]}
        print(f"kNN on {name:<7}{points.shape[1]:>6} values, k {k:<4}{accuracy:>8.2f} %{seconds:>9.2f} s")
    return results


def evaluate(options):
    """What --ckpt asks for. Returns the folder of the report."""
    keep_freed_memory()
    model, content = models.load(options.ckpt)
    if "settings" not in content:
        raise UsageError(f"{options.ckpt}: has no settings; expected a checkpoint that train.py wrote")
    args, device = argparse.Namespace(**content["settings"]), pick_device(options.device)
    args.precision = pick_precision("auto" if args.precision == "bf16" else "fp32", device)
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    args.data_dir, model = options.data_dir or args.data_dir, model.to(device)
    of = f"-{file_name(Path(options.dataset).resolve().name)}" if options.dataset else ""
    folder = Path(options.output or Path(options.ckpt).parent / f"evaluation-{Path(options.ckpt).stem}{of}")
    if options.images:
        classify_pictures(model, args, content, options.images, device, folder / "images")
        return folder / "images"
    dataset = load_test(model, args, content, options.dataset, device)
    count = len((dataset.labelled or dataset.train).labels)
    if options.knn is not None and not 1 <= options.knn <= count:
        raise UsageError(f"--knn {options.knn}: expected 1 to {count:,}, {dataset.name}'s training images")
    print(f"{args.version} after epoch {content['epoch']}, on {dataset.name} ({dataset.source})")
    mirrored = args.flip and options.dataset not in data.NEVER_FLIPPED
    metrics = report(model, dataset, args, folder, measure(model, dataset.test, args, mirrored))
    if options.knn:
        write_json(folder / "metrics.json", metrics | {"knn": report_knn(model, dataset, args, options.knn)})
    return folder


def make_parser():
    parser = argparse.ArgumentParser(description="Measures a checkpoint; compares runs.", allow_abbrev=False)
    source, add = parser.add_mutually_exclusive_group(required=True).add_argument, parser.add_argument
    source("--ckpt", help="a checkpoint, e.g. outputs/v4/best.pt")
    source("--compare", nargs="+", metavar="RUN", help="run folders, or folders of them: a table and a "
           "picture of their results; runs that differ in their seed alone are one group")
    add("--against", metavar="SETTING=VALUE", help="compare with those that differ in this alone, as beta=0")
    add("--images", nargs="+", metavar="PICTURE", help="classify and rebuild these pictures, or a folder's")
    add("--knn", type=int, metavar="K", help="also classify by the K nearest training images")
    add("--dataset", metavar="NAME|PATH", help="test on another data set, of the same or fewer classes")
    add("--data-dir", help="where named sets are (default: where training found them)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--output", help="where the report goes (default: a folder beside the checkpoint or the runs)")
    parser.error = fail
    return parser


def main(argv):
    with errors("evaluate.py"):
        options = make_parser().parse_args(argv)
        useless = ["images", "knn", "dataset", "data_dir"] if options.compare else ["against"]
        for flag in useless + ["knn", "dataset", "data_dir"] * bool(options.images):
            if getattr(options, flag):
                raise UsageError(f"--{flag.replace('_', '-')}: no effect here; leave it out")
        if options.compare:
            first = Path(options.compare[0])
            beside = first.parent if (first / "config.json").exists() else first
            folder = compare(options.compare, options.output or beside / "comparison", options.against)
        else:
            folder = evaluate(options)
        print(f"saved in {folder}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
