"""Image data sets held whole in memory as uint8, and their batches made on the device.

    dataset = load("cifar10")                 # or a folder, an .npz, "shapes", ...
    for images, labels in batches(dataset.train, 32, epoch_seed=0, flip=True):
        ...                                   # images (B, C, H, W) float32, normalised

This file needs torch, torchvision (with Pillow) and numpy.
"""
import contextlib
import hashlib
import itertools
import math
import multiprocessing
import os
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class DataError(ValueError):
    """A data set that is unavailable or unusable: one line with the file or value and the way out."""


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
    val: Split | None = None       # held out from the training set
    labelled: Split | None = None  # the part of train whose labels are used; None: all of it
    named: bool = True             # False: the set has no class names of its own
    files: list | None = None      # each test image's file, relative to the set's folder, or its number

    def map(self, change):
        """The Dataset with change(split) in place of each of its splits."""
        splits = {name: each for name, each in vars(self).items() if isinstance(each, Split)}
        return replace(self, **{name: change(split) for name, split in splits.items()})

    def to(self, device):
        """The Dataset on a device."""
        return self.map(lambda split: Split(split.images.to(device), split.labels.to(device)))


# What torchvision reads and downloads: (class, its files, training arguments, test arguments).
NAMES = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py/*", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", "cifar-100-python/*", {"train": True}, {"train": False}),
    "svhn": ("SVHN", "*_32x32.mat", {"split": "train"}, {"split": "test"}),
    "mnist": ("MNIST", "MNIST/raw/*", {"train": True}, {"train": False}),
    "fashionmnist": ("FashionMNIST", "FashionMNIST/raw/*", {"train": True}, {"train": False}),
}
NEVER_FLIPPED = {"svhn", "mnist"}  # a mirrored digit is not a digit


def load(dataset=None, data_dir="data", *, size=None, classes=None, train_size=None, test_size=None,
         val_share=0.0, labels=None, variant="complete", constrain=None, blur=0.0, seed=0):
    """A Dataset on the CPU.

    dataset: a name of NAMES or "shapes"; a folder of pictures in train/<class>/* and test/<class>/* (and
    val/<class>/*), in <class>/* or in itself; an .npz of x_train, y_train, x_test, y_test. None is CIFAR-10
    or, where that is unavailable, `shapes`. size: to this side a folder's pictures are scaled and cropped as
    they are read, if they are of unequal sizes or have more pixels; others are scaled by `batches`. In a
    folder without test/, a picture is a test image if a checksum of its name falls into the lowest fifth:
    neither the seed nor another file nor another place of the folder can move it.

    Then, in this order, all draws with the seed: `choose` classes, `take` train_size and test_size images,
    hold out val_share of the training images, `vary` them by variant and constrain, `take` the labels of some
    as .labelled, `blurred` by blur. Raises DataError, which names the argument.
    """
    name = "cifar10" if dataset is None else str(dataset)
    if name in NAMES:
        dataset = _read_named(name, Path(data_dir), size, dataset is None)
    elif name == "shapes":
        dataset = shapes()
    elif os.path.isdir(name):
        dataset = _read_folder(Path(name), size)
    elif name.endswith(".npz"):
        dataset = _read_npz(Path(name))
    else:
        raise DataError(f"no data set {name!r}; expected one of {' '.join(NAMES)} shapes, a folder of "
                        f"pictures ({LAYOUTS}), or an .npz file")
    dataset.files = dataset.files or list(range(len(dataset.test.labels)))
    blocks = [block for split in (dataset.train, dataset.test) for block in split.images.split(1000)]
    if not any((block > 25).any() for block in blocks):
        raise DataError(f"{dataset.source}: no pixel of the whole set exceeds 25 of 255; expected values "
                        "that use their range: multiply them, 0 and 1 of 8 bits by 255, 12 bits of 16 by 16")
    if classes:
        dataset = choose(dataset, classes.split(",") if isinstance(classes, str) else classes)
    if train_size is not None:
        dataset.train = take(dataset.train, train_size, seed, "train_size")
    if test_size is not None:
        rows = _drawn(dataset.test, test_size, seed, "test_size")
        dataset.test, dataset.files = _pick(dataset.test, rows), list(itertools.compress(dataset.files, rows))
    if val_share:
        if dataset.val is not None:
            raise DataError(f"val_share {val_share:g}: {dataset.source} has a val/ of its own; leave one out")
        train, count = dataset.train, round(val_share * len(dataset.train.labels))
        held = _drawn(train, count, seed, f"val_share {val_share:g}: count")
        dataset.train, dataset.val = _pick(train, ~held), _pick(train, held)
        if len(dataset.train.labels.unique()) < len(train.labels.unique()):
            raise DataError(f"val_share {val_share:g}: leaves a class without training images; expected less")
    if variant != "complete" or constrain:
        dataset.train = vary(dataset.train, dataset.classes, variant, constrain, seed)
    if labels is not None:
        dataset.labelled = take(dataset.train, labels, seed, "labels")
    return dataset.map(lambda split: Split(blurred(split.images, blur), split.labels)) if blur else dataset


def digest(dataset):
    """A hash of a Dataset's images and labels, 16 hexadecimal digits; of `shapes`, whose last bits depend on
    the processor, of the labels alone."""
    result = hashlib.sha256()
    for split in filter(None, (dataset.train, dataset.test, dataset.val, dataset.labelled)):
        result.update(split.labels.cpu().numpy())
        if dataset.source != DRAWN:  # channels last, as they lie in memory: no copy
            result.update(split.images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    return result.hexdigest()[:16]


# ---------------------------------------------------------------- reading

def _split(images, labels):
    """A Split of images (N, H, W), (N, H, W, C) or (N, C, H, W) and labels, tensors or arrays."""
    images = torch.as_tensor(images)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    return Split(images.contiguous(memory_format=torch.channels_last), torch.as_tensor(labels).long())


def _read_named(name, root, size, replaceable):
    """A set of NAMES as torchvision keeps it below root, else the folder of pictures there, else downloaded;
    where that fails and it is replaceable, `shapes`."""
    kind, files, *arguments = NAMES[name]
    present = any(root.glob(files))
    if not present and (root / name / "train").is_dir():
        return _read_folder(root / name, size)
    from torchvision import datasets
    try:
        sets = [getattr(datasets, kind)(root, download=not present, **each) for each in arguments]
    except Exception as error:  # of the network or of a damaged file, whatever torchvision meets first
        reason = (f"{name} cannot be read from {root / files} or {root / name}/train, nor downloaded "
                  f"({' '.join(str(error).split())[:80]}); delete damaged files to download them again, or "
                  "use another data_dir, or shapes, which needs no files")
        if present or not replaceable:
            raise DataError(reason) from None
        print(f"{'!' * 78}\nWARNING: {reason}\nWARNING: using the built-in set 'shapes' instead; its results "
              f"say nothing about CIFAR-10.\n{'!' * 78}", file=sys.stderr)
        return shapes()
    splits = [_split(each.data, each.labels if name == "svhn" else each.targets) for each in sets]
    classes = getattr(sets[0], "classes", "0123456789")  # MNIST's: "0 - zero"
    return Dataset(name, f"{root} (torchvision)", [each.split(" - ")[0] for each in classes], *splits)


def _read_npz(path):
    """An .npz of x_train, y_train, x_test, y_test, and `classes`, their names, if it has it."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in (*keys, *{"classes"}.intersection(file))}
    except Exception as error:  # no such key; zipfile, zlib and numpy each have their own
        raise DataError(f"{path}: expected an .npz of plain arrays {' '.join(keys)} ({error})") from None
    splits, count = [], len(np.unique(arrays["y_train"]))
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"].ravel()
        if x.dtype.kind == "f" and x.size and x.min() >= 0 and x.max() <= 1:
            x = (255 * x).round().astype(np.uint8)
        fits = x.dtype == np.uint8 and x.ndim in (3, 4) and y.dtype.kind in "iu" and len(x) == len(y) > 0
        if not fits or y.min() < 0 or y.max() >= count:
            raise DataError(f"{path}: x_{part} is {x.dtype} {x.shape}, y_{part} {y.dtype} {y.shape} of "
                            f"{np.unique(y)[:9]}; expected images (N, H, W), (N, H, W, C) or (N, C, H, "
                            f"W), uint8 or floats of 0 to 1, and N whole numbers of 0 to {count - 1}, as "
                            f"y_train has {count} different ones")
        splits.append(_split(x, y))
    train, test = (tuple(split.images.shape[1:]) for split in splits)
    classes = list(map(str, arrays.get("classes", np.arange(count))))
    if train != test or train[0] not in (1, 3) or len(classes) != count:
        raise DataError(f"{path}: has images of {train} and {test} and {len(classes)} classes; expected one "
                        f"shape, of 1 or 3 channels, and {count} classes")
    return Dataset(path.stem, f"{path} (.npz)", classes, *splits, named="classes" in arrays)


LAYOUTS = "train/<class>/* and test/<class>/*, <class>/*, or the folder itself"
HIDDEN = (".", "__", "@eaDir")  # so begin the names of hidden and system files and folders
ENDINGS = set(".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pgm .png .ppm .tga .tif .tiff .webp".split())
CACHE_FROM = 1000  # from this many pictures on, the decoded ones are kept in the folder


def _read_folder(folder, size):
    """The Dataset of a folder of pictures, as `load` says."""
    listed = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        above = Path(place).relative_to(folder).parts
        listed += ["/".join((*above, name)) for name in sorted(names) if not name.startswith(HIDDEN)]
    pictures = [file for file in listed if os.path.splitext(file)[1].lower() in ENDINGS]
    tops = {file.split("/")[0] for file in pictures if "/" in file}
    parts = {top: top.lower() for top in tops if top.lower() in ("train", "test", "val")}
    depth, rows = max((file.count("/") for file in pictures), default=0), []  # rows: (part, class, file)
    # Else each folder is a class, also one called train that has pictures alone.
    parts = parts if "train" in parts.values() and (depth > 1 or len(parts) == len(tops)) else {}
    unclear = not parts and {top[:4].lower() for top in tops} >= {"trai", "test"}
    for file in pictures:
        *above, _ = file.split("/")
        if unclear or len(above) > 1 + bool(parts) or parts and above and above[0] not in parts:
            raise DataError(f"{(folder / file).parent}: pictures are not read from here; expected {LAYOUTS}; "
                            "rename the parts to train and test, or load the folder that holds them")
        if len(above) == depth:
            share = zlib.crc32(os.fsencode(file)) / 2**32
            part = parts[above.pop(0)] if parts else "test" if share < 0.2 else "train"
            rows.append((part, above[0] if above else folder.absolute().name, file))
    left = set(listed) - {file for _, _, file in rows}
    if left:
        print(f"{folder}: files left out: {len(left):,}, such as {min(left)}; pictures are read from "
              f"{LAYOUTS}", file=sys.stderr)
    lacking = {"test", *parts.values()} - {part for part, _, _ in rows}
    if lacking:
        raise DataError(f"{folder}: has no {min(lacking)} pictures; expected {LAYOUTS}, and more pictures")
    classes = sorted({name for part, name, _ in rows if part == "train"})
    number = {name: label for label, name in enumerate(classes)}
    lost = [file for _, name, file in rows if name not in number]
    if lost:
        raise DataError(f"{folder / lost[0]}: of no training class; expected one of {','.join(classes)}")
    images, splits = _read_pictures(folder, [file for _, _, file in rows], size), {}
    for part in {"train", *(row[0] for row in rows)}:
        chosen = [i for i, row in enumerate(rows) if row[0] == part]
        splits[part] = _split(images[chosen], [number[rows[i][1]] for i in chosen])
    return Dataset(folder.absolute().name, f"{folder} (image folder)", classes, **splits,
                   files=[file for part, _, file in rows if part == "test"])


def _read_pictures(folder, files, size):
    """The pictures of a folder, (N, H, W, C) uint8; C is 1 if all are grey. Decoded or, if no file's name,
    size or time has changed since they were decoded to this size, as they were kept. Raises DataError."""
    stamp = hashlib.sha256(f"{size}\0".encode())
    cache, new = folder / ".cache.npz", folder / f".cache.{os.getpid()}.npz"
    for file in files:
        status = os.stat(f"{folder}/{file}")
        stamp.update(os.fsencode(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    with contextlib.suppress(Exception), np.load(cache) as kept:  # not there or damaged: whatever NumPy meets
        if kept["stamp"] == stamp.hexdigest():
            return kept["images"]
    paths = [f"{folder}/{file}" for file in files]
    if len(paths) < CACHE_FROM or sys.platform != "linux":
        pictures = list(map(_pixels, paths, itertools.repeat(size)))
    else:
        print(f"reading {len(paths):,} pictures", file=sys.stderr)
        # Not threads: Pillow decodes small pictures under Python's lock. Nor processes that are not forked:
        # they run a user's script again that has no `if __name__ == "__main__"`.
        with ProcessPoolExecutor(torch.get_num_threads(), multiprocessing.get_context("fork")) as pool:
            pictures = list(pool.map(_pixels, paths, itertools.repeat(size), chunksize=250))
    damaged = [picture for picture in pictures if isinstance(picture, str)]
    if damaged:
        raise DataError(f"{len(damaged):,} of {len(paths):,} pictures cannot be read; mend or delete them: "
                        + "; ".join(damaged[:5] + ["..."] * (len(damaged) > 5)))
    unequal = [path for path, picture in zip(paths, pictures) if picture.shape != pictures[0].shape]
    if unequal and size is None:
        raise DataError(f"{unequal[0]}: is not of the size of {paths[0]}; expected equal sizes, or a size to "
                        "which all are scaled and cropped, such as size=32 (--size 32)")
    images = np.stack([_fit(picture, size, size) for picture in pictures] if unequal else pictures)
    if all((image == image[..., :1]).all() for image in images):
        images = images[..., :1].copy()
    if len(paths) >= CACHE_FROM:
        with contextlib.suppress(OSError):  # no right or no room to write
            np.savez(new, stamp=stamp.hexdigest(), images=images)
            os.replace(new, cache)
        new.unlink(missing_ok=True)
    return images


def _pixels(path, size=None):
    """A picture file as (H, W, 3) uint8, turned as its EXIF says, transparency onto white, fitted to size if
    it has more pixels; or, where it cannot be read, a line that says why."""
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # more than 8 bits
                wide = np.asarray(image)
                if image.mode == "F" or wide.min() < 0 or wide.max() > 65535:
                    return f"{path}: has pixels of 32 bits; expected 8 or 16"
                image = Image.fromarray((wide // 256).astype(np.uint8))
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # of a damaged file, whatever Pillow meets first
        return f"{path}: {getattr(error, 'strerror', None) or error}"
    return _fit(pixels, size, size) if size is not None and pixels[..., 0].size > size * size else pixels


def _fit(pixels, height, width):
    """Pixels (H, W, 3) scaled, then cropped about the centre."""
    from PIL import Image, ImageOps
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (width, height), Image.Resampling.BILINEAR))


def read_picture(path, channels=3, fit=None, blur=0.0):
    """A picture file as `load` makes a test image of it, before `normalise`: (1, C, H, W) uint8. channels,
    fit: channels and (H, W) of the data set's images, to which another one is scaled and centre-cropped.
    blur: as for `load`. Raises DataError."""
    from PIL import Image
    pixels = _pixels(path)
    if isinstance(pixels, str):
        raise DataError(pixels)
    pixels = pixels if fit is None else _fit(pixels, *fit)
    if channels == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    images = torch.tensor(pixels).permute(2, 0, 1)[None]
    return blurred(images, blur) if blur else images


# ---------------------------------------------------------------- shapes, the built-in set
# How far points (x, y), tensors of any one shape, are outside a shape of about unit size; negative
# inside. Not exact distances, but smooth across the edge.

def _box(x, y, width, height):
    return torch.maximum(x.abs() - width, y.abs() - height)


def _triangle(x, y, size):  # its tip upwards (y negative)
    return torch.maximum(y - size / 2, 0.866 * x.abs() - 0.5 * y - size / 2)


OUTSIDE = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.8,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.2,
    "square": lambda x, y: _box(x, y, 0.7, 0.7),
    "triangle": lambda x, y: _triangle(x, y, 1.0),
    "star": lambda x, y: torch.hypot(x, y) - (  # five points; its edge over the angle to the nearest one
        0.45 + 0.55 * ((torch.atan2(y, x).remainder(2 * math.pi / 5) - math.pi / 5) / (math.pi / 5)) ** 2),
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.95, 0.28), _box(x, y, 0.28, 0.95)),
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.9, 0.72 - torch.hypot(x - 0.42, y)),
    "heart": lambda x, y: torch.hypot(x * 1.1, 0.15 - y * 1.1 - 0.75 * (x * 1.1).abs().sqrt()) - 0.8,
    "arrow": lambda x, y: torch.minimum(_triangle(x * 1.2, (y + 0.35) * 1.2, 0.9),
                                        _box(x, y - 0.4, 0.2, 0.6)),
    "bars": lambda x, y: _box(x.abs() - 0.5, y, 0.25, 0.9),  # two, upright
}
SHAPES, DRAWN = list(OUTSIDE), "drawn by data.py"


def shapes(train=10_000, test=2_000, side=32, seed=7):
    """Ten classes of shapes in random colours, places, sizes and turns on textured backgrounds.

    The same at every run. train, test: numbers of images; seed: of the drawing. Returns a Dataset of images
    (N, 3, side, side), labels 0 to 9 in turn. Takes about two seconds."""
    g, n = torch.Generator().manual_seed(seed), train + test
    labels = torch.arange(n) % 10

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    def texture(colour, strength, cells):
        """Stripes and patches around a colour: (N, 3, side, side)."""
        patches = F.interpolate(uniform(-1, 1, 1, cells, cells), size=(side, side), mode="bilinear")
        angle, wave, phase = uniform(0, math.pi, 1, 1), uniform(2, 9, 1, 1), uniform(0, 7, 1, 1)
        stripes = torch.sin(wave * (x0 * angle.cos() + y0 * angle.sin()) + phase)[:, None]
        return colour[:, :, None, None] + strength * (patches + 0.7 * stripes * uniform(-1, 1, 3, 1, 1))

    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    y0, x0 = torch.meshgrid(axis, axis, indexing="ij")
    # A colour for the background and, at some distance and mostly brighter, one for the shape: with
    # shapes as often darker, v4 stays at chance for six epochs before it starts to learn.
    background = uniform(0.0, 0.6, 3)
    difference = F.normalize(uniform(-0.3, 1, 3), dim=1) * uniform(0.5, 0.9, 1)
    below, above = texture(background, 0.18, 5), texture(background + difference, 0.1, 3)
    size, turn = uniform(0.55, 0.85, 1, 1), uniform(0, 2 * math.pi, 1, 1)
    dx, dy = x0 - uniform(-0.25, 0.25, 1, 1), y0 - uniform(-0.25, 0.25, 1, 1)
    x = (dx * turn.cos() + dy * turn.sin()) / size
    y = (dy * turn.cos() - dx * turn.sin()) / size
    cover = torch.empty(n, 1, side, side)
    for label, outside in enumerate(OUTSIDE.values()):
        rows = labels == label  # the edge is one pixel wide: distances are in units of the shape's size
        cover[rows] = (0.5 - outside(x[rows], y[rows]) * size[rows] * side / 2).clamp(0, 1)[:, None]
    images = below + (above - below) * cover + 0.02 * torch.randn(n, 3, side, side, generator=g)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return Dataset("shapes", DRAWN, list(SHAPES), *map(_split, images.split([train, test]),
                                                       labels.split([train, test])))


# ---------------------------------------------------------------- from sets to sets

def counts(split, classes):
    """Images per class, a list of ints. classes: how many there are."""
    return torch.bincount(split.labels, minlength=classes).tolist()


def _pick(split, rows):
    return Split(split.images[rows], split.labels[rows])


def _drawn(split, count, seed, name):
    """A mask (N,) of `count` images, drawn with the seed, classes in proportion: rounded so that they add up,
    at least one of each class where count allows. name: of the count, for the DataError."""
    n = len(split.labels)
    if not 0 < count <= n:
        raise DataError(f"{name} {count:,}: expected 1 to {n:,}, the images that there are")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    # Each image's rank within its class, as a share of that class; the smallest shares win.
    labels, share = split.labels[order], torch.empty(n, dtype=torch.float64)
    for label in labels.unique():
        in_class = (labels == label).nonzero().squeeze(1)
        share[in_class] = torch.arange(len(in_class), dtype=torch.float64) / len(in_class)
    return torch.zeros(n, dtype=torch.bool).index_fill_(0, order[share.argsort(stable=True)[:count]], True)


def take(split, count, seed, name="count"):
    """`count` images of a Split, in its order, as `_drawn` draws them. Raises DataError."""
    return _pick(split, _drawn(split, count, seed, name))


def choose(dataset, names):
    """The Dataset of the classes of those names alone, renumbered in the set's order. Raises DataError."""
    kept = torch.tensor([label for label, name in enumerate(dataset.classes) if name in names])
    rows = torch.isin(dataset.test.labels, kept)
    if len(kept) < len(names) or not rows.any():
        raise DataError(f"classes {','.join(names)}: expected, each once, classes of {dataset.name} with "
                        f"test images: {','.join(dataset.classes)}")

    def change(split):
        images, labels = _pick(split, torch.isin(split.labels, kept))
        return Split(images, torch.searchsorted(kept, labels))
    return replace(dataset.map(change), classes=[dataset.classes[label] for label in kept],
                   files=dataset.files and list(itertools.compress(dataset.files, rows)))


def blurred(images, sigma):
    """Images (N, C, H, W) uint8 blurred by a Gaussian of sigma pixels (cut at 3 sigma, edges reflected)."""
    from torchvision.transforms.v2 import functional as TF
    kernel = 2 * min(math.ceil(3 * sigma), min(images.shape[2:]) - 1) + 1
    blocks = [TF.gaussian_blur(block, [kernel] * 2, [sigma] * 2) for block in images.split(1000)]
    return torch.cat(blocks).contiguous(memory_format=torch.channels_last)


def resample(split, wanted, seed):
    """A Split with wanted[label] images of each class, drawn with the seed, in the set's order. A class that
    is to grow is repeated whole as often as it fits, then a part of it is drawn."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for label, count in enumerate(wanted):
        in_class = (split.labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(in_class), generator=generator)
        rows += [in_class.repeat(count // len(in_class)), in_class[order[:count % len(in_class)]]]
    return _pick(split, torch.cat(rows).sort().values)


def nearest(queries, references, k, chunk=500):
    """The k nearest references of each query, nearest first, of equally near ones the first: (Q, k) int64.

    queries (Q, D), references (R, D), of any type and one device. Euclidean distances by matrix products in
    float32, chunk * R at a time; a few more than k of the nearest are then measured again in float64.
    """
    centre = references.float().mean(0).round()
    references = references.float() - centre  # smaller numbers, smaller rounding errors
    squares, count, result = references.square().sum(1), min(k + 8, len(references)), []
    for block in queries.split(chunk):
        block = block.float() - centre
        rows = torch.addmm(squares, block, references.T, alpha=-2).topk(count, largest=False).indices
        rows = rows.sort(1).values
        exact = torch.cat([(references[candidates].double() - points[:, None].double()).square().sum(2)
                           for points, candidates in zip(block.split(50), rows.split(50))])
        result.append(rows.gather(1, exact.sort(dim=1, stable=True).indices[:, :k]))
    return torch.cat(result)


def smote(split, seed, k=5):
    """Every class grown to the largest one's size by synthetic pictures (SMOTE, Chawla et al. 2002), each a
    random point on the line between a picture of the class and one of its k nearest neighbours there. The
    synthetic ones stand after all others."""
    generator = torch.Generator().manual_seed(seed)
    before, images, labels = counts(split, 0), [split.images], [split.labels]
    for label, count in enumerate(before):
        missing = max(before) - count
        if not missing:
            continue
        in_class = split.images[split.labels == label]
        pixels = in_class.flatten(1).float() - 127.5
        # The nearest is the picture itself, or one equal to it. A class of one picture has no other.
        neighbours = nearest(pixels, pixels, min(k + 1, count))[:, min(1, count - 1):]
        # Each picture equally often, the remainder drawn, as in the paper.
        turns = [torch.randperm(count, generator=generator) for _ in range(math.ceil(missing / count))]
        base = torch.cat(turns)[:missing]
        partner = neighbours[base, torch.randint(neighbours.shape[1], (missing,), generator=generator)]
        gap = torch.rand(missing, 1, generator=generator)
        between = pixels[base].lerp(pixels[partner], gap) + 127.5
        images.append(between.round().to(torch.uint8).view(-1, *in_class.shape[1:]))
        labels.append(torch.full((missing,), label))
    return Split(torch.cat(images).contiguous(memory_format=torch.channels_last), torch.cat(labels))


VARIANTS = ("complete", "constrained", "undersampled", "oversampled", "smote")
CONSTRAINED = {"bird": 0.5, "deer": 0.5, "truck": 0.5}  # the CIFAR study's


def vary(split, classes, variant, shares, seed):
    """A training set made unequal and, if asked for, equal again, drawn with the seed. Raises DataError.

    shares: {class name: the share of its images that is kept}; None is the CIFAR study's where its classes
    are there, else the set as it is. "constrained" stops there, "undersampled" cuts every class to the
    smallest one, "oversampled" repeats images up to the largest one, "smote" adds synthetic ones.
    """
    if variant not in VARIANTS[1:]:
        raise DataError(f"variant {variant}: one of {' '.join(VARIANTS)}, with constrain not complete")
    if shares is None:  # a further variant that keeps no shares has its branch before this line
        shares = CONSTRAINED if set(CONSTRAINED) <= set(classes) else {}
    before = counts(split, len(classes))
    wanted = [round(count * shares.get(name, 1)) for name, count in zip(classes, before)]
    if not set(shares) <= set(classes) or not all(0 < each <= count for each, count in zip(wanted, before)):
        raise DataError(f"variant {variant}, constrain {shares}: expected classes of {','.join(classes)} and "
                        "shares above 0, at most 1, that leave images of each class")
    if not shares and (variant == "constrained" or len(set(before)) == 1):
        raise DataError(f"variant {variant}: changes nothing; expected constrain, such as {classes[0]}=0.5")
    split = resample(split, wanted, seed)
    if variant == "smote":
        return smote(split, seed)
    level = {"undersampled": min, "oversampled": max}.get(variant)
    return resample(split, [level(wanted)] * len(wanted), seed + 1) if level else split


# ---------------------------------------------------------------- batches

# Mean and std by which pixels of 0-1 are normalised; for one channel the means of the three.
# "imagenet" is the CIFAR study's, the others are what the remaining studies have.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALES = {"imagenet": (MEAN, STD), "-1..1": ((0.5,) * 3, (0.5,) * 3), "0..1": ((0.0,) * 3, (1.0,) * 3)}


def _mean_std(channels, pixels, device, scale):
    """Mean and std of each value of an image whose channels lie innermost, (pixels * C,): three channels
    against (3, 1, 1) would be a slow pattern for a CPU. Filled on the device: a copy would wait for it."""
    for values in SCALES[scale]:
        row = torch.cat([torch.full((1,), value, device=device) for value in values])
        yield (row.mean(0, keepdim=True) if channels == 1 else row).repeat(pixels)


def _affine(images, shift, factor):
    """shift + factor * images, (B, C, H, W) float32, in channels_last memory. shift, factor: (H * W * C,)."""
    b, c, h, w = images.shape
    rows = images.permute(0, 2, 3, 1).flatten(1).float()  # (B, H * W * C)
    return torch.addcmul(shift, rows, factor).view(b, h, w, c).permute(0, 3, 1, 2)


def normalise(images, size=None, margin=False, scale="imagenet"):
    """Images (B, C, H, W) of 0-255 as the network sees them: float32, minus mean, over std.

    size: bring them to size x size first: shorter side scaled (bilinear), then cropped in the centre. margin:
    scale to 8/7 of size before the crop, as ImageNet's 256 and 224. scale: a name of SCALES.
    """
    split = Split(images, torch.zeros(len(images), device=images.device))
    return next(batches(split, len(images), size=size, margin=margin, scale=scale))[0]


def to_pixels(normalised, scale="imagenet"):
    """The inverse of `normalise`: (B, C, H, W) of any float type to pixels of 0-1, clamped."""
    _, c, h, w = normalised.shape
    return _affine(normalised, *_mean_std(c, h * w, normalised.device, scale)).clamp_(0, 1)


def add_noise(images, std, generator, scale="imagenet"):
    """Normalised images (B, C, H, W) with Gaussian noise, std in pixels of 0-1; as they are where it is 0.
    generator: a torch.Generator of their device."""
    if not std:
        return images
    b, c, h, w = images.shape
    noise = torch.randn(b, h * w * c, generator=generator, device=images.device)
    _, scale_std = _mean_std(c, h * w, images.device, scale)
    return images + noise.mul_(std / scale_std).view(b, h, w, c).permute(0, 3, 1, 2)


def rotate(images, angles):
    """Images (B, C, H, W) of any float type, each turned by its angle (B,) in degrees, counter-clockwise,
    about its centre; bilinear, black outside."""
    b, c, h, w = images.shape
    turn = torch.deg2rad(angles)
    cos, sin, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    theta = torch.stack([cos, -sin * h / w, zero, sin * w / h, cos, zero], 1).view(b, 2, 3)
    return F.grid_sample(images, F.affine_grid(theta, (b, c, h, w), align_corners=False), align_corners=False)


def windows(images, corners, sides):
    """A window of `sides` (h, w) of each image (B, C, H, W), the border reflected: (B, C, h, w). corners: the
    row and the column where each begins, (B,) int64 both."""
    b, c, height, width = images.shape
    rows, columns = (
        side - 1 - (side - 1 - (corner[:, None] + torch.arange(length, device=images.device)).abs()).abs()
        for corner, length, side in zip(corners, sides, (height, width)))
    image = torch.arange(b, device=images.device)[:, None, None]
    index = (image * height + rows[:, :, None]) * width + columns[:, None, :]  # (B, h, w)
    pixels = images.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, index.flatten())
    return pixels.view(*index.shape, c).permute(0, 3, 1, 2)


def bounds(n, batch_size):
    """The batches of n images, a list of (start, stop). One of fewer than half the batch size at the end is
    joined to the one before: its few images would weigh as much as others' in BatchNorm's statistics."""
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and 2 * (n - starts[-1]) < batch_size:
        starts.pop()
    return list(zip(starts, [*starts[1:], n]))


def batches(split, batch_size, epoch_seed=None, flip=False, size=None, margin=False, scale="imagenet",
            degrees=0.0, shifts=0, part=(0, 1), rounds=1):
    """A split's batches of `bounds`, (images, labels) as `normalise` makes them, on the split's device.

    epoch_seed: an int shuffles, always in the same order for the same seed; None keeps the set's order. In
    this order: flip: mirror each image left to right with probability 1/2. shifts: move each by up to so many
    pixels, borders reflected. degrees: rotate each by up to so many, either way. size: scale to this side.
    margin: crop each anywhere, with epoch_seed None in the centre. All are drawn from the same seed. part:
    (rank, processes): that process's share of every batch; all are equal, what is left over is left out.
    rounds: passes over a shuffled split, each in another order. Raises DataError.
    """
    n, device, (rank, processes) = rounds * len(split.labels), split.images.device, part
    if shifts >= min(split.images.shape[2:]):
        raise DataError(f"shifts by {shifts} pixels: expected less than the images' sides")
    generator = torch.Generator().manual_seed(epoch_seed or 0)
    order = torch.arange(n, device=device) if epoch_seed is None else torch.cat(
        [torch.randperm(len(split.labels), generator=generator) for _ in range(rounds)]).to(device)
    flipped = (torch.rand(n, generator=generator) < 0.5).to(device)
    offsets = torch.rand(n, 2, generator=generator).to(device) if margin and epoch_seed is not None else None
    angles = degrees * (2 * torch.rand(n, generator=generator).to(device) - 1) if degrees else None
    moves = torch.randint(-shifts, shifts + 1, (n, 2), generator=generator).to(device) if shifts else None
    pixels = split.images.permute(0, 2, 3, 1)  # (N, H, W, C), contiguous: an image is a row
    sides = size * size if size else math.prod(pixels.shape[1:3])
    mean, std = _mean_std(pixels.shape[3], sides, device, scale)
    shift, factor = -mean / std, 1 / (255 * std)
    for start, stop in bounds(n, batch_size):
        share = slice(start + rank, stop - (stop - start) % processes, processes)
        images = pixels.index_select(0, order[share]).permute(0, 3, 1, 2)
        if flip:
            turned = flipped[share, None, None, None]
            images = images.flip(3) * turned + images * ~turned  # torch.where takes twice the time
        if shifts:
            images = windows(images, (-moves[share]).unbind(1), images.shape[2:])
        if degrees:
            images = rotate(images.float(), angles[share])
        if size:
            from torchvision.transforms.v2 import functional as TF
            images = TF.resize(images, [size * 8 // 7 if margin else size], antialias=True)
            if offsets is None:
                images = TF.center_crop(images, [size, size])
            else:
                corners = [(offset * (side - size + 1)).long()
                           for offset, side in zip(offsets[share].unbind(1), images.shape[2:])]
                images = windows(images, corners, (size, size))
        yield _affine(images, shift, factor), split.labels.index_select(0, order[share])
