"""The terms of the loss and their weighted sum.

    loss = alpha * classifier_loss + beta * autoencoder_loss + gamma * l2_reg_loss

    total, terms = weighted_loss(1.0, 1.0, 0.0, logits=logits, labels=labels,
                                 reconstruction=reconstruction, images=images)

alpha = 0 trains an autoencoder alone, beta = 0 a classifier alone. Every loss is computed in
float32, whatever precision the network ran in. This file needs torch alone.
"""
import torch.nn.functional as F


def classifier_loss(logits, labels):
    """Mean cross entropy. logits (B, classes), any float; labels (B,) int64."""
    return F.cross_entropy(logits.float(), labels)


def autoencoder_loss(reconstruction, images):
    """Mean squared error over all values, on normalised pixels. Both (B, C, H, W)."""
    return F.mse_loss(reconstruction.float(), images.float())


def l2_reg_loss(parameters):
    """Half the sum of squares of all parameters (an iterable of tensors).

    Its gradient is the parameter itself, so gamma * l2_reg_loss trains exactly as gamma added
    to an optimizer's (not decoupled) weight_decay, which is how train.py applies it.
    """
    return 0.5 * sum(p.float().square().sum() for p in parameters)


def weighted_loss(alpha=1.0, beta=1.0, gamma=0.0, *, logits=None, labels=None,
                  reconstruction=None, images=None, parameters=None):
    """The weighted sum of the terms, and the terms: (total, {"classifier": ..., ...}).

    A term whose weight is 0 is not computed and not in the dict, and its tensors may be None.
    Raises ValueError where no term has a weight.
    """
    terms = {}
    if alpha:
        terms["classifier"] = classifier_loss(logits, labels)
    if beta:
        terms["autoencoder"] = autoencoder_loss(reconstruction, images)
    if gamma:
        terms["l2"] = l2_reg_loss(parameters)
    if not terms:
        raise ValueError("alpha, beta and gamma are all 0: there is nothing to train on")
    weights = {"classifier": alpha, "autoencoder": beta, "l2": gamma}
    return sum(weights[name] * term for name, term in terms.items()), terms
