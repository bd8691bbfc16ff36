"""Sets from each source, their draws, and their batches against the plain computation."""
import gzip
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DataError, Split


def make_folder(root, classes=("ant", "bee"), train=3, test=2, side=8, suffix="png", mode="RGB"):
    """An image folder whose picture i of class c in train is filled with 10 * c + i."""
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                colour = 10 * label + i if mode == "L" else (10 * label + i, 100, 200)
                Image.new(mode, (side, side), colour).save(root / part / name / f"{i}.{suffix}")
    return root


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
    assert torch.equal(alone.train.images, shared.train.images)
    assert torch.equal(alone.test.labels, shared.test.labels)


def test_the_test_part_alone_leaves_training_pictures_unread(tmp_path):
    folder = make_folder(tmp_path / "bugs")
    whole = data.load(str(folder))
    (folder / "train/bee/2.png").write_bytes(b"not a picture")
    alone = data.load(str(folder), test_only=True)
    assert torch.equal(alone.test.images, whole.test.images) and torch.equal(alone.test.labels, whole.test.labels)
    assert len(alone.train.labels) == 0 and alone.classes == whole.classes


def test_a_grey_folder_has_one_channel_and_refuses_colour(tmp_path):
    make_folder(tmp_path, mode="L")
    assert data.load(str(tmp_path)).train.images.shape == (6, 1, 8, 8)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "train/bee/9.png")
    with pytest.raises(DataError, match="9.png: is in colour"):
        data.load(str(tmp_path))


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


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="no data set"):
        data.load(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="has no folder train/"):
        data.load(str(tmp_path))
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


def npz(path, **changes):
    arrays = dict(x_train=np.arange(6 * 4 * 5 * 3).reshape(6, 4, 5, 3).astype(np.uint8),
                  y_train=np.array([0, 1, 2, 0, 1, 2]),
                  x_test=np.zeros((2, 4, 5, 3), np.uint8), y_test=np.array([2, 0]))
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def test_an_npz_in_each_layout(tmp_path):
    dataset = data.load(npz(tmp_path / "a.npz", classes=np.array(["x", "y", "z"])))
    assert dataset.classes == ["x", "y", "z"] and dataset.train.images.shape == (6, 3, 4, 5)
    assert dataset.train.images[1, 2, 3, 4] == (((1 * 4 + 3) * 5 + 4) * 3 + 2) % 256
    first = np.arange(6 * 3 * 4 * 5).reshape(6, 3, 4, 5).astype(np.uint8)
    dataset = data.load(npz(tmp_path / "b.npz", x_train=first, x_test=first[:2]))
    assert torch.equal(dataset.train.images, torch.from_numpy(first))
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
    (dict(y_test=np.array([0, 3])), "y_test has the label 3; expected 0 to 2"),
    (dict(y_train=np.array([0, 0, 2, 0, 0, 2])), "y_train has the label 2; expected 0 to 1"),
    (dict(x_test=np.zeros((2, 4, 4, 3), np.uint8)), "expected one shape"),
    (dict(classes=np.array(["a"])), "expected one shape and 3 names"),
    (dict(y_train=np.array([{}, 1, 2, 0, 1, 2], dtype=object)), "plain arrays"),
])
def test_an_npz_that_cannot_be_used(tmp_path, changes, expected):
    with pytest.raises(DataError, match=expected) as error:
        data.load(npz(tmp_path / "a.npz", **changes))
    assert "a.npz" in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK not really")
    with pytest.raises(DataError, match="a.npz: cannot be read"):
        data.load(str(tmp_path / "a.npz"))
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match="a.txt: expected a folder"):
        data.load(str(tmp_path / "a.txt"))


def test_mnist_in_torchvisions_layout(tmp_path):
    """Files as torchvision keeps them: big-endian headers, then bytes."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    pixels = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)
    for part in ("train", "t10k"):
        for name, magic, array in (("images-idx3-ubyte", 2051, pixels),
                                   ("labels-idx1-ubyte", 2049, np.array([7, 0, 4], np.uint8))):
            header = struct.pack(f">{array.ndim + 1}i", magic, *array.shape)
            (raw / f"{part}-{name}").write_bytes(header + array.tobytes())
            with gzip.open(raw / f"{part}-{name}.gz", "wb") as file:
                file.write(header + array.tobytes())
    dataset = data.load("mnist", tmp_path)
    assert torch.equal(dataset.train.images, torch.from_numpy(pixels)[:, None])
    assert dataset.test.labels.tolist() == [7, 0, 4] and dataset.classes[7] == "7"


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
def test_a_named_set_that_cannot_be_had_is_an_error_and_leaves_nothing(tmp_path, no_network, name):
    with pytest.raises(DataError, match=f"{name} is neither in .*--dataset shapes"):
        data.load(name, tmp_path / "deep" / "data")
    assert list(tmp_path.iterdir()) == []


def test_without_a_name_shapes_stand_in_with_a_warning(tmp_path, no_network, capsys):
    assert data.load(None, tmp_path).name == "shapes"
    warning = capsys.readouterr().err
    assert "WARNING: cifar10 is neither" in warning and "say nothing about CIFAR-10" in warning


def test_shapes_do_not_stand_in_for_a_set_that_is_there_but_broken(tmp_path, no_network):
    root = make_folder(tmp_path / "cifar10")
    (root / "test/bee/1.png").write_bytes(b"")
    with pytest.raises(DataError, match="bee/1.png"):
        data.load(None, tmp_path)


def test_a_reader_that_torchvision_lacks_is_named(tmp_path, monkeypatch):
    def needs_scipy(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
    monkeypatch.setitem(data.NAMES, "svhn", (needs_scipy, {}, {}))
    with pytest.raises(DataError, match="pip install scipy"):
        data.load("svhn", tmp_path)


# ---------------------------------------------------------------- shapes

def test_shapes_are_the_same_at_every_run_and_balanced():
    a, b = data.shapes(train=200, test=50), data.shapes(train=200, test=50)
    assert torch.equal(a.train.images, b.train.images) and torch.equal(a.test.labels, b.test.labels)
    assert a.train.labels.bincount().tolist() == [20] * 10
    assert a.test.labels.bincount().tolist() == [5] * 10
    both = torch.cat([a.train.images, a.test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 250  # no image is twice in it, none of train in test


def test_a_shape_covers_the_area_that_geometry_says():
    """A circle of radius 0.8, a ring from 0.5 to 0.9, a square of side 1.4."""
    axis = torch.linspace(-1.5, 1.5, 1501)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for label, area in ((0, np.pi * 0.64), (1, np.pi * (0.81 - 0.25)), (2, 1.96)):
        share = (data._inside(label, x, y) < 0).float().mean().item()
        assert share * 9 == pytest.approx(area, rel=0.01)


# ---------------------------------------------------------------- draws and batches

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


def test_size_scales_the_shorter_side_and_crops_the_centre():
    image = torch.zeros(1, 3, 4, 8, dtype=torch.uint8)
    image[..., 2:6] = 255  # the central square is white
    pixels = data.to_pixels(data.normalise(image, size=8))
    assert pixels.shape == (1, 3, 8, 8)
    assert (pixels[..., 1:7] > 0.99).all()


def test_the_command_prints_counts_and_saves_a_sheet(tmp_path, capsys):
    folder = make_folder(tmp_path / "bugs")
    assert data.main(["--dataset", str(folder), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].split() == ["ant", "3", "2"]
    assert Image.open(tmp_path / "out/bugs_samples.png").size[0] > 500
    for wrong in (["--dataset", str(tmp_path / "nowhere")], ["--size", "x"], ["cifar10"]):
        with pytest.raises(SystemExit) as end:
            data.main(wrong)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and wrong[-1] in error


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
            own = times[whole.labels == label]
            assert ((own == 1).sum(), (own == 2).sum()) == (once, twice)
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
    ("smote", {}, "nothing to make of 40"), ("smote", {"bird": 0.02}, "expected two or more")])
def test_variants_that_cannot_be_made(variant, shares, expected):
    with pytest.raises(data.DataError, match=expected):
        data.vary(unequal([40, 40, 40, 40]), NAMES, variant, shares, 0)


def test_smote_lies_between_a_picture_and_one_of_its_nearest_neighbours():
    whole = unequal([30, 12])
    made = data.smote(whole, seed=0, k=3)
    assert torch.equal(made.images[:42], whole.images)
    synthetic = made.images[42:].flatten(1).double()
    assert data.counts(made, 2) == [30, 30] and made.labels[42:].tolist() == [1] * 18
    own = whole.images[whole.labels == 1].flatten(1).double()
    far = torch.cdist(own, own).fill_diagonal_(math.inf)
    near = far.argsort(1)[:, :3]
    for picture in synthetic:
        # On some line from a picture to one of its three nearest: picture = a + gap * (b - a).
        misses = []
        for i in range(12):
            for j in near[i].tolist():
                way = own[j] - own[i]
                gap = ((picture - own[i]) @ way / (way @ way)).clamp(0, 1)
                misses.append((own[i] + gap * way - picture).abs().max().item())
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
    with pytest.raises(data.DataError, match="some, not all"):
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
    made = data.blur(data._split(images, torch.zeros(2)), 2.0).images
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


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_every_batch(processes):
    split = data.shapes(train=21, test=10).train
    arguments = dict(batch_size=4, epoch_seed=5, flip=True, size=14, margin=True)
    whole = list(data.batches(split, **arguments))
    shares = [list(data.batches(split, **arguments, part=(rank, processes))) for rank in range(processes)]
    for i, (images, labels) in enumerate(whole[:-1]):
        for rank in range(processes):
            assert torch.equal(shares[rank][i][0], images[rank::processes])
            assert torch.equal(shares[rank][i][1], labels[rank::processes])
    assert [len(share[-1][1]) for share in shares] == [1] * processes  # of the last batch's one image


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

    def angles(**how):
        (made, _), = data.batches(split, 200, scale="0..1", **how)
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
