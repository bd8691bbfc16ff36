"""The notation, the mirror, the versions' arithmetic, our layers against PyTorch's, checkpoints, the command line."""
import math
import os
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torchvision.models import get_model

import models
from models import CheckpointError, Kind, NotationError, Version, build
from conftest import simulated_cuda


def linear(inputs, outputs):
    return inputs * outputs + outputs


def conv(inputs, outputs, kernel=3):
    return inputs * outputs * kernel * kernel + outputs


# Each network's parameters, layer by layer, as one reads them off the notation.
PARAMETERS = {
    "v1": {
        "encoder": linear(3072, 512) + linear(512, 256) + linear(256, 128),
        "classifier": linear(128, 128) + linear(128, 10),
        "decoder": linear(128, 256) + linear(256, 512) + linear(512, 3072)},
    "v2": {
        "encoder": conv(3, 32) + conv(32, 32) + conv(32, 64) + linear(64 * 4 * 4, 512),
        "classifier": linear(512, 128) + linear(128, 10),
        "decoder": linear(512, 1024) + conv(64, 32, 2) + conv(32, 32, 2) + conv(32, 3, 2)},
    "v3": {
        "encoder": conv(3, 32) + conv(32, 32) + conv(32, 64) + conv(64, 64),
        "classifier": conv(64, 64) + linear(64 * 2 * 2, 10),
        "decoder": conv(64, 64, 2) + conv(64, 32, 2) + conv(32, 32, 2) + conv(32, 3, 2)},
    "v4": {
        "encoder": conv(3, 32) + conv(32, 32),
        "classifier": conv(32, 32) + conv(32, 64) + conv(64, 64) + linear(64 * 4 * 4, 512)
        + linear(512, 128) + linear(128, 10),
        "decoder": conv(32, 32, 2) + conv(32, 3, 1)},
}


@pytest.mark.parametrize("version", PARAMETERS)
def test_parameters_are_the_arithmetic_of_the_notation(version):
    model = build(version)
    for part, expected in PARAMETERS[version].items():
        assert models.parameter_count(getattr(model, part)) == expected, part
    assert models.parameter_count(model) == sum(PARAMETERS[version].values())


def test_v1_encoder_alone_written_out_in_numbers():
    assert models.parameter_count(build("v1").encoder) == 3072*512+512 + 512*256+256 + 256*128+128


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 64), (3, 33, 45)])
@pytest.mark.parametrize("version", [name for name, v in models.VERSIONS.items()
                                     if v.decoder == "mirror" and name not in ("v5", "v5-large")])  # other widths
def test_the_mirror_gives_every_shape_back(version, shape):
    if version.startswith("v1") and shape[1] > 40:
        shape = (1, 45, 33)  # the same question, a tenth of the weights
    images = torch.randn(2, *shape)
    logits, reconstruction = build(version, shape, num_classes=7).eval()(images)
    assert reconstruction.shape == images.shape
    assert logits.shape == (2, 7) if models.VERSIONS[version].classifier else logits is None


@pytest.mark.parametrize("notation", ["C(4)>C(4)>C(4)", "S(4)>S(4)>S(4)", "C(4)>G(5)", "S(4)>L(6)",
                                      "C'(4)>C(4)>S(4)>L'(6)"])
@pytest.mark.parametrize("shape", [(1, 15, 9), (3, 9, 14), (2, 13, 13)])
def test_the_mirror_of_odd_maps(notation, shape):
    images = torch.randn(2, *shape)
    model = build(Version(notation), shape)
    assert model(images)[1].shape == images.shape


def test_a_mirror_runs_backwards_with_relu_after_each_layer_but_the_last():
    decoder = build(Version("C'(4)>D(0.5)>C(5)>S(6)>L(7)"), (3, 16, 16)).decoder
    kinds = [type(layer).__name__ for layer in decoder]
    assert kinds == ["Linear", "Unflatten", "ReLU"] + ["ConvTranspose2d", "ReLU"] * 2 + ["ConvTranspose2d"]
    convs = [layer for layer in decoder if isinstance(layer, nn.ConvTranspose2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convs] == [
        (6, 5, 2), (5, 4, 2), (4, 3, 1)]


def test_no_decoder_and_written_decoder():
    images = torch.randn(2, 3, 32, 32)
    model = build("v4", decoder=None)
    assert model.decoder is None and model(images)[1] is None
    written = build(Version("C(8)>C(8)", decoder="T(4)>T(3)"))
    assert not isinstance(written.decoder[-1], nn.ReLU)  # none after the last layer
    assert written(images)[1].shape == images.shape and written(images)[0] is None
    assert not isinstance(build(Version("C(8)", decoder="T(8)>B'(3)")).decoder[-1], nn.ReLU)


def test_the_decoder_does_not_touch_the_other_weights():
    """A seed gives the same encoder and classifier with and without a decoder."""
    states = []
    for decoder in ("mirror", None):
        torch.manual_seed(5)
        states.append(build("v4", decoder=decoder).state_dict())
    for name, weight in states[1].items():
        assert torch.equal(weight, states[0][name]), name


def test_a_seed_gives_the_weights_that_the_layers_alone_would_draw():
    """Nothing is built twice: that would draw random numbers and give a seed another start."""
    torch.manual_seed(3)
    model = build("v4")
    torch.manual_seed(3)
    for part, place, plain in ((model.encoder, 0, nn.Conv2d(3, 32, 3)), (model.encoder, 2, nn.Conv2d(32, 32, 3)),
                               (model.classifier, 0, nn.Conv2d(32, 32, 3))):
        assert torch.equal(part[place].weight, plain.weight)


def test_forward_leaves_out_what_is_not_asked_for():
    model, images = build("v3").eval(), torch.randn(2, 3, 32, 32)
    both = model(images)
    assert model(images, classify=False)[0] is None
    assert torch.equal(model(images, classify=False)[1], both[1])
    assert model(images, reconstruct=False)[1] is None
    assert torch.equal(model(images, reconstruct=False)[0], both[0])


def test_pooling_before_relu_is_pooling_after_it():
    torch.manual_seed(0)
    model = build(Version("C(8)"), (3, 10, 10))
    x = torch.randn(4, 3, 10, 10)
    conv_layer = model.encoder[0]
    pooled_first = model.encoder(x)
    pooled_first.sum().backward()
    gradient = conv_layer.weight.grad.clone()
    conv_layer.weight.grad = None
    plain = F.max_pool2d(F.relu(conv_layer(x)), 2)
    plain.sum().backward()
    assert torch.equal(pooled_first, plain)
    torch.testing.assert_close(gradient, conv_layer.weight.grad)


@pytest.mark.parametrize("channels_last", [False, True])
def test_transposed_conv_is_pytorchs(channels_last):
    torch.manual_seed(0)
    ours = models.ConvTranspose2d(6, 5, 2, stride=2)
    plain = nn.ConvTranspose2d(6, 5, 2, stride=2)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, 4, 7)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    results = []
    for layer in (ours, plain):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        results.append((y, inputs.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(50, 8, 10, 10), (400, 101)])
def test_dropout_keeps_its_share_and_its_mean(shape):
    torch.manual_seed(1)
    layer = models.Dropout(0.3)
    x = torch.ones(shape, requires_grad=True)
    y = layer(x)
    n = x.numel()
    kept = (y != 0).sum().item()
    assert abs(kept - 0.7 * n) < 4 * math.sqrt(n * 0.3 * 0.7)
    torch.testing.assert_close(y[y != 0], torch.full((kept,), 1 / 0.7), rtol=1e-4, atol=0)
    # Values that come from one 64-bit draw are independent: neighbours are both kept 0.49 n times.
    flat = (y != 0).movedim(1, -1).flatten()
    pairs = (flat[:-1] & flat[1:]).sum().item()
    assert abs(pairs - 0.49 * n) < 5 * math.sqrt(n * 0.49 * 0.51)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the gradient goes through the same mask
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("notation, expected", [
    ("C(32)>X(3)", "token 2 'X(3)': expected one of C(n)"),
    ("C(32)>>L(2)", "token 2 ''"),
    ("C32", "token 1 'C32'"),
    ("", "token 1 ''"),
    ("C(0)", "expected a whole number"),
    ("L(2.5)", "expected a whole number"),
    ("C(4)>D(1.5)", "token 2 'D(1.5)': expected a probability"),
    ("C(4)>D(0.999999)", "token 2 'D(0.999999)': expected a probability from 0 to 0.99998 (65535/65536)"),
    ("L(64)>N(8)>L(4)", "token 2 'N(8)': N(n) gives the code; expected it as an encoder's last token"),
    ("C'(8)>G(200000)", "token 2 'G(200000)': would have 1,638,400,000 weights; expected at most 500,000,000"),
    (None, "token 1 'None': expected one of C(n)"),
    ("L(8)>C(4)", "token 2 'C(4)': expected a map"),
    ("C(4)>C(4)>C(4)>C(4)>C(4)>C(4)", "token 6 'C(4)': cannot pool a map of 1x1"),
    ("T(4)", "T has no mirror"),
])
def test_a_malformed_notation_is_answered_at_its_token(notation, expected):
    with pytest.raises(NotationError) as error:
        build(Version(notation))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_other_networks_that_cannot_be_built():
    with pytest.raises(NotationError, match="did you mean 'v4'"):
        build("v44")
    with pytest.raises(NotationError, match="ends in L'"):
        build("v4", classifier="L(128)>L(10)")
    with pytest.raises(NotationError, match="expected the images' 3 channels"):
        build("v4", decoder="T(8)>T(8)")
    with pytest.raises(NotationError, match="resnet50: has no mirror"):
        build("resnet", decoder="mirror", pretrained=False)
    with pytest.raises(NotationError, match="images of 1x28x28; expected 3 channels and sides of at least 32"):
        build("resnet", (1, 28, 28), pretrained=False)
    with pytest.raises(NotationError, match="the code is a vector of 128"):
        build("v1", skip=True)
    with pytest.raises(NotationError, match="token 1 'N.4.': N.n. gives the code"):
        build("v4", classifier="N(4)>L'(10)", skip=True)
    with pytest.raises(NotationError, match="token 1 'D.0.99999.': expected a probability"):
        build("v4", classifier="D(0.99999)>L'(10)")
    with pytest.raises(NotationError, match="'N.4.' ends in 4; expected the images' 3 channels"):
        build("v4", decoder="N(4)")
    with pytest.raises(NotationError, match="encoder 'C.16.': has no pretrained weights; expected one of vgg16 .*or "
                                            "--no-pretrained"):
        build("resnet", (3, 32, 32), encoder="C(16)")


@pytest.mark.parametrize("in_shape, num_classes", [((3, 32), 10), ((3, 0, 32), 10), ((3, -32, 32), 10), (None, 0)])
def test_sizes_that_no_network_has(in_shape, num_classes):
    with pytest.raises(NotationError, match="expected channels, height, width and the number of classes to be at le"):
        build("v4", in_shape, num_classes)


@pytest.mark.parametrize("version, changes, expected", [
    ("v4", {"encoder": "L(64)"},
     f"the classifier of v4 {models.V4_DROPOUT!r} does not fit the encoder 'L(64)': token 1 \"C'(32)\": expected a "
     "map (channels, height, width), but a linear layer has made it a vector of 64; name another with --classifier"),
    ("v3", {"encoder": "L(64)", "skip": True},
     "the classifier of v3 \"C'(64)>L'(10)\" does not fit the encoder 'L(64)': skip joins maps"),
    ("joint5", {"encoder": "L(64)", "classifier": None},
     "the decoder of joint5 'U(24)>U(12)>U(3)' does not fit the encoder 'L(64)': token 1 'U(24)': expected a map"),
    ("mnist", {"encoder": "C(8)>C(16)"},
     "the decoder of mnist 'mnist' does not fit the encoder 'C(8)>C(16)': a decoder from 3x4x4 to 1x28x28: the code "
     "is 16x7x7"),
    (Version("L(8)", "L'(3)", "T(3)"), {"encoder": "L(64)"}, "the decoder of the version 'T(3)' does not fit"),
])
def test_a_default_that_does_not_fit_a_replaced_encoder_is_named(version, changes, expected):
    with pytest.raises(NotationError) as error:
        build(version, **changes)
    assert str(error.value).startswith(expected) and "; name another with --" in str(error.value)


@pytest.mark.parametrize("changes, expected", [
    ({"encoder": "L(64)", "classifier": "C(4)>L'(10)"}, "\"C(4)>L'(10)\", token 1 'C(4)': expected a map"),
    ({"encoder": "A(4)", "classifier": None}, "'A(4)', token 1 'A(4)': A has no mirror; write the decoder out"),
    ({"decoder": "mnist"}, "'mnist', a decoder from 3x4x4 to 1x28x28: the code is 32x16x16, the images are 3x32x32"),
])
def test_a_part_that_the_user_has_written_is_no_default(changes, expected):
    with pytest.raises(NotationError) as error:
        build("v4", **changes)
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("version, encoder, shape", [("resnet", "C(16)>C(16)", (3, 32, 32)),
                                                     ("squeezenet", "C'(4)>S(8)", (3, 45, 33))])
def test_a_written_out_decoder_fits_any_map(version, encoder, shape):
    logits, reconstruction = build(version, shape, encoder=encoder, pretrained=False)(torch.randn(2, *shape))
    assert logits.shape == (2, 10) and reconstruction.shape == (2, *shape)


def test_a_handwritten_decoder_takes_any_code_of_its_shape():
    model = build("mnist", encoder="C(8)>C(16)>C'(3)>A(4)")
    assert model(torch.randn(2, 1, 28, 28))[1].shape == (2, 1, 28, 28)


@pytest.mark.parametrize("shape", [(3, 9, 7), (1, 6, 6)])
def test_the_first_filters_whiten_the_images(shape):
    """The outputs of the first half have a mean square of 1 and do not correlate; the second half is their negative.
    All filters are fixed."""
    torch.manual_seed(0)
    c = shape[0]
    images = torch.randn(300, *shape).cumsum(2).cumsum(3) + torch.randn(300, *shape)  # pixels that correlate
    model = build(Version("W(30)>B(8)", "B(8)>A(1)>L'(4)"), shape)
    before, layer = model.encoder[0].weight.clone(), model.encoder[0]
    models.whiten(model, images)
    with torch.no_grad():
        output = layer(images)
    assert output.shape == (300, 30, *shape[1:])
    rows = output.permute(1, 0, 2, 3).flatten(1).double()  # (30, N * H * W)
    first, second, rest = rows.split([4 * c, 4 * c, 30 - 8 * c])
    torch.testing.assert_close(first @ first.T / rows.shape[1], torch.eye(4 * c).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(second, -first, rtol=0, atol=1e-5)
    assert torch.equal(layer.weight[8 * c:], before[8 * c:]) and not list(layer.parameters())
    plain = F.conv2d(F.pad(images, (1, 0, 1, 0), "replicate"), layer.weight)  # of the padded images
    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [
    {"encoder": "C'(16)>W(32)"}, {"classifier": "W(32)>L'(10)"}, {"decoder": "T(16)>W(3)"}])
def test_whitening_is_of_images_alone(changes):
    with pytest.raises(NotationError, match="W\\(n\\) whitens the images; expected it as an encoder's first token"):
        build(Version("C'(16)>C(16)", "L'(10)"), **changes)


def test_a_block_normalises_what_it_has_pooled():
    x = torch.randn(4, 5, 6, 6)
    for notation in ("B(9)", "B'(9)"):
        modules, _ = models.layers(notation, (5, 6, 6))
        maps = F.conv2d(x, modules[0].weight, padding=1)  # no bias: the norm has one
        if notation == "B(9)":
            maps = F.max_pool2d(maps, 2)
        variance, mean = torch.var_mean(maps, (0, 2, 3), unbiased=False, keepdim=True)
        expected = ((maps - mean) / (variance + 1e-5).sqrt()).relu()
        torch.testing.assert_close(nn.Sequential(*modules)(x), expected, rtol=1e-4, atol=1e-5)
        assert modules[0].bias is None
        torch.testing.assert_close(modules[-2].running_mean, 0.4 * mean.flatten(), rtol=1e-4, atol=1e-5)


def test_the_mirror_of_the_new_blocks():
    decoder = build(Version("W(8)>B(6)>B'(5)>C(4)"), (3, 16, 16)).decoder
    assert [type(layer).__name__ for layer in decoder] == [
        "ConvTranspose2d", "ReLU", "Conv2d", "ReLU", "ConvTranspose2d"]
    assert [(layer.kernel_size[0], layer.out_channels) for layer in decoder[::2]] == [(2, 5), (1, 6), (2, 3)]


@pytest.mark.parametrize("encoder", ["W(4)>D(0.2)>B(6)", "W(4)>L(7)", "W(4)>G(5)", "W(4)>C'(5)>L(6)", "D(0.2)>S(4)"])
def test_what_follows_whitening_gives_the_images(encoder):
    model = build(Version(encoder), (3, 9, 9))
    assert model(torch.randn(2, 3, 9, 9))[1].shape == (2, 3, 9, 9)


def test_whitening_another_encoder_is_refused():
    for version in ("v1", "v4"):
        with pytest.raises(ValueError, match="expected one that begins with W"):
            models.whiten(build(version), torch.zeros(2, 3, 32, 32))


def test_whitening_alone_has_no_mirror():
    with pytest.raises(NotationError, match="token 1 'W.4.': has no mirror alone"):
        build(Version("W(4)>D(0.2)"))
    assert build(Version("W(4)", decoder=None))(torch.zeros(2, 3, 32, 32)) == (None, None)


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 2, 3), (2, 5, 1)])
def test_whitening_of_the_smallest_images(shape):
    model, images = build(Version("W(40)", "A(1)>L'(2)", None), shape), torch.rand(1, *shape)
    models.whiten(model, images)
    assert model(images)[0].isfinite().all()


def test_steps_of_a_notation():
    modules, steps = models.layers("C(4)>D(0.5)>L(6)", (3, 9, 8))
    assert [(step.token.kind, step.token.value) for step in steps] == [("C", 4), ("D", 0.5), ("L", 6)]
    assert [(step.before, step.after) for step in steps] == [
        ((3, 9, 8), (4, 4, 4)), ((4, 4, 4), (4, 4, 4)), ((4, 4, 4), (6,))]
    assert [step.end for step in steps] == [3, 4, 7] and len(modules) == 7
    x = torch.randn(2, 3, 9, 8)
    for step in steps:  # each step's modules give its shape
        assert nn.Sequential(*modules[:step.end])(x).shape == (2, *step.after)
    assert type(models.mirror(steps)[-1]) is models.ConvTranspose2d


def test_a_new_token_is_one_row_of_the_table(monkeypatch):
    def layers(n, c, h, w):
        return [nn.Conv2d(c, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.GELU()], (n, h, w)
    monkeypatch.setitem(models.KINDS, "K", Kind(layers, models.KINDS["C'"].mirror))
    model = build(Version("K(4)>C(5)", "K(6)>L'(10)", he=True), (3, 8, 8))
    logits, reconstruction = model(torch.randn(2, 3, 8, 8))
    assert logits.shape == (2, 10) and reconstruction.shape == (2, 3, 8, 8)
    with pytest.raises(NotationError, match=r"expected one of .* K\(n\), joined"):
        models.parse("X(3)")


def test_the_last_layer_follows_the_number_of_classes():
    model = build("v4", num_classes=100)
    assert model(torch.randn(2, 3, 32, 32))[0].shape == (2, 100)
    assert model.version.classifier == models.VERSIONS["v4"].classifier.replace("L'(10)", "L'(100)")


# ---------------------------------------------------------------- standard networks, the modified one

# torchvision's published totals for 1000 classes, less the last layer of each.
TRUNKS = {"vgg": 138_357_544 - linear(25_088, 4096) - linear(4096, 4096) - linear(4096, 1000),
          "resnet": 25_557_032 - linear(2048, 1000), "mobilenet": 3_504_872 - linear(1280, 1000),
          "squeezenet": 1_235_496 - linear(512, 1000)}
CODES = {"vgg": (512, 7, 7), "resnet": (2048, 7, 7), "mobilenet": (1280, 7, 7), "squeezenet": (512, 13, 13)}


@pytest.mark.parametrize("version", TRUNKS)
def test_a_standard_network_is_torchvisions(version):
    with torch.device("meta"):
        model = build(version, pretrained=False)
        logits, rebuilt = model.eval()(torch.zeros(2, 3, 224, 224))
    assert models.parameter_count(model.encoder) == TRUNKS[version]
    assert model.code_shape == CODES[version]
    assert logits.shape == (2, 10) and rebuilt.shape == (2, 3, 224, 224)
    assert not isinstance(model.decoder[-1], nn.ReLU)


@pytest.mark.parametrize("version", TRUNKS)
@pytest.mark.parametrize("size", [32, 50, 64])
def test_a_standard_network_takes_other_sizes(version, size):
    with torch.device("meta"):
        model = build(version, (3, size, size), 7, pretrained=False)
        logits, rebuilt = model.eval()(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, 7) and rebuilt.shape == (2, 3, size, size)


@pytest.mark.parametrize("version, file", [
    ("vgg", "vgg16-397923af.pth"), ("resnet", "resnet50-0676ba61.pth"),
    ("mobilenet", "mobilenet_v2-b0353104.pth"), ("squeezenet", "squeezenet1_1-b8a52dc0.pth")])
def test_pretrained_weights_come_from_torchs_cache(version, file, tmp_path, monkeypatch):
    """A file of the right name and shapes, each tensor filled with a different number."""
    for name in ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_"):  # VGG16 has 138 million weights
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
    loaded = list(model.encoder.state_dict().values())
    assert len(loaded) == len(trunk)
    for tensor, fill in zip(loaded, trunk):
        assert (tensor == torch.tensor(fill).to(tensor.dtype)).all()
    linears = [layer for layer in model.classifier.modules() if isinstance(layer, nn.Linear)]
    from_file = [layer.weight.flatten()[0].item() in fills.values() for layer in linears]
    assert from_file == ([True, True, False] if version == "vgg" else [False])

    place.write_bytes(place.read_bytes()[:1000])
    with pytest.raises(NotationError, match=f"{file} cannot be read.*put https://.*again, or.*--no-pretrained"):
        build(version)


def test_pretrained_weights_that_are_unavailable(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refused(*args, **kwargs):
        raise OSError("Name or service\nnot known")
    monkeypatch.setattr("urllib.request.urlopen", refused)
    monkeypatch.setattr("torch.hub.urlopen", refused)
    with pytest.raises(NotationError) as error:
        build("squeezenet")
    message = str(error.value)
    assert "\n" not in message and "--no-pretrained" in message and "Name or service not known" in message
    assert str(tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth") in message
    assert "put https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth there" in message


def test_the_modified_network_joins_lower_features():
    """v4: 32 channels of the encoder's first layer join the 64 of the last conv before L(512)."""
    plain, model = build("v4").eval(), build("v4", skip=True).eval()
    more = conv(32, 32) + 32 * 4 * 4 * 512
    assert models.parameter_count(model) == models.parameter_count(plain) + more
    images = torch.randn(2, 3, 32, 32)
    code, lower = model.encoder(images), model.encoder[:2](images)
    assert lower.shape == (2, 32, 32, 32)
    joined = model.classifier
    conv_layer = joined.lower[0]
    side = F.relu(F.max_pool2d(F.conv2d(lower, conv_layer.weight, conv_layer.bias, stride=2, padding=1), 4))
    final = joined.features(code)
    assert final.shape == (2, 64, 4, 4) and side.shape == (2, 32, 4, 4)
    logits, rebuilt = model(images)
    torch.testing.assert_close(logits, joined.last(torch.cat([final, side], 1)))
    torch.testing.assert_close(rebuilt, model.decoder(code))
    with torch.no_grad():  # with the lower features cut off, the rest still counts, and the other way round
        conv_layer.weight.zero_(), conv_layer.bias.zero_()
    assert not torch.equal(model(images)[0], logits)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 33, 45)])
@pytest.mark.parametrize("version", ["v3", "v3.3", "v4", "v4-stride2"])
def test_the_modified_network_in_other_sizes(version, shape):
    model = build(version, shape, 7, skip=True).eval()
    logits, rebuilt = model(torch.randn(2, *shape))
    assert logits.shape == (2, 7) and rebuilt.shape == (2, *shape)
    lower, pool = torch.randn(2, 32, *((side + 1) // 2 for side in shape[1:])), model.classifier.lower[1]
    if shape == (3, 32, 32):  # sizes divide: not the adaptive pooling, which CUDA does not repeat to the bit
        assert isinstance(pool, nn.MaxPool2d)
        assert torch.equal(pool(lower), nn.AdaptiveMaxPool2d(pool(lower).shape[2:])(lower))


def test_lower_features_without_a_classifier_to_join():
    model = build("v4", classifier=None, skip=True)
    assert model.tap is None and model(torch.randn(2, 3, 32, 32))[1].shape == (2, 3, 32, 32)


def test_the_modified_resnet():
    with torch.device("meta"):
        model = build("resnet", pretrained=False, skip=True)
        assert model.encoder[:model.tap](torch.zeros(1, 3, 224, 224)).shape == (1, 256, 56, 56)
        assert model.eval()(torch.zeros(1, 3, 224, 224))[0].shape == (1, 10)
    assert models.parameter_count(model.classifier) == conv(256, 256) + linear(2048 + 256, 10)


# ---------------------------------------------------------------- the other studies' networks

def layer_kinds(part):
    return [type(layer).__name__ for layer in part.modules() if list(layer.parameters(recurse=False))]


@pytest.mark.parametrize("version, code, kinds", [
    ("mlp", 32, ["Linear"] * 3), ("combo", 32, ["Conv2d", "Conv2d", "Linear"]),
    ("cnn", 32, ["Conv2d"] * 2 + ["WholeMapConv2d"]), ("cnn10", 10, ["Conv2d"] * 2 + ["WholeMapConv2d"]),
    ("cnn32", 32, ["Conv2d"] * 2 + ["WholeMapConv2d"]), ("cnn100", 100, ["Conv2d"] * 2 + ["WholeMapConv2d"]),
    ("cnn1000", 1000, ["Conv2d"] * 2 + ["WholeMapConv2d"]), ("cnnL1", 32, ["WholeMapConv2d"]),
    ("cnnL3", 32, ["Conv2d"] * 2 + ["WholeMapConv2d"]), ("cnnL5", 32, ["Conv2d"] * 4 + ["WholeMapConv2d"]),
    ("cnnL10", 32, ["Conv2d"] * 9 + ["WholeMapConv2d"])])
def test_kinds_code_sizes_and_depths(version, code, kinds):
    model = build(version)
    assert model.encoder(torch.randn(2, 3, 32, 32)).flatten(1).shape == (2, code)
    assert layer_kinds(model.encoder) == kinds and model.classifier is None
    mirrored = ["ConvTranspose2d" if kind.endswith("Conv2d") else kind for kind in reversed(kinds)]
    assert layer_kinds(model.decoder) == mirrored


def test_the_joint_model_of_five_classes():
    torch.manual_seed(0)
    model = build("joint5", num_classes=5)
    logits, rebuilt = model(torch.randn(2, 3, 32, 32))
    assert model.code_shape == (48, 4, 4) and logits.shape == (2, 5) and rebuilt.shape == (2, 3, 32, 32)
    assert rebuilt.abs().max() <= 1 and isinstance(model.decoder[-1], nn.Tanh)
    assert not isinstance(model.decoder[-2], nn.ReLU)
    assert models.parameter_count(model.classifier) == linear(48, 5)  # one 48-vector per image
    assert models.parameter_count(model.decoder) == conv(48, 24) + conv(24, 12) + conv(12, 3)
    weight = model.encoder[6].weight  # He: variance 2 / fan in
    assert weight.var().item() == pytest.approx(2 / (24 * 9), rel=0.1) and not model.encoder[6].bias.any()


def test_the_mnist_networks_shapes():
    model = build("mnist")
    shapes, x = [], torch.randn(2, 1, 28, 28)
    for part in (model.encoder, model.decoder):
        for layer in part:
            x = layer(x)
            if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.ConvTranspose2d)):
                shapes.append(tuple(x.shape[1:]))
    assert shapes == [(8, 29, 29), (8, 14, 14), (16, 8, 8), (16, 4, 4), (3, 4, 4), (16, 6, 6), (8, 13, 13),
                      (1, 28, 28)]
    assert models.parameter_count(model.classifier) == linear(48, 120) + linear(120, 10)
    for seed in range(8):  # its last ReLU would be dead from the start in most of them without He's
        torch.manual_seed(seed)
        assert (build("mnist")(torch.rand(20, 1, 28, 28))[1] > 0).float().mean() > 0.05
    with pytest.raises(NotationError, match="mnist: images of 3x32x32; expected 1x28x28"):
        build("mnist", (3, 32, 32))


def test_the_fashion_networks():
    mlp, cnn = build("fashion-mlp"), build("fashion-cnn")
    assert models.parameter_count(mlp) == linear(784, 128) + linear(128, 2) + linear(2, 128) + linear(128, 784)
    assert models.parameter_count(cnn) == conv(1, 16) + conv(16, 32) + conv(32, 16, 2) + conv(16, 1, 2)
    for model in (mlp, cnn):
        rebuilt = model(torch.randn(2, 1, 28, 28))[1]
        assert isinstance(model.decoder[-1], nn.Sigmoid) and 0 <= rebuilt.min() and rebuilt.max() <= 1


def test_a_variational_code_is_drawn_in_training_and_is_the_mean_otherwise():
    torch.manual_seed(0)
    model, x = build("vae"), torch.randn(1, 1, 28, 28)
    assert model.variational and model.code_shape == (32,)
    features = model.encoder(x)
    assert features.shape == (1, 64)
    mean, log_variance = model.posterior(features.bfloat16())
    assert mean.dtype == log_variance.dtype == torch.float32 and mean.shape == log_variance.shape == (1, 32)
    mean, log_variance = model.posterior(features)
    assert torch.equal(torch.cat([mean, log_variance], 1), features)
    drawn, std = model.encode(x.expand(1000, 1, 28, 28)), (log_variance[0] / 2).exp()
    assert ((drawn.mean(0) - mean[0]).abs() < 5 * std / 1000 ** 0.5).all()
    torch.testing.assert_close(drawn.std(0), std, rtol=0.12, atol=0)
    assert torch.equal(model.eval().encode(x), mean)
    model.train().encoder.eval()  # frozen while a classifier trains
    assert torch.equal(model.encode(x), mean)


def test_the_posterior_comes_with_the_reconstruction_of_its_draw():
    model, x = build("vae", classifier="L'(10)"), torch.randn(3, 1, 28, 28)
    torch.manual_seed(1)
    logits, reconstruction, mean, log_variance = model(x, posterior=True)
    torch.manual_seed(1)
    code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
    torch.testing.assert_close(reconstruction, model.decoder(code))
    torch.testing.assert_close(logits, model.classifier(code))
    torch.testing.assert_close(torch.cat([mean, log_variance], 1), model.encoder(x))
    assert len(model(x)) == 2
    logits, reconstruction, mean, log_variance = build("v3")(torch.randn(2, 3, 32, 32), posterior=True)
    assert logits.shape == (2, 10) and mean is None and log_variance is None


@pytest.mark.parametrize("version", ["v4", "v3.1", "mlp", "cnn", "mnist"])
def test_encode_gives_what_the_decoder_reads(version):
    model = build(version).eval()
    x = torch.randn(2, *model.version.in_shape)
    code = model.encode(x)
    assert code.shape == (2, *model.code_shape) and not model.variational
    torch.testing.assert_close(model.decoder(code), model(x)[1])


@pytest.mark.parametrize("version, changes", [("v4", {"skip": True}), ("vae", {}), ("cnn", {}), ("mnist", {})])
@simulated_cuda
def test_nothing_waits_for_the_device(version, changes):
    """Fake tensors have no values: reading one, as a synchronisation does, is an error."""
    with FakeTensorMode(), torch.device("cuda"):
        model = build(version, **changes)
        reconstruction = model(torch.zeros(4, *model.version.in_shape), posterior=True)[1]
    assert reconstruction.device.type == "cuda" and reconstruction.shape == (4, *model.version.in_shape)


@pytest.mark.parametrize("channels, out, h, w", [(5, 7, 4, 4), (3, 32, 7, 9), (8, 2, 1, 1)])
def test_a_conv_of_the_whole_map_and_its_mirror_are_pytorchs(channels, out, h, w):
    torch.manual_seed(0)
    pairs = [(models.WholeMapConv2d(channels, out, (h, w)), nn.Conv2d(channels, out, (h, w)),
              (3, channels, h, w)),
             (models.ConvTranspose2d(out, channels, (h, w)), nn.ConvTranspose2d(out, channels, (h, w)),
              (3, out, 1, 1))]
    for ours, plain, shape in pairs:
        plain.load_state_dict(ours.state_dict())
        x = torch.randn(shape)
        a, b = ours(x), plain(x)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        target = torch.randn(b.shape)
        for made, layer in ((a, ours), (b, plain)):
            (made * target).sum().backward()
        torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-4)


def test_multiply_adds_by_hand():
    rows = models.trace(build(Version("C(4)", "L'(10)"), (3, 8, 8)))
    adds = {(part, layer): n for part, layer, _, _, n in rows}
    assert adds["encoder", "Conv2d"] == 8 * 8 * 4 * 3 * 9
    assert adds["classifier", "Linear"] == 4 * 4 * 4 * 10
    assert adds["decoder", "ConvTranspose2d"] == 4 * 4 * 4 * 3 * 2 * 2
    rows = models.trace(build(Version("W(30)", decoder=None), (3, 8, 8)))
    assert rows[0][4] == 8 * 8 * 30 * 3 * 2 * 2 and rows[0][3] == 0  # its filters are fixed


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("version, changes", [
    ("v4", {"skip": True}), ("v4-stride2", {"in_shape": (1, 15, 9), "num_classes": 3}), ("vae", {}), ("mnist", {}),
    ("joint5", {"num_classes": 5}), ("cnn", {"decoder": None}), ("v5-small", {}),
    ("squeezenet", {"in_shape": (3, 32, 32), "pretrained": False})])
def test_a_network_is_saved_and_loaded(version, changes, tmp_path):
    model = build(version, **changes)
    models.save(tmp_path / "net.pt", model, epoch=3, rows=[{"loss": 0.5}])
    before = torch.get_rng_state()
    loaded, content = models.load(tmp_path / "net.pt")
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing
    assert loaded.version == model.version and loaded.num_classes == model.num_classes
    assert loaded.code_shape == model.code_shape and loaded.tap == model.tap
    assert content["classes"] == [str(i) for i in range(model.num_classes)]
    assert content["epoch"] == 3 and content["rows"] == [{"loss": 0.5}] and content["kind"] == models.CHECKPOINT
    assert not any(module.training for module in loaded.modules())
    assert all(tensor.device.type == "cpu" for tensor in loaded.state_dict().values())
    for weight in loaded.parameters():
        assert weight.requires_grad
        assert weight.ndim != 4 or weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, *model.version.in_shape)
    for output, expected in zip(loaded(x), model.eval()(x)):
        assert output is expected is None or torch.allclose(output, expected, atol=1e-5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_pretrained_network_is_loaded_without_its_first_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    model = build("squeezenet", (3, 32, 32), pretrained=False)
    model.version = replace(model.version, pretrained=True)
    models.save(tmp_path / "net.pt", model)
    assert torch.equal(models.load(tmp_path / "net.pt")[0].encoder[0].weight, model.encoder[0].weight)


def test_the_example_of_the_docstring(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = [line.strip() for line in models.__doc__.splitlines() if line.startswith("    ")][:5]
    names = vars(models) | {"images": torch.randn(2, 1, 28, 28)}
    exec("\n".join(example), names)
    assert names["logits"].shape == (2, 3) and names["content"]["classes"] == ["bag", "boot", "coat"]
    assert names["code"].shape == (2, *names["model"].code_shape)
    with pytest.raises(ValueError, match="2 names of classes; expected 3"):
        models.save("network.pt", names["model"], classes=["bag", "boot"])


class Payload:
    """A pickle that runs code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def hostile_files(good, ran):
    """Contents of files that are not what they say: {name: bytes, or what torch.save writes}."""
    content, whole, payload = torch.load(good, weights_only=True), good.read_bytes(), Payload(str(ran))
    version, weights, middle = content["version"], content["model"], len(whole) // 2
    one = torch.zeros(1)
    return {
        "empty": b"", "text": b"hello", "cut": whole[:5000], "end-missing": whole[:-100],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) * 64 + whole[middle + 64:],
        "pickle": pickle.dumps(payload), "code": payload, "code-inside": content | {"rows": [payload]},
        "code-in-weights": content | {"model": weights | {"more": payload}},
        "weights-alone": weights, "a-list": [1, 2], "a-tensor": one, "another-kind": content | {"kind": "a program"},
        "other-weights": content | {"model": build("v2").state_dict()}, "no-weights": content | {"model": {}},
        "text-for-weights": content | {"model": "weights"}, "a-list-of-weights": content | {"model": [one]},
        "repeated-weights": content | {"model": {key: one.expand(tensor.shape) for key, tensor in weights.items()}},
        "nan-weights": content | {"model": {key: tensor * float("nan") for key, tensor in weights.items()}},
        "sparse-weights": content | {"model": {key: tensor.to_sparse() for key, tensor in weights.items()}},
        "bad-notation": content | {"version": {"encoder": "C(?)"}},
        "unknown-field": content | {"version": version | {"code\x1b[2J\n": "import os"}},
        "huge": content | {"version": version | {"encoder": "L(999999)", "in_shape": (3, 999, 999)}},
        "overflow": content | {"version": version | {"encoder": "A(1)", "in_shape": (3, 10**12, 10**12)}},
        "negative": content | {"version": version | {"in_shape": (3, -32, 32)}},
        "text-for-shape": content | {"version": version | {"in_shape": "abc"}},
        "a-list-for-encoder": content | {"version": version | {"encoder": ["C(3)"]}},
        "bad-output": content | {"version": version | {"output": "exec"}},
        "text-for-classes": content | {"classes": "0123456789"},
        "numbers-for-classes": content | {"classes": [*range(10)]},
        "other-classes": content | {"classes": ["a", "b"]}, "no-classes": content | {"classes": []},
        "fields-missing": {"kind": models.CHECKPOINT}}


def test_hostile_files_are_refused_in_one_line_and_run_no_code(tmp_path):
    models.save(tmp_path / "good.pt", build("v3"))
    ran = tmp_path / "code-was-run"
    for name, content in hostile_files(tmp_path / "good.pt", ran).items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(CheckpointError) as error:
            models.load(path)
        message = str(error.value)
        assert message.startswith(f"{path}: not a checkpoint of train.py ("), name
        assert message.isprintable() and len(message) < len(str(path)) + 150, name
    assert not ran.exists()


def test_a_compressed_archive_is_refused(tmp_path):
    """torch.save never compresses; a small compressed file could fill the memory."""
    models.save(tmp_path / "good.pt", build("v3"))
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "small.pt", "w") as small:
        for entry in good.infolist():
            small.writestr(entry.filename, good.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="damaged or compressed"):
        models.load(tmp_path / "small.pt")


def test_files_that_are_missing_or_of_another_version(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError) as error:
            models.load(path)
        assert str(error.value) == f"{path}: no such file; expected the best.pt or last.pt of a run"
    path = tmp_path / "old.pt"
    torch.save({"kind": "autoencoder checkpoint, format 1", "settings": {}}, path)
    with pytest.raises(CheckpointError) as error:
        models.load(str(path))
    assert str(error.value) == f"{path}: written by another version of this program; train the network again"


# ---------------------------------------------------------------- the command line

def test_the_tables(capsys):
    assert models.main([]) == 0
    table = capsys.readouterr().out
    assert all(f"\n{name} " in table for name in models.VERSIONS)
    assert f"{3495946:,}" in table  # v1
    assert models.main(["v4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["total", "670,797", "21,497,088"]
    assert models.main(["-h"]) == 0
    assert "python models.py v4" in capsys.readouterr().out


def test_an_encoder_is_printed_with_its_mirror(capsys):
    assert models.main(["C'(16)>C(16)"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["encoder", "Conv2d", "16x32x32", "448", f"{32 * 32 * 16 * 27:,}"] in rows
    assert ["decoder", "ConvTranspose2d", "3x32x32", str(conv(16, 3, 1)), f"{32 * 32 * 16 * 3:,}"] in rows
    assert rows[-1][:2] == ["total", f"{conv(3, 16) + conv(16, 16) + conv(16, 16, 2) + conv(16, 3, 1):,}"]


@pytest.mark.parametrize("argv, expected", [
    (["v9"], "no version 'v9'; did you mean 'v"), (["v1", "v2"], "'v1 v2': expected one version or encoder"),
    (["C(16)>X(3)"], "token 2 'X(3)': expected one of C(n)"), (["T(4)"], "T has no mirror"), ([""], "no version ''")])
def test_a_wrong_command_line_is_answered_in_one_line(argv, expected, capsys):
    assert models.main(argv) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith("models.py: error: ") and expected in error and error.count("\n") == 1
