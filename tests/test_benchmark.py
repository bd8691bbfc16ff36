"""The benchmark's plain network computes what ours computes, and its ratios are of what it measures."""
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import benchmark  # noqa: E402
import models  # noqa: E402


@pytest.mark.parametrize("version", ["v2", "v4-plain"])
def test_the_plain_network_is_the_same_function(version):
    torch.manual_seed(0)
    ours = models.build(version).eval()
    torch.manual_seed(0)
    plain = benchmark.plain_network(version, (3, 32, 32), 10).eval()
    kinds = [type(layer).__name__ for layer in plain.encoder]
    assert "MaxPool2d" in kinds and kinds[kinds.index("MaxPool2d") - 1] == "ReLU"
    assert not any(isinstance(m, models.ConvTranspose2d) for m in plain.modules())
    images = torch.randn(4, 3, 32, 32)
    for a, b in zip(ours(images), plain(images)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Inside(ThreadPoolExecutor):
    """In place of the study's own process, whose start takes seconds: a thread, given what a process would get."""

    def __init__(self, workers, context):
        super().__init__(workers)
        assert context.get_start_method() == "spawn"

    def submit(self, *call):
        work, *arguments = pickle.loads(pickle.dumps(call))
        return super().submit(work, *arguments)


def test_the_benchmark_measures_every_way(tiny, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Inside)
    assert benchmark.main(["--dataset", tiny, "--images", "60", "--batch-size", "15", "--turns", "1"]) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    for name in ("study", "sketch", "ours", "at once", "floor", "data", "test"):
        assert float(lines[name].split()[-1]) > 0
    ours, study = (float(lines[name].split()[-3]) for name in ("ours", "study"))
    assert float(lines["ours / study"].split()[3]) == pytest.approx(ours / study, rel=0.05)
    operations = float(next(line for line in lines if line.startswith("ours: ")).split()[1])
    adds = sum(row[4] for row in models.trace(models.build("v4")))
    assert operations == pytest.approx(ours * 6 * adds / 1e12, abs=0.01)
