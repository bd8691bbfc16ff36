"""Trains an autoencoder with a classifier on small images.

    python train.py --version v4                        # on CIFAR-10, into outputs/v4/
    python train.py --version v4 --beta 0               # the classifier alone; the decoder is not trained
    python train.py --version v4 --sweep beta=0,1 --seeds 3     # six runs, and their comparison
    python train.py --resume outputs/v4                 # resumes that run
    python train.py --version vae -h                    # every setting, with the defaults of that version

From Python, train.run(version="v2", epochs=3) does what the command does. This file has, from top to bottom:
one epoch, one run, many runs, recipes and sweeps, the command line; Muon and CUDA graphs. One run fills one
folder: config.json, log.csv, metrics.json, pictures, best.pt, last.pt. torchrun trains one on several GPUs.
"""
import argparse
import datetime
import functools
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import zlib
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import data
import evaluate
import losses
import models
from evaluate import Stopped, UsageError

# ---------------------------------------------------------------- one epoch

def stream(seed, epoch, purpose, rank=0):
    """The 32-bit seed of one stream of random numbers: generators on the CPU use no more bits."""
    if purpose == "order":  # also of flips, shifts, crops and rotations; the same for all ranks
        return (seed * 1_000_003 + epoch) % 2**32
    return zlib.crc32(f"{seed} {epoch} {purpose} {rank}".encode())


def process():
    """(rank, processes): this process and how many train together (torchrun); else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def steps(dataset, phase, epoch):
    """Yields an epoch's batches, each a dict of tensors: images (B, C, H, W), normalised; labels (B,); with
    --noise, inputs, the images with it. With --labels the labelled images are repeated as often as needed:
    beside batches of all images, as labelled_inputs, or, where no term needs those, instead of them. With the
    jigsaw loss, order (B, tiles)."""
    n, device, (rank, processes) = len(dataset.train.labels), dataset.train.images.device, process()
    size = min(phase.batch_size, n)  # of the labelled images' batches too
    bounds, needed = data.bounds(n, size), losses.needed(phase.weights)
    options = dict(flip=phase.flip, degrees=phase.rotate, shifts=phase.shift, part=(rank, processes),
                   **phase.preparation)
    everything = data.batches(dataset.train, size, stream(phase.seed, epoch, "order"), **options)
    labelled = itertools.repeat(None)  # none apart
    if dataset.labelled is not None and "logits" in needed:
        # For a batch more than the steps, as the last one may be smaller or larger than the others.
        rounds = math.ceil((len(bounds) + 1) * size / len(dataset.labelled.labels))
        labelled = data.batches(dataset.labelled, size, stream(phase.seed, epoch, "labelled"), rounds=rounds,
                                **options)
        if "images" not in needed:  # the labelled ones are all that is trained on
            everything, labelled = labelled, itertools.repeat(None)
    noise = torch.Generator(device).manual_seed(stream(phase.seed, epoch, "noise", rank))
    if phase.weights["delta"]:
        tiles = torch.Generator().manual_seed(stream(phase.seed, epoch, "tiles"))
        orders = torch.rand(n, phase.jigsaw_grid ** 2, generator=tiles).argsort(1).to(device)
    for (start, stop), (images, labels), other in zip(bounds, everything, labelled):
        batch = {"images": images, "labels": labels}
        if phase.noise:
            batch["inputs"] = data.add_noise(images, phase.noise, noise, phase.scale)
        if other is not None:
            batch["labelled_inputs"] = data.add_noise(other[0], phase.noise, noise, phase.scale)
            batch["labels"] = other[1]
        if phase.weights["delta"]:
            batch["order"] = orders[start:stop][rank::processes][:len(images)]
        yield batch


def train_step(model, batch, phase, net=None, class_weights=None):
    """One step up to the gradients, which it leaves. Returns sums over the batch, (terms + 1,): those of each
    term with a weight, then right answers. net: the model as DistributedDataParallel wraps it."""
    weights = phase.weights | {"gamma": 0.0}  # gamma is the optimizer's weight decay
    tensors = evaluate.forward(net or model, batch, phase, losses.needed(weights), model)
    loss, values = losses.weighted_loss(weights, **batch, **tensors, class_weights=class_weights,
                                        label_smoothing=phase.label_smoothing)
    loss.backward()
    with torch.no_grad():
        sums = [values[term.name] * len(batch["labels" if "labels" in term.needs else "images"])
                for term in losses.TERMS.values() if term.name in values]
        right = (tensors["logits"].argmax(1) == batch["labels"]).sum() if "logits" in tensors else loss * 0
        return torch.stack([*sums, right])


def train_epoch(model, dataset, optimizer, phase, epoch, net=None):
    """One epoch (counted from 0) of the weighted loss. phase: the settings of a part of the run, of `phases`.

    Returns the epoch's means as plain numbers: loss, the terms by name and accuracy. The seed and the epoch
    alone decide order, flips, tiles, noise and dropout. Nothing waits for the device but every hundredth
    step, where a loss that is not finite ends the run (Stopped).
    """
    model.train()
    if phase.frozen:
        model.encoder.eval()  # BatchNorm keeps its statistics
    device = dataset.train.images.device
    torch.manual_seed(stream(phase.seed, epoch, "dropout", process()[0]))  # and of variational codes
    class_weights = None
    if phase.class_weights:
        labels = (dataset.labelled or dataset.train).labels
        class_weights = losses.balanced_weights(labels, model.num_classes)
    work = functools.partial(train_step, model, phase=phase, net=net, class_weights=class_weights)
    if device.type == "cuda" and net is None:  # DistributedDataParallel's communication is not recorded
        work = Recorded(work, list(model.parameters()))
    terms = [term for flag, term in losses.TERMS.items() if phase.weights[flag] and flag != "gamma"]
    count = len(data.bounds(len(dataset.train.labels), phase.batch_size))
    history, images_seen, labels_seen = torch.zeros(count, len(terms) + 1, device=device), 0, 0
    for step, batch in enumerate(steps(dataset, phase, epoch)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(phase, epoch + step / count)
        history[step] = work(batch)
        with evaluate.autocast(device, phase.precision):  # of Muon's matrix products
            optimizer.step()
        optimizer.zero_grad()
        images_seen, labels_seen = images_seen + len(batch["images"]), labels_seen + len(batch["labels"])
        if step % 100 == 99 or step == count - 1:
            check_finite(history[:step + 1, :-1], terms, epoch)
    sums = history.sum(0)
    if net is not None:
        dist.all_reduce(sums)
        images_seen, labels_seen = images_seen * dist.get_world_size(), labels_seen * dist.get_world_size()
    *totals, right = sums.tolist()
    means = {term.name: total / (labels_seen if "labels" in term.needs else images_seen)
             for term, total in zip(terms, totals)}
    with torch.no_grad():  # the weights change little within an epoch: the term is taken once, as it ends
        means["l2"] = losses.l2_reg_loss(optimizer.param_groups[0]["params"]).item()
    means["loss"] = losses.weighted_sum(phase.weights, means)
    means["accuracy"] = 100 * right / labels_seen if "logits" in losses.needed(phase.weights) else None
    return means


def check_finite(history, terms, epoch):
    """Raises Stopped where a step's losses, a row of the history, are not finite."""
    bad = (~history.isfinite()).nonzero().tolist()
    if bad:
        step, term = bad[0]
        raise Stopped(f"epoch {epoch + 1}, step {step + 1}: the {terms[term].name} loss is "
                      f"{history[step, term].item()}; a smaller --lr may help")


def learning_rate(phase, epoch):
    """The learning rate at a moment of a phase (2.5: the middle of the run's third epoch)."""
    if phase.schedule == "onecycle":
        done = (epoch - phase.start) / (phase.end - phase.start)
        return phase.lr * float(np.interp(done, (0, 0.23, 1), (0.2, 1, 0)))
    return phase.lr * phase.lr_decay ** ((epoch - phase.start) // phase.lr_step)


def make_optimizer(model, phase):
    """The optimizer over the parts that a phase trains, the others frozen.

    The gradient of gamma * l2_reg_loss is gamma * parameter, which is what weight decay adds, at no cost of
    its own (Muon's is decoupled: it shrinks the weights beside the update).
    """
    learns = {"encoder": not phase.frozen, **trained_parts(phase.weights)}
    for name, part in model.named_children():
        part.requires_grad_(learns[name])
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind, fused, options = OPTIMIZERS[phase.optimizer]
    options = {option: getattr(phase, option) for option in options}
    options |= {"fused": True} if parameters[0].device.type in fused else {}
    return kind(parameters, lr=phase.lr, weight_decay=phase.weight_decay + phase.weights["gamma"], **options)


def trained_parts(weights):
    """{"classifier": whether the loss of these weights trains it, "decoder": likewise}."""
    needed = losses.needed(weights)
    return {"classifier": "logits" in needed,
            "decoder": bool({"reconstruction", "jigsaw_reconstruction"} & needed)}


# ---------------------------------------------------------------- one run

def phases(args):
    """The run's parts, each the settings that hold in it, with `start` and `end` (epochs from 0), whether the
    encoder is `frozen`, and the parts of the network that are `trained` by then. One, or the two of separate
    training, as in the CIFAR study's program: the autoencoder alone, then the classifier on its encoder; in
    each the schedule starts anew, and the rate decays after half of lr_step epochs, rounded down."""
    if not args.separate:
        return [Namespace(**vars(args), start=0, end=args.epochs, frozen=False)]
    first = max(1, int(args.epochs * args.first_share + 1e-9))
    decay = args.weight_decay if args.first_decay is None else args.first_decay
    # The terms of the autoencoder are those that do not need labels, of the classifier that need no images.
    one, two = ({flag: args.weights[flag] * (tensor not in term.needs) for flag, term in losses.TERMS.items()}
                for tensor in ("labels", "images"))
    common = vars(args) | {"lr_step": max(1, args.lr_step // 2)}
    return [Namespace(**common | dict(start=0, end=first, frozen=False, weights=one, weight_decay=decay,
                                      trained=["decoder"])),
            Namespace(**common | dict(start=first, end=args.epochs, frozen=args.freeze_encoder, weights=two))]


def train(model, dataset, args, folder, state=None):
    """The whole run: trains, measures after each epoch, keeps log.csv, best.pt and last.pt.

    state: a last.pt's content, after which to resume. Returns the log, a list of rows (dicts), and the last
    measurement. Raises Stopped; nothing is saved of an epoch that ends with losses or weights that are not
    finite.
    """
    rows, tested = (state["rows"], state["tested"]) if state else ([], None)
    rank, processes = process()
    table = printed_columns(args)
    print("".join(f"{title:>{width}}" for title, _, _, width, _ in table))
    print("".join(f"{part:>{width}}" for _, part, _, width, _ in table), flush=True)
    for row in rows:
        print_row(table, row)
    for phase in phases(args):
        if len(rows) >= phase.end:
            continue
        optimizer = make_optimizer(model, phase)
        if len(rows) > phase.start:
            optimizer.load_state_dict(state["optimizer"])
        net = torch.nn.parallel.DistributedDataParallel(model) if processes > 1 else None
        for epoch in range(len(rows), phase.end):
            began = time.perf_counter()
            means = train_epoch(model, dataset, optimizer, phase, epoch, net)
            seconds = time.perf_counter() - began
            rows.append({"epoch": epoch + 1})
            if rank:
                continue
            rows[-1], tested = measure_epoch(model, dataset, phase, epoch, means)
            rows[-1] |= {"lr": optimizer.param_groups[0]["lr"], "seconds": seconds,
                         "images_per_second": len(dataset.train.labels) / seconds,
                         "test_seconds": time.perf_counter() - began - seconds}
            save(folder, model, dataset, vars(args) | {"trained": phase.trained}, rows, tested, optimizer)
            print_row(table, rows[-1])
    return rows, tested


def measure_epoch(model, dataset, phase, epoch, means):
    """The log's row of an epoch, and the measurement of the test images. means: of `train_epoch`. Raises
    Stopped."""
    tested = evaluate.measure(model, dataset.test, phase, mirrored=phase.flip and epoch + 1 == phase.epochs)
    held_out = evaluate.measure(model, dataset.val, phase) if dataset.val else {}
    tested["loss"] = losses.weighted_sum(phase.weights, tested | {"l2": means["l2"]})
    terms, errors = [term.name for term in losses.TERMS.values()], [key for _, key, _ in evaluate.MEASURES]
    columns = {"train": (means, ["loss", *terms, "accuracy"]),
               "test": (tested, ["loss", *(name for name in terms if name != "l2"), "accuracy", *errors]),
               "val": (held_out, ["accuracy", "mse"])}
    row = {"epoch": epoch + 1, "lr": None} | {
        f"{part}_{key}": found.get(key) for part, (found, keys) in columns.items() for key in keys}
    bad = [key for key, value in row.items() if value is not None and not math.isfinite(value)]
    bad += [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]
    if bad:
        raise Stopped(f"epoch {epoch + 1}: {bad[0]} is not finite after this epoch; a smaller --lr may help")
    return row, tested


def save(folder, model, dataset, settings, rows, tested, optimizer):
    """log.csv, last.pt and, where the last epoch is the best one so far, best.pt."""
    content = dict(settings=settings, classes=dataset.classes, epoch=len(rows), digest=settings["digest"],
                   preparation=settings["preparation"], image_shape=list(dataset.train.images.shape[1:]))
    evaluate.write_csv(folder / "log.csv", rows)
    if evaluate.best_row(rows)[0] is rows[-1]:
        evaluate.write_whole(folder / "best.pt", lambda part: models.save(part, model, **content))
    # No random state: every epoch's is made from the seed and the epoch's number.
    evaluate.write_whole(folder / "last.pt", lambda part: models.save(
        part, model, **content, optimizer=optimizer.state_dict(), rows=rows, tested=tested))


def printed_columns(args):
    """The printed table's columns: (title, part, key of a row, width, decimals); a pair for a loss term."""
    columns = [("epoch", "", "epoch", 5, "d"), ("lr", "", "lr", 8, ".2g")]
    for flag, term in losses.TERMS.items():
        parts = ["train"] if flag == "gamma" else ["train", "test"]  # of the weights, not of the images
        if args.weights[flag]:
            title, style = f"{term.name:>{8 * len(parts)}}", ".1f" if flag == "gamma" else ".4f"
            columns += [(title[8 * i:8 * i + 8], part, f"{part}_{term.name}", 8, style)
                        for i, part in enumerate(parts)]
    if "classifier" in args.trained:
        columns.append(("acc. %", "test", "test_accuracy", 7, ".2f"))
    if "decoder" in args.trained:
        columns.append(("PSNR", "test", "test_psnr", 6, ".1f"))
    return [*columns, ("time", "s", "seconds", 7, ".1f"), ("images", "/s", "images_per_second", 7, ".0f")]


def print_row(columns, row):
    print("".join(f"{'-':>{width}}" if row[key] is None else f"{row[key]:>{width}{style}}"
                  for _, _, key, width, style in columns), flush=True)


def prepare(args, model=None):
    """(dataset on the device, model), every check made, nothing written. Replaces automatic settings
    (dataset, precision) by those that are used. model: of a run that resumes; None builds it. UsageError,
    DataError."""
    evaluate.keep_freed_memory()
    device = evaluate.pick_device(args.device)
    if device.type == "cuda":
        if dist.is_initialized():
            device = torch.device("cuda", torch.cuda.current_device())
        if device.index is not None:
            torch.cuda.set_device(device)  # otherwise memory of the first GPU is taken as well
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same command, the same bits
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # each filling is a kernel
    dataset = evaluate.load_data(args)
    args.dataset, args.digest = args.dataset or dataset.name, data.digest(dataset)
    args.precision = evaluate.pick_precision(args.precision, device)
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    channels, *sides = dataset.train.images.shape[1:]
    sides = [args.size, args.size] if args.size else sides
    if model is None:
        torch.manual_seed(args.seed)
        changes = {key: getattr(args, key) for key in ("encoder", "classifier", "decoder", "pretrained")
                   if getattr(args, key) is not None}
        changes |= {"decoder": None} if args.decoder == "none" else {}
        linear = "L'(10)" if args.alpha else None  # on the code
        version = models.Version(args.encoder, linear) if args.version == "custom" else args.version
        model = models.build(version, (channels, *sides), len(dataset.classes), skip=args.skip, **changes)
        if args.init:
            start_from(model, args)
        elif isinstance(model.encoder[0], models.WhiteningConv2d):
            sample = evaluate.drawn(dataset.train, 1 + 1_000_000 // math.prod(sides))  # a million pixels do
            models.whiten(model, data.normalise(sample.images, **args.preparation))
    check_network(model, dataset, args, sides)
    return dataset.to(device), model.to(device, memory_format=torch.channels_last)


def start_from(model, args):
    """Takes from the checkpoint --init its encoder, and its trained decoder and classifier where the shapes
    agree. UsageError where the encoder is another one, or read images of another scale."""
    (source, content), taken = models.load(args.init), []
    trained = content["settings"]["trained"] if "settings" in content else ["decoder", "classifier"]
    parts, others = dict(model.named_children()), dict(source.named_children())
    for name in [name for name in ("encoder", *trained) if name in parts and name in others]:
        ours, theirs = ([(key, value.shape) for key, value in each[name].state_dict().items()]
                        for each in (parts, others))
        if ours == theirs and model.version.encoder == source.version.encoder:
            parts[name].load_state_dict(others[name].state_dict())
            taken.append(name)
    if "encoder" not in taken:
        ours, theirs = (f"{each.version.encoder} for {each.version.in_shape}" for each in (model, source))
        raise UsageError(f"--init {args.init}: its encoder is {theirs} images; expected {ours}")
    its = content.get("preparation", args.preparation)["scale"]
    if its != args.scale:
        raise UsageError(f"--scale {args.scale}: {args.init} was trained with {its}; expected --scale={its}")
    print(f"started from {args.init}: {', '.join(taken)}; all else from the seed")


def check_network(model, dataset, args, sides):
    """UsageError where the settings ask of the network or the data what they do not have."""
    lacks = {"logits": model.classifier is None and "no classifier",
             "reconstruction": model.decoder is None and "no decoder",
             "jigsaw_reconstruction": model.decoder is None and "no decoder",
             "mean": not model.variational and "no variational code (an encoder that ends in N(n))"}
    for flag, weight in args.weights.items():
        for name in losses.needed({flag: weight}):
            if lacks.get(name):
                raise UsageError(f"--{flag} {weight:g}: {args.version} has {lacks[name]}; expected --{flag} "
                                 "0, or a network with it (--classifier, --decoder, --encoder)")
    end, least = model.version.output, 2 * process()[1]
    reach = {"sigmoid": ["0..1"], "tanh": ["0..1", "-1..1"]}.get(end, [args.scale])
    for wrong, message in (
            ("decoder" in args.trained and args.scale not in reach, f"--scale {args.scale}: the decoder of "
             f"{args.version} ends in a {end}, not reaching its values; expected {' or '.join(reach)}"),
            (args.weights["delta"] and any(side % args.jigsaw_grid for side in sides),
             f"--jigsaw-grid {args.jigsaw_grid}: does not cut images of {sides[1]}x{sides[0]} evenly"),
            ("classifier" in args.trained and model.num_classes < 2,
             f"--alpha {args.alpha:g}: {dataset.name} has one class here; expected two, or --alpha 0"),
            (args.labels and args.labels < model.num_classes,
             f"--labels {args.labels}: expected at least one for each of {model.num_classes} classes"),
            (min(args.batch_size, len(dataset.train.labels)) < least,
             f"--batch-size {args.batch_size}: expected batches of {least} images or more")):
        if wrong:
            raise UsageError(message)


def run_name(args):
    """A run's folder: --name, or the version and whatever differs from its recipe: v4_beta0,
    v4_dataset-shapes, v4_no-decoder."""
    usual = defaults(args.version)
    seed = f"_seed{args.seed}" if args.seed != usual["seed"] else ""
    if args.name:
        return slug(args.name) + seed
    parts, unnamed = [args.version], ["version", "precision", "data_dir", *evaluate.INCIDENTAL]
    unnamed += ["beta"] * (args.decoder == "none") + ["flip"] * (args.dataset in data.NEVER_FLIPPED)
    unnamed += ["dataset"] * (args.dataset == (usual["dataset"] or "cifar10"))
    changed = [key for key in usual if key not in unnamed and getattr(args, key) != usual[key]]
    for key, flag, value in ((key, key.replace("_", "-"), getattr(args, key)) for key in changed):
        if isinstance(value, bool) or value == "none":
            parts.append(flag if value is True else f"no-{flag}")
            continue
        if key == "init":
            value = Path(value).resolve().parent.name[:20]
        elif key == "dataset":
            value = Path(value).stem
        elif isinstance(value, dict):
            value = "-".join(f"{name}{share:g}" for name, share in value.items())
        text = slug(f"{value:g}" if isinstance(value, float) else str(value))
        parts.append(flag + "-" * (not text[:1].isdigit()) + text)
    name = "_".join(parts)
    return (name if len(name) <= 120 else f"{name[:110]}_{zlib.crc32(name.encode()):08x}") + seed


def slug(text):
    """A notation or a value as a part of a file name: "C'(16)>C(16)" is "Cp16-C16"."""
    return evaluate.file_name(re.sub(r"\((\d[\d.]*)\)", r"\1", text.replace("'", "p").replace("e+", "e")))


def surroundings(device):
    """What a run depends on beside its settings, for config.json. The commit ends in "-dirty" where files
    differ from it, and is None without git."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    return {"device": str(device), "machine": machine, "processes": process()[1], "torch": torch.__version__,
            "python": platform.python_version(), "git": commit, "started": time.strftime("%Y-%m-%d %H:%M:%S")}


def make_folder(args, dataset, model, command):
    """A new folder for the run with its config.json: its name, or with a number where that is taken."""
    config = {
        "settings": vars(args), "command": command, "network": vars(model.version),
        "classes": dataset.classes, "source": dataset.source,
        "images_per_class": data.counts(dataset.train, len(dataset.classes)),
        "images": {"train": len(dataset.train.labels), "test": len(dataset.test.labels)},
        **surroundings(dataset.train.images.device)}
    for number in itertools.count(1):
        folder = Path(args.output, run_name(args) + (f"_run{number}" if number > 1 else ""))
        if not folder.exists():
            evaluate.write_json(folder / "config.json", config)
            return folder


def announce(args, dataset, model, folder):
    """Prints what is about to run."""
    v, decoder = model.version, f"decoder: {model.version.decoder}" if model.decoder else "no decoder"
    counts = data.counts(dataset.train, len(dataset.classes))
    per_class = f"{counts[0]:,} of each of {len(counts)} classes" if len(set(counts)) == 1 else (
        ", ".join(f"{name} {count:,}" for name, count in zip(dataset.classes, counts)))
    parts = {"training": dataset.train, "labelled": dataset.labelled, "held-out": dataset.val,
             "test": dataset.test}
    weights = ", ".join(f"{flag} {weight:g}" for flag, weight in args.weights.items() if weight)
    print(f"{args.version}: {v.encoder} | {v.classifier or 'no classifier'}{', lower features' * v.skip}\n"
          f"{models.parameter_count(model):,} parameters; {decoder}"
          f"{', not trained' * (model.decoder is not None and 'decoder' not in args.trained)}\n"
          f"{dataset.name}, {dataset.source}, {'x'.join(map(str, v.in_shape))}: "
          f"{', '.join(f'{len(split.labels):,} {name}' for name, split in parts.items() if split)} images\n"
          f"training images: {per_class}\n"
          f"epochs {args.epochs}, batch {args.batch_size}, {args.optimizer} lr {args.lr:g}, {weights}, "
          f"seed {args.seed}")
    if args.separate:
        print(f"epochs 1 to {phases(args)[0].end}: the autoencoder alone; then the classifier on its encoder")
    print(f"on {dataset.train.images.device} in {args.precision}, into {folder}\n", flush=True)


def reopen(folder, given, typed):
    """(args, last.pt's content or None, its model or None) of a run that is to resume. given, typed: what
    `parse` made of the words beside --resume. UsageError."""
    try:
        args = Namespace(**json.loads((folder / "config.json").read_text())["settings"])
        if not set(defaults(args.version)) <= set(vars(args)):
            raise KeyError("it lacks settings")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--resume {folder}: not the folder of a run of this version of the program "
                         f"({error})") from None
    epochs = args.epochs
    for key, value in typed.items():
        if key not in ("resume", "epochs", "device", "data_dir"):
            raise UsageError(f"--{key.replace('_', '-')} {value}: a run resumes with its own settings; leave "
                             "it out, or start another run")
        setattr(args, key, getattr(given, key))
    if args.epochs != epochs and (args.separate or args.schedule != "step"):
        raise UsageError(f"--epochs {args.epochs}: with --separate and --schedule onecycle the completed "
                         f"epochs depend on the total; expected {epochs}, or start another run")
    if not (folder / "last.pt").exists():
        return args, None, None
    model, state = models.load(folder / "last.pt")
    if args.epochs < state["epoch"] or args.epochs == state["epoch"] and evaluate.read_run(folder):
        raise UsageError(f"--resume {folder}: has completed {state['epoch']} epochs; --epochs N, with a "
                         "larger N, lengthens it")
    return args, state, model


def keep_resumed(folder, args, dataset):
    """Notes in config.json that the run resumes. UsageError where its data is not what it was."""
    config = json.loads((folder / "config.json").read_text())
    if args.digest != config["settings"]["digest"]:
        raise UsageError(f"--resume {folder}: {dataset.source} has changed; expected the images and labels "
                         "with which the run began")
    resumed = [*config.get("resumed", []), surroundings(dataset.train.images.device)]
    evaluate.write_json(folder / "config.json", config | {"settings": vars(args), "resumed": resumed})


def execute(args, typed, command):
    """Trains one run, or resumes it. Returns what `run` does. Raises UsageError and the like, Stopped."""
    rank, processes = process()
    state = model = folder = None
    if args.resume:
        folder = Path(args.resume)
        args, state, model = reopen(folder, args, typed)
    if rank:
        dist.barrier()  # the first process passes alone, and downloads
    dataset, model = prepare(args, model)
    if processes > 1 and not rank:
        dist.barrier()
    if rank:
        return model, train(model, dataset, args, None, state)[0], None
    if folder:
        keep_resumed(folder, args, dataset)
    folder = folder or make_folder(args, dataset, model, command)
    try:
        announce(args, dataset, model, folder)
        rows, tested = train(model, dataset, args, folder, state)
        evaluate.report(model, dataset, args, folder, tested, rows)
    except (Exception, KeyboardInterrupt) as error:
        kept = "its completed epochs are kept" if (folder / "last.pt").exists() else "no epoch was completed"
        again = "" if isinstance(error, Stopped) else f"; resume with: python train.py --resume {folder}"
        error.advice = f"; {kept} in {folder}{again}"
        raise
    print(f"saved in {folder}\nnext: python evaluate.py --ckpt {folder / 'best.pt'}")
    return model.eval(), rows, folder


def run(**settings):
    """Trains a network as the command does: run(version="v2", epochs=3) is --version v2 --epochs 3.

    settings: by the names of the flags (data_dir="data", flip=False, classes=["cat", "dog"]); None: as in the
    recipe (decoder=None: none). Returns the model in eval mode, the log's rows (dicts) and the run's folder.
    Raises a ValueError where the command would end with a message, RuntimeError where a loss is not finite.
    """
    words = []
    for key, value in settings.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, dict):
            value = ",".join(f"{name}={share}" for name, share in value.items())
        elif isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        elif key == "decoder" and value is None:
            value = "none"  # as for models.build
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            words.append(f"{flag}={value}")
    if MANY.parse_known_args(words)[1] != words:
        raise UsageError("train.run trains one run; expected no sweep, seeds, jobs or list")
    return execute(*parse(words), ["python", "train.py", *words])


# ---------------------------------------------------------------- many runs

def plan(many, words):
    """The runs of --sweep and --seeds, {folder: (words of its command, its settings)}; the folder they go
    into; what the comparison at their end is against. words: those of the command without the flags of MANY.
    UsageError."""
    common, typed = parse(words, False)
    runs, lines, against, output = {}, [[]], None, common.output
    if many.sweep:
        setting, _, values = many.sweep.partition("=")
        if values:
            switches = {"yes": f"--{setting}", "no": f"--no-{setting}"}
            lines = [[switches.get(value, f"--{setting}={value}")] for value in values.split(",")]
        elif many.sweep in SWEEPS:
            lines, _, against = SWEEPS[many.sweep]
            lines = [shlex.split(line) for line in lines]
        else:
            raise UsageError(f"--sweep {many.sweep}: expected SETTING=V1,V2,... or one of {' '.join(SWEEPS)}")
        settings = [parse(line, False)[1] for line in lines]
        for flag in typed:
            if len({repr(each.get(flag)) for each in settings}) > 1:
                raise UsageError(f"--{flag.replace('_', '-')}: {many.sweep} varies it; leave it out")
        output = str(Path(output, f"sweep-{slug(many.sweep)}"))
    for line, i in itertools.product(lines, range(many.seeds or 1)):
        line = [*line, *words, "--seed", str(common.seed + i), "--output", output]
        args = parse(line)[0]
        if args.dataset is None:  # no substitute among many
            line, args.dataset = [*line, "--dataset", "cifar10"], "cifar10"
        folder = Path(output, run_name(args))
        if folder in runs:
            raise UsageError(f"{folder}: is of two runs; expected settings that names tell apart, no --name")
        if (folder / "config.json").exists():
            found = json.loads((folder / "config.json").read_text())["settings"]
            for key, value in vars(args).items():  # another data set of that name, a recipe that has changed
                if key not in evaluate.INCIDENTAL and found.get(key) != value != "auto":
                    raise UsageError(f"{folder}: holds a run with {key} {found.get(key)}, not {value}; "
                                     "expected another --output")
        runs[folder] = line, args
    return runs, output, against


def train_many(many, words):
    """Trains or lists the runs of --sweep and --seeds, some at once, each by a command of its own whose
    output goes to <run>.txt; then compares them. A run is known by its folder's name: finished ones are not
    trained again, interrupted ones resume. Returns the exit status."""
    runs, output, against = plan(many, words)
    if many.list:
        print("\n".join(shlex.join([sys.executable, __file__, *line]) for line, _ in runs.values()))
        return 0
    settings, todo = [args for _, args in runs.values()], [run for run in runs if not evaluate.read_run(run)]
    cores, device = torch.get_num_threads(), evaluate.pick_device(settings[0].device)
    gpus = torch.cuda.device_count() if device == torch.device("cuda") else 0
    # Small networks use several threads badly; networks of large batches well.
    alone = device.type != "cpu" or max(args.batch_size for args in settings) >= 500
    jobs = min(many.jobs or gpus or (1 if alone else cores), len(runs))
    threads, width, running = max(1, cores // jobs), max(len(run.name) for run in runs), []
    thread, numbers = threading.local(), itertools.count()  # each thread has a number: its GPU's
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}

    def train_one(folder):
        (line, args), start = runs[folder], time.time()
        if (folder / "config.json").exists():
            line = ["--resume", str(folder), "--data-dir", args.data_dir]
        with open(f"{folder}.txt", "a", encoding="utf-8") as file:
            device = ["--device", f"cuda:{thread.number % gpus}"] if gpus else []
            child = subprocess.Popen([sys.executable, __file__, *line, *device], stdout=file, stderr=file,
                                     env=environment)
            running.append(child)
            status = child.wait()
        last = Path(f"{folder}.txt").read_text(encoding="utf-8").strip().split("\n")[-1] or "no output"
        result = f"  failed: {last} ({folder}.txt)" if status else summary(folder)
        print(f"{folder.name:<{width}}{result}{(time.time() - start) / 60:>8.1f} min", flush=True)
        return not status

    for run in todo[:1]:  # its set is read, or downloaded, once before many do so; a missing one ends here
        evaluate.load_data(runs[run][1], runs[run][1].dataset)
    print(f"{len(todo)} of {len(runs)} runs to train, {jobs} at once, {threads} CPU threads each, into "
          f"{output}", flush=True)
    Path(output).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs, initializer=lambda: setattr(thread, "number", next(numbers))) as pool:
        try:
            done = list(pool.map(train_one, todo))
        except BaseException as error:  # Ctrl-C ends the runs, too; their completed epochs are kept
            pool.shutdown(wait=False, cancel_futures=True)
            for child in running:
                child.terminate()
            error.advice = "; the same command resumes the runs"
            raise
    complete = [folder for folder in runs if evaluate.read_run(folder)]
    if len(complete) > 1:
        where = Path(output, f"comparison-{next(iter(runs)).name}")
        print(f"\nsaved in {evaluate.compare(complete, where, against)}")
    return 0 if all(done) else 1


def summary(folder):
    """The figures of a finished run, in columns."""
    metrics = json.loads((folder / "metrics.json").read_text())
    accuracy, errors = metrics.get("accuracy"), metrics.get("reconstruction")
    text = f"{accuracy['test']:>10.{evaluate.digits(metrics['test_images'])}f} %" if accuracy else " " * 12
    text += f"{errors['psnr']:>8.2f} dB" if errors else " " * 11
    return text + "  at chance" * bool(accuracy and accuracy["at_chance"])


# ---------------------------------------------------------------- recipes and sweeps

STANDARD = dict(size=224, margin=True, pretrained=True)
# The other studies: Adam, no learning-rate decay, no flips.
OTHERS = dict(scale="0..1", flip=False, alpha=0.0, optimizer="adam", lr=0.001, weight_decay=0.0, lr_step=1000,
              epochs=20, batch_size=100)
JOINT = OTHERS | dict(scale="-1..1", classes="automobile,cat,dog,horse,truck", rotate=10.0, noise=0.05,
                      clean_test=True, alpha=0.1, epochs=10)  # 0.05 of 0-1 is 0.1 of -1..1
FASHION = OTHERS | dict(dataset="fashionmnist", epochs=30, batch_size=64)
V5 = dict(label_smoothing=0.2, shift=2, optimizer="muon", lr=0.15, momentum=0.85, weight_decay=0.0,
          schedule="onecycle", epochs=10, batch_size=500)
AUTOENCODERS = {"kind": ["mlp", "combo", "cnn"], "latent": ["cnn10", "cnn32", "cnn100", "cnn1000"],
                "depth": ["cnnL1", "cnnL3", "cnnL5", "cnnL10"]}
# What a version's recipe changes of the CIFAR study's.
RECIPES = dict.fromkeys([*models.VERSIONS, "custom"], {}) | {
    "v2.3": dict(size=64, margin=True), "v4": dict(gamma=0.001), "v4-stride2": dict(gamma=0.001),
    "v5-small": V5 | dict(epochs=6), "v5": V5, "v5-large": V5 | dict(epochs=40),
    **dict.fromkeys(["vgg", "resnet", "mobilenet", "squeezenet"], STANDARD),
    "joint5": JOINT, "cnn6": dict(beta=0.0), **dict.fromkeys(sum(AUTOENCODERS.values(), []), OTHERS),
    "mnist": OTHERS | dict(dataset="mnist", alpha=1.0, weight_decay=0.01, first_share=2 / 3, first_decay=0.0),
    "fashion-mlp": FASHION, "fashion-cnn": FASHION, "vae": FASHION | dict(kl=0.02),
}


class Sweep(NamedTuple):
    runs: list  # of flags, a run each
    help: str
    against: str | None = None  # as of evaluate.py --against; None: the first run


def both(*lines, more=""):
    """Each of these lines of flags with beta 1 and with beta 0."""
    return [f"{line} --beta {beta} {more}" for line in lines for beta in (1, 0)]


SHORT = "--epochs 12 --lr-step 3"  # a shortened schedule of the CIFAR study's shape
CIFAR = ["v1", "v1.1", "v1.2", "v2", "v2.1", "v2.2", "v2.3", "v3", "v3.1", "v3.2", "v3.3", "v4"]
LATE = "--classifier \"C'(32)>C(64)>C(64)>L(512)>D(0.3)>L(128)>D(0.3)>L'(10)\""
OF_V4 = ["--gamma 0", "--optimizer adam --lr 0.001", "--optimizer adagrad --lr 0.01", LATE, "--separate",
         "--separate --no-freeze-encoder", "--no-decoder", "--variant constrained", "--variant undersampled",
         "--variant oversampled", "--variant smote", "--variant constrained --class-weights balanced",
         "--variant constrained --delta 1", "--variant constrained --skip",
         "--variant oversampled --skip --delta 1", "--blur 6.5", "--blur 6.5 --no-decoder"]
INGREDIENTS = ["", "--beta 0", "--encoder \"C'(32)>B(32)>B'(32)\"", "--label-smoothing 0", "--shift 0",
               "--schedule step --lr-step 2", "--optimizer adam --lr 0.01", "--optimizer sgd --lr 0.7"]
SWEEPS = {
    "help": Sweep(both(*(f"--version {v}" for v in ("v1", "v2", "v3", "v4", "v4 --blur 6.5")), more=SHORT),
                  "v1 to v4, and v4 on blurred images, with beta 1 and 0, 12 epochs", "beta=0"),
    "labels": Sweep(both(*(f"--version v4 --labels {count}" for count in (100, 1000, 10_000)), more=SHORT),
                    "v4 with 100, 1,000, 10,000 labels, beta 1 and 0, 12 epochs", "beta=0"),
    "ablation": Sweep([f"--version v5-small {change}" for change in INGREDIENTS],
                      "v5-small, and with one ingredient taken away or exchanged"),
    "study": Sweep([*both(*(f"--version {version}" for version in CIFAR)), "--version v4-plain",
                    "--version v4-stride2", *(f"--version v4 {change}" for change in OF_V4)],
                   "every row of the CIFAR study at 32x32 and 64x64", "beta=0"),
    **{name: Sweep([f"--version {version}" for version in versions], " ".join(versions))
       for name, versions in AUTOENCODERS.items()},
}


# ---------------------------------------------------------------- the command line

def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or a float from `low` (or above it) to `high`."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf or above and value == low:
            expected = f"a number {'above' if above else 'of at least'} {low:g}"
            expected += "" if high == math.inf else f", at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
        return value
    convert.__name__ = kind.__name__  # for argparse's own message
    return convert


def shares(text):
    """An argparse type: "bird=0.5,deer=0.25" as a dict."""
    pairs = [part.rpartition("=") for part in text.split(",")]
    if not all(name for name, _, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: expected CLASS=SHARE,..., such as bird=0.5,deer=0.5")
    return {name: number(float, 0, 1, above=True)(value) for name, _, value in pairs}


COUNT, POSITIVE, WEIGHT = number(int, 1), number(float, 0, above=True), number(float, 0)
# The flags of several runs; all others are a run's.
MANY = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
MANY.error = evaluate.fail
several = MANY.add_argument_group("several runs, and their comparison").add_argument
several("--seeds", type=COUNT, metavar="N", help="train with N seeds, from --seed on; finished runs are kept")
several("--sweep", metavar="NAME", help="a run for each value of a setting, SETTING=V1,V2,..., compared with "
        "the first; or a table's runs: " + "; ".join(f"{key}: {row.help}" for key, row in SWEEPS.items()))
several("--jobs", type=COUNT, metavar="J", help="runs at once; by default one for each GPU or, without GPUs, "
        "for each CPU thread (one in all from batches of 500 images on)")
several("--list", action="store_true", help="print the commands of the runs, one a line, and run nothing")


def make_parser(version="v4"):
    """The command line of one run, its defaults those of the version's recipe."""
    weights = {flag: dict(type=WEIGHT, default=term.default, metavar="X", help=term.help)
               for flag, term in losses.TERMS.items()}
    switch, first = argparse.BooleanOptionalAction, argparse.ArgumentParser(add_help=False)
    add = first.add_argument_group("what matters most").add_argument
    add("--version", default=version, metavar="NAME", help=" ".join(models.VERSIONS))
    add("--dataset", metavar="NAME|PATH", help=f"{' '.join(data.NAMES)} shapes, a folder of pictures or an "
        ".npz; by default the version's own: mostly cifar10, or shapes where that is unavailable")
    add("--alpha", **weights.pop("alpha"))
    add("--beta", **weights.pop("beta"))
    add("--epochs", type=COUNT, default=40, metavar="N", help="passes over the training images")
    add("--lr", type=POSITIVE, default=0.01, metavar="X", help="learning rate")
    add("--batch-size", type=COUNT, default=32, metavar="N", help="images per step")
    add("--seed", type=number(int, 0, 2**31), default=0, metavar="N", help="seed of all that is random")
    add("--output", default="outputs", metavar="DIR", help="where run folders go")
    add("--resume", metavar="RUN", help="resume the run in this folder; --epochs N lengthens it")

    parser = argparse.ArgumentParser(
        description=f"Trains an autoencoder with a classifier. In brackets, the defaults of {version}; -h "
        "after --version NAME shows those of another one.", allow_abbrev=False, parents=[first, MANY])
    parser.error = evaluate.fail
    add = parser.add_argument_group("network").add_argument
    add("--encoder", metavar="NOTATION", help="another encoder, such as \"C'(32)>C(32)\"")
    add("--classifier", metavar="NOTATION", help="another classifier, such as \"L(128)>L'(10)\"")
    add("--decoder", metavar="NOTATION", help="another decoder, such as \"T(32)>T(3)\", mirror, or none")
    add("--no-decoder", dest="decoder", action="store_const", const="none", help="no decoder; beta is then 0")
    add("--skip", action=switch, help="lower features join the classifier's, as in the CIFAR study")
    add("--pretrained", action=switch, help="standard networks: start from ImageNet weights")
    add("--init", metavar="CKPT", help="start from a checkpoint's encoder and, where they fit, its rest")

    add = parser.add_argument_group("data").add_argument
    add("--data-dir", default="data", metavar="DIR", help="where named sets are, or are downloaded to")
    add("--size", type=number(int, 1, 1024), metavar="PIXELS", help="scale the images to this side")
    add("--margin", action=switch, help="scale to 8/7 of --size, then crop, at random in training")
    add("--scale", choices=data.SCALES, default="imagenet", help="how pixels are normalised (--scale=-1..1)")
    add("--classes", metavar="NAME,...", help="only these classes")
    add("--train-size", type=COUNT, metavar="N", help="train on N images")
    add("--test-size", type=COUNT, metavar="N", help="test on N images")
    add("--val-share", type=number(float, 0, 0.9), default=0.0, metavar="X", help="to choose the best epoch")
    add("--labels", type=COUNT, metavar="N", help="only N training images keep their labels")
    add("--variant", choices=data.VARIANTS, default="complete", help="constrained: keep only the shares of "
        "--constrain; undersampled: then cut every class to the smallest; oversampled: then repeat images up "
        "to the largest; smote: then add synthetic images up to it")
    add("--constrain", type=shares, metavar="CLASS=X,...", help="the share of a class's training images that "
        "--variant keeps (bird=0.5,deer=0.5,truck=0.5)")
    add("--blur", type=number(float, 0, 10), default=0.0, metavar="SIGMA", help="blur all images, in pixels")
    add("--noise", type=number(float, 0, 10), default=0.0, metavar="STD", help="Gaussian noise on the "
        "network's input, on pixels of 0-1; the clean image is the reconstruction target")
    add("--clean-test", action=switch, help="no noise on the test images")
    add("--rotate", type=number(float, 0, 180), default=0.0, metavar="X", help="of training images, degrees")
    add("--shift", type=number(int, 0, 16), default=0, metavar="N", help="of training images, up to N pixels")
    add("--flip", action=switch, help="left-right flips in training; never on mnist and svhn")

    formula = " + ".join(f"{flag} * {term.name}" for flag, term in losses.TERMS.items())
    add = parser.add_argument_group("loss", formula).add_argument
    for flag, options in weights.items():
        add(f"--{flag}", **options)
    add("--jigsaw-grid", type=number(int, 2, 32), default=4, metavar="N", help="the jigsaw has N x N tiles")
    add("--label-smoothing", type=number(float, 0, 1), default=0.0, metavar="X", help="spread this share of "
        "the classifier's target evenly over all classes")
    add("--class-weights", choices=["balanced"], help="all classes count the same in the classifier loss")

    add = parser.add_argument_group("training").add_argument
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="Muon is slow for small batches")
    add("--momentum", type=number(float, 0, 1), default=0.9, metavar="X", help="of sgd and muon")
    add("--weight-decay", type=WEIGHT, default=1e-4, metavar="X", help="the optimizer's")
    add("--schedule", choices=["step", "onecycle"], default="step", help="of the learning rate: step, or "
        "onecycle: from a fifth of --lr up to it in 0.23 of the steps, then down to 0")
    add("--lr-step", type=COUNT, default=10, metavar="N", help="epochs between two reductions of the rate")
    add("--lr-decay", type=number(float, 0, 1, above=True), default=0.1, metavar="X", help="factor of each")

    add = parser.add_argument_group("separate training").add_argument
    add("--separate", action=switch, help="the autoencoder first, then the classifier on its encoder")
    add("--first-share", type=number(float, 0.01, 0.99), default=0.5, metavar="X", help="of the epochs")
    add("--first-decay", type=WEIGHT, metavar="X", help="the autoencoder's weight decay")
    add("--freeze-encoder", action=switch, help="the classifier is trained alone")

    add = parser.add_argument_group("run").add_argument
    add("--name", help="of the run's folder; by default the version and what differs from its recipe")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where it is faster")
    off, on = dict.fromkeys(("skip", "margin", "clean_test", "separate"), False), ("flip", "freeze_encoder")
    parser.set_defaults(**off | dict.fromkeys(on, True) | RECIPES[version])
    for action in parser._actions:
        value = parser.get_default(action.dest)
        if value is not None and value is not False and action.dest not in ("version", "help"):
            value = "yes" if value is True else f"{value:g}" if isinstance(value, float) else value
            action.help += f" ({value})"
    return parser


@functools.cache
def defaults(version):
    """The settings of a version's recipe, a dict. NotationError names the nearest version."""
    if version not in RECIPES:
        models.find(version)
    args, many = make_parser(version).parse_args([]), MANY.parse_args([])
    return {key: value for key, value in vars(args).items() if key not in many}


def parse(words, whole=True):
    """(args, the settings that were typed, a dict). args: every setting of a run, and what follows from them:
    weights (of the loss, by flag), trained (the parts of the network that are), preparation (how images are
    brought to the network). whole: all of a run's words, not a part of them. UsageError."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = evaluate.fail
    first.add_argument("--version")
    first.add_argument("--encoder")
    known = first.parse_known_args(words)[0]
    version = known.version or ("custom" if known.encoder else "v4")
    usual, untyped = defaults(version), object()  # what is not typed keeps that object
    typed = vars(make_parser(version).parse_args(words, Namespace(**dict.fromkeys(usual, untyped))))
    typed = {key: value for key, value in typed.items() if key in usual and value is not untyped}
    args = Namespace(**usual | typed)
    if args.decoder == "none" and "beta" not in typed:
        args.beta = 0.0
    if typed.get("dataset", "cifar10") != "cifar10" and "classes" not in typed:
        args.classes = None  # those of a recipe are CIFAR-10's
    if args.dataset not in (None, "shapes", *data.NAMES) and Path(args.dataset).exists():
        args.dataset = str(Path(args.dataset).resolve())  # an evaluation finds it from any folder
    args.data_dir = str(Path(args.data_dir).resolve())
    args.flip = args.flip and args.dataset not in data.NEVER_FLIPPED
    args.weights = {flag: getattr(args, flag) for flag in losses.TERMS}
    args.trained = [part for part, trained in trained_parts(args.weights).items() if trained]
    args.preparation = {"size": args.size, "margin": args.margin, "scale": args.scale}
    if whole:
        check(args, typed)
    return args, typed


def check(args, typed):
    """UsageError where settings contradict each other, or where one that was typed has no effect."""
    classified, version = "classifier" in args.trained, models.VERSIONS.get(args.version)
    for notation in [each for each in (args.encoder, args.classifier) if "(" in (each or "")]:
        models.parse(notation)  # before data is read or downloaded
    for wrong, message in (
            (args.version == "custom" and not args.encoder, "--version custom: expected --encoder beside it"),
            (not args.trained, "nothing to train on: alpha, beta and delta are all 0; expected one above 0"),
            (args.separate and len(args.trained) < 2, "--separate: trains a decoder and then a classifier; "
             "expected alpha and beta (or delta) above 0, and a decoder"),
            (args.separate and args.epochs < 2, f"--epochs {args.epochs}: --separate needs at least 2"),
            (args.labels and args.variant in ("oversampled", "smote"), f"--labels {args.labels}: expected a "
             f"--variant that copies no image, not {args.variant}")):
        if wrong:
            raise UsageError(message)
    for flags, has, needs in (
            (("classifier", "skip", "labels", "label_smoothing", "class_weights"), classified, "--alpha 1"),
            (("freeze_encoder", "first_share", "first_decay"), args.separate, "--separate"),
            (("pretrained",), version and version.pretrained, "a version that has pretrained weights"),
            (("flip",), args.dataset not in data.NEVER_FLIPPED, "images other than digits"),
            (("jigsaw_grid",), args.delta, "--delta above 0"),
            (("constrain",), args.variant != "complete", "--variant other than complete"),
            (("lr_step", "lr_decay"), args.schedule == "step", "--schedule step"),
            (("momentum",), args.optimizer in ("sgd", "muon"), "--optimizer sgd or muon"),
            (("margin",), args.size, "--size"), (("clean_test",), args.noise, "--noise above 0")):
        for flag in flags:
            if flag in typed and not has:
                sign = "no-" if typed[flag] is False else ""
                raise UsageError(f"--{sign}{flag.replace('_', '-')}: has no effect without {needs}")


def main(argv):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a cluster's jobs end so
    with evaluate.errors("train.py"):
        many, words = MANY.parse_known_args(argv)
        args, typed = parse(words, not (many.seeds or many.sweep))
        if "LOCAL_RANK" in os.environ:  # under torchrun
            start_process_group(args.device)
        if many.seeds or many.sweep:
            if args.resume or dist.is_initialized():
                raise UsageError("--seeds, --sweep: expected neither --resume nor torchrun, for one run")
            return train_many(many, words)
        if many.list or many.jobs:
            raise UsageError("--list, --jobs: no effect on one run; expected --sweep or --seeds beside it")
        execute(args, typed, ["python", "train.py", *argv])
        if dist.is_initialized():
            dist.barrier()  # all stay until the pictures are drawn
            dist.destroy_process_group()
    return 0


def start_process_group(name):
    """Joins the processes that torchrun has started. UsageError."""
    device = evaluate.pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A day: the others wait while the first process downloads a data set, or measures.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")


# ---------------------------------------------------------------- Muon, and CUDA graphs

class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum in which the update of a matrix of weights is made nearly orthogonal (Jordan
    et al. 2024, https://kellerjordan.github.io/posts/muon/), with decoupled weight decay. A convolution's
    weights count as a matrix with a row for each output channel (a transposed one's: for each input channel);
    biases and other vectors learn as by SGD with Nesterov momentum. The size of a matrix's update does not
    depend on the scale of its gradient. Every parameter needs a gradient."""

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
    """A matrix (M, N) with its singular values brought near 1, by three steps of a Newton-Schulz iteration
    with Jordan's coefficients: those above 0.013 of the matrix's Frobenius norm come to 0.5 to 1.2, smaller
    ones stay below."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(3):  # 3.4445 x + (2.0315 (x x')^2 - 4.7750 x x') x
        products = x @ x.T
        products = torch.addmm(products, products, products, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, products, x, beta=3.4445)
    return x


# The optimizer, the devices on which it has a fused kernel, its further settings.
OPTIMIZERS = {"sgd": (torch.optim.SGD, ("cpu", "cuda"), ("momentum",)),
              "adam": (torch.optim.Adam, ("cpu", "cuda"), ()),
              "adagrad": (torch.optim.Adagrad, ("cpu",), ()), "muon": (Muon, (), ("momentum",))}


class Recorded:
    """A step's work on a GPU, work(dict of tensors) -> tensor, which also leaves gradients, as a CUDA graph.

    A small network's step is hundreds of kernels, each of which takes the CPU longer to start than the GPU to
    run; a graph starts all at once. The first call runs the work itself. The second one records it; it and
    all later ones replay it, with the same bits. A call with tensors of other shapes (a last batch) runs the
    work itself and gives the graph's memory back. All that the work reads beside its tensors must stay in
    place, as the parameters do; gradients must be None at each call; the result is overwritten by the next
    one.
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
            self.inputs = {name: tensor.clone() for name, tensor in tensors.items()}
            # PyTorch's own stream for this stays on the GPU that was used first.
            self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(tensors["images"].device)
            with torch.cuda.graph(self.graph, stream=stream):  # runs nothing
                self.result = self.work(self.inputs)
            self.gradients = [p.grad for p in self.parameters]
        for name, tensor in tensors.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients):
            p.grad = gradient
        return self.result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
