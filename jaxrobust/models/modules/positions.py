"""Position embeddings: learned ones resized to another grid, and XCiT's sines and cosines."""

import math

import numpy as np


def _weights(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Compute Keys' cubic kernel with torch's a (PIL and `jax.image` use -0.5)."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def interpolation(old: int, new: int, *, added: float = 0.0) -> np.ndarray:
    """Return f64[new,old]: each new row is a combination of the four nearest old ones.

    This is torch's bicubic interpolation along one axis, without antialiasing or aligned corners,
    to the size `new`, or by the scale `(new + added) / old`.
    """
    scale = (new + added) / old
    at = (np.arange(new) + 0.5) / scale - 0.5
    taps = np.floor(at).astype(int)[:, None] + np.arange(-1, 3)
    matrix = np.zeros((new, old))
    edge = np.clip(taps, 0, old - 1)  # the border repeats outside the grid
    np.add.at(matrix, (np.arange(new)[:, None], edge), _weights(at[:, None] - taps))
    return matrix


def resized(embedding: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resize the embedding f32[1,N,D] to the square grid of `shape` (1, M, D): bicubic, without
    antialiasing.

    N and M are squares, or both squares plus one; then row 0 belongs to the class token and stays.
    Anything else is returned unchanged, so that the caller reports the mismatch.
    Source: `interpolate_pos_encoding` in vision_transformer.py of facebookresearch/dino, which
    Singh, Croce, Hein 2023 follow: torch's interpolate with an explicit scale factor. Parity:
    tests/models/modules/test_positions.py against the golden `pos_embed_interp.npz`.
    """
    if not (embedding.ndim == len(shape) == 3 and embedding.shape[::2] == tuple(shape[::2])):
        return embedding
    old, new = math.isqrt(embedding.shape[1]), math.isqrt(shape[1])
    classes = embedding.shape[1] - old**2
    if not (classes == shape[1] - new**2 and classes in (0, 1)):
        return embedding
    grid = embedding[0, classes:].reshape(old, old, -1).astype(np.float64)
    # The 0.1 comes from the reference: it shifts all but the first samples.
    matrix = interpolation(old, new, added=0.1)
    patches = np.einsum("ir,jc,rcd->ijd", matrix, matrix, grid).reshape(1, new * new, -1)
    return np.concatenate([embedding[:, :classes], patches.astype(embedding.dtype)], axis=1)


def waves(length: int) -> np.ndarray:
    """Return f32[length,32]: sines and cosines of 16 frequencies, at 1 / length to 1 of 2 pi.

    Angles are rounded to float32 at each step, as in the reference in every compute type. Exact
    angles move its float64 logits by 1e-8, the last bits of its float32 sine and cosine by 3e-9.
    """
    frequencies = (10000 ** (np.arange(0, 32, 2) / 32)).astype(np.float32)
    at = np.arange(1, length + 1, dtype=np.float32)
    at = at / (at[-1] + np.float32(1e-6)) * np.float32(2 * np.pi)
    angles = (at[:, None] / frequencies).astype(np.float64)
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, 32).astype(np.float32)


def fourier_features(height: int, width: int) -> np.ndarray:
    """Return f32[height,width,64] for any grid: the row's waves, then the column's."""
    grid = height, width, 32
    rows = np.broadcast_to(waves(height)[:, None], grid)
    return np.concatenate([rows, np.broadcast_to(waves(width)[None], grid)], -1)
