"""The terms of the loss, their weighted sum, and error measures.

    loss = (alpha * classifier_loss + beta * autoencoder_loss + gamma * l2_reg_loss
            + delta * jigsaw_recon_loss + kl * kl_loss)

    total, terms = weighted_loss({"alpha": 1.0, "beta": 0.5}, logits=logits, labels=labels,
                                 reconstruction=reconstruction, images=images)

alpha = 0 trains an autoencoder alone, beta = 0 a classifier alone. A new term is a function and a
row of TERMS; train.py takes its flag, its column in the log and its curve from that row. Every loss
is computed in float32, whatever precision the network ran in. This file depends only on torch.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------- the loss

def classifier_loss(logits, labels, class_weights=None, label_smoothing=None):
    """Mean cross entropy. logits (B, classes), any float; labels (B,) int64.

    class_weights (classes,): each image's loss times its class's weight; still divided by B. label_smoothing:
    the share of the target that is spread evenly over all classes (Szegedy et al. 2016).
    """
    smoothing = label_smoothing or 0.0
    if class_weights is None:
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    each = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    return (class_weights[labels] * each).mean()


def autoencoder_loss(reconstruction, images):
    """Mean squared error over all values, on normalised pixels. Both (B, C, H, W)."""
    return F.mse_loss(reconstruction.float(), images.float())


def l2_reg_loss(parameters):
    """Half the sum of squares of all parameters (an iterable of tensors).

    Its gradient is the parameter itself, so gamma * l2_reg_loss trains exactly as gamma added
    to an optimizer's (not decoupled) weight_decay, which is how train.py applies it; with Muon,
    whose weight decay is decoupled, it shrinks the weights beside the update.
    """
    return 0.5 * sum(p.float().square().sum() for p in parameters)


def jigsaw_recon_loss(reconstruction, images):
    """Mean squared error between the reconstruction of jumbled images (see `jumble`) and the whole
    images. Both (B, C, H, W), normalised. From the CIFAR study; needs a second forward pass."""
    return autoencoder_loss(reconstruction, images)


def kl_loss(mean, log_variance, images):
    """Kullback-Leibler divergence of N(mean, variance) from N(0, 1), both (B, units): summed over the
    code, mean over the batch, divided by the number of values of an image, so that it is on the same
    scale as the mean squared error. With beta 1 and the weight 2 * s^2 the sum is, up to a factor and a
    constant, the negative evidence lower bound (ELBO) of a decoder whose pixels have standard deviation s
    (Kingma and Welling 2014)."""
    mean, log_variance = mean.float(), log_variance.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    return divergence.mean() / images[0].numel()


class Term(NamedTuple):
    name: str       # its column in a log
    loss: Callable  # the function, of the tensors below
    needs: tuple    # the names of its tensors: of a batch, of evaluate.forward, and those of OPTIONAL
    unit: str       # of its curve
    help: str       # of the flag that is its weight
    default: float = 0.0  # of that flag


OPTIONAL = "class_weights", "label_smoothing"  # tensors that may be missing
TERMS = {  # the flag: its term
    "alpha": Term("classifier", classifier_loss, ("logits", "labels", *OPTIONAL),
                  "cross entropy (nats)", "weight of the classifier's cross entropy", 1.0),
    "beta": Term("autoencoder", autoencoder_loss, ("reconstruction", "images"),
                 "MSE (normalised pixels)", "weight of the reconstruction's mean squared error", 1.0),
    # Trained as the optimizer's weight decay: train.py leaves it out of the sum.
    "gamma": Term("l2", l2_reg_loss, ("parameters",),
                  "half the sum of squares", "weight of the L2 loss, half the sum of squares of all weights"),
    "delta": Term("jigsaw", jigsaw_recon_loss, ("jigsaw_reconstruction", "images"), "MSE (normalised pixels)",
                  "weight of the squared error of images rebuilt from jumbled tiles"),
    "kl": Term("kl", kl_loss, ("mean", "log_variance", "images"), "KL divergence per value (nats)",
               "weight of a variational code's KL divergence; 2 s^2 for pixels of standard deviation s"),
}


def needed(weights):
    """The names of the tensors that these weights (a dict of flags) need."""
    return {name for flag, term in TERMS.items() if weights.get(flag) for name in term.needs}


def weighted_sum(weights, terms):
    """The sum of the terms (a dict by name: tensors or numbers) times their weights (by flag).
    Terms that are missing or None do not count."""
    return sum(weight * terms[TERMS[flag].name] for flag, weight in weights.items()
               if terms.get(TERMS[flag].name) is not None)


def weighted_loss(weights, **tensors):
    """The weighted sum of the terms, and the terms: (total, {"classifier": ..., ...}).

    weights: by flag, {"alpha": 1.0, "beta": 1.0, ...}. tensors: by name, as the rows of TERMS need
    them. A term whose weight is 0 is not computed and not in the dict. Raises ValueError for an
    unknown weight, for a missing tensor, and where no term has a weight.
    """
    unknown = sorted(set(weights) - set(TERMS))
    if unknown:
        raise ValueError(f"no weight {unknown[0]!r}; there are {' '.join(TERMS)}")
    passed = [name for name, tensor in tensors.items() if tensor is not None]
    missing = sorted(needed(weights) - set(passed) - set(OPTIONAL))
    if missing:
        raise ValueError(f"no tensor {missing[0]!r}, which these weights need; got {' '.join(passed)}")
    terms = {term.name: term.loss(*(tensors.get(name) for name in term.needs))
             for flag, term in TERMS.items() if weights.get(flag)}
    if not terms:
        raise ValueError("all weights are 0: there is nothing to train on")
    return weighted_sum(weights, terms), terms


def jumble(images, grid, order):
    """Images cut into grid x grid tiles that change their places.

    images (B, C, H, W), H and W multiples of grid; order (B, grid * grid) int64: the tile, counted
    row by row, that comes to each place. jumble(..., order.argsort(1)) puts them back.
    """
    b, c, h, w = images.shape
    tiles = images.view(b, c, grid, h // grid, grid, w // grid).permute(0, 2, 4, 3, 5, 1).flatten(1, 2)
    tiles = tiles[torch.arange(b, device=images.device)[:, None], order]  # (B, grid * grid, h, w, C)
    rows = tiles.unflatten(1, (grid, grid)).permute(0, 1, 3, 2, 4, 5)     # (B, grid, h, grid, w, C)
    return rows.reshape(b, h, w, c).permute(0, 3, 1, 2)                   # channels_last


# ---------------------------------------------------------------- error measures

def balanced_weights(labels, classes):
    """Class weights (classes,) float32 by which every class that has images counts the same in the
    mean over these labels (N,): N / (classes with images * images of the class); 0 for the others."""
    counts = (labels[:, None] == torch.arange(classes, device=labels.device)).sum(0)  # bincount waits
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0.0)


def confusion_matrix(labels, predicted, classes):
    """Counts [true class][predicted class], (classes, classes) int64; both arguments (N,) int64."""
    cells = torch.zeros(classes * classes, dtype=torch.int64, device=labels.device)
    cells.index_add_(0, labels * classes + predicted, torch.ones_like(labels))
    return cells.view(classes, classes)


def per_class(confusion, classes):
    """{name: {"recall", "precision", "f1", "images"}} of the classes, the first three in percent, None where
    there is nothing to divide by. confusion: counts [true class][predicted class], nested lists. The recall
    is what is often called the class's accuracy."""
    result = {}
    for i, name in enumerate(classes):
        right, images, predicted = confusion[i][i], sum(confusion[i]), sum(row[i] for row in confusion)
        shares = {"recall": (right, images), "precision": (right, predicted),
                  "f1": (2 * right, images + predicted)}
        result[name] = {key: 100 * part / whole if whole else None for key, (part, whole) in shares.items()}
        result[name]["images"] = images
    return result


def reconstruction_errors(rebuilt, pixels):
    """Each image's errors, a dict of (B,) tensors; both arguments (B, C, H, W), pixels of 0-1.

    mse, mae: means over the image's values; psnr in dB, at most 100. absolute_error: the sum over the
    image's values; net_error: |sum(x - reconstruction)|, in which errors of opposite sign cancel:
    what the FashionMNIST study calls its mean absolute error.
    """
    error = (rebuilt - pixels).flatten(1)
    mse = error.square().mean(1)
    return {"mse": mse, "mae": error.abs().mean(1), "psnr": -10 * mse.clamp(min=1e-10).log10(),
            "absolute_error": error.abs().sum(1), "net_error": error.sum(1).abs()}
