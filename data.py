"""Image data sets held whole in memory as uint8, and their batches made on the device.

    dataset = load("cifar10")                 # or a folder, an .npz, "shapes", ...
    for images, labels in batches(dataset.train, 32, epoch_seed=0, flip=True):
        ...                                   # images (B, C, H, W) float32, normalised

`load` takes a name of NAMES, a folder with train/<class>/* and test/<class>/* images, or an
.npz with x_train, y_train, x_test, y_test. `python data.py --dataset NAME` prints a set's
classes and counts and saves a sheet of samples. This file needs torch, torchvision and numpy.
"""
import argparse
import contextlib
import functools
import math
import socket
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid


class DataError(ValueError):
    """A data set that cannot be had; one line that names the file or value and the way out."""


class _Missing(DataError):
    """A named set that is not on disk and cannot be downloaded."""


class Split(NamedTuple):
    images: torch.Tensor  # (N, C, H, W) uint8, in channels_last memory
    labels: torch.Tensor  # (N,) int64, 0 to classes - 1


@dataclass
class Dataset:
    name: str      # "cifar10"
    source: str    # where it came from: "data/cifar10 (image folder)"
    classes: list  # the classes' names, in the order of the labels
    train: Split
    test: Split
    val: Split | None = None  # held out from the training set
    synthetic: int = 0  # how many of the training images, the last ones, SMOTE made


# What torchvision reads and downloads: (class, training arguments, test arguments). Flips turn
# a digit into something else, so the sets of digits are never flipped.
NAMES = {
    "cifar10": (datasets.CIFAR10, {"train": True}, {"train": False}),
    "cifar100": (datasets.CIFAR100, {"train": True}, {"train": False}),
    "svhn": (datasets.SVHN, {"split": "train"}, {"split": "test"}),
    "mnist": (datasets.MNIST, {"train": True}, {"train": False}),
    "fashionmnist": (datasets.FashionMNIST, {"train": True}, {"train": False}),
}
NEVER_FLIPPED = {"svhn", "mnist"}


def load(dataset=None, data_dir="data", size=None, test_only=False):
    """A Dataset by name or path; None is CIFAR-10 or, where it cannot be had, `shapes`.

    size: what images of unequal sizes in a folder are scaled and cropped to as they are read;
    a folder of equal ones is read as it is. test_only: a folder's training images are left
    unread, its training part is empty. Raises DataError.
    """
    if dataset is None:
        try:
            return _named("cifar10", data_dir, size, test_only)
        except _Missing as error:
            print(f"{'!' * 78}\nWARNING: {error}\nWARNING: going on with the built-in set 'shapes'. "
                  f"Its figures say nothing about CIFAR-10.\n{'!' * 78}", file=sys.stderr)
            return shapes()
    if dataset == "shapes":
        return shapes()
    if dataset in NAMES:
        return _named(dataset, data_dir, size, test_only)
    path = Path(dataset)
    if path.is_dir():
        return _folder(path, size, test_only)
    if not path.exists():
        raise DataError(f"no data set {dataset!r}; expected one of {' '.join(NAMES)} shapes, a "
                        "folder with train/ and test/, or an .npz file")
    if path.suffix != ".npz":
        raise DataError(f"{path}: expected a folder with train/ and test/, or an .npz file")
    return _npz(path)


def _split(images, labels):
    """A Split from images (N, C, H, W) uint8 and labels, both tensors or arrays."""
    images = torch.as_tensor(images).contiguous(memory_format=torch.channels_last)
    return Split(images, torch.as_tensor(labels, dtype=torch.int64))


# ---------------------------------------------------------------- named sets

def _torchvision(name, data_dir, download):
    make, *splits = NAMES[name]
    try:
        parts = [make(data_dir, download=download, **arguments) for arguments in splits]
    except ModuleNotFoundError as error:
        raise DataError(f"{name}: torchvision reads it with {error.name}, which is not installed: "
                        f"pip install {error.name}") from None
    both = []
    for part in parts:
        images = torch.as_tensor(part.data)
        if images.ndim == 3:           # grey: (N, H, W)
            images = images[:, None]
        elif images.shape[-1] == 3:    # (N, H, W, 3)
            images = images.permute(0, 3, 1, 2)
        both.append(_split(images, getattr(part, "targets", getattr(part, "labels", None))))
    classes = getattr(parts[0], "classes", [str(digit) for digit in range(10)])
    if name == "mnist":
        classes = [each.split(" ")[0] for each in classes]  # "0 - zero"
    return Dataset(name, f"{data_dir} (torchvision)", list(classes), *both)


def _named(name, data_dir, size, test_only):
    """A set of NAMES: torchvision's files in data_dir, an image folder there, or a download."""
    try:
        return _torchvision(name, data_dir, download=False)
    except RuntimeError:  # torchvision's word for: not there, or not whole
        pass
    root, folder = Path(data_dir), Path(data_dir, name)
    if (folder / "train").is_dir():
        return _folder(folder, size, test_only)
    own = root / NAMES[name][0].__name__
    made = [place for place in (own / "raw", own, root, *root.parents) if not place.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a network that swallows everything is answered, too
    try:
        return _torchvision(name, data_dir, download=True)
    except (OSError, RuntimeError) as error:
        for place in made:  # a failed download leaves no empty folders
            with contextlib.suppress(OSError):
                place.rmdir()
        raise _Missing(f"{name} is neither in {root}/ nor in {folder}/train, and could not be "
                       f"downloaded ({' '.join(str(error).split())[:80]}); --data-dir names another "
                       "place, --dataset shapes needs none") from None
    finally:
        socket.setdefaulttimeout(timeout)


# ---------------------------------------------------------------- folders and .npz

CHUNK = 250  # images that a reading process hands over at a time


class _Unequal(DataError):
    """Pictures of different sizes, which --size can bring together."""


def read_image(path, channels=3, fit=None):
    """A picture file as (H, W, C) uint8, turned as its EXIF says; transparency onto white.

    channels: 3, or 1 for grey. fit: (H, W) to scale and centre-crop to. Raises DataError,
    naming the path, for what is not a picture, is cut off, or is too large to be one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits a pixel
                    image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
                if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                image = image.convert("RGB" if channels == 3 else "L")
                if fit is not None:
                    image = ImageOps.fit(image, fit[::-1], Image.Resampling.BILINEAR)
                pixels = np.asarray(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"{path}: has too many pixels to be read safely") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a picture, or of a kind that cannot be read") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read as a picture ({reason})") from None
    return pixels.reshape(*pixels.shape[:2], channels)


def _read_chunk(job):
    """Picture files as one array, in a worker process: (array, None), or (None, the error),
    for an exception raised in a worker would reach the user as a page of traceback."""
    paths, shape, fit = job
    array = np.empty((len(paths), *shape), np.uint8)
    for image, path in zip(array, paths):
        try:
            pixels = read_image(path, fit=shape[:2] if fit else None)
        except DataError as error:
            return None, error
        if pixels.shape[:2] != shape[:2]:
            return None, _Unequal(f"{path}: is not {shape[1]}x{shape[0]} as the first picture is; "
                                  "--size N scales and crops every picture to NxN")
        if shape[2] == 1 and _coloured(pixels):
            return None, DataError(f"{path}: is in colour, the first picture of each class is grey; "
                                   "expected all of one kind")
        image[:] = pixels[..., :shape[2]]
    return array, None


def _coloured(pixels):
    return bool((pixels != pixels[..., :1]).any())


def _read_all(paths, shape, fit, folder):
    """All files as one (N, H, W, C) uint8 array, read by all cores. DataError."""
    images, done, start = np.empty((len(paths), *shape), np.uint8), 0, time.time()
    jobs = [(paths[i:i + CHUNK], shape, fit) for i in range(0, len(paths), CHUNK)]
    # A DataLoader calls collate_fn in its workers, and keeps the order. Only forked workers: the
    # others would run a user's own script, where that has no `if __name__ == "__main__"`, again.
    workers = torch.get_num_threads() if len(jobs) > 4 and sys.platform == "linux" else 0
    loader = torch.utils.data.DataLoader(jobs, batch_size=None, collate_fn=_read_chunk, num_workers=workers,
                                         multiprocessing_context="fork" if workers else None)
    line = "\rreading " if sys.stderr.isatty() else ""
    for array, error in loader:
        if error:
            raise error
        images[done:done + len(array)] = array
        done += len(array)
        if line:
            print(f"{line}{folder}: {done:,} of {len(paths):,} images", end="", file=sys.stderr)
    print(f"{line}{folder}: {done:,} images read in {time.time() - start:.1f} s", file=sys.stderr)
    return images


def _folder(folder, size, test_only):
    """An image folder: train/<class>/* and test/<class>/*, pictures at any depth below."""
    paths, labels, counts, classes = [], [], [], None
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise DataError(f"{folder}: has no folder {part}/; expected train/<class>/* and "
                            "test/<class>/*")
        names = sorted(each.name for each in (folder / part).iterdir()
                       if each.is_dir() and not each.name.startswith("."))
        classes = names if classes is None else classes
        if names != classes or not names:
            odd = ", ".join(sorted(set(names) ^ set(classes))[:5])
            raise DataError(f"{folder / part}: expected a folder for each class, the same in train/ "
                            "and test/" + f"; only one of them has {odd}" * bool(odd))
        try:
            samples = datasets.folder.make_dataset(folder / part, dict(zip(names, range(len(names)))),
                                                   datasets.folder.IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise DataError(f"{folder / part}: {str(error).strip()}") from None
        paths += [path for path, _ in samples]
        labels += [label for _, label in samples]
        counts.append(len(samples))
    firsts = [read_image(paths[labels.index(label)]) for label in range(len(classes))]
    channels = 3 if any(map(_coloured, firsts)) else 1
    if test_only:
        paths, labels, counts[0] = paths[counts[0]:], labels[counts[0]:], 0
    try:
        images = _read_all(paths, (*firsts[0].shape[:2], channels), False, folder)
    except _Unequal:
        if size is None:
            raise
        images = _read_all(paths, (size, size, channels), True, folder)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).split(counts)
    return Dataset(folder.name, f"{folder} (image folder)", classes,
                   *map(_split, images, torch.tensor(labels).split(counts)))


def _npz(path):
    """An .npz of x_train, y_train, x_test, y_test (and `classes`, their names, if it has it)."""
    keys = "x_train", "y_train", "x_test", "y_test"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file}
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise DataError(f"{path}: cannot be read as an .npz of plain arrays ({error})") from None
    if not set(keys) <= set(arrays):
        raise DataError(f"{path}: has {' '.join(arrays) or 'nothing'}; expected {' '.join(keys)}")
    splits, count = [], None
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim == 3:
            x = x[:, None]
        elif x.ndim == 4 and x.shape[-1] in (1, 3):
            x = x.transpose(0, 3, 1, 2)
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3):
            raise DataError(f"{path}: x_{part} is {x.dtype} of shape {arrays[f'x_{part}'].shape}; "
                            "expected uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), 1 or 3 channels")
        if y.dtype.kind not in "iu" or y.size != len(x) or not len(x):
            raise DataError(f"{path}: y_{part} is {y.dtype} of shape {y.shape}; expected a whole "
                            f"number for each of {len(x)} images")
        labels = set(y.ravel().tolist())
        count = count or len(labels)
        if labels - set(range(count)):
            raise DataError(f"{path}: y_{part} has the label {min(labels - set(range(count)))}; expected "
                            f"0 to {count - 1}, each of them in y_train")
        splits.append(_split(x, y.reshape(-1).astype(np.int64)))
    shapes_of = [tuple(split.images.shape[1:]) for split in splits]
    classes = [str(each) for each in arrays.get("classes", range(count))]
    if shapes_of[0] != shapes_of[1] or len(classes) != count:
        raise DataError(f"{path}: x_train and x_test have images of {shapes_of[0]} and {shapes_of[1]}, "
                        f"classes {len(classes)} names; expected one shape and {count} names")
    return Dataset(path.stem, f"{path} (.npz)", classes, *splits)


# ---------------------------------------------------------------- shapes, the built-in set

SHAPES = ["circle", "ring", "square", "triangle", "star", "cross", "crescent", "heart", "arrow",
          "bars"]


def _inside(label, x, y):
    """How far points (any shape of tensors) are outside a shape of about unit size; negative
    inside. Not exact distances, but smooth across the edge."""
    r = torch.hypot(x, y)

    def box(u, v, width, height):
        return torch.maximum(u.abs() - width, v.abs() - height)

    def triangle(u, v, size):  # its tip upwards (v negative)
        return torch.maximum(v - size / 2, 0.866 * u.abs() - 0.5 * v - size / 2)

    if label == 0:
        return r - 0.8
    if label == 1:
        return (r - 0.7).abs() - 0.2
    if label == 2:
        return box(x, y, 0.7, 0.7)
    if label == 3:
        return triangle(x, y, 1.0)
    if label == 4:  # the edge of a five-pointed star, over the angle to the nearest point
        turn = 2 * math.pi / 5
        angle = (torch.remainder(torch.atan2(y, x), turn) - turn / 2).abs()
        return r - (0.45 + 0.55 * (angle / (turn / 2)) ** 2)
    if label == 5:
        return torch.minimum(box(x, y, 0.95, 0.28), box(x, y, 0.28, 0.95))
    if label == 6:
        return torch.maximum(r - 0.9, 0.72 - torch.hypot(x - 0.42, y))
    if label == 7:
        u, v = x * 1.1, -y * 1.1 + 0.15
        return torch.hypot(u, v - 0.75 * u.abs().sqrt()) - 0.8
    if label == 8:
        return torch.minimum(triangle(x * 1.2, (y + 0.35) * 1.2, 0.9), box(x, y - 0.4, 0.2, 0.6))
    return box(x.abs() - 0.5, y, 0.25, 0.9)  # two parallel bars


def shapes(train=10_000, test=2_000, side=32, seed=7):
    """Ten classes of shapes in random colours, places, sizes and turns over textured grounds.

    Drawn here, in about two seconds, and the same at every run. Returns a Dataset.
    """
    g = torch.Generator().manual_seed(seed)
    n = train + test
    labels = torch.arange(n) % 10

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    def texture(colour, strength, cells):
        """Stripes and patches around a colour: (N, 3, side, side)."""
        patches = torch.nn.functional.interpolate(
            uniform(-1, 1, 1, cells, cells), size=(side, side), mode="bilinear")
        angle, wave, phase = uniform(0, math.pi, 1, 1), uniform(2, 9, 1, 1), uniform(0, 7, 1, 1)
        stripes = torch.sin(wave * (x0 * angle.cos() + y0 * angle.sin()) + phase)[:, None]
        tint = uniform(-1, 1, 3, 1, 1)
        return colour[:, :, None, None] + strength * (patches + 0.7 * stripes * tint)

    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    y0, x0 = torch.meshgrid(axis, axis, indexing="ij")
    # A colour for the ground and, at some distance and mostly brighter, one for the shape: with
    # shapes as often darker, v4 stays at chance for six epochs before it starts to learn.
    ground = uniform(0.0, 0.6, 3)
    away = torch.nn.functional.normalize(uniform(-0.3, 1, 3), dim=1) * uniform(0.5, 0.9, 1)
    ground_texture, shape_texture = texture(ground, 0.18, 5), texture(ground + away, 0.1, 3)
    size, turn = uniform(0.55, 0.85, 1, 1), uniform(0, 2 * math.pi, 1, 1)
    dx, dy = x0 - uniform(-0.25, 0.25, 1, 1), y0 - uniform(-0.25, 0.25, 1, 1)
    x = (dx * turn.cos() + dy * turn.sin()) / size
    y = (dy * turn.cos() - dx * turn.sin()) / size
    cover = torch.empty(n, 1, side, side)
    for label in range(10):
        own = labels == label
        # The edge is one pixel wide: inside is measured in units of the shape's size.
        edge = _inside(label, x[own], y[own]) * size[own] * side / 2
        cover[own] = (0.5 - edge).clamp(0, 1)[:, None]
    images = ground_texture + (shape_texture - ground_texture) * cover
    images += 0.02 * torch.randn(images.shape, generator=g)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return Dataset("shapes", "drawn by data.py", list(SHAPES),
                   _split(images[:train], labels[:train]), _split(images[train:], labels[train:]))


# ---------------------------------------------------------------- from sets to sets

def counts(split, classes):
    """Images per class, a list of ints. classes: how many there are."""
    return torch.bincount(split.labels, minlength=classes).tolist()


def _pick(split, rows):
    return Split(split.images[rows], split.labels[rows])


def _drawn(split, count, seed):
    """Rows of `count` images, drawn with the seed, classes in proportion (rounded so that they
    add up; at least one of each class where count allows), in the set's order."""
    n = len(split.labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    # Each image's rank within its class, as a share of that class; the smallest shares win.
    labels = split.labels.cpu()[order]
    share = torch.empty(n, dtype=torch.float64)
    for label in labels.unique():
        own = (labels == label).nonzero().squeeze(1)
        share[own] = torch.arange(len(own), dtype=torch.float64) / len(own)
    return order[share.argsort(stable=True)[:count]].sort().values


def take(split, count, seed):
    """`count` images of a Split, drawn with the seed, classes in proportion. Raises DataError."""
    if count > len(split.labels):
        raise DataError(f"{count:,} images asked for; the set has {len(split.labels):,}")
    return _pick(split, _drawn(split, count, seed))


def hold_out(split, share, seed):
    """(training set, validation set): a share (0 to 1) of the images, drawn with the seed,
    classes in proportion, goes to the second. Raises DataError."""
    n = len(split.labels)
    count = round(share * n)
    if not 0 < count < n:
        raise DataError(f"a share of {share:g} of {n:,} images is {count:,}; expected some, not all")
    held = torch.zeros(n, dtype=torch.bool)
    held[_drawn(split, count, seed)] = True
    return _pick(split, ~held), _pick(split, held)


def choose(dataset, names):
    """The Dataset of the classes of those names alone, renumbered in the set's order.
    Raises DataError."""
    unknown = set(names) - set(dataset.classes)
    if unknown:
        raise DataError(f"no class {sorted(unknown)[0]!r}; {dataset.name} has {' '.join(dataset.classes)}")
    kept = [label for label, name in enumerate(dataset.classes) if name in names]
    number = torch.full((len(dataset.classes),), -1)
    number[kept] = torch.arange(len(kept))
    splits = [Split(split.images[own], number[split.labels[own]])
              for split in (dataset.train, dataset.test)
              for own in [(number[split.labels] >= 0).nonzero().squeeze(1)]]
    return replace(dataset, classes=[dataset.classes[label] for label in kept], train=splits[0],
                   test=splits[1])


def blur(split, sigma):
    """A Split blurred by a Gaussian of sigma pixels (cut at 3 sigma, edges reflected)."""
    side = min(split.images.shape[2:])
    kernel = 2 * min(math.ceil(3 * sigma), side - 1) + 1
    parts = [TF.gaussian_blur(part, [kernel, kernel], [sigma, sigma]) for part in split.images.split(1000)]
    return _split(torch.cat(parts), split.labels)


def resample(split, wanted, seed):
    """A Split with wanted[label] images of each class, drawn with the seed, in the set's order.

    A class that is to grow is repeated whole as often as it fits, then a part of it is drawn.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for label, count in enumerate(wanted):
        own = (split.labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(own), generator=generator)
        rows += [own.repeat(count // len(own)), own[order[:count % len(own)]]]
    return _pick(split, torch.cat(rows).sort().values)


def nearest(queries, references, k, chunk=500):
    """The k nearest references of each query, nearest first, of equal ones the first: (Q, k) int64.

    queries (Q, D), references (R, D), of any type and one device. Euclidean distances by matrix
    products in float32, chunk * R of them at a time; a few more than k of the nearest are then
    measured again in float64 and put in order.
    """
    centre = references.float().mean(0).round()
    references = references.float() - centre  # smaller numbers, smaller rounding errors
    squares, few = references.square().sum(1), min(k + 8, len(references))
    found = []
    for part in queries.split(chunk):
        part = part.float() - centre
        near = torch.addmm(squares, part, references.T, alpha=-2).topk(few, largest=False).indices
        near = near.sort(1).values
        exact = torch.cat([(references[rows].double() - some[:, None].double()).square().sum(2)
                           for some, rows in zip(part.split(50), near.split(50))])
        found.append(near.gather(1, exact.sort(dim=1, stable=True).indices[:, :k]))
    return torch.cat(found)


def smote(split, seed, k=5):
    """Every class grown to the largest one's size by synthetic pictures (SMOTE, Chawla et al.
    2002), each a random point on the line between a picture of the class and one of its k
    nearest neighbours there. The synthetic ones stand after all others. Raises DataError."""
    generator = torch.Generator().manual_seed(seed)
    now = counts(split, int(split.labels.max()) + 1)
    images, labels = [split.images], [split.labels]
    for label, count in enumerate(now):
        missing = max(now) - count
        if not missing:
            continue
        if count < 2:
            raise DataError(f"smote: class {label} has {count} training images; expected two or more")
        own = split.images[split.labels == label]
        rows = own.flatten(1).float() - 127.5
        found = nearest(rows, rows, min(k + 1, count))
        other = found != torch.arange(count)[:, None]  # a picture is not its own neighbour ...
        other[other.all(1), -1] = False                # ... nor found, where others are equal to it
        found = found[other].view(count, -1)
        # Each picture equally often, the remainder drawn, as in the paper.
        turns = [torch.randperm(count, generator=generator) for _ in range(math.ceil(missing / count))]
        base = torch.cat(turns)[:missing]
        partner = found[base, torch.randint(found.shape[1], (missing,), generator=generator)]
        for one, two in zip(base.split(1000), partner.split(1000)):
            gap = torch.rand(len(one), 1, generator=generator)
            between = rows[one].lerp(rows[two], gap) + 127.5
            images.append(between.round().to(torch.uint8).view(-1, *own.shape[1:]))
        labels.append(torch.full((missing,), label))
    return _split(torch.cat(images), torch.cat(labels))


VARIANTS = ("complete", "constrained", "undersampled", "oversampled", "smote")
CONSTRAINED = {"bird": 0.5, "deer": 0.5, "truck": 0.5}  # the CIFAR study's


def vary(split, classes, variant, shares, seed):
    """A training set made unequal and, if asked for, equal again, drawn with the seed.

    shares: {class name: the share of its images that is kept}; None is the CIFAR study's where
    its classes are there, else the set as it is. "constrained" stops there, "undersampled" cuts
    every class to the smallest one, "oversampled" repeats images up to the largest one, "smote"
    adds synthetic ones. Returns the Split and how many of its images, the last ones, are
    synthetic. Raises DataError.
    """
    if variant == "complete":
        return split, 0
    if shares is None:
        shares = CONSTRAINED if set(CONSTRAINED) <= set(classes) else {}
    unknown = set(shares) - set(classes)
    if unknown:
        raise DataError(f"no class {sorted(unknown)[0]!r}; there are {' '.join(classes)}")
    before = counts(split, len(classes))
    wanted = [round(count * shares.get(name, 1)) for name, count in zip(classes, before)]
    if 0 in wanted:
        raise DataError(f"class {classes[wanted.index(0)]!r} is left with no training image")
    if not shares and (variant == "constrained" or len(set(before)) == 1):
        raise DataError(f"there is nothing to make of {before[0]:,} images of each class; name the "
                        f"shares to keep, such as --constrain {classes[0]}=0.5")
    split = resample(split, wanted, seed)
    if variant == "smote":
        return smote(split, seed), max(wanted) * len(wanted) - sum(wanted)
    level = {"undersampled": min, "oversampled": max}.get(variant)
    return resample(split, [level(wanted)] * len(wanted), seed + 1) if level else split, 0


# ---------------------------------------------------------------- batches

# Mean and std by which pixels of 0-1 are normalised; for one channel the means of the three.
# "imagenet" is the CIFAR study's, the others are what the remaining studies have.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALES = {"imagenet": (MEAN, STD), "-1..1": ((0.5,) * 3, (0.5,) * 3), "0..1": ((0.0,) * 3, (1.0,) * 3)}


@functools.lru_cache
def _mean_std(channels, pixels, device, scale):
    """Mean and std of each value of a whole image whose channels lie innermost, (H * W * C,).

    Three channels against (3, 1, 1) would be a slow pattern for a CPU.
    """
    mean, std = torch.tensor(SCALES[scale], device=device)
    if channels == 1:
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    return mean.repeat(pixels), std.repeat(pixels)


@functools.lru_cache
def _shift_scale(*arguments):
    """What takes pixels of 0-255 to normalised ones: shift + scale * pixel."""
    mean, std = _mean_std(*arguments)
    return -mean / std, 1 / (255 * std)


def _affine(images, shift_scale, scale):
    """shift + scale * images, (B, C, H, W) float32, in channels_last memory."""
    b, c, h, w = images.shape
    shift, factor = shift_scale(c, h * w, images.device, scale)
    rows = images.permute(0, 2, 3, 1).flatten(1).float()  # (B, H * W * C)
    return torch.addcmul(shift, rows, factor).view(b, h, w, c).permute(0, 3, 1, 2)


def normalise(images, size=None, margin=False, offsets=None, scale="imagenet"):
    """Images (B, C, H, W) of 0-255 as the network sees them: float32, minus mean, over std.

    size: bring them to size x size first: shorter side scaled (bilinear), then cropped. margin:
    scale to 8/7 of size before the crop, as ImageNet's 256 and 224. offsets: (B, 2), from 0 (top,
    left) to 1, where each image's crop lies; the centre where None. scale: a name of SCALES.
    """
    if size is not None and (margin or tuple(images.shape[2:]) != (size, size)):
        images = TF.resize(images, [size * 8 // 7 if margin else size], antialias=True)
        if offsets is None:
            images = TF.center_crop(images, [size, size])
        else:
            room = torch.tensor(images.shape[2:], device=images.device) - size + 1
            # (B, 2, size): the rows and the columns of each crop
            first = (offsets * room).long()[:, :, None] + torch.arange(size, device=images.device)
            picture = torch.arange(len(images), device=images.device)[:, None, None]
            pixels = images.permute(0, 2, 3, 1)[picture, first[:, 0, :, None], first[:, 1, None, :]]
            images = pixels.permute(0, 3, 1, 2)
    return _affine(images, _shift_scale, scale)


def rotate(images, angles):
    """Images (B, C, H, W) of any float type, each turned by its angle (B,) in degrees, counter-
    clockwise, about its centre; bilinear, black outside."""
    b, c, h, w = images.shape
    turn = torch.deg2rad(angles)
    cos, sin, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    theta = torch.stack([cos, -sin * h / w, zero, sin * w / h, cos, zero], 1).view(b, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, (b, c, h, w), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


def add_noise(images, std, generator, scale="imagenet"):
    """Normalised images (B, C, H, W) with Gaussian noise, std in pixels of 0-1, on their device.
    generator: a torch.Generator of that device."""
    b, c, h, w = images.shape
    noise = torch.randn(b, h * w * c, generator=generator, device=images.device)
    noise *= std / _mean_std(c, h * w, images.device, scale)[1]
    return images + noise.view(b, h, w, c).permute(0, 3, 1, 2)


def to_pixels(normalised, scale="imagenet"):
    """The way back: normalised (B, C, H, W) of any float type to pixels of 0-1, clamped."""
    return _affine(normalised, _mean_std, scale).clamp_(0, 1)


def batches(split, batch_size, epoch_seed=None, flip=False, size=None, margin=False, scale="imagenet",
            degrees=0.0, part=(0, 1)):
    """A split's batches, (images, labels) as `normalise` makes them, on the split's device.

    epoch_seed: an int shuffles, always in the same order for the same seed; None keeps the
    set's order. flip: turn each image left to right with probability 1/2; degrees: rotate it by
    up to so many, either way; margin: crop it anywhere, with epoch_seed None in the centre (all
    drawn from the same seed). The last batch may be smaller. part: (rank, processes): every
    batch's share of that process; one image, for company, where the batch has none for it.
    """
    n, device, (rank, processes) = len(split.labels), split.images.device, part
    generator = torch.Generator().manual_seed(0 if epoch_seed is None else epoch_seed)
    order = torch.arange(n) if epoch_seed is None else torch.randperm(n, generator=generator)
    flipped = (torch.rand(n, generator=generator) < 0.5).to(device)
    offsets = torch.rand(n, 2, generator=generator).to(device) if margin and epoch_seed is not None else None
    angles = degrees * (2 * torch.rand(n, generator=generator).to(device) - 1) if degrees else None
    order = order.to(device)
    pixels = split.images.permute(0, 2, 3, 1)  # (N, H, W, C), contiguous: an image is a row
    for start in range(0, n, batch_size):
        stop = min(start + batch_size, n)
        own = slice(start + rank, stop, processes) if start + rank < stop else slice(start, start + 1)
        rows = order[own]
        images = pixels.index_select(0, rows).permute(0, 3, 1, 2)
        if flip:
            turned = flipped[own, None, None, None]
            images = images.flip(3) * turned + images * ~turned  # torch.where takes twice the time
        if degrees:
            images = rotate(images.float(), angles[own])
        yield (normalise(images, size, margin, None if offsets is None else offsets[own], scale),
               split.labels.index_select(0, rows))


# ---------------------------------------------------------------- python data.py

def main(argv):
    parser = argparse.ArgumentParser(description="Prints a data set's classes and counts and "
                                     "saves a sheet of samples.")
    parser.add_argument("--dataset", help=f"{' '.join(NAMES)} shapes, a folder or an .npz; "
                        "default: cifar10, or shapes where it cannot be had")
    parser.add_argument("--data-dir", default="data", help="where named sets lie (default: data)")
    parser.add_argument("--size", type=int, help="scale and crop a folder of unequal images")
    parser.add_argument("--output", default="outputs", help="where the sheet goes")
    def stop(message):
        print(f"data.py: error: {message}", file=sys.stderr)
        sys.exit(2)

    parser.error = stop
    args = parser.parse_args(argv)
    if args.size is not None and not 1 <= args.size <= 1024:
        stop(f"--size {args.size}: expected 1 to 1024 pixels")
    path = Path(args.output)
    try:
        dataset = load(args.dataset, args.data_dir, args.size)
        path.mkdir(parents=True, exist_ok=True)
    except DataError as error:
        stop(error)
    except OSError as error:
        stop(f"--output {path}: expected a folder to write to ({error.strerror})")
    shape = "x".join(map(str, dataset.train.images.shape[1:]))
    print(f"{dataset.name}: {dataset.source}, {len(dataset.classes)} classes, images {shape}")
    print(f"{'class':<24}{'train':>8}{'test':>8}")
    both = [counts(part, len(dataset.classes)) for part in (dataset.train, dataset.test)]
    for name, train, test in zip(dataset.classes, *both):
        print(f"{name:<24}{train:>8,}{test:>8,}")
    print(f"{'total':<24}{sum(both[0]):>8,}{sum(both[1]):>8,}")

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows, (_, height, _) = dataset.classes[:20], dataset.train.images.shape[1:]
    images = []
    for label in range(len(rows)):
        own = dataset.train.images[dataset.train.labels == label][:10]
        images += [*own, *[torch.full_like(own[0], 255)] * (10 - len(own))]
    grid = make_grid(images, nrow=10, padding=2, pad_value=255)
    figure, axis = plt.subplots(figsize=(8, 0.4 + 7 * grid.shape[1] / grid.shape[2]))
    axis.imshow(grid.permute(1, 2, 0).numpy())
    axis.set_title(f"{dataset.name}: ten training images of each class")
    axis.set_xticks([])
    axis.set_yticks([(height + 2) * (row + 0.5) for row in range(len(rows))], rows)
    axis.spines[:].set_visible(False)
    path /= f"{dataset.name}_samples.png"
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
