"""GPUs. Without one: FakeTensorMode, in which tensors have a device and a shape but no values, so that
tensors of two devices in one operation raise, as does whatever waits for a value. With one: bits, agreement
with the CPU, precision."""
import contextlib
import math
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import evaluate
import models
import train
from conftest import simulated_cuda

CUDA = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ---------------------------------------------------------------- a simulated GPU

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
    nodes, waiting = {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        following = {node for node, _ in waiting.pop().next_functions if node} - nodes
        nodes |= following
        waiting += following
    gradients = {node: {} for node in nodes}
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    for node in sorted(nodes, key=lambda node: node._sequence_nr(), reverse=True):
        if hasattr(node, "variable") or not gradients[node]:
            continue
        outputs = node(*[gradients[node].get(i) for i in range(len(node._input_metadata))])
        outputs = outputs if type(outputs) is tuple else (outputs,)
        for (following, place), gradient in zip(node.next_functions, outputs):
            if following and gradient is not None:
                gradient = gradient.sum_to_size(following._input_metadata[place].shape)  # if expanded
                before = gradients[following].get(place)
                gradients[following][place] = gradient if before is None else before + gradient
    for node in nodes:
        if hasattr(node, "variable") and gradients[node]:
            gradient, variable = gradients[node][0], node.variable
            assert (gradient.shape, gradient.device) == (variable.shape, variable.device)
            variable.grad = gradient


class Copies(TorchDispatchMode):
    """Counts copies between the CPU and the device, which waits in each: the operations that accept tensors
    of both. (All others raise, or read a single number of the CPU, as in x + y of no dimensions.)"""
    accept_both = {torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.index,
                   torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.lift_fresh.default:  # torch.tensor, copied by then on a real GPU
            self.count += result.device.type == "cuda"
        elif function.overloadpacket in self.accept_both:
            leaves = tree_leaves((args, kwargs, result))
            self.count += len({leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}) > 1
        return result


@contextlib.contextmanager
def simulated():
    """Tensors on "cuda" without values. Yields a function that says how often the device was waited for:
    copies to and from it, and reads (item, tolist), which give ones."""
    reads = []

    def read(tensor):
        if tensor.device.type == "cuda":
            reads.append(tensor)
        return np.ones(tuple(tensor.shape)).tolist()
    with contextlib.ExitStack() as stack:
        for name in ("rand", "randint", "randn", "randperm"):
            stack.enter_context(mock.patch.object(torch, name, without_generator(getattr(torch, name))))
        for place, name, value in (
                (torch, "Generator", Generator), (torch.Tensor, "item", read), (torch.Tensor, "tolist", read),
                (FakeTensor, "tolist", read), (torch.Tensor, "backward", backward),
                (torch.cuda, "CUDAGraph", mock.Mock), (torch.cuda, "graph", mock.MagicMock()),
                (torch.cuda, "Stream", mock.Mock), (train, "check_finite", mock.Mock())):  # every 100th step
            stack.enter_context(mock.patch.object(place, name, value))
        # SGD's fused kernel needs the device; Adam's does not.
        stack.enter_context(mock.patch.dict(train.OPTIMIZERS, sgd=(torch.optim.SGD, (), ("momentum",))))
        stack.enter_context(FakeTensorMode())
        copies = stack.enter_context(Copies())
        yield lambda: copies.count + len(reads)


def images(*shape):
    return torch.empty(*shape, device=CUDA)


def split_of(n, *shape):
    return data.Split(images(n, *shape).byte(), images(n).long())


def settings(words):
    """(args, the shape of the images of their version). words: what follows --version."""
    args = train.parse(["--batch-size", "8", "--precision", "fp32", "--version", *words.split()])[0]
    return args, models.find(args.version).in_shape


def build(args, shape):
    """The network of the settings on the simulated device."""
    with CUDA:
        sides = [args.size, args.size] if args.size else shape[1:]
        return models.build(args.version, (shape[0], *sides), pretrained=False, skip=args.skip)


@pytest.mark.parametrize("operation", [
    "x + torch.zeros(4)", "(x > 0).nonzero()", "x[x > 0]", "float(x.sum())", "torch.bincount(x.long())"])
@simulated_cuda
def test_the_simulation_refuses_what_it_should(operation):
    with simulated(), pytest.raises(RuntimeError):
        eval(operation, {"x": images(4), "torch": torch})


@pytest.mark.parametrize("operation", [
    "x.cpu()", "x.tolist()", "x.sum().item()", "torch.arange(4).to('cuda')", "x[torch.arange(2)]",
    "torch.tensor([1.0, 2.0], device='cuda')", "x.copy_(torch.zeros(4))"])
@simulated_cuda
def test_the_simulation_counts_what_it_should(operation):
    with simulated() as waits:
        eval(operation, {"x": images(4), "torch": torch})
        assert waits() == 1


def test_the_simulated_backward_is_the_real_one():
    """On the CPU, with values: the same gradients as autograd's."""
    torch.manual_seed(0)
    model, gradients = models.build("v3", skip=True), []
    for way in (torch.Tensor.backward, backward):
        model.zero_grad()
        logits, rebuilt = model(torch.linspace(-1, 1, 6144).view(2, 3, 32, 32))
        way(logits.square().mean() + rebuilt.exp().mean())
        gradients.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


# ---------------------------------------------------------------- an epoch and a measurement

@pytest.mark.parametrize("flags", [
    "v1", "v4-stride2", "v5-small", "joint5", "cnn32", "mnist", "vae", "squeezenet --size 64",
    "v3 --delta 0.5 --noise 0.1 --rotate 10 --scale=0..1", "v3 --size 32 --margin --shift 2",
    "v3 --size 24 --skip --class-weights balanced", "v3 --labels 5 --delta 0.5 --class-weights balanced",
    "v3 --labels 5 --beta 0 --noise 0.1", "v3 --separate --epochs 2 --optimizer adam --gamma 0.1",
    "v3 --separate --epochs 2 --no-freeze-encoder --labels 5 --optimizer adagrad --no-flip"])
@simulated_cuda
def test_an_epoch_stays_on_the_device_and_no_step_waits_for_it(flags):
    """Each kind of layer, decoder, optimizer and loss, and every flag that the loop sees. Two steps, of which
    the second is recorded; what comes before and after all steps may wait."""
    args, shape = settings(flags)
    with simulated() as waits:
        model, split = build(args, shape), split_of(16, *shape)
        labelled = data.Split(*(tensor[:args.labels] for tensor in split)) if args.labels else None
        dataset = data.Dataset("simulated", "", list("0123456789"), split, split, labelled=labelled)
        for phase in train.phases(args):
            optimizer, counts = train.make_optimizer(model, phase), []
            zero_grad = optimizer.zero_grad
            optimizer.zero_grad = lambda: (zero_grad(), counts.append(waits()))
            train.train_epoch(model, dataset, optimizer, phase, phase.start)
            assert len(counts) == 2 and counts[0] == counts[1]


@pytest.mark.parametrize("flags", ["v3 --noise 0.1 --delta 0.5", "v3 --size 32 --margin --beta 0", "vae"])
@simulated_cuda
def test_a_measurement_waits_as_often_for_any_number_of_batches(flags):
    (args, shape), counts = settings(flags), []
    for n in (1000, 1600):  # one batch and two
        with simulated() as waits:
            model, split = build(args, shape), split_of(n, *shape)
            result = evaluate.measure(model, split, args, mirrored=True)
            assert ("jigsaw" in result, "kl" in result) == (bool(args.delta), model.variational)
            assert len(next(evaluate.test_batches(split, args))["labels"]) == 1000  # 100 on a CPU
            assert evaluate.encode(model, split, args).device.type == "cuda"
            counts.append(waits())
    assert counts[0] == counts[1]


@simulated_cuda
def test_neighbours_stay_on_the_device():
    with simulated() as waits:
        rows = data.nearest(split_of(1200, 3, 8, 8).images.flatten(1), images(90, 192), 5)
        assert (rows.shape, rows.device.type) == ((1200, 5), "cuda") and waits() == 0


def test_a_recorded_step_gets_each_batch_and_gives_its_gradients(monkeypatch):
    """Recorded against the work itself; a replay runs the work on what was recorded."""
    weight, runs, streams = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0])), [], []

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
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device.type)
    monkeypatch.setattr(torch.cuda, "graph", lambda _, stream: contextlib.nullcontext(streams.append(stream)))
    recorded = train.Recorded(work, [weight])
    for size in (4, 4, 4, 3, 4):
        batch = torch.randn(size, 3)
        weight.grad = None
        loss = recorded({"images": batch}).clone()
        assert torch.allclose(loss, (batch * weight).square().sum())
        assert torch.allclose(weight.grad, 2 * (batch.square() * weight).sum(0))
    assert runs == [4, 4, 4, 4, 3, 4, 4]  # itself, recorded, replayed twice, itself, recorded, replayed
    assert streams == ["cpu", "cpu"]      # of the device on which the tensors are


def test_the_runs_of_a_sweep_are_spread_over_the_gpus(monkeypatch, tmp_path, capsys):
    both = threading.Barrier(2)  # two runs are there at once; all fail
    start = mock.Mock(return_value=mock.Mock(wait=lambda: (both.wait(60), 1)[1]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train.subprocess, "Popen", start)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "stopped")
    assert train.main(["--version", "v3", "--dataset", "shapes", "--seeds", "4", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith("4 of 4 runs to train, 2 at once")
    assert start.call_count == 4
    assert {call.args[0][-1] for call in start.call_args_list} == {"cuda:0", "cuda:1"}


# ---------------------------------------------------------------- a real GPU

def trained(tiny, output, *flags):
    """(model, log's rows) of two epochs on sixty images."""
    words = ["--dataset", tiny, "--epochs", "2", "--batch-size", "16", "--output", str(output), *flags]
    return train.execute(*train.parse(words), words)[:2]


@needs_gpu
@pytest.mark.parametrize("flags", [
    "v4 --delta 0.5 --noise 0.05 --rotate 5", "v4 --optimizer adam --beta 0", "v3 --skip --separate", "vae",
    "v3 --labels 20 --noise 0.05 --class-weights balanced", "cnn32", "v5-small"])
def test_the_same_bits_twice_and_without_a_graph(flags, tiny, tmp_path, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: [replays.append(graph), replay(graph)])
    words = ["--device", "cuda", "--version", *flags.split()]
    (model, rows), other = trained(tiny, tmp_path, *words), trained(tiny, tmp_path, *words)
    assert replays
    monkeypatch.setattr(train, "Recorded", lambda work, parameters: work)
    plain = trained(tiny, tmp_path, *words)
    for again, log in (other, plain):
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name]), name
        assert log[-1]["train_loss"] == rows[-1]["train_loss"]


@needs_gpu
def test_a_gpu_agrees_with_the_cpu(tiny, tmp_path):
    words = ["--precision", "fp32", "--version", "v3", "--delta", "0.5", "--device"]
    gpu, cpu = (trained(tiny, tmp_path, *words, device)[1][-1] for device in ("cuda", "cpu"))
    for key in ("train_loss", "test_mse"):
        assert gpu[key] == pytest.approx(cpu[key], rel=1e-3)


@needs_gpu
def test_fp32_on_a_gpu_is_not_tf32(tiny):
    """TF32 has 10 bits of mantissa: a sum of 2304 products is then off by some 1e-4 of its size."""
    train.prepare(train.parse(["--dataset", tiny, "--precision", "fp32", "--device", "cuda"])[0])
    torch.manual_seed(0)
    conv, x = torch.nn.Conv2d(256, 64, 3), torch.randn(4, 256, 16, 16)
    exact = conv.double()(x.double())
    error = conv.float().cuda()(x.cuda()).double().cpu() - exact
    assert error.abs().max() < 1e-5 * exact.abs().max() * math.sqrt(10)
