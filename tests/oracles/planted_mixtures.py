"""Data whose mixture of experts is known."""

import numpy as np


def softmax(logits):
    share = np.exp(logits - logits.max(1, keepdims=True))
    return share / share.sum(1, keepdims=True)


def crossing_lines(seed, n=2000):
    """Lines 1 - 2.5x and -1 + 2.5x with deviations 0.5 and 0.8; gate logit 0.5 + 3x for the first."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, n)
    label = (rng.random(n) > 1 / (1 + np.exp(-0.5 - 3 * x))).astype(int)
    y = np.where(label == 0, 1 - 2.5 * x, -1 + 2.5 * x) + np.array([0.5, 0.8])[label] * rng.standard_normal(n)
    return x[:, None], y


def crossing_counts(seed, n=2000):
    """Poisson log-means 0.5 + x and 2 - 0.8x; gate logit 3x for the first."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, n)
    label = (rng.random(n) > 1 / (1 + np.exp(-3 * x))).astype(int)
    return x[:, None], rng.poisson(np.exp(np.where(label == 0, 0.5 + x, 2 - 0.8 * x))).astype(float)


def split_noise(kind, seed, n=500):
    """Slopes -2.5 and 2.5 with a sharp gate at 0 and noise of a family."""
    rng = np.random.default_rng(seed)
    x = np.linspace(-1, 1, n)
    label = (rng.random(n) > 1 / (1 + np.exp(-8 * x))).astype(int)
    noise = {
        "gaussian": lambda: rng.standard_normal(n),
        "laplace": lambda: rng.laplace(scale=0.5, size=n),
        "student": lambda: 0.5 * rng.standard_t(np.array([5, 7])[label]),
        "skew-normal": lambda: _skew(rng, np.array([3.0, 5.0])[label], n),
        "skew-t": lambda: 0.5 * _skew(rng, np.array([3.0, 5.0])[label], n) / _root(rng, np.array([5, 7])[label]),
    }[kind]()
    return x[:, None], np.where(label == 0, -2.5 * x, 2.5 * x) + noise


def _skew(rng, slant, n):
    delta = slant / np.sqrt(1 + slant**2)
    return delta * np.abs(rng.standard_normal(n)) + np.sqrt(1 - delta**2) * rng.standard_normal(n)


def _root(rng, dof):
    return np.sqrt(rng.chisquare(dof) / dof)


def bent_line(seed, n=500):
    """|x - 0.5| with deviation 0.05."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1, n)
    return x[:, None], np.abs(x - 0.5) + 0.05 * rng.standard_normal(n)


def xor(seed, n=1000):
    """Two classes on a chessboard of four squares."""
    x = np.random.default_rng(seed).uniform(-1, 1, (n, 2))
    return x, ((x[:, 0] > 0) ^ (x[:, 1] > 0)).astype(int)
