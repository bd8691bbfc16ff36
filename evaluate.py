"""Evaluation: measures a checkpoint, draws what it reconstructs, compares runs.

    python evaluate.py --ckpt outputs/v4/best.pt
    python evaluate.py --ckpt outputs/v4/best.pt --images cat.png boat.jpg
    python evaluate.py --compare outputs/v4 outputs/v4_beta0

A checkpoint holds its network, its data set and its settings. This file has, from top to bottom:
errors and devices, files and checkpoints, measures, pictures of a model, runs and their comparison,
the command line. train.py measures with `measure` after each epoch and draws with these functions.
"""
import argparse
import contextlib
import csv
import ctypes
import errno
import json
import math
import os
import re
import sys
import textwrap
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.text import Text
from torchvision.utils import save_image

import data
import losses
import models


class UsageError(ValueError):
    """An error in the user's input: one line that names the value and what was expected."""


class Stopped(RuntimeError):
    """A run that cannot continue (a loss that is not finite, a full disk): one line."""


USER_ERRORS = UsageError, models.NotationError, models.CheckpointError, data.DataError


def explain(error):
    """(exit status, one line) for an exception; raises it again where it is a defect of the program."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, USER_ERRORS):
        return 2, f"error: {error}"
    if isinstance(error, Stopped):
        return 1, f"stopped: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return 1, f"stopped: out of memory ({text}); a smaller --batch-size, --size or --train-size needs less"
    if isinstance(error, dist.DistError) or type(error) is RuntimeError and re.search("gloo|NCCL", text):
        return 1, f"stopped: another process has ended ({text})"
    if isinstance(error, OSError) and error.filename is not None:
        return 2, f"error: {error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, f"stopped: its output cannot be written: {error.strerror}"
    raise error


@contextlib.contextmanager
def errors(program):
    """Ends a command line with one line on stderr and a status: 2 for what the user can correct, 1 for
    a run that cannot continue, 130 for Ctrl-C; a closed pipe ends it quietly. An attribute `advice` of
    the exception is appended to the line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as with >&-
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")  # an output that is not Unicode has no ±
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # Python would complain once more when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (Exception, KeyboardInterrupt) as error:
        status, message = explain(error)
        print(f"{program}: {message}{getattr(error, 'advice', '')}", file=sys.stderr)
        sys.exit(status)


# ---------------------------------------------------------------- devices, precision, processes

def pick_device(name):
    """The torch.device of that name; "auto" is CUDA where there is a GPU, else the CPU. UsageError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {name}: unavailable on this machine, which has {torch.cuda.device_count()} "
                         "GPUs; expected auto, cpu, cuda or cuda:N") from None
    return device


def keep_freed_memory():
    """Makes glibc keep what is freed. By default it returns blocks of some MB to the system and
    requests them again, page by page, at every step: v1 trained at two thirds of its speed so."""
    with contextlib.suppress(AttributeError, TypeError, OSError):  # not glibc: nothing to do
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at its highest
        mallopt(-1, 2**30)       # M_TRIM_THRESHOLD


CPUINFO = Path("/proc/cpuinfo")


def pick_precision(name, device):
    """"bf16" or "fp32"; "auto" is bf16 where the device computes it faster in hardware: GPUs; CPUs with AMX;
    AMD's with AVX-512. Intel's with AVX-512 alone multiply bfloat16 at about half the speed of float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    text = CPUINFO.read_text() if CPUINFO.exists() else ""  # of Linux alone
    return "bf16" if "amx_bf16" in text or "AuthenticAMD" in text and "avx512_bf16" in text else "fp32"


def autocast(device, precision):
    """The context of a network's forward pass, and of an optimizer's matrix products."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def process():
    """(rank, processes): this process and how many train together (torchrun); else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def seconds(device):
    """time.perf_counter(), after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---------------------------------------------------------------- files and checkpoints

def write_whole(path, write):
    """Calls write(temporary path) beside `path` and moves the result into place, so that a
    file is either the old one or the new one, never a part. Raises Stopped."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # another process may write the same file
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the second one
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        raise Stopped(f"{path} cannot be written: {reason}") from None
    finally:
        part.unlink(missing_ok=True)


def make_output(folder):
    """The folder of a report, where there is none. UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {folder}: expected a folder to write to ({error.strerror})") from None


def write_json(path, content):
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))


class Needed(NamedTuple):
    default: object  # the value of a setting that a checkpoint does not have
    accepts: object  # a type, or a tuple of choices; None too, where it is the default
    low: float = -math.inf
    high: float = math.inf


# What of train.py's settings an evaluation needs. A checkpoint may come from anywhere.
NEEDED = {
    "version": Needed("v4", str), "dataset": Needed("cifar10", str), "data_dir": Needed("data", str),
    "size": Needed(None, int, 1, 1024), "margin": Needed(False, bool),
    "scale": Needed("imagenet", tuple(data.SCALES)), "classes": Needed(None, list),
    "train_size": Needed(None, int, 1), "test_size": Needed(None, int, 1),
    "test_share": Needed(0.2, float, 0.01, 0.9), "val_share": Needed(0.0, float, 0, 0.9),
    "labels": Needed(None, int, 1), "variant": Needed("complete", data.VARIANTS),
    "constrain": Needed(None, dict), "blur": Needed(0.0, float, 0, 10), "noise": Needed(0.0, float, 0, 10),
    "clean_test": Needed(False, bool), "flip": Needed(True, bool), "jigsaw_grid": Needed(4, int, 2, 32),
    "seed": Needed(0, int, 0, 2**31),
    "precision": Needed("auto", ("auto", "bf16", "fp32")),
    **{flag: Needed(term.default, float, 0) for flag, term in losses.TERMS.items()},
}


def fits(value, accepts, low=-math.inf, high=math.inf):
    """Whether a plain value is what a row of NEEDED accepts."""
    if isinstance(accepts, tuple):
        return type(value) is str and value in accepts
    if type(value) is not accepts and not (accepts is float and type(value) is int):
        return False
    if accepts is list:
        return all(type(each) is str for each in value)
    if accepts is dict:
        return all(type(name) is str and fits(share, float, 0, 1) for name, share in value.items())
    return accepts not in (int, float) or low <= value <= high


def load_checkpoint(path):
    """(model, content) of a checkpoint of train.py, on the CPU, in eval mode; content["settings"] is a
    Namespace of what NEEDED lists. Runs no code from the file. UsageError, CheckpointError."""
    if Path(path).is_dir():
        raise UsageError(f"{path}: is a folder; expected a checkpoint in it, such as {Path(path, 'best.pt')}")
    model, content = models.load(path)

    def require(holds, what):
        if not holds:
            raise UsageError(f"{path}: not a checkpoint of train.py ({what})")
    settings, parts = content.get("settings"), content.get("trained")
    require(type(settings) is dict, "it has no settings")
    require(type(content.setdefault("pool", {})) is dict, "its hashes of the data are not valid")
    values = {name: settings.get(name, needed.default) for name, needed in NEEDED.items()}
    for name, (default, *accepted) in NEEDED.items():
        value = values[name]
        require((value is None and default is None) or fits(value, *accepted), f"its setting {name} is not valid")
    printed = [*content["classes"], *(values[name] for name in ("version", "dataset", "data_dir"))]
    require(not re.search(r"[\x00-\x1f\x7f-\x9f]", "".join(printed)), "its names have control characters")
    require(fits(content.get("epoch"), int, 1), "it has no epoch")
    there = [part for part in ("classifier", "decoder") if getattr(model, part) is not None]
    require(type(parts) is list and parts and all(part in there for part in parts), "it does not say what is trained")
    shape = content.get("image_shape")
    require(type(shape) is list and len(shape) == 3 and all(fits(side, int, 1, 10_000) for side in shape),
            "it has no image shape")
    size = values["size"]
    require(list(model.version.in_shape) == ([shape[0], size, size] if size else shape),
            "its network is of another size")
    require(not values["delta"] or not any(side % values["jigsaw_grid"] for side in model.version.in_shape[1:]),
            "its jigsaw grid does not divide the images")
    content["settings"] = Namespace(**values | {"classes": content["classes"]})  # others may be there by now
    return model, content


def prepare_data(s, test_only=False, channels=None):
    """The data.Dataset of settings (a Namespace), on the CPU; channels: of the network. Raises DataError."""
    size = s.size * 8 // 7 if s.size and s.margin else s.size  # of a folder's pictures, as they are read
    dataset = data.load(s.dataset, s.data_dir, size=size, classes=s.classes, train_size=s.train_size,
                        test_size=s.test_size, test_share=s.test_share, val_share=s.val_share, labels=s.labels,
                        variant=s.variant, constrain=s.constrain, blur=s.blur, seed=s.seed, test_only=test_only)
    if channels == 3 and "image folder" in dataset.source:  # of a coloured folder all test pictures may be grey
        dataset = dataset.map(lambda split: data.Split(split.images.expand(-1, 3, -1, -1), split.labels))
    return dataset


# ---------------------------------------------------------------- measures

def loss_weights(s):
    """The weights of the loss's terms, by flag."""
    return {flag: getattr(s, flag) for flag in losses.TERMS}


def classifies(s):
    """Whether a run of these settings trains a classifier."""
    return "logits" in losses.needed(loss_weights(s))


def rebuilds(s):
    """Whether a run of these settings trains a decoder."""
    return bool({"reconstruction", "jigsaw_reconstruction"} & losses.needed(loss_weights(s)))


def preparation(s):
    """How settings bring images to the network: arguments of data.batches and data.normalise."""
    return {"size": s.size, "margin": s.margin, "scale": s.scale}


def test_noise(s):
    """The noise on test images: standard deviation, on pixels of 0-1."""
    return 0.0 if s.clean_test else s.noise


def forward(net, inputs, s, wanted, order=None):
    """What the loss's terms need from one batch of inputs (B, C, H, W): a dict of tensors, of those
    named in `wanted`. order: of the jigsaw's tiles, (B, grid * grid)."""
    with autocast(inputs.device, s.precision):
        outputs = net(inputs, classify="logits" in wanted, reconstruct="reconstruction" in wanted,
                      posterior="mean" in wanted)
        tensors = dict(zip(("logits", "reconstruction", "mean", "log_variance"), outputs))
        if "jigsaw_reconstruction" in wanted:
            jumbled = losses.jumble(inputs, s.jigsaw_grid, order)
            tensors["jigsaw_reconstruction"] = net(jumbled, classify=False)[1]
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def batch_sums(tensors, inputs, images, labels, s):
    """Sums over a batch, by name: every loss term that the tensors allow, right answers, errors."""
    tensors, count = tensors | {"images": images, "labels": labels}, len(labels)
    sums = {term.name: count * term.loss(*(tensors.get(name) for name in term.needs))
            for term in losses.TERMS.values() if set(term.needs) - set(losses.OPTIONAL) <= set(tensors)}
    if "reconstruction" in tensors:
        pixels = data.to_pixels(images, s.scale)
        found = losses.reconstruction_errors(data.to_pixels(tensors["reconstruction"], s.scale), pixels)
        if inputs is not images:
            noisy = data.to_pixels(inputs, s.scale)
            found["noisy_psnr"] = losses.reconstruction_errors(noisy, pixels)["psnr"]
        sums |= {name: values.double().sum() for name, values in found.items()}
    return sums


def images_at_once(split, s):
    """Images in a batch that is not trained on: 100; on a GPU, where the CPU takes longer to start the kernels of a
    small batch than they run, as many as have four million pixels, from 100 to 1000."""
    if split.images.device.type == "cpu":
        return 100
    return min(1000, max(100, 4_096_000 // (s.size ** 2 if s.size else math.prod(split.images.shape[2:]))))


@torch.no_grad()
def measure(model, split, s, classify=True, reconstruct=True, mirrored=False, batch_size=None):
    """A model's losses and errors on a Split, as plain numbers in a dict.

    The loss terms by name (classifier, autoencoder, ..., each where the model allows it); accuracy in
    percent; with mirrored=True accuracy_mirrored, for which the logits of each image and its mirror image
    are averaged; confusion: counts, [true class][predicted class]; and the mean over the images of
    losses.reconstruction_errors, on pixels of 0-1, the reconstruction clamped to them as in a saved
    picture. With noise in the settings the network sees noisy images (the same at every call), the
    errors are against the clean ones, and noisy_psnr is the input's own. Several processes measure
    their shares and get the result of all.
    """
    training = model.training
    model.eval()
    device, n, (rank, processes) = split.labels.device, len(split.labels), process()
    if n < processes:
        rank, processes = 0, 1  # each of them measures all
    wanted = {"logits"} if classify and model.classifier is not None else set()
    if reconstruct and model.decoder is not None:
        wanted |= {"reconstruction"} | ({"jigsaw_reconstruction"} if s.delta else set())
    if model.variational and (s.kl or "reconstruction" in wanted):
        wanted |= {"mean"}
    noise, generator = test_noise(s), torch.Generator(device).manual_seed(0)
    orders = torch.empty(n, 0)
    if "jigsaw_reconstruction" in wanted:
        orders = torch.rand(n, s.jigsaw_grid ** 2, generator=torch.Generator().manual_seed(0)).argsort(1)
    share = data.Split(*(tensor[rank::processes] for tensor in split)) if processes > 1 else split
    batch_size = batch_size or images_at_once(share, s)
    orders, bounds = orders[rank::processes].to(device), data.batch_bounds(len(share.labels), batch_size, 1)
    totals, confusion = {}, torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64, device=device)
    for (images, labels), (start, stop) in zip(data.batches(share, batch_size, **preparation(s)), bounds):
        inputs = data.add_noise(images, noise, generator, s.scale) if noise else images
        tensors = forward(model, inputs, s, wanted, orders[start:stop])
        if "logits" in wanted:
            confusion += losses.confusion_matrix(labels, tensors["logits"].argmax(1), model.num_classes)
        sums = batch_sums(tensors, inputs, images, labels, s)
        if mirrored and "logits" in wanted:
            both = tensors["logits"].float() + forward(model, inputs.flip(3), s, {"logits"})["logits"].float()
            sums["accuracy_mirrored"] = 100 * (both.argmax(1) == labels).sum()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value.double()
    model.train(training)
    sums = torch.stack(list(totals.values()))
    if processes > 1:
        dist.all_reduce(sums)
        dist.all_reduce(confusion)
    result = dict(zip(totals, (sums / n).tolist()))
    if "logits" in wanted:
        result |= {"accuracy": 100 * confusion.trace().item() / n, "confusion": confusion.tolist()}
    return result


@torch.no_grad()
def encode(model, split, s, batch_size=None):
    """The codes of a Split's images, flat: (N, values) float32, on its device."""
    model.eval()
    codes = []
    for images, _ in data.batches(split, batch_size or images_at_once(split, s), **preparation(s)):
        with autocast(images.device, s.precision):
            codes.append(model.encode(images).flatten(1).float())
    return torch.cat(codes)


@torch.no_grad()
def rebuild(model, inputs, s):
    """The pixels (B, C, H, W) of 0-1 that the model reconstructs from normalised images."""
    model.eval()
    with autocast(inputs.device, s.precision):
        _, rebuilt = model(inputs, classify=False)
    return data.to_pixels(rebuilt, s.scale)


def image_errors(model, split, s, batch_size=None):
    """The mean squared error of each image's reconstruction, on pixels of 0-1: (N,)."""
    return torch.cat([losses.reconstruction_errors(rebuild(model, images, s), data.to_pixels(images, s.scale))["mse"]
                      for images, _ in data.batches(split, batch_size or images_at_once(split, s), **preparation(s))])


def vote(labels, classes):
    """The class that most of the neighbours have, of equally frequent ones the nearest's: labels
    (Q, k), nearest first -> (Q,)."""
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
        neighbours = rest.labels[data.nearest(held.images, rest.images, max(ks))]
        right = [(vote(neighbours[:, :k], classes) == held.labels).sum().item() for k in ks]
        k = ks[right.index(max(right))]
    start = seconds(points.device)
    neighbours = labels[data.nearest(queries, points, k)]
    right = (vote(neighbours, classes) == answers).sum().item()
    return {"k": k, "accuracy": 100 * right / len(answers), "seconds": seconds(points.device) - start}


# ---------------------------------------------------------------- pictures of a model

def save_figure(figure, path):
    """A matplotlib Figure as a PNG, with all of it inside, which its layout alone does not guarantee."""
    for text in figure.findobj(Text):  # a name may have two $
        text.set_parse_math(False)
    write_whole(path, lambda part: figure.savefig(part, dpi=150, bbox_inches="tight", format="png"))


def save_picture(pixels, path):
    """Pixels (C, H, W) of 0-1 as a PNG."""
    write_whole(path, lambda part: save_image(pixels, part, format="png"))


def file_name(text):
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-") or "_"


def draw_sheet(rows, names, path, title):
    """A sheet of pictures. rows: a list of (name, pictures (N, C, H, W) of 0-1), one below the other;
    names: of the N columns. More than ten columns continue in a further band of rows."""
    columns = min(10, len(names))
    bands = math.ceil(len(names) / columns)
    margin = 0.15 + 0.075 * max(len(name) for name, _ in rows)  # inches, for the rows' names
    names = ["\n".join(textwrap.wrap(name, 14 * max(columns, 4) // columns, max_lines=2, placeholder="…"))
             for name in names]  # 14 letters are an inch
    second = 0.14 * any("\n" in name for name in names)  # inches, for a second line of names
    width, height = max(columns, 4) + margin, (len(rows) + 0.2 + second) * bands + 0.35
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(len(rows) * bands, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, name in enumerate(names):
        band, column = len(rows) * (i // columns), i % columns
        axes[band, column].set_title(name, fontsize=8, pad=3)
        for row, (_, pictures) in enumerate(rows):
            pixels = pictures[i].permute(1, 2, 0).expand(-1, -1, 3).cpu().numpy()
            axes[band + row, column].imshow(pixels, interpolation="nearest")
    for row, axis in enumerate(axes[:, 0]):
        axis.text(-0.08, 0.5, rows[row % len(rows)][0], transform=axis.transAxes, ha="right", va="center",
                  fontsize=8)
    figure.suptitle(title, fontsize=10, x=(margin / width + 0.995) / 2, y=1 - 0.05 / height, va="top")
    figure.subplots_adjust(left=margin / width, right=0.995, bottom=0.02, top=1 - (0.42 + second) / height,
                           wspace=0.06, hspace=0.06 if bands == 1 else 0.25 + second)  # room for the names
    save_figure(figure, path)


def first_of_each(dataset):
    """(rows, class names) of the first test image of each class that has one."""
    labels = dataset.test.labels.tolist()
    rows = [labels.index(label) for label in range(len(dataset.classes)) if label in labels]
    return rows, [dataset.classes[labels[row]] for row in rows]


def test_inputs(images, s):
    """(normalised test images (B, C, H, W) as the network sees them, with the noise of the settings; the rows of a
    sheet that show them, none without noise)."""
    if not test_noise(s):
        return images, []
    inputs = data.add_noise(images, test_noise(s), torch.Generator(images.device).manual_seed(0), s.scale)
    return inputs, [("with noise", data.to_pixels(inputs, s.scale))]


def draw_reconstructions(model, dataset, s, folder, note=""):
    """recon.png: the first test image of each class above its reconstruction (between them with
    its noise, where the settings have any); recon/ with each pair as files <index>_<class>.png and
    <index>_<class>_recon.png; and jigsaw.png where the jigsaw loss was trained."""
    chosen, names = first_of_each(dataset)
    device = dataset.test.images.device
    images = data.normalise(dataset.test.images[chosen], **preparation(s))
    inputs, noisy = test_inputs(images, s)
    originals, rebuilt = data.to_pixels(images, s.scale), rebuild(model, inputs, s)
    draw_sheet([("original", originals), *noisy, ("reconstruction", rebuilt)], names, folder / "recon.png",
               f"{s.version} on {dataset.name}: test images and their reconstructions{note}")

    (folder / "recon").mkdir(exist_ok=True)
    for index, name, original, picture in zip(chosen, names, originals, rebuilt):
        stem = f"{index}_{file_name(name)}"
        save_picture(original, folder / "recon" / f"{stem}.png")
        save_picture(picture, folder / "recon" / f"{stem}_recon.png")

    if s.delta:
        tiles = torch.rand(len(chosen), s.jigsaw_grid ** 2, generator=torch.Generator().manual_seed(0)).argsort(1)
        jumbled = losses.jumble(inputs, s.jigsaw_grid, tiles.to(device))
        draw_sheet([("original", originals), ("jumbled", data.to_pixels(jumbled, s.scale)),
                    ("reconstruction", rebuild(model, jumbled, s))], names, folder / "jigsaw.png",
                   f"{s.version} on {dataset.name}: test images rebuilt from jumbled tiles")


def draw_synthetic(dataset, folder):
    """smote.png: of each class that SMOTE filled up, a column of synthetic images."""
    images, labels = (tensor[-dataset.synthetic:].cpu() for tensor in dataset.train)
    columns = [images[labels == label][:6] / 255 for label in range(len(dataset.classes)) if label in labels]
    names = [name for label, name in enumerate(dataset.classes) if label in labels]
    draw_sheet([("", torch.stack(row)) for row in zip(*columns)], names, folder / "smote.png",
               f"{dataset.name}: synthetic training images")


def draw_variational(model, dataset, s, folder):
    """prior.png: images decoded from draws of the prior; walk.png: between the codes of pairs of test
    images, in even steps."""
    device, generator = dataset.test.images.device, torch.Generator().manual_seed(0)

    @torch.no_grad()
    def decode(codes):
        with autocast(device, s.precision):
            return data.to_pixels(model.eval().decoder(codes.to(device)), s.scale)
    rows = [("", decode(torch.randn(10, *model.code_shape, generator=generator))) for _ in range(6)]
    draw_sheet(rows, [""] * 10, folder / "prior.png",
               f"{s.version} on {dataset.name}: images decoded from draws of the prior")
    chosen = random_rows(dataset.test, 12)
    codes = encode(model, data.Split(*(tensor[chosen] for tensor in dataset.test)), s).cpu()
    steps = torch.linspace(0, 1, 10)[:, None]
    rows = [("", decode(one.lerp(other, steps))) for one, other in zip(codes[0::2], codes[1::2])]
    if rows:
        draw_sheet(rows, [f"{step:.2f}" for step in steps.flatten().tolist()], folder / "walk.png",
                   f"{s.version} on {dataset.name}: codes in steps from one test image's (0) to another's (1)")


def random_rows(split, count):
    """Rows of at most that many images of a Split, always the same."""
    return torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(0))[:count]


MARKERS = "os^Dv<>p*hXP+x1234|_"


def draw_plane(codes, labels, classes, path, title):
    """Codes (N, D) as points in the plane, by class: as they are where D is 2, else on their first
    two principal components."""
    x, axes = codes.double().cpu(), ("first value of the code", "second value of the code")
    if x.shape[1] != 2:
        x = x - x.mean(0)
        values, vectors = torch.linalg.eigh(x @ x.T)  # of N x N: codes may be longer than N
        total = values.clamp(min=0).sum().item() or 1.0
        x = vectors[:, -2:].flip(1) * values[-2:].flip(0).clamp(min=0).sqrt()
        axes = [f"{which} principal component ({100 * value / total:.0f} % of the variance)"
                for which, value in zip(("first", "second"), values[-2:].flip(0).tolist())]
    figure = Figure(figsize=(7, 6))
    axis, labels = figure.subplots(), labels.cpu()
    shown = classes[:len(MARKERS)]
    if len(classes) > len(shown):
        title += f",\nshown are the {(labels < len(shown)).sum()} of the first {len(shown)} of {len(classes)} classes"
    for label, name in enumerate(shown):
        points = x[labels == label]
        axis.plot(points[:, 0], points[:, 1], MARKERS[label], markersize=3, linestyle="", alpha=0.6,
                  label=f" {name}", color=f"C{label % 10}")  # matplotlib leaves out a label that begins with _
    axis.set(title=title, xlabel=axes[0], ylabel=axes[1])
    axis.legend(fontsize=8, markerscale=2, bbox_to_anchor=(1.01, 1), loc="upper left")
    save_figure(figure, path)


def draw_confusion(confusion, classes, path, title):
    """Counts [true][predicted] as a picture, in percent of each true class."""
    counts = np.asarray(confusion, dtype=float)
    share = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    few = len(classes) <= 20
    side = 1.6 + 0.5 * len(classes) if few else 9
    figure = Figure(figsize=(side + 1, side))
    axis = figure.subplots()
    picture = axis.imshow(share, cmap="Greys", vmin=0, vmax=100)
    if few:
        axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axis.set_yticks(range(len(classes)), classes)
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.05:
                axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7,
                          color="white" if value > 55 else "black")
    number = "" if few else " (its number in the list of classes, from 0)"
    axis.set(xlabel=f"predicted class{number}", ylabel=f"true class{number}", title=title)
    figure.colorbar(picture, label="% of the true class", fraction=0.046)
    save_figure(figure, path)


# ---------------------------------------------------------------- runs, by their logs

class Run(NamedTuple):
    folder: Path
    settings: dict  # of config.json
    rows: list      # of log.csv: dicts of floats, None where a cell is empty
    metrics: dict   # of metrics.json
    network: str    # of config.json: a row of VERSIONS may have changed
    images: str     # its test images, or those from which the seed draws them, by hashes: files may have changed
    train: str      # its training images by a hash; None where the seed draws them


# Settings in which repetitions of one run may differ.
INCIDENTAL = "seed", "name", "device", "data_dir"
# Settings on which the network depends, beside the data set's.
SHAPING = "version", "encoder", "classifier", "decoder", "skip", "pretrained"


def chosen_on(rows):
    """"val" or "test": which images choose the best epoch."""
    return "test" if rows[0].get("val_accuracy") is None and rows[0].get("val_mse") is None else "val"


def best_row(rows):
    """The row of a log with the highest accuracy or, where no classifier was trained, the least MSE,
    the last one where epochs tie: on held-out images where there are any, else on the test images."""
    part = chosen_on(rows)
    classified = [row for row in rows if row[f"{part}_accuracy"] is not None]
    if classified:
        return max(reversed(classified), key=lambda row: row[f"{part}_accuracy"])
    return min(reversed(rows), key=lambda row: row[f"{part}_mse"])


def read_run(folder):
    """A Run, from the folder that train.py left. UsageError."""
    folder = Path(folder)
    try:
        with open(folder / "log.csv", newline="") as file:
            rows = [{key: float(value) if value else None for key, value in row.items()}
                    for row in csv.DictReader(file)]
        best_row(rows)["train_classifier"]
        config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
        s = config["settings"]
        if metrics["epochs"] != s["epochs"] or "seed" not in s:
            raise ValueError
        images, pool = config.get("digests", {}).get("test"), config.get("pool")
        if pool:  # test images that the seed draws differ within a group
            images = repr([pool, *(s.get(name) for name in ("test_size", "test_share", "blur"))])
        drawn = pool or s.get("train_size") or s.get("val_share") or s.get("variant", "complete") != "complete"
        train = None if drawn else config.get("digests", {}).get("train")
        return Run(folder.resolve(), s | {"precision": config["precision"]}, rows, metrics,
                   json.dumps(config.get("network")), images, train)
    except (OSError, KeyError, ValueError, IndexError, TypeError, AttributeError, csv.Error) as error:
        raise UsageError(f"{folder}: not the folder of a finished run; expected config.json, log.csv and "
                         f"metrics.json ({getattr(error, 'strerror', None) or 'unreadable'})") from None


def finished(folder):
    """Whether a folder (or None) is that of a run whose last epoch is done: metrics.json is of all its epochs."""
    try:
        config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
        return metrics["epochs"] == config["settings"]["epochs"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def integer_axis(axis):
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def draw_curves(rows, path, title, only_in_training=""):
    """Train and test losses and accuracy over the epochs, one panel for each that there is. only_in_training: what
    the training's classifier loss has and the test's has not, for the legend: "smoothed labels"."""
    panels = [(f"{term.name} loss", term.name, term.unit) for term in losses.TERMS.values()]
    panels = [panel for panel in (*panels, ("accuracy", "accuracy", "accuracy (%)"))
              if any(row.get(f"test_{panel[1]}") is not None for row in rows)]
    epochs = [row["epoch"] for row in rows]
    alone = sum(row["test_accuracy"] is None for row in rows)  # separate training's first part
    figure = Figure(figsize=(4.2 * len(panels), 4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # inches
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (name, key, unit) in zip(axes[0], panels):
        for part, style, colour in (("train", "-", "C0"), ("test", "--", "C1")):
            values = [row[f"{part}_{key}"] for row in rows]
            if not any(value is not None for value in values):
                continue
            single = sum(value is not None for value in values) == 1
            noted = only_in_training and key == "classifier" and part == "train"
            label = f"{part} ({only_in_training})" if noted else part
            axis.plot(epochs, values, style, color=colour, label=label, marker="o" if single else None,
                      markerfacecolor=colour if part == "train" else "white")
        if key == "accuracy":
            best = best_row(rows)
            axis.plot(best["epoch"], best["test_accuracy"], "k^", markersize=6,
                      label=f"test at the best epoch (on {chosen_on(rows)}): {best['test_accuracy']:.2f} %")
        if 0 < alone < len(rows):
            axis.axvline(alone + 0.5, color="0.5", linestyle=":", label="classifier from here")
            axis.set_xlim(0.5, len(rows) + 0.5)
        axis.set(title=name, xlabel="epoch", ylabel=unit)
        integer_axis(axis)
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))  # below: on no curve
    figure.suptitle(title)
    save_figure(figure, path)


# ---------------------------------------------------------------- many runs, compared

def t_quantile(freedom, level=0.95):
    """The t with probability `level` between -t and t, for Student's distribution with that many
    degrees of freedom (any number from 1): with t = sqrt(freedom) tan(a) the density of the angle a
    is proportional to cos(a)^(freedom - 1)."""
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(level, mass / mass[-1], angle))


def mean_interval(values):
    """(mean, half the width of its 95 % t interval) of two or more numbers."""
    values = np.asarray(values, dtype=float)
    return values.mean(), t_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))


def difference_interval(values, reference):
    """(mean difference, half the width of its 95 % interval, number of pairs) of two groups, dicts from seed
    to number; None where one has a single run. Two or more common seeds are paired, the others left out;
    else, with 0 pairs, Welch's interval for independent samples."""
    common = sorted(set(values) & set(reference))
    if len(common) > 1:
        return *mean_interval([values[seed] - reference[seed] for seed in common]), len(common)
    if min(len(values), len(reference)) < 2:
        return None
    a, b = (np.asarray(list(group.values()), dtype=float) for group in (values, reference))
    variances = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    total = sum(variances)
    freedom = total**2 / (variances[0]**2 / (len(a) - 1) + variances[1]**2 / (len(b) - 1)) if total else 1
    return a.mean() - b.mean(), t_quantile(freedom) * math.sqrt(total), 0


def verdict(interval):
    """What a difference shows: "better" or "worse" only where its interval excludes 0, and has a width: few test
    images can give equal differences by chance."""
    if interval is None or not 0 < interval[1] < abs(interval[0]):
        return "not shown"
    return "better" if interval[0] > 0 else "worse"


def collect(paths):
    """The Runs of run folders, or of folders of them; unfinished ones of a folder are named and left
    out. UsageError."""
    runs = []
    for path in map(Path, paths):
        inner = sorted(each.parent for each in path.glob("[!.]*/config.json"))
        if (path / "config.json").exists() or not inner:
            runs.append(read_run(path))
            continue
        for folder in inner:
            if finished(folder):
                runs.append(read_run(folder))
            else:
                print(f"evaluate.py: {folder} is left out: it has not finished", file=sys.stderr)
    if not runs:
        raise UsageError(f"{' '.join(map(str, paths))}: no finished run there")
    return list({run.folder: run for run in runs}.values())


def kind_of(settings, *ignored):
    """The settings of a run as JSON, without INCIDENTAL and `ignored`: equal for runs that repeat each other."""
    return json.dumps({key: value for key, value in settings.items()
                       if value is not None and value is not False and key not in (*INCIDENTAL, *ignored)},
                      sort_keys=True)


def group_runs(runs):
    """{name: {seed: Run}}, runs of one network on one data set that differ in their seed alone in one group. A name is
    the folder's, less what all groups have in it; groups of one name are told apart by their parent folders. Of runs
    with the same seed the last one counts."""
    kinds = {}
    for run in runs:
        seed, kind = run.settings["seed"], (kind_of(run.settings), run.network, run.images, run.train)
        seeds = kinds.setdefault(kind, {})
        if seed in seeds:
            print(f"evaluate.py: {seeds[seed].folder} is left out: {run.folder.name} repeats it", file=sys.stderr)
        seeds[seed] = run
    groups = {}
    for seeds in kinds.values():
        folder = next(iter(seeds.values())).folder
        name = re.sub(r"(_seed\d+)?(_run\d+)?$", "", folder.name)
        while name in groups:
            folder = folder.parent
            name = f"{folder.name}/{name}" if folder.name else f"{name}'"
        groups[name] = seeds
    shared = set.intersection(*(set(name.split("_")[1:]) for name in groups)) if len(groups) > 1 else set()
    short = {"_".join(part for i, part in enumerate(name.split("_")) if i == 0 or part not in shared): seeds
             for name, seeds in groups.items()}
    return short if len(short) == len(groups) else groups


def result_of(run, key):
    """A figure of a run by its dotted name in metrics.json, else None."""
    value = run.metrics
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def spread(group, key, digits, unit=""):
    """The figure of a group's runs as text: a number, or mean ± standard deviation."""
    values = [result_of(run, key) for run in group.values()]
    if None in values:
        return ""
    repeated = len(values) > 1 and key not in ("code", "parameters", "megabytes")  # which the seed does not change
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if repeated else ""
    return f"{np.mean(values):,.{digits}f}{deviation}{unit}"


COLUMNS = [("accuracy (%)", "accuracy.last", 2), ("best (%)", "accuracy.best", 2),
           ("mirrored (%)", "accuracy.mirrored", 2), ("MSE", "reconstruction.mse", 6),
           ("PSNR (dB)", "reconstruction.psnr", 2), ("code", "code", 0), ("parameters", "parameters", 0),
           ("MB", "megabytes", 1), ("s per epoch", "seconds_per_epoch", 1)]


def references(groups, against):
    """{name: name of the group that it is compared with}. against: a group's name, or SETTING=VALUE: each
    group with the one that differs from it in that setting alone. UsageError."""
    flag, _, value = against.partition("=")
    if not value:
        if against not in groups:
            raise UsageError(f"--against {against}: expected SETTING=VALUE or one of {' '.join(groups)}")
        return {name: against for name in groups if name != against}
    setting = flag.replace("-", "_")
    pairs, firsts = {}, {name: next(iter(group.values())) for name, group in groups.items()}
    if not any(setting in run.settings for run in firsts.values()):
        raise UsageError(f"--against {against}: {flag} is no setting of these runs")
    for name, run in firsts.items():
        if names_value(value, run.settings.get(setting)):  # of another network or of other images than its like
            continue
        found = [other for other, candidate in firsts.items()
                 if names_value(value, candidate.settings.get(setting))
                 and kind_of(candidate.settings, setting) == kind_of(run.settings, setting)
                 and (candidate.network == run.network or setting in (*SHAPING, *SHOWN))]
        same = [other for other in found if firsts[other].images == run.images
                and (firsts[other].train == run.train or None in (firsts[other].train, run.train))]
        # Other images only where the setting itself makes them different, and one reference is meant.
        if same or len(found) == 1 and setting in SHOWN:
            pairs[name] = (same or found)[-1]
    if not pairs:
        raise UsageError(f"--against {against}: no two groups differ in {flag} alone, one of them with {value}")
    return pairs


def names_value(text, value):
    """Whether a text names a setting's value as its flag has it: 0.20 is 0.2; a switch is yes or no."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    if isinstance(value, dict):
        value = [f"{name}={share:g}" for name, share in value.items()]
    value = ",".join(value) if isinstance(value, list) else f"{value}"
    return text == {"True": "yes", "False": "no"}.get(value, value)


def differences(groups, pairs, key):
    """{name: the difference_interval of a group and its reference}, where there is one, in the figure `key` of
    metrics.json; pairs: the name of each one's reference."""
    values = {name: {seed: result_of(run, key) for seed, run in group.items()} for name, group in groups.items()}
    return {name: interval for name, other in pairs.items()
            if None not in (*values[name].values(), *values[other].values())
            and (interval := difference_interval(values[name], values[other]))}


def table_row(name, groups, reference, found, asked):
    """The row of a group in a comparison, a dict of texts by column. reference: the name of the group that it is
    compared with, or None; found: their difference_interval; asked: whether the user named the reference."""
    row = {"run": name, "n": str(len(groups[name]))}
    row |= {title: spread(groups[name], *column) for title, *column in COLUMNS}
    row |= {"difference": "", "result": "", "compared with": ""}
    if found:
        mean, half, pairs = found
        all_paired = pairs == len(groups[name]) == len(groups[reference])
        note = "" if all_paired else f" ({pairs} pairs)" if pairs else " (unpaired)"
        row["difference"] = f"{mean:+.2f} ± {half:.2f}{note}"
        row |= {"result": verdict(found), "compared with": reference}
    elif reference and asked:
        row |= {"difference": "needs two runs of each", "compared with": reference}
    return row


PRINTED = {"run", "n", "accuracy (%)", "PSNR (dB)", "difference", "result"}  # the others would not fit


def compare(paths, output, against=None):
    """Groups runs that differ in their seed alone; prints a table of their results with differences
    and 95 % intervals, and saves the whole of it with pictures in `output`: comparison.md, comparison.png,
    and sheet.png where all reconstruct the same data. Returns the groups."""
    groups = group_runs(collect(paths))
    first = next(iter(groups))
    pairs = references(groups, against or first)
    key = "accuracy.last" if all("accuracy" in run.metrics for group in groups.values()
                                 for run in group.values()) else "reconstruction.psnr"
    found = differences(groups, pairs, key)
    rows = [table_row(name, groups, pairs.get(name), found.get(name), bool(against)) for name in groups]
    columns = [title for title in rows[0] if any(row[title] for row in rows)]  # no empty ones
    what = "accuracy (%)" if key.startswith("accuracy") else "PSNR (dB)"
    chosen = sorted({chosen_on(run.rows) for group in groups.values() for run in group.values()})
    notes = ["Accuracy and errors are of the last epoch; ±: standard deviation of the n runs",
             "of a row, which differ in their seed alone."]
    if "difference" in columns:
        notes += [f"difference: in {what}, from {against or first};",
                  "± half the 95 % t interval; runs of the same seed are paired. The intervals are",
                  "not corrected for their number."]
        if any(next(iter(groups[name].values())).images != next(iter(groups[pairs[name]].values())).images
               for name in found):
            notes.append("Some of the groups compared have different test images.")
    more = {"best (%)": f"best: the best epoch, chosen on {' or '.join(chosen)}.",
            "mirrored (%)": "mirrored: logits of each image and its mirror image averaged."}
    shown = {title: max(len(title), *(len(row[title]) for row in rows)) for title in columns if title in PRINTED}
    for row in (dict(zip(columns, columns)), *rows):
        print("  ".join(f"{row[title]:{'<' if title == 'run' else '>'}{width}}"
                        for title, width in shown.items()).rstrip())
    print("\n".join(["", *notes]))
    table = [f"| {' | '.join(cells)} |" for cells in (columns, *([row[title] for title in columns] for row in rows))]
    lines = [table[0], "|" + "---|" * len(columns), *table[1:], "", *notes,
             *(text for title, text in more.items() if title in columns)]
    make_output(output)
    write_whole(output / "comparison.md", lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    draw_comparison(groups, found, f"{what}: difference from {against or first}", output / "comparison.png")
    draw_all(groups, output / "sheet.png")
    return groups


def draw_comparison(groups, found, what, path):
    """The groups' accuracy and PSNR: each run a dot, their mean with its 95 % interval; `found`, their `differences`
    in `what`; below, where the groups are few, their losses over the epochs (mean; the band is from the least to the
    most)."""
    panels = [(title, key) for title, key, _ in COLUMNS if key in ("accuracy.last", "reconstruction.psnr")
              and any(result_of(run, key) is not None for group in groups.values() for run in group.values())]
    curves = [term for term in losses.TERMS.values() if term.name in ("classifier", "autoencoder")
              and any(row.get(f"test_{term.name}") is not None for group in groups.values()
                      for run in group.values() for row in run.rows)] if len(groups) <= 6 else []
    height = 1.5 + 0.3 * len(groups)
    figure = Figure(figsize=(11, height + 4.4 * bool(curves)), layout="constrained")
    ratios = [height, 4.4] if curves else [height]
    parts = figure.subfigures(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
    parts[0].suptitle("each run (dots), and the mean of the runs that differ in their seed with its 95 % interval",
                      fontsize=10)
    axes = parts[0].subplots(1, len(panels) + bool(found), squeeze=False, sharey=True)[0]
    if found:
        places = [list(groups).index(name) for name in found]
        axes[-1].errorbar([mean for mean, *_ in found.values()], places, xerr=[half for _, half, _ in found.values()],
                          fmt="kd", markersize=5, capsize=3)
        axes[-1].axvline(0, color="0.5", linestyle=":")
        axes[-1].set(xlabel=textwrap.fill(what, 36))  # a name may be long
        axes[-1].grid(alpha=0.3)
    for axis, (title, key) in zip(axes, panels):
        for place, group in enumerate(groups.values()):
            values = [value for run in group.values() if (value := result_of(run, key)) is not None]
            axis.plot(values, [place] * len(values), ".", color="0.6" if len(values) > 1 else "k")
            if len(values) > 1:
                mean, half = mean_interval(values)
                axis.errorbar(mean, place, xerr=half, fmt="kd", markersize=5, capsize=3)
        axis.set(xlabel=title.replace("%", "% of the test images"), yticks=range(len(groups)),
                 yticklabels=list(groups), ylim=(len(groups) - 0.5, -0.5))
        axis.ticklabel_format(axis="x", useOffset=False)
        if key.startswith("accuracy"):  # an interval of two runs may be wider
            low, high = axis.get_xlim()
            axis.set_xlim(max(low, -2), min(high, 102))
        axis.grid(alpha=0.3)
    if curves:
        for axis, term in zip(parts[1].subplots(1, len(curves), squeeze=False)[0], curves):
            for i, (name, group) in enumerate(groups.items()):
                draw_band(axis, group, term.name, name, f"C{i}", MARKERS[i])
            band = "" if all(len(group) == 1 for group in groups.values()) else " (mean; band: all runs)"
            axis.set(title=f"{term.name} loss{band}", xlabel="epoch", ylabel=term.unit)
            integer_axis(axis)
            axis.grid(alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        parts[1].legend(handles, labels, fontsize=8, loc="outside lower center", ncols=2, handlelength=4)
    save_figure(figure, path)


def draw_band(axis, group, key, name, colour, marker):
    """A group's training (solid) and test (dashed) loss over the epochs, with a band over its runs."""
    for part, style in (("train", "-"), ("test", "--")):
        count = min(len(run.rows) for run in group.values())
        curves = np.array([[run.rows[i].get(f"{part}_{key}") for i in range(count)] for run in group.values()], float)
        epochs = np.arange(1, count + 1)
        axis.plot(epochs, curves.mean(0), style, color=colour, marker=marker, markersize=5,
                  markerfacecolor=colour if part == "train" else "white", markevery=max(1, count // 8),
                  label=f"{name}, {part}")
        axis.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)


# Settings on which the test images that a network sees depend.
SHOWN = ("dataset", "size", "margin", "scale", "classes", "test_size", "test_share", "blur", "noise", "clean_test",
         "seed")


def draw_all(groups, path):
    """sheet.png: the same test images as each group's first run reconstructs them; below, the noisy inputs, where
    there is noise, and the originals. Only where at most eight groups have trained decoders on one data set, and that
    is available."""
    loaded = []
    for name, group in groups.items():
        with contextlib.suppress(UsageError, models.CheckpointError):  # missing, damaged, of another version
            loaded.append((name, *load_checkpoint(next(iter(group.values())).folder / "last.pt")))
    views = {repr([getattr(content["settings"], name) for name in SHOWN]) for *_, content in loaded}
    path.unlink(missing_ok=True)
    if len(views) != 1 or len(loaded) != len(groups) or len(loaded) > 8 or any(
            "decoder" not in content["trained"] for *_, content in loaded):
        return
    s = loaded[0][2]["settings"]
    try:
        dataset = load_checked(*loaded[0][1:], True)
    except (data.DataError, UsageError):
        return  # no longer there, or changed
    chosen, names = (each[:10] for each in first_of_each(dataset))
    images = data.normalise(dataset.test.images[chosen], **preparation(s))
    inputs, noisy = test_inputs(images, s)
    rows = [(name, rebuild(model, inputs, content["settings"])) for name, model, content in loaded]
    draw_sheet([*rows, *noisy, ("original", data.to_pixels(images, s.scale))], names, path,
               f"{dataset.name}: reconstructions of test images")


# ---------------------------------------------------------------- python evaluate.py

def classify_pictures(model, content, paths, device, folder):
    """Prints each picture's most likely classes and saves it as the network saw it, with its
    reconstruction. The pictures are prepared as the test images are. Returns (a list of plain dicts,
    one for each picture; their codes (N, values))."""
    s, (channels, *shape) = content["settings"], content["image_shape"]
    for path in filter(os.path.isdir, paths):
        raise UsageError(f"--images {path}: is a folder; expected its pictures, such as {os.path.join(path, '*.jpg')}")
    images = [data.read_picture(path, channels, fit=shape, blur=s.blur) for path in paths]
    make_output(folder)
    results, codes = [], []
    for i, (path, image) in enumerate(zip(paths, images)):
        image = data.normalise(image.to(device), **preparation(s))
        result = {"image": str(path)}
        with torch.no_grad(), autocast(device, s.precision):
            logits, _ = model(image, reconstruct=False)
            codes.append(model.encode(image).flatten(1).float().cpu())
        if "classifier" in content["trained"]:
            chances = logits[0].float().softmax(0)
            best = chances.argsort(descending=True)[:3].tolist()
            result["classes"] = {content["classes"][k]: chances[k].item() for k in best}
            print(f"{path}: " + ", ".join(f"{name} {100 * chance:.1f}%"
                                          for name, chance in result["classes"].items()))
        if "decoder" in content["trained"]:
            stem = folder / f"{i}_{file_name(Path(path).stem)}"
            save_picture(data.to_pixels(image, s.scale)[0], Path(f"{stem}.png"))
            save_picture(rebuild(model, image, s)[0], Path(f"{stem}_recon.png"))
            result["reconstruction"] = f"{stem}_recon.png"
            print(f"{path}: reconstruction in {stem}_recon.png")
        results.append(result)
    return results, torch.cat(codes)


def match_classes(dataset, classes):
    """The Dataset with its labels renumbered to the order of the checkpoint's classes, by name (if need be,
    by its letters and digits alone). A set without names of its own keeps its numbers. UsageError."""
    if len(dataset.classes) != len(classes):
        raise UsageError(f"--dataset {dataset.name}: has {len(dataset.classes)} classes, the checkpoint "
                         f"{len(classes)}")
    if not dataset.named:
        return replace(dataset, classes=classes)
    keys = [dataset.classes, classes]
    if sorted(keys[0]) != sorted(keys[1]):
        keys = [[re.sub(r"[^a-z0-9]", "", name.lower()) for name in names] for names in keys]
    if sorted(keys[0]) != sorted(keys[1]) or len(set(keys[1])) < len(classes):
        different = next(name for name, key in zip(dataset.classes, keys[0])
                         if key not in keys[1] or keys[0].count(key) > 1 or keys[1].count(key) > 1)
        raise UsageError(f"--dataset {dataset.name}: its class {different!r} is none of the checkpoint's: "
                         f"{' '.join(classes)}")
    number = torch.tensor([keys[1].index(key) for key in keys[0]])
    return replace(dataset.map(lambda split: data.Split(split.images, number[split.labels])), classes=classes)


def load_test(model, content, device, with_train=False):
    """The checkpoint's Dataset (its test part, or both) on the device, checked against the network. UsageError."""
    dataset = load_checked(model, content, not with_train)
    if content["pool"] is not None and content.get("test", "") not in ("", data.digest(dataset, dataset.test)):
        print(f"evaluate.py: note: the test images of {dataset.source} are not those of the training, or decoded "
              "otherwise; they may be training images", file=sys.stderr)
    if set(content["classes"]) < set(dataset.classes):  # of another data set
        dataset = data.choose(dataset, content["classes"])
    return match_classes(dataset, content["classes"]).to(device)


def load_checked(model, content, test_only):
    """The Dataset of a checkpoint's settings, if the network takes its images. Where they are the training's own, but
    the test images may be others, of which some were trained on: UsageError. DataError."""
    s, wanted = content["settings"], tuple(model.version.in_shape)
    dataset = prepare_data(s, test_only, wanted[0])
    shape = tuple(dataset.test.images.shape[1:])
    if shape[0] != wanted[0] or (s.size is None and shape != wanted):
        raise UsageError(f"--dataset {s.dataset}: has images of {'x'.join(map(str, shape))}, the checkpoint takes "
                         f"{'x'.join(map(str, wanted))}")
    pool = content["pool"]  # None: of another data set than the training's
    if pool is None and dataset.test_drawn:
        print(f"evaluate.py: note: the test images of {s.dataset} are drawn from it; where the network was trained on "
              "a part of it, they may be training images", file=sys.stderr)
    elif pool is not None and (pool or dataset.test_drawn):
        changed = [name for name in content["classes"] if pool.get(name) != dataset.pool.get(name, "")]
        if changed:
            raise UsageError(f"{dataset.source}: the files of class {changed[0]!r} are not those of the training, so "
                             "that training images may be among the test images; expected the folder as it was, or "
                             "--dataset FOLDER with test images of its own")
    return dataset


def is_own(model, content, dataset):
    """Whether --dataset names the data that the checkpoint was trained on, which may have moved: by its test images."""
    s = Namespace(**vars(content["settings"]) | {"dataset": dataset})
    try:
        made = prepare_data(s, True, model.version.in_shape[0])
    except data.DataError:  # of other classes or too few images; or unreadable, which is said when it is used
        return False
    return data.digest(made, made.test) == content.get("test")


MEASURES = [("MSE", "mse", "{:.6f}"), ("MAE", "mae", "{:.5f}"), ("PSNR", "psnr", "{:.2f} dB"),
            ("PSNR of the noisy input", "noisy_psnr", "{:.2f} dB"),
            ("sum of |errors| per image", "absolute_error", "{:.2f}"),
            ("|sum of errors| per image", "net_error", "{:.2f}")]


def report(model, content, dataset, folder, ks):
    """Measures the checkpoint on the test images, draws, prints. ks: for kNN, or None. Returns plain
    values."""
    s, trained, count = content["settings"], content["trained"], len(dataset.test.labels)
    result = measure(model, dataset.test, s, "classifier" in trained, "decoder" in trained, mirrored=s.flip)
    print(f"{s.version} after epoch {content['epoch']}, on {count:,} test images of {dataset.name} "
          f"({dataset.source})")
    if "accuracy" in result:
        largest = max(map(sum, result["confusion"])) / count
        print(f"{'accuracy':<28}{result['accuracy']:>10.2f} %  (always the largest class: {100 * largest:.2f} %)")
        if s.flip:
            print(f"{'  with the mirror image':<28}{result['accuracy_mirrored']:>10.2f} %  (logits of both averaged)")
        result["per_class"] = losses.per_class(result["confusion"], dataset.classes)
        width = max(26, *map(len, dataset.classes))
        for name, value in result["per_class"].items():
            print(f"  {name:<{width}}" + ("no images" if value is None else f"{value:>10.2f} %"))
        draw_confusion(result["confusion"], dataset.classes, folder / "confusion.png",
                       f"{s.version} on {dataset.name}: accuracy {result['accuracy']:.2f} %")
    elif model.classifier is not None:
        print("accuracy: none, the classifier is not trained yet")
    if "mse" in result:
        print("reconstruction, on pixels of 0-1")
        for name, key, style in MEASURES:
            if key in result:
                number, _, unit = style.format(result[key]).partition(" ")
                print(f"  {name:<26}{number:>10} {unit}".rstrip())
        print(f"  {f'MSE on --scale {s.scale}':<26}{result['autoencoder']:>10.5f}")
        draw_reconstructions(model, dataset, s, folder)
        if model.variational:
            draw_variational(model, dataset, s, folder)
    elif model.decoder is not None:
        print("reconstruction: none, the decoder is not trained")
    rows = random_rows(dataset.test, 2000)
    sample = data.Split(*(tensor[rows] for tensor in dataset.test))
    if len(rows) > 2:
        draw_plane(encode(model, sample, s), sample.labels, dataset.classes, folder / "codes.png",
                   f"{s.version} on {dataset.name}: codes of {len(rows):,} test images")
    if ks:
        result["knn"] = report_knn(model, dataset, s, ks)
    return result


def check_knn(ks, count, variant):
    """UsageError where `knn` cannot choose among these ks with that many training images."""
    flag, several = f"--knn {','.join(map(str, ks))}", len(ks) > 1
    if several and variant in ("oversampled", "smote"):
        raise UsageError(f"{flag}: the training set has copies of its images, on which no k can be chosen; name one k")
    held_out = round(0.1 * count) if several else 0
    if max(ks) > count - held_out or several and not held_out:
        raise UsageError(f"{flag}: too few training images ({count:,}"
                         f"{', of which a tenth is held out to choose k' * several})")


def report_knn(model, dataset, s, ks):
    """kNN on the codes and on the raw pixels of the training images, printed side by side."""
    results, train = {}, dataset.labelled or dataset.train
    for name in ("codes", "pixels"):
        start = seconds(train.images.device)
        points, queries = ([encode(model, split, s) for split in (train, dataset.test)]
                           if name == "codes" else
                           [split.images.flatten(1) for split in (train, dataset.test)])
        encoding = seconds(points.device) - start
        found = knn(points, train.labels, queries, dataset.test.labels, ks, len(dataset.classes), s.seed)
        results[name] = found | {"values": points.shape[1], "seconds_to_encode": encoding}
        print(f"kNN on {name:<7}{points.shape[1]:>6} values, k {found['k']:<4}{found['accuracy']:>8.2f} %"
              f"{found['seconds']:>9.2f} s" + f" (and {encoding:.1f} s to encode)" * (name == "codes"))
    return results


def report_anomaly(model, content, device, name, folder):
    """How well the reconstruction error tells a class that the training left out: ROC AUC, with
    anomaly.png. Returns plain values."""
    s, classes = content["settings"], content["classes"]
    if "decoder" not in content["trained"]:
        raise UsageError(f"--anomaly {name}: the checkpoint's decoder is not trained (beta 0)")
    if name in classes:
        others = ",".join(each for each in classes if each != name)
        raise UsageError(f"--anomaly {name}: the checkpoint was trained with that class; train one without "
                         f"it: --classes {others}")
    s.classes = [*classes, name]
    try:
        dataset = load_checked(model, content, True).to(device)
    except data.DataError as error:  # that it has no such class
        raise UsageError(f"--anomaly {name}: {re.sub('^--classes [^:]*: ', '', str(error))}") from None
    unseen = dataset.test.labels == dataset.classes.index(name)
    if unseen.all() or not unseen.any():
        raise UsageError(f"--anomaly {name}: expected test images of that class and of others")
    make_output(folder)
    scores = image_errors(model, dataset.test, s)
    auc = losses.roc_auc(scores[unseen], scores[~unseen])
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    bins = torch.linspace(0, scores.quantile(0.99).item(), 40).numpy()
    for chosen, label, style in ((~unseen, "the trained classes", "-"), (unseen, f" {name}", "--")):
        axes[0].hist(scores[chosen].cpu().numpy(), bins, density=True, histtype="step", label=label,
                     linestyle=style)
    axes[0].set(title="reconstruction error", xlabel="MSE of an image (pixels of 0-1)", ylabel="density (1 / MSE)")
    axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)  # below: on no bar
    order = unseen[scores.argsort(descending=True)].cpu().double()
    axes[1].plot(((1 - order).cumsum(0) / (1 - order).sum()).numpy(), (order.cumsum(0) / order.sum()).numpy())
    axes[1].plot([0, 1], [0, 1], ":", color="0.5")
    axes[1].set(title=f"ROC, AUC {auc:.3f}", xlabel="share of the trained classes above the threshold",
                ylabel=f"share of {name} above the threshold")
    figure.suptitle(f"{s.version} on {dataset.name}, trained without {name}")
    save_figure(figure, folder / "anomaly.png")
    result = {"class": name, "auc": auc, "mse": scores[unseen].mean().item(),
              "mse_others": scores[~unseen].mean().item()}
    print(f"{s.version} on {dataset.name}: mean squared error of {name} {result['mse']:.6f}, of "
          f"the trained classes {result['mse_others']:.6f}\nROC AUC {auc:.4f}")
    return result


def write_codes(path, **arrays):
    """An .npz of plain arrays, which np.load reads without pickles."""
    def write(part):
        with open(part, "wb") as file:
            np.savez(file, **arrays)
    write_whole(path, write)
    print(f"saved codes in {path}: {' '.join(f'{name} {array.shape}' for name, array in arrays.items())}")


def evaluate(args):
    """What --ckpt asks for. Returns the folder of the report."""
    keep_freed_memory()
    model, content = load_checkpoint(args.ckpt)
    device, s = pick_device(args.device), content["settings"]
    if s.precision != "fp32":
        s.precision = pick_precision("auto", device)
    torch.backends.cudnn.allow_tf32 = s.precision != "fp32"
    if args.data_dir or not Path(s.data_dir).is_dir():
        s.data_dir = args.data_dir or "data"
    if args.dataset and is_own(model, content, args.dataset):
        s.dataset = args.dataset
    elif args.dataset:
        s.dataset, s.classes, s.test_size, s.train_size, content["pool"] = args.dataset, None, None, None, None
        s.labels, s.val_share, s.variant, s.constrain = None, 0.0, "complete", None
        s.flip = s.flip and args.dataset not in data.NEVER_FLIPPED
        height, width = model.version.in_shape[1:]
        s.size = height if height == width else s.size  # pictures of other sizes are scaled
    if args.codes and (not Path(args.codes).parent.is_dir() or Path(args.codes).suffix != ".npz"
                       or Path(args.codes).is_dir()):
        raise UsageError(f"--codes {args.codes}: expected a file named .npz to write in a folder that exists")
    model = model.to(device)
    of = f"-{file_name(Path(args.dataset).resolve().name)}" if args.dataset else ""
    folder = Path(args.output or Path(args.ckpt).parent / f"evaluation-{Path(args.ckpt).stem}{of}")
    if args.images:
        folder /= "images"
        result, codes = classify_pictures(model, content, args.images, device, folder)
        if args.codes:
            write_codes(args.codes, codes=codes.numpy(), files=np.array(args.images),
                        classes=np.array(content["classes"]))
    elif args.anomaly:
        folder /= f"anomaly-{file_name(args.anomaly)}"
        result = report_anomaly(model, content, device, args.anomaly, folder)
    else:
        dataset = load_test(model, content, device, with_train=bool(args.knn or args.codes))
        train = dataset.labelled or dataset.train
        if args.knn:
            check_knn(args.knn, len(train.labels), s.variant)
        make_output(folder)
        result = report(model, content, dataset, folder, args.knn)
        if args.codes:
            arrays = {f"{part}{name}": array for part, split in (("", dataset.test), ("train_", train))
                      for name, array in (("codes", encode(model, split, s).cpu().numpy()),
                                          ("labels", split.labels.cpu().numpy()))}
            write_codes(args.codes, **arrays, classes=np.array(content["classes"]))
    write_json(folder / "report.json", result)
    return folder


def nonempty(text):
    """An argparse type: any text but "", such as that of a shell's variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("'': expected a name or a path")
    return text


def numbers(text):
    """An argparse type: "1,3,5" as a list of whole numbers of at least 1."""
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers of at least 1, such as 5 or 1,3,5")
    return [int(each) for each in text.split(",")]


def fail(message):
    """An ArgumentParser's `error`."""
    advice = {"arguments": "; -h lists all flags",
              "one argument": "; a value that begins with - is written --flag=-..."}
    raise UsageError(message + "".join(text for words, text in advice.items() if words in message))


def make_parser():
    parser = argparse.ArgumentParser(description="Measures a checkpoint of train.py, or compares runs.",
                                     allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", type=nonempty, help="a checkpoint, e.g. outputs/v4/best.pt")
    source.add_argument("--compare", nargs="+", metavar="RUN", help="run folders, or folders of them: a table and "
                        "pictures of their results; runs that differ in their seed alone are one group")
    parser.add_argument("--against", type=nonempty, metavar="RUN", help="with --compare: the group that the others are "
                        "compared with (the first), or SETTING=VALUE, such as beta=0: each group with the one that "
                        "differs from it in that setting alone")
    parser.add_argument("--images", nargs="+", metavar="PICTURE",
                        help="classify and rebuild these pictures, scaled and cropped about the "
                        "centre to the network's size, instead of the test images")
    parser.add_argument("--knn", type=numbers, metavar="K[,K...]",
                        help="also classify by the k nearest training images, on codes and on raw pixels; of "
                        "several k the best on held-out training images")
    parser.add_argument("--anomaly", type=nonempty, metavar="CLASS", help="how well the reconstruction error tells "
                        "this class, which the training left out, from the others")
    parser.add_argument("--codes", type=nonempty, metavar="FILE.npz", help="write the codes and labels of the "
                        "test and the (labelled) training images, or the codes of --images, as plain arrays")
    parser.add_argument("--dataset", type=nonempty, help="another data set than the checkpoint's, with its "
                        "classes (others are left out); or where the checkpoint's own has moved")
    parser.add_argument("--data-dir", type=nonempty, help="where named sets are (default: where training found them)")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--output", type=nonempty, help="where the report goes (default: a folder evaluation-best "
                        "beside best.pt, named after --dataset too; comparison in a folder of runs, "
                        "comparison-RUN beside the first of several runs)")
    parser.error = fail
    return parser


# Flags, and those that have no effect beside them.
EXCLUDED = {"compare": ("images", "knn", "anomaly", "codes", "dataset", "data_dir", "device"),
            "images": ("knn", "anomaly", "dataset", "data_dir"), "anomaly": ("knn", "codes"), "ckpt": ("against",)}


def main(argv):
    with errors("evaluate.py"):
        args = make_parser().parse_args(argv)
        for flag, excluded in EXCLUDED.items():
            for other in excluded:
                if getattr(args, flag) and getattr(args, other):
                    raise UsageError(f"--{other.replace('_', '-')}: has no effect with --{flag}; leave one out")
        args.device = args.device or "auto"
        if args.compare:
            first = Path(args.compare[0]).resolve()
            of_run = first.with_name(f"comparison-{first.name}") if (first / "config.json").exists() else None
            folder = Path(args.output or of_run or first / "comparison")
            compare(args.compare, folder, args.against)
        else:
            folder = evaluate(args)
        print(f"saved in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
