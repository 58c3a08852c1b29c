"""The common corruptions as functions of an image uint8[S,S,3], their settings and draws.

Each returns f64[S,S,3] or uint8[S,S,3] on the pixel scale, 0 to 255; values may leave that range
and `corruptions.corrupt` clips and truncates them. `rng` is NumPy's. Every function draws the same
numbers in the same order as the reference, so the same draws give its pixels.

Source: Hendrycks & Dietterich 2019 (arXiv 1903.12261) and its repository hendrycks/robustness
  (Apache-2.0); its behavior is reproduced without its code. Parity:
  tests/data/transforms/test_corruptions.py.
"""

import functools
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

_GREY = np.array([0.299, 0.587, 0.114], np.float32)
_AMPLITUDE = 100.0  # of fog's corner points
_DIAGONAL = ((-1, -1), (-1, 1), (1, -1), (1, 1))
_STRAIGHT = ((-1, 0), (1, 0), (0, -1), (0, 1))


def gaussian_noise(image: np.ndarray, rng: Any, sigma: float) -> np.ndarray:
    """Add normal noise with this standard deviation."""
    x = image / 255
    return 255 * np.clip(x + rng.normal(scale=sigma, size=x.shape), 0, 1)


def shot_noise(image: np.ndarray, rng: Any, photons: float) -> np.ndarray:
    """Draw Poisson counts of the image; a white pixel has `photons` on average."""
    return 255 * np.clip(rng.poisson(image / 255 * photons) / photons, 0, 1)


def impulse_noise(image: np.ndarray, rng: Any, amount: float) -> np.ndarray:
    """Set a share of the values to black or white, half each."""
    u, white = rng.uniform(size=image.shape), rng.uniform(size=image.shape) < 0.5
    return np.where(u < amount, np.where(white, 255, 0), image)


def defocus_blur(image: np.ndarray, rng: Any, radius: float, alias: float) -> np.ndarray:
    """Blur with a disk whose edge is itself blurred by `alias`."""
    kernel = disk(radius, alias)
    reach = len(kernel) // 2
    while reach and not kernel[[0, -1]].any():  # trim borders of zeros
        kernel, reach = kernel[1:-1, 1:-1], reach - 1
    padded = np.pad(image / 255, ((reach, reach), (reach, reach), (0, 0)), "reflect")
    sides = zip(padded.shape[:2], kernel.shape, strict=True)
    height, width = (have - need + 1 for have, need in sides)
    spectrum = np.fft.rfft2(padded, axes=(0, 1))
    turned = np.fft.rfft2(kernel.astype(np.float64)[::-1, ::-1], padded.shape[:2])[..., None]
    blurred = np.fft.irfft2(spectrum * turned, padded.shape[:2], axes=(0, 1))
    reach = len(kernel) - 1  # from here on the kernel fits inside
    return 255 * blurred[reach : reach + height, reach : reach + width]


def disk(radius: float, alias: float) -> np.ndarray:
    """Return a disk's share of each pixel, f32[17,17], or f32[2r+1,2r+1] for a radius above 8."""
    reach = 8 if radius <= 8 else round(radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    inside = (x**2 + y**2 <= radius**2).astype(np.float64)
    near = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    weights = np.exp(-(near**2) / (2 * alias**2))
    matrix = _matrix(len(inside), tuple(weights / weights.sum()), "reflect")
    return (matrix @ (inside / inside.sum()) @ matrix.T).astype(np.float32)


def glass_blur(image: np.ndarray, rng: Any, sigma: float, reach: int, rounds: int) -> np.ndarray:
    """Blur the image, replace each pixel by a near one, and blur again.

    From S - reach down to reach + 1, rows and columns take, one after the other, the current pixel
    at a random offset in [-reach, reach).
    """
    side = len(image)
    pixels = (255 * _blurred(image / 255, sigma)).astype(np.uint8)
    lines = np.arange(side - reach, reach, -1)
    for _ in range(rounds):
        offsets = rng.integers(-reach, reach, size=(len(lines) ** 2, 2))
        pixels = pixels.reshape(-1, 3)[_taken(side, lines, offsets)].reshape(image.shape)
    return 255 * np.clip(_blurred(pixels / 255, sigma), 0, 1)


def _taken(side: int, lines: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the source of each pixel, i64[S * S], after copies made one by one."""
    # A copy reads what earlier copies wrote, so chains of copies are followed to their end. In each
    # round, a pixel looks where its source looks, which doubles the part followed.
    y, x = (part.ravel() for part in np.meshgrid(lines, lines, indexing="ij"))
    here = y * side + x
    source = (y + offsets[:, 1]) * side + x + offsets[:, 0]
    turn = np.full(side * side, len(here))  # when a pixel is last copied to; by default never
    turn[here] = np.arange(len(here))
    sources = np.arange(side * side)
    sources[here] = source
    # If its source is overwritten only later, a pixel reads the original: the chain ends there.
    chained = np.zeros(side * side, bool)
    chained[here] = turn[source] < turn[here]
    while chained.any():
        on = np.flatnonzero(chained)
        nearer = sources[on]
        sources[on], chained[on] = sources[nearer], chained[nearer]
    return sources


def motion_blur(image: np.ndarray, rng: Any, radius: int, sigma: float) -> np.ndarray:
    """Blur with half a Gaussian along a line of -45 to 45 degrees."""
    return _moved(image, radius, sigma, rng.uniform(-45, 45))


def _moved(image: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """Blur uint8[S,S,C] as ImageMagick's motion blur does: rounded to 16 bits, truncated to 8."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    radians = np.deg2rad(angle)
    ways = (np.cos(radians), np.sin(radians))
    right, down = (np.ceil(steps * way - 0.5).astype(int) for way in ways)
    places, blurred = np.arange(len(image)), np.zeros(image.shape)
    for weight, dx, dy in zip(weights, right, down, strict=True):
        rows, columns = (np.clip(places + d, 0, len(image) - 1) for d in (dy, dx))
        blurred += weight * image[rows[:, None], columns]
    return np.floor(257 * blurred + 0.5) // 257


def zoom_blur(image: np.ndarray, rng: Any, step: float, zooms: int) -> np.ndarray:
    """Average the image with this many zooms of it, starting at factor 1 with this step."""
    x = (image / 255).astype(np.float32)
    total = x.astype(np.float64)
    for number in range(zooms):  # rounds as np.arange: 26 * 1.25 is a tie when a side is rounded
        total += _zoomed(x, 1 + number * ((1 + step) - 1))
    return 255 * total / (zooms + 1)


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """Return the center of x f[S,S,C], linearly enlarged to S x S."""
    side = len(x)
    inner = int(np.ceil(side / factor))
    start = (side - inner) // 2
    matrix = _enlarging(side, inner, factor)
    cut = x[start : start + inner, start : start + inner]
    return np.einsum("hi,wj,ijc->hwc", matrix, matrix, cut, optimize=True)


@functools.lru_cache(maxsize=256)
def _enlarging(side: int, inner: int, factor: float) -> np.ndarray:
    """Return f64[S,n] that maps n points to the middle S of round(n * factor) between them."""
    outer = round(inner * factor)
    start = (outer - side) // 2
    at = np.arange(start, start + side) * (inner - 1) / max(outer - 1, 1)
    low = np.minimum(np.floor(at).astype(int), inner - 1)
    high = np.minimum(low + 1, inner - 1)
    matrix = np.zeros((side, inner))
    np.add.at(matrix, (np.arange(side), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(side), high), at - low)
    return matrix


def snow(image: np.ndarray, rng: Any, *settings: Any) -> np.ndarray:
    """Keep a share `keep` of the image, whiten the rest, and add flakes: normal noise above a
    threshold, blurred along a direction of -135 to -45 degrees.
    """
    mean, spread, zoom, threshold, radius, sigma, keep = settings
    flakes = _zoomed(rng.normal(mean, spread, image.shape[:2])[..., None], zoom)
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))
    fallen = (255 * flakes).astype(np.uint8)
    layer = _moved(fallen, radius, sigma, rng.uniform(-135, -45)) / 255
    x = (image / 255).astype(np.float32)
    white = np.maximum(x, 1.5 * (x @ _GREY)[..., None] + 0.5)
    return 255 * (keep * x + (1 - keep) * white + layer + np.rot90(layer, 2))


def frost(
    image: np.ndarray, rng: Any, keep: float, ice: float, *, photographs: Sequence[np.ndarray]
) -> np.ndarray:
    """Mix `keep` of the image with `ice` of a random part of one of the photographs."""
    photograph = photographs[rng.integers(len(photographs))]
    side = len(image)
    row, column = (rng.integers(0, length - side) for length in photograph.shape[:2])
    return keep * image + ice * photograph[row : row + side, column : column + side].astype(
        np.float64
    )


def fog(image: np.ndarray, rng: Any, amount: float, decay: float) -> np.ndarray:
    """Add a plasma fractal and restore the image's brightness."""
    side = len(image)
    x = image / 255
    brightest = x.max()
    clouds = plasma(32 if side == 32 else 256, decay, rng)[:side, :side, None]
    return 255 * np.clip((x + amount * clouds) * brightest / (brightest + amount), 0, 1)


def plasma(side: int, decay: float, rng: Any) -> np.ndarray:
    """Return a periodic height map f64[S,S] from 0 to 1, by the diamond-square algorithm."""
    heights, step, amplitude = np.zeros((side, side)), side, _AMPLITUDE
    while step >= 2:
        half = step // 2
        for row, column, around in (
            (half, half, _DIAGONAL),
            (0, half, _STRAIGHT),
            (half, 0, _STRAIGHT),
        ):
            rows, columns = np.arange(row, side, step), np.arange(column, side, step)
            near = np.zeros((len(rows), len(columns)))
            for down, right in around:
                places = (rows + down * half) % side, (columns + right * half) % side
                near += heights[np.ix_(*places)]
            drawn = rng.uniform(-amplitude, amplitude, near.shape)
            heights[np.ix_(rows, columns)] = near / 4 + amplitude * drawn
        step, amplitude = half, amplitude / decay
    heights -= heights.min()
    return heights / heights.max()


def brightness(image: np.ndarray, rng: Any, amount: float) -> np.ndarray:
    """Increase the value (as in HSV); hue and saturation stay."""
    x = image / 255
    value = x.max(-1, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    return 255 * np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


def contrast(image: np.ndarray, rng: Any, share: float) -> np.ndarray:
    """Scale each channel's distance from its mean by `share`."""
    x = image / 255
    mean = x.mean((0, 1), keepdims=True)
    return 255 * np.clip((x - mean) * share + mean, 0, 1)


def elastic_transform(
    image: np.ndarray, rng: Any, alpha: float, sigma: float, affine: float
) -> np.ndarray:
    """Apply an affine map that moves three points by up to `affine`, then an elastic deformation.

    Its offsets are `alpha` times uniform noise blurred by `sigma`. The three lengths are pixels.
    """
    side = len(image)
    middle, arm = side // 2, side // 3
    corners = np.array([(arm, arm), (arm, -arm), (-arm, -arm)], np.float32) + middle
    moved = corners + rng.uniform(-affine, affine, corners.shape).astype(np.float32)
    y, x = np.mgrid[:side, :side].astype(np.float64)
    # Maps output pixels to where they are read: moved points to corners.
    affine_corners = np.concatenate([moved, np.ones((3, 1))], 1)
    across, down = np.linalg.solve(affine_corners, corners.astype(np.float64)).T
    at_x, at_y = (a * x + b * y + c for a, b, c in (across, down))
    warped = _sampled((image / 255).astype(np.float32), at_y, at_x, "mirror")
    width = int(3 * sigma + 0.5)
    smooth = _matrix(side, _gaussian(sigma, width), "symmetric")
    noises = (rng.uniform(-1, 1, (side, side)) for _ in range(2))
    dx, dy = ((alpha * (smooth @ u @ smooth.T)).astype(np.float32) for u in noises)
    return 255 * _sampled(warped, y + dy, x + dx, "reflect")


def pixelate(image: np.ndarray, rng: Any, share: float) -> np.ndarray:
    """Shrink the image to this share of its side, then enlarge it again."""
    side = len(image)
    small = Image.fromarray(image).resize((int(side * share),) * 2, Image.Resampling.BOX)
    return np.asarray(small.resize((side, side), Image.Resampling.BOX))


def jpeg_compression(image: np.ndarray, rng: Any, quality: int) -> np.ndarray:
    """Compress the image as JPEG of this quality and decode it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _sampled(image: np.ndarray, y: np.ndarray, x: np.ndarray, border: str) -> np.ndarray:
    """Interpolate the image f[S,S,C] linearly at the points y, x f64[...]."""
    side = len(image)
    low_y, low_x = np.floor(y).astype(int), np.floor(x).astype(int)
    down, across = (y - low_y)[..., None], (x - low_x)[..., None]

    def at(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return image[_inside(rows, side, border), _inside(columns, side, border)]

    above = (1 - across) * at(low_y, low_x) + across * at(low_y, low_x + 1)
    below = (1 - across) * at(low_y + 1, low_x) + across * at(low_y + 1, low_x + 1)
    return (1 - down) * above + down * below


def _inside(places: np.ndarray, side: int, border: str) -> np.ndarray:
    """Map outside places to pixels inside; "mirror" does not repeat the edge."""
    period = 2 * side - (2 if border == "mirror" else 0)
    turned = places % period
    return np.where(turned < side, turned, period - turned - (border != "mirror"))


def _blurred(x: np.ndarray, sigma: float) -> np.ndarray:
    """Blur x f64[S,S,C] with a Gaussian cut at 4 sigma; the edge pixels are repeated outside."""
    matrix = _matrix(len(x), _gaussian(sigma, int(4 * sigma + 0.5)), "edge")
    return np.einsum("hi,wj,ijc->hwc", matrix, matrix, x, optimize=True)


def _gaussian(sigma: float, width: int) -> tuple[float, ...]:
    if not width:
        return (1.0,)
    weights = np.exp(-(np.arange(-width, width + 1) ** 2) / (2 * sigma**2))
    return tuple(weights / weights.sum())


@functools.lru_cache(maxsize=64)
def _matrix(side: int, weights: tuple[float, ...], border: str) -> np.ndarray:
    """Return f64[S,S] that filters by multiplication; `border` is a mode of `np.pad`."""
    # One product costs less than a filter of a thousand weights, as in elastic_transform at 224.
    width = len(weights) // 2
    places = np.pad(np.arange(side), width, border)  # type: ignore[call-overload]
    matrix = np.zeros((side, side))
    for number, weight in enumerate(weights):
        np.add.at(matrix, (np.arange(side), places[number : number + side]), weight)
    return matrix
