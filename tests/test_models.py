"""The notation, the versions' arithmetic, our layers against PyTorch's, checkpoints, the printed class."""
import copy
import math
import os
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torchvision.models import get_model

import models
from models import CheckpointError, Kind, NotationError, Version, build
from conftest import simulated_cuda

NOTATION = [name for name, version in models.VERSIONS.items() if version.encoder not in models.BACKBONES]


def linear(inputs, outputs):
    return inputs * outputs + outputs


def conv(inputs, outputs, kernel=3):
    return inputs * outputs * kernel * kernel + outputs


@pytest.mark.parametrize("version, part, expected", [  # layer by layer, as one reads them off the notation
    ("v1", "encoder", 3072*512+512 + 512*256+256 + 256*128+128),
    ("v1", "classifier", linear(128, 128) + linear(128, 10)),
    ("v1", "decoder", linear(128, 256) + linear(256, 512) + linear(512, 3072)),
    ("v4", "encoder", conv(3, 32) + conv(32, 32)),
    ("v4", "classifier", conv(32, 32) + conv(32, 64) + conv(64, 64) + linear(1024, 512) + linear(512, 128)
     + linear(128, 10)),
    ("v4", "decoder", conv(32, 32, 2) + conv(32, 3, 1))])
def test_parameters_are_the_arithmetic_of_the_notation(version, part, expected):
    assert models.parameter_count(getattr(build(version), part)) == expected


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 33, 45)])
@pytest.mark.parametrize("version", [name for name in NOTATION if models.VERSIONS[name].decoder == "mirror"])
def test_the_mirror_gives_every_shape_back(version, shape):
    with torch.device("meta"):
        images = torch.zeros(2, *shape)
        logits, reconstruction = build(version, shape, num_classes=7).eval()(images)
    assert reconstruction.shape == images.shape
    assert logits.shape == (2, 7) if models.VERSIONS[version].classifier else logits is None


@pytest.mark.parametrize("notation", ["C(4)>C(4)>C(4)", "S(4)>S(4)>S(4)", "C(4)>G(5)", "S(4)>L(6)",
                                      "C'(4)>C(4)>S(4)>L'(6)", "W(4)>D(0.2)>B(6)", "D(0.2)>S(4)"])
@pytest.mark.parametrize("shape", [(1, 15, 9), (3, 9, 14), (2, 13, 13)])
def test_the_mirror_of_odd_maps(notation, shape):
    images = torch.randn(2, *shape)
    assert build(Version(notation), shape)(images)[1].shape == images.shape


def test_a_mirror_runs_backwards_with_relu_after_each_layer_but_the_last():
    decoder = build(Version("W(8)>C'(4)>D(0.5)>C(5)>B'(5)>S(6)>L(7)"), (3, 16, 16)).decoder
    assert [type(layer).__name__ for layer in decoder] == [
        "Linear", "Unflatten", "ReLU", "ConvTranspose2d", "ReLU", "Conv2d", "ReLU", "ConvTranspose2d", "ReLU",
        "ConvTranspose2d"]
    convs = [layer for layer in decoder if hasattr(layer, "kernel_size")]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convs] == [
        (6, 5, 2), (5, 5, 1), (5, 4, 2), (4, 3, 1)]


def test_no_decoder_and_written_decoder():
    images = torch.randn(2, 3, 32, 32)
    assert build("v4", decoder=None)(images)[1] is None
    written = build(Version("C(8)>C(8)", decoder="T(4)>T(3)"))
    assert not isinstance(written.decoder[-1], nn.ReLU)  # none after the last layer
    assert written(images)[1].shape == images.shape and written(images)[0] is None
    scaled = build(Version("C'(4)>S(8)", decoder="T(4)>T(3)"), (3, 45, 33))  # to the images' size
    assert scaled(torch.randn(2, 3, 45, 33))[1].shape == (2, 3, 45, 33)


def test_r_doubles_the_pixels_before_its_convolution():
    decoder = build(Version("C(5)>C(6)", decoder="R(4)>R(3)")).decoder
    code = torch.randn(2, 6, 8, 8)
    first, second = (layer for layer in decoder if isinstance(layer, nn.Conv2d))
    doubled = code.repeat_interleave(2, 2).repeat_interleave(2, 3)
    middle = F.conv2d(doubled, first.weight, first.bias, padding=1).relu()
    assert first.weight.shape == (4, 6, 3, 3) and middle.shape == (2, 4, 16, 16)
    doubled = middle.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(decoder(code), F.conv2d(doubled, second.weight, second.bias, padding=1))
    with pytest.raises(NotationError, match="has no mirror; write the decoder out"):
        build(Version("C(4)>R(4)"))


def test_a_seed_gives_the_weights_that_the_layers_alone_would_draw():
    """Nothing is built twice, and a decoder, which is built last, does not touch the other weights."""
    torch.manual_seed(3)
    model = build("v4")
    torch.manual_seed(3)
    for layer, channels in ((model.encoder[0], 3), (model.encoder[2], 32), (model.classifier[0], 32)):
        assert torch.equal(layer.weight, nn.Conv2d(channels, 32, 3).weight)


def test_forward_leaves_out_what_is_not_asked_for():
    model, images = build("v3").eval(), torch.randn(2, 3, 32, 32)
    both = model(images)
    assert model(images, classify=False)[0] is None is model(images, reconstruct=False)[1]
    assert torch.equal(model(images, classify=False)[1], both[1])
    assert torch.equal(model(images, reconstruct=False)[0], both[0])


@pytest.mark.parametrize("notation, expected", [
    ("C(32)>X(3)", "token 2 'X(3)': expected one of C(n)"),
    (None, "token 1 'None': expected one of C(n)"),
    ("L(2.5)", "token 1 'L(2.5)': expected a whole number"),
    ("C(4)>D(1.5)", "token 2 'D(1.5)': expected a probability"),
    ("L(64)>N(8)>L(4)", "token 3 'L(4)': W(n) begins an encoder, N(n) ends one"),
    ("L(8)>C(4)", "token 2 'C(4)': expected a map"),
    ("C(4)>C(4)>C(4)>C(4)>C(4)>C(4)", "token 6 'C(4)': cannot pool a map of 1x1"),
    ("T(4)", "T(4): has no mirror"),
    ("W(4)>D(0.2)", "W(4)>D(0.2): has no mirror"),
])
def test_a_malformed_notation_is_answered_at_its_token(notation, expected):
    with pytest.raises(NotationError) as error:
        build(Version(notation))
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("version, changes, expected", [
    ("v44", {}, "no version 'v44'; did you mean 'v4'"),
    ("v4", {"classifier": "L(128)>L(10)"}, "token 2 'L(10)': a classifier ends in L'"),
    ("v4", {"encoder": "L(64)"}, f"{models.V4_DROPOUT!r}, token 1 \"C'(32)\": the code is a vector of 64"),
    ("v4", {"decoder": "T(8)>T(8)"}, "'T(8)>T(8)' ends in 8x64x64; expected 3 channels"),
    ("v4", {"in_shape": (32, 32)}, "images of 32x32: expected channels, height and width"),
    ("v1", {"skip": True}, "the code is a vector of 128"),
    ("resnet", {"decoder": "mirror", "pretrained": False}, "resnet50: has no mirror"),
    ("mnist", {"in_shape": (3, 32, 32)}, "mnist: does not read 3x32x32"),
    ("mnist", {"encoder": "C(8)>C(16)"}, "decoder 'mnist': does not read 16x7x7"),
])
def test_other_networks_that_cannot_be_built(version, changes, expected):
    with pytest.raises(NotationError) as error:
        build(version, **changes)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_new_token_is_one_row_of_the_table(monkeypatch):
    def layers(n, c, h, w):
        return [nn.Conv2d(c, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.GELU()], (n, h, w)
    monkeypatch.setitem(models.KINDS, "K", Kind(layers, models.KINDS["C'"].mirror))
    model = build(Version("K(4)>C(5)", "K(6)>L'(10)", he=True), (3, 8, 8))
    logits, reconstruction = model(torch.randn(2, 3, 8, 8))
    assert logits.shape == (2, 10) and reconstruction.shape == (2, 3, 8, 8)
    with pytest.raises(NotationError, match=r"expected one of .* K\(n\), joined"):
        models.parse("X(3)")


# ---------------------------------------------------------------- layers

@pytest.mark.parametrize("ours, plain, shape", [
    (models.ConvTranspose2d(6, 5, 2, stride=2), nn.ConvTranspose2d(6, 5, 2, stride=2), (3, 6, 4, 7)),
    (models.ConvTranspose2d(7, 5, (4, 3)), nn.ConvTranspose2d(7, 5, (4, 3)), (3, 7, 1, 1)),
    (models.ConvTranspose2d(7, 5, 1), nn.ConvTranspose2d(7, 5, 1), (3, 7, 4, 4)),
    (models.WholeMapConv2d(3, 32, (7, 9)), nn.Conv2d(3, 32, (7, 9)), (3, 3, 7, 9))])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_our_layers_are_pytorchs(ours, plain, shape, memory):
    plain.load_state_dict(ours.state_dict())
    x, results = torch.randn(shape).to(memory_format=memory), []
    for layer in (ours, plain):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        total = (y * torch.arange(y.numel()).view_as(y) / y.numel()).sum()
        results.append((y, *torch.autograd.grad(total, (inputs, layer.weight, layer.bias))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(50, 8, 10, 10), (400, 101)])
def test_dropout_keeps_its_share_and_its_mean(shape):
    torch.manual_seed(1)
    layer, x = models.Dropout(0.3), torch.ones(shape, requires_grad=True)
    y, n = layer(x), x.numel()
    kept = (y != 0).sum().item()
    assert abs(kept - 0.7 * n) < 4 * math.sqrt(n * 0.3 * 0.7)
    torch.testing.assert_close(y[y != 0], torch.full((kept,), 1 / 0.7), rtol=1e-4, atol=0)
    # Values that come from one 64-bit draw are independent: neighbours are both kept 0.49 n times.
    flat = (y != 0).movedim(1, -1).flatten()
    pairs = (flat[:-1] & flat[1:]).sum().item()
    assert abs(pairs - 0.49 * n) < 5 * math.sqrt(n * 0.49 * 0.51)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)  # the gradient goes through the same mask
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("shape", [(3, 9, 7), (1, 6, 6)])
def test_the_first_filters_whiten_the_images(shape):
    """The outputs of the first half have a mean square of 1 and do not correlate; the second half is their
    negative. All filters are fixed."""
    torch.manual_seed(0)
    c = shape[0]
    images = torch.randn(300, *shape).cumsum(2).cumsum(3) + torch.randn(300, *shape)  # pixels that correlate
    model = build(Version("W(30)>B(8)", "B(8)>A(1)>L'(4)"), shape)
    layer = model.encoder[0]
    models.whiten(model, images)
    output = layer(images)
    assert output.shape == (300, 30, *shape[1:])
    rows = output.permute(1, 0, 2, 3).flatten(1).double()  # (30, N * H * W)
    first, second, _ = rows.split([4 * c, 4 * c, 30 - 8 * c])
    torch.testing.assert_close(first @ first.T / rows.shape[1], torch.eye(4 * c).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(second, -first, rtol=0, atol=1e-5)
    assert not list(layer.parameters())
    plain = F.conv2d(F.pad(images, (1, 0, 1, 0), "replicate"), layer.weight)  # of the padded images
    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-4)


def test_a_block_normalises_what_it_has_pooled():
    x = torch.randn(4, 5, 6, 6)
    modules, _ = models.layers("B(9)", (5, 6, 6))
    maps = F.max_pool2d(F.conv2d(x, modules[0].weight, padding=1), 2)  # no bias: the norm has one
    variance, mean = torch.var_mean(maps, (0, 2, 3), unbiased=False, keepdim=True)
    expected = ((maps - mean) / (variance + 1e-5).sqrt()).relu()
    torch.testing.assert_close(nn.Sequential(*modules)(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(modules[-2].running_mean, 0.4 * mean.flatten(), rtol=1e-4, atol=1e-5)


def test_a_variational_code_is_drawn_in_training_and_is_the_mean_otherwise():
    torch.manual_seed(0)
    model, x = build("vae", classifier="L'(10)"), torch.randn(1, 1, 28, 28)
    mean, log_variance = model.eval()(x, posterior=True)[2:]
    assert torch.equal(torch.cat([mean, log_variance], 1), model.encoder(x)) and mean.shape == (1, 32)
    assert torch.equal(model.encode(x), mean)
    drawn, std = model.train().encode(x.expand(1000, 1, 28, 28)), (log_variance[0] / 2).exp()
    assert ((drawn.mean(0) - mean[0]).abs() < 5 * std / 1000 ** 0.5).all()
    torch.testing.assert_close(drawn.std(0), std, rtol=0.12, atol=0)
    torch.manual_seed(1)
    logits, reconstruction, mean, log_variance = model(x, posterior=True)
    torch.manual_seed(1)
    code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
    torch.testing.assert_close([logits, reconstruction], [model.classifier(code), model.decoder(code)])
    model.encoder.eval()  # frozen while a classifier trains
    assert torch.equal(model.encode(x), mean)
    assert build("v3")(torch.randn(2, 3, 32, 32), posterior=True)[2:] == (None, None)


@pytest.mark.parametrize("version, changes", [("v4", {"skip": True}), ("vae", {}), ("cnn", {})])
@simulated_cuda
def test_nothing_waits_for_the_device(version, changes):
    """Fake tensors have no values: reading one, as a synchronisation does, is an error."""
    with FakeTensorMode(), torch.device("cuda"):
        model = build(version, **changes)
        reconstruction = model(torch.zeros(4, *model.version.in_shape), posterior=True)[1]
    assert reconstruction.device.type == "cuda" and reconstruction.shape == (4, *model.version.in_shape)


# torchvision's published totals for 1000 classes, less the last layer of each.
TRUNKS = {"vgg": 138_357_544 - linear(25_088, 4096) - linear(4096, 4096) - linear(4096, 1000),
          "resnet": 25_557_032 - linear(2048, 1000), "mobilenet": 3_504_872 - linear(1280, 1000),
          "squeezenet": 1_235_496 - linear(512, 1000)}


@pytest.mark.parametrize("version", TRUNKS)
@pytest.mark.parametrize("size", [224, 50, 32])
def test_a_standard_network_is_torchvisions(version, size):
    with torch.device("meta"):
        model = build(version, (3, size, size), 7, pretrained=False)
        logits, rebuilt = model.eval()(torch.zeros(2, 3, size, size))
    assert models.parameter_count(model.encoder) == TRUNKS[version]
    assert logits.shape == (2, 7) and rebuilt.shape == (2, 3, size, size)


@pytest.mark.parametrize("version, file", [
    ("vgg", "vgg16-397923af.pth"), ("resnet", "resnet50-0676ba61.pth"),
    ("mobilenet", "mobilenet_v2-b0353104.pth"), ("squeezenet", "squeezenet1_1-b8a52dc0.pth")])
def test_pretrained_weights_come_from_torchs_cache(version, file, tmp_path, monkeypatch):
    """A file of the right name and shapes, each tensor filled with a different number."""
    for name in ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_"):  # VGG16 is large
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: nn.init.zeros_(tensor))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with torch.device("meta"):
        state = get_model(models.VERSIONS[version].encoder).state_dict()
    fills = {name: (i % 50 + 1) / 64 for i, name in enumerate(state)}
    place = tmp_path / "hub" / "checkpoints" / file
    place.parent.mkdir(parents=True)
    torch.save({name: torch.tensor(fills[name]).to(tensor.dtype).expand(tensor.shape)  # one number on disk
                for name, tensor in state.items()}, place)
    model = build(version, (3, 32, 32), num_classes=10)
    trunk = [fill for name, fill in fills.items() if not name.startswith(("classifier.", "fc."))]
    for tensor, fill in zip(model.encoder.state_dict().values(), trunk, strict=True):
        assert (tensor == torch.tensor(fill).to(tensor.dtype)).all()
    linears = [layer for layer in model.classifier.modules() if isinstance(layer, nn.Linear)]
    from_file = [layer.weight.flatten()[0].item() in fills.values() for layer in linears]
    assert from_file == ([True, True, False] if version == "vgg" else [False])


def test_pretrained_weights_that_are_unavailable(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refused(*args, **kwargs):
        raise OSError("Name or service\nnot known")
    monkeypatch.setattr("torch.hub.urlopen", refused)
    with pytest.raises(NotationError) as error:
        build("squeezenet")
    message = str(error.value)
    assert "\n" not in message and "Name or service not known" in message
    assert f"{tmp_path / 'hub/checkpoints'} " in message and "squeezenet1_1-b8a52dc0.pth there" in message


def test_the_modified_network_joins_lower_features():
    """v4: 32 channels of the encoder's first layer join the 64 of the last conv before L(512)."""
    plain, model = build("v4").eval(), build("v4", skip=True).eval()
    more = conv(32, 32) + 32 * 4 * 4 * 512
    assert models.parameter_count(model) == models.parameter_count(plain) + more
    images, joined, layer = torch.randn(2, 3, 32, 32), model.classifier, model.classifier.lower[0]
    code, lower = model.encoder(images), model.encoder[:2](images)
    side = F.relu(F.max_pool2d(F.conv2d(lower, layer.weight, layer.bias, stride=2, padding=1), 4))
    logits, rebuilt = model(images)
    torch.testing.assert_close(logits, joined.last(torch.cat([joined.features(code), side], 1)))
    torch.testing.assert_close(rebuilt, model.decoder(code))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 33, 45)])
@pytest.mark.parametrize("version", ["v3", "v3.3", "v4-stride2"])
def test_the_modified_network_in_other_sizes(version, shape):
    model = build(version, shape, 7, skip=True).eval()
    assert model(torch.randn(2, *shape))[0].shape == (2, 7)
    # Where sizes divide, it is not the adaptive pooling, which CUDA does not repeat to the bit.
    assert isinstance(model.classifier.lower[1], nn.MaxPool2d if shape[1] == 32 else nn.Module)


def test_he_initialisation():
    torch.manual_seed(0)
    layer = build("joint5").encoder[6]
    assert layer.weight.var().item() == pytest.approx(2 / (24 * 9), rel=0.1)  # 2 / fan in
    assert not layer.bias.any()
    for seed in range(8):  # mnist's last ReLU would be dead from the start in most of them without it
        torch.manual_seed(seed)
        assert (build("mnist")(torch.rand(20, 1, 28, 28))[1] > 0).float().mean() > 0.05


def test_the_handwritten_network_by_its_shapes():
    assert [row[2] for row in models.trace(build("mnist")) if row[1] != "ReLU"] == [
        (8, 29, 29), (8, 14, 14), (16, 8, 8), (16, 4, 4), (3, 4, 4), (48,), (120,), (10,),
        (16, 6, 6), (8, 13, 13), (1, 28, 28)]


def test_multiply_adds_by_hand():
    model = build(Version("C(4)", "L'(10)"), (3, 8, 8))
    adds = {(part, layer): n for part, layer, _, _, n in models.trace(model)}
    assert adds["encoder", "Conv2d"] == 8 * 8 * 4 * 3 * 9
    assert adds["classifier", "Linear"] == 4 * 4 * 4 * 10
    assert adds["decoder", "ConvTranspose2d"] == 4 * 4 * 4 * 3 * 2 * 2
    assert model.training and adds["encoder", "ReLU"] == 0
    row = models.trace(build(Version("W(30)", decoder=None), (3, 8, 8)))[0]
    assert row[3:] == (0, 8 * 8 * 30 * 3 * 2 * 2)  # its filters are fixed


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("version, changes", [
    ("v4", {"skip": True}), ("v4-stride2", {"in_shape": (1, 15, 9), "num_classes": 3}), ("vae", {}),
    ("mnist", {}), ("cnn", {"decoder": None}), ("v5-small", {}),
    ("squeezenet", {"in_shape": (3, 32, 32), "pretrained": False})])
def test_a_network_is_saved_and_loaded(version, changes, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    model = build(version, **changes)
    model.version = replace(model.version, pretrained=version == "squeezenet")  # not needed again
    models.save(tmp_path / "net.pt", model, rows=[{"loss": 0.5, "shape": (3, None)}], w=torch.ones(2))
    before = torch.get_rng_state()
    loaded, content = models.load(tmp_path / "net.pt")
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing
    assert content["classes"] == [str(i) for i in range(loaded.num_classes)]
    assert content["rows"] == [{"loss": 0.5, "shape": (3, None)}] and content["w"].tolist() == [1, 1]
    assert loaded.version == replace(model.version, pretrained=False) and loaded.tap == model.tap
    assert not any(module.training for module in loaded.modules())
    for weight in loaded.parameters():
        assert weight.requires_grad and weight.device.type == "cpu"
        assert weight.ndim != 4 or weight.is_contiguous(memory_format=torch.channels_last)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = torch.randn(2, *model.version.in_shape)
    for output, expected in zip(loaded(x), model.eval()(x)):
        assert output is expected is None or torch.allclose(output, expected, atol=1e-5)


def test_saving_refuses_what_loading_would_not_give_back(tmp_path):
    path, model = tmp_path / "net.pt", build("v3")
    changed, wider = copy.deepcopy(model), copy.deepcopy(model)
    changed.decoder[1] = nn.Sigmoid()
    wider.encoder.register_buffer("mean", torch.zeros(3))
    names = [*"abcdefghij"]
    for network, arguments, expected in [
            (changed, {}, "not what its notation makes"), (wider, {}, "not what its notation makes"),
            (torch.compile(model), {}, "not what its notation makes"),
            (model, {"classes": names[:9]}, "expected 10 names, each a str"),
            (model, {"classes": range(10)}, "a str"), (model, {"classes": [*map(np.str_, names)]}, "a str"),
            (model, {"rows": [{"loss": np.float64(0.5)}]}, "rows: 0.5 is a float64; expected a plain value"),
            (model, {"counts": {np.int64(3): 1}}, "counts: 3 is a int64")]:
        with pytest.raises(ValueError, match=expected) as error:
            models.save(path, network, **arguments)
        assert "\n" not in str(error.value)
    assert not path.exists()


def test_the_example_of_the_docstring(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = [line.strip() for line in models.__doc__.splitlines() if line.startswith("    ")][:5]
    names = vars(models) | {"images": torch.randn(2, 1, 28, 28)}
    exec("\n".join(example), names)
    assert names["logits"].shape == (2, 3) and names["content"]["classes"] == ["bag", "boot", "coat"]
    assert names["code"].shape == (2, *names["model"].code_shape)


class Payload:
    """A pickle that runs code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("fault", ["missing", "text", "cut", "flipped", "pickle", "code", "foreign", "other"])
def test_what_is_no_whole_checkpoint_is_one_line_and_runs_no_code(fault, tmp_path):
    path, code = tmp_path / "net.pt", Payload(str(tmp_path / "code-was-run"))
    models.save(path, build("v3"))
    whole, content, half = path.read_bytes(), torch.load(path, weights_only=True), path.stat().st_size // 2
    files = {"text": b"hello", "cut": whole[:-100], "pickle": pickle.dumps(code), "foreign": content["model"],
             "flipped": whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1:],
             "code": content | {"rows": [code]}, "other": content | {"model": build("v2").state_dict()}}
    path.unlink()
    if fault != "missing":
        new = files[fault]
        path.write_bytes(new) if isinstance(new, bytes) else torch.save(new, path)
    with pytest.raises(CheckpointError) as error:
        models.load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: no whole checkpoint of train.py (") and "\n" not in message
    assert not (tmp_path / "code-was-run").exists()


def test_a_file_of_another_version_of_the_program(tmp_path):
    torch.save({"kind": "autoencoder checkpoint, format 4", "settings": {}}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="old.pt: written by another version of this program; train"):
        models.load(tmp_path / "old.pt")


# ---------------------------------------------------------------- the command line

@pytest.mark.parametrize("name", [*NOTATION, "C'(16)>C(16)", "W(8)>B'(8)>L(9)>N(4)"])
def test_the_printed_class_is_the_same_network(name, capsys):
    """Executed, it draws the same weights from a seed, has them by the same names and computes the same."""
    models.main([name, "--code"])
    code, scope = capsys.readouterr().out, {}
    exec(code, scope)
    printed = scope[re.findall(r"^class (\w+)", code, re.M)[-1]]
    torch.manual_seed(0)
    model = build(Version(name) if "(" in name else name).eval()
    torch.manual_seed(0)
    plain = printed().eval()
    assert not any(type(layer).__module__ == "models" for layer in plain.modules())
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    x = torch.randn(2, *model.version.in_shape)
    for a, b in zip(plain(x), model(x, posterior=model.variational), strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    if model.classifier is not None:
        assert printed(num_classes=3)(x)[0].shape == (2, 3)


def test_the_printed_class_is_written_as_one_would(capsys):
    models.main(["v4-plain", "--code"])
    code = capsys.readouterr().out
    assert code.startswith("import torch\nfrom torch import nn\n\n\nclass V4_plain(nn.Module):\n")
    assert """
            nn.Conv2d(3, 32, kernel_size=3, padding=1),   # 32x32x32
            nn.ReLU(),                                    # 32x32x32
            nn.Conv2d(32, 32, kernel_size=3, padding=1),  # 32x32x32
            nn.MaxPool2d(kernel_size=2, stride=2),        # 32x16x16
""" in code


def test_the_tables(capsys):
    models.main([])
    table = capsys.readouterr().out
    assert all(f"\n{name} " in table for name in models.VERSIONS) and f"{3495946:,}" in table  # v1
    models.main(["v4"])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["total", "670,797", "21,497,088"]


@pytest.mark.parametrize("argv, expected", [
    (["v9"], "no version 'v9'; did you mean 'v"), (["C(16)>X(3)"], "token 2 'X(3)': expected one of C(n)"),
    (["resnet", "--code"], "resnet50: is torchvision's code"), ([""], "no version ''")])
def test_a_wrong_command_line_is_answered_in_one_line(argv, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        models.main(argv)
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and not out and error.count("\n") == 1
    assert error.startswith("models.py: error: ") and expected in error
