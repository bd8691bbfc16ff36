"""Trains an autoencoder with a classifier on small images.

    python train.py --version v4              # on CIFAR-10, into outputs/v4/
    python train.py --version v4 --beta 0     # the classifier alone, the decoder left out
    python train.py --resume outputs/v4       # goes on where that run stopped
    python train.py -h                        # every setting

A version has its recipe (the table below); every setting of it has a flag. One run fills one
folder: config.json, log.csv, metrics.json, curves.png, recon.png, recon/, best.pt, last.pt.
Under torchrun several processes train one model together.
"""
import argparse
import contextlib
import csv
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist

import data
import models
from evaluate import (USER_ERRORS, Stopped, UsageError, autocast, best_row, chosen_on, draw_curves,
                      draw_reconstructions, draw_sweep, draw_synthetic, draw_variational, keep_freed_memory,
                      load_checkpoint, load_data, measure, mine, noise_in_tests, per_class, pick_device,
                      pick_precision, rebuilds, save_checkpoint, stop, view, write_json, write_whole)
from losses import balanced_weights, jumble, l2_reg_loss, weighted_loss

# Every setting, as the CIFAR study has it, in the order in which they name a run's folder. size
# None is the images' own; margin: scaled to 8/7 of size, then cropped; scale: of the pixels (see
# data.SCALES); clean_test: no noise on test images; of separate training, first_share is the
# autoencoder's share of the epochs, first_decay its weight decay where that is another one.
STUDY = dict(
    dataset="cifar10", size=None, margin=False, scale="imagenet", classes=None, train_size=None,
    test_size=None, val_share=0.0, variant="complete", constrain=None, blur=0.0, noise=0.0,
    clean_test=False, rotate=0.0, flip=True,
    encoder=None, classifier=None, no_decoder=False, skip=False, pretrained=None,
    alpha=1.0, beta=1.0, gamma=0.0, delta=0.0, kl=0.0, jigsaw_grid=4, class_weights=None,
    optimizer="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4, lr_step=10, lr_decay=0.1, epochs=40,
    batch_size=32, separate=False, first_share=0.5, first_decay=None, freeze_encoder=True,
    precision="auto", seed=0)
STANDARD = STUDY | dict(size=224, margin=True, pretrained=True)
# The other studies: Adam, no drops of the rate, no flips.
OTHERS = STUDY | dict(scale="0..1", flip=False, alpha=0.0, optimizer="adam", lr=0.001, weight_decay=0.0,
                      lr_step=1000, epochs=20, batch_size=100)
JOINT = OTHERS | dict(scale="-1..1", classes=["automobile", "cat", "dog", "horse", "truck"], rotate=10.0,
                      noise=0.05, clean_test=True, alpha=0.1, epochs=10)  # 0.05 of 0-1 is 0.1 of -1..1
SWEEPS = {"kind": ["mlp", "combo", "cnn"], "latent": ["cnn10", "cnn32", "cnn100", "cnn1000"],
          "depth": ["cnnL1", "cnnL3", "cnnL5", "cnnL10"]}
FASHION = OTHERS | dict(dataset="fashionmnist", epochs=30, batch_size=64)
RECIPES = {name: STUDY for name in models.VERSIONS} | {
    "v2.3": STUDY | dict(size=64),
    "v4": STUDY | dict(gamma=0.001),
    "v4-stride2": STUDY | dict(gamma=0.001),
    "vgg": STANDARD, "resnet": STANDARD, "mobilenet": STANDARD, "squeezenet": STANDARD,
    "joint5": JOINT, "cnn6": JOINT | dict(classes=None, alpha=1.0, beta=0.0),
    **{name: OTHERS for names in SWEEPS.values() for name in names},
    "mnist": OTHERS | dict(dataset="mnist", alpha=1.0, weight_decay=0.01, first_share=2 / 3, first_decay=0.0),
    "fashion-mlp": FASHION, "fashion-cnn": FASHION, "vae": FASHION | dict(kl=0.02),
}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}


# ---------------------------------------------------------------- training

def phases(s):
    """The run's parts, each the settings that hold in it, with `start` and `end` (epochs from 0) and
    whether the encoder is `frozen`: one, or the two parts of separate training, as the CIFAR
    study's program has them: the autoencoder alone, then the classifier on its encoder; in each
    part the learning rate starts anew and drops twice as often."""
    whole = vars(s) | dict(start=0, end=s.epochs, frozen=False)
    if not s.separate:
        return [Namespace(**whole)]
    first, lr_step = max(1, int(s.epochs * s.first_share + 1e-9)), max(1, s.lr_step // 2)
    decay = s.weight_decay if s.first_decay is None else s.first_decay
    return [Namespace(**whole | dict(alpha=0.0, lr_step=lr_step, end=first, weight_decay=decay)),
            Namespace(**whole | dict(beta=0.0, delta=0.0, kl=0.0, lr_step=lr_step, start=first,
                                     frozen=s.freeze_encoder))]


def make_optimizer(model, s):
    """The optimizer over the parts that a phase trains, the others frozen; gamma goes in as decay.

    The gradient of gamma * l2_reg_loss is gamma * parameter, which is what (not decoupled)
    weight decay adds, at no cost of its own.
    """
    trained = {"encoder": not s.frozen, "classifier": s.alpha > 0, "decoder": rebuilds(vars(s))}
    for name, wanted in trained.items():
        if getattr(model, name) is not None:
            getattr(model, name).requires_grad_(wanted)
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device.type
    fused = device == "cpu" or (device == "cuda" and s.optimizer != "adagrad")
    momentum = dict(momentum=s.momentum) if s.optimizer == "sgd" else {}
    return OPTIMIZERS[s.optimizer](parameters, lr=s.lr, weight_decay=s.weight_decay + s.gamma,
                                   fused=fused or None, **momentum)


TERMS = "classifier", "autoencoder", "jigsaw", "kl"


def train_epoch(model, split, optimizer, s, epoch, show=None, net=None):
    """One epoch (counted from 0) of the weighted loss over a Split. s: a phase.

    Returns the epoch's means as plain numbers: loss, the TERMS, l2, accuracy (None where not
    trained). The seed and the epoch alone decide order, flips, tiles, noise and dropout. Nothing
    waits for the device but every hundredth step, where a loss that is not finite ends the run
    (Stopped). show(step, steps) is called at every step. net: the model as DistributedDataParallel
    wraps it; each process then takes its share of every batch.
    """
    model.train()
    if s.frozen:
        model.encoder.eval()  # BatchNorm keeps its statistics
    for group in optimizer.param_groups:
        group["lr"] = s.lr * s.lr_decay ** ((epoch - s.start) // s.lr_step)
    rank, processes = mine()
    seed = s.seed * 1_000_003 + epoch
    torch.manual_seed(~seed + rank * 2**40)  # dropout: another stream than the order's
    n, device = len(split.labels), split.labels.device
    tiles, noise = torch.Generator().manual_seed(seed + 2**40), torch.Generator(device)
    noise.manual_seed(seed + (rank + 2) * 2**40)
    scores = model.version.scores or model.num_classes
    weights = balanced_weights(split.labels, scores) if s.class_weights else None
    alpha, decode, steps = s.alpha > 0, s.beta > 0, math.ceil(n / s.batch_size)
    history = torch.zeros(steps, len(TERMS) + 1, device=device)  # sums over a batch: TERMS, right answers
    zero = torch.zeros((), device=device)
    for step, (images, labels) in enumerate(data.batches(split, s.batch_size, epoch_seed=seed, flip=s.flip,
                                                         degrees=s.rotate, part=(rank, processes),
                                                         **view(vars(s)))):
        batch = min(s.batch_size, n - step * s.batch_size)
        count = len(range(rank, batch, processes))  # 0 where this process's one image is for company
        inputs = data.add_noise(images, s.noise, noise, s.scale) if s.noise else images
        mended, code = None, (None, None)
        with autocast(device, s.precision):
            logits, rebuilt = (net or model)(inputs, classify=alpha, reconstruct=decode)
            if s.kl:
                code = models.gaussian(model).mean, models.gaussian(model).log_variance
            if s.delta:
                order = torch.rand(batch, s.jigsaw_grid ** 2, generator=tiles).argsort(1)
                order = order[rank::processes] if count else order[:1]
                jumbled = jumble(inputs, s.jigsaw_grid, order.to(device))
                mended = (net or model)(jumbled, classify=False)[1]
        loss, terms = weighted_loss(s.alpha, s.beta, 0.0, s.delta, s.kl, logits=logits, labels=labels,
                                    class_weights=weights, reconstruction=rebuilt, images=images,
                                    jigsaw_reconstruction=mended, mean=code[0], log_variance=code[1])
        if processes > 1:  # DistributedDataParallel takes the mean over the processes
            loss = loss * (count * processes / batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            right = (logits.argmax(1) == labels).float().mean() if alpha else zero
            torch.mul(torch.stack([*(terms.get(name, zero) for name in TERMS), right]), count, out=history[step])
        if step % 100 == 99 or step == steps - 1:
            check_finite(history[step // 100 * 100:step + 1], epoch, step // 100 * 100)
        if show:
            show(step + 1, steps)
    sums = history.sum(0)
    if processes > 1:
        dist.all_reduce(sums)
    *means, right = (sums / n).tolist()
    # The weights change little within an epoch: the term is taken once, as it ends.
    with torch.no_grad():
        l2 = l2_reg_loss(p for group in optimizer.param_groups for p in group["params"]).item()
    used = dict(zip(TERMS, (s.alpha, s.beta, s.delta, s.kl)))
    return {"loss": sum(weight * mean for weight, mean in zip(used.values(), means)) + s.gamma * l2,
            **{name: mean if used[name] else None for name, mean in zip(TERMS, means)},
            "l2": l2, "accuracy": 100 * right if alpha else None}


def check_finite(history, epoch, first):
    """Raises Stopped where a step's losses (rows of TERMS, right answers) are not finite."""
    bad = (~history.isfinite()).nonzero().tolist()
    if bad:
        step, term = bad[0]
        raise Stopped(f"epoch {epoch + 1}, step {first + step + 1}: the {TERMS[term]} loss is "
                      f"{history[step, term].item()}; a smaller --lr may help")


def train(model, dataset, s, folder, state=None):
    """The whole run: trains, measures after each epoch, keeps log.csv, best.pt and last.pt.

    state: a last.pt's content, after which to go on. Returns the log, a list of rows (dicts), and
    the last measurement. Raises Stopped.
    """
    rows, tested = (state["rows"], state["tested"]) if state else ([], None)
    settings, (rank, processes) = vars(s), mine()
    print("epoch     lr       train loss         test loss       test  PSNR    time  images\n"
          "              class.   recon.    class.   recon.   acc. %    dB       s      /s", flush=True)
    for row in rows:
        print_row(row)
    for phase in phases(s):
        if len(rows) >= phase.end:
            continue
        optimizer = make_optimizer(model, phase)
        if len(rows) > phase.start:
            optimizer.load_state_dict(state["optimizer"])
        net = torch.nn.parallel.DistributedDataParallel(model) if processes > 1 else None
        # In the second half of separate training what the first one has learnt is measured, too.
        how = dict(precision=s.precision, classify=phase.alpha > 0, reconstruct=rebuilds(settings),
                   noise=noise_in_tests(settings), grid=s.jigsaw_grid if s.delta else None, **view(settings))
        for epoch in range(len(rows), phase.end):
            start = time.perf_counter()
            show = progress(epoch + 1) if sys.stdout.isatty() and not rank else None
            trained = train_epoch(model, dataset.train, optimizer, phase, epoch, show, net)
            seconds = time.perf_counter() - start
            tested = measure(model, dataset.test, **how)
            held = dataset.val and measure(model, dataset.val, **how)
            weights = dict(zip(TERMS, (phase.alpha, phase.beta, phase.delta, phase.kl)))
            tested["loss"] = sum(weight * (tested[name] or 0) for name, weight in weights.items())
            tested["loss"] += s.gamma * trained["l2"]
            row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}
            row |= {f"train_{key}": value for key, value in trained.items()}
            row |= {f"test_{key}": tested[key] for key in ("loss", *TERMS, "accuracy", "mse", "mae", "psnr",
                                                           "net_error_per_image")}
            row |= {f"val_{key}": held and held[key] for key in ("accuracy", "mse")}
            row |= {"seconds": seconds, "images_per_second": len(dataset.train.labels) / seconds,
                    "test_seconds": time.perf_counter() - start - seconds}
            rows.append(row)
            if rank == 0:
                print_row(row)
                write_whole(folder / "log.csv", lambda part: write_csv(part, rows))
                if best_row(rows) is row:
                    save_checkpoint(folder / "best.pt", model, settings, dataset.classes, epoch=epoch + 1)
                # No random state: every epoch's is made from the seed and the epoch's number.
                save_checkpoint(folder / "last.pt", model, settings, dataset.classes, epoch=epoch + 1,
                                optimizer=optimizer.state_dict(), rows=rows, tested=tested)
    return rows, tested


def progress(epoch):
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

def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def print_row(row):
    def number(key, width, digits):
        return f"{'-' if row[key] is None else format(row[key], f'.{digits}f'):>{width}}"

    print(f"{row['epoch']:>5}{row['lr']:>7.2g}{number('train_classifier', 9, 4)}"
          f"{number('train_autoencoder', 9, 4)}{number('test_classifier', 10, 4)}"
          f"{number('test_autoencoder', 9, 4)}{number('test_accuracy', 9, 2)}"
          f"{number('test_psnr', 6, 1)}{row['seconds']:>8.1f}{row['images_per_second']:>8.0f}",
          flush=True)


def summarise(rows, tested, model, dataset):
    """metrics.json: the results of a run, from its log and its last measurement."""
    last, count = rows[-1], models.parameter_count(model)
    result = {"dataset": dataset.name, "source": dataset.source, "epochs": len(rows)}
    if last["test_accuracy"] is not None:
        best = best_row(rows)
        result["accuracy"] = {"last": last["test_accuracy"], "best": best["test_accuracy"],
                              "best_epoch": best["epoch"], "best_chosen_on": chosen_on(rows)}
        result["per_class_accuracy"] = per_class(tested["confusion"], dataset.classes)
    errors = ("autoencoder", "mse", "mae", "psnr", "absolute_error_total", "absolute_error_per_image",
              "net_error_total", "net_error_per_image")
    result["reconstruction"] = None if tested["mse"] is None else {key: tested[key] for key in errors}
    seconds = sorted(row["seconds"] for row in rows)[len(rows) // 2]
    return result | {"parameters": count, "megabytes": count * 4 / 1e6,
                     "seconds_per_epoch": seconds, "images_per_second": len(dataset.train.labels) / seconds}


def run_name(s, recipe):
    """The version and whatever of the settings differs from its recipe: v4_beta0,
    v4_dataset-shapes, v4_no-decoder."""
    parts = [s.version]
    for key, usual in recipe.items():
        value, flag = getattr(s, key), key.replace("_", "-")
        if value == usual or (key == "beta" and s.no_decoder) or (
                key == "flip" and s.dataset in data.NEVER_FLIPPED):
            continue
        if isinstance(value, bool):
            parts.append(flag if value else f"no-{flag}")
            continue
        if key == "dataset":
            value = Path(value).stem
        elif isinstance(value, dict):
            value = [f"{name}{share:g}" for name, share in value.items()]
        elif isinstance(value, float):
            value = f"{value:g}"
        text = "-".join(value) if isinstance(value, list) else str(value)
        text = re.sub(r"[^A-Za-z0-9.-]+", "-", text.replace("'", "p")).strip("-")
        parts.append(f"{flag}{text}" if text[:1].isdigit() else f"{flag}-{text}")
    return "_".join(parts)[:120]


def make_folder(output, name, config):
    """A new folder for a run, with its config.json from the first moment on: output/name, or with a
    number where that is taken."""
    part = Path(output, f".{name}.{os.getpid()}")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"--output {output}: expected a folder to write to ({error.strerror})") from None
    try:
        write_json(part / "config.json", config)
        for count in itertools.count(1):
            folder = Path(output, name if count == 1 else f"{name}_run{count}")
            if not folder.exists():
                with contextlib.suppress(OSError):  # another run was faster
                    return part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def git_commit():
    """The commit of this code, with "+changes" where files differ from it; None without git."""
    def git(*words):
        return subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True,
                              text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + "+changes" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------- the command line

def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or a float from low (or above it) to high."""
    def convert(text):
        try:
            value = kind(text)
            if (low < value if above else low <= value) and value <= high and math.isfinite(value):
                return value
        except (ValueError, OverflowError):
            pass
        expected = "a whole number" if kind is int else "a number"
        upper = "" if high == math.inf else f", at most {high:g}"
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected {expected} {'above' if above else 'of at least'} {low:g}{upper}")
    return convert


def shares(text):
    """An argparse type: "bird=0.5,deer=0.25" as a dict."""
    result = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        result[name] = number(float, 0, 1, above=True)(value)
    if "" in result:
        raise argparse.ArgumentTypeError(f"{text!r}: expected CLASS=SHARE,..., such as bird=0.5,deer=0.5")
    return result


def make_parser():
    """The command line. A flag that is not given is None: the recipe has its value."""
    parser = argparse.ArgumentParser(
        description="Trains an autoencoder with a classifier. Defaults are the version's recipe; "
        "in brackets the CIFAR study's.", allow_abbrev=False)
    parser.error = lambda message: stop("train.py", message)
    share, positive = number(float, 0), number(int, 1)
    on, off = dict(action="store_true", default=None), dict(action="store_false", default=None)

    network = parser.add_argument_group("network")
    network.add_argument("--version", metavar="NAME", help=f"{' '.join(models.VERSIONS)} (v4)")
    network.add_argument("--encoder", metavar="NOTATION", help="another encoder: \"C'(32)>C(32)\"")
    network.add_argument("--classifier", metavar="NOTATION", help="another classifier: \"L(128)>L'(10)\"")
    network.add_argument("--no-decoder", **on, help="build no decoder; beta is then 0")
    network.add_argument("--skip", **on, help="the modified network: lower features, through one conv, join "
                         "the final ones before the classifier's last part")
    network.add_argument("--no-pretrained", dest="pretrained", **off,
                         help="vgg, resnet, mobilenet, squeezenet: without the ImageNet weights")

    sets = parser.add_argument_group("data")
    sets.add_argument("--dataset", metavar="NAME|PATH",
                      help=f"{' '.join(data.NAMES)} shapes, a folder with train/<class>/ and "
                      "test/<class>/, or an .npz (cifar10, or shapes where it cannot be had)")
    sets.add_argument("--data-dir", metavar="DIR", help="where named sets lie or are downloaded to (data)")
    sets.add_argument("--size", type=number(int, 1, 1024), metavar="PIXELS",
                      help="scale the images to this side (the images' own; v2.3: 64; vgg, resnet, mobilenet, "
                      "squeezenet: 224, cropped out of 256)")
    sets.add_argument("--classes", type=lambda text: text.split(","), metavar="NAME,...",
                      help="these classes alone (all)")
    sets.add_argument("--train-size", type=positive, metavar="N", help="train on N images (all)")
    sets.add_argument("--test-size", type=positive, metavar="N", help="test on N images (all)")
    sets.add_argument("--val-share", type=number(float, 0, 0.9), metavar="X",
                      help="hold this share of the training images out and choose the best epoch on it "
                      "(0: the best is chosen on the test images)")
    sets.add_argument("--variant", choices=data.VARIANTS, help="make the training set unequal (constrained) "
                      "and, all but that one, equal again (complete)")
    sets.add_argument("--constrain", type=shares, metavar="CLASS=X,...",
                      help="the share of a class's training images that --variant keeps "
                      "(bird=0.5,deer=0.5,truck=0.5)")
    sets.add_argument("--blur", type=number(float, 0, 10), metavar="SIGMA",
                      help="blur all images, train and test, by a Gaussian of SIGMA pixels (0)")
    sets.add_argument("--noise", type=number(float, 0, 10), metavar="STD", help="Gaussian noise on the network's "
                      "input, train and test, on pixels of 0-1; the clean image is what it shall rebuild (0)")
    sets.add_argument("--rotate", type=number(float, 0, 180), metavar="DEGREES",
                      help="turn training images by up to so much, either way (0; joint5, cnn6: 10)")
    sets.add_argument("--no-flip", dest="flip", **off,
                      help="no left-right flips in training (flips; never on mnist and svhn)")

    loss = parser.add_argument_group(
        "loss", "alpha * cross entropy + beta * reconstruction error + gamma * sum of squares / 2 + "
        "delta * reconstruction error from jumbled tiles + kl * divergence of a variational code")
    loss.add_argument("--alpha", type=share, metavar="X", help="weight of the classifier loss (1)")
    loss.add_argument("--beta", type=share, metavar="X", help="weight of the autoencoder loss (1)")
    loss.add_argument("--gamma", type=share, metavar="X", help="weight of the L2 loss (0; v4: 0.001)")
    loss.add_argument("--delta", type=share, metavar="X", help="weight of the jigsaw loss (0)")
    loss.add_argument("--kl", type=share, metavar="X", help="weight of the KL loss of vae, per value of an image; "
                      "2 s^2 for pixels of standard deviation s (0; vae: 0.02)")
    loss.add_argument("--jigsaw-grid", type=number(int, 2, 32), metavar="N",
                      help="cut a picture into N x N tiles (4)")
    loss.add_argument("--class-weights", choices=["balanced"],
                      help="weigh the classifier loss so that every class counts the same (off)")

    training = parser.add_argument_group("training")
    training.add_argument("--optimizer", choices=OPTIMIZERS, help="(sgd)")
    training.add_argument("--lr", type=number(float, 0, above=True), metavar="X", help="learning rate (0.01)")
    training.add_argument("--momentum", type=number(float, 0, 1), metavar="X", help="of sgd (0.9)")
    training.add_argument("--weight-decay", type=share, metavar="X", help="(0.0001)")
    training.add_argument("--lr-step", type=positive, metavar="N",
                          help="multiply the learning rate every N epochs (10) ...")
    training.add_argument("--lr-decay", type=number(float, 0, 1, above=True), metavar="X",
                          help="... by this (0.1)")
    training.add_argument("--epochs", type=positive, metavar="N", help="(40)")
    training.add_argument("--batch-size", type=positive, metavar="N",
                          help="images per step, of all processes together (32)")
    training.add_argument("--separate", **on, help="the first half of the epochs trains the autoencoder alone, "
                          "the second the classifier on its encoder")
    training.add_argument("--no-freeze-encoder", dest="freeze_encoder", **off,
                          help="with --separate: the second half trains the encoder, too")

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=number(int, 0, 2**31), metavar="N",
                     help="of weights, order, flips, crops, noise, dropout, tiles and draws (0)")
    run.add_argument("--device", help="auto, cpu, cuda, cuda:1 (auto)")
    run.add_argument("--precision", choices=("auto", "bf16", "fp32"),
                     help="auto is bf16 where the device has it in hardware (auto)")
    run.add_argument("--output", metavar="DIR", help="where run folders go (outputs)")
    run.add_argument("--sweep", choices=SWEEPS, help="train the members of a comparison in turn, then table and "
                     "pictures: " + "; ".join(f"{name}: {' '.join(names)}" for name, names in SWEEPS.items()))
    run.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its settings; "
                     "--epochs N lengthens it")
    return parser


def settle(args):
    """The run's settings from its flags and its recipe. UsageError."""
    version = args.version or "v4"
    models.find(version)
    s = Namespace(version=version, data_dir=args.data_dir or "data", device=args.device or "auto",
                  **{key: usual if getattr(args, key, None) is None else getattr(args, key)
                     for key, usual in RECIPES[version].items()})
    if args.no_decoder:
        s.beta = 0.0
    network = models.VERSIONS[version]

    def refuse(condition, flag, why):
        if condition:
            raise UsageError(f"--{flag}: {why}")
    for notation in (args.encoder, args.classifier):
        if notation is not None and notation not in {*models.BACKBONES, *models.OWN}:
            models.parse(notation)
    refuse(s.alpha and not (s.classifier or network.classifier), f"alpha {s.alpha:g}",
           f"{version} has no classifier; --classifier NOTATION gives it one")
    refuse(s.classifier and not s.alpha, f"classifier {s.classifier}",
           "is not trained with alpha 0; add --alpha 1")
    refuse(network.decoder is None and rebuilds(vars(s)), f"beta {s.beta:g} --delta {s.delta:g}",
           f"{version} has no decoder")
    refuse(s.kl and "N(" not in (s.encoder or network.encoder), f"kl {s.kl:g}",
           "needs an encoder that ends in N(n)")
    decoder = "there is no decoder with --no-decoder; leave one of the two out"
    refuse(s.no_decoder and args.beta, f"beta {args.beta or 0:g}", decoder)
    refuse(s.no_decoder and s.delta, f"delta {s.delta:g}", decoder)
    refuse(not s.alpha and not rebuilds(vars(s)), "alpha 0 --beta 0", "there is nothing to train on; one must "
           "be above 0" + " (--no-decoder makes beta 0)" * s.no_decoder)
    refuse(s.separate and not (s.alpha and rebuilds(vars(s))), "separate",
           "trains a decoder and then a classifier; expected alpha and beta (or delta) above 0, and a decoder")
    refuse(s.separate and s.epochs < 2, f"epochs {s.epochs}", "--separate has two halves; expected at least 2")
    refuse(not s.freeze_encoder and not s.separate, "no-freeze-encoder", "belongs to --separate")
    refuse(s.constrain and s.variant == "complete", "constrain",
           "belongs to --variant constrained, undersampled, oversampled or smote")
    refuse(args.jigsaw_grid and not s.delta, f"jigsaw-grid {s.jigsaw_grid}", "belongs to --delta above 0")
    refuse(s.class_weights and not s.alpha, f"class-weights {s.class_weights}", "needs alpha above 0")
    refuse(args.momentum is not None and s.optimizer != "sgd", f"momentum {s.momentum:g}",
           f"belongs to --optimizer sgd, not {s.optimizer}")
    refuse(args.pretrained is False and not RECIPES[version]["pretrained"], "no-pretrained",
           f"{version} has no pretrained weights")
    if args.dataset is not None and args.dataset not in data.NAMES and Path(args.dataset).exists():
        s.dataset = str(Path(args.dataset).resolve())  # a later evaluation finds it from any folder
    elif args.dataset is None and s.dataset == "cifar10":
        s.dataset = None  # or shapes, where it cannot be had
    s.flip = s.flip and s.dataset not in data.NEVER_FLIPPED
    return s


def reopen(args):
    """(settings, folder, last.pt's content or None) of a run that is to go on. UsageError."""
    folder = Path(args.resume)
    try:
        config = json.loads((folder / "config.json").read_text())
        s = Namespace(**{key: config[key] for key in ("version", "data_dir", "device", *STUDY)})
    except (OSError, ValueError, TypeError, KeyError):
        raise UsageError(f"--resume {folder}: expected the folder of a run, with its config.json") from None
    path = folder / "last.pt"
    state = load_checkpoint(path) if path.exists() else None
    if state and not {"rows", "tested", "optimizer"} <= set(state[1]):
        raise UsageError(f"{path}: not a last.pt of train.py; expected what a run can go on from")
    done = len(state[1]["rows"]) if state else 0
    if args.dataset is not None and Path(args.dataset).exists():
        args.dataset = str(Path(args.dataset).resolve())
    for key in ("version", "output", *STUDY):
        value = getattr(args, key, None)  # margin has no flag
        if value not in (None, getattr(s, key, None)) and key != "epochs":
            raise UsageError(f"--{key.replace('_', '-')} {value}: a run goes on with its own settings, here "
                             f"{getattr(s, key, folder.parent)}; leave it out, or start another run")
    s.device, s.data_dir = args.device or s.device, args.data_dir or s.data_dir
    if args.epochs not in (None, s.epochs):
        if s.separate or args.epochs < done:
            raise UsageError(f"--epochs {args.epochs}: " + ("would move the halves of a separate training"
                             if s.separate else f"{done} epochs are done"))
        s.epochs = args.epochs
    elif done == s.epochs and (folder / "metrics.json").exists():
        raise UsageError(f"--resume {folder}: its {done} epochs are done; --epochs N lengthens it")
    return s, folder, state


@contextlib.contextmanager
def first_process_first():
    """Under torchrun the first process goes through alone (and downloads), then the others."""
    rank, processes = mine()
    if rank:
        dist.barrier()
    yield
    if processes > 1 and not rank:
        dist.barrier()


def prepare(s, model=None):
    """(dataset on the device, model), every check made, nothing written. Completes the settings.
    model: the one that goes on; None builds it."""
    keep_freed_memory()
    device = pick_device(s.device)
    if "LOCAL_RANK" in os.environ:  # torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if s.batch_size < mine()[1]:
        raise UsageError(f"--batch-size {s.batch_size}: expected at least one image for each of {mine()[1]} "
                         "processes")
    with first_process_first():
        dataset = load_data(vars(s), device)
    channels, *sides = dataset.train.images.shape[1:]
    if s.size:
        sides = [s.size, s.size]
    if s.delta and (sides[0] % s.jigsaw_grid or sides[1] % s.jigsaw_grid):
        raise UsageError(f"--jigsaw-grid {s.jigsaw_grid}: does not cut images of {sides[1]}x{sides[0]} into equal "
                         "tiles")
    if model is None:
        changes = {key: getattr(s, key) for key in ("encoder", "classifier", "skip", "pretrained")
                   if getattr(s, key) is not None}
        if s.no_decoder:
            changes["decoder"] = None
        torch.manual_seed(s.seed)
        with first_process_first():
            model = models.build(s.version, (channels, *sides), len(dataset.classes), **changes)
    s.dataset = s.dataset or dataset.name
    s.data_dir, s.device = str(Path(s.data_dir).resolve()), str(device)
    s.precision = pick_precision(s.precision, device)
    if device.type == "cuda":  # the same command, the same bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return dataset, model.to(device, memory_format=torch.channels_last)


def announce(s, dataset, model, folder):
    v, shape = model.version, "x".join(map(str, model.version.in_shape))
    decoder = "no decoder" if model.decoder is None else f"decoder: {v.decoder}" + (
        ", not trained as beta is 0" * (not rebuilds(vars(s))))
    print(f"{s.version}: {v.encoder} | {v.classifier}{', lower features joined' * v.skip}\n"
          f"{models.parameter_count(model):,} parameters; {decoder}\n"
          f"{dataset.name}, {dataset.source}: {len(dataset.train.labels):,} training and "
          f"{len(dataset.test.labels):,} test images, {shape}")
    if s.variant != "complete":
        counts = zip(dataset.classes, data.counts(dataset.train, len(dataset.classes)))
        print(f"{s.variant} training images: {', '.join(f'{name} {count:,}' for name, count in counts)}")
    print(f"{s.epochs} epochs, batch {s.batch_size}, {s.optimizer} lr {s.lr:g}, alpha {s.alpha:g}, "
          f"beta {s.beta:g}, gamma {s.gamma:g}, delta {s.delta:g}{f', kl {s.kl:g}' * (s.kl > 0)}, seed {s.seed}")
    if s.separate:
        first = phases(s)[0].end
        print(f"epochs 1 to {first}: the autoencoder alone; {first + 1} to {s.epochs}: the classifier on its "
              f"{'frozen ' * s.freeze_encoder}encoder")
    print(f"on {s.device} in {s.precision}" + f", {mine()[1]} processes" * (mine()[1] > 1)
          + f", into {folder}\n", flush=True)


def sweep(args, argv):
    """Trains the members of a comparison in turn, each in a folder below one for all of them, then
    compares them. The same command again goes on where it stopped."""
    refused = [flag for flag in ("version", "encoder", "classifier", "resume") if getattr(args, flag)]
    if refused:
        stop("train.py", f"--{refused[0]}: cannot be combined with --sweep, which names its own versions")
    rest = [each for each in argv if not each.startswith("--sweep=")]
    if "--sweep" in rest:
        place = rest.index("--sweep")
        del rest[place:place + 2]
    first = settle(make_parser().parse_args([*rest, "--version", SWEEPS[args.sweep][0]]))
    first.dataset = first.dataset or "cifar10"
    name = run_name(first, RECIPES[first.version]).removeprefix(first.version)
    output = Path(args.output or "outputs", f"sweep-{args.sweep}{name}")

    def folder_of(version):
        configs = {path: json.loads(path.read_text()) for path in output.glob("*/config.json")}
        return next((path.parent for path, config in configs.items() if config["version"] == version), None)
    for version in SWEEPS[args.sweep]:
        folder = folder_of(version)
        if folder and (folder / "metrics.json").exists():
            print(f"{version}: done, in {folder}")
            continue
        print(f"---------------- {version}", flush=True)
        status = main(["--resume", str(folder)] if folder else
                      [*rest, "--version", version, "--output", str(output)])
        if status:
            print(f"train.py: the same command goes on with {version}", file=sys.stderr)
            return status
    print()
    draw_sweep([folder_of(version) for version in SWEEPS[args.sweep]], output, f"sweep of {args.sweep}")
    print(f"saved in {output}: sheet.png sweep.md sweep.png")
    return 0


def main(argv):
    args = make_parser().parse_args(argv)
    try:
        if args.sweep:
            return sweep(args, argv)
        if args.resume:
            s, folder, state = reopen(args)
            dataset, model = prepare(s, state and state[0])
        else:
            s, folder, state = settle(args), None, None
            dataset, model = prepare(s)
        rank, _ = mine()
        if rank:
            sys.stdout = open(os.devnull, "w")
        else:
            folder = keep_config(s, dataset, model, folder, args, argv)
    except (*USER_ERRORS, Stopped) as error:
        stop("train.py", error)
    announce(s, dataset, model, folder)
    again = f"go on with: python train.py --resume {folder}"
    try:
        rows, tested = train(model, dataset, s, folder, state and state[1])
        if not rank:
            finish(rows, tested, model, dataset, s, folder)
        if dist.is_initialized():
            dist.barrier()  # all stay until the pictures are drawn
            dist.destroy_process_group()
    except Stopped as error:
        print(f"train.py: stopped: {error}; its whole epochs are in {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ntrain.py: interrupted; its whole epochs are in {folder}; {again}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:100]
        if "memory" in reason:
            print(f"train.py: stopped: {reason}; a smaller --batch-size needs less", file=sys.stderr)
        elif mine()[1] > 1:
            print(f"train.py: stopped: another process has gone ({reason}); {again}", file=sys.stderr)
        else:
            raise
        return 1
    return 0


def keep_config(s, dataset, model, folder, args, argv):
    """Writes config.json, into a new folder where there is none; returns the folder."""
    command = ["python", "train.py", *argv]
    config = vars(s) | {
        "network": vars(model.version) | {"num_classes": model.num_classes},
        "command": command, "source": dataset.source, "classes": dataset.classes,
        "images": {"train": len(dataset.train.labels), "test": len(dataset.test.labels)},
        "images_per_class": dict(zip(dataset.classes, data.counts(dataset.train, len(dataset.classes)))),
        "torch": torch.__version__, "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
        if s.device == "cpu" else torch.cuda.get_device_name(), "git": git_commit(), "processes": mine()[1],
        "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    if folder is None:
        named = Namespace(**vars(s) | {"precision": args.precision or "auto"})
        return make_folder(args.output or "outputs", run_name(named, RECIPES[s.version]), config)
    first = json.loads((folder / "config.json").read_text())
    resumed = first.get("resumed", []) + [{key: config[key] for key in ("command", "git", "started")}]
    write_json(folder / "config.json", config | {key: first[key] for key in ("command", "git", "started")}
               | {"resumed": resumed})
    return folder


def finish(rows, tested, model, dataset, s, folder):
    """The pictures, metrics.json and the last words of a run."""
    metrics = summarise(rows, tested, model, dataset)
    draw_curves(rows, folder / "curves.png", f"{folder.name} on {dataset.name}")
    if model.decoder is not None:
        note = "" if rebuilds(vars(s)) else "\n(the decoder is untrained: beta 0)"
        draw_reconstructions(model, dataset, vars(s), folder, note)
    if dataset.synthetic:
        draw_synthetic(dataset, folder)
    if models.gaussian(model) and rebuilds(vars(s)):
        draw_variational(model, dataset, vars(s), folder)
    write_json(folder / "metrics.json", metrics)  # last: its presence says that the run is whole
    if s.alpha:
        accuracy = metrics["accuracy"]
        print(f"test accuracy: {accuracy['last']:.2f} % after the last epoch; best (on "
              f"{accuracy['best_chosen_on']}) {accuracy['best']:.2f} %, epoch {accuracy['best_epoch']}")
    if rebuilds(vars(s)):
        print("reconstruction: MSE {mse:.6f}, MAE {mae:.5f}, PSNR {psnr:.2f} dB (pixels of 0-1)".format(
            **metrics["reconstruction"]))
    print(f"saved in {folder}: {' '.join(sorted(each.name for each in folder.iterdir()))}\n"
          f"next: python evaluate.py --ckpt {folder / 'best.pt'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
