import json
import multiprocessing.forkserver
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# Before torch is imported, and for all processes that tests start: bits are compared between them.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import train  # noqa: E402


def simulates_cuda():
    """Whether tensors can pretend to be on a GPU. torch 2.6, built for CUDA, needs a driver even for that."""
    try:
        with FakeTensorMode():
            return torch.ones(2).to("cuda")[1:].device.type == "cuda"
    except (RuntimeError, AssertionError):
        return False


simulated_cuda = pytest.mark.skipif(not simulates_cuda(), reason="this torch cannot simulate a GPU without a driver")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Sixty shapes as an .npz: a data set that takes no time."""
    dataset = data.shapes(train=60, test=30)
    path = tmp_path_factory.mktemp("tiny") / "tiny.npz"
    np.savez(path, x_train=dataset.train.images, y_train=dataset.train.labels,
             x_test=dataset.test.images, y_test=dataset.test.labels, classes=np.array(data.SHAPES))
    return str(path)


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """A small data set on disk and a run on it: (npz, run folder)."""
    root = tmp_path_factory.mktemp("trained")
    assert train.main(["--version", "v3", "--dataset", tiny, "--epochs", "2", "--test-size", "20",
                       "--output", str(root), "--device", "cpu"]) == 0
    return tiny, root / "v3_dataset-tiny_test-size20_epochs2"


# ---------------------------------------------------------------- programs in processes of their own

# Reads jobs, one a line, and runs each in a fork of this process, which has done the imports that take seconds. The
# fork ends as every interpreter does, with a last flush of its output.
SERVER = """
import json, os, runpy, sys
import matplotlib.backends.backend_agg, matplotlib.figure, torch, torchvision.datasets, torchvision.transforms.v2
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
os.chdir(job["folder"])
os.dup2(os.open("../err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
if job["stdout"] == "closed":  # as after >&-, when the interpreter finds no file 1
    os.close(1)
    sys.stdout = sys.__stdout__ = None
elif job["stdout"] == "pipe":  # whose reader has ended
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(writer)
    os.close(reader)
else:
    os.dup2(os.open("../out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
sys.argv, sys.path[0] = job["argv"], os.path.dirname(job["argv"][0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def servers(tmp_path_factory):
    """Starts at once the server of `python` and multiprocessing's: their imports, of seconds, take place while the
    first tests run."""
    if not hasattr(os, "fork"):
        yield None
        return
    multiprocessing.forkserver.set_forkserver_preload(["train"])
    multiprocessing.forkserver.ensure_running()
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, cwd=tmp_path_factory.mktemp("server"))
    yield server
    server.kill()
    server.communicate()


@pytest.fixture(scope="session")
def python(servers):
    """python(program, *flags, folder, stdout): runs a file as `python program flags` in a folder, in a process of
    its own. stdout: "file"; "closed", as by >&-; or "pipe", whose reader has ended. Returns a Done."""
    if servers is None:
        pytest.skip("needs os.fork")

    def run(program, *flags, folder, stdout="file"):
        for name in ("out", "err"):
            (folder.parent / name).write_text("")
        job = {"argv": [str(program), *map(str, flags)], "folder": str(folder), "stdout": stdout}
        servers.stdin.write(json.dumps(job) + "\n")
        servers.stdin.flush()
        status = int(servers.stdout.readline())
        return Done(status, (folder.parent / "out").read_text(), (folder.parent / "err").read_text())
    return run
