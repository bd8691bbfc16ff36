"""The terms of the loss and their weighted sum.

    loss = (alpha * classifier_loss + beta * autoencoder_loss + gamma * l2_reg_loss
            + delta * jigsaw_recon_loss + kl * kl_loss)

    total, terms = weighted_loss(1.0, 1.0, 0.0, logits=logits, labels=labels,
                                 reconstruction=reconstruction, images=images)

alpha = 0 trains an autoencoder alone, beta = 0 a classifier alone. Every loss is computed in
float32, whatever precision the network ran in. This file needs torch alone.
"""
import torch
import torch.nn.functional as F


def classifier_loss(logits, labels, class_weights=None):
    """Mean cross entropy. logits (B, classes), any float; labels (B,) int64.

    class_weights (classes,): each image's loss times its class's weight; still divided by B.
    """
    if class_weights is None:
        return F.cross_entropy(logits.float(), labels)
    return F.cross_entropy(logits.float(), labels, class_weights, reduction="sum") / len(labels)


def balanced_weights(labels, classes):
    """Class weights (classes,) float32 by which every class that has images counts the same in the
    mean over these labels: images / (classes with images * images of the class); 0 for the others."""
    counts = torch.bincount(labels, minlength=classes)
    there = counts > 0
    return torch.where(there, len(labels) / (there.sum() * counts.clamp(min=1)), 0.0)


def autoencoder_loss(reconstruction, images):
    """Mean squared error over all values, on normalised pixels. Both (B, C, H, W)."""
    return F.mse_loss(reconstruction.float(), images.float())


def l2_reg_loss(parameters):
    """Half the sum of squares of all parameters (an iterable of tensors).

    Its gradient is the parameter itself, so gamma * l2_reg_loss trains exactly as gamma added
    to an optimizer's (not decoupled) weight_decay, which is how train.py applies it.
    """
    return 0.5 * sum(p.float().square().sum() for p in parameters)


def jumble(images, grid, order):
    """Images cut into grid x grid tiles that change their places.

    images (B, C, H, W), H and W multiples of grid; order (B, grid * grid): the tile, counted row
    by row, that comes to each place. jumble(..., order.argsort(1)) puts them back.
    """
    b, c, h, w = images.shape
    tiles = images.view(b, c, grid, h // grid, grid, w // grid).permute(0, 2, 4, 3, 5, 1).flatten(1, 2)
    tiles = tiles[torch.arange(b, device=images.device)[:, None], order]  # (B, grid * grid, h, w, C)
    rows = tiles.unflatten(1, (grid, grid)).permute(0, 1, 3, 2, 4, 5)     # (B, grid, h, grid, w, C)
    return rows.reshape(b, h, w, c).permute(0, 3, 1, 2)                   # channels_last


def jigsaw_recon_loss(reconstruction, images):
    """Mean squared error between the reconstruction of jumbled images and the whole ones.

    Both (B, C, H, W), normalised. The CIFAR study's; it takes the network through the jumbled
    images, so it costs a pass of its own.
    """
    return autoencoder_loss(reconstruction, images)


def kl_loss(mean, log_variance, values):
    """Kullback-Leibler divergence of N(mean, variance) from N(0, 1), summed over the code, mean over
    the batch, divided by `values`, the values of an image, so that it stands on the scale of the
    mean squared error. With the weight 2 * s^2 the sum is the evidence bound of a decoder whose
    pixels have standard deviation s (Kingma and Welling 2014). Both (B, units)."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / values


def weighted_loss(alpha=1.0, beta=1.0, gamma=0.0, delta=0.0, kl=0.0, *, logits=None, labels=None,
                  class_weights=None, reconstruction=None, images=None, parameters=None,
                  jigsaw_reconstruction=None, mean=None, log_variance=None):
    """The weighted sum of the terms, and the terms: (total, {"classifier": ..., ...}).

    A term whose weight is 0 is not computed and not in the dict, and its tensors may be None.
    Raises ValueError where no term has a weight.
    """
    terms = {}
    if alpha:
        terms["classifier"] = classifier_loss(logits, labels, class_weights)
    if beta:
        terms["autoencoder"] = autoencoder_loss(reconstruction, images)
    if gamma:
        terms["l2"] = l2_reg_loss(parameters)
    if delta:
        terms["jigsaw"] = jigsaw_recon_loss(jigsaw_reconstruction, images)
    if kl:
        terms["kl"] = kl_loss(mean, log_variance, images[0].numel())
    if not terms:
        raise ValueError("alpha, beta, gamma, delta and kl are all 0: there is nothing to train on")
    weights = {"classifier": alpha, "autoencoder": beta, "l2": gamma, "jigsaw": delta, "kl": kl}
    return sum(weights[name] * term for name, term in terms.items()), terms
