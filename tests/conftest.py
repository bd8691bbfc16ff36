import os
import subprocess
import sys
from pathlib import Path

# Before torch is imported, and for all processes that tests start: bits are compared between them.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402


def simulates_cuda():
    """Whether tensors can pretend to be on a GPU. torch 2.6, built for CUDA, needs a driver even for that."""
    try:
        with FakeTensorMode():
            return torch.ones(2).to("cuda")[1:].device.type == "cuda"
    except (RuntimeError, AssertionError):
        return False


simulated_cuda = pytest.mark.skipif(not simulates_cuda(), reason="cannot simulate a GPU without a driver")


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
    return tiny, next(root.iterdir())


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out the pictures at a run's end, which take most of a short run's time."""
    for name in ("draw_curves", "draw_reconstructions", "draw_prior", "draw_plane", "draw_confusion",
                 "draw_comparison"):
        monkeypatch.setattr(evaluate, name, lambda *_: None)


@pytest.fixture(scope="session")
def python():
    """python(*words, folder): runs `python words` in a folder, in a process of its own."""
    def run(*words, folder):
        return subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True)
    return run
