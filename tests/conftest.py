import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import train  # noqa: E402


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
