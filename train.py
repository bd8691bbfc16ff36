"""Trains an autoencoder with a classifier on small images.

    python train.py --version v4              # on CIFAR-10, into outputs/v4/
    python train.py --version v4 --beta 0     # the classifier alone; the decoder is not trained
    python train.py --version v4 --seeds 5    # five runs, several at once
    python train.py --resume outputs/v4       # resumes that run
    python train.py --version vae -h          # every setting, with the defaults of that version

From Python, train.run(version="v2", epochs=3) does what the command does. This file has, from top to
bottom: the optimizer Muon, the table of settings, the recipes and sweeps, the training loop, what a run
leaves, one run, many runs, the command line. One run fills one folder: config.json, log.csv, metrics.json,
curves.png, recon.png, recon/, best.pt, last.pt. Under torchrun several processes train one model together.
"""
import argparse
import contextlib
import csv
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import data
import evaluate
import losses
import models
from evaluate import Stopped, UsageError, nonempty


# ---------------------------------------------------------------- Muon

class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum in which the update of a matrix of weights is made nearly orthogonal (Jordan et al.
    2024, https://kellerjordan.github.io/posts/muon/), with decoupled weight decay. A convolution's weights count as a
    matrix with a row for each output channel (a transposed one's: for each input channel); biases and other vectors
    learn as by SGD with Nesterov momentum. The size of a matrix's update does not depend on the scale of its gradient.
    Every parameter needs a gradient."""

    def __init__(self, parameters, lr, momentum, weight_decay):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(momentum, alpha=group["momentum"])
                if p.ndim > 1:
                    update = orthogonal(update.flatten(1)).reshape(p.shape)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def orthogonal(matrix):
    """A matrix (M, N) with its singular values brought near 1, by three steps of a Newton-Schulz iteration with
    Jordan's coefficients: those above 0.013 of the matrix's Frobenius norm come to 0.5 to 1.2, smaller ones stay
    below."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(3):  # 3.4445 x + (2.0315 (x x')^2 - 4.7750 x x') x
        products = x @ x.T
        products = torch.addmm(products, products, products, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, products, x, beta=3.4445)
    return x


# ---------------------------------------------------------------- settings

class Number(NamedTuple):
    """What a setting accepts: an int or a float from low (or above it) to high. Converts its text."""
    kind: type
    low: float
    high: float = math.inf
    above: bool = False

    def __call__(self, text):
        try:
            value = self.kind(text)
            in_range = self.low < value if self.above else self.low <= value
            if in_range and value <= self.high and math.isfinite(value):
                return value
        except (ValueError, OverflowError):
            pass
        kind, bound = "whole number" if self.kind is int else "number", "above" if self.above else "of at least"
        upper = "" if self.high == math.inf else f", at most {self.high:g}"
        raise argparse.ArgumentTypeError(f"{text!r}: expected a {kind} {bound} {self.low:g}{upper}")


def names(text):
    """An argparse type: "cat,dog" as a list."""
    return text.split(",")


def shares(text):
    """An argparse type: "bird=0.5,deer=0.25" as a dict."""
    result = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        if not name or name in result:
            raise argparse.ArgumentTypeError(f"{text!r}: expected CLASS=SHARE,..., such as bird=0.5,deer=0.5")
        result[name] = Number(float, 0, 1, above=True)(value)
    return result


def network(text):
    """An argparse type: a notation, or the name of a network that the notation cannot say."""
    if text not in {*models.BACKBONES, *models.HANDWRITTEN, "mirror", "none"}:
        try:
            models.parse(text)
        except models.NotationError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def folder_name(text):
    """An argparse type: a name for a run's folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected up to 100 letters, digits, '.', '_' and '-'")
    return text


class Setting(NamedTuple):
    name: str
    default: object  # the CIFAR study's
    accepts: object  # a function of the flag's text, a tuple of choices, or bool for --x and --no-x
    metavar: str
    help: str


class Optimizer(NamedTuple):
    kind: type
    gathers: set          # what it keeps for each parameter, by PyTorch's names
    fused: tuple = ()     # the devices on which it has a fused kernel
    momentum: bool = False


COUNT, POSITIVE = Number(int, 1), Number(float, 0, above=True)
OPTIMIZERS = {
    "sgd": Optimizer(torch.optim.SGD, {"momentum_buffer"}, fused=("cpu", "cuda"), momentum=True),
    "adam": Optimizer(torch.optim.Adam, {"step", "exp_avg", "exp_avg_sq"}, fused=("cpu", "cuda")),
    "adagrad": Optimizer(torch.optim.Adagrad, {"step", "sum"}, fused=("cpu",)),
    "muon": Optimizer(Muon, {"momentum_buffer"}, momentum=True)}
# Every setting, in the order in which they name a run's folder.
SETTINGS = {
    "network": [
        Setting("version", "v4", str, "NAME", f"{' '.join(models.VERSIONS)}, or custom: what --encoder says"),
        Setting("encoder", None, network, "NOTATION", "another encoder, such as \"C'(32)>C(32)\""),
        Setting("classifier", None, network, "NOTATION", "another classifier, such as \"L(128)>L'(10)\""),
        Setting("decoder", None, network, "NOTATION", "another decoder, such as \"T(32)>T(3)\", mirror, or none"),
        Setting("skip", False, bool, "", "the CIFAR study's modified network: lower features, through one conv, "
                "join the final ones before the classifier's last part"),
        Setting("pretrained", None, bool, "", "vgg, resnet, mobilenet, squeezenet: start from ImageNet weights")],
    "data": [
        Setting("dataset", "cifar10", nonempty, "NAME|PATH", f"{' '.join(data.NAMES)} shapes, a folder of images or "
                "an .npz; where cifar10 is the default and unavailable, shapes"),
        Setting("data_dir", "data", nonempty, "DIR", "where named sets are, or are downloaded to"),
        Setting("size", None, Number(int, 1, 1024), "PIXELS", "scale the images to this side; by default their own"),
        Setting("margin", False, bool, "", "scale the images to 8/7 of --size, then crop to it, at random in "
                "training"),
        Setting("scale", "imagenet", tuple(data.SCALES), "", "how pixels are normalised (write --scale=-1..1)"),
        Setting("classes", None, names, "NAME,...", "only these classes"),
        Setting("train_size", None, COUNT, "N", "train on N images; by default all"),
        Setting("test_size", None, COUNT, "N", "test on N images; by default all"),
        Setting("test_share", 0.2, Number(float, 0.01, 0.9), "X", "the share of a folder without train/ and test/ "
                "that is drawn for the test"),
        Setting("val_share", 0.0, Number(float, 0, 0.9), "X", "hold out this share of the training images and "
                "choose the best epoch on it; with 0 it is chosen on the test images"),
        Setting("labels", None, COUNT, "N", "only N training images keep their labels; the loss terms that need no "
                "labels use all images"),
        Setting("variant", "complete", data.VARIANTS, "", "constrained: keep only the shares of --constrain; "
                "undersampled: then cut every class to the smallest; oversampled: then repeat images up to the "
                "largest; smote: then add synthetic images up to it"),
        Setting("constrain", None, shares, "CLASS=X,...", "the share of a class's training images that --variant "
                "keeps; by default bird=0.5,deer=0.5,truck=0.5"),
        Setting("blur", 0.0, Number(float, 0, 10), "SIGMA", "blur all images, train and test, by SIGMA pixels"),
        Setting("noise", 0.0, Number(float, 0, 10), "STD", "Gaussian noise on the network's input, on pixels of 0-1; "
                "the clean image is the reconstruction target"),
        Setting("clean_test", False, bool, "", "no noise on the test images"),
        Setting("rotate", 0.0, Number(float, 0, 180), "DEGREES", "rotate training images by up to this, either way"),
        Setting("shift", 0, Number(int, 0, 16), "PIXELS", "shift training images by up to this, before --size scales "
                "them; borders are reflected"),
        Setting("flip", True, bool, "", "left-right flips in training; never on mnist and svhn")],
    "loss": [
        *(Setting(flag, term.default, Number(float, 0), "X", term.help)
          for flag, term in losses.TERMS.items()),
        Setting("jigsaw_grid", 4, Number(int, 2, 32), "N", "the jigsaw loss cuts an image into N x N tiles"),
        Setting("label_smoothing", 0.0, Number(float, 0, 1), "X", "spread this share of the classifier's target evenly "
                "over all classes"),
        Setting("class_weights", None, ("balanced",), "", "weight the classifier loss so that all classes count "
                "the same")],
    "training": [
        Setting("optimizer", "sgd", tuple(OPTIMIZERS), "", "PyTorch's SGD, Adam or Adagrad; or Muon "
                "(orthogonal updates of matrices: slow for small batches and wide linear layers)"),
        Setting("lr", 0.01, POSITIVE, "X", "learning rate"),
        Setting("momentum", 0.9, Number(float, 0, 1), "X", "momentum of sgd and muon"),
        Setting("weight_decay", 1e-4, Number(float, 0), "X", "the optimizer's weight decay"),
        Setting("schedule", "step", ("step", "onecycle"), "", "schedule of the learning rate: step (--lr-step), or "
                "onecycle: from a fifth of --lr up to it in 0.23 of the steps, then down to 0"),
        Setting("lr_step", 10, COUNT, "N", "epochs between two reductions of the learning rate"),
        Setting("lr_decay", 0.1, Number(float, 0, 1, above=True), "X", "factor of each reduction"),
        Setting("epochs", 40, COUNT, "N", "passes over the training images"),
        Setting("batch_size", 32, COUNT, "N", "images per step, of all processes together"),
        Setting("separate", False, bool, "", "train the autoencoder alone first, then the classifier on its encoder"),
        Setting("first_share", 0.5, Number(float, 0.01, 0.99), "X", "with --separate: the autoencoder's share of "
                "the epochs"),
        Setting("first_decay", None, Number(float, 0), "X", "with --separate: the autoencoder's weight decay; by "
                "default --weight-decay"),
        Setting("freeze_encoder", True, bool, "", "with --separate: the second part trains the classifier alone")],
    "run": [
        Setting("name", None, folder_name, "NAME", "name of the run's folder; by default the version and what "
                "differs from its recipe"),
        Setting("seed", 0, Number(int, 0, 2**31), "N", "seed of weights, order, flips, shifts, crops, noise, dropout, "
                "tiles and draws"),
        Setting("device", "auto", str, "NAME", "auto, cpu, cuda, cuda:1"),
        Setting("precision", "auto", ("auto", "bf16", "fp32"), "", "auto is bf16 where the hardware is faster in it")],
}
# What a command does with the settings; not settings of a run.
ACTIONS = {"output and several runs": [
    Setting("output", "outputs", nonempty, "DIR", "where run folders go"),
    Setting("resume", None, nonempty, "RUN", "resume the run in this folder, with its settings; --epochs N "
            "lengthens it"),
    Setting("seeds", None, COUNT, "N", "train with N seeds, from --seed on; finished runs are not trained again"),
    Setting("sweep", None, str, "NAME", ""),  # its choices are the table below
    Setting("jobs", None, COUNT, "J", "runs at once; by default one for each GPU or, without GPUs, for each CPU thread "
            "(one in all from batches of 500 images on)"),
    Setting("list", False, bool, "", "print the commands of --sweep or --seeds, one a line, instead of running "
            "them")]}
DEFAULTS = {row.name: row.default for rows in SETTINGS.values() for row in rows}
ACTS = {row.name for rows in ACTIONS.values() for row in rows}

# What a version's recipe changes.
STANDARD = dict(size=224, margin=True, pretrained=True)
# The other studies: Adam, no learning-rate decay, no flips.
OTHERS = dict(scale="0..1", flip=False, alpha=0.0, optimizer="adam", lr=0.001, weight_decay=0.0,
              lr_step=1000, epochs=20, batch_size=100)
JOINT = OTHERS | dict(scale="-1..1", classes=["automobile", "cat", "dog", "horse", "truck"], rotate=10.0,
                      noise=0.05, clean_test=True, alpha=0.1, epochs=10)  # 0.05 of 0-1 is 0.1 of -1..1
FASHION = OTHERS | dict(dataset="fashionmnist", epochs=30, batch_size=64)
V5 = dict(label_smoothing=0.2, shift=2, optimizer="muon", lr=0.15, momentum=0.85, weight_decay=0.0,
          schedule="onecycle", epochs=10, batch_size=500)
KINDS, LATENT = ["mlp", "combo", "cnn"], ["cnn10", "cnn32", "cnn100", "cnn1000"]
DEPTHS = ["cnnL1", "cnnL3", "cnnL5", "cnnL10"]
RECIPES = dict.fromkeys([*models.VERSIONS, "custom"], {}) | {
    "v2.3": dict(size=64), "v4": dict(gamma=0.001), "v4-stride2": dict(gamma=0.001),
    "v5-small": V5 | dict(epochs=6), "v5": V5, "v5-large": V5 | dict(epochs=40),
    "vgg": STANDARD, "resnet": STANDARD, "mobilenet": STANDARD, "squeezenet": STANDARD,
    "joint5": JOINT, "cnn6": dict(beta=0.0),
    **dict.fromkeys([*KINDS, *LATENT, *DEPTHS], OTHERS),
    "mnist": OTHERS | dict(dataset="mnist", alpha=1.0, weight_decay=0.01, first_share=2 / 3, first_decay=0.0),
    "fashion-mlp": FASHION, "fashion-cnn": FASHION, "vae": FASHION | dict(kl=0.02),
}


class Sweep(NamedTuple):
    runs: list     # of dicts: each run's settings
    against: str   # how the comparison at its end pairs them (evaluate.py --against)
    help: str


def versions(*runs, **settings):
    """The runs of a sweep: version names or dicts, all with these settings."""
    return [settings | (dict(version=run) if isinstance(run, str) else run) for run in runs]


BOTH = dict(beta=1.0), dict(beta=0.0)
SHORT = dict(epochs=12, lr_step=3)  # a shortened schedule of the CIFAR study's shape
LINEAR_DROPOUT = "C'(32)>C(64)>C(64)>L(512)>D(0.3)>L(128)>D(0.3)>L'(10)"  # as the study's program has it
SWEEPS = {
    "kind": Sweep(versions(*KINDS), "version=mlp", "autoencoders of three kinds"),
    "latent": Sweep(versions(*LATENT), "version=cnn10", "autoencoders of four code sizes"),
    "depth": Sweep(versions(*DEPTHS), "version=cnnL1", "autoencoders of four depths"),
    "help": Sweep([SHORT | run for version in ("v1", "v2", "v3", "v4") for run in versions(*BOTH, version=version)]
                  + versions(*BOTH, version="v4", blur=1.0, **SHORT), "beta=0",
                  "does reconstruction help: v1 to v4, and v4 on blurred images, with beta 1 and 0, 12 epochs"),
    "labels": Sweep([run for count in (100, 1000, 10_000)
                     for run in versions(*BOTH, version="v4", labels=count, **SHORT)], "beta=0",
                    "does it help with few labels: v4 with 100, 1,000, 10,000, beta 1 and 0, 12 epochs"),
    "ablation": Sweep(versions({}, dict(beta=0.0), dict(encoder=models.VERSIONS["v5-small"].encoder.replace("W", "C'")),
                               dict(label_smoothing=0.0), dict(shift=0), dict(schedule="step", lr_step=2),
                               dict(optimizer="adam", lr=0.01), dict(optimizer="sgd", lr=0.7), version="v5-small"),
                      "v5-small",
                      "v5-small, and with one of its ingredients taken away or exchanged"),
    "study": Sweep([run for version in ("v1", "v1.1", "v1.2", "v2", "v2.1", "v2.2", "v2.3", "v3", "v3.1", "v3.2",
                                        "v3.3", "v4") for run in versions(*BOTH, version=version)]
                   + versions("v4-plain", dict(version="v4", gamma=0.0), "v4-stride2")
                   + versions(dict(optimizer="adam", lr=0.001), dict(optimizer="adagrad", lr=0.01),
                              dict(classifier=LINEAR_DROPOUT), dict(separate=True),
                              dict(separate=True, freeze_encoder=False), dict(decoder="none"),
                              *(dict(variant=variant) for variant in data.VARIANTS[1:]),
                              dict(variant="constrained", class_weights="balanced"),
                              dict(variant="constrained", delta=1.0), dict(variant="constrained", skip=True),
                              dict(variant="oversampled", skip=True, delta=1.0),
                              dict(blur=1.0), dict(blur=1.0, decoder="none"), version="v4"),
                   "beta=0", "every row of the CIFAR study at 32x32 and 64x64"),
}


def recipe(version):
    """All settings of a version, a dict. NotationError names the nearest version."""
    if version not in RECIPES:
        models.find(version)
    return DEFAULTS | RECIPES[version] | {"version": version}


# ---------------------------------------------------------------- training

def stream(seed, epoch, purpose, rank=0):
    """The 32-bit seed of one stream of random numbers: generators on the CPU use no more bits."""
    if purpose == "order":  # also of flips, shifts, crops and rotations; the same for all ranks
        return (seed * 1_000_003 + epoch) % 2**32
    return zlib.crc32(f"{seed} {epoch} {purpose} {rank}".encode())


def phases(s):
    """The run's parts, each the settings that hold in it, with `start` and `end` (epochs from 0) and
    whether the encoder is `frozen`: one, or the two parts of separate training, as the CIFAR
    study's program has them: the autoencoder alone, then the classifier on its encoder; in each
    part the schedule starts anew, and the rate decays after half of lr_step epochs, rounded down."""
    whole = vars(s) | dict(start=0, end=s.epochs, frozen=False)
    if not s.separate:
        return [Namespace(**whole)]
    whole["lr_step"] = max(1, s.lr_step // 2)
    first = max(1, int(s.epochs * s.first_share + 1e-9))
    decay = s.weight_decay if s.first_decay is None else s.first_decay
    of_labels = {flag: 0.0 for flag, term in losses.TERMS.items() if "labels" in term.needs}
    of_images = {flag: 0.0 for flag, term in losses.TERMS.items() if "images" in term.needs}
    return [Namespace(**whole | of_labels | dict(end=first, weight_decay=decay)),
            Namespace(**whole | of_images | dict(start=first, frozen=s.freeze_encoder))]


def learning_rate(s, epoch):
    """The learning rate at a moment of a phase (2.5: the middle of the run's third epoch)."""
    if s.schedule == "onecycle":
        return s.lr * float(np.interp((epoch - s.start) / (s.end - s.start), (0, 0.23, 1), (0.2, 1, 0)))
    return s.lr * s.lr_decay ** ((epoch - s.start) // s.lr_step)


def make_optimizer(model, s):
    """The optimizer over the parts that a phase trains, the others frozen; gamma goes in as decay.

    The gradient of gamma * l2_reg_loss is gamma * parameter, which is what weight decay adds, at no cost of
    its own (Muon's is decoupled: it shrinks the weights beside the update).
    """
    trained = {"encoder": not s.frozen, "classifier": evaluate.classifies(s), "decoder": evaluate.rebuilds(s)}
    for name, wanted in trained.items():
        if getattr(model, name) is not None:
            getattr(model, name).requires_grad_(wanted)
    parameters = [p for p in model.parameters() if p.requires_grad]
    row = OPTIMIZERS[s.optimizer]
    options = {"fused": True} if parameters[0].device.type in row.fused else {}
    options |= {"momentum": s.momentum} if row.momentum else {}
    return row.kind(parameters, lr=s.lr, weight_decay=s.weight_decay + s.gamma, **options)


def restore(optimizer, state, s):
    """Loads what an optimizer has gathered from its state_dict, which may come from anywhere; its settings remain
    those of the run. ValueError where the state is not this optimizer's: PyTorch's fused kernels read beyond a
    tensor of another shape."""
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for p, gathered in optimizer.state.items():
        expected = {name: () if name == "step" else p.shape for name in OPTIMIZERS[s.optimizer].gathers}
        if {name: tensor.shape for name, tensor in gathered.items()} != expected:
            raise ValueError(f"state of other tensors than {expected}")
        gathered |= {name: torch.empty_like(p).copy_(tensor) for name, tensor in gathered.items() if name != "step"}


class Batch(NamedTuple):
    images: torch.Tensor  # (B, C, H, W), normalised: this process's share of the batch
    labels: torch.Tensor  # (B,)
    size: int             # of the whole batch, of all processes


def batches(split, s, epoch, purpose, rounds=1):
    """The Batches of an epoch: `rounds` passes over a Split. purpose: of the stream of their order."""
    rank, processes = evaluate.process()
    bounds = data.batch_bounds(rounds * len(split.labels), s.batch_size, processes)
    shares = data.batches(split, s.batch_size, epoch_seed=stream(s.seed, epoch, purpose), flip=s.flip, shifts=s.shift,
                          degrees=s.rotate, rounds=rounds, part=(rank, processes), **evaluate.preparation(s))
    for (images, labels), (start, stop) in zip(shares, bounds):
        yield Batch(images, labels, stop - start)


def epoch_steps(dataset, s, epoch):
    """(number of steps, an iterator over (a Batch of all images, a Batch of labelled images, order)).

    The two are the same object but with --labels: then the labelled images are repeated as often
    as needed, beside batches of all images or, where no term needs those, instead of them. order: of the
    jigsaw's tiles, (B, grid * grid), or None.
    """
    n, (rank, processes) = len(dataset.train.labels), evaluate.process()
    s = Namespace(**vars(s) | {"batch_size": min(s.batch_size, n)})  # of the labelled images too
    bounds, orders = data.batch_bounds(n, s.batch_size, processes), itertools.repeat(None)
    if s.delta:
        tiles = torch.Generator().manual_seed(stream(s.seed, epoch, "tiles"))
        drawn = torch.rand(n, s.jigsaw_grid ** 2, generator=tiles).argsort(1).to(dataset.train.images.device)
        orders = (drawn[start:stop][rank::processes] for start, stop in bounds)
    everything = batches(dataset.train, s, epoch, "order")
    if dataset.labelled is None or not evaluate.classifies(s):
        return len(bounds), ((batch, batch, order) for batch, order in zip(everything, orders))
    # A batch more than the steps: the last one could be smaller or larger.
    rounds = math.ceil((len(bounds) + 1) * s.batch_size / len(dataset.labelled.labels))
    labelled = batches(dataset.labelled, s, epoch, "labelled", rounds)
    labelled = itertools.islice(labelled, len(bounds))
    if "images" in losses.needed(evaluate.loss_weights(s)):
        return len(bounds), zip(everything, labelled, orders)
    return len(bounds), ((batch, batch, order) for batch, order in zip(labelled, orders))


def counted(term, batch, labelled):
    """The Batch over whose images a term is a mean."""
    return labelled if "labels" in term.needs else batch


def fair_weights(weights, batch, labelled):
    """Weights that make the mean over the processes, which DistributedDataParallel takes of gradients,
    a mean over the whole batch: the processes' shares of it may differ by an image."""
    processes = evaluate.process()[1]
    parts = {flag: counted(losses.TERMS[flag], batch, labelled) for flag in weights}
    return {flag: weight * len(parts[flag].labels) * processes / parts[flag].size
            for flag, weight in weights.items()}


def step_tensors(batch, labelled, order, s, noise):
    """What a step computes with, a dict of tensors: images, labels; inputs, where they differ from the images;
    labelled_inputs, where other images are classified; order. noise: a torch.Generator."""
    def with_noise(images):
        return data.add_noise(images, s.noise, noise, s.scale) if s.noise else images
    tensors = {"images": batch.images, "labels": labelled.labels}
    if s.noise:
        tensors["inputs"] = with_noise(batch.images)
    if labelled is not batch:
        tensors["labelled_inputs"] = with_noise(labelled.images)
    return tensors if order is None else tensors | {"order": order}


def take_gradients(net, tensors, s, weights, class_weights):
    """One step up to the gradients. Returns sums over the batch, (terms,) or where the classifier is trained
    (terms + 1,): each term that has a weight, then right answers. tensors: of step_tensors."""
    inputs, wanted = tensors.get("inputs", tensors["images"]), losses.needed(weights)
    known = {"images": tensors["images"], "labels": tensors["labels"], "label_smoothing": s.label_smoothing,
             "class_weights": class_weights}
    apart = {"logits"} if "labelled_inputs" in tensors else set()
    known |= evaluate.forward(net, inputs, s, wanted - apart, tensors.get("order"))
    if apart:
        known |= evaluate.forward(net, tensors["labelled_inputs"], s, apart)
    loss, values = losses.weighted_loss(weights, **known)
    loss.backward()
    with torch.no_grad():
        terms = [losses.TERMS[flag] for flag, weight in weights.items() if weight]  # in train_epoch's order
        sums = [values[term.name] * len(tensors["labels" if "labels" in term.needs else "images"]) for term in terms]
        if "logits" in wanted:
            sums.append((known["logits"].argmax(1) == tensors["labels"]).sum())
        return torch.stack(sums)


@functools.cache
def recording_stream(device):
    """The CUDA stream on which graphs are recorded; PyTorch's own one stays on the GPU that was used first."""
    return torch.cuda.Stream(device)


class Recorded:
    """A step's work on a GPU, work(dict of tensors) -> tensor, which also leaves gradients, as a CUDA graph.

    A small network's step is hundreds of kernels, each of which takes the CPU longer to start than the GPU to run; a
    graph starts all at once. The first call runs the work itself. The second one records it; it and all later ones
    replay it, with the same bits. A call with tensors of other shapes (a last batch) runs the work itself and
    gives the graph's memory back. All that the work reads beside its tensors must stay in place, as the
    parameters do; gradients must be None at each call; the result is overwritten by the next one.
    """

    def __init__(self, work, parameters):
        self.work, self.parameters, self.shapes, self.graph = work, parameters, None, None

    def __call__(self, tensors):
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != self.shapes:
            self.shapes = self.shapes or shapes
            self.graph = self.inputs = self.result = self.gradients = None
            return self.work(tensors)
        if self.graph is None:
            self.inputs, self.graph = {name: tensor.clone() for name, tensor in tensors.items()}, torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=recording_stream(tensors["images"].device)):  # runs nothing
                self.result = self.work(self.inputs)
            self.gradients = [p.grad for p in self.parameters]
        for name, tensor in tensors.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients):
            p.grad = gradient
        return self.result


def train_epoch(model, dataset, optimizer, s, epoch, show=None, net=None):
    """One epoch (counted from 0) of the weighted loss over a Dataset. s: a phase.

    Returns the epoch's means as plain numbers: loss, the terms by name and accuracy (None where not
    trained). The seed and the epoch alone decide order, flips, tiles, noise and dropout. Nothing
    waits for the device but the second step, which a GPU records, and every hundredth, where a loss
    that is not finite ends the run (Stopped). show(step, steps) is called at every step. net: the model
    as DistributedDataParallel wraps it; each process then takes its share of every batch.
    """
    model.train()
    if s.frozen:
        model.encoder.eval()  # BatchNorm keeps its statistics
    device, (rank, processes) = dataset.train.images.device, evaluate.process()
    torch.manual_seed(stream(s.seed, epoch, "dropout", rank))  # and of variational codes
    noise = torch.Generator(device).manual_seed(stream(s.seed, epoch, "noise", rank))
    weights = evaluate.loss_weights(s) | {"gamma": 0.0}  # gamma is the optimizer's weight decay
    terms = [losses.TERMS[flag] for flag, weight in weights.items() if weight]
    class_weights = None
    if s.class_weights:
        class_weights = losses.balanced_weights((dataset.labelled or dataset.train).labels, model.num_classes)
    work = functools.partial(take_gradients, net or model, s=s, weights=weights, class_weights=class_weights)
    if device.type == "cuda" and processes == 1:  # DistributedDataParallel's communication is not recorded
        work = Recorded(work, list(model.parameters()))
    count, steps = epoch_steps(dataset, s, epoch)
    columns = [*terms, losses.TERMS["alpha"]]  # of which the last one counts right answers
    history, seen = torch.zeros(count, len(columns), device=device), [0] * len(columns)
    for step, (batch, labelled, order) in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, epoch + step / count)
        fair = {"weights": fair_weights(weights, batch, labelled)} if processes > 1 else {}
        sums = work(step_tensors(batch, labelled, order, s, noise), **fair)
        history[step, :len(sums)] = sums
        with evaluate.autocast(device, s.precision):  # of Muon's matrix products
            optimizer.step()
        optimizer.zero_grad()
        seen = [total + counted(term, batch, labelled).size for total, term in zip(seen, columns)]
        if step % 100 == 99 or step == count - 1:
            check_finite(history[:step + 1], [term.name for term in terms], epoch, step // 100 * 100)
        if show:
            show(step + 1, count)
    return epoch_means(history.sum(0), seen, terms, optimizer, s)


def epoch_means(sums, seen, terms, optimizer, s):
    """The figures of an epoch from its sums (the terms, then right answers) over the images seen."""
    if evaluate.process()[1] > 1:
        dist.all_reduce(sums)
    *means, right = [total / images for total, images in zip(sums.tolist(), seen)]
    result = dict.fromkeys((term.name for term in losses.TERMS.values()), None)
    result |= {term.name: mean for term, mean in zip(terms, means)}
    # The weights change little within an epoch: the term is taken once, as it ends.
    with torch.no_grad():
        result["l2"] = losses.l2_reg_loss(p for group in optimizer.param_groups for p in group["params"]).item()
    result["loss"] = losses.weighted_sum(evaluate.loss_weights(s), result)
    return result | {"accuracy": 100 * right if result["classifier"] is not None else None}


def check_finite(history, terms, epoch, first):
    """Raises Stopped where a step's losses (rows of sums over `terms`) from step `first` on are not finite."""
    bad = (~history[first:].isfinite()).nonzero().tolist()
    if bad:
        step, term = bad[0]
        raise Stopped(f"epoch {epoch + 1}, step {first + step + 1}: the {terms[term]} loss is "
                      f"{history[first + step, term].item()}; a smaller --lr may help")


def train(model, dataset, s, folder, state=None):
    """The whole run: trains, measures after each epoch, keeps log.csv, best.pt and last.pt.

    state: a last.pt's content, after which to resume. Returns the log, a list of rows (dicts), and
    the last measurement. Raises Stopped; nothing is saved of an epoch that ends with losses or weights
    that are not finite.
    """
    rows, tested = (state["rows"], state["tested"]) if state else ([], None)
    rank, processes = evaluate.process()
    print("epoch      lr       train loss         test loss       test  PSNR    time images\n"
          "               class.   recon.    class.   recon.   acc. %    dB       s     /s", flush=True)
    for row in rows:
        print_row(row)
    for phase in phases(s):
        if len(rows) >= phase.end:
            continue
        optimizer = make_optimizer(model, phase)
        if len(rows) > phase.start:
            restore(optimizer, state["optimizer"], phase)
        net = torch.nn.parallel.DistributedDataParallel(model) if processes > 1 else None
        for epoch in range(len(rows), phase.end):
            start = time.perf_counter()
            show = counter(epoch + 1) if sys.stdout.isatty() and not rank else None
            trained = train_epoch(model, dataset, optimizer, phase, epoch, show, net)
            row, tested = measure_epoch(model, dataset, s, phase, epoch, trained, time.perf_counter() - start)
            row["lr"] = optimizer.param_groups[0]["lr"]
            if not all(weight.isfinite().all() for weight in model.state_dict().values()):
                raise Stopped(f"epoch {epoch + 1}: weights are not finite after this epoch; a smaller --lr may help")
            rows.append(row)
            if rank == 0:
                print_row(row)
                save(folder, model, dataset, s, phase, rows, tested, optimizer)
    return rows, tested


LOGGED = {  # the columns of a log by the images on which they are measured
    "train": lambda: ["loss", *(term.name for term in losses.TERMS.values()), "accuracy"],
    "test": lambda: ["loss", *(term.name for term in losses.TERMS.values() if term.name != "l2"), "accuracy",
                     *(key for _, key, _ in evaluate.MEASURES)],
    "val": lambda: ["accuracy", "mse"]}


def columns():
    """The columns of a log."""
    logged = [f"{part}_{key}" for part, keys in LOGGED.items() for key in keys()]
    return ["epoch", "lr", *logged, "seconds", "images_per_second", "test_seconds"]


def measure_epoch(model, dataset, s, phase, epoch, trained, seconds):
    """The log's row of an epoch, and the measurement of the test images. Raises Stopped."""
    if evaluate.process()[1] > 1:
        for buffer in model.buffers():  # BatchNorm's statistics: measured as they are saved
            dist.broadcast(buffer, 0)
    start = time.perf_counter()
    # In the second part of separate training what the first one has learnt is measured, too.
    parts = evaluate.classifies(phase), evaluate.rebuilds(s)
    tested = evaluate.measure(model, dataset.test, s, *parts, mirrored=s.flip and epoch + 1 == s.epochs)
    held_out = evaluate.measure(model, dataset.val, s, *parts) if dataset.val else {}
    tested["loss"] = losses.weighted_sum(evaluate.loss_weights(phase), tested | {"l2": trained["l2"]})
    found = {"train": trained, "test": tested, "val": held_out}
    row = dict.fromkeys(columns()) | {"epoch": epoch + 1}
    row |= {f"{part}_{key}": found[part].get(key) for part, keys in LOGGED.items() for key in keys()}
    for key, value in row.items():
        if value is not None and not math.isfinite(value):
            raise Stopped(f"epoch {epoch + 1}: {key} is {value} after this epoch; a smaller --lr may help")
    return row | {"seconds": seconds, "images_per_second": len(dataset.train.labels) / seconds,
                  "test_seconds": time.perf_counter() - start}, tested


def counter(epoch):
    """A show(step, steps) that counts an epoch's steps in a line, twice a second, on a terminal."""
    start = due = time.time()

    def show(step, steps):
        nonlocal due
        now = time.time()
        if step == steps:
            print(f"\r{'':<60}\r", end="", flush=True)
        elif now >= due:
            due = now + 0.5
            left = (now - start) / step * (steps - step)
            print(f"\repoch {epoch}: step {step:,} of {steps:,}, {left:.0f} s left  ", end="", flush=True)
    return show


# ---------------------------------------------------------------- what a run leaves

def save(folder, model, dataset, s, phase, rows, tested, optimizer):
    """log.csv, last.pt and, where the last epoch is the best one so far, best.pt."""
    trained = ["classifier"] * evaluate.classifies(phase) + ["decoder"] * evaluate.rebuilds(s)
    content = dict(settings=vars(s), classes=dataset.classes, image_shape=list(dataset.train.images.shape[1:]),
                   trained=trained, epoch=len(rows), test=dataset.digests["test"],
                   pool=dataset.pool if dataset.test_drawn else {})
    evaluate.write_whole(folder / "log.csv", lambda part: write_csv(part, rows))
    if evaluate.best_row(rows) is rows[-1]:
        evaluate.write_whole(folder / "best.pt", lambda part: models.save(part, model, **content))
    # No random state: every epoch's is made from the seed and the epoch's number.
    evaluate.write_whole(folder / "last.pt", lambda part: models.save(
        part, model, **content, optimizer=optimizer.state_dict(), rows=rows, tested=tested))


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def print_row(row):
    def number(key, width, digits):
        return f"{'-' if row.get(key) is None else format(row[key], f'.{digits}f'):>{width}}"

    print(f"{row['epoch']:>5}{row['lr']:>8.2g}{number('train_classifier', 9, 4)}"
          f"{number('train_autoencoder', 9, 4)}{number('test_classifier', 10, 4)}"
          f"{number('test_autoencoder', 9, 4)}{number('test_accuracy', 9, 2)}"
          f"{number('test_psnr', 6, 1)}{row['seconds']:>8.1f}{row['images_per_second']:>7.0f}",
          flush=True)


def summarise(rows, tested, model, dataset):
    """metrics.json: the results of a run, from its log and its last measurement."""
    last, count = rows[-1], models.parameter_count(model)
    result = {"dataset": dataset.name, "source": dataset.source, "epochs": len(rows)}
    if last["test_accuracy"] is not None:
        best = evaluate.best_row(rows)
        largest = max(map(sum, tested["confusion"])) / len(dataset.test.labels)
        result["accuracy"] = {"last": last["test_accuracy"], "best": best["test_accuracy"],
                              "best_epoch": best["epoch"], "best_chosen_on": evaluate.chosen_on(rows),
                              "largest_class": 100 * largest}
        if "accuracy_mirrored" in tested:
            result["accuracy"]["mirrored"] = tested["accuracy_mirrored"]
        result["per_class_accuracy"] = losses.per_class(tested["confusion"], dataset.classes)
    errors = ("autoencoder", *(key for _, key, _ in evaluate.MEASURES))
    result["reconstruction"] = {key: tested[key] for key in errors if key in tested} if "mse" in tested else None
    seconds = sorted(row["seconds"] for row in rows)[len(rows) // 2]
    return result | {"code": math.prod(model.code_shape), "parameters": count, "megabytes": count * 4 / 1e6,
                     "seconds_per_epoch": seconds, "images_per_second": len(dataset.train.labels) / seconds,
                     "seconds": sum(row["seconds"] + row["test_seconds"] for row in rows)}


def slug(text):
    """A notation or a value as a part of a file name: "C'(16)>C(16)" is "Cp16-C16"."""
    text = re.sub(r"\((\d[\d.]*)\)", r"\1", text.replace("'", "p").replace("e+", "e"))
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-")


def name_parts(s, usual):
    """The parts of a folder's name: what of the settings differs from `usual`, a dict: ["beta0"]."""
    parts = []
    for key, value in usual.items():
        chosen, flag = getattr(s, key), key.replace("_", "-")
        if chosen == value or (key in evaluate.INCIDENTAL and key != "seed") or key == "version" or (
                (key == "beta" and s.decoder == "none") or (key == "flip" and s.dataset in data.NEVER_FLIPPED)):
            continue
        if isinstance(chosen, bool) or chosen == "none":
            parts.append(flag if chosen is True else f"no-{flag}")
            continue
        if key == "dataset":
            chosen = Path(chosen).stem
        elif isinstance(chosen, dict):
            chosen = "-".join(f"{name}{share:g}" for name, share in chosen.items())
        elif isinstance(chosen, list):
            chosen = "-".join(chosen)
        text = slug(f"{chosen:g}" if isinstance(chosen, float) else str(chosen))
        parts.append(f"{flag}{text}" if text[:1].isdigit() else f"{flag}-{text}")
    return parts


def run_name(s):
    """A run's folder: --name, or the version and whatever differs from its recipe: v4_beta0,
    v4_dataset-shapes, v4_no-decoder; a custom network is named by its notation."""
    usual = recipe(s.version)
    seed = f"_seed{s.seed}" if s.seed != usual.pop("seed") else ""
    if s.name:
        return s.name + seed
    parts = [s.version]
    if s.version == "custom":
        parts = [slug(notation) for notation in (s.encoder, s.classifier) if notation]
        usual = {key: value for key, value in usual.items() if key not in ("encoder", "classifier")}
    return "_".join(parts + name_parts(s, usual))[:120 - len(seed)] + seed


def make_folder(output, name, config):
    """A new folder for a run, with its config.json from the first moment on: output/name, or with a
    number where that is taken."""
    part = Path(output, f".{name}.{os.getpid()}")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"--output {output}: expected a folder to write to ({error.strerror})") from None
    try:
        evaluate.write_json(part / "config.json", config)
        for count in itertools.count(1):
            folder = Path(output, name if count == 1 else f"{name}_run{count}")
            if not folder.exists():
                with contextlib.suppress(OSError):  # another run was faster
                    return part.rename(folder)
                if not folder.exists():
                    raise UsageError(f"--output {output}: the folder {name} cannot be made there")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def git_commit():
    """The commit of this code, with "+changes" where files differ from it; None where git does not
    track this file."""
    def git(*words):
        return subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True,
                              text=True, check=True).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not a copy within another repository
        return git("rev-parse", "HEAD") + "+changes" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None


def find_run(output, s):
    """The folder in `output` of the run with exactly these settings and this network, else None."""
    def identity(settings, network):  # a row of models.VERSIONS may have changed since the run
        classifier = re.sub(r"\d+\D*$", "", network["classifier"] or "")  # less the data set's number of classes
        return (evaluate.kind_of(DEFAULTS | settings), settings["seed"], classifier,
                [network[key] for key in ("encoder", "decoder", "output", "he")])
    version = models.VERSIONS.get(s.version) or models.Version(s.encoder)
    wanted, found = identity(vars(s), vars(version) | network_changes(s)), []
    for path in sorted(Path(output).glob("[!.]*/config.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            config = json.loads(path.read_text())
            settings = config["settings"]
            # A named set in another folder, where the run's own one is still there, is other data.
            before = settings["data_dir"]
            other = s.dataset in data.NAMES and s.data_dir != before and Path(before).is_dir()
            if (identity(settings, config["network"]) == wanted and not other
                    and (not s.name or settings.get("name") == s.name)):
                found.append(path.parent)
    return next(filter(evaluate.finished, found), found[0] if found else None)


@contextlib.contextmanager
def locked(folder):
    """Holds a lock on the folder, which ends with this process at the latest. UsageError where another
    process holds it. Without a check where the system has no such lock (Windows, some network disks)."""
    try:
        import fcntl
        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{folder}: another process is training here; wait until it has ended") from None
        yield
    finally:
        os.close(handle)


# ---------------------------------------------------------------- one run

def located(dataset):
    """A data set's name, or its absolute path: a later evaluation finds it from any folder."""
    named = dataset in (*data.NAMES, "shapes") or not Path(dataset).exists()
    return dataset if named else str(Path(dataset).resolve())


def script(name, *words):
    """A command line that runs a script of this project from the current folder."""
    path = Path(__file__).with_name(name)
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join(["python", name if path.parent == Path.cwd() else str(path), *map(str, words)])


def settle(given):
    """The run's settings, a Namespace, from the flags that were given (a dict) and the recipe. UsageError."""
    given = {key: value for key, value in given.items() if key not in ACTS}
    networks = [key for key in ("encoder", "classifier", "decoder") if given.get(key, "none") != "none"]
    if "version" not in given and networks:
        given["version"] = "custom"
    version = given.get("version", "v4")
    if version == "custom":
        if "encoder" not in given:
            raise UsageError(f"--{networks[0] if networks else 'version custom'}: expected --encoder NOTATION beside "
                             "it, or --version NAME, the network that it changes")
        if given.get("alpha", 1) and "classifier" not in given:
            given["classifier"] = "L'(10)"  # linear, on the code
    s = Namespace(**recipe(version) | given)
    if s.decoder == "none" and "beta" not in given:
        s.beta = 0.0
    if "dataset" not in given and s.dataset == "cifar10":
        s.dataset = None  # or shapes, where it is unavailable
    else:
        s.dataset = located(s.dataset)
    s.data_dir = str(Path(s.data_dir).resolve())
    check_network(s, given)
    check_training(s, given)
    s.flip = s.flip and s.dataset not in data.NEVER_FLIPPED
    return s


def check_network(s, given):
    """UsageError where the settings contradict the network, or would have no effect on it."""
    version = models.VERSIONS.get(s.version) or models.Version(s.encoder)
    no_decoder = s.decoder == "none" or (version.decoder is None and not s.decoder)
    lacks = {}  # the tensors of loss terms that the network cannot give, and why
    if not (s.classifier or version.classifier):
        lacks["logits"] = f"{s.version} has no classifier; --classifier NOTATION adds one"
    if no_decoder:
        lacks["reconstruction"] = "the network has no decoder; " + (
            "leave out --no-decoder" if s.decoder == "none" else "--decoder mirror adds one")
        lacks["jigsaw_reconstruction"] = lacks["reconstruction"]
    if "N(" not in (s.encoder or version.encoder):
        lacks["mean"] = "needs an encoder that ends in N(n)"
    for flag, weight in evaluate.loss_weights(s).items():
        for name in losses.needed({flag: weight}) & set(lacks):
            whose = "" if flag in given else f" (the recipe of {s.version})"
            raise UsageError(f"--{flag} {weight:g}{whose}: {lacks[name]}; --{flag} 0 leaves the term out")
    if "classifier" in given and not evaluate.classifies(s):
        raise UsageError(f"--classifier {s.classifier}: is not trained with alpha 0; add --alpha 1")
    if s.skip and not evaluate.classifies(s):
        raise UsageError("--skip: changes the classifier, which is not trained with alpha 0; add --alpha 1")
    if not evaluate.classifies(s) and not evaluate.rebuilds(s):
        raise UsageError("nothing to train on: alpha, beta and delta are all 0; expected one above 0")
    reach = {"sigmoid": ("0..1",), "tanh": ("0..1", "-1..1")}.get(version.output, tuple(data.SCALES))
    if evaluate.rebuilds(s) and s.scale not in reach:
        raise UsageError(f"--scale {s.scale}: the decoder of {s.version} ends in a {version.output}, which does not "
                         f"reach its values; expected {' or '.join(reach)}")
    if "pretrained" in given and not recipe(s.version)["pretrained"]:
        raise UsageError(f"--{'' if s.pretrained else 'no-'}pretrained: {s.version} has no pretrained weights")


def check_training(s, given):
    """UsageError where settings of the data or the training contradict each other, or would have no effect."""
    if s.separate and not (evaluate.classifies(s) and evaluate.rebuilds(s)):
        raise UsageError("--separate: trains a decoder and then a classifier; expected alpha and beta (or delta) "
                         "above 0, and a decoder")
    if s.separate and s.epochs < 2:
        raise UsageError(f"--epochs {s.epochs}: --separate has two parts; expected at least 2")
    if s.labels and s.variant in ("oversampled", "smote"):
        raise UsageError(f"--labels {s.labels}: expected a --variant that copies no image, not {s.variant}")
    for flag, needs, has in (
            ("freeze_encoder", "--separate", s.separate), ("first_share", "--separate", s.separate),
            ("first_decay", "--separate", s.separate), ("constrain", "--variant other than complete",
                                                        s.variant != "complete"),
            ("jigsaw_grid", "--delta above 0", s.delta), ("class_weights", "--alpha above 0", s.alpha),
            ("labels", "--alpha above 0", s.alpha), ("label_smoothing", "--alpha above 0", s.alpha),
            ("lr_step", "--schedule step", s.schedule == "step"),
            ("lr_decay", "--schedule step", s.schedule == "step"),
            ("momentum", "--optimizer sgd or muon", OPTIMIZERS[s.optimizer].momentum),
            ("margin", "--size", s.size), ("clean_test", "--noise above 0", s.noise),
            ("flip", "images that may be mirrored, unlike digits",
             not s.flip or s.dataset not in data.NEVER_FLIPPED)):
        if flag in given and not has:
            typed = f"no-{flag}" if given[flag] is False else flag
            raise UsageError(f"--{typed.replace('_', '-')}: has no effect without {needs}")


def is_measurement(tested, classes, classified):
    """Whether a dict is what evaluate.measure gives: numbers, and the confusion matrix where a classifier was there."""
    confusion = tested.get("confusion", None if classified else [[0] * classes] * classes)
    return (all(type(value) in (int, float) for name, value in tested.items() if name != "confusion")
            and type(confusion) is list and len(confusion) == classes
            and all(type(row) is list and [type(count) for count in row] == [int] * classes for row in confusion))


def resumable(model, state, s):
    """Whether a checkpoint, which may come from anywhere, has the log and the optimizer's state of a run."""
    rows = state.get("rows")
    numbers = {"epoch", "lr", "train_loss", "test_loss", "seconds", "images_per_second", "test_seconds"}
    needed = numbers | {"test_accuracy", "test_mse", "val_accuracy", "val_mse"}
    if type(rows) is not list or len(rows) != state["epoch"] or type(state.get("tested")) is not dict:
        return False
    for row in rows:
        if type(row) is not dict or not needed <= set(row):
            return False
        if any(type(row[key]) not in (int, float) for key in numbers) or any(
                type(value) not in (int, float, type(None)) for value in row.values()):
            return False
    if not is_measurement(state["tested"], model.num_classes, rows[-1]["test_accuracy"] is not None):
        return False
    try:
        phase = next(phase for phase in phases(s) if len(rows) <= phase.end)
        optimizer = make_optimizer(model, phase)
        optimizer.load_state_dict(state["optimizer"])  # of as many parameters
        restore(optimizer, state["optimizer"], phase)
    except Exception:  # whatever PyTorch meets first
        return False
    return True


def reopen(given, folder):
    """(settings, last.pt's content or None, its model or None) of a run that is to resume. UsageError."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if not set(config["settings"]) <= set(DEFAULTS):
            raise ValueError
        known = parse(as_flags(config["settings"]))  # a setting that is newer than the run has its default
        s = Namespace(**recipe(known["version"]) | known | {"precision": config["precision"]})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        found = "there is no such folder" if not folder.exists() else "is a file" if folder.is_file() else (
            "has no config.json of this version of the program")
        raise UsageError(f"--resume {folder}: {found}; expected the folder of a run") from None
    if given.get("epochs", s.epochs) != s.epochs and (s.separate or s.schedule != "step"):
        what = "--separate" if s.separate else f"--schedule {s.schedule}"
        raise UsageError(f"--epochs {given['epochs']}: with {what} the completed epochs depend on the total; "
                         f"expected {s.epochs}, or start another run")
    path, state, model = folder / "last.pt", None, None
    if path.exists():
        model, state = evaluate.load_checkpoint(path)
        if not resumable(model, state, s):
            raise UsageError(f"{path}: not a last.pt of train.py; expected what a run can resume from")
        state["rows"] = [dict.fromkeys(columns()) | row for row in state["rows"]]  # of terms newer than the run too
    done, total = len(state["rows"]) if state else 0, s.epochs
    given = {key: value for key, value in given.items() if key not in ACTS or key == "output"}
    if "dataset" in given:
        given["dataset"] = located(given["dataset"])
    for key, value in given.items():
        if key not in ("epochs", "device", "data_dir", "dataset") and value != getattr(s, key, str(folder.parent)):
            raise UsageError(f"--{key.replace('_', '-')} {value}: a run resumes with its own settings, here "
                             f"{getattr(s, key, folder.parent)}; leave it out, or start another run")
    for key in ("epochs", "device", "data_dir", "dataset"):  # data that has moved: keep_config compares it
        setattr(s, key, given.get(key, getattr(s, key)))
    s.data_dir = str(Path(s.data_dir).resolve())
    if s.epochs < done or s.epochs == done != total:
        raise UsageError(f"--epochs {s.epochs}: the run has completed {done} epochs; expected more")
    if s.epochs == done and evaluate.finished(folder):
        raise UsageError(f"--resume {folder}: all {done} of its epochs are done; --epochs N lengthens it")
    return s, state, model


@contextlib.contextmanager
def process_group(given):
    """Under torchrun, a process group for as long as the block runs; otherwise does nothing."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(f"the environment has LOCAL_RANK but no {missing[0]}; expected those of torchrun, or neither")
    device, local = evaluate.pick_device(given.get("device", "auto")), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(f"torchrun: more processes than this machine's {torch.cuda.device_count()} GPUs; "
                             "expected --nproc_per_node to be at most that")
        torch.cuda.set_device(local)
    # A day: the others wait while the first process downloads a data set.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    try:
        yield
        dist.barrier()  # all stay until the pictures are drawn
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """Under torchrun the first process passes alone (and downloads), then the others."""
    rank, processes = evaluate.process()
    if rank:
        dist.barrier()
    yield
    if processes > 1 and not rank:
        dist.barrier()


def prepare(s, model=None):
    """(dataset on the device, model), every check made, nothing written. Replaces automatic settings (dataset,
    precision) by those that are used. model: of a run that resumes; None builds it."""
    evaluate.keep_freed_memory()
    device, (_, processes) = evaluate.pick_device(s.device), evaluate.process()
    if device.type == "cuda":
        if processes > 1:
            device = torch.device("cuda", torch.cuda.current_device())
        if device.index is not None:
            torch.cuda.set_device(device)  # otherwise memory of the first GPU is taken as well
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same command, the same bits
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it; each filling is a kernel
    with first_process_first():
        dataset = evaluate.prepare_data(s)
    dataset.digests = {part: data.digest(dataset, split) for part in ("train", "test", "val")
                       if (split := getattr(dataset, part)) is not None}
    if s.test_share != DEFAULTS["test_share"] and not dataset.test_drawn:
        raise UsageError(f"--test-share {s.test_share:g}: has no effect on {dataset.name}, which has test images of "
                         "its own; leave it out")
    channels, *sides = dataset.train.images.shape[1:]
    if s.size:
        sides = [s.size, s.size]
    if s.delta and (sides[0] % s.jigsaw_grid or sides[1] % s.jigsaw_grid):
        raise UsageError(f"--jigsaw-grid {s.jigsaw_grid}: does not cut images of {sides[1]}x{sides[0]} into equal "
                         "tiles")
    if model is None:
        if evaluate.classifies(s) and len(dataset.classes) < 2:
            raise UsageError(f"--alpha {s.alpha:g}: {dataset.name} has one class here; expected two, or --alpha 0")
        if s.labels and s.labels < len(dataset.classes):
            raise UsageError(f"--labels {s.labels}: expected at least one for each of {len(dataset.classes)} classes")
        model = build(s, (channels, *sides), len(dataset.classes))
        if isinstance(model.encoder[0], models.WhiteningConv2d):
            rows = evaluate.random_rows(dataset.train, 1 + 1_000_000 // math.prod(sides))  # a million pixels are enough
            models.whiten(model, data.normalise(dataset.train.images[rows], **evaluate.preparation(s)))
    bounds = data.batch_bounds(len(dataset.train.labels), s.batch_size, processes)
    smallest = min(stop - start for start, stop in bounds)
    normalised = any(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules())
    if smallest < processes:
        raise UsageError(f"{len(dataset.train.labels)} training images in batches of {s.batch_size}: expected at "
                         f"least one in each batch for each of {processes} processes")
    if s.shift >= min(dataset.train.images.shape[2:]):
        raise UsageError(f"--shift {s.shift}: expected less than the images' sides")
    if smallest < 2 * processes and normalised:
        raise UsageError(f"--batch-size {s.batch_size}: {s.version} has BatchNorm; expected at least 2 images for "
                         "each process in a batch, and in the training set")
    s.dataset = s.dataset or dataset.name
    s.precision = evaluate.pick_precision(s.precision, device)
    torch.backends.cudnn.allow_tf32 = s.precision != "fp32"
    return dataset.to(device), model.to(device, memory_format=torch.channels_last)


def network_changes(s):
    """What the settings change of their version: arguments of models.build."""
    changes = {key: getattr(s, key) for key in ("encoder", "classifier", "skip", "pretrained", "decoder")
               if getattr(s, key) is not None}
    return changes | ({"decoder": None} if s.decoder == "none" else {})


def build(s, in_shape, num_classes):
    """The network of the settings, its weights from the seed."""
    torch.manual_seed(s.seed)
    with first_process_first():
        return models.build(models.Version(s.encoder) if s.version == "custom" else s.version, in_shape, num_classes,
                            **network_changes(s))


def announce(s, dataset, model, folder):
    """Prints what is about to run."""
    v, shape = model.version, "x".join(map(str, model.version.in_shape))
    counts = data.counts(dataset.train, len(dataset.classes))
    per_class = (f"{counts[0]:,} in each of {len(counts)} classes" if len(set(counts)) == 1 else
                 ", ".join(f"{name} {count:,}" for name, count in zip(dataset.classes, counts)))
    decoder = "no decoder" if model.decoder is None else f"decoder: {v.decoder}" + (
        ", not trained as beta is 0" * (not evaluate.rebuilds(s)))
    held_out = f", {len(dataset.val.labels):,} held-out" if dataset.val else ""
    print(f"{s.version}: {v.encoder} | {v.classifier or 'no classifier'}{', lower features joined' * v.skip}\n"
          f"{models.parameter_count(model):,} parameters; {decoder}\n"
          f"{dataset.name}, {dataset.source}: {len(dataset.train.labels):,} training{held_out} and "
          f"{len(dataset.test.labels):,} test images, {shape}\ntraining images: {per_class}")
    if dataset.labelled:
        print(f"labelled: {len(dataset.labelled.labels):,} of the training images")
    weights = ", ".join(f"{flag} {weight:g}" for flag, weight in evaluate.loss_weights(s).items()
                        if weight or flag in ("alpha", "beta"))
    print(f"epochs {s.epochs}, batch {s.batch_size}, {s.optimizer} lr {s.lr:g}, {weights}, seed {s.seed}")
    shown = ["noise", "rotate", "shift", "schedule", *["label_smoothing"] * evaluate.classifies(s)]
    also = [f"{name.replace('_', '-')} {getattr(s, name)}" for name in shown if getattr(s, name) != DEFAULTS[name]]
    if also:
        print(f"also: {', '.join(also)}")
    if s.separate:
        first = phases(s)[0].end
        print(f"epochs 1 to {first}: the autoencoder alone; {first + 1} to {s.epochs}: the classifier on its "
              f"{'frozen ' * s.freeze_encoder}encoder; in each part the learning rate "
              + (f"decays after every {phases(s)[0].lr_step} of its epochs" if s.schedule == "step" else
                 "rises and falls"))
    processes = evaluate.process()[1]
    print(f"on {dataset.train.images.device} in {s.precision}" + f", {processes} processes" * (processes > 1)
          + f", into {folder}\n", flush=True)


def listed(value):
    """A list or a dict of plain values as words."""
    return ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else ", ".join(
        map(str, value))


BITS = "torch", "machine", "processes"  # of config.json: what a run's bits depend on beside its settings


def keep_config(requested, s, dataset, model, folder, output, command):
    """Writes config.json, into a new folder where there is none; returns the folder."""
    device = dataset.train.images.device
    settings = requested | {"dataset": s.dataset, "data_dir": s.data_dir}
    config = {
        "settings": settings, "precision": s.precision, "device": str(device),
        "network": vars(model.version) | {"num_classes": model.num_classes}, "command": command,
        "source": dataset.source, "test_drawn": dataset.test_drawn, "classes": dataset.classes,
        "images": {"train": len(dataset.train.labels), "test": len(dataset.test.labels)},
        "image_shape": list(dataset.train.images.shape[1:]),
        "digests": dataset.digests, "pool": dataset.pool,
        "images_per_class": dict(zip(dataset.classes, data.counts(dataset.train, len(dataset.classes)))),
        "torch": torch.__version__, "python": platform.python_version(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        if device.type == "cpu" else torch.cuda.get_device_name(device), "git": git_commit(),
        "processes": evaluate.process()[1], "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    if folder is None:
        return make_folder(output, run_name(Namespace(**settings)), config)
    first = json.loads((folder / "config.json").read_text())
    config["settings"] = settings = settings | {"precision": first["settings"]["precision"]}  # "auto", as asked for
    changed = [f"{key} {first[key]}, now {config[key]}" for key in BITS if first.get(key, config[key]) != config[key]]
    # Of pixels too: another processor's or another torch's decoder of pictures, or its blur.
    elsewhere = any(first.get(key, "").split(",")[0] != config[key].split(",")[0] for key in ("torch", "machine"))
    recorded = first.get("digests", {})  # older runs have none, or none of held-out images
    now = {part: each for part, each in config["digests"].items() if part in recorded}
    other_bits = elsewhere and now != recorded
    for key, name in (("classes", "classes"), ("images", "images"), ("image_shape", "image shape"),
                      ("digests", "images and labels by their hashes"),
                      ("pool", "files, from which the seed draws the test images, by their hashes")):
        known = key in first or key == "pool" and dataset.test_drawn  # older runs drew other test images
        found, expected = (now, recorded) if key == "digests" else (config[key], first.get(key, {}))
        if known and found != expected and not (key == "digests" and other_bits):
            raise UsageError(f"--resume {folder}: the data set's {name} are {listed(found)}; expected "
                             f"{listed(expected)}, as when the run began")
    if other_bits:
        changed.append("other images or labels by their hashes")
    if changed:
        print(f"train.py: warning: the run began with {'; '.join(changed)}: its result may differ slightly from that "
              "of an uninterrupted run", file=sys.stderr)
    part = ("command", "git", "started", "python", "device", *BITS)
    resumed = first.get("resumed", []) + [{key: config[key] for key in part}]
    evaluate.write_json(folder / "config.json", config | {key: first[key] for key in part if key in first}
                        | {"resumed": resumed})
    before = run_name(Namespace(**DEFAULTS | first["settings"]))
    renamed = folder.with_name(run_name(Namespace(**settings)))
    if folder.name == before != renamed.name and not renamed.exists():  # lengthened: another number of epochs
        print(f"{folder} is now {renamed}")
        folder = folder.rename(renamed)
    return folder


def finish(rows, tested, model, dataset, s, folder):
    """The pictures, metrics.json and the last lines of a run."""
    metrics = summarise(rows, tested, model, dataset)
    in_training = (("smoothed labels", s.label_smoothing), ("class weights", s.class_weights))
    evaluate.draw_curves(rows, folder / "curves.png", f"{folder.name} on {dataset.name}",
                         ", ".join(what for what, used in in_training if used))
    if model.decoder is not None:
        note = "" if evaluate.rebuilds(s) else " (the decoder is not trained: beta 0)"
        evaluate.draw_reconstructions(model, dataset, s, folder, note)
    if dataset.synthetic:
        evaluate.draw_synthetic(dataset, folder)
    if model.variational and evaluate.rebuilds(s):
        evaluate.draw_variational(model, dataset, s, folder)
    evaluate.write_json(folder / "metrics.json", metrics)  # last: with it the run is complete
    if "accuracy" in metrics:
        accuracy, counts = metrics["accuracy"], data.counts(dataset.test, len(dataset.classes))
        print(f"test accuracy: {accuracy['last']:.2f} % after the last epoch; best (on "
              f"{accuracy['best_chosen_on']}) {accuracy['best']:.2f} %, epoch {accuracy['best_epoch']}"
              + f"; always predicting the largest class gives {accuracy['largest_class']:.2f} %"
              * (len(set(counts)) > 1))
        if "mirrored" in accuracy:
            print(f"with the logits of each image and its mirror image averaged: {accuracy['mirrored']:.2f} %")
    if metrics["reconstruction"]:
        print("reconstruction: MSE {mse:.6f}, MAE {mae:.5f}, PSNR {psnr:.2f} dB (pixels of 0-1)".format(
            **metrics["reconstruction"]))
        if "noisy_psnr" in metrics["reconstruction"]:
            print(f"the noisy input: PSNR {metrics['reconstruction']['noisy_psnr']:.2f} dB")
    files = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    print(f"saved in {folder}: {' '.join(files)}\nnext: {script('evaluate.py', '--ckpt', folder / 'best.pt')}")


class Result(NamedTuple):
    model: models.Autoencoder
    rows: list    # of the log, dicts
    folder: Path


def execute(given, command, output_file=None):
    """Trains one run, or resumes it, by the flags that were given (a dict). Returns a Result. Raises
    UsageError and the like, Stopped. output_file: where this process's output goes, moved into the
    run's folder once that is there."""
    rank, folder = evaluate.process()[0], None
    with contextlib.ExitStack() as stack:
        if rank:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        if "resume" in given:
            folder = Path(given["resume"])
            if folder.name in ("", ".."):  # a path without the folder's own name
                folder = folder.resolve()
            if not rank and folder.is_dir():
                stack.enter_context(locked(folder))
            s, state, model = reopen(given, folder)
            if not rank:
                for part in folder.glob(".*.part"):  # of a process that was killed as it wrote
                    with contextlib.suppress(OSError):
                        part.unlink()
        else:
            s, state, model = settle(given), None, None
        requested = dict(vars(s))
        dataset, model = prepare(s, model)
        if not rank:
            new = folder is None
            folder = keep_config(requested, s, dataset, model, folder, given.get("output", "outputs"), command)
            if new:
                stack.enter_context(locked(folder))
                if output_file:
                    with contextlib.suppress(PermissionError):  # Windows does not move open files
                        os.replace(output_file, folder / "output.txt")
        try:
            announce(s, dataset, model, folder)
            rows, tested = train(model, dataset, s, folder, state)
            if not rank:
                finish(rows, tested, model, dataset, s, folder)
        except BaseException as error:
            resume = "" if isinstance(error, Stopped) else f"; resume with: {script('train.py', '--resume', folder)}"
            kept = f"; its completed epochs are in {folder}" if not rank and (folder / "last.pt").exists() else \
                "; no epoch was completed"
            error.advice = f"{kept}{resume}" if not rank else ""
            if isinstance(error, BrokenPipeError) and not rank:  # of which nothing else is printed
                print(f"train.py: stopped: its output pipe was closed{error.advice}", file=sys.stderr)
            raise
    return Result(model.eval(), rows, folder)


def run(**settings):
    """Trains a network as the command does: run(version="v2", epochs=3) is --version v2 --epochs 3.

    settings: by the names of the flags (data_dir="data", flip=False, classes=["cat", "dog"]). Returns
    a Result: the model in eval mode, the log's rows and the run's folder. Raises a ValueError where
    the command would end with a message, RuntimeError where a loss is not finite.
    """
    for key in settings:
        if key == "help" or key in ACTS - {"output", "resume"}:
            raise UsageError(f"{key}: not a setting of one run; expected {' '.join(DEFAULTS)} output resume")
    if "decoder" in settings and settings["decoder"] is None:
        settings["decoder"] = "none"  # as for models.build
    flags = as_flags(settings)
    return execute(parse(flags), ["python", "train.py", *flags])


# ---------------------------------------------------------------- many runs

def plan(given):
    """(the runs of --sweep and --seeds, each a dict of flags; the folder they go into; how to compare them)."""
    output, sweep = Path(given.get("output", "outputs")), given.get("sweep")
    for flag in ("jobs", "list"):
        if flag in given and not sweep and "seeds" not in given:
            raise UsageError(f"--{flag}: has no effect on one run; expected --sweep or --seeds beside it")
    if given.get("list") and "jobs" in given:
        raise UsageError("--jobs: has no effect with --list, which runs nothing")
    common = {key: value for key, value in given.items() if key not in ACTS}
    runs, against = [{}], None
    if sweep:
        for flag in ("version", "encoder", "classifier", "decoder", "name"):
            if flag in given:
                raise UsageError(f"--{flag}: has no effect with --sweep, which names its own networks")
        runs, against, _ = SWEEPS[sweep]
        for flag in common:
            if len({repr(run.get(flag)) for run in runs}) > 1:
                raise UsageError(f"--{flag.replace('_', '-')}: the sweep {sweep} varies it itself; leave it out")
        if common.get("schedule", "step") != "step":
            runs = [{key: value for key, value in run.items() if key != "lr_step"} for run in runs]
        parts = {}  # what the flags change of any run, in order
        for run, changed in zip(SWEEPS[sweep].runs, runs):
            usual, s = (vars(settle({"dataset": "cifar10"} | each)) for each in (run, changed | common))
            usual = {key: usual[key] for key in DEFAULTS if key in common and key != "seed"}
            parts |= dict.fromkeys(name_parts(Namespace(**s), usual))
        output = output / "_".join([f"sweep-{sweep}", *parts])
    seeds = range(common.get("seed", 0), common.get("seed", 0) + given.get("seeds", 1))
    if seeds[-1] > 2**31:
        raise UsageError(f"--seeds {len(seeds)}: the last seed would be {seeds[-1]}; expected at most {2**31}")
    return [run | common | {"seed": seed} for run in runs for seed in seeds], output, against


MEMORY = 2 * 2**30  # bytes that a run may take


def jobs_and_threads(given, runs):
    """(runs at once, CPU threads of each) for these settings, of which some may be finished: a run's threads,
    and so its bits, do not depend on that. Small networks use several threads badly; networks of large
    batches well."""
    cores, free = torch.get_num_threads(), data.free_memory()
    jobs = given.get("jobs")
    if jobs is None:
        device = evaluate.pick_device(given.get("device", "auto"))
        if device.type == "cuda":
            jobs = torch.cuda.device_count() if device.index is None else 1
        elif max(s.batch_size for s in runs) >= 500:
            jobs = 1
        else:
            jobs = cores
    jobs = min(jobs, len(runs))
    at_once = jobs if "jobs" in given else int(max(1, min(jobs, free / MEMORY)))
    return at_once, max(1, cores // jobs)


def child(given, threads, output_file):
    """Trains one run in a child process, which exits when its parent does."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        sys.stdout = sys.stderr = open(output_file, "a", buffering=1)
    except FileNotFoundError:  # the parent was interrupted while this process started, and has removed its folder
        return
    with evaluate.errors("train.py"):
        execute(given, ["python", "train.py", *as_flags(given)], output_file)


NUMBERS = itertools.count()  # of the files in which children that have no folder yet write


def to_resume(given, s, folder):
    """The flags that resume the interrupted run of these flags in its folder."""
    return {"resume": str(folder), "data_dir": s.data_dir} | {key: given[key] for key in ("device",) if key in given}


def start_child(context, given, s, output, threads):
    """(a running process, the file of its output)."""
    folder = find_run(output, s)
    given = to_resume(given, s, folder) if folder else given | {"output": str(output)}
    file = folder / "output.txt" if folder else output / f".output-{os.getpid()}-{next(NUMBERS)}.txt"
    process = context.Process(target=child, args=(given, threads, file))
    process.start()
    return process, file


def summary(folder, minutes, width):
    """The line of a finished run, its name in a column of that width."""
    metrics = json.loads((folder / "metrics.json").read_text())
    accuracy = f"{metrics['accuracy']['last']:.2f} %" if "accuracy" in metrics else "-"
    psnr = f"{metrics['reconstruction']['psnr']:.2f} dB" if metrics["reconstruction"] else "-"
    return f"{folder.name:<{width}}{accuracy:>10}{psnr:>10}{minutes:>8.1f} min"


def epochs_done(output, s):
    folder = find_run(output, s)
    if folder is None or not (folder / "log.csv").exists():
        return 0
    return max(0, len((folder / "log.csv").read_text().splitlines()) - 1)


def run_all(todo, output, jobs, threads):
    """Trains runs (pairs of flags and settings), `jobs` at once, each in a process of its own; prints a
    line as each ends. Returns the names of those that failed."""
    linux = sys.platform == "linux"
    context = multiprocessing.get_context("forkserver" if linux else "spawn")
    if linux:  # the imports are done once, in a process that ignores Ctrl-C, as its children do: this one ends them
        context.set_forkserver_preload(["__main__", "torchvision.transforms.v2", "matplotlib.figure"])
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        multiprocessing.forkserver.ensure_running()
        signal.signal(signal.SIGINT, handler)
    gpus = torch.cuda.device_count() if todo[0][1].device in ("auto", "cuda") else 0
    free, waiting, running, failed, begun = list(range(jobs)), list(todo), {}, [], time.time()
    width = max(len(run_name(s)) for _, s in todo)
    print(f"{'run':<{width}}{'accuracy':>10}{'PSNR':>10}{'time':>12}", flush=True)
    try:
        while waiting or running:
            while waiting and free:
                (given, s), slot = waiting.pop(0), free.pop(0)
                if gpus:
                    given = given | {"device": f"cuda:{slot % gpus}"}
                process, file = start_child(context, given, s, output, threads)
                running[process.sentinel] = process, file, s, slot, time.time()
            if sys.stdout.isatty():
                show_state(todo, waiting, running, output, begun)
            for sentinel in multiprocessing.connection.wait(list(running), 2 if sys.stdout.isatty() else None):
                process, file, s, slot, start = running.pop(sentinel)
                process.join()
                print("\r\x1b[K" * sys.stdout.isatty(), end="")  # the line of the state is cleared
                free.append(slot)
                folder = find_run(output, s)
                if process.exitcode == 0:
                    print(summary(folder, (time.time() - start) / 60, width), flush=True)
                    continue
                file = folder / "output.txt" if folder and not file.exists() else file
                lines = file.read_text().split("\n") if file.exists() else []
                failed.append(run_name(s))
                last = next((line for line in reversed(lines) if line), "it printed nothing")
                print(f"{run_name(s)}: failed: {last} (status {process.exitcode}; its output is in {file})",
                      flush=True)
    except BaseException as error:
        for process, file, *_ in running.values():
            process.terminate()
            process.join()
            if file.parent == output:  # of a run that has no folder yet
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            output.rmdir()
        error.advice = "; the same command resumes the runs"
        raise
    return failed


def show_state(todo, waiting, running, output, begun):
    """On a terminal, the line of what is running and the time left, from the epochs done since the start."""
    total = sum(s.epochs for _, s in todo)
    left = sum(s.epochs for _, s in waiting)
    left += sum(s.epochs - epochs_done(output, s) for _, _, s, *_ in running.values())
    rest = f", about {(time.time() - begun) / (total - left) * left / 60:.0f} min left" if total > left else ""
    line = f"{len(todo) - len(waiting) - len(running)} of {len(todo)} done{rest}; running: " + ", ".join(
        run_name(s) for _, _, s, *_ in running.values())
    print(f"\r\x1b[K{line[:shutil.get_terminal_size().columns - 1]}", end="", flush=True)


def unfinished(pairs, output):
    """Those runs (pairs of flags and settings) that are not finished in `output`."""
    return [(each, s) for each, s in pairs if not evaluate.finished(find_run(output, s))]


def train_many(given, command):
    """Trains or lists the runs of --sweep and --seeds, and compares them. Returns the exit status."""
    runs, output, against = plan(given)
    pairs = [(each, settle({"dataset": recipe(each.get("version", "v4"))["dataset"]} | each)) for each in runs]
    if given.get("list"):
        for each in runs:
            print(script("train.py", *as_flags(each), "--seeds", "1", "--output", output))
        return 0
    for each in runs:
        each.setdefault("dataset", recipe(each.get("version", "v4"))["dataset"])  # no substitute among many
    rank, processes = evaluate.process()
    if processes > 1 and "jobs" in given:
        raise UsageError(f"--jobs {given['jobs']}: has no effect under torchrun, which trains one run after another; "
                         "leave it out")
    todo, failed = unfinished(pairs, output), []
    if len(todo) < len(pairs) and not rank:
        print(f"{len(pairs) - len(todo)} of {len(pairs)} runs are finished already, in {output}")
    if processes > 1 or len(pairs) == 1:
        for each, s in todo:
            if processes > 1:
                dist.barrier()  # all have looked before the first one writes
            folder = find_run(output, s)
            execute(to_resume(each, s, folder) if folder else each | {"output": str(output)}, command)
    elif todo:
        jobs, threads = jobs_and_threads(given, [s for _, s in pairs])
        evaluate.prepare_data(todo[0][1])  # one that is unavailable is an error now, not of each run
        print(f"{len(todo)} run{'s' * (len(todo) > 1)}, {jobs} at once with {threads} thread{'s' * (threads > 1)} "
              f"each, into {output}", flush=True)
        output.mkdir(parents=True, exist_ok=True)
        with locked(output):
            todo = unfinished(pairs, output)  # another process may have trained them meanwhile
            failed = run_all(todo, output, jobs, threads) if todo else []
    if rank or len(pairs) == 1:
        return 0
    if failed:
        print(f"train.py: {len(failed)} of {len(pairs)} runs failed: {' '.join(failed)}; the same command tries "
              "them again", file=sys.stderr)
    finished = [folder for _, s in pairs if evaluate.finished(folder := find_run(output, s))]
    if len(finished) > 1:
        print()
        where = output / "comparison" if given.get("sweep") else output / f"comparison-{run_name(pairs[0][1])}"
        try:
            evaluate.compare(finished, where, against)
        except UsageError:  # runs that it pairs have failed
            evaluate.compare(finished, where)
        print(f"saved in {where}")
    return 1 if failed else 0


# ---------------------------------------------------------------- the command line

def as_flags(settings):
    """Settings (a dict) as words of a command line: {"beta": 0.0, "skip": True} as --beta 0 --skip."""
    words = []
    for key, value in settings.items():
        flag = f"--{key.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
            continue
        if isinstance(value, dict):
            value = ",".join(f"{name}={float(share)!r}" for name, share in value.items())
        elif isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        elif isinstance(value, float):
            value = f"{value:g}" if float(f"{value:g}") == value else repr(float(value))
        words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return words


def make_parser(version="v4"):
    """The command line, its help with the defaults of that version. A flag that is not given is absent."""
    parser = argparse.ArgumentParser(
        description=f"Trains an autoencoder with a classifier. In brackets, the defaults of {version}; -h after "
        "--version NAME shows those of another version.", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = evaluate.fail
    usual = recipe(version)
    for title, rows in (SETTINGS | ACTIONS).items():
        formula = " + ".join(f"{flag} * {term.name}" for flag, term in losses.TERMS.items())
        group = parser.add_argument_group(title, formula if title == "loss" else None)
        for name, default, accepts, metavar, text in rows:
            value, flag = usual.get(name, default), f"--{name.replace('_', '-')}"
            if isinstance(value, list):
                value = ",".join(value)
            elif isinstance(value, float):
                value = f"{value:g}"
            shown = "" if value is None else f" ({'yes' if value is True else 'no' if value is False else value})"
            if accepts is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text + shown)
            elif isinstance(accepts, tuple) and not isinstance(accepts, Number):
                group.add_argument(flag, choices=accepts, help=text + shown)
            elif name == "sweep":
                group.add_argument(flag, choices=SWEEPS, help="train the runs of a table, and compare them: "
                                   + "; ".join(f"{key}: {sweep.help}" for key, sweep in SWEEPS.items()))
            else:
                group.add_argument(flag, type=accepts, metavar=metavar, help=text + shown)
            if name == "decoder":
                group.add_argument("--no-decoder", dest="decoder", action="store_const", const="none",
                                   help="build no decoder; beta is then 0")
    return parser


def parse(argv):
    """The flags that were given, a dict from setting to value. UsageError."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--version", default="v4")
    first.error = evaluate.fail
    return vars(make_parser(first.parse_known_args(argv)[0].version).parse_args(argv))


def main(argv):
    with evaluate.errors("train.py"):
        given = parse(argv)
        command = ["python", "train.py", *argv]
        with process_group(given):
            if {"sweep", "seeds", "jobs", "list"} & set(given):
                if "resume" in given:
                    raise UsageError("--resume: resumes one run; leave out --sweep, --seeds, --jobs and --list")
                return train_many(given, command)
            execute(given, command)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
