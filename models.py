"""Autoencoders with classifiers, written in a notation of one line.

    model = build("v4", in_shape=(1, 28, 28), num_classes=3, encoder="C'(16)>C(16)")
    logits, reconstruction = model(images)        # images (B, 1, 28, 28), normalised
    save("network.pt", model, classes=["bag", "boot", "coat"])
    model, content = load("network.pt")           # the same network, in eval mode
    code = model.encode(images)                   # what the classifier and the decoder read

Tokens are joined by `>`; where a map meets a linear layer it is flattened.

    token   layers                                               its mirror in the decoder
    C(n)    3x3 conv (padding 1) to n channels, ReLU, max-pool   2x2 transposed conv, stride 2
    C'(n)   3x3 conv (padding 1) to n channels, ReLU             1x1 transposed conv
    S(n)    3x3 conv (padding 1), stride 2, ReLU                 2x2 transposed conv, stride 2
    G(n)    conv whose kernel is the whole map, to n values      transposed conv, same kernel
    L(n)    linear to n, ReLU                                    linear
    L'(n)   linear to n                                          linear
    N(n)    linear to n means and n log-variances, an encoder's  linear
            last; the code is drawn so in training, else the mean
    W(n)    fixed 2x2 conv, ReLU, an encoder's first: `whiten`   nothing
    B(n)    3x3 conv without bias, max-pool, batch norm, ReLU    2x2 transposed conv, stride 2
    B'(n)   the same without the pool                            1x1 conv
    D(p)    dropout with probability p                           nothing
    A(n)    average-pool to an n x n map                         none
    T(n)    2x2 transposed conv, stride 2, ReLU                  none: for written-out decoders
    T'(n)   1x1 transposed conv, ReLU                            none
    U(n)    3x3 transposed conv, stride 2, doubling, ReLU        none
    R(n)    nearest upsampling by 2, 3x3 conv (padding 1), ReLU  none: no checkerboard (Odena et al. 2016)

A decoder is its encoder's mirror (every layer backwards, ReLU after each but the last) or is written out (no
ReLU after its last layer). An encoder may also be one of torchvision's networks (BACKBONES) or one written in
Python (HANDWRITTEN), by name. `python models.py` prints the table of all versions, `python models.py v4` one
layer by layer, `python models.py "C'(16)>C(16)"` any encoder and its mirror; with --code as a plain PyTorch
class. This file needs torch, and torchvision for BACKBONES alone.
"""
import argparse
import difflib
import inspect
import math
import re
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

CHECKPOINT = "autoencoder checkpoint, format 5"


class NotationError(ValueError):
    """A network that cannot be built; the message names the token and what was expected."""


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this program; the message begins with its path."""


@dataclass(frozen=True)
class Version:
    """A network in the notation. decoder: "mirror", a notation, or None for no decoder."""
    encoder: str  # a notation, or a name of BACKBONES or HANDWRITTEN
    classifier: str | None = None  # its last L'(n) follows the data set's number of classes
    decoder: str | None = "mirror"
    in_shape: tuple = (3, 32, 32)  # the study's input: channels, height, width
    pretrained: bool = False  # a backbone begins with its ImageNet weights
    skip: bool = False  # the study's modified network: lower features join the classifier's
    output: str | None = None  # what ends the decoder: None, "sigmoid" or "tanh"
    he: bool = False  # He et al.'s initialisation (2015), biases 0


GREY = (1, 28, 28)
IMAGENET = {"in_shape": (3, 224, 224), "pretrained": True}
V2_DEEP = "C'(32)>C(32)>C'(32)>C(64)>C(64)>L(512)"
V4_DROPOUT = "C'(32)>D(0.3)>C(64)>D(0.3)>C(64)>L(512)>L(128)>L'(10)"
VERSIONS = {
    # The networks of the CIFAR study. v4 has dropout after the classifier's first two convs, as the study's
    # write-up says; v4-plain has none, v4-stride2 no pooling in the encoder.
    "v1": Version("L(512)>L(256)>L(128)", "L(128)>L'(10)"),
    "v1.1": Version("L(1024)>L(512)", "L(128)>L'(10)"),
    "v1.2": Version("L(2048)>L(1024)>L(512)", "L(128)>L'(10)"),
    "v2": Version("C(32)>C(32)>C(64)>L(512)", "L(128)>L'(10)"),
    "v2.1": Version("C(32)>C(32)>L(512)", "L(128)>L'(10)"), "v2.2": Version(V2_DEEP, "L(128)>L'(10)"),
    "v2.3": Version(V2_DEEP, "L(128)>L'(10)", in_shape=(3, 64, 64)),
    "v3": Version("C(32)>C(32)>C(64)>C(64)", "C'(64)>L'(10)"),
    "v3.1": Version("C(32)>C(32)>C(64)", "C(64)>C'(64)>L'(10)"),
    "v3.2": Version("C'(32)>C(32)>C'(32)>C(32)>C'(64)>C(64)", "C(64)>L'(10)"),
    "v3.3": Version("C'(32)>C(32)", "C'(32)>C(32)>C'(64)>C(64)>C(64)>L'(10)"),
    "v4": Version("C'(32)>C(32)", V4_DROPOUT),
    "v4-plain": Version("C'(32)>C(32)", "C'(32)>C(64)>C(64)>L(512)>L(128)>L'(10)"),
    "v4-stride2": Version("C'(32)>S(32)", V4_DROPOUT),
    # The same idea with more recent methods, after Jordan's airbench (2024).
    "v5-small": Version("W(32)>B(32)>B'(32)", "B(128)>B'(128)>B(128)>B'(128)>A(1)>L'(10)"),
    "v5": Version("W(32)>B(64)>B'(64)", "B(256)>B'(256)>B(256)>B'(256)>A(1)>L'(10)"),
    "v5-large": Version("W(32)>B(128)>B'(128)", "B(384)>B'(384)>B(384)>B'(384)>A(1)>L'(10)"),
    # The standard networks, each with its own classifier. SqueezeNet's conv follows the average here.
    "vgg": Version("vgg16", "A(7)>L(4096)>D(0.5)>L(4096)>D(0.5)>L'(10)", "T(512)>T(256)>T(128)>T(64)>T(3)",
                   **IMAGENET),
    "resnet": Version("resnet50", "A(1)>L'(10)", "T(1024)>T(512)>T(256)>T(64)>T(3)", **IMAGENET),
    "mobilenet": Version("mobilenet_v2", "A(1)>D(0.2)>L'(10)", "T(576)>T(384)>T(192)>T(64)>T(3)", **IMAGENET),
    "squeezenet": Version("squeezenet1_1", "A(1)>D(0.5)>L'(10)", "T(384)>T'(256)>T(128)>T(64)>T(3)",
                          **IMAGENET),
    # The joint model of five classes, and the plain CNN it is compared with (six convs, no more is said).
    "joint5": Version("C(12)>C(24)>C(48)", "A(1)>L'(10)", "U(24)>U(12)>U(3)", output="tanh", he=True),
    "cnn6": Version("C'(32)>C(32)>C'(64)>C(64)>C'(128)>C(128)", "L(128)>L'(10)", None, he=True),
    # Autoencoders of three kinds, of four code sizes and of four depths.
    "mlp": Version("L(512)>L(128)>L'(32)"), "combo": Version("C(16)>C(32)>L'(32)"),
    "cnn": Version("C(16)>C(32)>G(32)"), "cnn10": Version("C(16)>C(32)>G(10)"),
    "cnn32": Version("C(16)>C(32)>G(32)"), "cnn100": Version("C(16)>C(32)>G(100)"),
    "cnn1000": Version("C(16)>C(32)>G(1000)"), "cnnL1": Version("G(32)"),
    "cnnL3": Version("C(16)>C(32)>G(32)"), "cnnL5": Version("C'(16)>C(16)>C'(32)>C(32)>G(32)"),
    "cnnL10": Version("C'(16)>C'(16)>C(16)>C'(32)>C'(32)>C(32)>C'(64)>C'(64)>C(64)>G(32)"),
    # The studies of grey images (mnist's last ReLU is dead without He's), and a variational autoencoder.
    "mnist": Version("mnist", "L(120)>L'(10)", "mnist", GREY, he=True),
    "fashion-mlp": Version("L(128)>L'(2)", in_shape=GREY, output="sigmoid"),
    "fashion-cnn": Version("C(16)>C(32)", in_shape=GREY, output="sigmoid"),
    "vae": Version("C(32)>C(64)>L(256)>N(32)", in_shape=GREY, output="sigmoid"),
}
OUTPUTS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
# torchvision's networks that can be an encoder, and their tap: where maps are about 56x56 of 224x224 pixels.
BACKBONES = {"vgg16": 10, "resnet50": 5, "mobilenet_v2": 4, "squeezenet1_1": 6}
# Autoencoders that the notation cannot express: their tap, and what makes their encoder and their decoder.
HANDWRITTEN = {"mnist": (3,
    lambda: nn.Sequential(nn.Conv2d(1, 8, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2),             # 8x14x14
                          nn.Conv2d(8, 16, 2, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # 16x4x4
                          nn.Conv2d(16, 3, 1), nn.ReLU()),                                       # 3x4x4
    lambda: nn.Sequential(nn.ConvTranspose2d(3, 16, 3), nn.ReLU(),                               # 16x6x6
                          nn.ConvTranspose2d(16, 8, 3, stride=2), nn.ReLU(),                     # 8x13x13
                          nn.ConvTranspose2d(8, 1, 4, stride=2), nn.ReLU()))}                    # 1x28x28


# ---------------------------------------------------------------- layers and the model

class WholeMapConv2d(nn.Conv2d):
    """nn.Conv2d whose kernel is the whole map: a matrix product, up to 3 times as fast on the CPU."""

    def forward(self, x):  # (B, C, H, W) -> (B, out, 1, 1)
        if x.device.type != "cpu":
            return super().forward(x)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (out, H * W * C), in channels_last order
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), weight, self.bias)[:, :, None, None]


class ConvTranspose2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d that is a matrix product on the CPU where its windows do not overlap. With a 2x2
    kernel and stride 2 each pixel (C values) becomes a 2x2 block: 1.7 times as fast as PyTorch's. A map of
    one pixel becomes one block of the kernel's size: 10 times as fast from 1000 channels."""

    def forward(self, x):
        (b, c, h, w), (kh, kw) = x.shape, self.kernel_size
        apart = self.kernel_size == self.stride == (2, 2) or (h, w) == (1, 1) and self.padding == (0, 0)
        if x.device.type != "cpu" or not apart:
            return super().forward(x)
        weight = self.weight.permute(2, 3, 1, 0).reshape(-1, c)  # (kh * kw * out, C)
        blocks = F.linear(x.permute(0, 2, 3, 1), weight, self.bias.repeat(kh * kw))
        blocks = blocks.view(b, h, w, kh, kw, -1).permute(0, 1, 3, 2, 4, 5)   # B, h, kh, w, kw, out
        return blocks.reshape(b, h * kh, w * kw, -1).permute(0, 3, 1, 2)      # channels_last


class WhiteningConv2d(nn.Module):
    """A fixed 2x2 convolution with a row and a column of repeated border; its filters are random at first."""

    def __init__(self, channels, n):
        super().__init__()
        self.register_buffer("weight", nn.Conv2d(channels, n, 2).weight.detach().clone())

    def forward(self, x):  # (B, C, H, W) -> (B, n, H, W)
        return F.conv2d(F.pad(x, (1, 0, 1, 0), "replicate"), self.weight)


@torch.no_grad()
def whiten(model, images):
    """Sets the first filters (8 for grey images, 24 for coloured ones) of an encoder that begins with W(n) by
    normalised images (N, C, H, W): the eigenvectors of the second moments of their 2x2 patches, each divided
    by sqrt(eigenvalue + 5e-4), then their negatives. The others stay random (Jordan's airbench, 2024)."""
    layer, c = model.encoder[0], images.shape[1]
    patches = F.unfold(F.pad(images, (1, 0, 1, 0), "replicate"), 2).unflatten(1, (c, 4))
    rows = patches.permute(0, 3, 2, 1).flatten(2).flatten(0, 1).double()  # (N * H * W, 2 * 2 * C)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    filters = (vectors / (values.clamp(min=0) + 5e-4).sqrt()).T.flip(0)  # the largest variance first
    filters = torch.cat([filters, -filters])[:len(layer.weight)].view(-1, 2, 2, c).permute(0, 3, 1, 2)
    layer.weight[:len(filters)] = filters


class Dropout(nn.Dropout):
    """nn.Dropout that cuts every 64-bit draw into four 16-bit ones on the CPU: PyTorch's, a draw per value
    one by one, took a fifth of v4's step. The probability is rounded to a multiple of 1/65536, and the scale
    follows it exactly."""

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        dropped = round(self.p * 65536)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None)
        keep = draws.view(torch.int16)[:x.numel()] >= dropped - 32768
        mask = keep.to(x.dtype).mul_(65536 / (65536 - dropped))
        return x * mask.view(x.movedim(1, -1).shape).movedim(-1, 1)  # channels_last, as x is


def he(layer):
    """He et al.'s initialisation (2015), biases 0, of a layer; for a network: `network.apply(he)`."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.kaiming_normal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class Autoencoder(nn.Module):
    """An encoder with a classifier and a decoder on its code; either may be None. tap: after how many modules
    the encoder's lower features join the classifier of the CIFAR study's modified network: `features` of the
    code and `lower` of them are concatenated for `last`, its parts. variational: the encoder gives the means
    and log-variances of its code (Kingma and Welling 2014)."""

    def __init__(self, encoder, classifier=None, decoder=None, tap=None, variational=False):
        super().__init__()
        self.encoder, self.classifier, self.decoder = encoder, classifier, decoder
        self.tap, self.variational = tap, variational

    def forward(self, x, classify=True, reconstruct=True, posterior=False):
        """Images (B, C, H, W) -> logits (B, classes), reconstruction (B, C, H, W), None where missing or not
        asked for; with posterior=True also mean and log_variance (B, n), None unless variational."""
        lower = self.encoder[:self.tap](x) if self.tap else None
        code, mean, log_variance = self._code(self.encoder[self.tap:](lower) if self.tap else self.encoder(x))
        logits = reconstruction = None
        if classify and self.tap:
            parts = self.classifier
            logits = parts.last(torch.cat([parts.features(code), parts.lower(lower)], 1))
        elif classify and self.classifier is not None:
            logits = self.classifier(code)
        if reconstruct and self.decoder is not None:
            reconstruction = self.decoder(code)
        return (logits, reconstruction, mean, log_variance) if posterior else (logits, reconstruction)

    def encode(self, x):
        """Images (B, C, H, W) -> the code (B, ...) that the classifier and the decoder read; if variational,
        drawn in training, else its mean."""
        return self._code(self.encoder(x))[0]

    def _code(self, features):
        if not self.variational:
            return features, None, None
        mean, log_variance = features.float().chunk(2, 1)  # float32 under autocast, too
        # The encoder's mode, not the model's: a frozen encoder is in eval mode while the classifier trains.
        drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.encoder.training else mean
        return drawn, mean, log_variance


# ---------------------------------------------------------------- from notation to network

class Kind(NamedTuple):
    """What a kind of token stands for; a shape is (channels, height, width) or, of a vector, (features,)."""
    layers: Callable  # (the token's number, *shape) -> (modules, the shape that they give)
    mirror: Callable | None = None  # (before, after) -> modules from the shape `after` back to `before`
    reads: str = "map"  # "map", "vector" (a map is flattened) or "either"


def _linear(before, after):
    return [nn.Linear(after[0], math.prod(before))] + ([nn.Unflatten(1, before)] if len(before) == 3 else [])


def _doubling(before, after):
    # Odd sides need a kernel one wider (7, pooled to 3), or a padding of one where S rounded up (7 to 4).
    kernel = tuple(2 + side % 2 for side in before[1:])
    padding = tuple(half - side // 2 for side, half in zip(before[1:], after[1:]))
    return [ConvTranspose2d(after[0], before[0], kernel, stride=2, padding=padding)]


def _conv(c, n, **more):
    return nn.Conv2d(c, n, 3, padding=1, **more)


def _pool(before, after, plain, adaptive):
    """A pooling between two (height, width): plain where the sizes divide, as the adaptive one has no
    deterministic backward on CUDA."""
    if before[0] % after[0] == 0 and before[1] % after[1] == 0:
        return plain((before[0] // after[0], before[1] // after[1]))
    return adaptive(after)


KINDS = {
    # ReLU after the pool, not before: the same values from a quarter of the work.
    "C": Kind(lambda n, c, h, w: ([_conv(c, n), nn.MaxPool2d(2), nn.ReLU()], (n, h // 2, w // 2)), _doubling),
    "C'": Kind(lambda n, c, h, w: ([_conv(c, n), nn.ReLU()], (n, h, w)),
               lambda before, after: [ConvTranspose2d(after[0], before[0], 1)]),
    "S": Kind(lambda n, c, h, w: ([_conv(c, n, stride=2), nn.ReLU()], (n, (h + 1) // 2, (w + 1) // 2)),
              _doubling),
    "G": Kind(lambda n, c, h, w: ([WholeMapConv2d(c, n, (h, w))], (n, 1, 1)),
              lambda before, after: [ConvTranspose2d(after[0], before[0], before[1:])]),
    "L": Kind(lambda n, features: ([nn.Linear(features, n), nn.ReLU()], (n,)), _linear, "vector"),
    "L'": Kind(lambda n, features: ([nn.Linear(features, n)], (n,)), _linear, "vector"),
    "N": Kind(lambda n, features: ([nn.Linear(features, 2 * n)], (n,)), _linear, "vector"),  # n: the code
    "W": Kind(lambda n, c, h, w: ([WhiteningConv2d(c, n), nn.ReLU()], (n, h, w))),
    # A momentum with which its statistics for evaluation follow in a few steps: all that a run may have.
    "B": Kind(lambda n, c, h, w: ([_conv(c, n, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(n, momentum=0.4),
                                   nn.ReLU()], (n, h // 2, w // 2)), _doubling),
    "B'": Kind(lambda n, c, h, w: ([_conv(c, n, bias=False), nn.BatchNorm2d(n, momentum=0.4), nn.ReLU()],
                                   (n, h, w)),
               lambda before, after: [nn.Conv2d(after[0], before[0], 1)]),  # faster than a transposed one
    "D": Kind(lambda p, *shape: ([Dropout(p)], shape), reads="either"),
    "A": Kind(lambda n, c, h, w: ([_pool((h, w), (n, n), nn.AvgPool2d, nn.AdaptiveAvgPool2d)], (c, n, n))),
    "T": Kind(lambda n, c, h, w: ([ConvTranspose2d(c, n, 2, stride=2), nn.ReLU()], (n, 2 * h, 2 * w))),
    "T'": Kind(lambda n, c, h, w: ([ConvTranspose2d(c, n, 1), nn.ReLU()], (n, h, w))),
    "U": Kind(lambda n, c, h, w: ([nn.ConvTranspose2d(c, n, 3, 2, padding=1, output_padding=1), nn.ReLU()],
                                  (n, 2 * h, 2 * w))),
    "R": Kind(lambda n, c, h, w: ([nn.Upsample(scale_factor=2), _conv(c, n), nn.ReLU()], (n, 2 * h, 2 * w))),
}


class Token(NamedTuple):
    kind: str      # a key of KINDS
    value: float   # channels or units (int), for D the probability
    where: str     # the notation, the token's place and text, for messages
    before: tuple = None  # from `layers`: the shape that its modules read,
    after: tuple = None   # the shape that they give,
    end: int = None       # and how many modules the notation has made after them


def parse(notation):
    """The Tokens of a notation. NotationError names the first one that is wrong."""
    tokens = []
    for place, text in enumerate(str(notation).split(">"), 1):
        where = f"{notation!r}, token {place} {text.strip()!r}"
        match = re.fullmatch(r"\s*([A-Z]'?)\(\s*([0-9.]+)\s*\)\s*", text)
        if not match or match[1] not in KINDS:
            expected = " ".join(f"{kind}({'p' if kind == 'D' else 'n'})" for kind in KINDS)
            raise NotationError(f"{where}: expected one of {expected}, joined by '>'")
        kind, number = match.groups()
        if tokens and (kind == "W" or tokens[-1].kind == "N"):
            raise NotationError(f"{where}: W(n) begins an encoder, N(n) ends one, and nothing else")
        if kind == "D" and not re.fullmatch(r"0?\.\d{1,4}|0", number):
            raise NotationError(f"{where}: expected a probability below 1, with at most four decimals")
        if kind != "D" and not re.fullmatch(r"[1-9]\d{0,5}", number):
            raise NotationError(f"{where}: expected a whole number from 1 to 999999")
        tokens.append(Token(kind, float(number) if kind == "D" else int(number), where))
    return tokens


def layers(notation, shape):
    """(modules, Tokens with their shapes) of a notation or of its Tokens, for inputs of that shape:
    (channels, height, width) or (features,). Raises NotationError."""
    modules, tokens = [], []
    for token in notation if isinstance(notation, list) else parse(notation):
        kind = KINDS[token.kind]
        if kind.reads == "map" and len(shape) != 3:
            raise NotationError(f"{token.where}: expected a map before it, not a vector of {shape[0]}")
        reads = (math.prod(shape),) if kind.reads == "vector" else shape
        new, after = kind.layers(token.value, *reads)
        if 0 in after:
            raise NotationError(f"{token.where}: cannot pool a map of {_text(shape[1:])} (--size)")
        modules += new if reads == shape else [nn.Flatten(), *new]
        tokens.append(token._replace(before=shape, after=after, end=len(modules)))
        shape = after
    return modules, tokens


def mirror(tokens, encoder):
    """The decoder of an encoder, from its Tokens: backwards, ReLU after each layer but the last."""
    modules, mirrored = [], [token for token in tokens if token.kind not in ("W", "D")]
    if not mirrored or any(KINDS[token.kind].mirror is None for token in mirrored):
        raise NotationError(f"{encoder}: has no mirror; write the decoder out (--decoder), or --no-decoder")
    mirrored[0] = mirrored[0]._replace(before=tokens[0].before)  # not what W makes of the image
    for token in reversed(mirrored):
        modules += [*KINDS[token.kind].mirror(token.before, token.after), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def find(name):
    """The Version of that name; NotationError names the closest one."""
    if name not in VERSIONS:
        closest = difflib.get_close_matches(name, VERSIONS, 1, 0.0)[0]
        raise NotationError(f"no version {name!r}; did you mean {closest!r}? There are: {' '.join(VERSIONS)}")
    return VERSIONS[name]


def build(version, in_shape=None, num_classes=10, **changes):
    """A network: an Autoencoder for images of in_shape (channels, height, width). Where its encoder begins
    with W(n) (v5), call `whiten(model, images)` before training: until then those filters are random.

    version: a name of VERSIONS, or a Version. in_shape: the version's own where None. changes: fields of
    Version to replace, e.g. encoder="C(16)", decoder=None. The model carries `model.version`,
    `model.num_classes` and `model.code_shape`. Raises NotationError.
    """
    version = replace(find(version) if isinstance(version, str) else version, **changes)
    version = replace(version, in_shape=tuple(in_shape or version.in_shape))
    shape, name = version.in_shape, version.encoder
    if len(shape) != 3:
        raise NotationError(f"images of {_text(shape)}: expected channels, height and width")
    encoder, tokens, tap, head = _encoder(version)
    code_shape = tokens[-1].after if tokens else _output_shape(encoder, shape, name)
    classifier = decoder = None
    # The decoder is built last: a seed gives the same encoder and classifier with it and without it.
    if version.classifier is not None:
        last = rf"L'({num_classes})"
        version = replace(version, classifier=re.sub(r"L'\(\s*\d+\s*\)\s*$", last, version.classifier))
        lower_shape = _output_shape(encoder[:tap], shape, name) if version.skip else None
        classifier = _classifier(version.classifier, code_shape, lower_shape)
        if head:  # a pretrained backbone's own linear layers, where the shapes agree (VGG16's first two)
            linears = ([m for m in part.modules() if isinstance(m, nn.Linear)] for part in (head, classifier))
            for source, target in zip(*linears):
                if source.weight.shape == target.weight.shape:
                    target.load_state_dict(source.state_dict())
    if version.decoder is not None:
        decoder = _decoder(version, code_shape, tokens)
    model = Autoencoder(encoder, classifier, decoder, tap if version.skip and version.classifier else None,
                        bool(tokens) and tokens[-1].kind == "N")
    if version.he:
        model.apply(he)
    model.version, model.num_classes, model.code_shape = version, num_classes, code_shape
    return model


def _encoder(version):
    """(a version's encoder, an nn.Sequential; its Tokens, none of a network by name; its tap; a pretrained
    network's own classifier, else None)."""
    name = version.encoder
    if name in HANDWRITTEN:
        tap, encoder, _ = HANDWRITTEN[name]
        return encoder(), [], tap, None
    if name not in BACKBONES:
        modules, tokens = layers(name, version.in_shape)
        return nn.Sequential(*modules), tokens, tokens[0].end, None
    from torchvision.models import get_model, get_model_weights
    net = get_model(name)
    if version.pretrained:
        weights = get_model_weights(name)["IMAGENET1K_V1"]
        try:
            net.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
        except Exception as error:  # no network, no disk, or a file that is not what its name says
            reason, cache = " ".join(str(error).split())[:80], Path(torch.hub.get_dir(), "checkpoints")
            raise NotationError(f"{name}: its ImageNet weights cannot be read from {cache} or downloaded "
                                f"({reason}); put {weights.url} there, or add --no-pretrained") from None
    children = list(net.children())  # of ResNet50 all but the pooling and the linear layer
    encoder, head = nn.Sequential(*children[:-2]) if name == "resnet50" else net.features, children[-1]
    return encoder, [], BACKBONES[name], head if version.pretrained else None


def _output_shape(module, shape, name):
    """The shape that a module gives for inputs of that shape; NotationError if it cannot."""
    try:
        with torch.no_grad():
            output = module.eval()(torch.zeros(1, *shape))
    except RuntimeError as error:
        raise NotationError(f"{name}: does not read {_text(shape)} ({str(error):.100})") from None
    module.train()
    return tuple(output.shape[1:])


def _classifier(notation, shape, lower_shape):
    """The classifier of a notation for a code of that shape; with a shape of lower features the joined one,
    which they enter before its first A, L or L'."""
    tokens = parse(notation)
    if tokens[-1].kind != "L'":
        raise NotationError(f"{tokens[-1].where}: a classifier ends in L'(number of classes)")
    if len(shape) != 3 and KINDS[tokens[0].kind].reads == "map":
        raise NotationError(f"{tokens[0].where}: the code is a vector of {shape[0]}, not a map; expected "
                            "another classifier, such as \"L'(10)\", or another encoder")
    if lower_shape is None:
        return nn.Sequential(*layers(tokens, shape)[0])
    if len(shape) != 3:
        raise NotationError(f"skip joins maps, but the code is a vector of {shape[0]}; leave --skip out")
    cut = [token.kind in ("A", "L", "L'") for token in tokens].index(True)
    features, before = layers(tokens[:cut], shape)
    channels, *size = before[-1].after if before else shape
    n, *lower_size = lower_shape
    pool = _pool([(side + 1) // 2 for side in lower_size], size, nn.MaxPool2d, nn.AdaptiveMaxPool2d)
    lower = nn.Sequential(_conv(n, n, stride=2), pool, nn.ReLU())
    last = nn.Sequential(*layers(tokens[cut:], (channels + n, *size))[0])
    return nn.ModuleDict({"features": nn.Sequential(*features), "lower": lower, "last": last})


def _decoder(version, code_shape, tokens):
    """A version's decoder, an nn.Sequential. tokens: the encoder's, if any. One that is written out has no
    ReLU at its end; its picture is scaled to the images' size (SqueezeNet's 13x13 does not double to 224)."""
    notation, shape = version.decoder, version.in_shape
    if notation == "mirror":
        decoder = mirror(tokens, version.encoder)
    elif notation in HANDWRITTEN:
        decoder = HANDWRITTEN[notation][2]()
        shape = _output_shape(decoder, code_shape, f"decoder {notation!r}")
    else:
        modules, written = layers(notation, code_shape)
        decoder = nn.Sequential(*modules[:-1] if isinstance(modules[-1], nn.ReLU) else modules)
        shape = written[-1].after
    if len(shape) != 3 or shape[0] != version.in_shape[0]:
        raise NotationError(f"{notation!r} ends in {_text(shape)}; expected {version.in_shape[0]} channels")
    if shape != version.in_shape:
        decoder.append(nn.Upsample(version.in_shape[1:], mode="bilinear", align_corners=False))
    if version.output:
        decoder.append(OUTPUTS[version.output]())
    return decoder


def _on_meta(version, num_classes=10):
    """A version's network on the meta device: no memory, no random numbers, no download."""
    with torch.device("meta"):
        return build(version, num_classes=num_classes, pretrained=False)


# ---------------------------------------------------------------- checkpoints

def save(path, model, classes=None, **more):
    """Writes a network with its notation to a file that `load` reads.

    classes: their names; "0", "1", ... where None. more: tensors and plain values. Raises ValueError, before
    it writes, for what `load` would not give back. An interrupted call leaves a part of a file.
    """
    classes = [str(i) for i in range(model.num_classes)] if classes is None else list(classes)
    if len(classes) != model.num_classes or {type(name) for name in classes} != {str}:
        raise ValueError(f"classes {str(classes):.60}; expected {model.num_classes} names, each a str")

    pair = model, _on_meta(model.version, model.num_classes)
    shapes = [{name: tensor.shape for name, tensor in network.state_dict().items()} for network in pair]
    if str(pair[0]) != str(pair[1]) or shapes[0] != shapes[1]:
        raise ValueError("the network is not what its notation makes; a changed or compiled one is kept by "
                         "torch.save(model.state_dict(), path)")
    for key, value in more.items():
        for leaf in _leaves(value):
            if type(leaf) not in (torch.Tensor, nn.Parameter, str, int, float, bool, type(None)):
                raise ValueError(f"{key}: {str(leaf):.40} is a {type(leaf).__name__}; expected a plain value")
    torch.save(dict(kind=CHECKPOINT, version=asdict(model.version), classes=classes, model=model.state_dict(),
                    **more), path)


def _leaves(value):
    """What nested dicts, lists and tuples hold, the dicts' keys included."""
    if type(value) in (dict, OrderedDict):
        value = [*value, *value.values()]
    return [leaf for each in value for leaf in _leaves(each)] if type(value) in (list, tuple) else [value]


def load(path):
    """(the model, in eval mode and channels_last; the dict that `save` wrote), both on the CPU. Runs no code
    from the file. Raises CheckpointError where it is not a whole checkpoint."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not compare checksums
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["kind"] == CHECKPOINT:
            model = _on_meta(Version(**content["version"]), len(content["classes"]))
            model.load_state_dict(content["model"], assign=True)
            return model.eval().to(memory_format=torch.channels_last), content
    except Exception as error:  # a damaged file can fail anywhere
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(f"{path}: no whole checkpoint of train.py ({reason})") from None
    raise CheckpointError(f"{path}: written by another version of this program; train the network again")


# ---------------------------------------------------------------- tables and code

def _text(shape):
    return "x".join(map(str, shape))


def parameter_count(module):
    """The number of parameters of a model or of any module."""
    return sum(p.numel() for p in module.parameters())


def trace(model):
    """A row (part, layer, output shape, parameters, multiply-adds per image) for each layer as they work."""
    from torch.utils.flop_counter import FlopCounterMode
    rows, training = [], model.training
    part = {layer: name.split(".")[0] for name, layer in model.named_modules() if not list(layer.children())}

    def note(layer, x, y):
        if layer in part:
            adds = counter.get_total_flops() // 2 - sum(row[4] for row in rows)  # two flops each
            rows.append((part[layer], type(layer).__name__, tuple(y.shape[1:]), parameter_count(layer), adds))

    image = torch.zeros(1, *model.version.in_shape, device=next(model.parameters(), torch.empty(0)).device)
    hook = nn.modules.module.register_module_forward_hook(note)
    with torch.no_grad(), hook, FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(training)
    return rows


def print_versions():
    print(f"{'version':<12}{'input':<10}{'code':<10}{'parameters':>12}{'MB':>8}{'M mult-adds':>13}")
    for name, version in VERSIONS.items():
        model = _on_meta(version)
        count, adds = parameter_count(model), sum(row[4] for row in trace(model))
        print(f"{name:<12}{_text(version.in_shape):<10}{_text(model.code_shape):<10}{count:>12,}"
              f"{count * 4 / 1e6:>8.1f}{adds / 1e6:>13.1f}\n"
              f"  {version.encoder} | {version.classifier or 'no classifier'}")
    print("Below a version: encoder | classifier. MB: its weights in fp32. M mult-adds: millions per image.")


def print_layers(model):
    version, rows = model.version, trace(model)
    print(f"encoder {version.encoder}\nclassifier {version.classifier}\ndecoder {version.decoder}\n"
          f"input {_text(version.in_shape)}\n\n"
          f"{'part':<12}{'layer':<18}{'output':<12}{'parameters':>12}{'multiply-adds':>16}")
    for part, layer, shape, parameters, adds in rows:
        print(f"{part:<12}{layer:<18}{_text(shape):<12}{parameters:>12,}{adds:>16,}")
    print(f"{'total':<42}{parameter_count(model):>12,}{sum(row[4] for row in rows):>16,}")


def print_code(model, name):
    """A network as a plain PyTorch class, named after a version, whose weights have the same names."""
    version, parts, body = model.version, dict(model.named_children()), []
    if version.encoder in BACKBONES:
        raise NotationError(f"{version.encoder}: is torchvision's code; expected a network in the notation")
    shapes = (_text(row[2]) for row in trace(model))
    for part, sequence in parts.items():
        calls = [_call(layer) for layer in sequence]
        if part == "classifier":
            calls[-1] = re.sub(r"out_features=\d+", "out_features=num_classes", calls[-1])
        rows = [f"            {call + ',':<{max(map(len, calls)) + 1}}  # {next(shapes)}\n" for call in calls]
        body += [f"        self.{part} = nn.Sequential(\n", *rows, "        )\n"]
    body += ["        self.apply(he)\n"] * version.he
    code = "code = self.encoder(x)"
    outputs = ", ".join(f"self.{part}(code)" if part in parts else "None"
                        for part in ("classifier", "decoder"))
    if model.variational:
        code = """mean, log_variance = self.encoder(x).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean"""
        outputs += ", mean, log_variance"
    whitens = version.encoder.startswith("W")
    print("import torch\n" + "import torch.nn.functional as F\n" * whitens + "from torch import nn\n\n")
    for helper in [he] * version.he + [WhiteningConv2d] * whitens:
        print(inspect.getsource(helper), end="\n\n")
    name = "Network" if "(" in name else re.sub(r"\W", "_", name[0].upper() + name[1:])
    print(f"""class {name}(nn.Module):
    def __init__(self{', num_classes=10' * ('classifier' in parts)}):
        super().__init__()
{''.join(body)}
    def forward(self, x):  # images (B, {', '.join(map(str, version.in_shape))})
        {code}
        return {outputs}""")


def _call(layer):
    """The call that makes a layer, as PyTorch's own: "nn.Conv2d(3, 32, kernel_size=3, padding=1)"."""
    if isinstance(layer, WhiteningConv2d):
        return f"WhiteningConv2d({layer.weight.shape[1]}, {layer.weight.shape[0]})"
    text = re.sub(r"\((\d+), \1\)", r"\1", repr(layer).replace("WholeMap", ""))  # (3, 3) as 3
    default = (r"stride=1|padding=0|dilation=1|ceil_mode=False|bias=True|inplace=False|eps=1e-05|affine=True|"
               r"track_running_stats=True|start_dim=1|end_dim=-1")
    return "nn." + re.sub(rf"(, )?\b({default})(?=[,)])", "", text)


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("network", nargs="?", help="a version, an encoder, or \"encoder | classifier\"")
    cli.add_argument("--code", action="store_true", help="print it as a plain PyTorch class")
    args = cli.parse_args(argv)
    try:
        if args.network is None:
            print_versions()
        else:
            parts = [part.strip() for part in args.network.split("|")]
            model = _on_meta(Version(*parts) if "(" in args.network else args.network)
            print_code(model, args.network) if args.code else print_layers(model)
    except NotationError as error:
        cli.exit(2, f"models.py: error: {error}\n")


if __name__ == "__main__":
    main()
