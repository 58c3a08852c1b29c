"""A network under examination: its images, and cached measurements."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import attacks
from jaxrobust.attacks.geometry.balls import GEOMETRIES
from jaxrobust.data import Source
from jaxrobust.data.stream.loading import DecodedImages
from jaxrobust.evaluation.network import checks, reliability
from jaxrobust.types import VERDICT_PRECISION, Array, LogitsFn, Threat, check_threat

STEPS = 10  # of PGD, and number of points of random noise
_ATTACKED = 100  # maximum number of images
_RESIZED = 200  # maximum number of images: fewer cannot tell a loss of 10 points from chance


@dataclass(frozen=True)
class Recorded:
    """The recorded accuracy of these weights on this split."""

    clean: float
    where: str


@dataclass(frozen=True)
class Patient:
    """A network, images f32[N,H,W,C] in [0, 1], labels i32[N], and a threat to withstand.

    Attributes:
      logits_fn: f32[B,H,W,C] -> f32[B,K], as for `autoattack`; it is traced and compiled.
      others: the same network in other compute types, such as {"bfloat16": logits_fn}.
      arrays: f32[M,H,W,C], the first M images resized as arrays, without PIL; None: the images
        have the network's size.
    """

    logits_fn: LogitsFn
    images: np.ndarray
    labels: np.ndarray
    threat: Threat = field(default_factory=lambda: Threat("linf", 8 / 255))
    others: Mapping[str, LogitsFn] = field(default_factory=dict)
    arrays: np.ndarray | None = None
    recorded: Recorded | None = None
    classes: tuple[str, ...] = ()
    batch: int = 50
    seed: int = 0
    memo: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Raise if the ball contains every image."""
        _, height, _, channels = self.images.shape
        check_threat(self.threat, height, channels)

    def forward(self, images: np.ndarray) -> np.ndarray:
        """Compute the logits f[n,K] of any number of images f32[n,H,W,C]."""
        if "forward" not in self.memo:
            self.memo["forward"] = partial(jax.jit(_verdict), _argument(self.logits_fn))
        return self._batched(self.memo["forward"], images)

    def _batched(self, program: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
        """Run a program of a fixed batch size on any number of rows; the last batch is padded."""
        count = len(arrays[0])
        size = min(self.batch, count)
        results = []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            results.append(np.asarray(program(*(jnp.asarray(array[rows]) for array in arrays))))
        return np.concatenate(results)[:count]

    @cached_property
    def logits(self) -> np.ndarray:
        """The logits f[N,K] of the images."""
        return self.forward(self.images)

    @cached_property
    def right(self) -> np.ndarray:
        """Which images are classified correctly, bool[N]."""
        return checks.is_right(self.logits, self.labels)

    @cached_property
    def flags(self) -> reliability.Flags:
        """The flags that `reliability` raises for the network."""
        data, size = (self.images, self.labels), min(self.batch, len(self.images))
        return reliability.check_network(self.forward, self.logits_fn, *data, batch_size=size)

    @cached_property
    def attacked(self) -> np.ndarray:
        """The places of the images to attack: the first that are classified correctly."""
        return np.flatnonzero(self.right)[:_ATTACKED]

    @cached_property
    def without_gradient(self) -> str | None:
        """Why the network cannot be differentiated; None if it can."""
        image = jax.ShapeDtypeStruct((self.batch, *self.images.shape[1:]), jnp.float32)
        label = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        try:
            jax.eval_shape(partial(_slopes, self.logits_fn, loss=attacks.ce_loss), image, label)
        except Exception as error:  # any error of the user's code or JAX
            return " ".join(str(error).split())[:200]
        return None

    def slopes(self, loss: str, dtype: str = "float32") -> np.ndarray:
        """Compute f[n], the largest entry of the loss's gradient at each of the first images."""
        network = _argument(self.others.get(dtype, self.logits_fn))
        program = jax.jit(partial(_slopes, loss=attacks.LOSSES[loss]))
        images, labels = self.images[:_ATTACKED], self.labels[:_ATTACKED].astype(np.int32)
        return self._batched(partial(program, network), images, labels)

    def after_pgd(self, epsilon: float, loss: str = "ce") -> np.ndarray:
        """Return f[n], the margins of the attacked images after PGD; positive: misclassified."""
        name = f"{loss} {epsilon:.6g}"
        if name not in self.memo:
            self.memo[name] = self._margins(f"pgd-{loss}", partial(_pgd, loss=loss), epsilon)
        return self.memo[name]

    @cached_property
    def after_noise(self) -> np.ndarray:
        """The largest of `STEPS` margins at random points on the boundary of the ball, f[n]."""
        return self._margins("noise", _noise, self.threat.epsilon)

    def _margins(self, name: str, search: Callable[..., Array], epsilon: float) -> np.ndarray:
        if name not in self.memo:  # one program for all radii
            self.memo[name] = jax.jit(partial(search, norm=self.threat.norm))
        key, chosen = jax.random.key(self.seed), self.attacked
        labels, ids = self.labels[chosen].astype(np.int32), chosen.astype(np.int32)
        radius = np.full(len(chosen), epsilon, np.float32)
        program = partial(self.memo[name], _argument(self.logits_fn), key)
        return self._batched(program, self.images[chosen], labels, ids, radius)

    @property
    def everything(self) -> float:
        """The radius at which every image can become the same gray."""
        pixels = float(np.prod(self.images.shape[1:]))
        return {"linf": 0.5, "l2": 0.5 * pixels**0.5, "l1": 0.5 * pixels}[self.threat.norm]


def resized(
    source: Source, places: np.ndarray, *, preprocessing: str, image_size: int
) -> np.ndarray | None:
    """Resize the first images of `places` as arrays, without PIL's antialiasing: f32[M,H,W,C] in
    [0, 1]; None if the preprocessing does not resize.
    """
    numbers = [int(text) for text in re.findall(r"\d+", preprocessing)]
    if preprocessing == "none" or preprocessing.startswith("Crop") or not numbers:
        return None
    share, squashes = numbers[0], len(numbers) == 1
    arrays = []
    for image, _ in DecodedImages(source, 0, True)(places[:_RESIZED].tolist()):
        assert image is not None, "strict"
        sides = image.shape[:2]
        rows, columns = (share if squashes else int(share * s / min(sides)) for s in sides)
        arrays.append(bilinear(image, rows, columns, image_size))
    return np.stack(arrays) / np.float32(255)


def bilinear(image: np.ndarray, rows: int, columns: int, crop: int) -> np.ndarray:
    """Return the central `crop` x `crop` pixels of an image resized to (rows, columns), f32.

    Source: PyTorch's `interpolate(mode="bilinear", align_corners=False)`, without antialiasing.
    """
    pixels = image.astype(np.float32)
    for axis, length in enumerate((rows, columns)):
        size, first = image.shape[axis], round((length - crop) / 2)
        centres = (np.arange(first, first + crop) + 0.5) * (size / length) - 0.5
        centres = np.clip(centres, 0, size - 1)
        low = np.floor(centres).astype(int)
        share = (centres - low).astype(np.float32)
        weight = share[:, None, None] if axis == 0 else share[None, :, None]
        high = np.minimum(low + 1, size - 1)
        pixels = pixels.take(low, axis) * (1 - weight) + pixels.take(high, axis) * weight
    return pixels


def _argument(logits_fn: LogitsFn) -> Any:
    is_partial = isinstance(logits_fn, jax.tree_util.Partial)
    return logits_fn if is_partial else jax.tree_util.Partial(logits_fn)


def _verdict(network: Any, images: Array) -> Array:
    with jax.default_matmul_precision(VERDICT_PRECISION):
        return network(images)


def _slopes(network: Any, images: Array, labels: Array, *, loss: Callable[..., Array]) -> Array:
    slope = jax.grad(lambda x: loss(network(x).astype(jnp.float32), labels).sum())(images)
    return jnp.abs(slope).max(axis=(1, 2, 3))


def _margin(network: Any, images: Array, labels: Array) -> Array:
    return attacks.cw_loss(_verdict(network, images).astype(jnp.float32), labels)


# Margins f[B] after a search on a network, from (a key, images, labels, ids, radii f[B]).


def _pgd(
    network: Any,
    key: Array,
    images: Array,
    labels: Array,
    ids: Array,
    epsilon: Array,
    **options: str,
) -> Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
    # pgd checks concrete radii; this one is an argument of the program.
    attack = attacks.pgd(epsilon=epsilon, steps=STEPS, **options)  # type: ignore[arg-type]
    return _margin(network, attack(network, keys, images, labels), labels)


def _noise(
    network: Any, key: Array, images: Array, labels: Array, ids: Array, epsilon: Array, *, norm: str
) -> Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)

    def at(number: Array) -> Array:
        draws = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        noise = jax.vmap(partial(jax.random.normal, shape=images.shape[1:]))(draws)
        noise = jax.vmap(partial(_of_size, norm=norm))(noise, epsilon)
        return _margin(network, GEOMETRIES[norm].project(images + noise, images, epsilon), labels)

    return jax.lax.map(at, jnp.arange(STEPS)).max(axis=0)


def _of_size(noise: Array, epsilon: Array, *, norm: str) -> Array:
    """Scale noise to the surface of a ball; for L-inf, to one of its corners."""
    if norm == "linf":
        return epsilon * jnp.sign(noise)
    size = jnp.sqrt((noise**2).sum()) if norm == "l2" else jnp.abs(noise).sum()
    return epsilon * noise / size
