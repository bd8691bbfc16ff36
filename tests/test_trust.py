"""Nothing lost: runs that are killed at any moment, whose disk is full, that are interrupted or that
several processes train, end as one that nothing disturbed."""
import contextlib
import csv
import errno
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import evaluate
import losses
import train

ROOT = Path(__file__).parent.parent
TIMES = {"seconds", "images_per_second", "test_seconds"}
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc, or limits files")


@pytest.fixture(scope="module")
def server():
    """Starts train.main in processes that share the imports, so that a start costs little."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    start(context, ["-h"]).join()  # the imports are done when times are taken
    return context


SWEEP = [{"version": "v3"}, {"version": "v3", "beta": 0.0}, {"version": "cnn10", "lr": 0.002}]


def child(argv, limit, environment, output):
    """train.main in a process of its own. limit: the largest file that it can write."""
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a sweep has started the server
    os.environ.update(environment)
    train.SWEEPS["kind"] = train.Sweep(SWEEP, "beta=0", "for these tests")
    # Pictures are written, but not drawn: that would be most of a run's time.
    evaluate.save_figure = lambda figure, path: evaluate.write_whole(path, lambda part: part.write_bytes(b"drawn"))
    if sys.version_info < (3, 14):  # this process's own come from the same server, as they should in any case
        multiprocessing.forkserver.ensure_running = lambda: None
        multiprocessing.forkserver._forkserver.ensure_running = lambda: None
    if limit is not None:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if "RANK" in environment:  # counts the process groups
        init = train.dist.init_process_group
        train.dist.init_process_group = lambda *args, **kwargs: (print("a group"), init(*args, **kwargs))
    if "GROUP" in environment:
        os.setpgid(0, 0)
    sys.exit(train.main(argv))


def start(server, argv, limit=None, environment={}, output=os.devnull):
    process = server.Process(target=child, args=([*map(str, argv)], limit, environment, output))
    process.start()
    return process


def pair(server, argv, folder):
    """train.main in two processes that train together, as torchrun starts them: (processes, files of what
    they print)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    outputs = [folder / f"rank{rank}.txt" for rank in range(2)]
    return [start(server, argv, None, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, output)
            for rank, output in enumerate(outputs)], outputs


def two(server, argv, folder):
    """What each of two processes that train together prints, which both end well."""
    processes, outputs = pair(server, argv, folder)
    for process in processes:
        process.join(60)
    printed = [output.read_text() for output in outputs]
    assert [process.exitcode for process in processes] == [0, 0], printed
    return printed


def log(folder):
    """A run's log without its times."""
    with open(folder / "log.csv") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def assert_same(one, other):
    """Two runs have the same log and, bit for bit, the same checkpoints."""
    assert log(one) == log(other)
    for name in ("best.pt", "last.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        assert a["epoch"] == b["epoch"]
        for key, weight in a["model"].items():
            assert torch.equal(weight, b["model"][key]), (name, key)
    results = [json.loads((folder / "metrics.json").read_text()) for folder in (one, other)]
    assert results[0].get("accuracy") == results[1].get("accuracy")
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


# ---------------------------------------------------------------- kills

def files(folder):
    """The files of a folder that is being written to, with their times."""
    found = set()
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found.add((place, name, os.stat(os.path.join(place, name)).st_mtime_ns))
    return found


def watch(process, folder, changes=math.inf):
    """Returns when the process has ended, or so many files have come, gone or changed. Returns how many have."""
    seen, count = files(folder), 0
    while process.exitcode is None and count < changes:
        process.join(0.002)
        now = files(folder)
        count, seen = count + len(now ^ seen), now
    return count


@pytest.mark.parametrize("flags, epochs, kills", [
    ([], 5, 12), (["--separate", "--delta", "0.5", "--labels", "5"], 6, 8)])
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(flags, epochs, kills, tiny, tmp_path, server):
    """20 kills, at moments drawn over all that a run does, the writing of its files included."""
    argv = ["--version", "v4", "--device", "cpu", "--batch-size", "4", "--dataset", tiny, "--classes", "ring,star",
            "--epochs", epochs, *flags, "--output"]
    changes = watch(start(server, [*argv, tmp_path / "whole"]), tmp_path / "whole")
    whole, = (tmp_path / "whole").iterdir()
    draw, survived = random.Random(0), 0
    for turn in itertools.count():
        out = tmp_path / f"turn{turn}"
        while True:
            runs = list(out.glob("v4*"))
            if runs and (runs[0] / "metrics.json").exists():
                break
            process = start(server, ["--resume", runs[0]] if runs else [*argv, out])
            watch(process, out, draw.randint(0, changes // 2))
            process.join(draw.uniform(0, 0.05))
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


def children():
    """The processes that come from the server: those of these tests, and their own."""
    pid = multiprocessing.forkserver._forkserver._forkserver_pid
    return {int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def comparison(folder):
    """The rows of a comparison, dicts, without the times."""
    table, _ = (folder / "comparison" / "comparison.md").read_text().split("\n\n")
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [{key: value for key, value in zip(header, row) if key != "s per epoch"} for row in rows]


@needs_linux
def test_a_sweep_killed_at_any_moment_ends_as_one_left_alone(tiny, tmp_path, server):
    """5 kills, of the sweep and its runs at once."""
    argv = ["--sweep", "kind", "--jobs", "2", "--dataset", tiny, "--classes", "ring,star", "--epochs", "3",
            "--device", "cpu", "--output"]
    name, printed = "sweep-kind_dataset-tiny_classes-ring-star_epochs3", tmp_path / "printed.txt"
    changes = watch(start(server, [*argv, tmp_path / "whole"], output=printed), tmp_path / "whole")
    whole = tmp_path / "whole" / name
    names = sorted(each.parent.name for each in whole.glob("[!.]*/config.json"))
    assert len(comparison(whole)) == len(names) == 3, printed.read_text()
    draw, kills, others = random.Random(1), 0, children()
    for turn in itertools.count():
        folder = tmp_path / f"turn{turn}" / name
        while True:
            process = start(server, [*argv, tmp_path / f"turn{turn}"], output=printed)
            watch(process, folder, draw.randint(0, changes // 2))
            process.join(draw.uniform(0, 0.05))
            if process.exitcode is not None:
                assert process.exitcode == 0, printed.read_text()
                break
            process.kill()
            kills += 1
            while pids := children() - others:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.join()
            for each in folder.glob("[!.]*/config.json"):
                assert_whole(each.parent)
        assert sorted(each.parent.name for each in folder.glob("[!.]*/config.json")) == names
        for each in names:
            assert_same(whole / each, folder / each)
        assert comparison(folder) == comparison(whole)
        if kills >= 5:
            return


@needs_linux
def test_the_runs_of_a_sweep_end_with_it(tiny, tmp_path, server):
    """The sweep is killed; its runs, in processes of their own, are not, and see it."""
    others = children()
    process = start(server, ["--version", "v3", "--seeds", "2", "--jobs", "2", "--dataset", tiny, "--epochs", "99999",
                             "--device", "cpu", "--output", tmp_path])
    while len(list(tmp_path.glob("v3*/last.pt"))) < 2:
        assert process.exitcode is None
        os.sched_yield()
    runs = children() - others - {process.pid}
    assert len(runs) == 2
    process.kill()
    process.join()
    deadline = time.time() + 10
    while children() & runs and time.time() < deadline:
        os.sched_yield()
    left = children() & runs
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    for folder in tmp_path.glob("v3*"):
        assert_whole(folder)


# ---------------------------------------------------------------- full disks, Ctrl-C, numbers that are not finite

@needs_linux
def test_a_full_disk_destroys_nothing(tiny, tmp_path, server):
    argv = [*RUN, "--dataset", tiny, "--output", tmp_path]
    for epochs in ("4", "2"):
        start(server, [*argv, "--epochs", epochs]).join()
    whole, folder = (tmp_path / f"v4_dataset-tiny_epochs{epochs}_batch-size20" for epochs in (4, 2))
    assert evaluate.load_checkpoint(folder / "last.pt")[1]["epoch"] == 2
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    output = tmp_path / "output.txt"
    for limit in (0, 5_000, 2_000_000):
        process = start(server, ["--resume", folder, "--epochs", "4"], limit, output=output)
        process.join()
        assert process.exitcode == 1
        if limit > 1000:  # else the message itself cannot be written to the output
            assert re.search(rf"stopped: {folder}/(best|last)\.pt cannot be written: .*; its completed epochs are in",
                             output.read_text())
        assert_whole(folder)
        assert not list(folder.rglob("*.part"))
        for path in (folder / "best.pt", folder / "last.pt", folder / "recon.png", folder / "metrics.json"):
            assert path.read_bytes() == files[path], path
    start(server, ["--resume", folder, "--epochs", "4"]).join()
    assert_same(folder, whole)


def test_an_output_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    """As with > file on a full disk."""
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(sys, "stdout", Full())
    assert fails(["--sweep", "kind", "--list"]) == 1
    error = capsys.readouterr().err
    assert "train.py: stopped: " in error and "No space left on device" in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """A run of three epochs."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert train.main([*RUN, "--dataset", tiny, "--epochs", "3", "--output", str(root)]) == 0
    folder, = root.iterdir()
    return folder


def fails(argv):
    """The exit status of a command that cannot end well."""
    with pytest.raises(SystemExit) as exit:
        train.main([*map(str, argv)])
    return exit.value.code


def test_ctrl_c_keeps_the_whole_epochs_and_says_how_to_resume(undisturbed, tiny, tmp_path, monkeypatch, capsys):
    calls, train_epoch = itertools.count(), train.train_epoch

    def interrupted(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return train_epoch(*args)
    monkeypatch.setattr(train, "train_epoch", interrupted)
    assert fails([*RUN, "--dataset", tiny, "--epochs", "3", "--output", tmp_path]) == 130
    folder, = tmp_path.iterdir()
    assert capsys.readouterr().err == (f"train.py: interrupted; its completed epochs are in {folder}; resume with: "
                                       f"{train.script('train.py', '--resume', folder)}\n")
    assert evaluate.load_checkpoint(folder / "last.pt")[1]["epoch"] == 2
    assert train.main(["--resume", str(folder)]) == 0
    assert_same(folder, undisturbed)
    config = json.loads((folder / "config.json").read_text())
    assert config["command"][2] == "--version" and config["resumed"][0]["command"][2] == "--resume"


@needs_linux
def test_ctrl_c_while_pictures_are_read_is_one_line(tmp_path, server):
    """A terminal sends it to all processes: to the one that trains and to those that read."""
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    Image.new("RGB", (96, 96)).save(tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    for part, name in itertools.product(("train", "test"), ("a", "b")):
        (pictures / part / name).mkdir(parents=True)
        for i in range(400):
            (pictures / part / name / f"{i}.png").write_bytes(content)
    process = start(server, ["--version", "v3", "--dataset", pictures, "--device", "cpu", "--output", out],
                    environment={"GROUP": "own"}, output=tmp_path / "printed.txt")
    while not any(path.stat().st_size > 1000 for path in pictures.glob(".cache-*.npy.*")):  # a part of it is read
        assert process.exitcode is None
        os.sched_yield()
    os.killpg(process.pid, signal.SIGINT)
    process.join()
    assert (tmp_path / "printed.txt").read_text().splitlines()[-1:] == ["train.py: interrupted"]
    assert process.exitcode == 130 and "Traceback" not in (tmp_path / "printed.txt").read_text()
    assert not out.exists() and not list(pictures.glob(".cache-*.npy*"))


def test_ctrl_c_while_data_is_prepared_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "load", interrupted)
    assert fails(["--version", "v3", "--dataset", tiny, "--output", tmp_path / "out"]) == 130
    assert capsys.readouterr().err == "train.py: interrupted\n" and not (tmp_path / "out").exists()


def test_a_longer_run_is_the_run_that_was_longer(undisturbed, tiny, tmp_path):
    assert train.main([*RUN, "--dataset", tiny, "--epochs", "2", "--output", str(tmp_path)]) == 0
    folder, = tmp_path.iterdir()
    assert train.main(["--resume", str(folder), "--epochs", "3"]) == 0
    folder, = tmp_path.iterdir()
    assert folder.name == undisturbed.name
    assert_same(folder, undisturbed)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_epoch(tiny, tmp_path, monkeypatch, capsys):
    steps, weighted_loss = itertools.count(), losses.weighted_loss

    def not_finite(weights, **tensors):
        if next(steps) == 4:  # epoch 2, step 2 of three
            tensors["reconstruction"] = tensors["reconstruction"] / 0
        return weighted_loss(weights, **tensors)
    monkeypatch.setattr(losses, "weighted_loss", not_finite)
    assert fails([*RUN, "--dataset", tiny, "--epochs", "3", "--output", tmp_path]) == 1
    error = capsys.readouterr().err
    assert "stopped: epoch 2, step 2: the autoencoder loss is " in error and error.count("\n") == 1
    folder, = tmp_path.iterdir()
    model, content = evaluate.load_checkpoint(folder / "last.pt")
    assert content["epoch"] == 1 and len(log(folder)) == 1
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


# ---------------------------------------------------------------- several processes

def assert_close(one, other):
    """Two runs have the same weights to 1e-5 and nearly the same logs."""
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (one, other))
    for name, weight in a["model"].items():
        torch.testing.assert_close(b["model"][name], weight, rtol=0, atol=1e-5)
    for row, expected in zip(log(one), log(other), strict=True):
        assert row.keys() == expected.keys()
        for key, value in row.items():
            if value or expected[key]:
                assert float(value) == pytest.approx(float(expected[key]), rel=1e-3), key


def test_two_processes_train_what_one_trains(tiny, tmp_path):
    """torchrun with two processes on the CPU: both halves of separate training, the jigsaw, few labels, and
    shares of unequal size."""
    flags = ["--version", "v3", "--dataset", tiny, "--train-size", "41", "--batch-size", "8", "--epochs", "2",
             "--separate", "--delta", "0.5", "--no-freeze-encoder", "--class-weights", "balanced", "--labels", "13",
             "--precision", "fp32", "--device", "cpu", "--output"]
    both = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             ROOT / "train.py", *flags, tmp_path / "two"], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)
    assert train.main([*flags, str(tmp_path / "one")]) == 0
    printed, error = both.communicate()
    assert both.returncode == 0, error
    assert printed.count("next: python ") == 1 and "2 processes" in printed
    (one,), (two,) = ((tmp_path / name).iterdir() for name in ("one", "two"))
    assert sorted(each.name for each in one.iterdir()) == sorted(each.name for each in two.iterdir())
    assert_close(two, one)


def test_two_processes_measure_the_batchnorm_that_they_save(tiny, tmp_path, server):
    """Each has statistics of its own share; the first one's are measured by both and saved."""
    flags = ["--version", "mobilenet", "--no-pretrained", "--size", "32", "--dataset", tiny, "--batch-size", "16",
             "--epochs", "1", "--precision", "fp32", "--device", "cpu", "--output", tmp_path / "out"]
    two(server, flags, tmp_path)
    folder, = (tmp_path / "out").iterdir()
    model, content = evaluate.load_checkpoint(folder / "last.pt")
    s = content["settings"]
    found = evaluate.measure(model, evaluate.prepare_data(s).test, s)
    row, = log(folder)
    for key in ("classifier", "autoencoder", "accuracy", "mse"):
        assert float(row[f"test_{key}"]) == pytest.approx(found[key], rel=1e-5), key


def test_two_processes_train_every_run_of_a_sweep_in_one_group(tiny, tmp_path, server):
    """One run after the other, each by both, and one comparison. What is finished is not trained again."""
    flags = ["--sweep", "kind", "--dataset", tiny, "--epochs", "2", "--precision", "fp32", "--device", "cpu",
             "--output", tmp_path / "out"]
    printed = two(server, flags, tmp_path)
    assert [text.count("a group") for text in printed] == [1, 1]
    folder, = (tmp_path / "out").iterdir()
    names = ["cnn10_dataset-tiny_lr0.002_epochs2_precision-fp32", "v3_dataset-tiny_beta0_epochs2_precision-fp32",
             "v3_dataset-tiny_epochs2_precision-fp32"]
    assert sorted(each.parent.name for each in folder.glob("*/config.json")) == names
    assert all(json.loads((folder / name / "config.json").read_text())["processes"] == 2 for name in names)
    assert printed[0].count("2 processes, into") == 3 and "2 processes, into" not in printed[1]
    assert len(comparison(folder)) == 3 and printed[0].count("\nrun  ") == 1
    assert train.main([*map(str, flags[2:-2]), "--version", "v3", "--output", str(tmp_path / "one")]) == 0
    assert_close(folder / names[2], *(tmp_path / "one").iterdir())


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_other_and_the_run_can_resume(dies, tiny, tmp_path, server):
    flags = ["--version", "v3", "--dataset", tiny, "--epochs", "99999", "--device", "cpu", "--output",
             tmp_path / "out"]
    processes, outputs = pair(server, flags, tmp_path)
    while not list((tmp_path / "out").glob("v3*/last.pt")):
        assert None is processes[0].exitcode is processes[1].exitcode
        os.sched_yield()
    processes[dies].kill()
    other = processes[1 - dies]
    other.join(60)
    printed = outputs[1 - dies].read_text()
    assert other.exitcode == 1 and "train.py: stopped: another process has ended" in printed, printed
    assert "Traceback" not in printed
    folder, = (tmp_path / "out").glob("v3*")
    assert_whole(folder)
    done = evaluate.load_checkpoint(folder / "last.pt")[1]["epoch"]
    assert train.main(["--resume", str(folder), "--epochs", str(done + 1)]) == 0
    folder, = (tmp_path / "out").glob("v3*")
    assert len(log(folder)) == done + 1


@pytest.mark.parametrize("flags, message", [
    (["--output", "file"], "expected a folder to write to"), (["--batch-size", "1"], "for each of 2 processes"),
    (["--train-size", "99"], "--train-size: 99 images asked for"),
    (["--seeds", "2", "--jobs", "2"], "--jobs 2: has no effect under torchrun")])
def test_what_is_refused_ends_both_processes(flags, message, tiny, tmp_path, server, monkeypatch):
    """Also where the first one alone finds it out, and the other waits for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    flags = ["--version", "v3", "--dataset", tiny, "--device", "cpu", "--output", tmp_path / "out", *flags]
    flags = [str(tmp_path / flag) if flag == "file" else flag for flag in flags]
    processes, outputs = pair(server, flags, tmp_path)
    for process in processes:
        process.join(60)
    printed = [output.read_text() for output in outputs]
    assert processes[0].exitcode == 2 and processes[1].exitcode in (1, 2), printed
    assert message in printed[0] and "Traceback" not in "".join(printed) and not (tmp_path / "out").exists()
