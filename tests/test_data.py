"""Sets from each source, their draws, and their batches against the plain computation."""
import contextlib
import errno
import functools
import gzip
import io
import math
import multiprocessing
import os
import re
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import data
from data import DataError, Split
from conftest import simulated_cuda


def make_folder(root, classes=("ant", "bee"), train=3, test=2, side=8, suffix="png", mode="RGB"):
    """An image folder whose picture i of class c in train is filled with 10 * c + i."""
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                colour = 10 * label + i if mode == "L" else (10 * label + i, 100, 200)
                Image.new(mode, (side, side), colour).save(root / part / name / f"{i}.{suffix}")
    return root


def class_folder(root, train, **arguments):
    """The same without train/ and test/: <class>/*."""
    make_folder(root / "parts", train=train, test=1, **arguments)
    for place in (root / "parts/train").iterdir():
        place.rename(root / place.name)
    for place in sorted((root / "parts").rglob("*"), reverse=True):
        place.unlink() if place.is_file() else place.rmdir()
    (root / "parts").rmdir()
    return root


def assert_equal(one, two):
    """Two Datasets are the same in all fields."""
    assert (one.name, one.source, one.classes, one.synthetic, one.named) == (
        two.name, two.source, two.classes, two.synthetic, two.named)
    for part in ("train", "test", "val", "labelled"):
        a, b = getattr(one, part), getattr(two, part)
        assert (a is None) == (b is None), part
        assert a is None or torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels), part


def numbered(n, channels=3, height=4, width=5, classes=2):
    """A Split whose image i is recognised by its values."""
    values = torch.arange(n * channels * height * width) % 251
    return data._split(values.view(n, channels, height, width).to(torch.uint8), torch.arange(n) % classes)


# ---------------------------------------------------------------- sources

def test_an_image_folder(tmp_path):
    dataset = data.load(str(make_folder(tmp_path / "bugs")))
    assert dataset.name == "bugs" and dataset.classes == ["ant", "bee"]
    assert dataset.train.images.shape == (6, 3, 8, 8) and dataset.test.images.shape == (4, 3, 8, 8)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert (dataset.test.images[:, 2] == 200).all()


def test_a_folder_read_by_several_processes_keeps_its_order(tmp_path, monkeypatch):
    make_folder(tmp_path, train=9, test=3)
    alone = data.load(str(tmp_path))
    monkeypatch.setattr(data, "CHUNK", 2)  # 12 chunks: read in worker processes
    shared = data.load(str(tmp_path))
    assert_equal(alone, shared)
    monkeypatch.setattr(data, "CACHE_FROM", 4)
    for _ in range(2):  # into the cache, and from it
        assert_equal(alone, data.load(str(tmp_path)))
    assert len(caches(tmp_path)) == 1


def test_the_test_part_alone_leaves_training_pictures_unread(tmp_path):
    folder = make_folder(tmp_path / "bugs")
    whole = data.load(str(folder))
    (folder / "train/bee/2.png").write_bytes(b"not a picture")
    alone = data.load(str(folder), test_only=True)
    assert torch.equal(alone.test.images, whole.test.images) and torch.equal(alone.test.labels, whole.test.labels)
    assert len(alone.train.labels) == 0 and alone.classes == whole.classes and not whole.test_drawn


def test_a_folder_is_grey_only_if_all_its_pictures_are(tmp_path):
    make_folder(tmp_path, mode="L")
    grey = data.load(str(tmp_path))
    assert grey.train.images.shape == (6, 1, 8, 8) and grey.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
    Image.new("RGB", (8, 8), "red").save(tmp_path / "test/bee/9.png")
    mixed = data.load(str(tmp_path))
    assert torch.equal(mixed.train.images, grey.train.images.expand(-1, 3, -1, -1))
    assert mixed.test.images[-1, :, 0, 0].tolist() == [255, 0, 0]


def test_a_folder_of_classes_alone_is_split_by_the_seed(tmp_path):
    root = class_folder(tmp_path / "bugs", train=10)
    made = data.load(str(root))
    assert made.source == f"{root} (image folder, 20 % drawn for the test)" and made.classes == ["ant", "bee"]
    assert made.test_drawn
    assert data.counts(made.train, 2) == [8, 8] and data.counts(made.test, 2) == [2, 2]
    values = torch.cat([made.train.images, made.test.images])[:, 0, 0, 0].tolist()
    assert sorted(values) == list(range(20))  # each picture once
    assert [value // 10 for value in values] == [*made.train.labels.tolist(), *made.test.labels.tolist()]
    assert_equal(made, data.load(str(root)))
    drawn = {tuple(data.load(str(root), seed=seed).test.images[:, 0, 0, 0].tolist()) for seed in range(5)}
    assert len(drawn) > 1
    half = data.load(str(root), test_share=0.5, test_only=True)
    assert data.counts(half.test, 2) == [5, 5] and len(half.train.labels) == 0
    assert "50 % drawn" in half.source


def test_another_class_leaves_the_test_images_of_the_others(tmp_path):
    """Else a network that was trained before would be tested on images of its training."""
    root = class_folder(tmp_path / "bugs", train=10)
    before = data.load(str(root))
    shutil.copytree(root / "bee", root / "aphid")  # sorted before the others
    after = data.choose(data.load(str(root)), ["ant", "bee"])
    assert torch.equal(after.test.images, before.test.images) and torch.equal(after.train.images, before.train.images)
    assert before.pool == {name: after.pool[name] for name in before.classes} and len(after.pool) == 3


def test_the_pool_is_what_the_seed_draws_the_test_images_from(tmp_path):
    root = class_folder(tmp_path / "bugs", train=10)
    before = data.load(str(root)).pool
    assert before == data.load(str(root), seed=1, test_size=2, test_only=True).pool  # not what it draws
    shutil.copytree(root, tmp_path / "moved")
    assert data.load(str(tmp_path / "moved")).pool == before
    shutil.copy(root / "bee/1.png", root / "bee/99.png")
    after = data.load(str(root)).pool
    assert after["ant"] == before["ant"] and after["bee"] != before["bee"]
    make_folder(tmp_path / "parts")  # with test images of its own
    assert data.load(str(tmp_path / "parts")).pool == {}
    whole = data.shapes(train=20, test=100)
    arrays = {"x_train": whole.train.images, "y_train": whole.train.labels, "x_test": whole.test.images.clone(),
              "y_test": whole.test.labels}
    np.savez(tmp_path / "set.npz", **arrays)
    one, two = (data.load(str(tmp_path / "set.npz"), test_size=10, seed=seed) for seed in (0, 1))
    assert one.pool == two.pool and not torch.equal(one.test.images, two.test.images)
    arrays["x_test"][99, 0, 31, 31] ^= 1  # of the last class
    np.savez(tmp_path / "set.npz", **arrays)
    changed = data.load(str(tmp_path / "set.npz"), test_size=10).pool
    assert [changed[name] == one.pool[name] for name in one.classes] == [True] * 9 + [False]


def test_a_digest_is_of_each_pixel_and_label():
    split = data.shapes(train=200, test=1).train
    made = data.Dataset("set", "of a test", data.SHAPES, split, split)
    before = data.digest(made, split)
    assert re.fullmatch("[0-9a-f]{16}", before)
    assert before == data.digest(made, Split(split.images.contiguous(), split.labels))
    for index in ((0, 0, 0, 0), (199, 2, 31, 31)):
        images = split.images.clone()
        images[index] ^= 1
        assert data.digest(made, Split(images, split.labels)) != before
    assert data.digest(made, Split(split.images, split.labels.flip(0))) != before


def test_the_digest_of_shapes_is_of_its_labels():
    """Some of its pixels, computed in float32, differ by 1 between kinds of processors."""
    made = data.shapes(train=200, test=1)
    before = data.digest(made, made.train)
    assert data.digest(made, Split(made.train.images ^ 1, made.train.labels)) == before
    assert data.digest(made, Split(made.train.images, made.train.labels.flip(0))) != before


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing")])
def test_folders_of_parts_are_no_classes(names, tmp_path):
    """In other words than train and test they would be a problem of two classes."""
    make_folder(tmp_path / "bugs")
    for before, name in zip(("train", "test"), names):
        (tmp_path / "bugs" / before).rename(tmp_path / f"{before}-part")
        (tmp_path / f"{before}-part").rename(tmp_path / "bugs" / name)
    with pytest.raises(DataError, match=f"has the folders {names[1]} and {names[0]}; expected train/<class>"):
        data.load(str(tmp_path / "bugs"))
    class_folder(tmp_path / "verbs", train=3)
    (tmp_path / "verbs/ant").rename(tmp_path / "verbs/training")
    assert data.load(str(tmp_path / "verbs")).classes == ["bee", "training"]


def test_each_class_of_a_split_folder_is_in_both_parts(tmp_path):
    root = class_folder(tmp_path / "bugs", train=2)
    for share in (0.01, 0.99):
        made = data.load(str(root), test_share=share)
        assert data.counts(made.train, 2) == data.counts(made.test, 2) == [1, 1]
    (root / "bee/1.png").unlink()
    with pytest.raises(DataError, match="class 'bee' has one picture"):
        data.load(str(root))


def test_unequal_pictures_need_a_size(tmp_path):
    make_folder(tmp_path)
    wide = Image.new("RGB", (24, 12), "black")
    wide.paste("white", (6, 0, 18, 12))  # a centre crop of it is white
    wide.save(tmp_path / "train/ant/9.png")
    with pytest.raises(DataError, match="9.png: is not 8x8.*--size"):
        data.load(str(tmp_path))
    dataset = data.load(str(tmp_path), size=6)
    assert dataset.train.images.shape == (7, 3, 6, 6)
    assert (dataset.train.images[3, :, :, 1:5] == 255).all()  # its edges are smoothed


def test_unusable_folders(tmp_path):
    with pytest.raises(DataError, match="no data set"):
        data.load(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="has no folder train/<class>; expected .* or <class>"):
        data.load(str(tmp_path))
    (tmp_path / "half/train/ant").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "half/train/ant/0.png")
    with pytest.raises(DataError, match="has no folder test/<class>"):
        data.load(str(tmp_path / "half"))
    root = make_folder(tmp_path / "set")
    (root / "train/bee/1.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="bee/1.png: not a picture"):
        data.load(str(root))
    (root / "train/bee/1.png").unlink()
    cut = (root / "test/ant/0.png").read_bytes()[:50]
    (root / "test/ant/0.png").write_bytes(cut)
    with pytest.raises(DataError, match="ant/0.png: cannot be read"):
        data.load(str(root))
    (root / "test/wasp").mkdir()
    with pytest.raises(DataError, match="only one of them has wasp"):
        data.load(str(root))
    (root / "train/wasp").mkdir()
    with pytest.raises(DataError, match="wasp"):
        data.load(str(root))


@pytest.mark.parametrize("mode, expected", [
    ("RGB", (200, 100, 50)), ("L", (90, 90, 90)), ("P", (200, 100, 50)), ("1", (255, 255, 255)),
    ("RGBA", (255, 255, 255)), ("I;16", (117, 117, 117)), ("CMYK", (200, 100, 50))])
def test_pictures_of_every_mode(tmp_path, mode, expected):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        picture = Image.fromarray(np.full((4, 6), 30000, np.uint16))  # 30000 / 65536 of the range
    elif mode == "RGBA":
        picture = Image.new("RGBA", (6, 4), (200, 100, 50, 0))  # wholly transparent: white
    elif mode in ("P", "CMYK"):
        picture = Image.new("RGB", (6, 4), (200, 100, 50)).convert(mode)
    else:
        picture = Image.new(mode, (6, 4), {"RGB": (200, 100, 50), "L": 90, "1": 1}[mode])
    picture.save(path)
    pixels = data.read_image(path)
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.reshape(-1, 3).astype(int) - expected).max() <= (8 if mode in "CMYK P" else 0)


def test_a_picture_with_a_damaged_exif_is_an_error_that_names_it(tmp_path):
    """Its width, tag 0x101, is a text, which Pillow fails to write again without its orientation."""
    exif = (b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x01\0\x02\0\0\0\x06\0\0\0&\x01\x12\0\x03\0\0\0\x01\0\x06"
            b"\0\0\0\0\0\0hello\0")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(data.DataError, match=r"a\.jpg: cannot be read as a picture"):
        data.read_image(tmp_path / "a.jpg")


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    picture = Image.new("RGB", (6, 4), "black")
    picture.paste("white", (0, 0, 6, 1))  # the top row, which orientation 6 turns to the right
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    pixels = data.read_image(tmp_path / "a.png")
    assert pixels.shape == (6, 4, 3)
    assert (pixels[:, 3] == 255).all() and (pixels[:, :3] == 0).all()


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    with pytest.raises(DataError, match="a.png: has too many pixels"):
        data.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("channels, fit, blur", [(3, (6, 6), 0.0), (1, (6, 6), 0.0), (3, (6, 6), 1.5)])
def test_a_single_picture_is_read_as_the_test_images_are(tmp_path, channels, fit, blur):
    """Turned by EXIF, of the set's channels and size, blurred."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    noise = noise if channels == 3 else noise[..., :1].repeat(3, 2)
    exif = Image.new("L", (1, 1)).getexif()
    exif[0x0112] = 6
    for part, size in (("train", fit[0]), ("test", 8)):
        (tmp_path / part / "ant").mkdir(parents=True)
        Image.fromarray(noise).resize((size, size)).save(tmp_path / part / "ant/0.png", exif=exif)
    dataset = data.load(str(tmp_path), size=6, blur=blur)
    assert dataset.test.images.shape == (1, channels, *fit)
    images = data.read_picture(tmp_path / "test/ant/0.png", channels, fit, blur)
    assert torch.equal(images, dataset.test.images) and images.dtype == torch.uint8


def npz(path, **changes):
    arrays = dict(x_train=np.arange(6 * 4 * 5 * 3).reshape(6, 4, 5, 3).astype(np.uint8),
                  y_train=np.array([0, 1, 2, 0, 1, 2]),
                  x_test=np.zeros((2, 4, 5, 3), np.uint8), y_test=np.array([2, 0]))
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def test_an_npz_in_each_layout(tmp_path):
    dataset = data.load(npz(tmp_path / "a.npz", classes=np.array(["x", "y", "z"])))
    assert dataset.classes == ["x", "y", "z"] and dataset.named
    assert dataset.train.images.shape == (6, 3, 4, 5)
    assert dataset.train.images[1, 2, 3, 4] == (((1 * 4 + 3) * 5 + 4) * 3 + 2) % 256
    first = np.arange(6 * 3 * 4 * 5).reshape(6, 3, 4, 5).astype(np.uint8)
    dataset = data.load(npz(tmp_path / "b.npz", x_train=first, x_test=first[:2]))
    assert torch.equal(dataset.train.images, torch.from_numpy(first))
    assert dataset.classes == ["0", "1", "2"] and not dataset.named
    grey = np.zeros((6, 4, 5), np.uint8)
    dataset = data.load(npz(tmp_path / "c.npz", x_train=grey, x_test=grey[:2],
                            y_train=np.array([[0], [1], [2], [0], [1], [2]])))
    assert dataset.train.images.shape == (6, 1, 4, 5) and dataset.train.labels.shape == (6,)


@pytest.mark.parametrize("changes, expected", [
    (dict(y_test=None), "expected x_train y_train x_test y_test"),
    (dict(x_train=np.zeros((6, 4, 5, 3))), "x_train is float64"),
    (dict(x_train=np.zeros((6, 4, 5, 2), np.uint8)), "1 or 3 channels"),
    (dict(x_train=np.zeros(6, np.uint8)), "x_train is uint8 of shape"),
    (dict(y_train=np.array([0, 1, 2])), "for each of 6 images"),
    (dict(y_train=np.array([0., 1, 2, 0, 1, 2])), "y_train is float64"),
    (dict(y_train=np.array(list("abcabc"))), "y_train is <U1"),
    (dict(y_train=np.array([0, 1, -1, 0, 1, 2])), "y_train has the label -1"),
    (dict(y_test=np.array([0, 3])), "y_test has the label 3; labels count from 0: expected 0 to 2"),
    (dict(y_train=np.array([0, 0, 2, 0, 0, 2])), "y_train has the label 2; labels count from 0: expected 0 to 1"),
    (dict(x_test=np.zeros((2, 4, 4, 3), np.uint8)), "expected one shape"),
    (dict(classes=np.array(["a"])), "expected one shape and 3 names"),
    (dict(y_train=np.array([{}, 1, 2, 0, 1, 2], dtype=object)), "plain arrays"),
])
def test_an_unusable_npz(tmp_path, changes, expected):
    with pytest.raises(DataError, match=expected) as error:
        data.load(npz(tmp_path / "a.npz", **changes))
    assert "a.npz" in str(error.value) and "\n" not in str(error.value)


def test_the_training_images_of_an_npz_stay_unread_for_the_test_alone(tmp_path):
    whole = data.load(npz(tmp_path / "a.npz"))
    path = npz(tmp_path / "b.npz", x_train=np.array([{}], dtype=object))  # cannot be read without pickle
    alone = data.load(path, test_only=True)
    assert torch.equal(alone.test.images, whole.test.images) and alone.classes == whole.classes
    assert len(alone.train.labels) == len(alone.train.images) == 0
    with pytest.raises(DataError, match="plain arrays"):
        data.load(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK not really")
    with pytest.raises(DataError, match="a.npz: cannot be read"):
        data.load(str(tmp_path / "a.npz"))
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match="a.txt: expected a folder"):
        data.load(str(tmp_path / "a.txt"))


PIXELS = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)


def write_mnist(root, labels=(7, 0, 4)):
    """Files as torchvision keeps them: big-endian headers, then bytes."""
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for name, magic, array in (("images-idx3-ubyte", 2051, PIXELS),
                                   ("labels-idx1-ubyte", 2049, np.array(labels, np.uint8))):
            header = struct.pack(f">{array.ndim + 1}i", magic, *array.shape)
            (raw / f"{part}-{name}").write_bytes(header + array.tobytes())
            with gzip.open(raw / f"{part}-{name}.gz", "wb") as file:
                file.write(header + array.tobytes())
    return raw


def test_mnist_in_torchvisions_layout(tmp_path):
    write_mnist(tmp_path)
    dataset = data.load("mnist", tmp_path)
    assert torch.equal(dataset.train.images, torch.from_numpy(PIXELS)[:, None])
    assert dataset.test.labels.tolist() == [7, 0, 4] and dataset.classes[7] == "7" and dataset.named
    alone = data.load("mnist", tmp_path, test_only=True)
    assert torch.equal(alone.test.images, dataset.test.images) and alone.train.images.shape == (0, 1, 28, 28)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", [lambda raw: raw[:len(raw) // 2], lambda raw: raw[:5], lambda raw: b"",
                                    lambda raw: raw + b"more", lambda raw: b"\xff" * 8 + raw[8:]],
                         ids=["cut", "header cut", "empty", "longer", "header"])
def test_a_damaged_file_of_torchvision_is_named_as_such(tmp_path, no_network, name, damage):
    raw = write_mnist(tmp_path)
    (raw / name).write_bytes(damage((raw / name).read_bytes()))
    with pytest.raises(DataError, match="MNIST: damaged .*; delete it to download it again") as error:
        data.load("mnist", tmp_path)
    assert "\n" not in str(error.value) and "could not be downloaded" not in str(error.value)


@pytest.mark.parametrize("labels", [(7, 0), (7, 0, 10)])
def test_labels_that_do_not_match_the_images_are_damage(tmp_path, no_network, labels):
    write_mnist(tmp_path, labels)
    with pytest.raises(DataError, match="MNIST: damaged .*labels"):
        data.load("mnist", tmp_path)


def test_an_incomplete_set_that_cannot_be_downloaded_is_named(tmp_path, no_network):
    raw = write_mnist(tmp_path)
    for path in raw.glob("t10k-images*"):
        path.unlink()
    with pytest.raises(DataError, match="MNIST: damaged or incomplete, and could not be downloaded"):
        data.load("mnist", tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"cut")
    with pytest.raises(DataError, match="cifar-10-batches-py: damaged or incomplete"):
        data.load(None, tmp_path)  # shapes do not stand in for it


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")
    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_a_named_set_is_found_as_an_image_folder(tmp_path, no_network):
    make_folder(tmp_path / "cifar10")
    dataset = data.load("cifar10", tmp_path)
    assert dataset.name == "cifar10" and dataset.classes == ["ant", "bee"]
    assert "image folder" in dataset.source


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_an_unavailable_set_is_an_error_and_leaves_nothing(tmp_path, no_network, name):
    with pytest.raises(DataError, match=f"{name} is neither in .*--dataset shapes"):
        data.load(name, tmp_path / "deep" / "data")
    assert list(tmp_path.iterdir()) == []


def test_without_a_name_shapes_stand_in_with_a_warning(tmp_path, no_network, few_shapes, capsys):
    assert data.load(None, tmp_path).name == "shapes"
    warning = capsys.readouterr().err
    assert "WARNING: cifar10 is neither" in warning and "say nothing about CIFAR-10" in warning


def test_folders_do_not_hide_the_sets_of_those_names(tmp_path, no_network, few_shapes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "shapes")
    make_folder(tmp_path / "mnist")
    assert data.load("shapes").classes == data.SHAPES
    with pytest.raises(DataError, match="mnist is neither in data/"):
        data.load("mnist")
    assert data.load("./shapes").classes == ["ant", "bee"]


def test_shapes_do_not_stand_in_for_a_set_that_is_there_but_broken(tmp_path, no_network):
    root = make_folder(tmp_path / "cifar10")
    (root / "test/bee/1.png").write_bytes(b"")
    with pytest.raises(DataError, match="bee/1.png"):
        data.load(None, tmp_path)


def test_a_set_whose_reader_is_missing_is_not_downloaded(tmp_path, monkeypatch):
    asked = []

    def make(root, download, **arguments):
        asked.append(download)
        raise RuntimeError("Dataset not found")
    monkeypatch.setitem(data.NAMES, "svhn", (make, "*_32x32.mat", {}, {}))
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(DataError, match="pip install scipy"):
        data.load("svhn", tmp_path)
    assert asked == [False]


@pytest.mark.parametrize("wrong, message", [
    (dict(variant="oversample", constrain={"ring": 0.5}), "--variant oversample: expected one of complete constr"),
    (dict(constrain={"ring": 0.5}), "--constrain: has no effect without --variant"),
    (dict(variant="constrained", constrain={"ring": 2.5}), "shares {'ring': 2.5}: expected numbers above 0, at most 1"),
    (dict(variant="constrained", constrain={"ring": -0.5}), "shares .*: expected numbers above 0"),
    (dict(train_size=-3), "--train-size -3: expected at least 1"), (dict(test_size=0), "--test-size 0: expected"),
    (dict(labels=-3), "--labels -3: expected at least 1"),
    (dict(classes="ring,ring"), "a class twice; shapes has circle,ring")])
def test_wrong_arguments_of_load_are_refused(wrong, message, few_shapes):
    with pytest.raises(DataError, match=message):
        data.load("shapes", **wrong)


def test_a_picture_of_more_than_16_bits_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(DataError, match="wide.tif: cannot be read as a picture .more than 16 bits a pixel."):
        data.read_image(tmp_path / "wide.tif")
    Image.fromarray(np.full((4, 4), 40_000, np.int32)).save(tmp_path / "fits.tif")
    assert (data.read_image(tmp_path / "fits.tif") == 40_000 // 256).all()


def test_a_reader_that_torchvision_lacks_is_named(tmp_path, monkeypatch):
    def needs_scipy(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
    monkeypatch.setitem(data.NAMES, "svhn", (needs_scipy, "*_32x32.mat", {}, {}))
    with pytest.raises(DataError, match="pip install scipy"):
        data.load("svhn", tmp_path)


# ---------------------------------------------------------------- steps

@pytest.fixture
def few_shapes(monkeypatch):
    """The built-in set of 200 + 100 images, quickly drawn."""
    monkeypatch.setattr(data, "shapes", functools.partial(data.shapes, 200, 100))


@pytest.mark.parametrize("arguments", [
    {}, dict(seed=4), dict(variant="smote", constrain={"ring": 0.5, "star": 0.3}, labels=50, val_share=0.2),
    dict(classes=["star", "ring", "bars"], train_size=40, test_size=9, seed=2, blur=0.7),
    dict(train_size=80, labels=20, variant="constrained", constrain={"bars": 0.4}, blur=1.1, val_share=0.1, seed=3)])
def test_load_is_its_steps_called_one_by_one(arguments, few_shapes):
    s = dict(classes=None, train_size=None, test_size=None, val_share=0, labels=None, variant="complete",
             constrain=None, blur=0, seed=0) | arguments
    expected, seed = data.shapes(), s["seed"]
    if s["classes"]:
        expected = data.choose(expected, s["classes"])
    if s["train_size"]:
        expected.train = data.take(expected.train, s["train_size"], seed)
    if s["test_size"]:
        expected.test = data.take(expected.test, s["test_size"], seed)
    if s["val_share"]:
        expected.train, expected.val = data.hold_out(expected.train, s["val_share"], seed)
    expected.train, expected.synthetic = data.vary(expected.train, expected.classes, s["variant"], s["constrain"],
                                                   seed)
    if s["labels"]:
        expected.labelled = data.take(expected.train, s["labels"], seed)
    if s["blur"]:
        expected = expected.map(lambda split: data.Split(data.blurred(split.images, s["blur"]), split.labels))
    made = data.load("shapes", **arguments)
    assert_equal(made, expected)
    assert (made.labelled is None) == ("labels" not in arguments)
    alone = data.load("shapes", **arguments, test_only=True)
    assert torch.equal(alone.test.images, made.test.images) and alone.classes == made.classes
    assert len(alone.train.labels) == 0 and alone.val is None and alone.labelled is None


@pytest.mark.parametrize("arguments, expected", [
    (dict(classes=["dog"]), "--classes dog: no class 'dog'"), (dict(train_size=201), "--train-size: 201 images asked"),
    (dict(test_size=101), "--test-size: 101 images"), (dict(val_share=0.001), "--val-share: a share of 0.001 of 200"),
    (dict(variant="constrained"), "--variant constrained: leaves all images as they are"),
    (dict(variant="smote", constrain={"ring": 0.05}), "--variant smote: class 1 has 1 training images"),
    (dict(labels=201), "--labels: 201 images asked for; the set has 200"),
    (dict(labels=181, val_share=0.1), "--labels: 181 images asked for; the set has 180")])
def test_an_error_of_a_step_names_its_flag(arguments, expected, few_shapes):
    with pytest.raises(DataError, match=f"^{expected}"):
        data.load("shapes", **arguments)


def test_a_dataset_moves_with_all_its_splits(few_shapes):
    made = data.load("shapes", train_size=100, labels=20, val_share=0.1).to("meta")
    for split in (made.train, made.test, made.val, made.labelled):
        assert split.images.device.type == split.labels.device.type == "meta"
    assert made.train.images.shape == (90, 3, 32, 32) and made.classes == data.SHAPES


# ---------------------------------------------------------------- what is read of a folder, memory, cache

@pytest.fixture
def reads(monkeypatch):
    """The pictures that are read, in a list."""
    paths, read_image = [], data.read_image

    def recorded(path, *arguments, **more):
        paths.append(str(path))
        return read_image(path, *arguments, **more)
    monkeypatch.setattr(data, "read_image", recorded)
    return paths


def test_only_the_chosen_pictures_of_a_folder_are_read(tmp_path, reads):
    root = make_folder(tmp_path, classes=("ant", "bee", "cow"), train=8, test=3)
    whole = data.load(str(root))
    flags = dict(classes=["bee", "cow"], train_size=6, test_size=2, val_share=0.34, seed=1)
    reads.clear()
    made = data.load(str(root), **flags)
    assert len(reads) == 1 + 6 + 2 and reads[0] in reads[1:] and len(set(reads)) == 8  # the first for its shape
    assert not any("/ant/" in path for path in reads)
    expected = data.choose(whole, flags["classes"])
    train, expected.test = data.take(expected.train, 6, 1), data.take(expected.test, 2, 1)
    expected.train, expected.val = data.hold_out(train, 0.34, 1)
    assert_equal(made, expected)


@pytest.mark.parametrize("cache_from", [1000, 1])
def test_pictures_of_a_class_that_is_left_out_may_be_unequal_or_damaged(tmp_path, monkeypatch, cache_from):
    monkeypatch.setattr(data, "CACHE_FROM", cache_from)
    root = make_folder(tmp_path, classes=("ant", "bee", "cow"))
    flags = dict(classes=["bee", "cow"])
    expected = data.load(str(root), **flags)
    Image.new("RGB", (5, 7)).save(root / "train/ant/1.png")
    for damaged in (False, True):
        if damaged:
            (root / "train/ant/0.png").write_bytes(b"damaged")
        assert_equal(data.load(str(root), **flags), expected)
        with pytest.raises(DataError, match="cannot be read|not a picture" if damaged else "is not 8x8 as the first"):
            data.load(str(root))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_sides_of_a_picture_are_those_that_it_is_read_with(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (6, 4)).save(tmp_path / f"a.{suffix}", exif=exif)
    height, width, _ = data.read_image(tmp_path / f"a.{suffix}").shape
    assert data._sides(tmp_path / f"a.{suffix}") == (width, height)


def test_test_images_are_the_same_whether_the_training_images_are_read_or_not(tmp_path):
    """One training picture of another size: all are then fitted as they are read, not batch by batch."""
    root = make_folder(tmp_path)
    Image.new("RGB", (9, 8)).save(root / "train/bee/2.png")
    whole, alone = (data.load(str(root), size=16, test_only=test_only).test for test_only in (False, True))
    assert whole.images.shape[2:] == (16, 16) and torch.equal(whole.images, alone.images)
    Image.new("RGB", (8, 8)).save(root / "train/bee/2.png")
    assert data.load(str(root), size=16, test_only=True).test.images.shape[2:] == (8, 8)


@pytest.mark.parametrize("free, flags, expected", [
    (30 * 64 * 64 * 3 - 1, {}, "the images take 0.00 GB, 0.00 GB of memory are free; --size 56 or --train-size 16"),
    (30 * 64 * 64 * 3 - 1, dict(size=64), "--size 56 or --train-size 16 fits"),
    (11 * 64 * 64 * 3, dict(test_only=True, test_size=10), None), (30 * 48 * 48 * 3, dict(size=48), None),
    (5 * 64 * 64 * 3, dict(classes=["ant"]), "--size 32 fits"), (100, {}, "no --size fits"),
    (11 * 64 * 64 * 3, dict(classes=["ant"], train_size=2), None)])
def test_a_folder_that_does_not_fit_in_memory_is_refused(tmp_path, monkeypatch, reads, free, flags, expected):
    root = make_folder(tmp_path, train=10, test=5, side=64)
    monkeypatch.setattr(data, "free_memory", lambda: free)
    if expected is None:
        made = data.load(str(root), **flags)
        assert made.test.images.shape[2:] == (flags.get("size", 64),) * 2
        return
    with pytest.raises(DataError, match=expected) as error:
        data.load(str(root), **flags)
    assert len(reads) <= 1 and str(error.value).startswith(f"{root}: ") and "\n" not in str(error.value)
    for flag, value in re.findall(r"--(size|train-size) (\d+)", str(error.value)):  # each of them does fit
        data.load(str(root), **flags | {flag.replace("-", "_"): int(value)})


def test_a_folder_too_large_is_fitted_as_each_picture_alone_would_be(tmp_path, monkeypatch):
    root = make_folder(tmp_path, side=16)
    monkeypatch.setattr(data, "free_memory", lambda: 10 * 16 * 16 * 3 - 1)
    made = data.load(str(root), size=8)
    expected = data.read_image(root / "train/bee/1.png", fit=(8, 8))
    assert np.array_equal(made.train.images[4].permute(1, 2, 0).numpy(), expected)


def test_an_npz_that_does_not_fit_in_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    images = np.zeros((1000, 8, 8, 3), np.uint8)
    labels = np.arange(1000) % 3
    np.savez_compressed(path, x_train=images, y_train=labels, x_test=images[:9], y_test=labels[:9])
    monkeypatch.setattr(data, "free_memory", lambda: 100_000)
    with pytest.raises(DataError, match="a.npz: the images take 0.00 GB.*expected a smaller .npz"):
        data.load(str(path))
    assert len(data.load(str(path), test_only=True).test.labels) == 9
    monkeypatch.setattr(data, "free_memory", lambda: 1009 * 192 + 512)
    assert len(data.load(str(path)).train.labels) == 1000


@pytest.mark.parametrize("files, expected", [
    ({}, math.inf),
    ({"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:    500 kB\n", "proc/self/cgroup": "0::/\n"}, 500 * 1024),
    # Version 2: a limit of the group above, 70,000 of whose bytes are cached files.
    ({"proc/meminfo": "MemAvailable: 500 kB\n", "proc/self/cgroup": "0::/job/step\n",
      "sys/fs/cgroup/job/memory.max": "300000\n", "sys/fs/cgroup/job/memory.current": "200000\n",
      "sys/fs/cgroup/job/memory.stat": "inactive_anon 5\ninactive_file 70000\n",
      "sys/fs/cgroup/job/step/memory.max": "max\n"}, 170_000),
    # Version 1, seen from inside a container: only the root is there.
    ({"proc/meminfo": "MemAvailable: 500 kB\n", "proc/self/cgroup": "4:memory:/docker/1\n3:cpu,cpuacct:/\n",
      "sys/fs/cgroup/memory/memory.limit_in_bytes": "100000", "sys/fs/cgroup/memory/memory.usage_in_bytes": "90000",
      "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 2000\n"}, 12_000)])
def test_free_memory_is_the_least_that_any_limit_leaves(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(data, "Path", lambda path: Path(f"{tmp_path}{path}"))
    assert data.free_memory() == expected


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """An image folder of 10 pictures that is large enough to have a cache."""
    monkeypatch.setattr(data, "CACHE_FROM", 4)
    return make_folder(tmp_path / "bugs")


def caches(root):
    return sorted(path.name for path in root.glob(".cache-*"))


def test_the_second_load_of_a_folder_decodes_nothing(cached, reads):
    first = data.load(str(cached))
    assert len(reads) == 1 + 10 and len(caches(cached)) == 1
    reads.clear()
    assert_equal(data.load(str(cached)), first)
    flags = dict(classes=["bee"], train_size=1, test_size=1)
    alone = data.load(str(cached), **flags)
    assert alone.train.images.shape == (1, 3, 8, 8) and alone.test.labels.tolist() == [0] and reads == []
    (cached / caches(cached)[0]).unlink()
    assert_equal(data.load(str(cached), **flags), alone)  # too few pictures to decode all of them
    assert len(reads) == 3 and caches(cached) == []


def test_the_cache_of_a_folder_does_not_depend_on_the_way_to_it(cached, reads, monkeypatch):
    data.load(str(cached))
    reads.clear()
    monkeypatch.chdir(cached)
    assert len(data.load(".").train.labels) == 6 and reads == []
    monkeypatch.chdir(cached.parent)
    assert len(data.load("bugs").train.labels) == 6 and reads == []


def test_a_cache_of_fitted_pictures(cached, reads):
    Image.new("RGB", (24, 12)).save(cached / "train/ant/9.png")
    first = data.load(str(cached), size=6)
    assert first.train.images.shape == (7, 3, 6, 6) and caches(cached)[0].startswith(".cache-6-")
    reads.clear()
    assert_equal(data.load(str(cached), size=6), first)
    assert reads == []
    assert data.load(str(cached), size=5).test.images.shape == (4, 3, 5, 5)
    assert [name.split("-")[1] for name in caches(cached)] == ["5", "6"]


def test_a_grey_folder_has_a_grey_cache(tmp_path, monkeypatch, reads):
    monkeypatch.setattr(data, "CACHE_FROM", 4)
    root = make_folder(tmp_path, mode="L")
    first = data.load(str(root))
    reads.clear()
    again = data.load(str(root))
    assert_equal(again, first)
    assert again.train.images.shape == (6, 1, 8, 8) and reads == []


def change_pixels(root):
    time = os.stat(root / "train/ant/1.png").st_mtime_ns
    Image.new("RGB", (8, 8), (200, 0, 0)).save(root / "train/ant/1.png")
    os.utime(root / "train/ant/1.png", ns=(time + 1, time + 1))


@pytest.mark.parametrize("change", [
    change_pixels, lambda root: (root / "train/ant/1.png").unlink(),
    lambda root: (root / "train/ant/1.png").rename(root / "train/bee/9.png"),
    lambda root: Image.new("RGB", (8, 8)).save(root / "test/bee/9.png")], ids=["pixels", "deleted", "moved", "added"])
def test_a_changed_folder_is_read_anew_and_its_old_cache_deleted(cached, change, reads):
    data.load(str(cached))
    before = caches(cached)
    (cached / ".cache-full-0123456789abcdef.npy.99").write_text("left by a killed process")
    (cached / ".cache-notes.npy").write_text("not of this program")
    change(cached)
    reads.clear()
    made = data.load(str(cached))
    assert len(reads) == 1 + len(made.train.labels) + len(made.test.labels)
    assert (cached / ".cache-notes.npy").exists()
    (cached / ".cache-notes.npy").unlink()
    assert len(caches(cached)) == 1 and caches(cached) != before
    (cached / caches(cached)[0]).unlink()
    assert_equal(made, data.load(str(cached)))


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:50], lambda raw: raw[:-1], lambda raw: b"PK" + raw, lambda raw: b"text" * 400,
    lambda raw: raw.replace(b"|u1", b"|i1"), lambda raw: raw.replace(b"(10, 8, 8, 3)", b"(5, 16, 8, 3)"),
    lambda raw: raw.replace(b"{", b"(", 1)])
def test_a_damaged_cache_is_written_anew(cached, reads, damage):
    first = data.load(str(cached))
    path = cached / caches(cached)[0]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    reads.clear()
    assert_equal(data.load(str(cached)), first)
    assert len(reads) == 11 and path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_leaves_the_pictures_in_memory(cached, reads, monkeypatch):
    def read_only(path, mode="r", *arguments):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    class Full(io.FileIO):
        """A file on a disk without room for pictures."""
        def write(self, content):
            if isinstance(content, np.ndarray):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    expected = data.load(str(cached))
    for name, opened in (("read-only", read_only), ("full", Full)):
        for path in cached.glob(".cache*"):
            path.unlink()
        monkeypatch.setattr(data, "open", opened, raising=False)
        assert_equal(data.load(str(cached)), expected)
        assert caches(cached) == [], name
    monkeypatch.setattr(data, "open", open)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3000))
    assert_equal(data.load(str(cached)), expected)
    assert caches(cached) == []


def load_and_count(root, ready, answers):
    """In a process of its own: the number of pictures decoded, and the sum of the values."""
    paths, read_image = [], data.read_image

    def recorded(path, *arguments, **more):
        paths.append(path)
        return read_image(path, *arguments, **more)
    data.read_image = recorded
    ready.release()
    made = data.load(root)
    answers.put((len(paths), made.train.images.sum().item()))


@pytest.mark.skipif(sys.platform == "win32", reason="has no fcntl")
def test_processes_that_start_at_once_decode_once(cached):
    import fcntl
    context = multiprocessing.get_context("fork")
    ready, answers = context.Semaphore(0), context.Queue()
    with open(cached / ".cache.lock", "w") as file:  # as another process that is decoding
        fcntl.lockf(file, fcntl.LOCK_EX)
        processes = [context.Process(target=load_and_count, args=(str(cached), ready, answers)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            ready.acquire()
        assert answers.empty() and caches(cached) == []
    results = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for count, _ in results) == [0, 0, 11]
    assert {total for _, total in results} == {data.load(str(cached)).train.images.sum().item()}


# ---------------------------------------------------------------- shapes

def test_shapes_are_the_same_at_every_run_and_balanced():
    a, b = data.shapes(train=200, test=50), data.shapes(train=200, test=50)
    assert torch.equal(a.train.images, b.train.images) and torch.equal(a.test.labels, b.test.labels)
    assert a.train.labels.bincount().tolist() == [20] * 10
    assert a.test.labels.bincount().tolist() == [5] * 10
    both = torch.cat([a.train.images, a.test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 250  # no image is twice in it, none of train in test


@pytest.mark.parametrize("name, area", [
    ("circle", np.pi * 0.64), ("ring", np.pi * (0.81 - 0.25)), ("square", 1.96), ("bars", 2 * 0.5 * 1.8),
    ("cross", 2 * 1.9 * 0.56 - 0.56 ** 2)])
def test_a_shape_covers_the_area_that_geometry_says(name, area):
    """A circle of radius 0.8, a ring from 0.5 to 0.9, a square of side 1.4, bars of 0.5 x 1.8, a cross of
    two beams of 1.9 x 0.56."""
    axis = torch.linspace(-1.5, 1.5, 1501)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    share = (data.OUTSIDE[name](x, y) < 0).float().mean().item()
    assert share * 9 == pytest.approx(area, rel=0.01)


def test_the_shapes_differ_from_each_other():
    axis = torch.linspace(-1.2, 1.2, 49)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    masks = torch.stack([outside(x, y) < 0 for outside in data.OUTSIDE.values()]).flatten(1).float()
    assert data.SHAPES == list(data.OUTSIDE) and len(data.SHAPES) == 10
    unlike = torch.cdist(masks, masks, p=1) + 1e9 * torch.eye(10)
    assert unlike.min() > 0.02 * 49 ** 2


# ---------------------------------------------------------------- draws and batches

def test_what_is_held_out_leaves_an_image_of_each_class(tmp_path):
    images, labels = np.zeros((121, 2, 2), np.uint8), np.array([0] * 60 + [1] * 60 + [2])
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels,
             classes=np.array(["ant", "bee", "cow"]))
    with pytest.raises(DataError, match="--val-share 0.1: leaves no training image of class 'cow'"):
        data.load(str(tmp_path / "set.npz"), val_share=0.1)
    made = data.load(str(tmp_path / "set.npz"), val_share=0.1, classes=["ant", "bee"])
    assert data.counts(made.train, 2) == [54, 54] and data.counts(made.val, 2) == [6, 6]
    whole = data.load(str(tmp_path / "set.npz"))
    assert data.counts(data.hold_out(whole.train, 0.1, seed=0)[1], 3) == [6, 5, 1]  # kNN may hold it out, to choose k


def test_take_draws_in_proportion_with_the_seed():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    split = Split(torch.arange(100).to(torch.uint8).view(-1, 1, 1, 1), labels)
    drawn = data.take(split, 20, seed=1)
    assert drawn.labels.bincount().tolist() == [12, 6, 2]
    assert torch.equal(drawn.labels, labels[drawn.images.flatten().long()])  # pairs stay together
    assert len(drawn.images.unique()) == 20
    assert torch.equal(drawn.images, data.take(split, 20, seed=1).images)
    assert not torch.equal(drawn.images, data.take(split, 20, seed=2).images)
    assert data.take(split, 3, seed=0).labels.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="the set has 100"):
        data.take(split, 101, seed=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_the_plain_computation(channels):
    split = numbered(10, channels)
    mean, std = np.array(data.MEAN), np.array(data.STD)
    if channels == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    expected = (split.images.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    got = list(data.batches(split, 4))
    assert [len(labels) for _, labels in got] == [4, 4, 2]
    np.testing.assert_allclose(torch.cat([x for x, _ in got]).numpy(), expected, atol=1e-5)
    assert torch.cat([y for _, y in got]).tolist() == split.labels.tolist()
    pixels = data.to_pixels(got[0][0])
    torch.testing.assert_close(pixels, split.images[:4] / 255, atol=1e-5, rtol=0)


def test_an_epoch_has_each_image_once_in_an_order_of_its_seed():
    split = numbered(23)
    def order(seed):
        rows = torch.cat([images for images, _ in data.batches(split, 5, epoch_seed=seed)])
        plain = torch.cat([images for images, _ in data.batches(split, 23)])
        return [(plain == row).flatten(1).all(1).nonzero().item() for row in rows]
    assert sorted(order(1)) == list(range(23))
    assert order(1) == order(1) and order(1) != order(2) and order(1) != list(range(23))


def test_flips_turn_about_half_of_the_images_left_to_right():
    split = numbered(400)
    plain = torch.cat([images for images, _ in data.batches(split, 64, epoch_seed=3)])
    mixed = torch.cat([images for images, _ in data.batches(split, 64, epoch_seed=3, flip=True)])
    same = (mixed == plain).flatten(1).all(1)
    turned = (mixed == plain.flip(3)).flatten(1).all(1)
    assert (same ^ turned).all()
    assert 150 < turned.sum() < 250


def test_moved_images_are_reflected_at_their_borders():
    images = torch.arange(4 * 2 * 5 * 6).view(4, 2, 5, 6)
    moves = torch.tensor([[0, 0], [2, -1], [-2, 2], [1, 0]])
    padded = F.pad(images.double(), (2, 2, 2, 2), "reflect").long()
    for moved, padded, (down, right) in zip(data.move(images, moves), padded, moves.tolist()):
        assert torch.equal(moved, padded[:, 2 - down:7 - down, 2 - right:8 - right])


def test_shifts_are_drawn_for_each_image_and_leave_the_other_draws():
    split = data.shapes(train=400, test=10).train
    plain, shifted = (torch.cat([images for images, _ in
                                 data.batches(split, 64, epoch_seed=3, flip=True, shifts=shifts)])
                      for shifts in (0, 1))
    moves = {(down, right): data.move(plain, torch.tensor([[down, right]]).expand(400, 2))
             for down in (-1, 0, 1) for right in (-1, 0, 1)}
    counts = [(shifted == moved).flatten(1).all(1).sum().item() for moved in moves.values()]
    assert sum(counts) == 400 and min(counts) > 20  # 44 are expected of each of the nine


def test_a_shift_by_a_whole_side_is_refused():
    split = data.Split(torch.zeros(3, 1, 8, 5, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    next(data.batches(split, 3, epoch_seed=0, shifts=4))
    with pytest.raises(DataError, match="shifts by 5 pixels"):
        next(data.batches(split, 3, epoch_seed=0, shifts=5))


def test_classes_can_be_written_in_one_string(few_shapes):
    assert data.load("shapes", classes="star,ring").classes == data.load("shapes", classes=["ring", "star"]).classes


def test_size_scales_the_shorter_side_and_crops_the_centre():
    image = torch.zeros(1, 3, 4, 8, dtype=torch.uint8)
    image[..., 2:6] = 255  # the central square is white
    pixels = data.to_pixels(data.normalise(image, size=8))
    assert pixels.shape == (1, 3, 8, 8)
    assert (pixels[..., 1:7] > 0.99).all()


def test_the_command_prints_counts_and_saves_a_sheet(tiny, tmp_path, capsys):
    folder = make_folder(tmp_path / "bugs")
    assert data.main(["--dataset", str(folder), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].split() == ["ant", "3", "2"]
    assert Image.open(tmp_path / "out/bugs_samples.png").size[0] > 500
    for wrong in (["--dataset", str(tmp_path / "nowhere")], ["--size", "x"], ["cifar10"], ["--test-share", "1"],
                  ["--dataset", tiny, "--size", "9"]):
        with pytest.raises(SystemExit) as end:
            data.main(wrong)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and wrong[-1] in error


def test_the_command_prints_counts_before_it_saves(tmp_path, capsys):
    folder = class_folder(tmp_path / "bugs", train=10)
    with pytest.raises(SystemExit):
        data.main(["--dataset", str(folder), "--test-share", "0.3", "--output", str(folder / "ant/0.png")])
    printed = capsys.readouterr()
    assert [line.split() for line in printed.out.splitlines()[1:]] == [
        ["class", "train", "test"], ["ant", "7", "3"], ["bee", "7", "3"], ["total", "14", "6"]]
    assert "30 % drawn" in printed.out and "expected a folder to write to" in printed.err


# ---------------------------------------------------------------- variants of the training set

def unequal(counts, side=4):
    """A Split with that many images of each class, shuffled; every image different."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    images = torch.randint(0, 256, (len(labels), 3, side, side), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(2))
    return data._split(images, labels[order])


def rows_of(split, whole):
    """Each image's place in the whole set."""
    places = {image.numpy().tobytes(): i for i, image in enumerate(whole.images.contiguous())}
    return [places[image.numpy().tobytes()] for image in split.images.contiguous()]


NAMES = ["plane", "bird", "deer", "truck"]


@pytest.mark.parametrize("variant, expected", [
    ("complete", [40, 40, 40, 40]), ("constrained", [40, 20, 20, 20]), ("undersampled", [20, 20, 20, 20]),
    ("oversampled", [40, 40, 40, 40]), ("smote", [40, 40, 40, 40])])
def test_the_studys_variants(variant, expected):
    whole = unequal([40, 40, 40, 40])
    made, synthetic = data.vary(whole, NAMES, variant, None, seed=0)
    assert data.counts(made, 4) == expected and synthetic == (60 if variant == "smote" else 0)
    if variant == "smote":
        made = data.Split(made.images[:100], made.labels[:100])  # the 60 synthetic ones come last
    rows = rows_of(made, whole)
    assert torch.equal(made.labels, whole.labels[rows])
    times = torch.bincount(torch.tensor(rows), minlength=160)
    if variant == "oversampled":  # each of the 20 that were kept twice
        for label, (once, twice) in enumerate([(40, 0), (0, 20), (0, 20), (0, 20)]):
            in_class = times[whole.labels == label]
            assert ((in_class == 1).sum(), (in_class == 2).sum()) == (once, twice)
    else:
        assert times.max() == 1
    assert torch.equal(made.images, data.vary(whole, NAMES, variant, None, 0)[0].images[:len(rows)])
    if variant != "complete":
        other, _ = data.vary(whole, NAMES, variant, None, seed=1)
        assert not torch.equal(made.images, other.images[:len(rows)])


def test_other_classes_and_shares():
    whole = unequal([40, 40, 10, 40])
    made, _ = data.vary(whole, NAMES, "oversampled", {"plane": 0.25, "truck": 0.7}, 0)
    assert data.counts(made, 4) == [40, 40, 40, 40]  # 10, 40, 10, 28: whole repeats and a drawn rest
    times = torch.bincount(torch.tensor(rows_of(made, whole)), minlength=130)
    truck = times[whole.labels == 3]
    assert truck.max() == 2 and (truck == 2).sum() == 12 and (truck == 1).sum() == 16
    assert times[whole.labels == 2].tolist() == [4] * 10
    assert data.counts(data.vary(whole, ["a", "b", "c", "d"], "undersampled", None, 0)[0], 4) == [10] * 4


@pytest.mark.parametrize("variant, shares, expected", [
    ("constrained", {"cat": 0.5}, "no class 'cat'"), ("constrained", {"bird": 0.001}, "'bird' is left with no"),
    ("smote", {}, "leaves all images as they are"), ("smote", {"bird": 0.02}, "expected two or more")])
def test_variants_that_cannot_be_made(variant, shares, expected):
    with pytest.raises(data.DataError, match=expected):
        data.vary(unequal([40, 40, 40, 40]), NAMES, variant, shares, 0)


def test_smote_lies_between_a_picture_and_one_of_its_nearest_neighbours():
    whole = unequal([30, 12])
    made = data.smote(whole, seed=0, k=3)
    assert torch.equal(made.images[:42], whole.images)
    synthetic = made.images[42:].flatten(1).double()
    assert data.counts(made, 2) == [30, 30] and made.labels[42:].tolist() == [1] * 18
    pictures = whole.images[whole.labels == 1].flatten(1).double()
    neighbours = torch.cdist(pictures, pictures).fill_diagonal_(math.inf).argsort(1)[:, :3]
    for picture in synthetic:
        # On the line from a picture to one of its three nearest: picture = a + gap * (b - a).
        misses = []
        for i in range(12):
            for j in neighbours[i].tolist():
                way = pictures[j] - pictures[i]
                gap = ((picture - pictures[i]) @ way / (way @ way)).clamp(0, 1)
                misses.append((pictures[i] + gap * way - picture).abs().max().item())
        assert min(misses) < 1  # rounding to whole pixel values, in each of 48
    assert not torch.equal(made.images[42:], data.smote(whole, seed=1, k=3).images[42:])


def test_smote_among_equal_pictures():
    whole = unequal([9, 4])
    images = whole.images.clone()
    images[whole.labels == 1] = 7
    made = data.smote(data._split(images, whole.labels), 0)
    assert (made.images[13:] == 7).all() and data.counts(made, 2) == [9, 9]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_nearest_against_all_distances(chunk):
    torch.manual_seed(0)
    a, b = torch.randn(20, 5), torch.randn(50, 5)
    assert torch.equal(data.nearest(a, b, 4, chunk), torch.cdist(a.double(), b.double()).argsort(1)[:, :4])


def test_holding_out_parts_the_set_in_proportion():
    whole = unequal([40, 20])
    train, val = data.hold_out(whole, 0.25, seed=0)
    assert data.counts(train, 2) == [30, 15] and data.counts(val, 2) == [10, 5]
    assert sorted(rows_of(train, whole) + rows_of(val, whole)) == list(range(60))
    with pytest.raises(data.DataError, match="is 0; expected 1 to 59"):
        data.hold_out(whole, 0.001, 0)


def test_chosen_classes_are_renumbered():
    whole = data.shapes(train=60, test=30)
    made = data.choose(whole, ["star", "ring"])
    assert made.classes == ["ring", "star"] and data.counts(made.train, 2) == [6, 6]
    assert torch.equal(made.test.images[made.test.labels == 1], whole.test.images[whole.test.labels == 4])
    with pytest.raises(data.DataError, match="no class 'dog'; shapes has circle"):
        data.choose(whole, ["dog", "ring"])


def test_blur_is_a_gaussian():
    """A bright line becomes the sampled Gaussian; a plain picture stays as it is."""
    images = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    images[0, 0, :, 16] = 255
    images[1] = 99
    made = data.blurred(images, 2.0)
    bell = np.exp(-np.arange(-6, 7) ** 2 / (2 * 2.0 ** 2))
    expected = np.zeros(32)
    expected[10:23] = 255 * bell / bell.sum()
    assert np.abs(made[0, 0, 5].numpy() - expected).max() <= 1
    assert (made[1] == 99).all() and made.dtype == torch.uint8


# ---------------------------------------------------------------- crops, noise, shares of a batch

def test_random_crops_are_windows_of_the_scaled_picture():
    split = data._split(torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6))
    scaled = data.normalise(split.images, 64)  # 56 * 8 / 7
    drawn = []
    for images, labels in data.batches(split, 4, epoch_seed=3, size=56, margin=True):
        assert images.shape[1:] == (3, 56, 56)
        windows = scaled[labels].unfold(2, 56, 1).unfold(3, 56, 1)  # (B, C, 9, 9, 56, 56)
        same = (windows - images[:, :, None, None]).abs().amax((1, 4, 5)) < 1e-5
        assert same.sum((1, 2)).tolist() == [1] * len(labels)
        drawn += same.nonzero()[:, 1:].tolist()
    assert len(set(map(tuple, drawn))) > 3
    centred = torch.cat([images for images, _ in data.batches(split, 4, size=56, margin=True)])
    torch.testing.assert_close(centred, scaled[:, :, 4:60, 4:60])


def test_crops_reach_every_edge():
    images = torch.zeros(4, 1, 70, 70, dtype=torch.uint8)
    corners = torch.tensor([[0., 0.], [0., 0.9999], [0.9999, 0.], [0.9999, 0.9999]])
    images[:, :, :8, :8], images[:, :, -8:, -8:] = 255, 100
    made = data.to_pixels(data.normalise(images, 63, True, corners))  # 72 -> 63: 10 places
    assert made[0, 0, 0, 0] > 0.9 and made[3, 0, -1, -1] > 0.35
    assert made[0, 0, -1, -1] < 0.2 and made[3, 0, 0, 0] < 0.01


def test_noise_is_gaussian_in_pixels_of_0_to_1():
    images = data.normalise(torch.full((40, 3, 32, 32), 100, dtype=torch.uint8))
    noisy = data.add_noise(images, 0.1, torch.Generator().manual_seed(0))
    std = torch.tensor(data.STD).view(3, 1, 1)
    added = (noisy - images) * std  # back in pixels, not clamped
    n = added.numel()
    assert abs(added.mean().item()) < 4 * 0.1 / n ** 0.5
    for channel in added.transpose(0, 1).flatten(1):
        assert channel.std().item() == pytest.approx(0.1, rel=0.02)
    assert torch.equal(noisy, data.add_noise(images, 0.1, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("n, batch_size, processes, expected", [
    (10, 4, 1, [(0, 4), (4, 8), (8, 10)]), (9, 4, 1, [(0, 4), (4, 9)]), (8, 4, 1, [(0, 4), (4, 8)]),
    (1, 4, 1, [(0, 1)]), (3, 1, 1, [(0, 1), (1, 2), (2, 3)]), (0, 4, 1, []), (4, 4, 2, [(0, 4)]),
    (11, 8, 2, [(0, 11)]), (12, 8, 2, [(0, 8), (8, 12)]), (25, 8, 4, [(0, 8), (8, 16), (16, 25)]),
    (23, 8, 4, [(0, 8), (8, 23)]), (24, 8, 4, [(0, 8), (8, 16), (16, 24)])])
def test_a_short_last_batch_is_joined_to_the_one_before(n, batch_size, processes, expected):
    assert data.batch_bounds(n, batch_size, processes) == expected
    if n < processes:
        return
    for rank in range(processes):
        shares = [len(labels) for _, labels in data.batches(numbered(n), batch_size, part=(rank, processes))]
        assert shares == [len(range(start + rank, stop, processes)) for start, stop in expected]


def test_a_joined_batch_has_the_images_of_both():
    split = numbered(9)
    arguments = dict(epoch_seed=1, flip=True, size=6, margin=True, degrees=5.0)
    joined, whole = list(data.batches(split, 4, **arguments)), list(data.batches(split, 9, **arguments))
    assert [len(labels) for _, labels in joined] == [4, 5]
    assert torch.equal(torch.cat([labels for _, labels in joined]), whole[0][1])
    torch.testing.assert_close(torch.cat([images for images, _ in joined]), whole[0][0])


def test_more_processes_than_images_in_a_batch_are_refused():
    with pytest.raises(DataError, match="7 images in batches of 2; expected one for each of 3 processes"):
        next(data.batches(numbered(7), 2, part=(0, 3)))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_every_batch(processes):
    split = data.shapes(train=21, test=10).train
    arguments = dict(batch_size=4, epoch_seed=5, flip=True, size=14, margin=True)
    whole = list(data.batches(split, **arguments))
    shares = [list(data.batches(split, **arguments, part=(rank, processes))) for rank in range(processes)]
    assert [len(labels) for _, labels in whole] == [4, 4, 4, 4, 5]
    for rank, share in enumerate(shares):
        assert len(share) == len(whole)
        for (images, labels), (all_images, all_labels) in zip(share, whole):
            assert torch.equal(images, all_images[rank::processes])
            assert torch.equal(labels, all_labels[rank::processes])


def test_rotation_is_torchvisions_about_the_centre():
    images = torch.randint(0, 256, (5, 3, 12, 17)).float()
    angles = torch.tensor([0.0, 90, -30, 10, 180])
    turned = data.rotate(images, angles)
    assert torch.allclose(turned[0], images[0], atol=1e-3)
    torch.testing.assert_close(turned[4], images[4].flip(1, 2), rtol=0, atol=0.1)
    for image, angle, made in zip(images, angles.tolist(), turned):
        expected = data.TF.rotate(image, angle, data.TF.InterpolationMode.BILINEAR)
        assert (made - expected).abs().mean() < 1  # of 255; torchvision masks the border harder


def test_training_rotates_within_the_degrees_and_evaluation_does_not():
    """An upright bar; its angle is that of its moments."""
    images = torch.zeros(200, 1, 33, 33, dtype=torch.uint8)
    images[:, :, 4:29, 15:18] = 255
    split = data._split(images, torch.zeros(200))
    y, x = torch.meshgrid(torch.arange(33.) - 16, torch.arange(33.) - 16, indexing="ij")

    def angles(**arguments):
        (made, _), = data.batches(split, 200, scale="0..1", **arguments)
        xx, yy, xy = ((made[:, 0] * m).sum((1, 2)) for m in (x * x, y * y, x * y))
        return torch.rad2deg(0.5 * torch.atan2(2 * xy, yy - xx))
    drawn = angles(epoch_seed=0, degrees=10)
    assert 9 < drawn.abs().max() < 10.5 and drawn.abs().mean().item() == pytest.approx(5, abs=0.8)
    assert (drawn > 1).any() and (drawn < -1).any()
    assert angles().abs().max() < 1e-3


@pytest.mark.parametrize("scale, low, high", [("0..1", 0, 1), ("-1..1", -1, 1)])
def test_the_other_scales(scale, low, high):
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 2, 3)
    made = data.normalise(images, scale=scale)
    assert made[0, 0, 0].tolist() == pytest.approx([low, high, low + (high - low) / 5])
    torch.testing.assert_close(data.to_pixels(made, scale), images / 255)
    noisy = data.add_noise(made.expand(4000, 3, 2, 3), 0.1, torch.Generator().manual_seed(0), scale)
    assert (noisy - made).std().item() == pytest.approx(0.1 * (high - low), rel=0.02)


# ---------------------------------------------------------------- on a device

@contextlib.contextmanager
def fake_gpu():
    """A GPU that computes shapes only; what would wait for it (a copy from the CPU, .item()) raises."""
    with FakeTensorMode():
        yield torch.device("cuda")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("arguments, side", [
    (dict(), 32), (dict(scale="-1..1", flip=True), 32), (dict(size=24), 24), (dict(size=40, margin=True), 40),
    (dict(flip=True, degrees=10.0, size=56, margin=True, part=(1, 2)), 56)])
@simulated_cuda
def test_batches_need_nothing_but_the_device(channels, arguments, side):
    with fake_gpu() as device:
        split = Split(torch.empty((21, channels, 32, 32), dtype=torch.uint8, device=device).contiguous(
            memory_format=torch.channels_last), torch.zeros(21, dtype=torch.int64, device=device))
        for epoch_seed in (None, 3):
            made = list(data.batches(split, 10, epoch_seed, **arguments))
            assert [len(labels) for _, labels in made] == ([5, 5] if "part" in arguments else [10, 11])
            for images, labels in made:
                assert images.device.type == labels.device.type == "cuda" and images.dtype == torch.float32
                assert images.shape[1:] == (channels, side, side)


@simulated_cuda
def test_functions_of_batches_need_nothing_but_the_device():
    with fake_gpu() as device:
        images = torch.empty((6, 3, 20, 24), dtype=torch.uint8, device=device)
        offsets, angles = torch.rand(6, 2, device=device), torch.rand(6, device=device)
        made = data.normalise(images, 16, True, offsets)
        assert made.shape == (6, 3, 16, 16) and made.device.type == "cuda"
        assert data.rotate(made, angles).shape == made.shape
        assert data.to_pixels(made.half()).dtype == torch.float32
        assert data.blurred(images, 1.0).shape == images.shape
        found = data.nearest(images.flatten(1), torch.rand(40, 1440, device=device), 3, chunk=4)
        assert found.shape == (6, 3) and found.device.type == "cuda" and found.dtype == torch.int64
    with FakeTensorMode():  # a generator of a fake GPU does not exist
        made = data.add_noise(torch.empty(6, 3, 20, 24, device="cpu"), 0.1, torch.Generator().manual_seed(0))
        assert made.shape == (6, 3, 20, 24)


def test_fake_and_real_tensors_do_not_meet():
    """Nothing of a FakeTensorMode stays behind."""
    with FakeTensorMode():
        data.normalise(torch.empty(2, 3, 7, 9, dtype=torch.uint8))
    made = data.normalise(torch.zeros(2, 3, 7, 9, dtype=torch.uint8))
    assert made[0, 0, 0, 0].item() == pytest.approx(-0.485 / 0.229)


def test_counts_are_those_of_bincount():
    labels = torch.randint(0, 7, (500,), generator=torch.Generator().manual_seed(0))
    assert data.counts(Split(None, labels), 9) == torch.bincount(labels, minlength=9).tolist()
