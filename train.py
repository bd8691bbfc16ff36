"""Trains an autoencoder with a classifier on small images.

    python train.py --version v4              # on CIFAR-10, into outputs/v4/
    python train.py --version v4 --beta 0     # the classifier alone, the decoder left out
    python train.py -h                        # every setting

A version has its recipe (the table below); every setting of it has a flag. One run fills one
folder: config.json, log.csv, metrics.json, curves.png, recon.png, recon/, best.pt, last.pt.
"""
import argparse
import csv
import itertools
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import data
import models
from evaluate import (USER_ERRORS, UsageError, autocast, draw_reconstructions, keep_freed_memory,
                      load_data, measure, per_class, pick_device, pick_precision, save_checkpoint,
                      save_figure, stop, write_json, write_whole)
from losses import l2_reg_loss, weighted_loss

# The CIFAR study's settings, for all its versions; size None is the images' own.
STUDY = dict(dataset="cifar10", size=None, flip=True, alpha=1.0, beta=1.0, gamma=0.0,
             optimizer="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4, lr_step=10, lr_decay=0.1,
             epochs=40, batch_size=32)
RECIPES = {name: STUDY for name in models.VERSIONS} | {
    "v2.3": STUDY | dict(size=64),
    "v4": STUDY | dict(gamma=0.001),
    "v4-stride2": STUDY | dict(gamma=0.001),
}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}


# ---------------------------------------------------------------- training

def make_optimizer(model, s):
    """The optimizer over the parts that the loss trains; gamma goes in as weight decay.

    The gradient of gamma * l2_reg_loss is gamma * parameter, which is what (not decoupled)
    weight decay adds, at no cost of its own.
    """
    parts = [model.encoder] + [model.classifier] * (s.alpha > 0) + [model.decoder] * (s.beta > 0)
    parameters = [p for part in parts for p in part.parameters()]
    device = parameters[0].device.type
    fused = device == "cpu" or (device == "cuda" and s.optimizer != "adagrad")
    momentum = dict(momentum=s.momentum) if s.optimizer == "sgd" else {}
    return OPTIMIZERS[s.optimizer](parameters, lr=s.lr, weight_decay=s.weight_decay + s.gamma,
                                   fused=fused or None, **momentum)


def train_epoch(model, split, optimizer, s, epoch, show=None):
    """One epoch (counted from 0) of the weighted loss over a Split.

    Returns the epoch's means as plain numbers: loss, classifier, autoencoder, l2, accuracy
    (None where not trained). The seed and the epoch alone decide order, flips and dropout.
    Nothing waits for the device before the end. show(step, steps) is called at every step.
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = s.lr * s.lr_decay ** (epoch // s.lr_step)
    seed = s.seed * 1_000_003 + epoch
    torch.manual_seed(~seed)  # dropout: another stream than the order's
    n, device = len(split.labels), split.labels.device
    steps = math.ceil(n / s.batch_size)
    sums = torch.zeros(3, device=device)  # classifier loss, autoencoder loss, right answers
    zero = torch.zeros((), device=device)
    for step, (images, labels) in enumerate(
            data.batches(split, s.batch_size, epoch_seed=seed, flip=s.flip, size=s.size)):
        with autocast(device, s.precision):
            logits, rebuilt = model(images, classify=s.alpha > 0, reconstruct=s.beta > 0)
        loss, terms = weighted_loss(s.alpha, s.beta, logits=logits, labels=labels,
                                    reconstruction=rebuilt, images=images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            right = (logits.argmax(1) == labels).float().mean() if s.alpha > 0 else zero
            sums += len(labels) * torch.stack([terms.get("classifier", zero),
                                               terms.get("autoencoder", zero), right])
        if show:
            show(step + 1, steps)
    classifier, autoencoder, right = (sums / n).tolist()
    # The weights change little within an epoch: the term is taken once, as it ends.
    with torch.no_grad():
        l2 = l2_reg_loss(p for group in optimizer.param_groups for p in group["params"]).item()
    return {"loss": s.alpha * classifier + s.beta * autoencoder + s.gamma * l2,
            "classifier": classifier if s.alpha > 0 else None,
            "autoencoder": autoencoder if s.beta > 0 else None,
            "l2": l2, "accuracy": 100 * right if s.alpha > 0 else None}


def train(model, dataset, s, folder):
    """The whole run: trains, measures after each epoch, keeps log.csv, best.pt and last.pt.

    Returns the log, a list of rows (dicts). Stops with FloatingPointError where the loss is
    no longer finite.
    """
    optimizer = make_optimizer(model, s)
    settings, rows = vars(s), []
    print("epoch     lr       train loss         test loss       test  PSNR    time  images\n"
          "              class.   recon.    class.   recon.   acc. %    dB       s      /s", flush=True)
    for epoch in range(s.epochs):
        start = time.perf_counter()
        trained = train_epoch(model, dataset.train, optimizer, s, epoch,
                              progress(epoch + 1) if sys.stdout.isatty() else None)
        seconds = time.perf_counter() - start
        if not math.isfinite(trained["loss"]):
            raise FloatingPointError(f"epoch {epoch + 1}: the training loss is {trained['loss']}; "
                                     "a smaller --lr may help")
        tested = measure(model, dataset.test, s.size, s.precision, s.alpha > 0, s.beta > 0)
        held = dataset.val and measure(model, dataset.val, s.size, s.precision, s.alpha > 0, s.beta > 0)
        tested["loss"] = (s.alpha * (tested["classifier"] or 0) + s.beta * (tested["autoencoder"] or 0)
                          + s.gamma * trained["l2"])
        row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}
        row |= {f"train_{key}": value for key, value in trained.items()}
        row |= {f"test_{key}": tested[key] for key in ("loss", "classifier", "autoencoder", "accuracy",
                                                       "mse", "mae", "psnr")}
        row |= {f"val_{key}": held and held[key] for key in ("accuracy", "mse")}
        row |= {"seconds": seconds, "images_per_second": len(dataset.train.labels) / seconds,
                "test_seconds": time.perf_counter() - start - seconds}
        rows.append(row)
        print_row(row)
        write_whole(folder / "log.csv", lambda part: write_csv(part, rows))

        if best_row(rows) is row:
            save_checkpoint(folder / "best.pt", model, settings, dataset.classes, epoch=epoch + 1)
        # No random state: every epoch's is made from the seed and the epoch's number.
        save_checkpoint(folder / "last.pt", model, settings, dataset.classes, epoch=epoch + 1,
                        optimizer=optimizer.state_dict(), rows=rows)
    return rows, tested


def best_row(rows):
    """The first row of the highest accuracy or, with no classifier trained, the least MSE: on the
    held-out images where there are any, else on the test images."""
    part = chosen_on(rows)
    return max(rows, key=lambda row: -row[f"{part}_mse"] if row[f"{part}_accuracy"] is None
               else row[f"{part}_accuracy"])


def chosen_on(rows):
    """"val" or "test": which images choose the best epoch."""
    return "test" if rows[0]["val_accuracy"] is None and rows[0]["val_mse"] is None else "val"


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


def draw_curves(rows, path, title):
    """Train and test losses and accuracy over the epochs, one panel for each that there is."""
    panels = [("classifier loss", "classifier", "cross entropy (nats)"),
              ("autoencoder loss", "autoencoder", "MSE (normalised pixels)"),
              ("accuracy", "accuracy", "accuracy (%)")]
    panels = [panel for panel in panels if rows[0][f"test_{panel[1]}"] is not None]
    epochs = [row["epoch"] for row in rows]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    for axis, (name, key, unit) in zip(axes[0], panels):
        for part, style, colour in (("train", "-", "C0"), ("test", "--", "C1")):
            values = [row[f"{part}_{key}"] for row in rows]
            axis.plot(epochs, values, style, color=colour, label=part,
                      marker="o" if len(rows) == 1 else None)
        if key == "accuracy":
            best = best_row(rows)
            axis.plot(best["epoch"], best["test_accuracy"], "k^", markersize=6,
                      label=f"best (on {chosen_on(rows)}): {best['test_accuracy']:.2f} %")
        axis.set(title=name, xlabel="epoch", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path)


def summarise(rows, tested, model, dataset):
    """metrics.json: the results of a run, from its log and its last measurement."""
    last, count = rows[-1], models.parameter_count(model)
    result = {"dataset": dataset.name, "source": dataset.source, "epochs": len(rows)}
    if last["test_accuracy"] is not None:
        best = best_row(rows)
        result["accuracy"] = {"last": last["test_accuracy"], "best": best["test_accuracy"],
                              "best_epoch": best["epoch"], "best_chosen_on": chosen_on(rows)}
        result["per_class_accuracy"] = per_class(tested["confusion"], dataset.classes)
    result["reconstruction"] = {key: tested[key] for key in
                                ("mse", "mae", "psnr", "absolute_error_total",
                                 "absolute_error_per_image")} if tested["mse"] is not None else None
    seconds = sorted(row["seconds"] for row in rows)[len(rows) // 2]
    return result | {"parameters": count, "megabytes": count * 4 / 1e6,
                     "seconds_per_epoch": seconds, "images_per_second": len(dataset.train.labels) / seconds}


def run_name(s, recipe):
    """The version and whatever of the settings differs from its recipe: v4_beta0,
    v4_dataset-shapes, v4_no-decoder."""
    usual = {"seed": 0, "precision": "auto", "no_decoder": False, "val_share": 0.0,
             "variant": "complete", "blur": 0.0} | recipe
    if s.no_decoder:
        usual["beta"] = 0.0
    parts = [s.version]
    for key in ("dataset", "size", "classes", "train_size", "test_size", "val_share", "variant",
                "constrain", "blur", "encoder", "classifier", "no_decoder",
                "flip", "alpha", "beta", "gamma", "optimizer", "lr", "momentum", "weight_decay",
                "lr_step", "lr_decay", "epochs", "batch_size", "precision", "seed"):
        value, flag = getattr(s, key), key.replace("_", "-")
        if value == usual.get(key):
            continue
        text = f"{value:g}" if isinstance(value, float) else str(value).replace("'", "p")
        text = re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-")
        parts.append({True: flag, False: f"no-{flag}"}[value] if isinstance(value, bool) else
                     f"{flag}{text}" if text[:1].isdigit() else f"{flag}-{text}")
    return "_".join(parts)[:120]


def make_folder(output, name):
    """A new folder for a run: output/name, or with a number where that is taken."""
    for count in itertools.count(1):
        folder = Path(output, name if count == 1 else f"{name}_run{count}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"--output {output}: expected a folder to write to ({error.strerror})") from None


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
    parser = argparse.ArgumentParser(
        description="Trains an autoencoder with a classifier. Defaults are the version's recipe; "
        "in brackets the CIFAR study's.", allow_abbrev=False)
    parser.error = lambda message: stop("train.py", message)
    share, positive = number(float, 0), number(int, 1)

    network = parser.add_argument_group("network")
    network.add_argument("--version", default="v4", metavar="NAME",
                         help=f"{' '.join(models.VERSIONS)} (default: v4)")
    network.add_argument("--encoder", metavar="NOTATION", help="another encoder: \"C'(32)>C(32)\"")
    network.add_argument("--classifier", metavar="NOTATION", help="another classifier: \"L(128)>L'(10)\"")
    network.add_argument("--no-decoder", action="store_true", help="build no decoder; beta is then 0")

    sets = parser.add_argument_group("data")
    sets.add_argument("--dataset", metavar="NAME|PATH",
                      help=f"{' '.join(data.NAMES)} shapes, a folder with train/<class>/ and "
                      "test/<class>/, or an .npz (default: cifar10, or shapes where it cannot be had)")
    sets.add_argument("--data-dir", default="data", metavar="DIR",
                      help="where named sets lie or are downloaded to (default: data)")
    sets.add_argument("--size", type=number(int, 1, 1024), metavar="PIXELS",
                      help="scale the images to this side (the images' own; v2.3: 64)")
    sets.add_argument("--classes", type=lambda text: text.split(","), metavar="NAME,NAME",
                      help="these classes alone (all)")
    sets.add_argument("--train-size", type=positive, metavar="N", help="train on N images (all)")
    sets.add_argument("--test-size", type=positive, metavar="N", help="test on N images (all)")
    sets.add_argument("--val-share", type=number(float, 0, 0.9), default=0.0, metavar="X",
                      help="hold this share of the training images out and choose the best epoch on it "
                      "(default: 0, the best is chosen on the test images)")
    sets.add_argument("--variant", choices=data.VARIANTS, default="complete",
                      help="make the training set unequal (constrained) and equal again (default: complete)")
    sets.add_argument("--constrain", type=shares, metavar="CLASS=X,...",
                      help="the share of a class's training images that --variant keeps (the CIFAR study's: "
                      "bird=0.5,deer=0.5,truck=0.5)")
    sets.add_argument("--blur", type=number(float, 0, 10), default=0.0, metavar="SIGMA",
                      help="blur all images, train and test, by a Gaussian of SIGMA pixels (default: 0)")
    sets.add_argument("--no-flip", dest="flip", action="store_false", default=None,
                      help="no left-right flips in training (flips; never on mnist and svhn)")

    loss = parser.add_argument_group(
        "loss", "alpha * cross entropy + beta * reconstruction error + gamma * sum of squares / 2")
    loss.add_argument("--alpha", type=share, metavar="X", help="weight of the classifier loss (1)")
    loss.add_argument("--beta", type=share, metavar="X", help="weight of the autoencoder loss (1)")
    loss.add_argument("--gamma", type=share, metavar="X", help="weight of the L2 loss (0; v4: 0.001)")

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
    training.add_argument("--batch-size", type=positive, metavar="N", help="images per step (32)")

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=number(int, 0, 2**31), default=0, metavar="N",
                     help="of weights, order, flips, dropout and draws (default: 0)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    run.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"),
                     help="auto is bf16 where the device has it in hardware (default: auto)")
    run.add_argument("--output", default="outputs", metavar="DIR", help="where run folders go "
                     "(default: outputs)")
    return parser


def settle(args):
    """The run's settings from its flags and its recipe: (Namespace, recipe). UsageError."""
    models.find(args.version)
    recipe = RECIPES[args.version]
    s = argparse.Namespace(**vars(args))
    for key, value in recipe.items():
        if getattr(s, key) is None and key != "dataset":
            setattr(s, key, value)
    for notation in (args.encoder, args.classifier):
        if notation is not None:
            models.parse(notation)
    if args.no_decoder:
        if args.beta:
            raise UsageError(f"--beta {args.beta:g}: there is nothing to reconstruct with "
                             "--no-decoder; leave one of the two out")
        s.beta = 0.0
    if not s.alpha and not s.beta:
        raise UsageError("--alpha 0 and --beta 0: there is nothing to train on; one must be above 0"
                         + " (--no-decoder makes beta 0)" * args.no_decoder)
    if args.constrain and args.variant == "complete":
        raise UsageError("--constrain: belongs to --variant constrained, undersampled, oversampled or smote")
    if args.momentum is not None and s.optimizer != "sgd":
        raise UsageError(f"--momentum {args.momentum:g}: belongs to --optimizer sgd, not {s.optimizer}")
    return s, recipe


def prepare(args):
    """(settings, dataset on the device, model, run name), every check made, nothing written."""
    s, recipe = settle(args)
    keep_freed_memory()
    device = pick_device(s.device)
    dataset = load_data(vars(s))
    channels, *sides = dataset.train.images.shape[1:]
    if s.size:
        sides = [s.size, s.size]
    changes = {key: getattr(s, key) for key in ("encoder", "classifier") if getattr(s, key)}
    if s.no_decoder:
        changes["decoder"] = None
    torch.manual_seed(s.seed)
    model = models.build(s.version, (channels, *sides), len(dataset.classes), **changes)

    # The data set by a name or path that a later evaluation, from any folder, can find.
    path = None if s.dataset is None or s.dataset in data.NAMES else Path(s.dataset).resolve()
    s.dataset = dataset.name
    name = run_name(s, recipe)
    if path is not None and path.exists():
        s.dataset = str(path)
    s.data_dir, s.device = str(Path(s.data_dir).resolve()), str(device)
    s.precision = pick_precision(s.precision, device)
    s.flip = s.flip and dataset.name not in data.NEVER_FLIPPED
    if device.type == "cuda":  # the same command, the same bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    for part in ("train", "val", "test"):
        split = getattr(dataset, part)
        setattr(dataset, part, split and data.Split(*(tensor.to(device) for tensor in split)))
    return s, dataset, model.to(device, memory_format=torch.channels_last), name


def announce(s, dataset, model, folder):
    v, shape = model.version, "x".join(map(str, model.version.in_shape))
    decoder = "no decoder" if model.decoder is None else f"decoder: {v.decoder}" + (
        ", not trained as beta is 0" * (s.beta == 0))
    per_class = "" if s.variant == "complete" else f"training images, {s.variant}: " + ", ".join(
        f"{name} {count:,}" for name, count in
        zip(dataset.classes, data.counts(dataset.train, len(dataset.classes)))) + "\n"
    print(f"{s.version}: {v.encoder} | {v.classifier}\n"
          f"{models.parameter_count(model):,} parameters; {decoder}\n"
          f"{dataset.name}, {dataset.source}: {len(dataset.train.labels):,} training and "
          f"{len(dataset.test.labels):,} test images, {shape}\n{per_class}"
          f"{s.epochs} epochs, batch {s.batch_size}, {s.optimizer} lr {s.lr:g}, alpha {s.alpha:g}, "
          f"beta {s.beta:g}, gamma {s.gamma:g}, seed {s.seed}\n"
          f"on {s.device} in {s.precision}, into {folder}\n", flush=True)


def main(argv):
    args = make_parser().parse_args(argv)
    try:
        s, dataset, model, name = prepare(args)
        folder = make_folder(args.output, name)
    except USER_ERRORS as error:
        stop("train.py", error)
    write_json(folder / "config.json", vars(s) | {
        "network": vars(model.version) | {"num_classes": model.num_classes},
        "command": ["python", "train.py", *argv], "source": dataset.source, "classes": dataset.classes,
        "images": {"train": len(dataset.train.labels), "test": len(dataset.test.labels)},
        "images_per_class": dict(zip(dataset.classes, data.counts(dataset.train, len(dataset.classes)))),
        "torch": torch.__version__, "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
        if s.device == "cpu" else torch.cuda.get_device_name(), "git": git_commit(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S")})
    announce(s, dataset, model, folder)
    try:
        rows, tested = train(model, dataset, s, folder)
    except FloatingPointError as error:
        print(f"train.py: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ntrain.py: interrupted; the last whole epoch is in {folder}", file=sys.stderr)
        return 130
    metrics = summarise(rows, tested, model, dataset)
    draw_curves(rows, folder / "curves.png", f"{folder.name} on {dataset.name}")
    if model.decoder is not None:
        note = "" if s.beta else "\n(the decoder is untrained: beta 0)"
        draw_reconstructions(model, dataset, folder, s.size, s.precision, note)
    write_json(folder / "metrics.json", metrics)  # last: its presence says that the run is whole
    if s.alpha:
        accuracy = metrics["accuracy"]
        print(f"test accuracy: {accuracy['last']:.2f} % after the last epoch; best (on "
              f"{accuracy['best_chosen_on']}) {accuracy['best']:.2f} %, epoch {accuracy['best_epoch']}")
    if s.beta:
        print("reconstruction: MSE {mse:.6f}, MAE {mae:.5f}, PSNR {psnr:.2f} dB (pixels of 0-1)".format(
            **metrics["reconstruction"]))
    print(f"saved in {folder}: {' '.join(sorted(each.name for each in folder.iterdir()))}\n"
          f"next: python evaluate.py --ckpt {folder / 'best.pt'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
