"""Wrong invocations of every program, and files from strangers: each is answered by one line that
names the value and the way out, with status 2, and leaves nothing behind."""
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import models
import train

SQUARE = np.zeros((2, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A folder of wrong things; `tiny.npz` and `run` in it are right."""
    npz, run = trained
    root = tmp_path_factory.mktemp("wrong")
    shutil.copy(npz, root / "tiny.npz")
    shutil.copytree(run, root / "run")
    with np.load(npz) as file:
        arrays = dict(file)
    np.savez(root / "keys.npz", **{key: value for key, value in arrays.items() if key != "y_test"})
    np.savez(root / "range.npz", **arrays | {"y_test": np.full(30, 99)})
    np.savez(root / "float.npz", **arrays | {"x_train": arrays["x_train"] / 255})
    np.savez(root / "object.npz", **arrays | {"y_train": np.array([{}] * 60, dtype=object)})
    np.savez(root / "two.npz", x_train=SQUARE, y_train=np.arange(2), x_test=SQUARE, y_test=np.arange(2))
    np.savez(root / "grey.npz", x_train=np.zeros((10, 32, 32), np.uint8), y_train=np.arange(10),
             x_test=np.zeros((10, 32, 32), np.uint8), y_test=np.arange(10))
    (root / "file").write_text("")
    (root / "text.npz").write_text("hello")
    (root / "empty").mkdir()

    def folder(name, train=("a", "b"), test=("a", "b"), size=(8, 8)):
        for part, classes in (("train", train), ("test", test)):
            for each in classes:
                (root / name / part / each).mkdir(parents=True)
                Image.new("RGB", size).save(root / name / part / each / "1.png")
    folder("half", test=())
    folder("unlike", test=("a", "c"))
    folder("hollow")
    (root / "hollow/train/b/1.png").unlink()
    folder("bad")
    (root / "bad/test/b/1.png").write_bytes(b"\x89PNG and no more")
    folder("cut")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(root / "cut/test/b/1.png")
    (root / "cut/test/b/1.png").write_bytes((root / "cut/test/b/1.png").read_bytes()[:3000])
    folder("unequal")
    Image.new("RGB", (9, 8)).save(root / "unequal/test/b/1.png")
    (root / "no-config").mkdir()
    for name, text in (("bad-config", "{"), ("list-config", "[]"), ("old-config", "{}")):
        (root / name).mkdir()
        (root / name / "config.json").write_text(text)
    shutil.copytree(run, root / "best-only")
    shutil.copy(run / "best.pt", root / "best-only/last.pt")
    shutil.copytree(run, root / "separate-run")
    config = json.loads((run / "config.json").read_text())
    (root / "separate-run/config.json").write_text(json.dumps(config | {"separate": True}))
    shutil.copytree(run, root / "no-log")
    (root / "no-log/log.csv").write_text("hello\n")
    return root


TRAIN = [  # flags ({} is the folder of wrong things), a part of the answer
    ("--version v44", "no version 'v44'; did you mean 'v4'"),
    ("--version resnet-9000", "no version 'resnet-9000'"),
    ("--encoder C(32)>Q(8)", "token 2 'Q(8)'"),
    ("--encoder resnet5000", "token 1 'resnet5000'"),
    ("--encoder C(8)>", "token 2 ''"),
    ("--encoder C(0)", "token 1 'C(0)': expected a whole number"),
    ("--classifier L(128", "token 1 'L(128'"),
    ("--classifier D(1.0)>L'(10)", "token 1 'D(1.0)': expected a probability"),
    ("--classifier L(128) --dataset {}/tiny.npz", "a classifier ends in L'"),
    ("--encoder L(999999) --dataset {}/tiny.npz", "would have 3,071,996,928 weights"),
    ("--encoder L(64)>C(8) --dataset {}/tiny.npz", "token 2 'C(8)': expected a map"),
    ("--encoder C(4)>C(4)>C(4)>C(4)>C(4)>C(4) --dataset {}/tiny.npz", "pools a 1x1 map to nothing"),
    ("--version v4 --size 3 --dataset {}/tiny.npz", "pools a 1x1 map to nothing"),
    ("--encoder T(8) --dataset {}/tiny.npz", "T has no mirror"),
    ("--encoder C'(8)>A(16) --dataset {}/tiny.npz", "A has no mirror"),
    ("--encoder vgg16 --classifier A(1)>L'(10) --dataset {}/tiny.npz", "vgg16: has no mirror"),
    ("--version v1 --skip --dataset {}/tiny.npz", "skip joins maps"),
    ("--version resnet --no-pretrained --size 16 --dataset {}/tiny.npz", "sides of at least 32"),
    ("--version vgg --no-pretrained --dataset {}/grey.npz", "expected 3 channels"),
    ("--no-pretrained", "v4 has no pretrained weights"),
    ("--dataset {}/nowhere", "no data set"),
    ("--dataset cifar11", "no data set 'cifar11'; expected one of cifar10"),
    ("--dataset {}/empty", "has no folder train/"),
    ("--dataset {}/half", "has no folder test/"),
    ("--dataset {}/unlike", "only one of them has b, c"),
    ("--dataset {}/hollow", "Found no valid file for the classes b"),
    ("--dataset {}/bad", "b/1.png: not a picture"),
    ("--dataset {}/cut", "b/1.png: cannot be read as a picture"),
    ("--dataset {}/unequal", "--size N scales and crops"),
    ("--dataset {}/keys.npz", "expected x_train y_train x_test y_test"),
    ("--dataset {}/range.npz", "has the label 99; expected 0 to 9"),
    ("--dataset {}/float.npz", "x_train is float64"),
    ("--dataset {}/object.npz", "plain arrays"),
    ("--dataset {}/text.npz", "text.npz: cannot be read"),
    ("--dataset {}/file", "expected a folder"),
    ("--dataset {}/tiny.npz --classes ring,dog", "--classes: no class 'dog'; tiny has circle ring"),
    ("--dataset {}/tiny.npz --train-size 100", "--train-size: 100 images asked for; the set has 60"),
    ("--dataset {}/tiny.npz --test-size 31", "--test-size: 31"),
    ("--dataset {}/tiny.npz --val-share 0.001", "--val-share: a share of 0.001"),
    ("--val-share 1", "'1': expected a number of at least 0, at most 0.9"),
    ("--variant smoted", "invalid choice: 'smoted'"),
    ("--dataset {}/tiny.npz --variant constrained", "such as --constrain circle=0.5"),
    ("--dataset {}/tiny.npz --variant smote --constrain dog=0.5", "no class 'dog'"),
    ("--dataset {}/tiny.npz --variant smote --constrain ring=0.01", "'ring' is left with no training image"),
    ("--dataset {}/tiny.npz --variant smote --constrain ring=0.2", "smote: class 1 has 1 training images"),
    ("--constrain ring=0.5", "--constrain: belongs to --variant"),
    ("--variant constrained --constrain ring", "expected a number above 0"),
    ("--variant constrained --constrain ring=2", "at most 1"),
    ("--variant constrained --constrain =0.5", "expected CLASS=SHARE"),
    ("--blur -1", "'-1': expected a number of at least 0"),
    ("--noise x", "argument --noise: 'x'"),
    ("--size 0", "'0'"),
    ("--size 5000", "at most 1024"),
    ("--alpha 0 --beta 0", "nothing to train on"),
    ("--alpha 0 --no-decoder", "nothing to train on"),
    ("--beta 1 --no-decoder", "--beta 1: there is no decoder"),
    ("--delta 1 --no-decoder", "--delta 1: there is no decoder"),
    ("--beta -1", "argument --beta: '-1'"),
    ("--alpha nan", "argument --alpha: 'nan'"),
    ("--gamma inf", "argument --gamma: 'inf'"),
    ("--jigsaw-grid 3", "--jigsaw-grid 3: belongs to --delta"),
    ("--delta 1 --jigsaw-grid 5 --dataset {}/tiny.npz", "--jigsaw-grid 5: does not cut images of 32x32"),
    ("--class-weights heavy", "invalid choice: 'heavy'"),
    ("--class-weights balanced --alpha 0", "--class-weights balanced: needs alpha"),
    ("--separate --beta 0", "--separate: trains a decoder and then a classifier"),
    ("--separate --no-decoder", "--separate: trains a decoder"),
    ("--separate --epochs 1", "--epochs 1: --separate has two halves"),
    ("--no-freeze-encoder", "--no-freeze-encoder: belongs to --separate"),
    ("--lr 0", "'0': expected a number above 0"),
    ("--lr fast", "'fast': expected a number"),
    ("--momentum 1.5", "at most 1"),
    ("--momentum 0.5 --optimizer adam", "belongs to --optimizer sgd"),
    ("--optimizer lion", "invalid choice: 'lion'"),
    ("--epochs 0", "'0': expected a whole number of at least 1"),
    ("--epochs 1.5", "'1.5': expected a whole number"),
    ("--batch-size -32", "'-32'"),
    ("--lr-step 0", "'0'"),
    ("--lr-decay 2", "at most 1"),
    ("--seed x", "'x'"),
    ("--seed -1", "'-1'"),
    ("--device warp --dataset {}/tiny.npz", "--device warp: not on this machine"),
    ("--precision fp7", "invalid choice: 'fp7'"),
    ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ("v4", "unrecognized arguments: v4"),
    ("--output {}/file --dataset {}/tiny.npz", "expected a folder to write to"),
    ("--version cnn --alpha 1", "--alpha 1: cnn has no classifier"),
    ("--version cnn --classifier L'(10)", "is not trained with alpha 0"),
    ("--version cnn6 --beta 1", "cnn6 has no decoder"),
    ("--version v4 --kl 1", "--kl 1: needs an encoder that ends in N(n)"),
    ("--version mnist --dataset {}/tiny.npz", "mnist: images of 3x32x32; expected 1x28x28"),
    ("--version joint5 --dataset {}/tiny.npz", "--classes: no class 'automobile'"),
    ("--rotate 500", "at most 180"),
    ("--sweep width", "invalid choice: 'width'"),
    ("--sweep kind --version v4", "--version: cannot be combined with --sweep"),
    ("--sweep kind --dataset {}/nowhere", "no data set"),
    ("--resume {}/nowhere", "expected the folder of a run"),
    ("--resume {}/no-config", "expected the folder of a run"),
    ("--resume {}/bad-config", "expected the folder of a run"),
    ("--resume {}/list-config", "expected the folder of a run"),
    ("--resume {}/old-config", "expected the folder of a run"),
    ("--resume {}/best-only", "last.pt: not a last.pt of train.py"),
    ("--resume {}/run", "its 2 epochs are done; --epochs N lengthens it"),
    ("--resume {}/run --epochs 1", "--epochs 1: 2 epochs are done"),
    ("--resume {}/run --epochs 3 --lr 0.5", "--lr 0.5: a run goes on with its own settings, here 0.01"),
    ("--resume {}/run --epochs 3 --version v4", "--version v4: a run goes on with its own settings, here v3"),
    ("--resume {}/run --epochs 3 --dataset shapes", "--dataset shapes: a run goes on"),
    ("--resume {}/run --epochs 3 --separate", "--separate True: a run goes on"),
    ("--resume {}/separate-run --epochs 6", "would move the halves"),
]

EVALUATE = [
    ("", "one of the arguments --ckpt --compare is required"),
    ("--ckpt {}/run/best.pt --compare {}/run", "not allowed with argument"),
    ("--ckpt {}/none.pt", "none.pt: no such file"),
    ("--ckpt {}/run", "no such file"),
    ("--ckpt {}/run/best.pt --images {}/file", "file: not a picture"),
    ("--ckpt {}/run/best.pt --images {}/none.png", "none.png: cannot be read"),
    ("--ckpt {}/run/best.pt --images {}/cut/test/b/1.png", "1.png: cannot be read as a picture"),
    ("--ckpt {}/run/best.pt --dataset {}/none", "no data set"),
    ("--ckpt {}/run/best.pt --dataset {}/two.npz", "has 2 classes, the checkpoint 10"),
    ("--ckpt {}/run/best.pt --dataset {}/grey.npz", "images of 1x32x32"),
    ("--ckpt {}/run/best.pt --device warp", "--device warp"),
    ("--ckpt {}/run/best.pt --output {}/file", "file"),
    ("--ckpt {}/run/best.pt --knm 5", "unrecognized arguments: --knm 5"),
    ("--ckpt {}/run/best.pt --knn 0", "'0': expected whole numbers"),
    ("--ckpt {}/run/best.pt --knn 1,x", "'1,x': expected whole numbers"),
    ("--ckpt {}/run/best.pt --knn 61", "--knn 61: more than the training images (60)"),
    ("--ckpt {}/run/best.pt --anomaly ring", "the checkpoint was trained with that class"),
    ("--ckpt {}/run/best.pt --anomaly dog", "--classes: no class 'dog'"),
    ("--compare {}/run {}/nowhere", "nowhere: not the folder of a run"),
    ("--compare {}/no-log", "no-log: not the folder of a run"),
]

MODELS = [("v9", "no version 'v9'; did you mean"), ("v1 v2", "expected one version"),
          ("--all", "no version '--all'")]

DATA = [
    ("--dataset {}/nowhere", "no data set"),
    ("--dataset {}/text.npz", "text.npz: cannot be read"),
    ("--dataset {}/unlike", "only one of them has b, c"),
    ("--dataset shapes --size 0", "--size 0: expected 1 to 1024"),
    ("--dataset shapes --size x", "invalid int value: 'x'"),
    ("--dataset {}/tiny.npz --output {}/file", "expected a folder to write to"),
    ("--colour", "unrecognized arguments: --colour"),
]


def ask(program, argv, capsys, out):
    """Runs a program in this process; returns its one line on stderr."""
    try:
        status = program.main(argv)
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    name = f"{program.__name__}.py: error: "
    assert status == 2, (argv, status, error)
    assert error.startswith(name) and error.count("\n") == 1 and "Traceback" not in error, (argv, error)
    assert not out.exists(), argv
    return error


@pytest.mark.parametrize("program, table", [(train, TRAIN), (evaluate, EVALUATE), (models, MODELS), (data, DATA)],
                         ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_invocation_is_answered_in_one_line(program, table, place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "outputs"
    before = sorted(place.rglob("*"))
    for flags, expected in table:
        error = ask(program, flags.replace("{}", str(place)).split(), capsys, out)
        assert expected in error, (flags, error)
    assert sorted(place.rglob("*")) == before and list(tmp_path.iterdir()) == []


def test_the_readme_counts_right():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"{sum(map(len, (TRAIN, EVALUATE, MODELS, DATA)))} wrong invocations" in readme


# ---------------------------------------------------------------- checkpoints from strangers

class Payload:
    """A pickle that runs code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def hostile(good, ran):
    """Contents of files that are not what they say: {name: bytes, or what torch.save shall write}."""
    content = torch.load(good, weights_only=True)
    payload, whole = Payload(str(ran)), good.read_bytes()
    other = models.build("v2").state_dict()
    nets = content["version"]
    return {
        "empty": b"", "text": b"hello", "cut": whole[:5000], "end-missing": whole[:-100],
        "flipped": whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 255]) * 64 + whole[len(whole) // 2 + 64:],
        "plain-pickle": pickle.dumps(payload), "pickle-2": pickle.dumps({"kind": payload}, 2),
        "code": payload, "code-inside": dict(content, settings=payload), "code-in-rows": dict(content, rows=[payload]),
        "code-in-weights": dict(content, model=dict(content["model"], more=payload)),
        "weights-alone": content["model"], "a-list": [1, 2], "another-kind": dict(content, kind="another program"),
        "other-weights": dict(content, model=other), "no-weights": dict(content, model={}),
        "a-string-of-weights": dict(content, model="weights"),
        "bad-notation": dict(content, version={"encoder": "C(?)"}),
        "unknown-field": dict(content, version=nets | {"code": "import os"}),
        "huge": dict(content, version=nets | {"encoder": "L(999999)", "in_shape": (3, 999, 999)}),
        "negative-shape": dict(content, version=nets | {"in_shape": (3, -32, 32)}),
        "no-settings": dict(content, settings={}), "no-classes": {key: value for key, value in content.items()
                                                                  if key != "classes"}}


def test_files_from_strangers_are_refused_and_no_code_of_theirs_runs(place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, ran, theirs = place / "run/last.pt", tmp_path / "code-was-run", tmp_path / "theirs"
    theirs.mkdir()
    files = hostile(good, ran)
    assert f"{len(files)} hostile files" in (Path(__file__).parent.parent / "README.md").read_text()
    for name, content in files.items():
        path = theirs / name / "last.pt"
        path.parent.mkdir()
        shutil.copy(place / "run/config.json", path.parent)
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        for program, argv in ((evaluate, ["--ckpt", str(path)]),
                              (train, ["--resume", str(path.parent), "--epochs", "3"])):
            error = ask(program, argv, capsys, tmp_path / "outputs")
            assert f"{name}/last.pt: not a checkpoint of train.py" in error, error
    assert not ran.exists()
