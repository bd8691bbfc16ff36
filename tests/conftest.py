import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Sixty shapes as an .npz: a data set that takes no time."""
    dataset = data.shapes(train=60, test=30)
    path = tmp_path_factory.mktemp("tiny") / "tiny.npz"
    np.savez(path, x_train=dataset.train.images, y_train=dataset.train.labels,
             x_test=dataset.test.images, y_test=dataset.test.labels, classes=np.array(data.SHAPES))
    return str(path)
