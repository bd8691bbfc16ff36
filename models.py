"""Autoencoders with classifiers, written in a notation of one line.

    model = build("v4")                           # a version of the table below
    model = build("v4", in_shape=(1, 28, 28), num_classes=10, encoder="C'(16)>C(16)")
    logits, reconstruction = model(images)        # images (B, C, H, W), normalised

Tokens are joined by `>`; where a map meets a linear layer it is flattened.

    token   layers                                               its mirror in the decoder
    C(n)    3x3 conv (padding 1) to n channels, ReLU, max-pool   2x2 transposed conv, stride 2
    C'(n)   3x3 conv (padding 1) to n channels, ReLU             1x1 transposed conv
    S(n)    3x3 conv (padding 1), stride 2, ReLU                 2x2 transposed conv, stride 2
    G(n)    conv whose kernel is the whole map, to n values      transposed conv, same kernel
    L(n)    linear to n, ReLU                                    linear
    L'(n)   linear to n                                          linear
    N(n)    linear to n means and n log-variances; the code is   linear
            drawn from that Gaussian in training, else the mean
    D(p)    dropout with probability p                           nothing
    A(n)    average-pool to an n x n map                         none: for classifiers
    T(n)    2x2 transposed conv, stride 2, ReLU                  none: for written-out decoders
    T'(n)   1x1 transposed conv, ReLU                            none
    U(n)    3x3 transposed conv, stride 2, doubling, ReLU        none

A decoder is its encoder's mirror (every layer backwards, ReLU after each but the last) or is
written out (no ReLU after its last layer). An encoder may also be one of torchvision's networks
(BACKBONES) or one written out below (OWN), by name. `python models.py` prints the table of all
versions, `python models.py v4` one of them layer by layer. This file needs torch, and
torchvision for its networks alone.
"""
import difflib
import math
import re
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Version:
    """A network in the notation. decoder: "mirror", a notation, or None for no decoder."""
    encoder: str  # a notation, or a name of BACKBONES or OWN
    classifier: str | None = None  # its last L'(n) follows the data set's number of classes
    decoder: str | None = "mirror"
    in_shape: tuple = (3, 32, 32)  # the study's input: channels, height, width
    pretrained: bool = False  # a backbone begins with its ImageNet weights
    skip: bool = False  # the study's modified network: lower features join the classifier's
    output: str | None = None  # what ends the decoder: None, "sigmoid" or "tanh"
    he: bool = False  # He et al.'s initialisation (2015), biases 0
    scores: int | None = None  # the classifier's outputs, where they are not the classes


# The networks of the CIFAR study. v4 has dropout after the classifier's first two convs, as
# the study's write-up says; v4-plain has none, v4-stride2 no pooling in the encoder.
V2_DEEP = "C'(32)>C(32)>C'(32)>C(64)>C(64)>L(512)"
V4_DROPOUT = "C'(32)>D(0.3)>C(64)>D(0.3)>C(64)>L(512)>L(128)>L'(10)"
VERSIONS = {
    "v1": Version("L(512)>L(256)>L(128)", "L(128)>L'(10)"),
    "v1.1": Version("L(1024)>L(512)", "L(128)>L'(10)"),
    "v1.2": Version("L(2048)>L(1024)>L(512)", "L(128)>L'(10)"),
    "v2": Version("C(32)>C(32)>C(64)>L(512)", "L(128)>L'(10)"),
    "v2.1": Version("C(32)>C(32)>L(512)", "L(128)>L'(10)"),
    "v2.2": Version(V2_DEEP, "L(128)>L'(10)"),
    "v2.3": Version(V2_DEEP, "L(128)>L'(10)", in_shape=(3, 64, 64)),
    "v3": Version("C(32)>C(32)>C(64)>C(64)", "C'(64)>L'(10)"),
    "v3.1": Version("C(32)>C(32)>C(64)", "C(64)>C'(64)>L'(10)"),
    "v3.2": Version("C'(32)>C(32)>C'(32)>C(32)>C'(64)>C(64)", "C(64)>L'(10)"),
    "v3.3": Version("C'(32)>C(32)", "C'(32)>C(32)>C'(64)>C(64)>C(64)>L'(10)"),
    "v4": Version("C'(32)>C(32)", V4_DROPOUT),
    "v4-plain": Version("C'(32)>C(32)", "C'(32)>C(64)>C(64)>L(512)>L(128)>L'(10)"),
    "v4-stride2": Version("C'(32)>S(32)", V4_DROPOUT),
    # The standard networks, each with its own classifier. SqueezeNet's, a 1x1 conv and an
    # average, stands here in the other order, without the ReLU between.
    "vgg": Version("vgg16", "A(7)>L(4096)>D(0.5)>L(4096)>D(0.5)>L'(10)",
                   "T(512)>T(256)>T(128)>T(64)>T(3)", (3, 224, 224), pretrained=True),
    "resnet": Version("resnet50", "A(1)>L'(10)", "T(1024)>T(512)>T(256)>T(64)>T(3)", (3, 224, 224),
                      pretrained=True),
    "mobilenet": Version("mobilenet_v2", "A(1)>D(0.2)>L'(10)", "T(576)>T(384)>T(192)>T(64)>T(3)",
                         (3, 224, 224), pretrained=True),
    "squeezenet": Version("squeezenet1_1", "A(1)>D(0.5)>L'(10)", "T(384)>T'(256)>T(128)>T(64)>T(3)",
                          (3, 224, 224), pretrained=True),
}
# The joint model of five classes, and the plain CNN it is compared with (six convs; the study
# says no more of it). 251 of its 256 scores belong to no class.
VERSIONS |= {
    "joint5": Version("C(12)>C(24)>C(48)", "A(1)>L'(256)", "U(24)>U(12)>U(3)", output="tanh", he=True,
                      scores=256),
    "cnn6": Version("C'(32)>C(32)>C'(64)>C(64)>C'(128)>C(128)", "L(128)>L'(10)", None, he=True),
}
# Autoencoders of three kinds, of four code sizes and of four depths.
VERSIONS |= {
    "mlp": Version("L(512)>L(128)>L'(32)"), "combo": Version("C(16)>C(32)>L'(32)"),
    "cnn": Version("C(16)>C(32)>G(32)"), "cnn10": Version("C(16)>C(32)>G(10)"),
    "cnn32": Version("C(16)>C(32)>G(32)"), "cnn100": Version("C(16)>C(32)>G(100)"),
    "cnn1000": Version("C(16)>C(32)>G(1000)"), "cnnL1": Version("G(32)"),
    "cnnL3": Version("C(16)>C(32)>G(32)"), "cnnL5": Version("C'(16)>C(16)>C'(32)>C(32)>G(32)"),
    "cnnL10": Version("C'(16)>C'(16)>C(16)>C'(32)>C'(32)>C(32)>C'(64)>C'(64)>C(64)>G(32)"),
}
# The two studies of grey images, and a variational autoencoder (Kingma and Welling 2014). The MNIST
# study's decoder ends in a ReLU, which the library's own initialisation leaves dead for good in
# five of eight seeds; He's does not.
GREY = (1, 28, 28)
VERSIONS |= {
    "mnist": Version("mnist", "L(120)>L'(10)", "mnist", GREY, he=True),
    "fashion-mlp": Version("L(128)>L'(2)", in_shape=GREY, output="sigmoid"),
    "fashion-cnn": Version("C(16)>C(32)", in_shape=GREY, output="sigmoid"),
    "vae": Version("C(32)>C(64)>L(256)>N(32)", in_shape=GREY, output="sigmoid"),
}
# torchvision's networks that can be an encoder: all but their classifier. The number is where
# their lower features, about 56x56 of 224x224 pixels, come out.
BACKBONES = {"vgg16": 10, "resnet50": 5, "mobilenet_v2": 4, "squeezenet1_1": 6}
# Networks that the notation cannot say: (encoder, decoder), each a function that makes it.
OWN = {"mnist": (
    lambda: nn.Sequential(nn.Conv2d(1, 8, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2),             # 8x14x14
                          nn.Conv2d(8, 16, 2, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # 16x4x4
                          nn.Conv2d(16, 3, 1), nn.ReLU()),                                       # 3x4x4
    lambda: nn.Sequential(nn.ConvTranspose2d(3, 16, 3), nn.ReLU(),                               # 16x6x6
                          nn.ConvTranspose2d(16, 8, 3, stride=2), nn.ReLU(),                     # 8x13x13
                          nn.ConvTranspose2d(8, 1, 4, stride=2), nn.ReLU()))}                    # 1x28x28
OUTPUTS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class NotationError(ValueError):
    """A network that cannot be built; the message names the token and what was expected."""


# ---------------------------------------------------------------- layers of our own

class Conv2d(nn.Conv2d):
    """nn.Conv2d whose kernel is the whole map: a matrix product, up to 3 times as fast on the CPU."""

    def forward(self, x):  # (B, C, H, W) -> (B, out, 1, 1)
        if x.device.type != "cpu":
            return super().forward(x)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (out, H * W * C), as channels_last lies
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), weight, self.bias)[:, :, None, None]


class ConvTranspose2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d that is a matrix product on the CPU where its windows do not overlap.

    Of kernel 2x2 and stride 2 each input pixel (C values) becomes a 2x2 block of the output by
    one product with a (C, 4 * out) matrix; about 1.7 times as fast as the library's. A map of
    one pixel becomes one block of the kernel's size, 10 times as fast from 1000 channels.
    """

    def forward(self, x):
        b, c, h, w = x.shape
        if x.device.type == "cpu" and (h, w) == (1, 1) and self.padding == (0, 0):
            weight, pixels = self.weight.permute(2, 3, 1, 0).flatten(0, 2), math.prod(self.kernel_size)
            block = F.linear(x.flatten(1), weight, self.bias.repeat(pixels))  # (B, H * W * out)
            return block.view(b, *self.kernel_size, -1).permute(0, 3, 1, 2)
        if self.kernel_size != (2, 2) or self.stride != (2, 2) or x.device.type != "cpu":
            return super().forward(x)
        weight = self.weight.permute(2, 3, 1, 0).reshape(-1, c)           # (2 * 2 * out, C)
        blocks = F.linear(x.permute(0, 2, 3, 1), weight, self.bias.repeat(4))
        blocks = blocks.view(b, h, w, 2, 2, -1).permute(0, 1, 3, 2, 4, 5)  # B, h, 2, w, 2, out
        return blocks.reshape(b, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)     # channels_last


class Dropout(nn.Dropout):
    """nn.Dropout that cuts every 64-bit draw into four 16-bit ones on the CPU.

    The library draws a number per value, one after another, which took a fifth of v4's step.
    The probability is rounded to a multiple of 1/65536 and the scale follows it exactly.
    """

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        dropped = round(self.p * 65536)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None)
        keep = draws.view(torch.int16)[:x.numel()] >= dropped - 32768
        mask = keep.to(x.dtype).mul_(65536 / (65536 - dropped))
        return x * mask.view(x.movedim(1, -1).shape).movedim(-1, 1)  # channels_last, as x is


class Gaussian(nn.Module):
    """The code of a variational autoencoder (Kingma and Welling 2014): features (B, n) -> code
    (B, units), drawn in training, the mean otherwise. Keeps `mean` and `log_variance` of its last
    batch, for the KL term."""

    def __init__(self, n, units):
        super().__init__()
        self.linear = nn.Linear(n, 2 * units)

    def forward(self, x):
        self.mean, self.log_variance = mean, log_variance = self.linear(x).float().chunk(2, 1)
        return mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean


class Autoencoder(nn.Module):
    """An encoder with a classifier and a decoder on its code; either may be None.

    forward: images (B, C, H, W) -> logits (B, classes), reconstruction (B, C, H, W), each
    None where the part is missing or not asked for.
    """

    def __init__(self, encoder, classifier=None, decoder=None, tap=None):
        """tap: after how many of the encoder's layers its lower features go to a Joined classifier."""
        super().__init__()
        self.encoder, self.classifier, self.decoder, self.tap = encoder, classifier, decoder, tap

    def forward(self, x, classify=True, reconstruct=True):
        lower = x if self.tap is None else self.encoder[:self.tap](x)
        code = self.encoder[self.tap:](lower) if self.tap else self.encoder(x)
        logits = None
        if classify and self.classifier is not None:
            logits = self.classifier(code, lower) if self.tap else self.classifier(code)
        rebuilt = self.decoder(code) if reconstruct and self.decoder is not None else None
        return logits, rebuilt


class Joined(nn.Module):
    """The classifier of the CIFAR study's modified network: the encoder's lower features, through
    one conv, are concatenated with the final features before the last part."""

    def __init__(self, features, lower, last):
        super().__init__()
        self.features, self.lower, self.last = features, lower, last

    def forward(self, code, lower):
        return self.last(torch.cat([self.features(code), self.lower(lower)], 1))


# ---------------------------------------------------------------- from notation to layers

class Token(NamedTuple):
    kind: str      # C, C', S, G, L, L', N, D, A, T, T' or U
    value: float   # channels or units (int), for D the probability
    where: str     # the notation, the token's place and text, for messages


def parse(notation):
    """The tokens of a notation. NotationError names the first one that is wrong."""
    tokens = []
    for place, text in enumerate(str(notation).split(">"), 1):
        where = f"{notation!r}, token {place} {text.strip()!r}"
        match = re.fullmatch(r"\s*(C'?|S|G|L'?|N|D|A|T'?|U)\(\s*([0-9.]+)\s*\)\s*", text)
        if not match:
            raise NotationError(f"{where}: expected one of C(n) C'(n) S(n) G(n) L(n) L'(n) N(n) "
                                "D(p) A(n) T(n) T'(n) U(n), joined by '>'")
        kind, number = match.groups()
        if kind == "D":
            if not re.fullmatch(r"0?\.\d+|0", number):
                raise NotationError(f"{where}: expected a probability from 0 to below 1")
            value = float(number)
        else:
            if not re.fullmatch(r"[1-9]\d{0,5}", number):
                raise NotationError(f"{where}: expected a whole number from 1 to 999999")
            value = int(number)
        tokens.append(Token(kind, value, where))
    return tokens


LARGEST = 500_000_000  # weights of a layer: 2 GB


def _layer(token, shape):
    """The modules of one token on an input of that shape, and the shape that they give."""
    kind, n, where = token
    if kind == "D":
        return [Dropout(n)], shape
    weights = n * (math.prod(shape) if kind in ("L", "L'", "N", "G") else 9 * shape[0])
    if weights > LARGEST:
        raise NotationError(f"{where}: would have {weights:,} weights; expected at most {LARGEST:,}")
    flatten = [nn.Flatten()] if len(shape) == 3 else []
    if kind == "N":
        return flatten + [Gaussian(math.prod(shape), n)], (n,)
    if kind in ("L", "L'"):
        return flatten + [nn.Linear(math.prod(shape), n)] + [nn.ReLU()] * (kind == "L"), (n,)
    if len(shape) != 3:
        raise NotationError(f"{where}: expected a map (channels, height, width), but a linear "
                            f"layer has made it a vector of {shape[0]}")
    c, h, w = shape
    if kind == "C":
        if h < 2 or w < 2:
            raise NotationError(f"{where}: pools a {h}x{w} map to nothing; expected fewer C, or "
                                "larger images (--size)")
        # ReLU after the pool, not before: the same values from a quarter of the work.
        return [nn.Conv2d(c, n, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()], (n, h // 2, w // 2)
    if kind == "C'":
        return [nn.Conv2d(c, n, 3, padding=1), nn.ReLU()], (n, h, w)
    if kind == "S":
        conv = nn.Conv2d(c, n, 3, stride=2, padding=1)
        return [conv, nn.ReLU()], (n, (h + 1) // 2, (w + 1) // 2)
    if kind == "G":
        return [Conv2d(c, n, (h, w))], (n, 1, 1)
    if kind == "A":
        even = h % n == 0 and w % n == 0  # the usual pooling then, which GPUs repeat to the bit
        return [nn.AvgPool2d((h // n, w // n)) if even else nn.AdaptiveAvgPool2d(n)], (c, n, n)
    if kind == "T'":
        return [ConvTranspose2d(c, n, 1), nn.ReLU()], (n, h, w)
    if kind == "U":
        return [nn.ConvTranspose2d(c, n, 3, 2, padding=1, output_padding=1), nn.ReLU()], (n, 2 * h, 2 * w)
    return [ConvTranspose2d(c, n, 2, stride=2), nn.ReLU()], (n, 2 * h, 2 * w)  # T


def _mirrored(token, before, after):
    """The layer that leads from a token's output shape back to its input shape.

    An odd side (7, pooled to 3) comes back whole: its kernel is one wider there, and where
    S rounded up (7 to 4) one pixel of padding takes the surplus off.
    """
    kind = token.kind
    if kind in ("L", "L'", "N"):
        unflatten = [nn.Unflatten(1, before)] if len(before) == 3 else []
        return [nn.Linear(after[0], math.prod(before))] + unflatten
    if kind in ("A", "T", "T'", "U"):
        raise NotationError(f"{token.where}: {kind} has no mirror; write the decoder out, or leave it out")
    channels, odd = (after[0], before[0]), (before[1] % 2, before[2] % 2)
    if kind == "C'":
        return [ConvTranspose2d(*channels, 1)]
    if kind == "G":
        return [ConvTranspose2d(*channels, before[1:])]
    padding = odd if kind == "S" else 0
    return [ConvTranspose2d(*channels, (2 + odd[0], 2 + odd[1]), stride=2, padding=padding)]


def layers(notation, shape):
    """The layers of a notation on inputs of that shape.

    Returns (modules, steps): a list of modules, and for each token (token, shape before, shape
    after, modules so far), where a shape is (channels, height, width) of a map or (n,) of a vector.
    """
    modules, steps = [], []
    for token in parse(notation):
        made, after = _layer(token, shape)
        modules += made
        steps.append((token, shape, after, len(modules)))
        shape = after
    return modules, steps


def mirror(steps):
    """The decoder of an encoder, from the steps that `layers` gave for it."""
    modules = []
    for token, before, after, _ in reversed(steps):
        if token.kind != "D":
            modules += _mirrored(token, before, after) + [nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def joined(notation, shape, lower):
    """The Joined classifier of a notation, for a code and lower features of those shapes."""
    if len(shape) != 3:
        raise NotationError(f"{notation!r}: skip joins maps, but the code is a vector of {shape[0]}; "
                            "expected an encoder of C, C', S, or no --skip")
    tokens, parts = parse(notation), notation.split(">")
    cut = [token.kind in ("A", "L", "L'") for token in tokens].index(True)
    features, steps = layers(">".join(parts[:cut]), shape) if cut else ([], [])
    c, h, w = steps[-1][2] if cut else shape
    n = lower[0]
    conv = [nn.Conv2d(n, n, 3, stride=2, padding=1), nn.AdaptiveMaxPool2d((h, w)), nn.ReLU()]
    last, _ = layers(">".join(parts[cut:]), (c + n, h, w))
    return Joined(*(nn.Sequential(*modules) for modules in (features, conv, last)))


def backbone(name, pretrained):
    """A network of torchvision: (its encoder, an nn.Sequential; its classifier).

    pretrained: its ImageNet weights, from torch's cache or downloaded. NotationError where they
    cannot be had.
    """
    from torchvision.models import get_model, get_model_weights
    net = get_model(name)
    if pretrained:
        weights = get_model_weights(name)["IMAGENET1K_V1"]
        path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(weights.url).path).name)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(20)  # a network that swallows everything is answered, too
        try:
            net.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
        except Exception as error:  # no network, no disk, or a file that is not what its name says
            reason = " ".join(str(error).split())[:80]
            problem, again = ((f"in {path} cannot be read", " anew") if path.exists() else
                              (f"are not in {path} and could not be downloaded", ""))
            raise NotationError(f"{name}: its ImageNet weights {problem} ({reason}); put {weights.url} "
                                f"there{again}, or start it untrained with --no-pretrained") from None
        finally:
            socket.setdefaulttimeout(timeout)
    if name == "resnet50":  # all but the pooling and the linear layer
        return nn.Sequential(*list(net.children())[:-2]), net.fc
    return net.features, net.classifier


def _encoder(version):
    """(the encoder; the steps that `layers` gives, of a network by name the lower and the upper part;
    a backbone's own classifier, else None)."""
    shape, name = version.in_shape, version.encoder
    if name not in BACKBONES and name not in OWN:
        modules, steps = layers(version.encoder, shape)
        return nn.Sequential(*modules), steps, None
    if name in OWN:
        if shape != VERSIONS[name].in_shape:
            raise NotationError(f"{name}: images of {_x(shape)}; expected {_x(VERSIONS[name].in_shape)}")
        encoder, classifier, tap = OWN[name][0](), None, 3  # after its first pool
    else:
        if shape[0] != 3 or min(shape[1:]) < 32:
            raise NotationError(f"{name}: images of {_x(shape)}; expected 3 channels and sides of at least 32 "
                                "(--size)")
        (encoder, classifier), tap = backbone(name, version.pretrained), BACKBONES[name]
    with torch.no_grad():
        lower = encoder.eval()[:tap](torch.zeros(1, *shape))
        code = encoder[tap:](lower)
    lower, code = tuple(lower.shape[1:]), tuple(code.shape[1:])
    return encoder.train(), [(None, shape, lower, tap), (None, lower, code, len(encoder))], classifier


def find(name):
    """The Version of that name; NotationError names the nearest one."""
    if name not in VERSIONS:
        near = difflib.get_close_matches(name, VERSIONS, 1, 0.0)[0]
        raise NotationError(f"no version {name!r}; did you mean {near!r}? There are: "
                            f"{' '.join(VERSIONS)}")
    return VERSIONS[name]


def build(version, in_shape=None, num_classes=10, **changes):
    """A network: an Autoencoder for images of in_shape (channels, height, width).

    version: a name of VERSIONS, or a Version. in_shape: the version's own where None.
    changes: fields of Version to replace, e.g. encoder="C(16)", decoder=None.
    The model carries `model.version` (with its in_shape) and `model.num_classes`, from which
    it can be built again. Raises NotationError (a ValueError) where that cannot be built.
    """
    version = replace(version if isinstance(version, Version) else find(version), **changes)
    version = replace(version, in_shape=tuple(in_shape or version.in_shape))
    encoder, steps, own = _encoder(version)
    code, classifier, decoder = steps[-1][2], None, None
    # The decoder is built last, so that a seed gives the same encoder and classifier with it
    # and without it.
    if version.classifier is not None:
        last = parse(version.classifier)[-1]
        if last.kind != "L'":
            raise NotationError(f"{last.where}: a classifier ends in L'(number of classes)")
        head = version.classifier.rpartition(">")[0]
        notation = f"{head}>L'({version.scores or num_classes})".lstrip(">")
        classifier = (joined(notation, code, steps[0][2]) if version.skip
                      else nn.Sequential(*layers(notation, code)[0]))
        if version.pretrained:  # those linear layers that are a backbone's own (VGG16's first two)
            for ours, theirs in zip(_linears(classifier), _linears(own)):
                if ours.weight.shape == theirs.weight.shape:
                    ours.load_state_dict(theirs.state_dict())
    if version.decoder in OWN:
        decoder = OWN[version.decoder][1]()
    elif version.decoder == "mirror":
        if version.encoder in BACKBONES or version.encoder in OWN:
            raise NotationError(f"{version.encoder}: has no mirror; expected a decoder that is written out")
        decoder = mirror(steps)
    elif version.decoder is not None:
        decoder = written_out(version.decoder, code, version.in_shape)
    if decoder is not None and version.output:
        decoder.append(OUTPUTS[version.output]())
    model = Autoencoder(encoder, classifier, decoder, steps[0][3] if version.skip else None)
    if version.he:
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
    model.version, model.num_classes, model.code_shape = version, num_classes, code
    return model


def _linears(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def written_out(notation, code, in_shape):
    """The decoder of a notation: no ReLU at its end, its picture scaled to the images' size where
    it has another one (SqueezeNet's 13x13 map does not double to 224)."""
    modules, steps = layers(notation, code)
    shape = steps[-1][2]
    if len(shape) != 3 or shape[0] != in_shape[0]:
        raise NotationError(f"{notation!r} ends in {_x(shape)}; expected the images' {in_shape[0]} channels")
    if isinstance(modules[-1], nn.ReLU):
        modules.pop()
    if shape != in_shape:
        modules.append(nn.Upsample(in_shape[1:], mode="bilinear", align_corners=False))
    return nn.Sequential(*modules)


# ---------------------------------------------------------------- the tables

def _x(shape):
    return "x".join(map(str, shape))


def gaussian(model):
    """The Gaussian that ends a variational encoder, else None."""
    return model.encoder[-1] if isinstance(model.encoder[-1], Gaussian) else None


def trace(model):
    """One image through the model: a row (part, layer, output shape, parameters,
    multiply-adds) for each layer, in the order of their work."""
    rows, shape = [], model.version.in_shape

    def note(part, layer, x, y):
        adds = 0
        if isinstance(layer, nn.ConvTranspose2d):  # every input value meets every weight
            adds = x[0, 0].numel() * layer.weight.numel()
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            adds = y[0].numel() * layer.weight[0].numel()
        parameters = sum(p.numel() for p in layer.parameters())
        rows.append((part, type(layer).__name__, tuple(y.shape[1:]), parameters, adds))

    hooks = [layer.register_forward_hook(lambda layer, x, y, part=part: note(part, layer, x[0], y))
             for part in ("encoder", "classifier", "decoder") if getattr(model, part) is not None
             for layer in getattr(model, part).modules() if not list(layer.children())]
    training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape, device=next(model.parameters()).device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return rows


def parameter_count(model):
    return sum(p.numel() for p in model.parameters())


def main(argv):
    if argv[:1] in (["-h"], ["--help"]):
        print("usage: python models.py [VERSION]\n\nPrints every version, or one of them layer by layer.")
        return 0
    if len(argv) > 1:
        print(f"models.py: error: {' '.join(argv)!r}: expected one version, or none for the table of all",
              file=sys.stderr)
        return 2
    if not argv:
        print(f"{'version':<12}{'input':<10}{'code':<10}{'parameters':>12}{'MB':>8}{'M adds':>9}")
        for name in VERSIONS:
            with torch.device("meta"):  # shapes alone: no weights are made or read
                model = build(name, pretrained=False)
            v, rows, count = model.version, trace(model), parameter_count(model)
            print(f"{name:<12}{_x(v.in_shape):<10}{_x(model.code_shape):<10}{count:>12,}{count * 4 / 1e6:>8.1f}"
                  f"{sum(row[4] for row in rows) / 1e6:>9.1f}\n  {v.encoder} | {v.classifier}")
        print("The line below a version: encoder | classifier. MB: its weights in fp32.\n"
              "M adds: millions of multiply-adds per image, decoder included.")
        return 0
    try:
        with torch.device("meta"):
            model = build(argv[0], pretrained=False)
    except NotationError as error:
        print(f"models.py: error: {error}", file=sys.stderr)
        return 2
    v, rows = model.version, trace(model)
    print(f"{argv[0]}: encoder {v.encoder}\n{'':<{len(argv[0])}}  classifier {v.classifier}\n"
          f"{'':<{len(argv[0])}}  decoder {v.decoder}; input {_x(v.in_shape)}")
    print(f"{'part':<12}{'layer':<18}{'output':<12}{'parameters':>12}{'multiply-adds':>16}")
    for part, layer, shape, parameters, adds in rows:
        print(f"{part:<12}{layer:<18}{_x(shape):<12}{parameters:>12,}{adds:>16,}")
    print(f"{'total':<42}{parameter_count(model):>12,}{sum(row[4] for row in rows):>16,}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
