"""GPUs. Without one: FakeTensorMode, in which tensors have a device and a shape but no values, so that
tensors of two devices in one operation raise, as does whatever waits for a value. With one: bits,
agreement with the CPU, precision."""
import contextlib
import json
import math
from argparse import Namespace
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import evaluate
import losses
import models
import train
from conftest import simulated_cuda

CUDA = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ---------------------------------------------------------------- a pretended GPU

class Generator:
    """Stands for torch.Generator, which cannot be made for a GPU that is not there."""

    def __init__(self, device="cpu"):
        self.device = torch.device(device)

    def manual_seed(self, seed):
        assert type(seed) is int and 0 <= seed < 2**32
        return self


def without_generator(function):
    """A random function of torch that checks its generator's device and leaves the generator out."""
    def call(*args, generator=None, **kwargs):
        assert generator is None or generator.device.type == torch.device(kwargs.get("device", "cpu")).type
        return function(*args, **kwargs)
    return call


def backward(loss):
    """Tensor.backward node by node, since autograd's own engine needs the device."""
    found, waiting = {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        following = {node for node, _ in waiting.pop().next_functions if node} - found
        found |= following
        waiting += following
    gradients = {node: {} for node in found}
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    for node in sorted(found, key=lambda node: node._sequence_nr(), reverse=True):
        if hasattr(node, "variable"):
            continue
        received = [gradients[node].get(i) for i in range(len(node._input_metadata))]
        if all(gradient is None for gradient in received):
            continue
        given = node(*received)
        for (following, place), gradient in zip(node.next_functions, given if type(given) is tuple else (given,)):
            if following and gradient is not None:
                gradient = gradient.sum_to_size(following._input_metadata[place].shape)  # where it was expanded
                before = gradients[following].get(place)
                gradients[following][place] = gradient if before is None else before + gradient
    for node in found:
        if hasattr(node, "variable") and gradients[node]:
            gradient, variable = gradients[node][0], node.variable
            assert (gradient.shape, gradient.device) == (variable.shape, variable.device)
            variable.grad = gradient


class Copies(TorchDispatchMode):
    """Counts copies between the CPU and the device, which waits in each: the operations that accept tensors of both.
    (All others raise, or read a single number of the CPU, as in x + y of no dimensions.)"""
    accept_both = {torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.index, torch.ops.aten.index_put,
                   torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.lift_fresh.default:  # torch.tensor, which a GPU that is there has copied by then
            self.count += result.device.type == "cuda"
        elif function.overloadpacket in self.accept_both:
            tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
            self.count += len({tensor.device.type for tensor in tensors}) > 1
        return result


@contextlib.contextmanager
def pretended():
    """Tensors on "cuda" without values. Yields a function that says how often the device was waited for:
    copies to and from it, and reads (item, tolist), which give ones."""
    reads = []

    def read(tensor):
        if tensor.device.type == "cuda":
            reads.append(tensor)
        ones = 1
        for side in reversed(tensor.shape):
            ones = [ones] * side
        return ones
    with contextlib.ExitStack() as stack:
        for name in ("rand", "randint", "randn", "randperm"):
            stack.enter_context(mock.patch.object(torch, name, without_generator(getattr(torch, name))))
        for place, name, value in ((torch, "Generator", Generator), (torch.Tensor, "item", read),
                                   (torch.Tensor, "tolist", read), (FakeTensor, "tolist", read),
                                   (torch.Tensor, "backward", backward), (torch.cuda, "CUDAGraph", mock.Mock),
                                   (torch.cuda, "graph", mock.MagicMock()), (train, "recording_stream", mock.Mock()),
                                   (train, "check_finite", lambda *_: None)):  # every hundredth step
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(FakeTensorMode())
        copies = stack.enter_context(Copies())
        yield lambda: copies.count + len(reads)


def split_of(n, shape, classes=10):
    return data.Split(torch.empty(n, *shape, dtype=torch.uint8, device=CUDA),
                      torch.empty(n, dtype=torch.int64, device=CUDA))


def settings(version="v3", **changes):
    return Namespace(**train.recipe(version) | dict(precision="fp32", pretrained=False, batch_size=8) | changes)


def side_of(version):
    """What the network of a version is tried at: large ones at less than their own size."""
    row = models.find(version)
    return 64 if row.encoder in models.BACKBONES or row.in_shape[1] == 64 else row.in_shape[1]


def build(version, s):
    """The version's network, on the pretended device."""
    row, side = models.find(version), s.size or side_of(version)
    with CUDA:
        return models.build(version, (row.in_shape[0], side, side), pretrained=False, skip=s.skip)


def unfused(parameters, fused, **options):
    """SGD without its fused kernel, which needs the device; Adam's does not."""
    return torch.optim.SGD(parameters, **options)


def waits(version, s, batches=2):
    """How often the device is waited for after an epoch's first step, by phase."""
    side, found = side_of(version) if s.size is None else 40, []
    sgd = train.OPTIMIZERS["sgd"]._replace(kind=unfused)
    with pretended() as count, mock.patch.dict(train.OPTIMIZERS, sgd=sgd):
        model = build(version, s)
        split = split_of(8 * batches - 3, (model.version.in_shape[0], side, side))
        labelled = data.Split(*(tensor[:s.labels] for tensor in split)) if s.labels else None
        dataset = data.Dataset("pretended", "", list("0123456789"), split, split, labelled=labelled)
        for phase in train.phases(s):
            counts, optimizer = [], train.make_optimizer(model, phase)
            train.train_epoch(model, dataset, optimizer, phase, phase.start, lambda *_: counts.append(count()))
            assert len(counts) == batches
            found.append(counts[-1] - counts[0])
    return found


@pytest.mark.parametrize("operation", [
    lambda x: x + torch.zeros(4), lambda x: (x > 0).nonzero(), lambda x: x[x > 0], lambda x: torch.bincount(x.long()),
    lambda x: float(x.sum()), lambda x: 1 if x.sum() else 0], ids=range(6))
@simulated_cuda
def test_the_pretended_device_refuses_what_it_should(operation):
    with pretended(), pytest.raises((RuntimeError, DataDependentOutputException, DynamicOutputShapeException)):
        operation(torch.empty(4, device=CUDA))


@pytest.mark.parametrize("operation", [
    lambda x: x.cpu(), lambda x: x.sum().cpu(), lambda x: torch.arange(4).to(CUDA), lambda x: x.tolist(),
    lambda x: torch.tensor([1.0, 2.0], device=CUDA), lambda x: x[torch.arange(2)], lambda x: x.sum().item(),
    lambda x: x.copy_(torch.zeros(4))], ids=range(8))
@simulated_cuda
def test_the_pretended_device_counts_what_it_should(operation):
    with pretended() as count:
        x = torch.empty(4, device=CUDA)
        assert count() == 0
        operation(x)
        assert count() == 1


def test_the_pretended_backward_is_the_real_one():
    """On the CPU, with values: the same gradients as autograd's."""
    torch.manual_seed(0)
    model = models.build("v3", skip=True)
    found = []
    for way in (torch.Tensor.backward, backward):
        model.zero_grad()
        logits, rebuilt = model(torch.linspace(-1, 1, 6144).view(2, 3, 32, 32))
        way(logits.square().mean() + rebuilt.exp().mean())
        found.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found))


@pytest.mark.parametrize("version", sorted(set(models.VERSIONS) - {"v5", "v5-large"}))  # v5-small in other widths
@simulated_cuda
def test_an_epoch_of_every_version_stays_on_the_device(version):
    """Forward, backward and the optimizer: no tensor from elsewhere, and no wait for each step."""
    s = settings(version, size=None, margin=False)
    assert waits(version, s) == [0]


FLAGS = {
    "delta": dict(delta=0.5), "noise": dict(noise=0.1), "rotate": dict(rotate=10.0, scale="0..1"),
    "margin and size": dict(size=32, margin=True), "size": dict(size=24), "weights": dict(class_weights="balanced"),
    "skip": dict(skip=True), "labels": dict(labels=29), "labels, weighted": dict(labels=29, class_weights="balanced"),
    "labels alone": dict(labels=29, beta=0.0), "labels and delta": dict(labels=29, delta=0.5, noise=0.1),
    "separate": dict(separate=True, epochs=2), "adam": dict(optimizer="adam"),
    "adagrad": dict(optimizer="adagrad"), "muon": dict(optimizer="muon"),
    "separate, not frozen": dict(separate=True, epochs=2, freeze_encoder=False, labels=29),
    "alpha 0": dict(alpha=0.0), "beta 0": dict(beta=0.0), "gamma": dict(gamma=0.1), "no flips": dict(flip=False),
    "v5": dict(shift=2, label_smoothing=0.2, schedule="onecycle")}


@pytest.mark.parametrize("changes", FLAGS.values(), ids=FLAGS)
@simulated_cuda
def test_an_epoch_with_every_flag_stays_on_the_device(changes):
    s = settings(**changes)
    assert waits("v3", s, 3) == [0] * len(train.phases(s))


def test_every_setting_of_the_loop_is_tried():
    """A setting that is new in the table belongs in FLAGS, or among those that the loop does not see."""
    elsewhere = {"version", "encoder", "classifier", "decoder", "pretrained", "first_share", "first_decay",
                 "jigsaw_grid", "lr", "momentum", "weight_decay", "lr_step", "lr_decay", "batch_size", "clean_test",
                 "kl", *(row.name for row in train.SETTINGS["run"])}
    of_data = {"dataset", "data_dir", "classes", "train_size", "test_size", "test_share", "val_share", "variant",
               "constrain", "blur"}
    assert set(train.DEFAULTS) == elsewhere | of_data | {key for changes in FLAGS.values() for key in changes}


@simulated_cuda
def test_labelled_images_that_come_round_stay_on_the_device():
    """Five of them, in every batch: their order is on the device before the first step."""
    assert waits("v3", settings(labels=5), 4) == [0]


def test_a_recorded_step_gets_each_batch_and_gives_its_gradients(monkeypatch):
    """Recorded against the work itself; a replay runs the work on what was recorded."""
    weight, runs = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0])), []

    def work(tensors):
        runs.append(len(tensors["images"]))
        loss = (tensors["images"] * weight).square().sum()
        loss.backward()
        return loss.detach()

    class Graph:
        def replay(self):
            weight.grad = None
            recorded.result.copy_(work(recorded.inputs))
            recorded.gradients[0].copy_(weight.grad)
    streams = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext(streams.append(stream)))
    monkeypatch.setattr(train, "recording_stream", lambda device: device.type)
    recorded = train.Recorded(work, [weight])
    for size in (4, 4, 4, 3, 4):
        images = torch.randn(size, 3)
        weight.grad = None
        loss = recorded({"images": images}).clone()
        assert torch.allclose(loss, (images * weight).square().sum())
        assert torch.allclose(weight.grad, 2 * (images.square() * weight).sum(0))
    assert runs == [4, 4, 4, 4, 3, 4, 4]  # itself, recorded, replayed twice, itself, recorded, replayed
    assert streams == ["cpu", "cpu"]      # of the device on which the tensors are


# ---------------------------------------------------------------- measures and transformations

@pytest.mark.parametrize("version, changes", [
    ("v3", {}), ("v3", dict(noise=0.1, delta=0.5)), ("v3", dict(size=32, margin=True)), ("vae", {}),
    ("mobilenet", dict(size=64, margin=True)), ("cnn32", {}), ("mnist", {})])
@simulated_cuda
def test_a_measurement_waits_once_however_many_batches(version, changes):
    found = []
    for n in (15, 23):
        with pretended() as count:
            s = settings(version, **dict(size=None, margin=False) | changes)
            model = build(version, s)
            side = side_of(version) if s.size is None else 40
            result = evaluate.measure(model, split_of(n, (model.version.in_shape[0], side, side)), s, batch_size=8)
            assert result["psnr"] == 1 and result["mse"] == 1 and ("kl" in result) == (version == "vae")
            assert ("jigsaw" in result, "noisy_psnr" in result) == (bool(s.delta), bool(s.noise))
            found.append(count())
    assert found[0] == found[1]


@simulated_cuda
@pytest.mark.parametrize("side, size, expected", [
    (28, None, 1000), (64, None, 1000), (128, None, 250), (224, None, 100), (32, 224, 100)])
def test_a_gpu_measures_more_images_at_once(side, size, expected):
    with pretended():
        assert evaluate.images_at_once(split_of(5, (3, side, side)), settings(size=size)) == expected


@simulated_cuda
def test_codes_and_reconstructions_stay_on_the_device():
    found = []
    for n in (19, 43):
        with pretended() as count:
            s, split = settings(size=32, margin=True), split_of(n, (3, 40, 40))
            model = build("v3", s)
            codes, errors = evaluate.encode(model, split, s, 8), evaluate.image_errors(model, split, s, 8)
            rebuilt = evaluate.rebuild(model, torch.empty(n, 3, 32, 32, device=CUDA), s)
            assert (codes.shape, codes.device.type) == ((n, 256), "cuda")
            assert (errors.shape, errors.device.type) == ((n,), "cuda")
            assert (rebuilt.shape, rebuilt.device.type) == ((n, 3, 32, 32), "cuda")
            found.append(count())
    assert found[0] == found[1]


def result_of(function):
    """(shape, waits) of what a function gives on the pretended device; it must stay there."""
    with pretended() as count:
        result = function()
        assert result.device.type == "cuda"
        return tuple(result.shape), count()


def images(*shape):
    return torch.empty(*shape, device=CUDA)


@pytest.mark.parametrize("function, shape", [
    (lambda: data.nearest(images(1200, 7), images(90, 7), 5), (1200, 5)),
    (lambda: data.nearest(split_of(30, (3, 8, 8)).images.flatten(1), images(4, 192), 9), (30, 4)),
    (lambda: evaluate.vote(torch.zeros(20, 5, dtype=torch.int64, device=CUDA), 10), (20,)),
    (lambda: data.normalise(split_of(5, (3, 40, 50)).images), (5, 3, 40, 50)),
    (lambda: data.normalise(split_of(5, (1, 40, 50)).images, scale="-1..1"), (5, 1, 40, 50)),
    (lambda: data.normalise(split_of(5, (3, 40, 50)).images, size=24, margin=True), (5, 3, 24, 24)),
    (lambda: data.normalise(split_of(5, (3, 40, 50)).images, 24, True, images(5, 2), "0..1"), (5, 3, 24, 24)),
    (lambda: data.to_pixels(images(5, 3, 8, 8)), (5, 3, 8, 8)),
    (lambda: data.rotate(images(5, 3, 8, 9), images(5)), (5, 3, 8, 9)),
    (lambda: data.add_noise(images(5, 3, 8, 9), 0.1, torch.Generator(CUDA)), (5, 3, 8, 9)),
    (lambda: losses.jumble(images(5, 3, 8, 12), 4, images(5, 16).long()), (5, 3, 8, 12)),
    (lambda: losses.class_counts(split_of(5, (1, 1, 1)).labels, 10), (10,)),
    (lambda: losses.balanced_weights(split_of(5, (1, 1, 1)).labels, 10), (10,)),
    (lambda: losses.confusion_matrix(*[split_of(5, (1, 1, 1)).labels] * 2, 10), (10, 10)),
    (lambda: losses.reconstruction_errors(images(5, 3, 8, 8), images(5, 3, 8, 8))["psnr"], (5,))],
    ids=["nearest", "nearest of few", "vote", "normalise", "normalise grey", "normalise margin", "normalise offsets",
         "to_pixels", "rotate", "add_noise", "jumble", "class_counts", "balanced_weights", "confusion_matrix",
         "reconstruction_errors"])
@simulated_cuda
def test_transformations_never_wait_for_the_device(function, shape):
    assert result_of(function) == (shape, 0)


def test_counts_wait_once():
    with pretended() as count:
        assert data.counts(split_of(5, (1, 8, 8)), 10) == [1] * 10
        assert count() == 1


@simulated_cuda
def test_what_is_copied_for_an_epoch_does_not_depend_on_its_batches():
    """Indices, flips, crops and angles, once for each epoch."""
    with pretended() as count:
        list(data.batches(split_of(40, (3, 8, 8)), 8, 0, flip=True, size=7, margin=True, degrees=5.0))
        first = count()
        list(data.batches(split_of(80, (3, 8, 8)), 8, 0, flip=True, size=7, margin=True, degrees=5.0))
        assert count() == 2 * first


# ---------------------------------------------------------------- processes and GPUs

def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(evaluate, "pick_device", lambda name: CUDA)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_, **__: pytest.fail("a group was made"))
    with pytest.raises(SystemExit) as exit:
        train.main(["--version", "v3", "--dataset", "shapes"])
    assert exit.value.code == 2
    assert "more processes than this machine's 1 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("device, expected", [("cuda:1", [torch.device("cuda:1")]), ("cuda", [])])
def test_a_gpu_by_number_becomes_the_current_one(device, expected, monkeypatch):
    chosen = []

    def stop(s):
        raise InterruptedError
    monkeypatch.setattr(evaluate, "pick_device", torch.device)
    monkeypatch.setattr(evaluate, "prepare_data", stop)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    with pytest.raises(InterruptedError):
        train.prepare(settings(device=device))
    assert chosen == expected


@pytest.mark.parametrize("device, gpus, jobs, expected", [
    ("auto", 4, None, 4), ("cuda", 4, None, 4), ("cuda:1", 4, None, 1), ("auto", 4, 2, 2), ("auto", 4, 9, 9)])
def test_runs_at_once_are_as_many_as_gpus(device, gpus, jobs, expected, monkeypatch):
    monkeypatch.setattr(evaluate, "pick_device", lambda name: torch.device("cuda" if name == "auto" else name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(data, "free_memory", lambda: math.inf)
    given = {"device": device} | ({"jobs": jobs} if jobs else {})
    assert train.jobs_and_threads(given, [settings()] * 12)[0] == expected


def test_the_runs_of_a_sweep_are_spread_over_the_gpus(monkeypatch, tmp_path):
    """Each slot has its GPU; the next run takes the one that is free."""
    devices = []

    class Process:
        sentinel, exitcode = 0, 1

        def join(self):
            pass

    def start_child(context, given, s, output, threads):
        process, file = Process(), tmp_path / "output.txt"
        process.sentinel = len(devices)
        devices.append(given["device"])
        file.write_text("")
        return process, file
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(train, "start_child", start_child)
    monkeypatch.setattr(train.multiprocessing.connection, "wait", lambda sentinels, timeout: [sentinels[-1]])
    todo = [({}, settings("v3", device="auto", seed=seed)) for seed in range(5)]
    assert len(train.run_all(todo, tmp_path, 3, 1)) == 5
    assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:2", "cuda:2"]


# ---------------------------------------------------------------- a real GPU

def trained(tiny, out, *flags):
    """A short run; returns its last.pt and config.json."""
    before = set(out.iterdir()) if out.exists() else set()
    assert train.main(["--dataset", tiny, "--epochs", "2", "--output", str(out), *flags]) == 0
    folder, = {path for path in out.iterdir() if (path / "config.json").exists()} - before
    return (torch.load(folder / "last.pt", map_location="cpu", weights_only=True),
            json.loads((folder / "config.json").read_text()))


@needs_gpu
@pytest.mark.parametrize("flags", [
    ["--version", "v4", "--delta", "0.5", "--noise", "0.05", "--rotate", "5"], ["--version", "vae"],
    ["--version", "v3", "--skip", "--separate"], ["--version", "v3", "--labels", "20"], ["--version", "cnn32"],
    ["--version", "v5-small", "--batch-size", "20"]])
def test_a_gpu_gives_the_same_bits_twice(flags, tiny, tmp_path):
    (one, config), (other, _) = (trained(tiny, tmp_path, "--device", "cuda", *flags) for _ in range(2))
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    assert config["device"].startswith("cuda") and config["machine"] == torch.cuda.get_device_name()


@needs_gpu
@pytest.mark.parametrize("flags", [
    ["--version", "v4", "--delta", "0.5", "--noise", "0.05"], ["--version", "vae"],
    ["--version", "v3", "--labels", "20", "--noise", "0.05"],
    ["--version", "v3", "--separate", "--class-weights", "balanced"], ["--version", "v5-small"],
    ["--version", "v4", "--optimizer", "adam", "--beta", "0"]])
def test_recorded_steps_give_the_same_bits(flags, tiny, tmp_path, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: [replays.append(graph), replay(graph)])
    flags = ["--device", "cuda", "--batch-size", "16", *flags]
    one, _ = trained(tiny, tmp_path, *flags)
    assert replays
    monkeypatch.setattr(train, "Recorded", lambda work, parameters: work)
    other, _ = trained(tiny, tmp_path, *flags)
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    assert one["rows"][-1]["train_loss"] == other["rows"][-1]["train_loss"]


@needs_gpu
def test_a_gpu_agrees_with_the_cpu(tiny, tmp_path):
    flags = ["--precision", "fp32", "--version", "v3", "--delta", "0.5"]
    gpu, cpu = (trained(tiny, tmp_path, *flags, "--device", device)[0] for device in ("cuda", "cpu"))
    assert gpu["rows"][-1]["train_loss"] == pytest.approx(cpu["rows"][-1]["train_loss"], rel=1e-3)
    assert gpu["rows"][-1]["test_mse"] == pytest.approx(cpu["rows"][-1]["test_mse"], rel=1e-3)


@needs_gpu
def test_fp32_on_a_gpu_is_not_tf32(tiny):
    """TF32 has 10 bits of mantissa: a sum of 2304 products is then off by some 1e-4 of its size."""
    s = train.settle(train.parse(["--dataset", tiny, "--precision", "fp32", "--device", "cuda", "--version", "v3"]))
    train.prepare(s)
    torch.manual_seed(0)
    conv, x = torch.nn.Conv2d(256, 64, 3), torch.randn(4, 256, 16, 16)
    exact = conv.double()(x.double())
    found = conv.float().cuda()(x.cuda()).double().cpu()
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max() * math.sqrt(10)
