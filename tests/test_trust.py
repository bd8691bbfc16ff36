"""Nothing lost: runs that are killed at any moment, whose disk fills up, that are interrupted or
that several processes train, end as one that was left in peace."""
import csv
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
import train

ROOT = Path(__file__).parent.parent
TIMES = {"seconds", "images_per_second", "test_seconds"}


@pytest.fixture(scope="module")
def server():
    """Starts train.main in processes that share the imports, so that a start costs little."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    start(context, ["-h"]).join()  # the imports are done when times are taken
    return context


def child(argv, limit=None):
    """train.main in a process of its own, silent; limit: the largest file that it can write."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    if limit is not None:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(train.main(argv))


def start(server, argv, limit=None):
    process = server.Process(target=child, args=(argv, limit))
    process.start()
    return process


def log(folder):
    """A run's log without its times."""
    with open(folder / "log.csv") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def assert_same(one, two):
    """Two runs have the same log and, bit for bit, the same checkpoints."""
    assert log(one) == log(two)
    for name in ("best.pt", "last.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (one, two))
        assert a["epoch"] == b["epoch"]
        for key, weight in a["model"].items():
            assert torch.equal(weight, b["model"][key]), (name, key)
    results = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["reconstruction"] == results[1]["reconstruction"]


def assert_whole(folder):
    """Every file of a run that is there can be read."""
    json.loads((folder / "config.json").read_text())
    for name in ("best.pt", "last.pt"):
        if (folder / name).exists():
            evaluate.load_checkpoint(folder / name)
    if (folder / "metrics.json").exists():
        json.loads((folder / "metrics.json").read_text())
    if (folder / "log.csv").exists():
        assert len({len(row) for row in log(folder)}) == 1


RUN = ["--version", "v4", "--device", "cpu", "--batch-size", "20"]


@pytest.mark.parametrize("flags, epochs, kills", [([], 5, 14), (["--separate", "--delta", "0.5"], 6, 10)])
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(flags, epochs, kills, tiny, tmp_path, server):
    """24 kills, at moments drawn over all of a run's time, the writing of its files included."""
    argv = [*RUN, "--dataset", tiny, "--epochs", str(epochs), *flags]
    begun = time.time()
    whole = start(server, [*argv, "--output", str(tmp_path / "whole")])
    whole.join()
    length = time.time() - begun
    whole, = (tmp_path / "whole").iterdir()
    draw, survived = random.Random(0), 0
    for turn in itertools.count():
        out = tmp_path / f"turn{turn}"
        while True:
            runs = list(out.glob("v4*"))
            if runs and (runs[0] / "metrics.json").exists():
                break
            process = start(server, ["--resume", str(runs[0])] if runs else [*argv, "--output", str(out)])
            process.join(draw.uniform(0.2, 1) * length)
            if process.exitcode is None:
                process.kill()
                process.join()
                survived += 1
                for each in out.glob("v4*"):
                    assert_whole(each)
            else:
                assert process.exitcode == 0
        assert_same(whole, *out.glob("v4*"))
        if survived >= kills:
            return


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes as Linux does")
def test_a_full_disk_destroys_nothing(tiny, tmp_path, server):
    argv = [*RUN, "--dataset", tiny, "--output", str(tmp_path)]
    for epochs in ("4", "2"):
        process = start(server, [*argv, "--epochs", epochs])
        process.join()
    whole, folder = tmp_path / "v4_dataset-tiny_epochs4_batch-size20", tmp_path / "v4_dataset-tiny_epochs2_batch-size20"
    assert evaluate.load_checkpoint(folder / "last.pt")[1]["epoch"] == 2
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for limit in (0, 100, 5_000, 100_000, 2_000_000):
        process = start(server, ["--resume", str(folder), "--epochs", "4"], limit)
        process.join()
        assert process.exitcode == (2 if limit < 5_000 else 1)  # config.json or a checkpoint
        assert_whole(folder)
        assert not list(folder.rglob("*.part"))
        for path in (folder / "best.pt", folder / "last.pt", folder / "recon.png", folder / "metrics.json"):
            assert path.read_bytes() == files[path], path
    process = start(server, ["--resume", str(folder), "--epochs", "4"])
    process.join()
    assert_same(folder, whole)


@pytest.fixture
def peaceful(tiny, tmp_path):
    """A run of three epochs, left in peace."""
    assert train.main([*RUN, "--dataset", tiny, "--epochs", "3", "--output", str(tmp_path / "whole")]) == 0
    folder, = (tmp_path / "whole").iterdir()
    return folder


def test_ctrl_c_keeps_the_whole_epochs_and_says_how_to_go_on(peaceful, tiny, tmp_path, monkeypatch, capsys):
    epochs = iter(range(9))
    train_epoch = train.train_epoch

    def interrupted(*args):
        if next(epochs) == 2:
            raise KeyboardInterrupt
        return train_epoch(*args)
    monkeypatch.setattr(train, "train_epoch", interrupted)
    assert train.main([*RUN, "--dataset", tiny, "--epochs", "3", "--output", str(tmp_path / "out")]) == 130
    folder, = (tmp_path / "out").iterdir()
    assert f"go on with: python train.py --resume {folder}" in capsys.readouterr().err
    assert evaluate.load_checkpoint(folder / "last.pt")[1]["epoch"] == 2
    assert train.main(["--resume", str(folder)]) == 0
    assert_same(folder, peaceful)
    config = json.loads((folder / "config.json").read_text())
    assert config["command"][2] == "--version" and config["resumed"][0]["command"][2] == "--resume"


def test_a_longer_run_is_the_run_that_was_longer(peaceful, tiny, tmp_path):
    argv = [*RUN, "--dataset", tiny, "--epochs", "2", "--output", str(tmp_path / "out")]
    assert train.main(argv) == 0
    folder, = (tmp_path / "out").iterdir()
    assert train.main(["--resume", str(folder), "--epochs", "3"]) == 0
    assert_same(folder, peaceful)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_epoch(tiny, tmp_path, monkeypatch,
                                                                               capsys):
    steps, weighted_loss = iter(range(99)), train.weighted_loss

    def poisoned(*weights, **tensors):
        if next(steps) == 4:  # epoch 2, step 2 of three
            tensors["reconstruction"] = tensors["reconstruction"] / 0
        return weighted_loss(*weights, **tensors)
    monkeypatch.setattr(train, "weighted_loss", poisoned)
    assert train.main([*RUN, "--dataset", tiny, "--epochs", "3", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "stopped: epoch 2, step 2: the autoencoder loss is " in error and error.count("\n") == 1
    folder, = tmp_path.iterdir()
    model, content = evaluate.load_checkpoint(folder / "last.pt")
    assert content["epoch"] == 1 and len(log(folder)) == 1
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


def test_two_processes_train_what_one_trains(tiny, tmp_path):
    """torchrun with two processes on the CPU, both halves of separate training and the jigsaw, whose
    last batch has one image: the same weights to 1e-5, one log, one folder."""
    flags = ["--version", "v3", "--dataset", tiny, "--train-size", "41", "--batch-size", "8", "--epochs", "4",
             "--separate", "--delta", "0.5", "--no-freeze-encoder", "--class-weights", "balanced",
             "--precision", "fp32", "--device", "cpu", "--output"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           ROOT / "train.py", *flags, tmp_path / "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: python evaluate.py") == 1 and "2 processes" in done.stdout
    assert train.main([*flags, str(tmp_path / "one")]) == 0
    (one,), (two,) = ((tmp_path / name).iterdir() for name in ("one", "two"))
    assert sorted(each.name for each in one.iterdir()) == sorted(each.name for each in two.iterdir())
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (one, two))
    for name, weight in a["model"].items():
        torch.testing.assert_close(b["model"][name], weight, rtol=0, atol=1e-5)
    for row, other in zip(log(one), log(two)):
        assert row.keys() == other.keys()
        for key, value in row.items():
            assert (value == other[key] == "") or float(value) == pytest.approx(float(other[key]), rel=1e-3), key


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_process_that_dies_ends_the_run_which_can_go_on(tiny, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py",
               "--version", "v3", "--dataset", tiny, "--epochs", "9999", "--device", "cpu", "--output", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("v3*/last.pt")):
        assert process.poll() is None, process.stderr.read()
        os.sched_yield()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in error
    folder, = tmp_path.glob("v3*")
    done = evaluate.load_checkpoint(folder / "last.pt")[1]["epoch"]
    assert train.main(["--resume", str(folder), "--epochs", str(done + 1)]) == 0
    assert len(log(folder)) == done + 1
