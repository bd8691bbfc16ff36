"""Wrong invocations of every program: each is answered by one line that names the value and the way out, with
status 2, and leaves nothing behind."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import models
import train


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A folder of wrong things; `tiny.npz` and `run` in it are right."""
    npz, run = trained
    root = tmp_path_factory.mktemp("wrong")
    shutil.copy(npz, root / "tiny.npz")
    shutil.copytree(run, root / "run")
    grey = np.arange(10, dtype=np.uint8)[:, None, None] * np.full((32, 32), 20, np.uint8)
    np.savez(root / "grey.npz", x_train=grey, y_train=np.arange(10), x_test=grey, y_test=np.arange(10))
    np.savez(root / "one.npz", x_train=grey, y_train=np.zeros(10, int), x_test=grey, y_test=np.zeros(10, int))
    (root / "file").write_text("hello")
    (root / "empty").mkdir()
    for size, name in ((8, "a"), (9, "b")):
        for part in ("train", "test"):
            (root / "unequal" / part / name).mkdir(parents=True)
            Image.new("RGB", (size, size), "white").save(root / "unequal" / part / name / "1.png")
    content = torch.load(run / "best.pt", weights_only=True)
    torch.save({key: value for key, value in content.items() if key != "settings"}, root / "no-settings.pt")
    torch.save({"a": 1}, root / "other.pt")
    return root


TRAIN = [  # flags ({} is the folder of wrong things), a part of the answer
    ("--version v44", "no version 'v44'; did you mean 'v4'"),
    ("--version custom --dataset {}/tiny.npz", "--version custom: expected --encoder beside it"),
    ("--encoder C(32)>Q(8) --dataset {}/nowhere", "token 2 'Q(8)'"),  # before any data is read
    ("--encoder C(4)>C(4)>C(4)>C(4)>C(4)>C(4) --dataset {}/tiny.npz", "cannot pool a map of 1x1"),
    ("--encoder T(8) --dataset {}/tiny.npz", "has no mirror"),
    ("--version v4 --classifier L(128) --dataset {}/tiny.npz", "ends in L'"),
    ("--version v4 --decoder T(32) --dataset {}/tiny.npz", "3 channels"),
    ("--version v1 --skip --dataset {}/tiny.npz", "skip joins maps"),
    ("--version cnn --skip", "--skip: has no effect without --alpha"),
    ("--version vgg --no-pretrained --dataset {}/grey.npz", "3 channels"),
    ("--version mnist --dataset {}/tiny.npz", "3x32x32"),
    ("--no-pretrained", "--no-pretrained: has no effect without a version that has pretrained weights"),
    ("--version cnn --alpha 1 --dataset {}/tiny.npz", "--alpha 1: cnn has no classifier"),
    ("--version cnn6 --beta 1 --dataset {}/tiny.npz", "--beta 1: cnn6 has no decoder"),
    ("--version v4 --kl 1 --dataset {}/tiny.npz", "--kl 1: v4 has no variational code"),
    ("--version fashion-cnn --scale imagenet --dataset {}/grey.npz", "expected 0..1"),
    ("--init {}/nowhere.pt --dataset {}/tiny.npz", "No such file"),
    ("--init {}/run/best.pt --dataset {}/tiny.npz", "its encoder is"),
    ("--dataset cifar11", "no data set 'cifar11'"),
    ("--dataset {}/empty", "empty"),
    ("--dataset {}/unequal", "--size"),
    ("--dataset {}/file", "file"),
    ("--dataset {}/tiny.npz --classes ring,dog", "ring,dog"),
    ("--dataset {}/tiny.npz --train-size 100", "100"),
    ("--dataset {}/tiny.npz --val-share 0.001", "0.001"),
    ("--dataset {}/tiny.npz --labels 9", "--labels 9: expected at least one for each of 10 classes"),
    ("--dataset {}/one.npz --version v3", "--alpha 1: one has one class here"),
    ("--dataset {}/tiny.npz --variant constrained", "circle=0.5"),
    ("--dataset {}/tiny.npz --delta 1 --jigsaw-grid 5", "does not cut images of 32x32"),
    ("--val-share 1", "'1': expected a number of at least 0, at most 0.9"),
    ("--constrain ring=0.5", "--constrain: has no effect without --variant"),
    ("--variant smote --constrain ring", "expected CLASS=SHARE"),
    ("--scale -1..1", "a value that begins with - is written --flag=-..."),
    ("--dataset mnist --flip", "--flip: has no effect without images other than digits"),
    ("--noise x", "invalid float value: 'x'"),
    ("--gamma inf", "'inf': expected a number"),
    ("--alpha 0 --beta 0 --gamma 1", "nothing to train on"),
    ("--labels 5 --variant smote", "expected a --variant that copies no image"),
    ("--separate --no-decoder", "--separate: trains a decoder and then a classifier"),
    ("--separate --epochs 1", "--separate needs at least 2"),
    ("--no-freeze-encoder", "--no-freeze-encoder: has no effect without --separate"),
    ("--momentum 0.9 --optimizer adam", "--momentum: has no effect without --optimizer sgd or muon"),
    ("--optimizer lion", "invalid choice: 'lion'"),
    ("--epochs 1.5", "invalid int value: '1.5'"),
    ("--seed -1", "'-1'"),
    ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ("--device warp --dataset {}/tiny.npz", "--device warp: unavailable on this machine"),
    ("--device cuda:99 --dataset {}/tiny.npz", "CUDA GPUs; expected auto, cpu, cuda, cuda:N or mps"),
    ("--output {}/file --dataset {}/tiny.npz --version v3", "file"),
    ("--jobs 2", "--list, --jobs: no effect on one run"),
    ("--sweep width", "--sweep width: expected SETTING=V1,V2,... or one of help labels"),
    ("--sweep beta=0,1 --beta 1", "--beta: beta=0,1 varies it"),
    ("--sweep beta=0,x", "invalid float value: 'x'"),
    ("--seeds 2 --resume {}/run", "expected neither --resume nor torchrun"),
    ("--resume {}/empty", "not the folder of a run"),
    ("--resume {}/run --beta 0", "a run resumes with its own settings"),
    ("--resume {}/run", "has completed 2 epochs"),
]
EVALUATE = [
    ("", "one of the arguments --ckpt --compare is required"),
    ("--ckpt {}/nowhere.pt", "No such file"),
    ("--ckpt {}/file", "no whole checkpoint"),
    ("--ckpt {}/other.pt", "no whole checkpoint"),
    ("--ckpt {}/no-settings.pt", "has no settings"),
    ("--ckpt {}/run/best.pt --images {}/nowhere.png", "nowhere.png"),
    ("--ckpt {}/run/best.pt --images {}/empty", "no picture there"),
    ("--ckpt {}/run/best.pt --images {}/file --knn 3", "--knn: no effect here"),
    ("--ckpt {}/run/best.pt --against beta=0", "--against: no effect here"),
    ("--compare {}/run --dataset {}/tiny.npz", "--dataset: no effect here"),
    ("--ckpt {}/run/best.pt --knn 0", "--knn 0: expected 1 to 60"),
    ("--ckpt {}/run/best.pt --dataset {}/grey.npz", "the checkpoint takes 3x32x32"),
    ("--compare {}/empty", "no finished run"),
]
OTHERS = [(models, "v44", "did you mean"), (models, "C(8)>Q(2)", "token 2")]


@pytest.mark.parametrize("program, flags, answer", [
    *((train, *row) for row in TRAIN), *((evaluate, *row) for row in EVALUATE), *OTHERS],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else value.replace("{}/", "") or "none")
def test_a_wrong_command_is_answered_by_one_line(program, flags, answer, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    try:
        status = program.main([word.replace("{}", str(place)) for word in flags.split()])
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and answer in error, error
    assert error.count("\n") == 1 and error.startswith(f"{program.__name__}.py: error: ")
    assert list(tmp_path.iterdir()) == []
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*")}
