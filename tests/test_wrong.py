"""Wrong invocations of every program, and untrusted files: each is answered by one line that names the value and the
way out, with status 2, and leaves nothing behind."""
import itertools
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import models
import train

SQUARE = np.zeros((2, 32, 32, 3), np.uint8)
README = Path(__file__).parent.parent / "README.md"


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
    np.savez(root / "names.npz", **arrays | {"classes": np.array([*data.SHAPES[:-1], "dog"])})
    np.savez(root / "twice.npz", **arrays | {"classes": np.array([*data.SHAPES[:-1], data.SHAPES[0]])})
    np.savez(root / "text-for-names.npz", **arrays | {"classes": np.array("a,b")})
    np.savez(root / "bytes-for-names.npz", **arrays | {"classes": np.array([f"c{i}".encode() for i in range(10)])})
    np.savez(root / "untested.npz", **{key: value for key, value in arrays.items() if key != "classes"}
             | {"y_test": np.full(30, 2)})
    flat = np.zeros((2, 0, 5), np.uint8)
    np.savez(root / "flat.npz", x_train=flat, y_train=np.arange(2), x_test=flat, y_test=np.arange(2))
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

    def changed(name, **config):  # a copy of the run whose config.json differs
        shutil.copytree(run, root / name)
        content = json.loads((run / "config.json").read_text())
        settings = content["settings"] | config.pop("settings", {})
        (root / name / "config.json").write_text(json.dumps(content | config | {"settings": settings}))
    (root / "no-config").mkdir()
    for name, text in (("bad-config", "{"), ("list-config", "[]"), ("old-config", "{}")):
        (root / name).mkdir()
        (root / name / "config.json").write_text(text)
    changed("separate-run", settings={"separate": True})
    changed("odd-run", settings={"lr": "fast"})
    changed("other-version", settings={"help": True})  # no setting
    changed("other-images", images={"train": 61, "test": 20})
    changed("no-data", settings={"dataset": "/nowhere/tiny.npz"})
    shutil.copytree(run, root / "best-only")
    shutil.copy(run / "best.pt", root / "best-only/last.pt")
    shutil.copytree(run, root / "no-log")
    (root / "no-log/log.csv").write_text("hello\n")
    shutil.copytree(run, root / "unfinished/run")
    (root / "unfinished/run/metrics.json").unlink()
    content = torch.load(run / "best.pt", weights_only=True)
    torch.save(content | {"trained": ["classifier"]}, root / "no-decoder.pt")
    torch.save(content | {"kind": "autoencoder checkpoint, format 1"}, root / "format-1.pt")
    torch.save(torch.nn.Linear(2, 2), root / "objects.pt")
    torch.save({"a": 1}, root / "other.pt")
    return root


TRAIN = [  # flags ({} is the folder of wrong things), a part of the answer
    # the network
    ("--version v44", "no version 'v44'; did you mean 'v4'"),
    ("--version resnet-9000", "no version 'resnet-9000'"),
    ("--version custom", "--version custom: expected --encoder NOTATION beside it"),
    ("--encoder C(32)>Q(8)", "token 2 'Q(8)'"),
    ("--encoder resnet5000", "token 1 'resnet5000'"),
    ("--encoder C(8)>", "token 2 ''"),
    ("--encoder C(0)", "token 1 'C(0)': expected a whole number"),
    ("--encoder L(64)>N(8)>L(4)", "token 2 'N(8)': N(n) gives the code"),
    ("--encoder L(999999) --dataset {}/tiny.npz", "would have 3,071,996,928 weights"),
    ("--encoder L(64)>C(8) --dataset {}/tiny.npz", "token 2 'C(8)': expected a map"),
    ("--encoder C(4)>C(4)>C(4)>C(4)>C(4)>C(4) --dataset {}/tiny.npz", "cannot pool a map of 1x1"),
    ("--encoder T(8) --dataset {}/tiny.npz", "T has no mirror"),
    ("--encoder C'(8)>A(16) --dataset {}/tiny.npz", "A has no mirror"),
    ("--encoder squeezenet1_1 --classifier A(1)>L'(10) --dataset {}/tiny.npz", "squeezenet1_1: has no mirror"),
    ("--version v4 --encoder L(64) --dataset {}/tiny.npz", "does not fit the encoder 'L(64)'"),
    ("--version v4 --size 3 --dataset {}/tiny.npz", "cannot pool a map of 1x1"),
    ("--classifier L(128", "token 1 'L(128'"),
    ("--classifier D(1.0)>L'(10)", "token 1 'D(1.0)': expected a probability"),
    ("--classifier L'(10)", "--classifier: expected --encoder NOTATION beside it, or --version NAME"),
    ("--version v4 --classifier L(128) --dataset {}/tiny.npz", "a classifier ends in L'"),
    ("--version fashion-cnn --scale imagenet", "ends in a sigmoid, which does not reach its values; expected 0..1"),
    ("--version joint5 --scale imagenet", "ends in a tanh, which does not reach its values; expected 0..1 or -1..1"),
    ("--decoder T(32)>T(3)", "--decoder: expected --encoder NOTATION beside it"),
    ("--version v4 --decoder T(32) --dataset {}/tiny.npz", "expected the images' 3 channels"),
    ("--version v1 --skip --dataset {}/tiny.npz", "skip joins maps"),
    ("--version cnn --skip", "--skip: changes the classifier, which is not trained with alpha 0"),
    ("--version resnet --no-pretrained --size 16 --dataset {}/tiny.npz", "sides of at least 32"),
    ("--version vgg --no-pretrained --dataset {}/grey.npz", "expected 3 channels"),
    ("--version mnist --dataset {}/tiny.npz", "mnist: images of 3x32x32; expected 1x28x28"),
    ("--no-pretrained", "--no-pretrained: v4 has no pretrained weights"),
    ("--version v2 --pretrained", "--pretrained: v2 has no pretrained weights"),
    ("--version cnn --alpha 1", "--alpha 1: cnn has no classifier; --classifier NOTATION adds one"),
    ("--version cnn --classifier L'(10)", "is not trained with alpha 0; add --alpha 1"),
    ("--version cnn6 --beta 1", "the network has no decoder; --decoder mirror adds one"),
    ("--version v4 --kl 1", "--kl 1: needs an encoder that ends in N(n)"),
    ("--version vae --encoder C(8) --dataset {}/tiny.npz",
     "--kl 0.02 (the recipe of vae): needs an encoder that ends in N(n); --kl 0 leaves the term out"),
    # the data
    ("--dataset {}/nowhere", "no data set"),
    ("--dataset cifar11", "no data set 'cifar11'; expected one of cifar10"),
    ("--dataset {}/empty", "has no folder train/"),
    ("--dataset {}/half", "has no folder test/"),
    ("--dataset {}/half/train", "class 'a' has one picture; expected two or more"),
    ("--dataset {}/unlike", "only one of them has b, c"),
    ("--dataset {}/hollow", "Found no valid file for the classes b"),
    ("--dataset {}/bad", "b/1.png: not a picture"),
    ("--dataset {}/cut", "b/1.png: cannot be read as a picture"),
    ("--dataset {}/unequal", "--size N scales and crops"),
    ("--dataset {}/keys.npz", "expected x_train y_train x_test y_test"),
    ("--dataset {}/range.npz", "has the label 99; labels count from 0: expected 0 to 9"),
    ("--dataset {}/float.npz", "x_train is float64"),
    ("--dataset {}/object.npz", "plain arrays"),
    ("--dataset {}/text.npz", "text.npz: cannot be read"),
    ("--dataset {}/file", "expected a folder"),
    ("--dataset {}/tiny.npz --classes ring,dog",
     "--classes ring,dog: no class 'dog'; tiny has circle,ring"),
    ("--version joint5 --dataset {}/tiny.npz", "--classes automobile,cat,dog,horse,truck: no class 'automobile'"),
    ("--dataset {}/tiny.npz --train-size 100", "--train-size: 100 images asked for; the set has 60"),
    ("--dataset {}/tiny.npz --test-size 31", "--test-size: 31"),
    ("--dataset {}/tiny.npz --val-share 0.001", "--val-share: a share of 0.001"),
    ("--dataset {}/tiny.npz --labels 61", "--labels: 61 images asked for; the set has 60"),
    ("--val-share 1", "'1': expected a number of at least 0, at most 0.9"),
    ("--test-share 0", "'0': expected a number of at least 0.01, at most 0.9"),
    ("--dataset {}/tiny.npz --test-share 0.5", "--test-share 0.5: has no effect on tiny, which has test images of its"),
    ("--seeds 2 --seed 2147483648", "--seeds 2: the last seed would be 2147483649; expected at most 2147483648"),
    ("--seeds 2 --list --labels 5 --alpha 0", "--labels: has no effect without --alpha above 0"),
    ("--variant constrained --constrain ring=0.5,ring=0.1", "expected CLASS=SHARE,..., such as bird=0.5"),
    ("--dataset {}/twice.npz", "classes has the name 'circle' more than once; expected 10 different names"),
    ("--dataset {}/text-for-names.npz", "classes is <U3 of shape (); expected a row of 10 names"),
    ("--dataset {}/bytes-for-names.npz", "classes is |S2 of shape (10,); expected a row of 10 names"),
    ("--dataset {}/untested.npz --classes 0,1", "--classes 0,1: untested has no test image of 0 or 1"),
    ("--dataset=", "--dataset: '': expected a name or a path"),
    ("--dataset {}/flat.npz", "x_train is uint8 of shape (2, 0, 5); expected uint8 (N, H, W)"),
    ("--variant smoted", "invalid choice: 'smoted'"),
    ("--dataset {}/tiny.npz --variant constrained", "such as --constrain circle=0.5"),
    ("--dataset {}/tiny.npz --variant smote --constrain dog=0.5", "--variant smote: no class 'dog'"),
    ("--dataset {}/tiny.npz --variant smote --constrain ring=0.01", "'ring' is left with no training image"),
    ("--dataset {}/tiny.npz --variant smote --constrain ring=0.2", "smote: class 1 has 1 training images"),
    ("--constrain ring=0.5", "--constrain: has no effect without --variant"),
    ("--variant constrained --constrain ring", "expected CLASS=SHARE,..., such as bird=0.5"),
    ("--variant constrained --constrain ring=2", "at most 1"),
    ("--variant constrained --constrain =0.5", "expected CLASS=SHARE"),
    ("--blur -1", "'-1': expected a number of at least 0"),
    ("--noise x", "argument --noise: 'x'"),
    ("--clean-test", "--clean-test: has no effect without --noise"),
    ("--size 0", "'0'"),
    ("--size 5000", "at most 1024"),
    ("--margin", "--margin: has no effect without --size"),
    ("--scale 0..255", "invalid choice: '0..255'"),
    ("--scale -1..1", "--scale: expected one argument; a value that begins with - is written --flag=-..."),
    ("--rotate 500", "at most 180"),
    ("--dataset mnist --flip", "--flip: has no effect without images that may be mirrored"),
    ("--labels 10 --alpha 0", "--labels: has no effect without --alpha above 0"),
    ("--labels 0", "'0': expected a whole number of at least 1"),
    # the loss
    ("--alpha 0 --beta 0", "nothing to train on"),
    ("--alpha 0 --no-decoder", "nothing to train on"),
    ("--alpha 0 --beta 0 --gamma 1", "nothing to train on"),
    ("--beta 1 --no-decoder", "--beta 1: the network has no decoder; leave out --no-decoder"),
    ("--delta 1 --no-decoder", "--delta 1: the network has no decoder"),
    ("--beta -1", "argument --beta: '-1'"),
    ("--alpha nan", "argument --alpha: 'nan'"),
    ("--gamma inf", "argument --gamma: 'inf'"),
    ("--kl x", "argument --kl: 'x': expected a number"),
    ("--jigsaw-grid 3", "--jigsaw-grid: has no effect without --delta above 0"),
    ("--delta 1 --jigsaw-grid 5 --dataset {}/tiny.npz", "--jigsaw-grid 5: does not cut images of 32x32"),
    ("--delta 1 --jigsaw-grid 33", "at most 32"),
    ("--class-weights heavy", "invalid choice: 'heavy'"),
    ("--class-weights balanced --alpha 0", "--class-weights: has no effect without --alpha"),
    # the training
    ("--separate --beta 0", "--separate: trains a decoder and then a classifier"),
    ("--separate --no-decoder", "--separate: trains a decoder"),
    ("--separate --alpha 0", "--separate: trains a decoder and then a classifier"),
    ("--separate --epochs 1", "--epochs 1: --separate has two parts"),
    ("--no-freeze-encoder", "--no-freeze-encoder: has no effect without --separate"),
    ("--first-share 0.3", "--first-share: has no effect without --separate"),
    ("--first-decay 0.3", "--first-decay: has no effect without --separate"),
    ("--separate --first-share 1", "at most 0.99"),
    ("--lr 0", "'0': expected a number above 0"),
    ("--lr fast", "'fast': expected a number"),
    ("--momentum 1.5", "at most 1"),
    ("--momentum 0.5 --optimizer adam", "--momentum: has no effect without --optimizer sgd or muon"),
    ("--optimizer lion", "invalid choice: 'lion'"),
    ("--epochs 0", "'0': expected a whole number of at least 1"),
    ("--epochs 1.5", "'1.5': expected a whole number"),
    ("--batch-size -32", "'-32'"),
    ("--version mobilenet --no-pretrained --size 32 --batch-size 1 --dataset {}/tiny.npz",
     "--batch-size 1: mobilenet has BatchNorm; expected at least 2 images"),
    ("--lr-step 0", "'0'"),
    ("--lr-decay 2", "at most 1"),
    # the run
    ("--seed x", "'x'"),
    ("--seed -1", "'-1'"),
    ("--seed 2147483649", "at most 2.1"),
    ("--device warp --dataset {}/tiny.npz", "--device warp: unavailable on this machine"),
    ("--device meta --dataset {}/tiny.npz", "--device meta: unavailable on this machine"),
    ("--device cuda:99 --dataset {}/tiny.npz", "--device cuda:99: unavailable on this machine"),
    ("--precision fp7", "invalid choice: 'fp7'"),
    ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ("v4", "unrecognized arguments: v4"),
    ("--output {}/file --dataset {}/tiny.npz", "expected a folder to write to"),
    # several runs
    ("--sweep width", "invalid choice: 'width'"),
    ("--sweep kind --version v4", "--version: has no effect with --sweep"),
    ("--sweep kind --encoder C(8)", "--encoder: has no effect with --sweep"),
    ("--sweep kind --name mine", "--name: has no effect with --sweep"),
    ("--sweep kind --beta 0", "nothing to train on"),
    ("--sweep kind --alpha 1", "--alpha 1: mlp has no classifier"),
    ("--jobs 2", "--jobs: has no effect on one run; expected --sweep or --seeds beside it"),
    ("--list", "--list: has no effect on one run"),
    ("--seeds 0", "'0': expected a whole number of at least 1"),
    ("--seeds 2 --jobs 0", "'0': expected a whole number of at least 1"),
    ("--seeds 2 --momentum 0.5 --optimizer adam", "--momentum: has no effect without --optimizer sgd"),
    ("--seeds 2 --device warp --dataset {}/tiny.npz", "--device warp: unavailable on this machine"),
    # a run to resume
    ("--resume {}/nowhere", "nowhere: there is no such folder; expected the folder of a run"),
    ("--resume=", "--resume: '': expected a name or a path"),
    ("--resume {}/file", "file: is a file; expected the folder of a run"),
    ("--resume {}/no-config", "expected the folder of a run"),
    ("--resume {}/bad-config", "expected the folder of a run"),
    ("--resume {}/list-config", "expected the folder of a run"),
    ("--resume {}/old-config", "expected the folder of a run"),
    ("--resume {}/odd-run --epochs 3", "has no config.json of this version of the program; expected the folder"),
    ("--resume {}/other-version --epochs 3", "has no config.json of this version of the program; expected the folder"),
    ("--resume {}/best-only --epochs 3", "last.pt: not a last.pt of train.py"),
    ("--resume {}/run", "all 2 of its epochs are done; --epochs N lengthens it"),
    ("--resume {}/run --epochs 1", "--epochs 1: the run has completed 2 epochs"),
    ("--resume {}/run --epochs 3 --lr 0.5", "--lr 0.5: a run resumes with its own settings, here 0.01"),
    ("--resume {}/run --epochs 3 --version v4", "--version v4: a run resumes with its own settings, here v3"),
    ("--resume {}/run --epochs 3 --dataset shapes",
     "the data set's images are train 10000, test 20; expected train 60"),
    ("--resume {}/run --epochs 3 --separate", "--separate True: a run resumes with its own settings"),
    ("--resume {}/run --epochs 3 --output {}/empty", "empty: a run resumes with its own settings"),
    ("--resume {}/run --epochs 3 --device warp", "--device warp: unavailable"),
    ("--resume {}/run --seeds 2", "--resume: resumes one run; leave out --sweep, --seeds"),
    ("--resume {}/separate-run --epochs 6", "with --separate the completed epochs depend on the total"),
    ("--resume {}/other-images --epochs 3", "the data set's images are"),
    ("--resume {}/no-data --epochs 3", "an .npz file; where a run's data has moved, --dataset names its place"),
]

EVALUATE = [
    ("--ckpt {}/run/best.pt --output {}/file", "/file: expected a folder to write to"),
    ("--ckpt {}/run/best.pt --dataset Cifar-10", "did you mean 'cifar10'?"),
    ("--ckpt {}/objects.pt", "not a checkpoint of train.py (it is damaged or has more than tensors and plain values)"),
    ("--ckpt {}/other.pt", "not a checkpoint of train.py (it has no 'kind')"),
    ("--compare {}/run --output {}/file", "/file: expected a folder to write to"),
    ("", "one of the arguments --ckpt --compare is required"),
    ("--ckpt {}/run/best.pt --compare {}/run", "not allowed with argument"),
    ("--ckpt {}/none.pt", "none.pt: no such file; expected the best.pt or last.pt of a run"),
    ("--ckpt {}/run", "run: is a folder; expected a checkpoint in it"),
    ("--ckpt {}/format-1.pt", "format-1.pt: written by another version of this program; train the network again"),
    ("--ckpt {}/run/best.pt --images {}/file", "file: not a picture"),
    ("--ckpt {}/run/best.pt --images {}/none.png", "none.png: cannot be read"),
    ("--ckpt {}/run/best.pt --images {}/cut/test/b/1.png", "1.png: cannot be read as a picture"),
    ("--ckpt {}/run/best.pt --images {}/empty", "empty: is a folder; expected its pictures, such as"),
    ("--ckpt {}/run/best.pt --dataset {}/none", "no data set"),
    ("--ckpt {}/run/best.pt --dataset {}/two.npz", "has 2 classes, the checkpoint 10"),
    ("--ckpt {}/run/best.pt --dataset {}/names.npz", "its class 'dog' is none of the checkpoint's: circle ring"),
    ("--ckpt {}/run/best.pt --dataset {}/grey.npz", "images of 1x32x32, the checkpoint takes 3x32x32"),
    ("--ckpt {}/run/best.pt --dataset=", "--dataset: '': expected a name or a path"),
    ("--ckpt {}/run/best.pt --device warp", "--device warp: unavailable on this machine"),
    ("--ckpt {}/run/best.pt --knm 5", "unrecognized arguments: --knm 5"),
    ("--ckpt {}/run/best.pt --knn 0", "'0': expected whole numbers"),
    ("--ckpt {}/run/best.pt --knn 1,x", "'1,x': expected whole numbers"),
    ("--ckpt {}/run/best.pt --knn 61", "--knn 61: too few training images (60)"),
    ("--ckpt {}/run/best.pt --knn 1,55", "--knn 1,55: too few training images (60, of which a tenth"),
    ("--ckpt {}/run/best.pt --anomaly ring", "the checkpoint was trained with that class; train one without it"),
    ("--ckpt {}/run/best.pt --anomaly dog", "--anomaly dog: no class 'dog'"),
    ("--ckpt {}/no-decoder.pt --anomaly dog", "--anomaly dog: the checkpoint's decoder is not trained (beta 0)"),
    ("--ckpt {}/run/best.pt --codes {}/nowhere/codes.npz",
     "expected a file named .npz to write in a folder that exists"),
    ("--ckpt {}/run/best.pt --codes {}/empty", "expected a file named .npz to write in a folder that exists"),
    ("--ckpt {}/run/best.pt --images {}/run/recon/0_circle.png --codes {}/empty",
     "expected a file named .npz to write"),
    ("--ckpt {}/run/best.pt --images a.png --knn 5", "--knn: has no effect with --images; leave one out"),
    ("--ckpt {}/run/best.pt --images a.png --anomaly ring", "--anomaly: has no effect with --images"),
    ("--ckpt {}/run/best.pt --images a.png --dataset shapes", "--dataset: has no effect with --images"),
    ("--ckpt {}/run/best.pt --images a.png --data-dir data", "--data-dir: has no effect with --images"),
    ("--ckpt {}/run/best.pt --anomaly ring --knn 5", "--knn: has no effect with --anomaly; leave one out"),
    ("--ckpt {}/run/best.pt --anomaly ring --codes a.npz", "--codes: has no effect with --anomaly"),
    ("--ckpt {}/run/best.pt --against beta=0", "--against: has no effect with --ckpt"),
    ("--compare {}/run --images a.png", "--images: has no effect with --compare"),
    ("--compare {}/run --knn 5", "--knn: has no effect with --compare"),
    ("--compare {}/run --anomaly ring", "--anomaly: has no effect with --compare"),
    ("--compare {}/run --codes a.npz", "--codes: has no effect with --compare"),
    ("--compare {}/run --dataset shapes", "--dataset: has no effect with --compare"),
    ("--compare {}/run --data-dir data", "--data-dir: has no effect with --compare"),
    ("--compare {}/run --device cpu", "--device: has no effect with --compare"),
    ("--compare {}/run {}/nowhere", "nowhere: not the folder of a finished run"),
    ("--compare {}/empty", "empty: not the folder of a finished run"),
    ("--compare {}/no-log", "no-log: not the folder of a finished run"),
    ("--compare {}/unfinished/run", "run: not the folder of a finished run"),
    ("--compare {}/run --against v9", "--against v9: expected SETTING=VALUE or one of run"),
    ("--compare {}/run --against beta=0", "no two groups differ in beta alone, one of them with 0"),
]

MODELS = [
    ("v9", "no version 'v9'; did you mean"), ("v1 v2", "expected one version or encoder"),
    ("--all", "no version '--all'"), ("C(32)>Q(8)", "token 2 'Q(8)'"), ("C'(8)>A(1)", "A has no mirror"),
    ("L(64)>C(8)", "token 2 'C(8)': expected a map"),
]

DATA = [
    ("--dataset {}/nowhere", "no data set"),
    ("--dataset {}/text.npz", "text.npz: cannot be read"),
    ("--dataset {}/unlike", "only one of them has b, c"),
    ("--dataset shapes --size 0", "--size 0: expected 1 to 1024"),
    ("--dataset shapes --size x", "invalid int value: 'x'"),
    ("--dataset {}/half/train --test-share 0", "--test-share 0: expected a number above 0 and below 1"),
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


@pytest.mark.parametrize("program, flags, expected", [
    pytest.param(program, flags, expected, id=f"{program.__name__} {flags}".replace("{}/", ""))
    for program, table in ((train, TRAIN), (evaluate, EVALUATE), (models, MODELS), (data, DATA))
    for flags, expected in table])
def test_a_wrong_invocation_is_answered_in_one_line(program, flags, expected, place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_data = evaluate.prepare_data

    def prepare_path(s, *more, **named):  # no named set is looked for, or downloaded
        assert s.dataset not in (None, *data.NAMES)
        return prepare_data(s, *more, **named)
    monkeypatch.setattr(evaluate, "prepare_data", prepare_path)
    monkeypatch.setattr(train, "train_epoch", lambda *_: pytest.fail("training began"))
    before = set(place.rglob("*"))
    try:
        error = ask(program, flags.replace("{}", str(place)).split(), capsys, tmp_path / "outputs")
    finally:
        left = sorted(set(place.rglob("*")) - before, reverse=True)
        for path in left:  # so that the next one does not find it
            path.rmdir() if path.is_dir() else path.unlink()
    assert expected in error
    assert left == [] and list(tmp_path.iterdir()) == []


def test_every_flag_that_another_one_excludes_is_refused():
    pairs = {(flag, other) for flag, others in evaluate.EXCLUDED.items() for other in others}
    known = {action.dest for action in evaluate.make_parser()._actions}
    refused = {(flag, other) for flags, _ in EVALUATE for flag, other in pairs
               if {f"--{flag}", f"--{other.replace('_', '-')}"} <= set(flags.split())}
    assert refused == pairs and {name for pair in pairs for name in pair} <= known


def test_the_readme_counts_right():
    count = sum(map(len, (TRAIN, EVALUATE, MODELS, DATA)))
    assert f"{count} wrong invocations" in README.read_text()


@pytest.mark.parametrize("name", ["a/b", "../b", "..", ".", "x" * 300], ids=lambda name: name[:9])
def test_a_name_that_is_no_folder_name_is_refused(name, tiny, capsys, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    monkeypatch.setattr(train, "itertools", SimpleNamespace(  # nine tries at most to find a free name
        count=lambda start=0: iter(range(start, start + 9)), repeat=itertools.repeat, islice=itertools.islice))
    error = ask(train, ["--version", "v3", "--dataset", tiny, "--epochs", "1", "--name", name], capsys,
                tmp_path / "folder/outputs")
    assert "--name" in error and [each.name for each in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.parametrize("several", [["--seeds", "2"], ["--sweep", "kind"]])
def test_several_runs_are_checked_before_the_first_one_starts(several, place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run_all", lambda *_: pytest.fail("runs were started"))
    error = ask(train, [*several, "--dataset", f"{place}/nowhere"], capsys, tmp_path / "outputs")
    assert "no data set" in error


def test_a_run_that_another_process_trains_is_not_resumed(place, capsys, tmp_path):
    pytest.importorskip("fcntl")
    with train.locked(place / "run"):
        error = ask(train, ["--resume", str(place / "run"), "--epochs", "3"], capsys, tmp_path / "outputs")
    assert f"{place / 'run'}: another process is training here" in error


# ---------------------------------------------------------------- untrusted checkpoints

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
    other, nets, middle = models.build("v2").state_dict(), content["version"], len(whole) // 2

    def settings(**changes):
        return content | {"settings": content["settings"] | changes}
    encoder = {name: weight for name, weight in content["model"].items() if name.startswith("encoder")}
    return {
        "empty": b"", "text": b"hello", "cut": whole[:5000], "end-missing": whole[:-100],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) * 64 + whole[middle + 64:],
        "plain-pickle": pickle.dumps(payload), "pickle-2": pickle.dumps({"kind": payload}, 2),
        "code": payload, "code-inside": content | {"settings": payload},
        "code-in-rows": content | {"rows": [payload]},
        "code-in-weights": content | {"model": content["model"] | {"more": payload}},
        "weights-alone": content["model"], "a-list": [1, 2], "another-kind": content | {"kind": "another program"},
        "other-weights": content | {"model": other}, "no-weights": content | {"model": {}},
        "a-string-of-weights": content | {"model": "weights"},
        "bad-notation": content | {"version": {"encoder": "C(?)"}},
        "unknown-field": content | {"version": nets | {"code": "import os"}},
        "huge": content | {"version": nets | {"encoder": "L(999999)", "in_shape": (3, 999, 999)}},
        "negative-shape": content | {"version": nets | {"in_shape": (3, -32, 32)}},
        "no-classes": {key: value for key, value in content.items() if key != "classes"},
        "classes-of-numbers": content | {"classes": list(range(10))},
        "nine-classes": content | {"classes": ["a"] * 9},
        "escape-codes": content | {"classes": ["a\x1b[2J", *content["classes"][1:]]}, "line": settings(dataset="a\nb"),
        "no-settings": {key: value for key, value in content.items() if key != "settings"},
        "list-of-settings": content | {"settings": [1]},
        "scale": settings(scale="foo"), "scale-tensor": settings(scale=torch.zeros(2, 2)), "size": settings(size="a"),
        "size-of-no-network": settings(size=64), "size-above": settings(size=100_000), "seed": settings(seed=-1),
        "class-number": settings(classes=5), "class-numbers": settings(classes=[1, 2]),
        "labels": settings(labels="all"), "margin": settings(margin=1), "variant": settings(variant=["smote"]),
        "constrain": settings(constrain={1: 0.5}),
        "blur": settings(blur=float("nan")), "alpha": settings(alpha="1"), "data-dir": settings(data_dir=None),
        "grid": settings(jigsaw_grid=0), "no-tiles": settings(jigsaw_grid=5, delta=1.0),
        "precision": settings(precision="fp7"), "version": settings(version=4),
        "no-epoch": {key: value for key, value in content.items() if key != "epoch"},
        "epoch": content | {"epoch": "2"}, "epoch-0": content | {"epoch": 0},
        "trained": content | {"trained": "classifier"}, "trained-all": content | {"trained": ["all"]},
        "trained-nested": content | {"trained": [["classifier"]]}, "trained-nothing": content | {"trained": []},
        "trained-none": content | {"trained": None},
        "trained-what-is-not-there": content | {
            "version": nets | {"classifier": None, "decoder": None}, "model": encoder},
        "shape": content | {"image_shape": [32, 32]}, "shape-text": content | {"image_shape": ["3", "32", "32"]},
        "shape-0": content | {"image_shape": [3, 0, 32]}, "channels": content | {"image_shape": [7, 32, 32]},
        "grey": content | {"image_shape": [1, 32, 32]}, "larger": content | {"image_shape": [3, 64, 64]},
        "no-shape": {key: value for key, value in content.items() if key != "image_shape"}}


def unresumable(good):
    """Contents of a last.pt that can be evaluated, not resumed."""
    content = torch.load(good, weights_only=True)
    first = {"other-shape": {"momentum_buffer": torch.zeros(3)}, "other-keys": {"step": torch.zeros(())},
             "no-tensor": {"momentum_buffer": None}}
    return {
        **{name: content | {"optimizer": content["optimizer"] | {"state": content["optimizer"]["state"] | {0: state}}}
           for name, state in first.items()},
        "no-rows": {key: value for key, value in content.items() if key != "rows"},
        "rows": content | {"rows": 5}, "rows-of-numbers": content | {"rows": [1, 2]},
        "rows-empty": content | {"rows": []},
        "other-rows": content | {"rows": [{"epoch": 1}, {"epoch": 2}]}, "rows-of-text": content | {
            "rows": [row | {"lr": "fast"} for row in content["rows"]]},
        "tested-empty": content | {"tested": {}}, "tested-text": content | {"tested": content["tested"] | {"mse": "x"}},
        "confusion-cut": content | {"tested": content["tested"] | {"confusion": content["tested"]["confusion"][1:]}},
        "no-optimizer": content | {"optimizer": {}}, "optimizer-list": content | {"optimizer": [1]},
        "other-optimizer": content | {"optimizer": torch.optim.SGD([torch.zeros(1)]).state_dict()}}


def test_untrusted_files_are_refused_and_no_code_of_theirs_runs(place, capsys, tmp_path, monkeypatch):
    """Each by both programs, in place of a run's last.pt; evaluate.py reads a picture with it, too."""
    monkeypatch.chdir(tmp_path)
    good, ran, untrusted, wrong = place / "run/last.pt", tmp_path / "code-was-run", tmp_path / "untrusted", {}
    files = hostile(good, ran)
    for name, content in files.items():
        path = untrusted / name / "last.pt"
        path.parent.mkdir(parents=True)
        shutil.copy(place / "run/config.json", path.parent)
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        picture = str(place / "run/recon/0_circle.png")
        for program, argv in ((evaluate, ["--ckpt", str(path)]),
                              (evaluate, ["--ckpt", str(path), "--images", picture]),
                              (train, ["--resume", str(path.parent), "--epochs", "3"])):
            try:
                error = ask(program, argv, capsys, tmp_path / "outputs")
                assert f"{name}/last.pt: not a checkpoint of train.py" in error, error
            except Exception as defect:
                wrong[name, program.__name__, len(argv)] = f"{type(defect).__name__}: {defect}"[:300]
    assert not ran.exists()
    assert not wrong, "\n".join(f"{name}: {defect}" for name, defect in wrong.items())


def test_a_last_pt_that_no_run_can_resume_from_is_refused(place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = {}
    for name, content in unresumable(place / "run/last.pt").items():
        shutil.copytree(place / "run", tmp_path / name)
        torch.save(content, tmp_path / name / "last.pt")
        try:
            error = ask(train, ["--resume", str(tmp_path / name), "--epochs", "3"], capsys, tmp_path / "outputs")
            assert f"{name}/last.pt: not a last.pt of train.py" in error, error
        except (Exception, SystemExit) as defect:
            wrong[name] = f"{type(defect).__name__}: {defect}"[:300]
    assert not wrong, "\n".join(f"{name}: {defect}" for name, defect in wrong.items())


def test_the_readme_counts_hostile_files_right(place, tmp_path):
    good = place / "run/last.pt"
    count = len(hostile(good, tmp_path / "none")) + len(unresumable(good))
    assert f"{count} hostile files" in README.read_text()
