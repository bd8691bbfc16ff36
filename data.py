"""Image data sets held whole in memory as uint8, and their batches made on the device.

    dataset = load("cifar10")                 # or a folder, an .npz, "shapes", ...
    for images, labels in batches(dataset.train, 32, epoch_seed=0, flip=True):
        ...                                   # images (B, C, H, W) float32, normalised

    # A tenth held out in dataset.val; half of the birds replaced by synthetic ones:
    dataset = load("cifar10", val_share=0.1, variant="smote", constrain={"bird": 0.5}).to("cuda")

`python data.py --dataset NAME` prints a set's classes and counts and saves a sheet of samples. This
file needs torch, torchvision (with Pillow) and numpy, and matplotlib for the sheet.
"""
import argparse
import contextlib
import difflib
import hashlib
import math
import os
import re
import shutil
import socket
import sys
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid


class DataError(ValueError):
    """A data set that is unavailable or unusable; one line that names the file or value and says what to do."""


class _Missing(DataError):
    """A named set that is not on disk and cannot be downloaded."""


class _Unequal(DataError):
    """Pictures of different sizes, which --size can bring together."""


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
    synthetic: int = 0             # how many of the training images, the last ones, SMOTE made
    labelled: Split | None = None  # the part of train whose labels are used; None: all of it
    named: bool = True             # False: the set has no class names of its own
    test_drawn: bool = False       # True: the test images were drawn, from a folder without test/
    # {class: a hash of the images, of a folder the files' names and sizes, from which the seed draws its test images}
    pool: dict = field(default_factory=dict)
    digests: dict = field(default_factory=dict)  # {"train": the `digest` of that part, ...}, where train.py has set it

    def map(self, change):
        """The Dataset with change(split) in place of each of its splits."""
        splits = {name: getattr(self, name) for name in ("train", "test", "val", "labelled")}
        return replace(self, **{name: change(split) for name, split in splits.items() if split is not None})

    def to(self, device):
        """The Dataset on a device."""
        return self.map(lambda split: Split(split.images.to(device), split.labels.to(device)))


# What torchvision reads and downloads: (class, its files, training arguments, test arguments).
NAMES = {
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py", {"train": True}, {"train": False}),
    "cifar100": (datasets.CIFAR100, "cifar-100-python", {"train": True}, {"train": False}),
    "svhn": (datasets.SVHN, "*_32x32.mat", {"split": "train"}, {"split": "test"}),
    "mnist": (datasets.MNIST, "MNIST", {"train": True}, {"train": False}),
    "fashionmnist": (datasets.FashionMNIST, "FashionMNIST", {"train": True}, {"train": False}),
}
NEVER_FLIPPED = {"svhn", "mnist"}  # a mirrored digit is not a digit


def load(dataset=None, data_dir="data", *, size=None, classes=None, train_size=None, test_size=None,
         test_share=0.2, val_share=0.0, labels=None, variant="complete", constrain=None, blur=0.0, seed=0,
         test_only=False):
    """A Dataset on the CPU, after the steps that train.py's flags of these names ask for.

    dataset: a name of NAMES or "shapes"; a folder of images in train/<class>/* and test/<class>/*, or in
    <class>/* alone; an .npz of x_train, y_train, x_test, y_test. None is CIFAR-10 or, where that is
    unavailable, `shapes`. size: what a folder's pictures are scaled and cropped to as they are read, if they
    are of unequal sizes or the first one has more pixels; all others are scaled by `batches`. test_only: the
    training part is empty, its images are not decoded. test_share: of a folder without train/ and test/, the
    share of each class that is drawn for the test. A large folder's pictures, once decoded, are kept in it as
    a hidden .npy.

    Then, in this order, all draws with the seed: `choose` classes, `take` train_size and test_size images,
    `hold_out` val_share, `vary` by variant and constrain, `take` labels of the training images as .labelled,
    `blurred`. Raises DataError; that of a step starts with its flag.
    """
    for flag, count in (("train-size", train_size), ("test-size", test_size), ("labels", labels)):
        if count is not None and count < 1:
            raise DataError(f"--{flag} {count}: expected at least 1")
    if constrain and variant == "complete":
        raise DataError("--constrain: has no effect without --variant other than complete")

    def step(flag, change, *arguments):
        try:
            return change(*arguments)
        except DataError as error:
            raise DataError(f"--{flag}: {error}") from None

    classes = classes.split(",") if isinstance(classes, str) else classes
    made, files = _find(dataset, data_dir, test_only, test_share, seed)
    if classes:
        made = step(f"classes {','.join(classes)}", choose, made, classes)
    if test_size or made.test_drawn:
        made.pool = _pool(made, files)
    if test_only:
        made.train = _pick(made.train, slice(0))
        train_size, val_share, labels, variant = None, 0, None, "complete"
    if train_size:
        made.train = step("train-size", take, made.train, train_size, seed)
    if test_size:
        made.test = step("test-size", take, made.test, test_size, seed)
    if val_share:
        made.train, made.val = step("val-share", hold_out, made.train, val_share, seed)
        lost = set(made.val.labels.tolist()) - set(made.train.labels.tolist())
        if lost:
            raise DataError(f"--val-share {val_share:g}: leaves no training image of class "
                            f"{made.classes[min(lost)]!r}; expected two or more, or --classes without it")
    if files is not None:  # only the chosen pictures of a folder are read
        made = _read_folder(made, *files, size)
    made.train, made.synthetic = step(f"variant {variant}", vary, made.train, made.classes, variant, constrain, seed)
    if labels:
        made.labelled = step("labels", take, made.train, labels, seed)
    return made.map(lambda split: Split(blurred(split.images, blur), split.labels)) if blur else made


def _find(dataset, data_dir, test_only, test_share, seed):
    """(Dataset, None), or of an image folder what `_index_folder` returns."""
    path = Path(dataset or "")
    if dataset == "shapes":
        return shapes(), None
    if dataset is None or dataset in NAMES:
        try:
            return _find_named(dataset or "cifar10", Path(data_dir), test_only, test_share, seed)
        except _Missing as error:
            if dataset is not None:
                raise
            print(f"{'!' * 78}\nWARNING: {error}\nWARNING: using the built-in set 'shapes' instead; its results "
                  f"say nothing about CIFAR-10.\n{'!' * 78}", file=sys.stderr)
            return shapes(), None
    if path.is_dir():
        return _index_folder(path, test_share, seed)
    if path.suffix == ".npz" and path.exists():
        return _read_npz(path, test_only), None
    expected = "a folder of images in train/<class> and test/<class> or in <class>, or an .npz file"
    if path.exists():
        raise DataError(f"{path}: expected {expected}")
    close = difflib.get_close_matches(dataset.lower(), [*NAMES, "shapes"], 1)
    hint = "; where a run's data has moved, --dataset names its place" if path.is_absolute() else (
        f"; did you mean {close[0]!r}?" if close else "")
    raise DataError(f"no data set {dataset!r}; expected one of {' '.join(NAMES)} shapes, {expected}{hint}")


def digest(dataset, split):
    """A hash of a Split of a Dataset, 16 hexadecimal digits, which tells data sets apart: of its labels and images, but
    of `shapes`, whose last bits depend on the processor, of its labels alone."""
    made = hashlib.blake2b(split.labels.cpu().numpy(), digest_size=8)
    if dataset.source != DRAWN:
        made.update(split.images.permute(0, 2, 3, 1).contiguous().cpu().numpy())  # no copy of channels_last images
    return made.hexdigest()


def _pool(dataset, files):
    """Dataset.pool; files: what `_index_folder` returns, or None."""
    splits, made = [dataset.test, *[dataset.train] * dataset.test_drawn], {}
    for label, name in enumerate(dataset.classes):
        if files is None:
            made[name] = digest(dataset, _pick(dataset.test, dataset.test.labels == label))
            continue
        folder, paths = files
        rows = torch.cat([split.images[split.labels == label] for split in splits]).sort().values.tolist()
        listed = [(paths[row].removeprefix(str(folder)).replace(os.sep, "/"), os.path.getsize(paths[row]))
                  for row in rows]
        made[name] = hashlib.blake2b(repr(listed).encode(), digest_size=8).hexdigest()
    return made


def _split(images, labels):
    """A Split from images (N, C, H, W) uint8 and labels, both tensors or arrays."""
    images = torch.as_tensor(images).contiguous(memory_format=torch.channels_last)
    return Split(images, torch.as_tensor(labels, dtype=torch.int64))


def _channels_first(images):
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W) as (N, C, H, W)."""
    if images.ndim == 3:
        return images[:, None]
    return images.swapaxes(1, 3).swapaxes(2, 3) if images.ndim == 4 and images.shape[-1] in (1, 3) else images


def _read_named(name, root, test_only, download):
    """A set in torchvision's layout. Raises RuntimeError if it is not there, DataError if it is damaged."""
    make, files, *arguments = NAMES[name]
    splits = []
    try:
        if name == "svhn" and download:
            import scipy.io  # noqa: F401  (without it torchvision cannot read what it downloads)
        for each in arguments[test_only:]:
            subset = make(root, download=download, **each)
            classes = list(getattr(subset, "classes", map(str, range(10))))
            labels = subset.labels if name == "svhn" else subset.targets
            splits.append(_split(_channels_first(torch.as_tensor(subset.data)), labels))
            if len(subset.data) != len(labels) or splits[-1].labels.max() >= len(classes):
                raise ValueError("labels do not match the images")
    except ModuleNotFoundError as error:
        raise DataError(f"{name}: torchvision reads it with {error.name}, which is not installed: "
                        f"pip install {error.name}") from None
    except Exception as error:  # of a damaged file, whatever torchvision meets first
        if download or str(error).startswith("Dataset"):  # "Dataset not found ..."
            raise
        raise DataError(f"{root / files}: damaged ({error!r:.90}); delete it to download it again") from None
    classes = [each.split(" ")[0] for each in classes] if name == "mnist" else classes  # "0 - zero"
    return Dataset(name, f"{root} (torchvision)", classes, splits[0], splits[-1])


def _find_named(name, root, test_only, test_share, seed):
    """A set of NAMES as `_find` returns it: torchvision's files in root, an image folder there, or a download."""
    with contextlib.suppress(RuntimeError):
        return _read_named(name, root, test_only, download=False), None
    folder, files = root / name, root / NAMES[name][1]
    if (folder / "train").is_dir():
        return _index_folder(folder, test_share, seed)
    incomplete = any(root.glob(files.name))
    created = [place for place in (files / "raw", files, root, *root.parents) if not place.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # for a network that never answers
    try:
        return _read_named(name, root, test_only, download=True), None
    except (OSError, RuntimeError) as error:
        for place in created:  # a failed download leaves no empty folders
            with contextlib.suppress(OSError):
                place.rmdir()
        failure = f"could not be downloaded ({' '.join(str(error).split())[:80]})"
        if incomplete:
            raise DataError(f"{files}: damaged or incomplete, and {failure}; delete it to try again") from None
        raise _Missing(f"{name} is neither in {root}/ nor in {folder}/train, and {failure}; --data-dir names "
                       "another folder, --dataset shapes needs no files") from None
    finally:
        socket.setdefaulttimeout(timeout)


def _read_npz(path, test_only):
    """An .npz of x_train, y_train, x_test, y_test (and `classes`, their names, if it has it)."""
    images = ("x_train", "x_test")[test_only:]
    try:
        with np.load(path, allow_pickle=False) as file:
            sizes = {each.filename: each.file_size for each in file.zip.infolist()}
            needed, free = sum(sizes.get(f"{key}.npy", 0) for key in images), free_memory()
            if needed > free:
                raise _too_large(path, needed, free, "expected a smaller .npz")
            arrays = {key: file[key] for key in file if key in images or key in ("y_train", "y_test", "classes")}
            keys = set(file)
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise DataError(f"{path}: cannot be read as an .npz of plain arrays ({error})") from None
    if not {"x_train", "y_train", "x_test", "y_test"} <= keys:
        raise DataError(f"{path}: has {' '.join(sorted(keys)) or 'nothing'}; expected x_train y_train x_test y_test")
    splits, count = [], len(np.unique(arrays["y_train"]))
    for key in images:
        x, y = _channels_first(arrays[key]), arrays["y" + key[1:]]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape[2:]:
            raise DataError(f"{path}: {key} is {x.dtype} of shape {arrays[key].shape}; expected uint8 (N, H, W), "
                            "(N, H, W, C) or (N, C, H, W), 1 or 3 channels")
        if y.dtype.kind not in "iu" or y.size != len(x) or not len(x):
            raise DataError(f"{path}: y{key[1:]} is {y.dtype} of shape {y.shape}; expected a whole number for each "
                            f"of {len(x)} images")
        outside = set(y.ravel().tolist()) - set(range(count))
        if outside:
            raise DataError(f"{path}: y{key[1:]} has the label {min(outside)}; labels count from 0: "
                            f"expected 0 to {count - 1}, each of them in y_train")
        splits.append(_split(x, y.ravel().astype(np.int64)))
    train, test = (tuple(split.images.shape[1:]) for split in (splits[0], splits[-1]))
    names = arrays.get("classes", np.arange(count))
    if names.ndim != 1 or names.dtype.kind not in "Uiu":
        raise DataError(f"{path}: classes is {names.dtype} of shape {names.shape}; expected a row of {count} names")
    classes = [str(each) for each in names]
    if train != test or len(classes) != count:
        raise DataError(f"{path}: x_train and x_test have images of {train} and {test}, classes {len(classes)} "
                        f"names; expected one shape and {count} names")
    repeated = [name for name in classes if classes.count(name) > 1]
    if repeated:
        raise DataError(f"{path}: classes has the name {repeated[0]!r} more than once; expected {count} different "
                        "names")
    return Dataset(path.stem, f"{path} (.npz)", classes, splits[0], splits[-1], named="classes" in arrays)


def free_memory():
    """Bytes of memory that this process can still take: the machine's, within the limits of its
    control groups (containers, batch systems). Infinite where the system does not tell (not Linux)."""
    try:
        free = [1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])]
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except (OSError, TypeError):
        return math.inf
    for group in groups:
        _, kind, place = group.split(":", 2)  # kind: "" for version 2, "memory" for version 1
        limit, used = ("limit_in_bytes", "usage_in_bytes") if kind else ("max", "current")
        leaf = Path(f"/sys/fs/cgroup/{kind}{place}")
        for level in (leaf, *leaf.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: "max"
                left = int((level / f"memory.{limit}").read_text()) - int((level / f"memory.{used}").read_text())
                # Cached files count as used but give way; the last match includes the groups below.
                cached = re.findall(r"inactive_file (\d+)", (level / "memory.stat").read_text())
                free.append(left + int(cached[-1] if cached else 0))
    return max(0, min(free))


def _too_large(source, needed, free, way_out):
    return DataError(f"{source}: the images take {needed / 1e9:,.2f} GB, {free / 1e9:,.2f} GB of memory are free; "
                     f"{way_out}")


# ---------------------------------------------------------------- pictures and folders of them

def read_image(path, channels=3, fit=None):
    """A picture file as (H, W, C) uint8, turned as its EXIF says; transparency onto white.

    channels: 3, or 1 for grey. fit: (H, W) to scale and centre-crop to. Raises DataError, naming the path,
    for what is not a picture, is cut off, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):
                    wide = np.asarray(image)
                    if wide.min() < 0 or wide.max() > 65535:
                        raise ValueError("more than 16 bits a pixel")
                    image = Image.fromarray((wide // 256).astype(np.uint8))
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
        raise DataError(f"{path}: not a picture in a supported format") from None
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file, whatever Pillow meets first
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read as a picture ({reason})") from None
    return pixels.reshape(*pixels.shape[:2], channels)


def read_picture(path, channels=3, fit=None, blur=0.0):
    """A picture file as `load` makes a test image of it, before `normalise`: (1, C, H, W) uint8.

    channels, fit: channels and (H, W) of the data set's images, to which a picture of another size is scaled
    and centre-cropped. blur: as for `load`. Raises DataError.
    """
    images = torch.tensor(read_image(path, channels, fit)).permute(2, 0, 1)[None]
    return blurred(images, blur) if blur else images


def _sides(path):
    """(width, height) of a picture, from its file's header; (0, 0) of a damaged one, which is named when it is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                # The orientation: by a quarter, as `read_image` turns it. Pillow has turned a TIFF's size. A PNG's
                # own getexif decodes the whole picture.
                turned = image.format != "TIFF" and Image.Image.getexif(image).get(274, 1) in (5, 6, 7, 8)
                return image.size[::-1] if turned else image.size
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
        return 0, 0


CHUNK = 250  # pictures that a worker process decodes at a time


def _decode_chunk(job):
    """Picture files as one (n, H, W, 3) uint8 array, in a worker process: (array, None), or (None, the
    error), as an exception raised in a worker would reach the user as a page of traceback."""
    paths, shape, fit = job
    array = np.empty((len(paths), *shape, 3), np.uint8)
    try:
        for image, path in zip(array, paths):
            pixels = read_image(path, fit=shape if fit else None)
            if pixels.shape[:2] != shape:
                raise _Unequal(f"{path}: is not {shape[1]}x{shape[0]} as the first picture is; --size N scales and "
                               "crops every picture to NxN")
            image[:] = pixels
    except DataError as error:
        return None, error
    return array, None


def _decode(paths, shape, fit, folder):
    """Yields all pictures in order as (n, H, W, 3) uint8 arrays, decoded on all cores. Raises DataError."""
    done, start = 0, time.time()
    jobs = [(paths[i:i + CHUNK], shape, fit) for i in range(0, len(paths), CHUNK)]
    # A DataLoader calls collate_fn in its workers, and keeps the order. Only forked workers: others
    # would run a user's script again where that has no `if __name__ == "__main__"`.
    workers = torch.get_num_threads() if len(jobs) > 4 and sys.platform == "linux" else 0
    line = "\rreading " if sys.stderr and sys.stderr.isatty() else ""
    for array, error in DataLoader(jobs, batch_size=None, collate_fn=_decode_chunk, num_workers=workers,
                                   multiprocessing_context="fork" if workers else None):
        if error:
            raise error
        yield array
        done += len(array)
        if line:
            print(f"{line}{folder}: {done:,} of {len(paths):,} images", end="", file=sys.stderr)
    print(f"{line}{folder}: {done:,} images read in {time.time() - start:.1f} s", file=sys.stderr)


def _index_folder(folder, test_share, seed):
    """(Dataset, (folder, paths)) of an image folder; the Dataset's `images` are rows of the paths. Pictures
    lie at any depth below train/<class> and test/<class>, or below <class>: then a share is drawn for the test."""
    paths, labels, ends, classes = [], [], [], None
    parts = ("train", "test") if (folder / "train").is_dir() or (folder / "test").is_dir() else ("",)
    layouts = "train/<class>/* and test/<class>/*, or <class>/* (no class may be called train or test)"
    for part in parts:
        names = sorted(each.name for each in (folder / part).glob("[!.]*") if each.is_dir())
        classes = classes or names
        if not names:
            raise DataError(f"{folder}: has no folder {part or 'train'}/<class>; expected {layouts}")
        misnamed = [name for name in names if name.lower() in ("train", "training", "test", "testing")]
        if not part and len({name[:2].lower() for name in misnamed}) == 2:  # tr, te
            raise DataError(f"{folder}: has the folders {' and '.join(misnamed)}; expected {layouts}")
        if names != classes:
            unmatched = ", ".join(sorted(set(names) ^ set(classes))[:5])
            raise DataError(f"{folder / part}: expected a folder for each class, the same in train/ and test/; "
                            f"only one of them has {unmatched}")
        try:
            samples = datasets.folder.make_dataset(folder / part, {name: i for i, name in enumerate(names)},
                                                   datasets.folder.IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise DataError(f"{folder / part}: {str(error).strip()}") from None
        paths += [path for path, _ in samples]
        labels += [label for _, label in samples]
        ends.append(len(paths))
    index, kind = Split(torch.arange(len(paths)), torch.tensor(labels)), "image folder"
    if len(parts) == 2:
        train, test = _pick(index, slice(ends[0])), _pick(index, slice(*ends))
    else:
        kind, in_class = f"image folder, {100 * test_share:g} % drawn for the test", counts(index, len(classes))
        if 1 in in_class:
            raise DataError(f"{folder}: class {classes[in_class.index(1)]!r} has one picture; expected two or more, "
                            "for training and test")
        drawn = torch.zeros(len(paths), dtype=torch.bool)
        for label, count in enumerate(in_class):  # each class for itself: another class leaves its draw as it is
            rows = (index.labels == label).nonzero().squeeze(1)
            wanted = min(max(round(test_share * count), 1), count - 1)
            drawn[rows[_drawn(_pick(index, rows), wanted, seed)]] = True
        train, test = _pick(index, ~drawn), _pick(index, drawn)
    made = Dataset(folder.absolute().name, f"{folder} ({kind})", classes, train, test, test_drawn=len(parts) == 1)
    return made, (folder, paths)


# From this many pictures on, a folder's decoded pictures are kept in it as `.cache-<size>-<stamp>.npy`.
CACHE_FROM = 1000


def _read_folder(index, folder, paths, size):
    """The Dataset of a folder's index with the pictures in place of their rows, from the folder's cache or
    decoded; of one channel if all of them are grey. Raises DataError."""
    chosen = [split.images for split in (index.train, index.test, index.val) if split is not None]
    rows, free, stamp = torch.cat(chosen).numpy(), free_memory(), hashlib.sha256()
    for path in paths:
        status, name = os.stat(path), path.removeprefix(str(folder)).lstrip(os.sep)
        stamp.update(os.fsencode(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    # Of the pictures as they are, and fitted to size; larger ones are always fitted.
    caches = [folder / f".cache-{kind}-{stamp.hexdigest()[:16]}.npy" for kind in ("full", size)]
    fit = size is not None and size * size < math.prod(_sides(paths[0]))

    def open_cache():
        for cache in caches[fit:]:
            with contextlib.suppress(Exception):  # not there or damaged: whatever NumPy meets first
                images = np.load(cache, mmap_mode="r")
                valid = images.dtype == np.uint8 and images.ndim == 4 and images.shape[::3] == (len(paths), 3)
                if valid and len(rows) * images[0].size <= free:
                    return images
        return None

    with contextlib.ExitStack() as stack:
        images, keep = open_cache(), len(rows) >= max(CACHE_FROM, len(paths) / 10)
        if images is None and keep:
            with contextlib.suppress(ImportError, OSError):  # no fcntl, or a read-only folder
                import fcntl
                # Others that start now wait here. Not flock: forked workers would share its lock.
                fcntl.lockf(stack.enter_context(open(folder / ".cache.lock", "w")), fcntl.LOCK_EX)
            images = open_cache()
        if images is None:
            images, rows = _decode_folder(rows, len(index.test.labels), folder, paths, size, fit, free,
                                          caches if keep else None)
    images = images[rows]
    blocks = (images[i:i + CHUNK] for i in range(0, len(images), CHUNK))
    if not any((block != block[..., :1]).any() for block in blocks):
        images = np.ascontiguousarray(images[..., :1])
    parts = iter(torch.from_numpy(images).permute(0, 3, 1, 2).split([len(each) for each in chosen]))
    return index.map(lambda split: _split(next(parts), split.labels))


def _decode_folder(rows, tests, folder, paths, size, fit, free, caches):
    """(images, rows): decoded pictures, (n, H, W, 3), and which of them are those of `rows`, `tests` of them
    test images. fit: whether they are fitted to size, as unequal ones are too. caches: where all pictures of the
    folder are kept as they are, and fitted to size; None: only those of the rows are decoded."""
    while True:
        if caches is None and size is not None:  # as for the whole folder, whichever pictures are chosen
            fit = fit or len({_sides(path) for path in paths} - {(0, 0)}) > 1
        shape = (size, size) if fit else read_image(paths[rows[0]]).shape[:2]
        needed = 3 * len(rows) * math.prod(shape)
        if needed > free:
            side = min(math.isqrt(int(0.3 * free) // len(rows)) // 8 * 8, 1024)
            training = int(0.3 * free) // math.prod(shape) - tests
            flags = [f"--size {side}"] * (side > 0) + [f"--train-size {training}"] * (0 < training < len(rows))
            raise _too_large(folder, needed, free, f"{' or '.join(flags)} fits" if flags else "no --size fits")
        try:
            if caches is not None:
                return _write_cache(caches[fit], paths, shape, fit), rows
            images = np.empty((len(rows), *shape, 3), np.uint8)
            for i, chunk in enumerate(_decode([paths[row] for row in rows], shape, fit, folder)):
                images[i * CHUNK:(i + 1) * CHUNK] = chunk
            return images, slice(None)
        except DataError as error:
            if isinstance(error, _Unequal) and size is not None:
                fit = True
            elif caches is not None and len(rows) < len(paths):  # perhaps of a picture that is not chosen
                caches = None
            else:
                raise
        except OSError:  # no right or no room to write
            caches = None


def _write_cache(cache, paths, shape, fit):
    """Decodes all pictures of a folder into a cache file, and deletes those of its former contents.
    Returns the images, mapped. Raises OSError if it cannot be written, DataError."""
    folder, partial = cache.parent, cache.with_name(f"{cache.name}.{os.getpid()}")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *shape, 3)}
    if 2 * math.prod(header["shape"]) > shutil.disk_usage(folder).free:
        raise OSError("the cache would take more than half of the free disk")
    try:
        with open(partial, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for images in _decode(paths, shape, fit, folder):
                file.write(images)
        os.replace(partial, cache)
    finally:
        partial.unlink(missing_ok=True)
    stamp = cache.name[-20:]
    for other in folder.glob(".cache-*.npy*"):  # of another stamp, or left by a killed process
        ours = re.fullmatch(r"\.cache-(full|None|\d+)-[0-9a-f]{16}\.npy(\.\d+)?", other.name)
        if ours and not other.name.endswith(stamp):
            with contextlib.suppress(OSError):
                other.unlink()
    return np.load(cache, mmap_mode="r")


# ---------------------------------------------------------------- shapes, the built-in set
# How far points (x, y), tensors of any one shape, are outside a shape of about unit size; negative
# inside. Not exact distances, but smooth across the edge.

def _box(x, y, width, height):
    return torch.maximum(x.abs() - width, y.abs() - height)


def _triangle(x, y, size):  # its tip upwards (y negative)
    return torch.maximum(y - size / 2, 0.866 * x.abs() - 0.5 * y - size / 2)


def _star(x, y):  # five points; its edge over the angle to the nearest one
    turn = 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(y, x), turn) - turn / 2).abs()
    return torch.hypot(x, y) - (0.45 + 0.55 * (angle / (turn / 2)) ** 2)


def _heart(x, y):
    u, v = x * 1.1, -y * 1.1 + 0.15
    return torch.hypot(u, v - 0.75 * u.abs().sqrt()) - 0.8


OUTSIDE = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.8,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.2,
    "square": lambda x, y: _box(x, y, 0.7, 0.7),
    "triangle": lambda x, y: _triangle(x, y, 1.0),
    "star": _star,
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.95, 0.28), _box(x, y, 0.28, 0.95)),
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.9, 0.72 - torch.hypot(x - 0.42, y)),
    "heart": _heart,
    "arrow": lambda x, y: torch.minimum(_triangle(x * 1.2, (y + 0.35) * 1.2, 0.9), _box(x, y - 0.4, 0.2, 0.6)),
    "bars": lambda x, y: _box(x.abs() - 0.5, y, 0.25, 0.9),  # two, upright
}
SHAPES, DRAWN = list(OUTSIDE), "drawn by data.py"


def shapes(train=10_000, test=2_000, side=32, seed=7):
    """Ten classes of shapes in random colours, places, sizes and turns on textured backgrounds.

    Drawn here, in about two seconds, and the same at every run. train, test: numbers of images; side: in pixels;
    seed: of the drawing. Returns a Dataset of images (N, 3, side, side), labels 0 to 9 in turn.
    """
    g = torch.Generator().manual_seed(seed)
    n = train + test
    labels = torch.arange(n) % 10

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    def texture(colour, strength, cells):
        """Stripes and patches around a colour: (N, 3, side, side)."""
        patches = F.interpolate(uniform(-1, 1, 1, cells, cells), size=(side, side), mode="bilinear")
        angle, wave, phase = uniform(0, math.pi, 1, 1), uniform(2, 9, 1, 1), uniform(0, 7, 1, 1)
        stripes = torch.sin(wave * (x0 * angle.cos() + y0 * angle.sin()) + phase)[:, None]
        tint = uniform(-1, 1, 3, 1, 1)
        return colour[:, :, None, None] + strength * (patches + 0.7 * stripes * tint)

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
        rows = labels == label
        # The edge is one pixel wide: distances are in units of the shape's size.
        edge = outside(x[rows], y[rows]) * size[rows] * side / 2
        cover[rows] = (0.5 - edge).clamp(0, 1)[:, None]
    images = below + (above - below) * cover
    images += 0.02 * torch.randn(images.shape, generator=g)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return Dataset("shapes", DRAWN, list(SHAPES),
                   _split(images[:train], labels[:train]), _split(images[train:], labels[train:]))


# ---------------------------------------------------------------- from sets to sets

def counts(split, classes):
    """Images per class, a list of ints. classes: how many there are."""
    zeros = torch.zeros(classes, dtype=torch.int64, device=split.labels.device)
    return zeros.scatter_add(0, split.labels, torch.ones_like(split.labels)).tolist()


def _pick(split, rows):
    return Split(split.images[rows], split.labels[rows])


def _drawn(split, count, seed):
    """Rows of `count` images, drawn with the seed, classes in proportion (rounded so that they add up; at
    least one of each class where count allows), in the set's order."""
    n = len(split.labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    # Each image's rank within its class, as a share of that class; the smallest shares win.
    labels = split.labels.cpu()[order]
    share = torch.empty(n, dtype=torch.float64)
    for label in labels.unique():
        in_class = (labels == label).nonzero().squeeze(1)
        share[in_class] = torch.arange(len(in_class), dtype=torch.float64) / len(in_class)
    return order[share.argsort(stable=True)[:count]].sort().values


def take(split, count, seed):
    """`count` images of a Split, drawn with the seed, classes in proportion. Raises DataError."""
    if count > len(split.labels):
        raise DataError(f"{count:,} images asked for; the set has {len(split.labels):,}")
    return _pick(split, _drawn(split, count, seed))


def hold_out(split, share, seed):
    """(training set, validation set): a share (0 to 1) of the images, drawn with the seed, classes in
    proportion, goes to the second. Raises DataError."""
    n = len(split.labels)
    count = round(share * n)
    if not 0 < count < n:
        raise DataError(f"a share of {share:g} of {n:,} images is {count:,}; expected 1 to {n - 1:,}")
    held = torch.zeros(n, dtype=torch.bool)
    held[_drawn(split, count, seed)] = True
    return _pick(split, ~held), _pick(split, held)


def choose(dataset, names):
    """The Dataset of the classes of those names alone, renumbered in the set's order. Raises DataError."""
    unknown = set(names) - set(dataset.classes)
    if unknown or len(set(names)) < len(names):
        problem = f"no class {sorted(unknown)[0]!r}" if unknown else "a class twice"
        raise DataError(f"{problem}; {dataset.name} has {','.join(dataset.classes)}")
    kept = [label for label, name in enumerate(dataset.classes) if name in names]
    number = torch.full((len(dataset.classes),), -1)
    number[kept] = torch.arange(len(kept))
    made = dataset.map(lambda split: _pick(Split(split.images, number[split.labels]), number[split.labels] >= 0))
    if not len(made.test.labels):
        raise DataError(f"{dataset.name} has no test image of {' or '.join(names)}")
    return replace(made, classes=[dataset.classes[label] for label in kept])


def blurred(images, sigma):
    """Images (N, C, H, W) uint8 blurred by a Gaussian of sigma pixels (cut at 3 sigma, edges reflected)."""
    side = min(images.shape[2:])
    kernel = 2 * min(math.ceil(3 * sigma), side - 1) + 1
    blocks = [TF.gaussian_blur(block, [kernel, kernel], [sigma, sigma]) for block in images.split(1000) if len(block)]
    return torch.cat(blocks or [images]).contiguous(memory_format=torch.channels_last)


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
    """The k nearest references of each query, nearest first: (Q, k) int64.

    queries (Q, D), references (R, D), of any type and one device. Euclidean distances by matrix products in
    float32, chunk * R of them at a time; a few more than k of the nearest are then measured again in
    float64 and put in order.
    """
    centre = references.float().mean(0).round()
    references = references.float() - centre  # smaller numbers, smaller rounding errors
    squares, count = references.square().sum(1), min(k + 8, len(references))
    found = []
    for block in queries.split(chunk):
        block = block.float() - centre
        rows = torch.addmm(squares, block, references.T, alpha=-2).topk(count, largest=False).indices.sort(1).values
        exact = torch.cat([(references[candidates].double() - points[:, None].double()).square().sum(2)
                           for points, candidates in zip(block.split(50), rows.split(50))])
        found.append(rows.gather(1, exact.sort(dim=1, stable=True).indices[:, :k]))
    return torch.cat(found)


def smote(split, seed, k=5):
    """Every class grown to the largest one's size by synthetic pictures (SMOTE, Chawla et al. 2002), each a
    random point on the line between a picture of the class and one of its k nearest neighbours there. The
    synthetic ones stand after all others. Raises DataError."""
    generator = torch.Generator().manual_seed(seed)
    before = counts(split, int(split.labels.max()) + 1)
    images, labels = [split.images], [split.labels]
    for label, count in enumerate(before):
        missing = max(before) - count
        if not missing:
            continue
        if count < 2:
            raise DataError(f"class {label} has {count} training images; expected two or more")
        in_class = split.images[split.labels == label]
        pixels = in_class.flatten(1).float() - 127.5
        neighbours = nearest(pixels, pixels, min(k + 1, count))
        other = neighbours != torch.arange(count)[:, None]  # a picture is not its own neighbour ...
        other[other.all(1), -1] = False                     # ... nor among them, where others are equal to it
        neighbours = neighbours[other].view(count, -1)
        # Each picture equally often, the remainder drawn, as in the paper.
        turns = [torch.randperm(count, generator=generator) for _ in range(math.ceil(missing / count))]
        base = torch.cat(turns)[:missing]
        partner = neighbours[base, torch.randint(neighbours.shape[1], (missing,), generator=generator)]
        for one, two in zip(base.split(1000), partner.split(1000)):
            gap = torch.rand(len(one), 1, generator=generator)
            between = pixels[one].lerp(pixels[two], gap) + 127.5
            images.append(between.round().to(torch.uint8).view(-1, *in_class.shape[1:]))
        labels.append(torch.full((missing,), label))
    return _split(torch.cat(images), torch.cat(labels))


VARIANTS = ("complete", "constrained", "undersampled", "oversampled", "smote")
CONSTRAINED = {"bird": 0.5, "deer": 0.5, "truck": 0.5}  # the CIFAR study's


def vary(split, classes, variant, shares, seed):
    """A training set made unequal and, if asked for, equal again, drawn with the seed.

    shares: {class name: the share of its images that is kept}; None is the CIFAR study's where its classes are
    there, else the set as it is. "constrained" stops there, "undersampled" cuts every class to the smallest
    one, "oversampled" repeats images up to the largest one, "smote" adds synthetic ones. Returns the Split and
    how many of its images, the last ones, are synthetic. Raises DataError.
    """
    if variant not in VARIANTS:
        raise DataError(f"expected one of {' '.join(VARIANTS)}")
    if variant == "complete":
        return split, 0
    if shares is None:
        shares = CONSTRAINED if set(CONSTRAINED) <= set(classes) else {}
    unknown = set(shares) - set(classes)
    if unknown:
        raise DataError(f"no class {sorted(unknown)[0]!r}; there are {' '.join(classes)}")
    if not all(0 < share <= 1 for share in shares.values()):
        raise DataError(f"shares {shares}: expected numbers above 0, at most 1")
    before = counts(split, len(classes))
    wanted = [round(count * shares.get(name, 1)) for name, count in zip(classes, before)]
    if 0 in wanted:
        raise DataError(f"class {classes[wanted.index(0)]!r} is left with no training image")
    if not shares and (variant == "constrained" or len(set(before)) == 1):
        raise DataError(f"leaves all images as they are; name the shares to keep, such "
                        f"as --constrain {classes[0]}=0.5")
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


def _mean_std(channels, pixels, device, scale):
    """Mean and std of each value of an image whose channels lie innermost, (pixels * C,): three channels
    against (3, 1, 1) would be a slow pattern for a CPU. Filled on the device: a copy would wait for it."""
    mean, std = (torch.cat([torch.full((1,), value, device=device) for value in values]) for values in SCALES[scale])
    if channels == 1:
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    return mean.repeat(pixels), std.repeat(pixels)


def _affine(images, shift, factor):
    """shift + factor * images, (B, C, H, W) float32, in channels_last memory. shift, factor: (H * W * C,)."""
    b, c, h, w = images.shape
    rows = images.permute(0, 2, 3, 1).flatten(1).float()  # (B, H * W * C)
    return torch.addcmul(shift, rows, factor).view(b, h, w, c).permute(0, 3, 1, 2)


def _crop(images, size, margin, offsets):
    """Images brought to size x size, as `normalise` says."""
    if size is None or not margin and tuple(images.shape[2:]) == (size, size):
        return images
    images = TF.resize(images, [size * 8 // 7 if margin else size], antialias=True)
    if offsets is None:
        return TF.center_crop(images, [size, size])
    span = torch.arange(size, device=images.device)
    top, left = ((offsets[:, axis] * (images.shape[2 + axis] - size + 1)).long() for axis in (0, 1))
    pixels = images.permute(0, 2, 3, 1)[torch.arange(len(images), device=images.device)[:, None, None],
                                        (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]]
    return pixels.permute(0, 3, 1, 2)


def normalise(images, size=None, margin=False, offsets=None, scale="imagenet"):
    """Images (B, C, H, W) of 0-255 as the network sees them: float32, minus mean, over std.

    size: bring them to size x size first: shorter side scaled (bilinear), then cropped. margin: scale to 8/7
    of size before the crop, as ImageNet's 256 and 224. offsets: (B, 2), from 0 (top, left) to 1, where each
    image's crop lies; the centre where None. scale: a name of SCALES.
    """
    images = _crop(images, size, margin, offsets)
    mean, std = _mean_std(images.shape[1], math.prod(images.shape[2:]), images.device, scale)
    return _affine(images, -mean / std, 1 / (255 * std))


def rotate(images, angles):
    """Images (B, C, H, W) of any float type, each turned by its angle (B,) in degrees, counter-clockwise,
    about its centre; bilinear, black outside."""
    b, c, h, w = images.shape
    turn = torch.deg2rad(angles)
    cos, sin, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    theta = torch.stack([cos, -sin * h / w, zero, sin * w / h, cos, zero], 1).view(b, 2, 3)
    return F.grid_sample(images, F.affine_grid(theta, (b, c, h, w), align_corners=False), align_corners=False)


def move(images, moves):
    """Images (B, C, H, W), each moved by its moves (B, 2) int64, pixels down and right, less than its sides; the
    border is reflected."""
    b, c, h, w = images.shape

    def sources(side, moves):  # (B, side): the pixel that comes to each place
        places = (torch.arange(side, device=images.device) - moves[:, None]).abs()
        return side - 1 - (side - 1 - places).abs()
    rows, columns = sources(h, moves[:, 0]), sources(w, moves[:, 1])
    image = torch.arange(b, device=images.device)[:, None, None]
    index = (image * h + rows[:, :, None]) * w + columns[:, None, :]  # (B, H, W)
    pixels = images.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, index.flatten())
    return pixels.view(b, h, w, c).permute(0, 3, 1, 2)


def add_noise(images, std, generator, scale="imagenet"):
    """Normalised images (B, C, H, W) with Gaussian noise, std in pixels of 0-1. generator: a torch.Generator
    of their device."""
    b, c, h, w = images.shape
    noise = torch.randn(b, h * w * c, generator=generator, device=images.device)
    noise *= std / _mean_std(c, h * w, images.device, scale)[1]
    return images + noise.view(b, h, w, c).permute(0, 3, 1, 2)


def to_pixels(normalised, scale="imagenet"):
    """The inverse of `normalise`: (B, C, H, W) of any float type to pixels of 0-1, clamped."""
    _, c, h, w = normalised.shape
    return _affine(normalised, *_mean_std(c, h * w, normalised.device, scale)).clamp_(0, 1)


def batch_bounds(n, batch_size, processes=1):
    """The batches of n images, a list of (start, stop). A last one that is smaller than the others and has
    fewer than two images for each process is joined to the one before it: BatchNorm needs two."""
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] < min(batch_size, 2 * processes):
        starts.pop()
    return list(zip(starts, [*starts[1:], n]))


def batches(split, batch_size, epoch_seed=None, flip=False, size=None, margin=False, scale="imagenet",
            degrees=0.0, shifts=0, part=(0, 1), rounds=1):
    """A split's batches of `batch_bounds`, (images, labels) as `normalise` makes them, on the split's device.

    epoch_seed: an int shuffles, always in the same order for the same seed; None keeps the set's order. In this
    order: flip: mirror each image left to right with probability 1/2. shifts: move each by up to so many pixels,
    borders reflected. degrees: rotate each by up to so many, either way. size: scale to this side. margin: crop each
    anywhere, with epoch_seed None in the centre. All are drawn from the same seed. part: (rank, processes): every
    batch's share of that process. rounds: passes over the split, each in another order. Raises DataError if a
    share is empty.
    """
    n, device, (rank, processes) = rounds * len(split.labels), split.images.device, part
    bounds = batch_bounds(n, batch_size, processes)
    if any(stop - start < processes for start, stop in bounds):
        raise DataError(f"{n:,} images in batches of {batch_size}; expected one for each of {processes} processes")
    if shifts >= min(split.images.shape[2:]):
        raise DataError(f"shifts by {shifts} pixels: expected less than the images' sides")
    generator = torch.Generator().manual_seed(0 if epoch_seed is None else epoch_seed)
    order = torch.arange(n) % len(split.labels) if epoch_seed is None else torch.cat(
        [torch.randperm(len(split.labels), generator=generator) for _ in range(rounds)])
    flipped = (torch.rand(n, generator=generator) < 0.5).to(device)
    offsets = torch.rand(n, 2, generator=generator).to(device) if margin and epoch_seed is not None else None
    angles = degrees * (2 * torch.rand(n, generator=generator).to(device) - 1) if degrees else None
    moves = torch.randint(-shifts, shifts + 1, (n, 2), generator=generator).to(device) if shifts else None
    order = order.to(device)
    pixels = split.images.permute(0, 2, 3, 1)  # (N, H, W, C), contiguous: an image is a row
    mean, std = _mean_std(pixels.shape[3], size * size if size else math.prod(pixels.shape[1:3]), device, scale)
    shift, factor = -mean / std, 1 / (255 * std)
    for start, stop in bounds:
        share = slice(start + rank, stop, processes)
        rows = order[share]
        images = pixels.index_select(0, rows).permute(0, 3, 1, 2)
        if flip:
            turned = flipped[share, None, None, None]
            images = images.flip(3) * turned + images * ~turned  # torch.where takes twice the time
        if shifts:
            images = move(images, moves[share])
        if degrees:
            images = rotate(images.float(), angles[share])
        images = _crop(images, size, margin, None if offsets is None else offsets[share])
        yield _affine(images, shift, factor), split.labels.index_select(0, rows)


# ---------------------------------------------------------------- python data.py

def save_samples(dataset, path):
    """Saves a sheet of up to ten training images of each of the first 20 classes."""
    from matplotlib.figure import Figure
    names, (_, height, _), images = dataset.classes[:20], dataset.train.images.shape[1:], []
    for label in range(len(names)):
        in_class = dataset.train.images[dataset.train.labels == label][:10]
        images += [*in_class, *[torch.full_like(in_class[0], 255)] * (10 - len(in_class))]
    grid = make_grid(images, nrow=10, padding=2, pad_value=255)
    figure = Figure(figsize=(8, 0.4 + 7 * grid.shape[1] / grid.shape[2]))
    axis = figure.subplots()
    axis.imshow(grid.permute(1, 2, 0).numpy())
    which = f"the first {len(names)} of " if len(names) < len(dataset.classes) else ""
    axis.set_title(f"{dataset.name}: up to ten training images of each of {which}{len(dataset.classes)} classes",
                   parse_math=False)  # a name may have two $
    axis.set_xticks([])
    axis.set_yticks([(height + 2) * (row + 0.5) for row in range(len(names))], names, parse_math=False)
    axis.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main(argv):
    parser = argparse.ArgumentParser(description="Prints a data set's classes and counts, saves a sheet of samples.")
    parser.add_argument("--dataset", help=f"{' '.join(NAMES)} shapes, a folder or an .npz; default: cifar10, or "
                        "shapes where it is unavailable")
    parser.add_argument("--data-dir", default="data", help="where named sets lie (default: data)")
    parser.add_argument("--size", type=int, help="scale and crop a folder's pictures of unequal sizes")
    parser.add_argument("--test-share", type=float, default=0.2, help="the share of a folder without train/ and "
                        "test/ that is drawn for the test (default: 0.2)")
    parser.add_argument("--output", default="outputs", help="where the sheet goes (default: outputs)")

    def fail(message):
        print(f"data.py: error: {message}", file=sys.stderr)
        sys.exit(2)
    parser.error = fail
    args = parser.parse_args(argv)
    if args.size is not None and not 1 <= args.size <= 1024:
        fail(f"--size {args.size}: expected 1 to 1024 pixels")
    if not 0 < args.test_share < 1:
        fail(f"--test-share {args.test_share:g}: expected a number above 0 and below 1")
    try:
        dataset = load(args.dataset, args.data_dir, size=args.size, test_share=args.test_share)
        path = Path(args.output, f"{dataset.name}_samples.png")
        shape = "x".join(map(str, dataset.train.images.shape[1:]))
        if args.size and tuple(dataset.train.images.shape[2:]) != (args.size, args.size):
            fail(f"--size {args.size}: has no effect on {dataset.name}, of {shape}; only a folder's pictures that are "
                 "larger or of unequal sizes are scaled as they are read, all others batch by batch")
        print(f"{dataset.name}: {dataset.source}, {len(dataset.classes)} classes, images {shape}")
        width = max(24, *map(len, dataset.classes))
        print(f"{'class':<{width}}{'train':>8}{'test':>8}")
        columns = [counts(split, len(dataset.classes)) for split in (dataset.train, dataset.test)]
        for name, train, test in (*zip(dataset.classes, *columns), ("total", *map(sum, columns))):
            print(f"{name:<{width}}{train:>8,}{test:>8,}", flush=True)
        try:
            save_samples(dataset, path)
        except OSError as error:
            fail(f"--output {args.output}: expected a folder to write to ({error.strerror})")
        print(f"saved {path}", flush=True)
    except DataError as error:
        fail(error)
    except KeyboardInterrupt:
        print("data.py: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `python data.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
