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
    N(n)    linear to n means and n log-variances, the last of   linear
            an encoder; the code is drawn from that normal
            distribution in training, else it is the mean
    W(n)    fixed 2x2 conv to n channels, ReLU, an encoder's     nothing
            first; `whiten` sets its filters
    B(n)    3x3 conv to n channels without bias, max-pool,       2x2 transposed conv, stride 2
            batch norm, ReLU
    B'(n)   the same without the pool                            1x1 conv
    D(p)    dropout with probability p                           nothing
    A(n)    average-pool to an n x n map                         none
    T(n)    2x2 transposed conv, stride 2, ReLU                  none: for written-out decoders
    T'(n)   1x1 transposed conv, ReLU                            none
    U(n)    3x3 transposed conv, stride 2, doubling, ReLU        none

A decoder is its encoder's mirror (every layer backwards, ReLU after each but the last) or is written out (no
ReLU after its last layer). An encoder may also be one of torchvision's networks (BACKBONES) or one written in
Python (HANDWRITTEN), by name. `python models.py` prints the table of all versions, `python models.py v4` one of
them layer by layer, `python models.py "C'(16)>C(16)"` any encoder and its mirror. This file needs torch, and
torchvision for BACKBONES alone.
"""
import contextlib
import difflib
import math
import pickle
import re
import signal
import socket
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
from torch import nn

CHECKPOINT = "autoencoder checkpoint, format 4"
LARGEST = 500_000_000  # weights of one layer: 2 GB in float32


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
    # The same idea with more recent methods, after Jordan's airbench (2024).
    "v5-small": Version("W(32)>B(32)>B'(32)", "B(128)>B'(128)>B(128)>B'(128)>A(1)>L'(10)"),
    "v5": Version("W(32)>B(64)>B'(64)", "B(256)>B'(256)>B(256)>B'(256)>A(1)>L'(10)"),
    "v5-large": Version("W(32)>B(128)>B'(128)", "B(384)>B'(384)>B(384)>B'(384)>A(1)>L'(10)"),
    # The standard networks, each with its own classifier. SqueezeNet's, a 1x1 conv and an average, stands here
    # in the other order, without the ReLU between.
    "vgg": Version("vgg16", "A(7)>L(4096)>D(0.5)>L(4096)>D(0.5)>L'(10)", "T(512)>T(256)>T(128)>T(64)>T(3)",
                   **IMAGENET),
    "resnet": Version("resnet50", "A(1)>L'(10)", "T(1024)>T(512)>T(256)>T(64)>T(3)", **IMAGENET),
    "mobilenet": Version("mobilenet_v2", "A(1)>D(0.2)>L'(10)", "T(576)>T(384)>T(192)>T(64)>T(3)", **IMAGENET),
    "squeezenet": Version("squeezenet1_1", "A(1)>D(0.5)>L'(10)", "T(384)>T'(256)>T(128)>T(64)>T(3)", **IMAGENET),
    # The joint model of five classes, and the plain CNN it is compared with (six convs; the study says no more).
    "joint5": Version("C(12)>C(24)>C(48)", "A(1)>L'(10)", "U(24)>U(12)>U(3)", output="tanh", he=True),
    "cnn6": Version("C'(32)>C(32)>C'(64)>C(64)>C'(128)>C(128)", "L(128)>L'(10)", None, he=True),
    # Autoencoders of three kinds, of four code sizes and of four depths.
    "mlp": Version("L(512)>L(128)>L'(32)"), "combo": Version("C(16)>C(32)>L'(32)"),
    "cnn": Version("C(16)>C(32)>G(32)"), "cnn10": Version("C(16)>C(32)>G(10)"),
    "cnn32": Version("C(16)>C(32)>G(32)"), "cnn100": Version("C(16)>C(32)>G(100)"),
    "cnn1000": Version("C(16)>C(32)>G(1000)"), "cnnL1": Version("G(32)"),
    "cnnL3": Version("C(16)>C(32)>G(32)"), "cnnL5": Version("C'(16)>C(16)>C'(32)>C(32)>G(32)"),
    "cnnL10": Version("C'(16)>C'(16)>C(16)>C'(32)>C'(32)>C(32)>C'(64)>C'(64)>C(64)>G(32)"),
    # The two studies of grey images, and a variational autoencoder (Kingma and Welling 2014). The MNIST study's
    # decoder ends in a ReLU; with PyTorch's default initialisation it gives only zeros in five of eight seeds,
    # with He's it does not.
    "mnist": Version("mnist", "L(120)>L'(10)", "mnist", GREY, he=True),
    "fashion-mlp": Version("L(128)>L'(2)", in_shape=GREY, output="sigmoid"),
    "fashion-cnn": Version("C(16)>C(32)", in_shape=GREY, output="sigmoid"),
    "vae": Version("C(32)>C(64)>L(256)>N(32)", in_shape=GREY, output="sigmoid"),
}
OUTPUTS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
# torchvision's networks that can be an encoder: all but their classifier. The number is their tap: after how many
# modules their lower features, about 56x56 of 224x224 pixels, come out.
BACKBONES = {"vgg16": 10, "resnet50": 5, "mobilenet_v2": 4, "squeezenet1_1": 6}


class Handwritten(NamedTuple):
    """An autoencoder that the notation cannot express. encoder and decoder: functions that make an nn.Sequential."""
    in_shape: tuple
    code_shape: tuple
    tap: int  # as in BACKBONES
    encoder: Callable
    decoder: Callable


HANDWRITTEN = {"mnist": Handwritten(
    GREY, (3, 4, 4), 3,
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
    """nn.ConvTranspose2d that is a matrix product on the CPU where its windows do not overlap.

    With kernel 2x2 and stride 2 each input pixel (C values) becomes a 2x2 block of the output by one product with a
    (C, 4 * out) matrix; about 1.7 times as fast as PyTorch's. A map of one pixel becomes one block of the kernel's
    size, 10 times as fast from 1000 channels.
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


class WhiteningConv2d(nn.Module):
    """A fixed 2x2 convolution with a row and a column of repeated border: `whiten` sets its first filters (4 for grey
    images, 12 for coloured ones) so that they decorrelate the pixels of a patch, and as many more to the negatives of
    these; the others stay random."""

    def __init__(self, channels, n):
        super().__init__()
        self.register_buffer("weight", nn.Conv2d(channels, n, 2).weight.detach().clone())

    def forward(self, x):  # (B, C, H, W) -> (B, n, H, W): a product of each pixel's patch with a matrix
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (n, 2 * 2 * C)
        return F.linear(patches(x), weight).permute(0, 3, 1, 2)


def patches(x):
    """The 2x2 patch that ends at each pixel, the border repeated: (B, C, H, W) -> (B, H, W, 2 * 2 * C)."""
    b, c, h, w = x.shape
    x = F.pad(x, (1, 0, 1, 0), "replicate").permute(0, 2, 3, 1)
    return torch.cat([x[:, i:i + h, j:j + w] for i in range(2) for j in range(2)], 3)


@torch.no_grad()
def whiten(model, images):
    """Sets the first filters of an encoder that begins with W(n) from normalised images (N, C, H, W): the eigenvectors
    of the second moments of their 2x2 patches, each divided by sqrt(eigenvalue + 5e-4), then the negatives of these
    (as in Jordan's airbench, 2024). Until then they are random. Raises ValueError for another encoder."""
    layer, c = model.encoder[0], images.shape[1]
    if not isinstance(layer, WhiteningConv2d):
        raise ValueError(f"an encoder that begins with {type(layer).__name__}; expected one that begins with W(n)")
    rows = patches(images).flatten(0, 2).double()  # (N * H * W, 2 * 2 * C)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    filters = (vectors / (values.clamp(min=0) + 5e-4).sqrt()).T.flip(0)  # the largest variance first
    filters = filters.view(-1, 2, 2, c).permute(0, 3, 1, 2)
    filters = torch.cat([filters, -filters])[:len(layer.weight)]
    layer.weight[:len(filters)] = filters


class Dropout(nn.Dropout):
    """nn.Dropout that cuts every 64-bit draw into four 16-bit ones on the CPU.

    PyTorch draws a number per value, one after another, which took a fifth of v4's step. The probability is rounded
    to a multiple of 1/65536 and the scale follows it exactly.
    """

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        dropped = round(self.p * 65536)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None)
        keep = draws.view(torch.int16)[:x.numel()] >= dropped - 32768
        mask = keep.to(x.dtype).mul_(65536 / (65536 - dropped))
        return x * mask.view(x.movedim(1, -1).shape).movedim(-1, 1)  # channels_last, as x is


class Autoencoder(nn.Module):
    """An encoder with a classifier and a decoder on its code; either may be None.

    tap: after how many of the encoder's modules its lower features go to a Joined classifier. variational: the
    encoder ends in N(n) and gives the means and log-variances of its code (Kingma and Welling 2014).
    """

    def __init__(self, encoder, classifier=None, decoder=None, tap=None, variational=False):
        super().__init__()
        self.encoder, self.classifier, self.decoder = encoder, classifier, decoder
        self.tap, self.variational = tap, variational

    def forward(self, x, classify=True, reconstruct=True, posterior=False):
        """Images (B, C, H, W) -> logits (B, classes), reconstruction (B, C, H, W), each None where the part is
        missing or not asked for; with posterior=True also mean and log_variance, None unless variational."""
        lower = self.encoder[:self.tap](x) if self.tap else None
        features = self.encoder[self.tap:](lower) if self.tap else self.encoder(x)
        code, logits, reconstruction = self._code(features), None, None
        if classify and self.classifier is not None:
            logits = self.classifier(code, lower) if self.tap else self.classifier(code)
        if reconstruct and self.decoder is not None:
            reconstruction = self.decoder(code)
        if not posterior:
            return logits, reconstruction
        return logits, reconstruction, *(self.posterior(features) if self.variational else (None, None))

    def encode(self, x):
        """Images (B, C, H, W) -> the code (B, ...) that the classifier and the decoder read; a variational one is
        drawn in training and is its mean otherwise."""
        return self._code(self.encoder(x))

    def posterior(self, features):
        """A variational encoder's output (B, 2n) -> the code's (mean, log_variance), each (B, n), float32."""
        return features.float().chunk(2, 1)

    def _code(self, features):
        if not self.variational:
            return features
        mean, log_variance = self.posterior(features)
        # The encoder's mode, not the model's: a frozen encoder is in eval mode while the classifier trains.
        return mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.encoder.training else mean


class Joined(nn.Module):
    """The classifier of the CIFAR study's modified network: the encoder's lower features, through one conv, are
    concatenated with the final features before the last part."""

    def __init__(self, features, lower, last):
        super().__init__()
        self.features, self.lower, self.last = features, lower, last

    def forward(self, code, lower):
        return self.last(torch.cat([self.features(code), self.lower(lower)], 1))


# ---------------------------------------------------------------- from notation to layers

class Kind(NamedTuple):
    """What a kind of token stands for; shapes are (channels, height, width) of a map or (features,) of a vector."""
    layers: Callable         # (the token's number, *shape) -> (modules, the shape that they give)
    mirror: Callable | None  # (before, after) -> modules from the shape `after` back to `before`; None: it has none
    reads: str = "map"       # "map", "vector" (a map is flattened) or "either"


def _linear_mirror(before, after):
    return [nn.Linear(after[0], math.prod(before))] + ([nn.Unflatten(1, before)] if len(before) == 3 else [])


def _doubling_mirror(before, after):
    """Restores odd sides, too: the kernel is one wider (7, pooled to 3), and where S rounded up (7 to 4) one pixel
    of padding removes the surplus."""
    kernel = [2 + side % 2 for side in before[1:]]
    padding = [half - side // 2 for side, half in zip(before[1:], after[1:])]
    return [ConvTranspose2d(after[0], before[0], tuple(kernel), stride=2, padding=tuple(padding))]


def _pool(before, after, plain, adaptive):
    """A pooling between two (height, width): plain where the sizes divide, as the adaptive one has no deterministic
    backward on CUDA."""
    if before[0] % after[0] == 0 and before[1] % after[1] == 0:
        return plain((before[0] // after[0], before[1] // after[1]))
    return adaptive(after)


def _norm(n):
    """A batch norm whose statistics for evaluation follow in a few steps, which may be all that a run has."""
    return nn.BatchNorm2d(n, momentum=0.4)


def _no_layers(before, after):
    return []


def _pointwise_mirror(before, after):
    return [nn.Conv2d(after[0], before[0], 1)]  # faster than a transposed one


KINDS = {
    "C": Kind(  # ReLU after the pool, not before: the same values from a quarter of the work
        lambda n, c, h, w: ([nn.Conv2d(c, n, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()], (n, h // 2, w // 2)),
        _doubling_mirror),
    "C'": Kind(lambda n, c, h, w: ([nn.Conv2d(c, n, 3, padding=1), nn.ReLU()], (n, h, w)),
               lambda before, after: [ConvTranspose2d(after[0], before[0], 1)]),
    "S": Kind(
        lambda n, c, h, w: ([nn.Conv2d(c, n, 3, stride=2, padding=1), nn.ReLU()], (n, (h + 1) // 2, (w + 1) // 2)),
        _doubling_mirror),
    "G": Kind(lambda n, c, h, w: ([WholeMapConv2d(c, n, (h, w))], (n, 1, 1)),
              lambda before, after: [ConvTranspose2d(after[0], before[0], before[1:])]),
    "L": Kind(lambda n, features: ([nn.Linear(features, n), nn.ReLU()], (n,)), _linear_mirror, "vector"),
    "L'": Kind(lambda n, features: ([nn.Linear(features, n)], (n,)), _linear_mirror, "vector"),
    # Autoencoder makes a code of n values from the 2n.
    "N": Kind(lambda n, features: ([nn.Linear(features, 2 * n)], (n,)), _linear_mirror, "vector"),
    "W": Kind(lambda n, c, h, w: ([WhiteningConv2d(c, n), nn.ReLU()], (n, h, w)), _no_layers),
    "B": Kind(
        lambda n, c, h, w: ([nn.Conv2d(c, n, 3, padding=1, bias=False), nn.MaxPool2d(2), _norm(n), nn.ReLU()],
                            (n, h // 2, w // 2)), _doubling_mirror),
    "B'": Kind(lambda n, c, h, w: ([nn.Conv2d(c, n, 3, padding=1, bias=False), _norm(n), nn.ReLU()], (n, h, w)),
               _pointwise_mirror),
    "D": Kind(lambda p, *shape: ([Dropout(p)], shape), _no_layers, "either"),
    "A": Kind(lambda n, c, h, w: ([_pool((h, w), (n, n), nn.AvgPool2d, nn.AdaptiveAvgPool2d)], (c, n, n)), None),
    "T": Kind(lambda n, c, h, w: ([ConvTranspose2d(c, n, 2, stride=2), nn.ReLU()], (n, 2 * h, 2 * w)), None),
    "T'": Kind(lambda n, c, h, w: ([ConvTranspose2d(c, n, 1), nn.ReLU()], (n, h, w)), None),
    "U": Kind(lambda n, c, h, w: ([nn.ConvTranspose2d(c, n, 3, 2, padding=1, output_padding=1), nn.ReLU()],
                                  (n, 2 * h, 2 * w)), None),
}


class Token(NamedTuple):
    kind: str      # a key of KINDS
    value: float   # channels or units (int), for D the probability
    where: str     # the notation, the token's place and text, for messages


class Step(NamedTuple):
    token: Token
    before: tuple  # the shape that the token's layers read
    after: tuple   # the shape that they give
    end: int       # how many modules the notation has made after this token


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
        if tokens and kind == "W":
            raise NotationError(f"{where}: W(n) whitens the images; expected it as an encoder's first token")
        if tokens and tokens[-1].kind == "N":
            raise NotationError(f"{tokens[-1].where}: N(n) gives the code; expected it as an encoder's last token")
        if kind == "D":
            # Dropout draws 16-bit numbers: a probability that rounds to 65536/65536 would keep nothing.
            if not re.fullmatch(r"0?\.\d+|0", number) or float(number) > 65535 / 65536:
                raise NotationError(f"{where}: expected a probability from 0 to 0.99998 (65535/65536)")
            value = float(number)
        else:
            if not re.fullmatch(r"[1-9]\d{0,5}", number):
                raise NotationError(f"{where}: expected a whole number from 1 to 999999")
            value = int(number)
        tokens.append(Token(kind, value, where))
    return tokens


def layers(notation, shape):
    """The layers of a notation, or of its Tokens, for inputs of that shape: (channels, height, width) or (features,).

    Returns (a list of modules, a list with a Step for each token). Raises NotationError.
    """
    modules, steps = [], []
    for token in notation if isinstance(notation, list) else parse(notation):
        kind, n, where = KINDS[token.kind], token.value, token.where
        if kind.reads == "map" and len(shape) != 3:
            raise NotationError(f"{where}: expected a map (channels, height, width), but a linear layer has made it "
                                f"a vector of {shape[0]}")
        reads = (math.prod(shape),) if kind.reads == "vector" else shape
        # The largest kernel but G's is 3x3.
        weights = n * (math.prod(reads) if token.kind == "G" or len(reads) == 1 else 9 * reads[0])
        if weights > LARGEST:
            raise NotationError(f"{where}: would have {weights:,} weights; expected at most {LARGEST:,}")
        made, after = kind.layers(n, *reads)
        if 0 in after:
            raise NotationError(f"{where}: cannot pool a map of {shape[1]}x{shape[2]}; expected fewer "
                                f"{token.kind}, or larger images (--size)")
        modules += made if reads == shape else [nn.Flatten(), *made]
        steps.append(Step(token, shape, after, len(modules)))
        shape = after
    return modules, steps


def mirror(steps):
    """The decoder of an encoder from its notation's Steps: every layer backwards, ReLU after each but the last."""
    modules, image, encoder = [], steps[0].before, steps[0].token.where
    steps = [step for step in steps if KINDS[step.token.kind].mirror is not _no_layers]
    if not steps:
        raise NotationError(f"{encoder}: has no mirror alone; expected a layer that is trained after it, or "
                            "no decoder")
    steps[0] = steps[0]._replace(before=image)  # not what W makes of it
    for token, before, after, _ in reversed(steps):
        kind = KINDS[token.kind]
        if kind.mirror is None:
            raise NotationError(f"{token.where}: {token.kind} has no mirror; write the decoder out (--decoder), or "
                                "leave it out (--no-decoder)")
        modules += [*kind.mirror(before, after), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def written_out(notation, code_shape, in_shape):
    """The decoder of a notation: no ReLU at its end, its picture scaled to the images' size where it has another one
    (SqueezeNet's 13x13 map does not double to 224)."""
    modules, steps = layers(notation, code_shape)
    shape = steps[-1].after
    if len(shape) != 3 or shape[0] != in_shape[0]:
        raise NotationError(f"{notation!r} ends in {_text(shape)}; expected the images' {in_shape[0]} channels")
    if isinstance(modules[-1], nn.ReLU):
        modules.pop()
    if shape != in_shape:
        modules.append(nn.Upsample(in_shape[1:], mode="bilinear", align_corners=False))
    return nn.Sequential(*modules)


def joined(tokens, shape, lower_shape):
    """The Joined classifier of Tokens that end in L', for a code and lower features of those shapes, which join
    before the first A, L or L'."""
    if len(shape) != 3:
        raise NotationError(f"skip joins maps, but the code is a vector of {shape[0]}; expected an encoder that "
                            "ends in a map, or no --skip")
    cut = [token.kind in ("A", "L", "L'") for token in tokens].index(True)
    features, steps = layers(tokens[:cut], shape)
    channels, *size = steps[-1].after if steps else shape
    n, *lower_size = lower_shape
    conv = nn.Conv2d(n, n, 3, stride=2, padding=1)
    pool = _pool([(side + 1) // 2 for side in lower_size], size, nn.MaxPool2d, nn.AdaptiveMaxPool2d)
    last, _ = layers(tokens[cut:], (channels + n, *size))
    return Joined(nn.Sequential(*features), nn.Sequential(conv, pool, nn.ReLU()), nn.Sequential(*last))


# ---------------------------------------------------------------- building a network

def find(name):
    """The Version of that name; NotationError names the closest one."""
    if name not in VERSIONS:
        closest = difflib.get_close_matches(name, VERSIONS, 1, 0.0)[0]
        raise NotationError(f"no version {name!r}; did you mean {closest!r}? There are: {' '.join(VERSIONS)}")
    return VERSIONS[name]


def build(version, in_shape=None, num_classes=10, **changes):
    """A network: an Autoencoder for images of in_shape (channels, height, width). Where its encoder begins with W(n)
    (v5), call `whiten(model, images)` before training: until then those filters are random.

    version: a name of VERSIONS, or a Version. in_shape: the version's own where None. changes: fields of Version to
    replace, e.g. encoder="C(16)", decoder=None. The model carries `model.version` (with its in_shape) and
    `model.num_classes`, from which it can be built again, and `model.code_shape`. Raises NotationError.
    """
    name = version if isinstance(version, str) else "the version"
    version = replace(find(version) if isinstance(version, str) else version, **changes)
    version = replace(version, in_shape=tuple(in_shape or version.in_shape))
    if len(version.in_shape) != 3 or min(*version.in_shape, num_classes) < 1:
        raise NotationError(f"images of {_text(version.in_shape)}, {num_classes} classes: expected channels, height, "
                            "width and the number of classes to be at least 1")
    for notation in (version.classifier, version.decoder):
        if "W(" in (notation or ""):
            raise NotationError(f"{notation!r}: W(n) whitens the images; expected it as an encoder's first token")
    encoder, steps, tap, head = _encoder(version)
    code_shape = steps[-1].after if steps else _output_shape(encoder, version.in_shape)
    classifier = decoder = None
    # The decoder is built last, so that a seed gives the same encoder and classifier with it and without it.
    if version.classifier is not None:
        lower_shape = _output_shape(encoder[:tap], version.in_shape) if version.skip else None
        with _default_named("classifier", name, version, changes):
            classifier = _classifier(version.classifier, num_classes, code_shape, lower_shape)
        version = replace(version, classifier=re.sub(r"\d+(\D*)$", rf"{num_classes}\1", version.classifier))
        if version.pretrained:  # a backbone's own linear layers, where the shapes agree (VGG16's first two)
            for source, target in zip(_linears(head), _linears(classifier)):
                if source.weight.shape == target.weight.shape:
                    target.load_state_dict(source.state_dict())
    if version.decoder is not None:
        with _default_named("decoder", name, version, changes):
            decoder = _decoder(version, code_shape, steps)
    model = Autoencoder(encoder, classifier, decoder, tap if version.skip and version.classifier else None,
                        bool(steps) and steps[-1].token.kind == "N")
    if version.he:
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    model.version, model.num_classes, model.code_shape = version, num_classes, code_shape
    return model


@contextlib.contextmanager
def _default_named(part, name, version, changes):
    """Says in an error that a version's default classifier or decoder does not fit the encoder given with it."""
    notation = getattr(version, part)
    try:
        yield
    except NotationError as error:
        if "encoder" not in changes or part in changes or notation == "mirror":
            raise
        reason = str(error).removeprefix(f"{notation!r}, ")
        raise NotationError(f"the {part} of {name} {notation!r} does not fit the encoder {version.encoder!r}: "
                            f"{reason}; name another with --{part}") from None


def _encoder(version):
    """(a version's encoder, an nn.Sequential; the Steps of its notation, None for a network by name; its tap;
    a backbone's classifier in torchvision, else None)."""
    name, shape = version.encoder, version.in_shape
    if version.pretrained and name not in BACKBONES:
        raise NotationError(f"encoder {name!r}: has no pretrained weights; expected one of {' '.join(BACKBONES)}, or "
                            "--no-pretrained")
    if name in HANDWRITTEN:
        if shape != HANDWRITTEN[name].in_shape:
            raise NotationError(f"{name}: images of {_text(shape)}; expected {_text(HANDWRITTEN[name].in_shape)}")
        return HANDWRITTEN[name].encoder(), None, HANDWRITTEN[name].tap, None
    if name in BACKBONES:
        if shape[0] != 3 or min(shape[1:]) < 32:
            raise NotationError(f"{name}: images of {_text(shape)}; expected 3 channels and sides of at least 32 "
                                "(--size)")
        encoder, head = backbone(name, version.pretrained)
        return encoder, None, BACKBONES[name], head
    modules, steps = layers(name, shape)
    return nn.Sequential(*modules), steps, steps[0].end, None


def backbone(name, pretrained):
    """A network of torchvision: (its encoder, an nn.Sequential; its classifier). pretrained: its ImageNet weights,
    from torch's cache or downloaded. NotationError where they are unavailable."""
    from torchvision.models import get_model, get_model_weights
    net = get_model(name)
    if pretrained:
        weights = get_model_weights(name)["IMAGENET1K_V1"]
        path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(weights.url).path).name)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(20)  # for a network that drops every packet without an answer
        try:
            net.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
        except Exception as error:  # no network, no disk, or a file that is not what its name says
            reason = " ".join(str(error).split())[:80]
            problem, again = ((f"in {path} cannot be read", " again") if path.exists() else
                              (f"are not in {path} and could not be downloaded", ""))
            raise NotationError(f"{name}: its ImageNet weights {problem} ({reason}); put {weights.url} "
                                f"there{again}, or start it untrained with --no-pretrained") from None
        finally:
            socket.setdefaulttimeout(timeout)
    if name == "resnet50":  # all but the pooling and the linear layer
        return nn.Sequential(*list(net.children())[:-2]), net.fc
    return net.features, net.classifier


def _output_shape(module, shape):
    """The shape that a module in training mode gives for inputs of that shape."""
    with torch.no_grad():
        output = module.eval()(torch.zeros(1, *shape))
    module.train()
    return tuple(output.shape[1:])


def _classifier(notation, num_classes, code_shape, lower_shape):
    """The classifier of a notation, with num_classes logits; Joined where there is a shape of lower features."""
    tokens = parse(notation)
    if tokens[-1].kind != "L'":
        raise NotationError(f"{tokens[-1].where}: a classifier ends in L'(number of classes)")
    tokens[-1] = tokens[-1]._replace(value=num_classes)
    if lower_shape is not None:
        return joined(tokens, code_shape, lower_shape)
    return nn.Sequential(*layers(tokens, code_shape)[0])


def _linears(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _decoder(version, code_shape, steps):
    """A version's decoder, an nn.Sequential. steps: the encoder's, or None."""
    if version.decoder in HANDWRITTEN:
        hand = HANDWRITTEN[version.decoder]
        if (code_shape, version.in_shape) != (hand.code_shape, hand.in_shape):
            raise NotationError(f"{version.decoder!r}, a decoder from {_text(hand.code_shape)} to "
                                f"{_text(hand.in_shape)}: the code is {_text(code_shape)}, the images are "
                                f"{_text(version.in_shape)}")
        decoder = hand.decoder()
    elif version.decoder == "mirror":
        if steps is None:
            raise NotationError(f"{version.encoder}: has no mirror; write the decoder out (--decoder), or leave it "
                                "out (--no-decoder)")
        decoder = mirror(steps)
    else:
        decoder = written_out(version.decoder, code_shape, version.in_shape)
    if version.output:
        decoder.append(OUTPUTS[version.output]())
    return decoder


# ---------------------------------------------------------------- checkpoints

def save(path, model, classes=None, **more):
    """Writes a network with its notation to a file that `load` reads.

    classes: the names of the classes; "0", "1", ... where None. more: what else to keep, tensors and plain values
    only. An interrupted call leaves a part of a file: give a temporary name where that matters.
    """
    classes = [str(i) for i in range(model.num_classes)] if classes is None else list(classes)
    if len(classes) != model.num_classes:
        raise ValueError(f"{len(classes)} names of classes; expected {model.num_classes}, as the model has")
    torch.save({"kind": CHECKPOINT, "version": asdict(model.version), "classes": classes,
                "model": model.state_dict(), **more}, path)


def load(path):
    """(the model, in eval mode and channels_last; the dict that `save` wrote), both on the CPU.

    Runs no code from the file, which may be untrusted. Raises CheckpointError where it is not a whole checkpoint.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; expected the best.pt or last.pt of a run")
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as file:
            warnings.simplefilter("ignore")  # the error says enough
            # torch.load does not verify checksums, and a compressed file, which torch.save never writes, could
            # fill the memory.
            if any(entry.compress_type for entry in file.infolist()) or file.testzip():
                raise ValueError("its zip archive is damaged or compressed")
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["kind"] != CHECKPOINT and re.fullmatch(r"autoencoder checkpoint, format \d+", content["kind"]):
                raise CheckpointError(f"{path}: written by another version of this program; train the network again")
            classes, weights = content["classes"], content["model"]
            if content["kind"] != CHECKPOINT or type(classes) is not list or {type(name) for name in classes} - {str}:
                raise ValueError("another kind of content")
            if sum(tensor.nbytes for tensor in weights.values()) > Path(path).stat().st_size:
                raise ValueError("its weights are larger than the file")  # few numbers, each repeated
            if not all(tensor.isfinite().all() for tensor in weights.values()):
                raise ValueError("its weights are not finite")
            with torch.device("meta"):  # no memory and no random numbers for weights that are in the file
                model = build(Version(**content["version"]), num_classes=len(classes), pretrained=False)
            model.to_empty(device="cpu").load_state_dict(weights)
    except CheckpointError:
        raise
    except Exception as error:  # an untrusted file can fail anywhere
        text = f"it has no {error}" if isinstance(error, KeyError) else f"{error}"
        if isinstance(error, pickle.UnpicklingError):  # whose text says how to read the file nevertheless
            text = "it is damaged or has more than tensors and plain values"
        reason = re.sub(r"[^!-~]+", " ", text).strip() or type(error).__name__  # on one line, no control codes
        raise CheckpointError(f"{path}: not a checkpoint of train.py ({reason[:100]})") from None
    return model.eval().to(memory_format=torch.channels_last), content


# ---------------------------------------------------------------- the tables

def _text(shape):
    return "x".join(map(str, shape))


def trace(model):
    """One image through the model: a row (part, layer, output shape, parameters, multiply-adds) for each layer, in
    the order of their work."""
    rows, shape = [], model.version.in_shape

    def note(part, layer, x, y):
        adds = 0
        if isinstance(layer, nn.ConvTranspose2d):  # every input value meets every weight
            adds = x[0, 0].numel() * layer.weight.numel()
        elif isinstance(layer, (nn.Conv2d, nn.Linear, WhiteningConv2d)):
            adds = y[0].numel() * math.prod(layer.weight.shape[1:])
        rows.append((part, type(layer).__name__, tuple(y.shape[1:]), parameter_count(layer), adds))

    hooks = [layer.register_forward_hook(lambda layer, x, y, part=part: note(part, layer, x[0], y))
             for part in ("encoder", "classifier", "decoder") if getattr(model, part) is not None
             for layer in getattr(model, part).modules() if not list(layer.children())]
    training = model.training
    device = next(model.parameters(), torch.empty(0)).device
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape, device=device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return rows


def parameter_count(module):
    """The number of parameters of a model or of any module."""
    return sum(p.numel() for p in module.parameters())


def print_versions():
    print(f"{'version':<12}{'input':<10}{'code':<10}{'parameters':>12}{'MB':>8}{'M mult-adds':>13}")
    for name, version in VERSIONS.items():
        with torch.device("meta"):  # shapes alone: no weights are made or read
            model = build(version, pretrained=False)
        count, adds = parameter_count(model), sum(row[4] for row in trace(model))
        print(f"{name:<12}{_text(version.in_shape):<10}{_text(model.code_shape):<10}{count:>12,}{count * 4 / 1e6:>8.1f}"
              f"{adds / 1e6:>13.1f}\n  {version.encoder} | {version.classifier or 'no classifier'}")
    print("The line below a version: encoder | classifier. MB: its weights in fp32.\n"
          "M mult-adds: millions of multiply-adds per image, decoder included.")


def print_layers(name):
    """The layers of a version, or of the encoder of a notation with its mirror. Raises NotationError."""
    with torch.device("meta"):
        model = build(Version(name) if "(" in name else name, pretrained=False)
    version, rows = model.version, trace(model)
    print(f"encoder {version.encoder}\nclassifier {version.classifier}\ndecoder {version.decoder}\n"
          f"input {_text(version.in_shape)}\n\n"
          f"{'part':<12}{'layer':<18}{'output':<12}{'parameters':>12}{'multiply-adds':>16}")
    for part, layer, shape, parameters, adds in rows:
        print(f"{part:<12}{layer:<18}{_text(shape):<12}{parameters:>12,}{adds:>16,}")
    print(f"{'total':<42}{parameter_count(model):>12,}{sum(row[4] for row in rows):>16,}")


def main(argv):
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    try:
        if len(argv) > 1:
            raise NotationError(f"{' '.join(argv)!r}: expected one version or encoder, or none for the table of all")
        print_layers(argv[0]) if argv else print_versions()
    except NotationError as error:
        print(f"models.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pipe (`| head`) ends the program quietly
    sys.exit(main(sys.argv[1:]))
