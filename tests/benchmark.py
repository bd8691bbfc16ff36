"""Speed, measured on this machine: python tests/benchmark.py [--images N] [--turns N] [flags of train.py]

In turns, after one to warm up, on the same images, each in images per second:

    study    as the study trains: an image folder, one loading worker, float32, contiguous memory,
             ReLU before pool, PyTorch's layers, the L2 sum in Python, .item() at every step; in a
             process of its own, which none of our settings reach
    sketch   the step of a first sketch, on a batch in memory: as the study's, but channels_last
             and bfloat16 (where the hardware is faster in it), without the .item()
    ours     train.train_epoch, as train.py runs it
    at once  the same in as many processes as there are threads, each with one (--jobs): all together
    floor    train.train_epoch on one batch that is already in memory, again and again
    data     the batches alone, with no network
    test     evaluate.measure, with all its metrics

then the ratios, each within a turn, as median and range over the turns, and the multiply-adds
of training (three times those of models.py, twice as many operations) per second.
"""
import argparse
import contextlib
import itertools
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets, transforms, utils

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402


def plain_network(version, in_shape, num_classes):
    """A version made of PyTorch's layers, ReLU before pool, as the study has it."""
    model = models.build(version, in_shape, num_classes)
    plain = {models.ConvTranspose2d: nn.ConvTranspose2d, models.WholeMapConv2d: nn.Conv2d,
             models.Dropout: nn.Dropout}
    for part in (model.encoder, model.classifier, model.decoder):
        layers = list(part)
        for i, layer in enumerate(part):
            if isinstance(layer, nn.MaxPool2d) and isinstance(part[i + 1], nn.ReLU):
                layers[i:i + 2] = [layers[i + 1], layer]
            layer.__class__ = plain.get(type(layer), type(layer))
        part._modules = {str(i): layer for i, layer in enumerate(layers)}
    return model


def plain_loss(model, images, labels, args):
    """The three terms and their weighted sum, written out."""
    logits, rebuilt = model(images)
    classifier, autoencoder = F.cross_entropy(logits, labels), F.mse_loss(rebuilt, images)
    l2 = 0
    for p in model.parameters():
        l2 = l2 + (p ** 2).sum() / 2
    return args.alpha * classifier + args.beta * autoencoder + args.gamma * l2, classifier, autoencoder, l2


def plain_sgd(model, args):
    return torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)


def study(folder, in_shape, num_classes, args):
    """Images per second of the study's loop over an image folder, from its second batch on."""
    resize = [transforms.Resize(args.size)] if args.size else []
    images = datasets.ImageFolder(folder, transforms.Compose([
        *resize, transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(data.MEAN, data.STD)]))
    model = plain_network(args.version, in_shape, num_classes)
    optimizer = plain_sgd(model, args)
    seen, total = 0, 0.0
    for step, (x, labels) in enumerate(torch.utils.data.DataLoader(
            images, args.batch_size, shuffle=True, num_workers=1)):
        if step == 1:  # the worker has started
            start = time.perf_counter()
        optimizer.zero_grad()
        terms = plain_loss(model, x, labels, args)
        terms[0].backward()
        optimizer.step()
        total += sum(term.item() for term in terms)
        seen += len(labels) * (step > 0)
    return seen / (time.perf_counter() - start)


def one_of_many(dataset, in_shape, args):
    """Images per second of ours with one thread, in a process of its own, after an epoch to warm up."""
    torch.set_num_threads(1)
    evaluate.keep_freed_memory()
    torch.manual_seed(0)
    model = models.build(args.version, in_shape, len(dataset.classes), pretrained=False)
    optimizer = train.make_optimizer(model.to(memory_format=torch.channels_last), args)
    return [timed(lambda: train.train_epoch(model, dataset, optimizer, args, 0), len(dataset.train.labels))
            for _ in range(2)][1]


def sketch(model, batch, args, steps):
    optimizer = plain_sgd(model, args)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        with evaluate.autocast(batch[0].device, args.precision):
            loss, *_ = plain_loss(model, *batch, args)
        loss.backward()
        optimizer.step()
    return steps * len(batch[1]) / (time.perf_counter() - start)


def timed(work, images):
    start = time.perf_counter()
    work()
    return images / (time.perf_counter() - start)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=6400, help="training images in a turn")
    parser.add_argument("--turns", type=int, default=5)
    options, words = parser.parse_known_args(argv)
    usual = ["--dataset", "data/cifar10" if Path("data/cifar10").is_dir() else "shapes"]
    args, _ = train.parse([*usual, *words, "--train-size", str(options.images), "--device", "cpu"])
    dataset, model = train.prepare(args)
    args, = train.phases(args)
    optimizer, count = train.make_optimizer(model, args), len(data.bounds(options.images, args.batch_size))
    shape, classes = model.version.in_shape, model.num_classes
    batch = next(data.batches(dataset.train, args.batch_size, epoch_seed=0, **args.preparation))
    plain = plain_network(args.version, shape, classes).to(memory_format=torch.channels_last)

    def ours():
        return timed(lambda: train.train_epoch(model, dataset, optimizer, args, 0), options.images)

    def floor():
        with mock.patch.object(data, "batches", lambda *_, **__: itertools.repeat(batch, count)):
            return ours() * count * len(batch[1]) / options.images

    threads, context = torch.get_num_threads(), multiprocessing.get_context("spawn")
    with (tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, context) as other,
          ProcessPoolExecutor(threads, context) as others):
        for i, (image, label) in enumerate(zip(*dataset.train)):
            place = Path(folder, f"{label:03}")
            place.mkdir(exist_ok=True)
            utils.save_image(image / 255, place / f"{i}.jpg")
        ways = {
            "study": lambda: other.submit(study, folder, shape, classes, args).result(),
            "sketch": lambda: sketch(plain, batch, args, count),
            "ours": ours,
            "at once": lambda: sum(each.result() for each in [
                others.submit(one_of_many, dataset, shape, args) for _ in range(threads)]),
            "floor": floor,
            "data": lambda: timed(lambda: [None for _ in data.batches(
                dataset.train, args.batch_size, 0, args.flip, **args.preparation)], options.images),
            "test": lambda: timed(lambda: evaluate.measure(model, dataset.test, args),
                                  len(dataset.test.labels))}
        _, *turns = [{name: way() for name, way in ways.items()} for _ in range(options.turns + 1)]

    print(f"{args.version}, batch {args.batch_size}, {dataset.name} ({dataset.source}), {options.images:,} "
          f"images a turn, {options.turns} turns\n{platform.machine()}, {threads} threads, "
          f"{torch.backends.cpu.get_cpu_capability()}, {args.precision}, torch {torch.__version__}\n")
    heading = f"{'median':>9}{'least':>9}{'most':>9}"
    print(f"{'images per second':<20}{heading}")
    for name in ways:
        print_row(name, [turn[name] for turn in turns], 0)
    print(f"\n{'ratio':<20}{heading}")
    for a, b in (("ours", "study"), ("ours", "floor"), ("ours", "sketch"), ("floor", "sketch"),
                 ("at once", "ours")):
        print_row(f"{a} / {b}", [turn[a] / turn[b] for turn in turns], 2)
    operations = 6 * sum(row[4] for row in models.trace(model))
    print(f"\nours: {statistics.median(turn['ours'] for turn in turns) * operations / 1e12:.2f} TFLOP/s")
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
        print(f"\npeak memory of this process, all ways together: {peak:,.0f} MB")


def print_row(name, values, places):
    figures = statistics.median(values), min(values), max(values)
    print(f"{name:<20}" + "".join(f"{figure:>9.{places}f}" for figure in figures))


if __name__ == "__main__":
    main(sys.argv[1:])
