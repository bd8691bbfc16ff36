"""The benchmark's plain network computes what ours computes, and its ratios are of what it measures."""
import pickle
from concurrent.futures import ThreadPoolExecutor

import benchmark
import pytest
import torch

import models


@pytest.mark.parametrize("version", ["v2", "v4-plain"])
def test_the_plain_network_is_the_same_function(version):
    torch.manual_seed(0)
    ours = models.build(version).eval()
    torch.manual_seed(0)
    plain = benchmark.plain_network(version, (3, 32, 32), 10).eval()
    kinds = [type(layer).__name__ for layer in plain.encoder]
    assert "MaxPool2d" in kinds and kinds[kinds.index("MaxPool2d") - 1] == "ReLU"
    assert not any(isinstance(layer, models.ConvTranspose2d) for layer in plain.modules())
    images = torch.randn(4, 3, 32, 32)
    for one, other in zip(ours(images), plain(images)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Inside(ThreadPoolExecutor):
    """In place of processes, whose start takes seconds: a thread, given what a process would get."""

    def __init__(self, workers, context):
        super().__init__(workers)

    def submit(self, *call):
        work, *arguments = pickle.loads(pickle.dumps(call))
        return super().submit(work, *arguments)


def test_the_benchmark_measures_every_way(tiny, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Inside)
    words = ["--version", "v3", "--dataset", tiny, "--images", "60", "--batch-size", "15", "--turns", "1"]
    benchmark.main(words)
    lines = {line[:20].strip(): line[20:].split() for line in capsys.readouterr().out.splitlines()}
    for name in ("study", "sketch", "ours", "at once", "floor", "data", "test"):
        assert float(lines[name][0]) > 0
    ours, study = (float(lines[name][0]) for name in ("ours", "study"))
    assert float(lines["ours / study"][0]) == pytest.approx(ours / study, rel=0.05)
