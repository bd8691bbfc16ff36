"""models.py, data.py and losses.py each work copied alone into an empty folder."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USES = {
    "models": "import torch, models\n"
              "logits, rebuilt = models.build('v2')(torch.zeros(2, 3, 32, 32))\n"
              "print(*logits.shape, *rebuilt.shape)",
    "losses": "import torch, losses\n"
              "total, terms = losses.weighted_loss(2, 0, logits=torch.zeros(4, 8),\n"
              "                                    labels=torch.tensor([0, 1, 2, 3]))\n"
              "print(f'{total.item():.4f}', *terms)",
    "data": "import data\n"
            "dataset = data.shapes(train=40, test=20)\n"
            "images, labels = next(data.batches(dataset.train, 8, epoch_seed=0, flip=True))\n"
            "print(dataset.name, *images.shape, *labels.shape)",
}
PRINTS = {"models": "2 10 2 3 32 32", "losses": "4.1589 classifier", "data": "shapes 8 3 32 32 8"}


@pytest.mark.parametrize("name", USES)
def test_a_file_copied_alone_works(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", USES[name]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PRINTS[name]  # 4.1589 = 2 * ln 8
