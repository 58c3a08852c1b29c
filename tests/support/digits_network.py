"""A linear classifier of the digits, which needs no training run."""

import numpy as np

from jaxrobust import data


def ridge() -> np.ndarray:
    """Fit one-hot labels of the training digits by ridge regression; f32[64,10]."""
    digits = data.load("digits", split="train")
    design = digits.images.reshape(len(digits.images), -1).astype(np.float64)
    normal = design.T @ design + 30 * np.eye(design.shape[1])
    return np.linalg.solve(normal, design.T @ np.eye(10)[digits.labels]).astype(np.float32)
