"""Sets from each source, their draws, and their batches against the plain computation."""
import math
import os
import shutil
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms.v2 import InterpolationMode, functional

import data
from data import DataError, Split
from conftest import simulated_cuda


def save(path, colour=(90, 100, 200), side=8, mode="RGB"):
    """A picture file of one colour, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (side, side), colour).save(path)


def make_folder(root, parts=(("train", 3), ("test", 2)), classes=("ant", "bee")):
    """A folder of pictures: picture i of class c in a part is filled with 10 * c + i."""
    for part, count in parts:
        for label, name in enumerate(classes):
            for i in range(count):
                save(root / part / name / f"{i}.png", (10 * label + i, 100, 200))
    return root


def values(split):
    """The values by which `make_folder` made the pictures."""
    return split.images[:, 0, 0, 0].tolist()


def assert_equal(one, two):
    """Two Datasets are the same in all fields but files."""
    for name, a in vars(replace(one, files=two.files)).items():
        b = getattr(two, name)
        same = map(torch.equal, a, b) if isinstance(a, Split) and b is not None else [a == b]
        assert all(same), name


# ---------------------------------------------------------------- folders of pictures

@pytest.mark.parametrize("train, test", [("train", "test"), ("Train", "TEST")])
def test_a_folder_of_train_test_and_val(tmp_path, train, test):
    root = make_folder(tmp_path / "bugs", parts=((train, 3), ("val", 1), (test, 2)))
    dataset = data.load(str(root))
    assert dataset.name == "bugs" and dataset.classes == ["ant", "bee"]
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [values(getattr(dataset, part)) for part in ("train", "val", "test")] == [
        [0, 1, 2, 10, 11, 12], [0, 10], [0, 1, 10, 11]]
    assert dataset.test.images.shape == (4, 3, 8, 8) and (dataset.test.images[:, 2] == 200).all()
    assert dataset.files == [f"{test}/{name}/{i}.png" for name in ("ant", "bee") for i in (0, 1)]
    with pytest.raises(DataError, match="val_share 0.5: .*val/ of its own"):
        data.load(str(root), val_share=0.5)


@pytest.mark.parametrize("parts, expected", [
    (("training_set", "test_set"), "test_set/ant: pictures are not read from here; .*rename the parts"),
    (("test", "val"), "test/ant: pictures are"), (("a/train", "a/test"), "a/test/ant: pictures are"),
    (("train/big", "test"), "train/big/ant: pictures are"), (("train",), "has no test pictures"),
    (("train", "val"), "has no test pictures"),
    (("train", "testing", "test"), "testing/ant: pictures are .*rename")])
def test_folders_that_are_neither_parts_nor_classes_are_refused(tmp_path, parts, expected):
    """As two classes, "test_set" and "training_set", they were trained on."""
    make_folder(tmp_path, parts=[(part, 2) for part in parts])
    with pytest.raises(DataError, match=expected) as error:
        data.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_top_folders_of_pictures_alone(tmp_path):
    """training/ and testing/ are no classes; train is one beside others; a val of no class is missed."""
    for name, tops, answer in (("a", ["training", "testing"], "rename the parts"), ("b", ["train", "bus"], None),
                               ("c", ["train/ant", "test/ant", "val"], "has no val pictures")):
        for top in tops:
            for i in range(20):
                save(tmp_path / name / top / f"{i}.png", (i + 50, 100, 200))
        if answer:
            with pytest.raises(DataError, match=answer):
                data.load(str(tmp_path / name))
    assert data.load(str(tmp_path / "b")).classes == ["bus", "train"]


def test_hidden_files_are_no_pictures_and_what_is_left_out_is_said(tmp_path, capsys):
    """A notebook's copies of training images came into the test; an Apple double refused the whole folder."""
    expected = data.load(str(make_folder(tmp_path)))
    for place in ("train/ant/.ipynb_checkpoints", "test/.x", ".git/ant", "__MACOSX/train", "train/@eaDir"):
        save(tmp_path / place / "0.png")
    (tmp_path / "train/bee/._0.png").write_bytes(b"not a picture")
    assert_equal(data.load(str(tmp_path)), expected)
    assert capsys.readouterr().err == ""
    for name in ("train/ant/notes.txt", "train/labels.csv", "LICENSE"):
        (tmp_path / name).write_text("words")
    save(tmp_path / "train/of-no-class.png")
    assert_equal(data.load(str(tmp_path)), expected)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "files left out: 4, such as LICENSE; pictures are" in line


def test_all_damaged_pictures_are_named_at_once(tmp_path):
    make_folder(tmp_path, parts=(("train", 8), ("test", 2)))
    picture = (tmp_path / "train/ant/0.png").read_bytes()
    for i in range(7):
        (tmp_path / f"train/ant/{i}.png").write_bytes(picture[:45] if i % 2 else b"words")
    with pytest.raises(DataError, match="7 of 20 pictures cannot be read.*; ...") as error:
        data.load(str(tmp_path))
    assert [f"ant/{i}.png" in str(error.value) for i in range(7)] == [True] * 5 + [False] * 2
    assert "\n" not in str(error.value)


def test_a_test_set_may_lack_a_class(tmp_path):
    make_folder(tmp_path, parts=(("train", 3),), classes=("ant", "bee", "cow"))
    make_folder(tmp_path, parts=(("test", 2),), classes=("bee", "cow"))  # values 0, 1 and 10, 11
    dataset = data.load(str(tmp_path))
    assert dataset.classes == ["ant", "bee", "cow"] and dataset.test.labels.tolist() == [1, 1, 2, 2]
    chosen = data.choose(dataset, ["ant", "cow"])
    assert chosen.classes == ["ant", "cow"] and chosen.test.labels.tolist() == [1, 1]
    assert values(chosen.test) == [10, 11] and chosen.files == ["test/cow/0.png", "test/cow/1.png"]
    save(tmp_path / "test/wasp/0.png")
    with pytest.raises(DataError, match="test/wasp/0.png: of no training class"):
        data.load(str(tmp_path))


def test_pictures_alone_are_one_class(tmp_path):
    for i in range(20):
        save(tmp_path / f"photos/{i}.PNG", (i, 100, 200))
    dataset = data.load(str(tmp_path / "photos"))
    assert dataset.classes == ["photos"] and values(dataset.test) == [12, 13, 5]  # by their names' checksums
    assert sorted(values(dataset.train) + values(dataset.test)) == list(range(20))
    for part in ("train", "test"):
        save(tmp_path / f"parts/{part}/a.png")
    assert data.load(str(tmp_path / "parts")).classes == ["parts"]


def test_a_checksum_of_its_name_makes_a_picture_a_test_image(tmp_path):
    root = make_folder(tmp_path / "bugs", parts=(("", 10),))
    before = data.load(str(root))
    expected = [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(10)
                if zlib.crc32(f"{name}/{i}.png".encode()) < 0.2 * 2**32]
    assert before.files == expected and 0 < len(expected) < 20
    assert sorted(values(before.train) + values(before.test)) == list(range(20))
    assert [value // 10 for value in values(before.test)] == before.test.labels.tolist()
    for i in range(10, 20):  # no other file and no seed changes it
        save(root / f"aphid/{i}.png")
    after = data.choose(data.load(str(root), seed=1), ["ant", "bee"])
    assert after.files == expected and torch.equal(after.train.images, before.train.images)


def test_a_class_without_training_images_is_refused(tmp_path):
    root = make_folder(tmp_path, parts=(("", 10),))
    for i in {*range(10)} - {6, 7}:  # the checksums of those are 0.19 and 0.05 of the range
        (root / f"bee/{i}.png").unlink()
    with pytest.raises(DataError, match="bee/6.png: of no training class"):
        data.load(str(root))
    shutil.rmtree(root / "bee")
    for i in (0, 1, 8, 9):
        (root / f"ant/{i}.png").unlink()
    with pytest.raises(DataError, match="has no test pictures"):
        data.load(str(root))


def test_unequal_pictures_need_a_size(tmp_path):
    make_folder(tmp_path)
    wide = Image.new("RGB", (24, 12), "black")
    wide.paste("white", (6, 0, 18, 12))  # a centre crop of it is white
    wide.save(tmp_path / "train/ant/9.png")
    with pytest.raises(DataError, match="9.png: is not of the size of .*size"):
        data.load(str(tmp_path))
    dataset = data.load(str(tmp_path), size=6)
    assert dataset.train.images.shape == (7, 3, 6, 6) and values(dataset.train)[:3] == [0, 1, 2]
    assert (dataset.train.images[3, :, :, 1:5] == 255).all()  # its edges are smoothed
    (tmp_path / "train/ant/9.png").unlink()
    for size, side in ((64, 8), (4, 4)):  # equal pictures are scaled up by `batches`
        assert data.load(str(tmp_path), size=size).train.images.shape == (6, 3, side, side)


def test_a_folder_is_grey_only_if_all_its_pictures_are(tmp_path):
    for i in range(3):
        save(tmp_path / f"train/ant/{i}.png", 50 * i, mode="L")
        save(tmp_path / f"test/ant/{i}.png", (50 * i,) * 3)
    grey = data.load(str(tmp_path))
    assert grey.train.images.shape == (3, 1, 8, 8) and values(grey.train) == [0, 50, 100]
    save(tmp_path / "test/ant/9.png", "red")
    mixed = data.load(str(tmp_path))
    assert torch.equal(mixed.train.images, grey.train.images.expand(-1, 3, -1, -1))
    assert mixed.test.images[-1, :, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("change", [
    lambda picture, cache: os.utime(picture, ns=(1, 1)), lambda picture, cache: picture.unlink(),
    lambda picture, cache: picture.rename(picture.parent.parent / "bee/9.png"),
    lambda picture, cache: cache.write_bytes(cache.read_bytes()[:-200]),
    lambda picture, cache: cache.write_bytes(cache.read_bytes().replace(b"\xc8", b"\xc9"))],
    ids=["time", "deleted", "moved", "cut", "damaged"])
def test_a_folder_is_decoded_once_until_it_changes(tmp_path, monkeypatch, capsys, change):
    root = make_folder(tmp_path / "bugs")
    expected = data.load(str(root))
    monkeypatch.setattr(data, "CACHE_FROM", 4)
    for decoded in (1, 0):  # by several processes; as it was kept
        assert_equal(data.load(str(root)), expected)
        assert capsys.readouterr().err.count("reading 10 pictures") == decoded
    assert [path.name for path in root.glob(".*")] == [".cache.npz"]
    change(root / "train/ant/1.png", root / ".cache.npz")
    changed = data.load(str(root))
    assert "reading" in capsys.readouterr().err
    assert_equal(data.load(str(root)), changed)
    assert not capsys.readouterr().err


def test_a_cache_is_of_one_size_and_is_written_if_it_can_be(tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path / "bugs")
    monkeypatch.setattr(data, "CACHE_FROM", 4)
    sides = [data.load(str(root), size=size).train.images.shape[2] for size in (None, None, 16, 4, 4, None)]
    assert sides == [8, 8, 8, 4, 4, 8] and capsys.readouterr().err.count("reading") == 4
    (root / ".cache.npz").unlink()
    monkeypatch.setattr(np, "savez", lambda *arguments, **more: open(tmp_path))  # an OSError
    assert len(data.load(str(root)).train.labels) == 6 and not list(root.glob(".cache*"))


# ---------------------------------------------------------------- pictures

@pytest.mark.parametrize("name, mode, colour, expected", [
    ("a.png", "RGB", (200, 100, 50), (200, 100, 50)), ("a.png", "L", 90, (90, 90, 90)),
    ("a.png", "1", 1, (255, 255, 255)), ("a.png", "P", (200, 100, 50), (200, 100, 50)),
    ("a.png", "RGBA", (200, 100, 50, 0), (255, 255, 255)), ("a.png", "I;16", 30_000, (117, 117, 117)),
    ("a.tif", "I", 30_000, (117, 117, 117)), ("a.jpg", "CMYK", (55, 155, 205, 0), (200, 100, 50))])
def test_pictures_of_every_mode(tmp_path, name, mode, colour, expected):
    """Wholly transparent is white."""
    save(tmp_path / name, colour, mode=mode)
    pixels = data.read_picture(tmp_path / name)
    assert pixels.shape == (1, 3, 8, 8) and pixels.dtype == torch.uint8
    misses = (pixels.permute(0, 2, 3, 1).int() - torch.tensor(expected)).abs()
    assert misses.max() <= (8 if mode == "CMYK" else 0)


@pytest.mark.parametrize("value", [0.7, 70_000, -1], ids=["float", "17 bits", "negative"])
def test_pictures_of_32_bits_are_refused(tmp_path, value):
    Image.fromarray(np.full((4, 4), value, np.float32 if value == 0.7 else np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif: has pixels of 32 bits; expected 8 or 16"):
        data.read_picture(tmp_path / "a.tif")


def test_pictures_of_12_bits_in_16_are_refused(tmp_path):
    """Divided by 256 they are black: at most 15 of 255."""
    for file in ("train/ant/0.png", "train/ant/1.png", "test/ant/0.png"):
        save(tmp_path / file, 4095, mode="I;16")
    with pytest.raises(DataError, match="no pixel of the whole set exceeds 25 of 255"):
        data.load(str(tmp_path))
    save(tmp_path / "train/ant/1.png", 40_000, mode="I;16")
    assert values(data.load(str(tmp_path)).train) == [15, 156]


@pytest.mark.parametrize("channels, fit, blur", [(3, (6, 6), 0.0), (1, (6, 6), 0.0), (3, (6, 6), 1.5)])
def test_a_single_picture_is_read_as_the_test_images_are(tmp_path, channels, fit, blur):
    """Turned by EXIF, of the set's channels and size, blurred."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, channels), np.uint8).repeat(3 // channels, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    for part, size in (("train", 6), ("test", 8)):
        (tmp_path / part / "ant").mkdir(parents=True)
        Image.fromarray(noise).resize((size, size)).save(tmp_path / part / "ant/0.png", exif=exif)
    dataset = data.load(str(tmp_path), size=6, blur=blur)
    images = data.read_picture(tmp_path / "test/ant/0.png", channels, fit, blur)
    assert dataset.test.images.shape == (1, channels, *fit)
    assert torch.equal(images, dataset.test.images) and images.dtype == torch.uint8
    turned = data.read_picture(tmp_path / "test/ant/0.png", channels)
    expected = torch.from_numpy(np.rot90(noise[..., :channels], -1).copy())
    assert torch.equal(turned[0].permute(1, 2, 0), expected)


# ---------------------------------------------------------------- .npz, named sets

def npz(path, **changes):
    arrays = dict(x_train=np.arange(6 * 4 * 5 * 3).reshape(6, 4, 5, 3).astype(np.uint8),
                  y_train=np.array([0, 1, 2, 0, 1, 2]),
                  x_test=np.zeros((2, 4, 5, 3), np.uint8), y_test=np.array([2, 0]))
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def test_an_npz_in_each_layout(tmp_path):
    dataset = data.load(npz(tmp_path / "a.npz", classes=np.array(["x", "y", "z"])))
    assert dataset.classes == ["x", "y", "z"] and dataset.named and dataset.files == [0, 1]
    assert dataset.train.images.shape == (6, 3, 4, 5)
    assert dataset.train.images[1, 2, 3, 4] == (((1 * 4 + 3) * 5 + 4) * 3 + 2) % 256
    first = np.arange(6 * 3 * 4 * 5).reshape(6, 3, 4, 5).astype(np.uint8)
    dataset = data.load(npz(tmp_path / "b.npz", x_train=first, x_test=first[:2]))
    assert torch.equal(dataset.train.images, torch.from_numpy(first))
    assert dataset.classes == ["0", "1", "2"] and not dataset.named
    grey = np.full((6, 4, 5), 99, np.uint8)
    column = np.arange(6)[:, None] % 3
    dataset = data.load(npz(tmp_path / "c.npz", x_train=grey, x_test=grey[:2], y_train=column))
    assert dataset.train.images.shape == (6, 1, 4, 5) and dataset.train.labels.shape == (6,)
    floats = data.load(npz(tmp_path / "d.npz", x_train=first / 255, x_test=first[:2] / 255))
    assert torch.equal(floats.train.images, torch.from_numpy(first))


@pytest.mark.parametrize("changes, expected", [
    (dict(y_test=None), "expected an .npz of plain arrays x_train y_train x_test y_test"),
    (dict(y_train=np.array([{}, 1, 2, 0, 1, 2], dtype=object)), "plain arrays"),
    (dict(x_train=np.full((6, 4, 5, 3), 200.0)), "x_train is float64"),
    (dict(x_train=np.zeros(6, np.uint8)), r"x_train is uint8 \(6,\)"),
    (dict(x_train=np.full((6, 4, 5, 2), 99, np.uint8)), "1 or 3 channels"),
    (dict(x_test=np.zeros((2, 4, 4, 3), np.uint8)), "expected one shape"),
    (dict(y_train=np.array([0, 1, 2])), r"y_train int64 \(3,\)"),
    (dict(y_train=np.array(list("abcabc"))), "y_train <U1"),
    (dict(y_train=np.array([0, 1, -1, 0, 1, 2])), r"y_train int64 \(6,\) of \[-1  0  1  2\]"),
    (dict(y_train=np.array([1, 2, 3, 1, 2, 3])), r"of \[1 2 3\]; .* numbers of 0 to 2"),
    (dict(y_test=np.array([0, 3])), r"y_test int64 \(2,\) of \[0 3\]"),
    (dict(classes=np.array(["a"])), "1 classes; expected .* 3 classes")])
def test_an_unusable_npz(tmp_path, changes, expected):
    with pytest.raises(DataError, match=expected) as error:
        data.load(npz(tmp_path / "a.npz", **changes))
    assert "a.npz" in str(error.value) and "\n" not in str(error.value)


def test_other_paths_are_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK not really")
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "empty").mkdir()
    for name, expected in (("a.npz", "a.npz: expected an .npz"), ("a.txt", "no data set '.*a.txt'"),
                           ("nowhere", "no data set"), ("empty", "has no test pictures")):
        with pytest.raises(DataError, match=expected):
            data.load(str(tmp_path / name))


PIXELS, LABELS = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8), np.array([7, 0, 4], np.uint8)


def write_mnist(root):
    """Files as torchvision keeps them: big-endian headers, then bytes."""
    for part in ("train", "t10k"):
        for name, magic, array in (("images-idx3", 2051, PIXELS), ("labels-idx1", 2049, LABELS)):
            header = struct.pack(f">{array.ndim + 1}i", magic, *array.shape)
            path = root / f"MNIST/raw/{part}-{name}-ubyte"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(header + array.tobytes())


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: open("/no network in this test"))


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:100]),
                                    lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_files_of_torchvision_are_read_and_damaged_ones_not_hidden(tmp_path, no_network, damage):
    write_mnist(tmp_path)
    dataset = data.load("mnist", tmp_path)
    assert torch.equal(dataset.train.images, torch.from_numpy(PIXELS)[:, None])
    assert dataset.test.labels.tolist() == [7, 0, 4] and dataset.classes[7] == "7" and dataset.named
    damage(tmp_path / "MNIST/raw/t10k-images-idx3-ubyte")
    with pytest.raises(DataError, match=r"mnist cannot be read from .*MNIST/raw/\*.*; delete") as error:
        data.load("mnist", tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"cannot be read from .*cifar-10-batches-py/\*"):
        data.load(None, tmp_path)  # shapes do not stand in for it


def test_a_named_set_is_found_as_a_folder_of_pictures(tmp_path, no_network):
    dataset = data.load("cifar10", make_folder(tmp_path / "cifar10").parent)
    assert (dataset.name, dataset.classes) == ("cifar10", ["ant", "bee"]) and "image folder" in dataset.source
    (tmp_path / "cifar10/test/bee/1.png").write_bytes(b"")
    with pytest.raises(DataError, match="bee/1.png"):
        data.load(None, tmp_path)  # shapes do not stand in for it


def test_without_a_name_shapes_stand_in_with_a_warning(tmp_path, no_network, few_shapes, capsys, monkeypatch):
    for name in ("cifar10", "mnist", "mnist"):  # what a failed download leaves is not taken for the set
        with pytest.raises(DataError, match=f"{name} cannot be read from .*, nor downloaded .*shapes"):
            data.load(name, tmp_path / "data")
    monkeypatch.chdir(make_folder(tmp_path / "cifar10").parent)  # a folder does not hide the set of its name
    assert data.load(None, tmp_path / "data").name == "shapes"
    warning = capsys.readouterr().err
    assert "WARNING: cifar10 cannot be read" in warning and "say nothing about CIFAR-10" in warning
    assert data.load("./cifar10").classes == ["ant", "bee"]


# ---------------------------------------------------------------- steps of `load`

@pytest.fixture
def few_shapes(monkeypatch):
    """The built-in set of 200 + 100 images, quickly drawn."""
    monkeypatch.setattr(data, "shapes", lambda draw=data.shapes: draw(200, 100))


def test_load_is_its_steps_called_one_by_one(few_shapes):
    expected, shares = data.choose(data.shapes(), ["ring", "star", "bars"]), {"ring": 0.5, "star": 0.3}
    expected.train, expected.test = data.take(expected.train, 50, 3), data.take(expected.test, 9, 3)
    held = data._drawn(expected.train, 10, 3, "")
    expected.train, expected.val = (data._pick(expected.train, rows) for rows in (~held, held))
    expected.train = data.vary(expected.train, expected.classes, "smote", shares, 3)
    expected.labelled = data.take(expected.train, 20, 3)
    expected = expected.map(lambda split: Split(data.blurred(split.images, 0.7), split.labels))
    result = data.load("shapes", classes="star,ring,bars", train_size=50, test_size=9, val_share=0.2,
                       variant="smote", constrain=shares, labels=20, blur=0.7, seed=3)
    assert_equal(result, expected)
    assert_equal(data.shapes(), data.load("shapes", seed=4))


@pytest.mark.parametrize("arguments, expected", [
    (dict(classes=["dog"]), "classes dog: expected"), (dict(classes="ring,ring"), "ring,ring: .* each once"),
    (dict(train_size=201), "train_size 201: expected 1 to 200"), (dict(train_size=-3), "train_size -3: "),
    (dict(test_size=0), "test_size 0: expected 1 to 100"), (dict(labels=201), "labels 201: expected 1 to "),
    (dict(val_share=0.001), "val_share 0.001: count 0: "), (dict(val_share=0.97), "0.97: leaves a class"),
    (dict(variant="oversample"), "variant oversample: one of complete"),
    (dict(constrain={"ring": 0.5}), "variant complete: .*with constrain not complete"),
    (dict(variant="constrained"), "variant constrained: changes nothing"),
    (dict(variant="constrained", constrain={"cat": 0.5}), "'cat': 0.5}: expected classes of circle"),
    (dict(variant="constrained", constrain={"ring": 2.5}), "'ring': 2.5}: .*above 0, at most 1"),
    (dict(variant="constrained", constrain={"ring": 0.001}), "leave images of each class")])
def test_an_error_names_its_argument(arguments, expected, few_shapes):
    with pytest.raises(DataError, match=expected):
        data.load("shapes", **arguments)


@pytest.mark.parametrize("part", ["train", "test", "val", "labelled"])
def test_a_digest_is_of_each_pixel_and_label(part):
    split = data.shapes(train=20, test=1).train
    dataset = data.Dataset("set", "of a test", data.SHAPES, split, split, split, labelled=split)
    images = split.images.clone()
    images[19, 2, 31, 31] ^= 1
    same, other = Split(split.images.contiguous(), split.labels), Split(images, split.labels)
    digests = [data.digest(replace(dataset, **{part: each}))
               for each in (split, same, other, Split(split.images, split.labels.flip(0)))]
    assert len(digests[0]) == 16 and digests[0] == digests[1] and len(set(digests)) == 3
    # Some pixels of shapes, computed in float32, differ by 1 between kinds of processors.
    assert data.digest(data.shapes(20, 10, seed=1)) == data.digest(data.shapes(20, 10))


# ---------------------------------------------------------------- shapes

def test_shapes_are_the_same_at_every_run_and_balanced():
    a, b = data.shapes(train=200, test=50), data.shapes(train=200, test=50)
    assert torch.equal(a.train.images, b.train.images) and torch.equal(a.test.labels, b.test.labels)
    assert data.counts(a.train, 10) == [20] * 10 and data.counts(a.test, 11) == [5] * 10 + [0]
    both = torch.cat([a.train.images, a.test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 250  # no image is twice in it, none of train in test


@pytest.mark.parametrize("name, area", [
    ("circle", math.pi * 0.64), ("ring", math.pi * (0.81 - 0.25)), ("square", 1.96), ("bars", 2 * 0.5 * 1.8),
    ("cross", 2 * 1.9 * 0.56 - 0.56 ** 2)])
def test_a_shape_covers_the_area_that_geometry_says(name, area):
    axis = torch.linspace(-1.5, 1.5, 1501)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    assert (data.OUTSIDE[name](x, y) < 0).float().mean().item() * 9 == pytest.approx(area, rel=0.01)


# ---------------------------------------------------------------- from sets to sets

def unequal(counts, side=4):
    """A Split with that many images of each class, shuffled; every image different."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    images = torch.randint(0, 256, (len(labels), 3, side, side), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(2))
    return data._split(images, labels[order])


def test_draws_are_those_of_before():
    """The same seed, the same images, in every version of this file; classes in proportion."""
    split = data._split(torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1),
                        torch.tensor([0] * 24 + [1] * 12 + [2] * 4))
    assert values(data.take(split, 10, 3)) == [1, 2, 10, 14, 20, 21, 26, 32, 33, 37]
    assert values(data.take(split, 8, 1)) == [5, 11, 12, 17, 18, 30, 34, 36]
    grown = data.resample(split, [3, 2, 9], 5)
    assert values(grown) == [8, 11, 13, 27, 29, 36, 36, 37, 37, 38, 38, 38, 39, 39]
    under = data.vary(split, ["a", "b", "c"], "undersampled", {"a": 0.5}, 2)
    assert values(under) == [3, 11, 16, 19, 24, 26, 27, 35, 36, 37, 38, 39]
    split = Split(split.images, torch.arange(40))
    order = torch.cat([labels for _, labels in data.batches(split, 16, epoch_seed=4, rounds=2)]).tolist()
    assert order[:16] == [10, 4, 21, 17, 25, 26, 31, 3, 5, 12, 38, 19, 6, 8, 32, 27]
    assert sorted(order[:40]) == sorted(order[40:]) == list(range(40)) and order[:40] != order[40:]


@pytest.mark.parametrize("variant, shares, expected, most", [
    ("constrained", {"plane": 0.25}, [10, 40, 10, 40], 1), ("constrained", None, [40, 20, 5, 20], 1),
    ("undersampled", None, [5, 5, 5, 5], 1), ("undersampled", {}, [10, 10, 10, 10], 1),
    ("oversampled", None, [40, 40, 40, 40], 8), ("smote", None, [40, 20, 5, 20], 1),
    ("oversampled", {"plane": 0.25, "truck": 0.7}, [40, 40, 40, 40], 4)])
def test_the_studys_variants(variant, shares, expected, most):
    labels = unequal([40, 40, 10, 40]).labels
    whole = data._split(torch.arange(130, dtype=torch.uint8).view(130, 1, 1, 1), labels)
    result = data.vary(whole, ["plane", "bird", "deer", "truck"], variant, shares, seed=0)
    if variant == "smote":  # the synthetic ones come last
        assert data.counts(result, 4) == [40] * 4
        result = Split(result.images[:-75], result.labels[:-75])
    assert data.counts(result, 4) == expected
    assert torch.equal(result.labels, labels[values(result)])
    times = torch.bincount(torch.tensor(values(result)), minlength=130)
    assert times.max() == most
    if variant == "oversampled" and shares:  # 28 of a class grown to 40: twelve of them twice
        assert torch.bincount(times[labels == 3]).tolist() == [12, 16, 12]


def test_smote_lies_between_a_picture_and_one_of_its_nearest_neighbours():
    whole = unequal([30, 12])
    result = data.smote(whole, seed=0, k=3)
    assert torch.equal(result.images[:42], whole.images) and result.labels[42:].tolist() == [1] * 18
    pictures = whole.images[whole.labels == 1].flatten(1).double()
    neighbours = torch.cdist(pictures, pictures).fill_diagonal_(math.inf).argsort(1)[:, :3]
    one, two = pictures.repeat_interleave(3, 0), pictures[neighbours.flatten()]
    for picture in result.images[42:].flatten(1).double():
        # On the line from a picture to one of its three nearest: picture = one + gap * (two - one).
        gap = ((picture - one) * (two - one)).sum(1) / (two - one).square().sum(1)
        misses = one.lerp(two, gap.clamp(0, 1)[:, None]) - picture
        assert misses.abs().amax(1).min() < 1  # rounding to whole pixel values, in each of 48
    images = whole.images.clone()
    images[whole.labels == 1] = 7  # all equal
    assert (data.smote(data._split(images, whole.labels), 0).images[42:] == 7).all()
    alone = unequal([3, 1])  # a class of one picture
    assert data.smote(alone, 0).images[4:].unique(dim=0).equal(alone.images[alone.labels == 1])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_nearest_against_all_distances(chunk):
    torch.manual_seed(0)
    a, b = torch.randn(20, 5), torch.randn(50, 5)
    assert torch.equal(data.nearest(a, b, 4, chunk), torch.cdist(a.double(), b.double()).argsort(1)[:, :4])
    a, b = torch.randint(0, 2, (20, 5), dtype=torch.uint8), torch.randint(0, 2, (11, 5), dtype=torch.uint8)
    distances = (a[:, None].int() - b.int()).square().sum(2)  # of equally near ones the first
    assert torch.equal(data.nearest(a, b, 4, chunk), distances.sort(dim=1, stable=True).indices[:, :4])


def test_blur_is_a_gaussian():
    """A bright line becomes the sampled Gaussian."""
    images = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    images[0, 0, :, 16] = 255
    result = data.blurred(images, 2.0)
    bell = np.exp(-np.arange(-6, 7) ** 2 / (2 * 2.0 ** 2))
    assert np.abs(result[0, 0, 5].numpy() - np.pad(255 * bell / bell.sum(), (10, 9))).max() <= 1


# ---------------------------------------------------------------- batches

@pytest.mark.parametrize("channels, arguments", [
    (3, {}), (1, dict(epoch_seed=3)), (3, dict(epoch_seed=4, flip=True, scale="-1..1")), (3, dict(size=8)),
    (3, dict(epoch_seed=5, shifts=2)), (1, dict(epoch_seed=6, degrees=30.0, flip=True)),
    (3, dict(size=7, margin=True)), (1, dict(epoch_seed=7, size=7, margin=True)),
    (3, dict(epoch_seed=8, flip=True, shifts=1, degrees=9.0, size=14, margin=True))])
def test_batches_are_the_plain_computation(channels, arguments):
    """Image by image, with the same draws."""
    n, images = 41, torch.randint(0, 256, (41, channels, 12, 12), dtype=torch.uint8)
    split = data._split(images, torch.arange(n) % 2)
    s = dict(epoch_seed=None, flip=False, shifts=0, degrees=0, size=None, margin=False, scale="imagenet")
    s |= arguments
    g, by, size = torch.Generator().manual_seed(s["epoch_seed"] or 0), s["shifts"], s["size"]
    order = torch.arange(n) if s["epoch_seed"] is None else torch.randperm(n, generator=g)
    flipped = torch.rand(n, generator=g) < 0.5
    offsets = torch.rand(n, 2, generator=g) if s["margin"] and s["epoch_seed"] else None
    angles = s["degrees"] * (2 * torch.rand(n, generator=g) - 1) if s["degrees"] else None
    moves = torch.randint(-by, by + 1, (n, 2), generator=g) if by else None
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in data.SCALES[s["scale"]])
    if channels == 1:
        mean, std = mean.mean(), std.mean()
    expected = []
    for i, image in enumerate(split.images[order]):
        if s["flip"] and flipped[i]:
            image = image.flip(2)
        if by:
            top, left = by - moves[i]
            image = F.pad(image.float(), (by,) * 4, "reflect").to(torch.uint8)
            image = image[:, top:top + 12, left:left + 12]
        if s["degrees"]:
            image = data.rotate(image[None].float(), angles[i:i + 1])[0]
        if size:
            image = functional.resize(image, [size * 8 // 7 if s["margin"] else size], antialias=True)
            top, left = ((image.shape[1] - size) // 2,) * 2
            if offsets is not None:
                top, left = (offsets[i] * (image.shape[1] - size + 1)).long()
            image = image[:, top:top + size, left:left + size]
        expected.append((image / 255 - mean) / std)
    batches = list(data.batches(split, 16, **arguments))
    assert [len(labels) for _, labels in batches] == [16, 16, 9] and batches[0][0].dtype == torch.float32
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), torch.stack(expected))
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels[order])
    pixels = data.to_pixels(batches[0][0], s["scale"])
    torch.testing.assert_close(pixels, torch.stack(expected[:16]) * std + mean, atol=1e-5, rtol=0)
    if s["epoch_seed"] is None:
        assert torch.equal(data.normalise(images[:16], size, s["margin"], s["scale"]), batches[0][0])


@pytest.mark.parametrize("scale, low, high", [("0..1", 0, 1), ("-1..1", -1, 1)])
def test_scales_and_noise_in_pixels_of_0_to_1(scale, low, high):
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3).expand(4000, 3, 2, 3)
    result = data.normalise(images, scale=scale)
    assert result[0, 0, 0].tolist() == pytest.approx([low, high, low + (high - low) / 5])
    noisy = data.add_noise(result, 0.1, torch.Generator().manual_seed(0), scale)
    assert (noisy - result).std().item() == pytest.approx(0.1 * (high - low), rel=0.02)
    assert abs((noisy - result).mean().item()) < 0.002
    assert torch.equal(noisy, data.add_noise(result, 0.1, torch.Generator().manual_seed(0), scale))
    assert data.add_noise(result, 0.0, None, scale) is result


def test_rotation_is_torchvisions_about_the_centre():
    images = torch.randint(0, 256, (5, 3, 12, 17)).float()
    angles = torch.tensor([0.0, 90, -30, 10, 180])
    turned = data.rotate(images, angles)
    torch.testing.assert_close(turned[0], images[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(turned[4], images[4].flip(1, 2), rtol=0, atol=0.1)
    for image, angle, result in zip(images, angles.tolist(), turned):
        expected = functional.rotate(image, angle, InterpolationMode.BILINEAR)
        assert (result - expected).abs().mean() < 1  # of 255; torchvision masks the border harder


@pytest.mark.parametrize("n, batch_size, expected", [
    (10, 4, [(0, 4), (4, 8), (8, 10)]), (9, 4, [(0, 4), (4, 9)]), (8, 4, [(0, 4), (4, 8)]), (1, 4, [(0, 1)]),
    (3, 1, [(0, 1), (1, 2), (2, 3)]), (0, 4, []), (48, 32, [(0, 32), (32, 48)]), (47, 32, [(0, 47)])])
def test_a_last_batch_of_fewer_than_half_is_joined_to_the_one_before(n, batch_size, expected):
    """A last batch of two images made 40 % of BatchNorm's running statistics."""
    assert data.bounds(n, batch_size) == expected


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_have_equal_shares_of_every_batch(processes):
    split = data.shapes(train=21, test=10).train
    arguments = dict(batch_size=8, epoch_seed=5, flip=True, size=14, margin=True)
    whole = list(data.batches(split, **arguments))
    assert [len(labels) for _, labels in whole] == [8, 8, 5]
    for rank in range(processes):
        share = data.batches(split, **arguments, part=(rank, processes))
        for (images, labels), (all_images, all_labels) in zip(share, whole, strict=True):
            end = len(all_labels) // processes * processes
            assert torch.equal(images, all_images[:end][rank::processes])
            assert torch.equal(labels, all_labels[:end][rank::processes])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("arguments, side", [
    (dict(), 32), (dict(scale="-1..1", flip=True), 32), (dict(size=24), 24), (dict(size=40, margin=True), 40),
    (dict(flip=True, degrees=10.0, shifts=1, size=56, margin=True, part=(1, 2)), 56)])
@simulated_cuda
def test_batches_need_nothing_but_the_device(channels, arguments, side):
    """On a GPU that computes shapes only, what would wait for it (a copy from the CPU, .item()) raises."""
    with FakeTensorMode():
        images = torch.empty((21, channels, 32, 32), dtype=torch.uint8, device="cuda")
        split = Split(images.contiguous(memory_format=torch.channels_last),
                      torch.zeros(21, dtype=torch.int64, device="cuda"))
        for epoch_seed in (None, 3):
            batches = list(data.batches(split, 10, epoch_seed, **arguments))
            assert [len(labels) for _, labels in batches] == ([5, 5] if "part" in arguments else [10, 11])
            for images, labels in batches:
                assert images.device.type == labels.device.type == "cuda" and images.dtype == torch.float32
                assert images.shape[1:] == (channels, side, side)
        assert data.nearest(images.flatten(1), images.flatten(1), 3, chunk=4).device.type == "cuda"
