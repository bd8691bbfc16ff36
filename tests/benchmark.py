"""Speed, measured on this machine: python tests/benchmark.py [--version v4] [--beta 0]

In turns, on the same images, each in images per second:

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
import itertools
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets, transforms
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402


def plain_network(version, in_shape, num_classes):
    """A version made of PyTorch's layers, ReLU before pool, as the study has it."""
    model = models.build(version, in_shape, num_classes)
    for part in (model.encoder, model.classifier, model.decoder):
        layers = list(part)
        for i, layer in enumerate(part):
            if isinstance(layer, nn.MaxPool2d) and isinstance(part[i + 1], nn.ReLU):
                layers[i:i + 2] = [layers[i + 1], layer]
            elif isinstance(layer, models.ConvTranspose2d):
                layer.__class__ = nn.ConvTranspose2d
            elif isinstance(layer, models.WholeMapConv2d):
                layer.__class__ = nn.Conv2d
            elif isinstance(layer, models.Dropout):
                layer.__class__ = nn.Dropout
        part._modules = {str(i): layer for i, layer in enumerate(layers)}
    return model


def plain_loss(model, images, labels, s):
    """The three terms and their weighted sum, written out."""
    logits, rebuilt = model(images)
    classifier, autoencoder = F.cross_entropy(logits, labels), F.mse_loss(rebuilt, images)
    l2 = 0
    for p in model.parameters():
        l2 = l2 + (p ** 2).sum() / 2
    return s.alpha * classifier + s.beta * autoencoder + s.gamma * l2, classifier, autoencoder, l2


def study(folder, version, in_shape, num_classes, s):
    """Images per second of the study's loop over an image folder, from its second batch on."""
    resize = [transforms.Resize(s.size)] if s.size else []
    images = datasets.ImageFolder(folder, transforms.Compose([
        *resize, transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(data.MEAN, data.STD)]))
    model = plain_network(version, in_shape, num_classes)
    optimizer = torch.optim.SGD(model.parameters(), s.lr, s.momentum, weight_decay=s.weight_decay)
    seen, total = 0, 0.0
    for step, (x, labels) in enumerate(torch.utils.data.DataLoader(
            images, s.batch_size, shuffle=True, num_workers=1)):
        if step == 1:  # the worker has started
            start = time.perf_counter()
        optimizer.zero_grad()
        terms = plain_loss(model, x, labels, s)
        terms[0].backward()
        optimizer.step()
        total += sum(term.item() for term in terms)
        seen += len(labels) * (step > 0)
    return seen / (time.perf_counter() - start)


def one_of_many(dataset, version, shape, s):
    """Images per second of ours with one thread, in a process of its own, after an epoch to warm up."""
    torch.set_num_threads(1)
    evaluate.keep_freed_memory()
    torch.manual_seed(0)
    model = models.build(version, shape, len(dataset.classes), pretrained=False).to(memory_format=torch.channels_last)
    optimizer = train.make_optimizer(model, s)
    return [timed(lambda: train.train_epoch(model, dataset, optimizer, s, 0), len(dataset.train.labels))
            for _ in range(2)][1]


def sketch(model, batch, s, steps):
    optimizer = torch.optim.SGD(model.parameters(), s.lr, s.momentum, weight_decay=s.weight_decay)
    images, labels = batch
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        with evaluate.autocast(images.device, s.precision):
            loss, *_ = plain_loss(model, images, labels, s)
        loss.backward()
        optimizer.step()
    return steps * len(labels) / (time.perf_counter() - start)


def timed(work, images):
    start = time.perf_counter()
    work()
    return images / (time.perf_counter() - start)


def peak_memory():
    """Of this process so far, in MB; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--version", default="v4", choices=models.VERSIONS, metavar="NAME")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--beta", type=float, help="default: the recipe's")
    parser.add_argument("--dataset", help="as of train.py (default: data/cifar10, else shapes)")
    parser.add_argument("--images", type=int, default=6400, help="training images in a turn")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args(argv)

    dataset = args.dataset or ("data/cifar10" if Path("data/cifar10").is_dir() else "shapes")
    changes = {name: getattr(args, name) for name in ("batch_size", "beta") if getattr(args, name) is not None}
    s = train.settle(changes | {"version": args.version, "train_size": args.images, "device": "cpu",
                                "dataset": dataset})
    dataset, model = train.prepare(s)
    s, = train.phases(s)
    optimizer, steps = train.make_optimizer(model, s), len(data.batch_bounds(args.images, s.batch_size))
    batch = next(data.batches(dataset.train, s.batch_size, epoch_seed=0, **evaluate.preparation(s)))
    shape = model.version.in_shape
    first = plain_network(args.version, shape, model.num_classes).to(memory_format=torch.channels_last)
    batches = data.batches

    def ours():
        return timed(lambda: train.train_epoch(model, dataset, optimizer, s, 0), args.images)

    threads, context = torch.get_num_threads(), multiprocessing.get_context("spawn")
    with (tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, context) as other,
          ProcessPoolExecutor(threads, context) as others):
        for i, (image, label) in enumerate(zip(*dataset.train)):
            place = Path(folder, f"{label:03}")
            place.mkdir(exist_ok=True)
            save_image(image / 255, place / f"{i}.jpg")

        def floor():
            data.batches = lambda *_, **__: itertools.repeat(batch, steps)
            try:
                return ours() * steps * len(batch[1]) / args.images
            finally:
                data.batches = batches

        ways = {
            "study": lambda: other.submit(study, folder, args.version, shape, model.num_classes, s).result(),
            "sketch": lambda: sketch(first, batch, s, steps),
            "ours": ours,
            "at once": lambda: sum(each.result() for each in [
                others.submit(one_of_many, dataset, args.version, shape, s) for _ in range(threads)]),
            "floor": floor,
            "data": lambda: timed(lambda: [None for _ in batches(
                dataset.train, s.batch_size, epoch_seed=0, flip=s.flip, **evaluate.preparation(s))], args.images),
            "test": lambda: timed(lambda: evaluate.measure(model, dataset.test, s), len(dataset.test.labels))}
        turns = []
        for turn in range(args.turns + 1):  # the first warms up
            turns.append({name: way() for name, way in ways.items()})
        turns = turns[1:]

    print(f"{args.version}, batch {s.batch_size}, {dataset.name} ({dataset.source}), {args.images:,} "
          f"images a turn, {args.turns} turns\n{platform.machine()}, {torch.get_num_threads()} threads, "
          f"{torch.backends.cpu.get_cpu_capability()}, {s.precision}, torch {torch.__version__}\n")
    print(f"{'images per second':<20}{'median':>9}{'least':>9}{'most':>9}")
    for name in ways:
        values = [turn[name] for turn in turns]
        print(f"{name:<20}{statistics.median(values):>9.0f}{min(values):>9.0f}{max(values):>9.0f}")
    print(f"\n{'ratio':<20}{'median':>9}{'least':>9}{'most':>9}")
    for a, b in (("ours", "study"), ("ours", "floor"), ("ours", "sketch"), ("floor", "sketch"), ("at once", "ours")):
        values = [turn[a] / turn[b] for turn in turns]
        print(f"{f'{a} / {b}':<20}{statistics.median(values):>9.2f}{min(values):>9.2f}{max(values):>9.2f}")
    operations = 6 * sum(row[4] for row in models.trace(model))
    print(f"\nours: {statistics.median(turn['ours'] for turn in turns) * operations / 1e12:.2f} TFLOP/s")
    if peak_memory():
        print(f"\npeak memory of this process, all ways together: {peak_memory():,.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
