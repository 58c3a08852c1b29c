"""Fingerprints of networks and images, so that no result is attributed to the wrong ones.

A network is identified by its traced programs and all of its arrays. The programs are of the logits
and of the input gradient, which shows masked and straight-through gradients. Another version of
this package, of JAX or of the platform may trace the same computation as another program. Then a
probe must agree: a few numbers for the logits and input gradients of 64 noisy images. These are the
first eight, the only ones that older versions probed, and others spread over classes, brightness
and contrast, because the first images of a folder are of one class.
"""

import functools
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.evaluation.network import tracing
from jaxrobust.runtime.files import provenance
from jaxrobust.runtime.processes import hosts
from jaxrobust.types import VERDICT_PRECISION, Array, unmasked

Probe = dict[str, list[list[float]]]
EXACT = ("program", "gradient", "arrays")
_IMAGES = 8
_SPREAD = 56  # images other than the first ones
# Four of them are the darkest, four the brightest, four have the least and four the most contrast.
_RANKS = 20  # of them at even ranks of brightness; the others are spread over the classes
# In a large set they are chosen among so many values in all, or at least so many images.
_VALUES, _LEAST = 2**23, 256
_PART = 32  # images that are read at a time
_NOISE = 8 / 255  # to both sides, of each pixel
_NUMBERS = 8  # products with random signs that represent a row, in addition to its length
_FEWER = 3  # products for images other than the first ones
_PREFIX = "spread_"  # of those images' part of a probe
# How far probes of one network may differ between devices, relative to a row's length; more for
# gradients, because rounding moves some units of a network across their kinks.
_LIMITS = {"logits": hosts.ROUNDING, "gradients": 1e-2}


class Fingerprint(NamedTuple):
    """The fingerprint of a network's computation."""

    program: str  # hash of the traced program of the logits, whatever the arrays contain
    gradient: str  # hash of the traced program of the input gradient
    arrays: str  # hash of all arrays
    # "logits" and "gradients", f[8, 9] each; "spread_logits" and "spread_gradients", f[56, 4] each
    probe: "Probe | Future[Probe]"
    versions: dict[str, str]  # of the software that traced the program
    question: str = ""  # hash of the evaluation's settings, if the caller runs more than one

    @property
    def exact(self) -> dict[str, str]:
        """Gather the hashes of the network."""
        return {key: getattr(self, key) for key in EXACT}

    @property
    def has_answers(self) -> bool:
        """Tell whether any noisy image has finite logits."""
        probe = self.computed_probe
        return any(row[0] >= 0 for row in [*probe["logits"], *probe.get(_PREFIX + "logits", ())])

    @property
    def computed_probe(self) -> Probe:
        """Wait for the probe."""
        probe: Probe = resolved(self._asdict())["probe"]
        return probe


def of_network(
    network: Any, images: Any, *, batch: int, operand: str = "", labels: Any = None
) -> Fingerprint:
    """Take the fingerprint of a network; its probe is computed in the background.

    `network`, from `tracing.argument`, gets `batch` images at a time if it does not take eight;
    `operand` is "keys" or "ids" if it takes one per image. It is probed with the first `images`,
    and with others that `spread` chooses by the `labels`, i[N] or a function that reads them.
    """
    exact, both, (along, batch_images, *extra) = _traced(
        network, tuple(images.shape[1:]), batch, operand
    )
    rows = len(batch_images)
    use = ("fingerprint", tuple(images.shape[1:]), rows, operand)
    first = _noisy(images, rows)
    # Image sets of users may not be thread-safe.
    others = None if hasattr(images, "image_hashes") else _spread_noisy(images, labels, rows)

    def compiled() -> Any:
        # The program runs once, on a few images, so optimizing it would take longer.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
        return both.lower().compile(compiler_options=quick)

    def probe() -> Probe:
        program = tracing.keep((network,), use, exact["gradient"], compiled)
        noisy = _spread_noisy(images, labels, rows) if others is None else others
        probes: Probe = {}
        for prefix, points in (("", first), (_PREFIX, noisy)):
            if not len(points):
                probes |= {prefix + name: [] for name in _LIMITS}
                continue
            batches = [
                program(network, along, np.resize(part, first.shape), *extra)
                for part in np.split(points, range(rows, len(points), rows))
            ]
            for name, arrays in zip(_LIMITS, zip(*batches, strict=True), strict=True):
                array = np.concatenate([np.asarray(a, np.float64) for a in arrays])[: len(points)]
                if name == "logits":
                    array = np.where(unmasked(array), array, 0)  # -1e9 would hide the others
                probes[prefix + name] = _sketch(array, *((_FEWER, 5) if prefix else ()))
        return probes

    # XLA compiles without holding Python's lock, so the attacks' programs are traced meanwhile.
    worker = ThreadPoolExecutor(1, "fingerprint")
    probing = worker.submit(probe)
    worker.shutdown(wait=False)
    return Fingerprint(**exact, probe=probing, versions=versions())


def resolved(fields: dict[str, Any]) -> Any:
    """Wait for the probe; return the fields as stored in a record or a ledger."""
    probe = fields["probe"]
    return fields | {"probe": probe.result() if isinstance(probe, Future) else probe}


def exact(network: Any, image: tuple[int, ...], *, batch: int, operand: str = "") -> dict[str, str]:
    """Hash a network as its fingerprint does, for images (H, W, C), without compiling."""
    return _traced(network, image, batch, operand)[0]


def _traced(
    network: Any, image: tuple[int, ...], batch: int, operand: str
) -> tuple[dict[str, str], Any, tuple[Any, ...]]:
    """Trace logits and gradient; return the hashes, the program and its arguments after the
    network: the signs that the gradient is taken along, the images, and any keys or ids.
    """

    # These functions are local because JAX keeps a function's programs, and with them the arrays
    # that a network closes over, as long as the function lives.
    def call(network: Any, *operands: Any) -> Any:
        return network(*operands)

    def with_gradient(network: Any, along: Array, images: Array, *extra: Array) -> Any:
        logits, pull = jax.vjp(lambda images: network(images, *extra), images)
        return logits, pull(along)[0]

    def traced(rows: int) -> tuple[Any, tuple[Any, ...]]:
        images = jax.ShapeDtypeStruct((rows, *image), jnp.float32)
        extra: Any = {
            "keys": jax.random.split(jax.random.key(0), rows),
            "ids": np.arange(rows, dtype=np.uint32),
        }
        extra = [extra[operand]] if operand else []
        return jax.jit(call).trace(network, images, *extra), (images, *extra)

    with jax.default_matmul_precision(VERDICT_PRECISION):
        try:
            logits, operands = traced(_IMAGES)
        except Exception:  # the network takes only batches of `batch` images
            logits, operands = traced(batch)
        (output,) = jax.tree.leaves(logits.out_info)
        along = _signs((len(operands[0]), *output.shape[1:])).astype(output.dtype)
        both = jax.jit(with_gradient).trace(network, along, *operands)
    programs = tracing.Programs()
    program, gradient = (programs.hashed(trace.jaxpr) for trace in (logits, both))
    arrays = tracing.weights(network, programs.constants(logits.jaxpr))
    facts = {"program": program, "gradient": gradient, "arrays": arrays}
    return facts, both, (along, *operands)


def spread(images: Any, labels: Any = None) -> np.ndarray:
    """Choose the places of 56 images after the first eight by a fixed rule; all, if there are few.

    Some are the darkest, the brightest, and those with the least and the most contrast; some lie at
    even ranks of brightness; the others are spread over the classes.
    """
    n = len(images)
    if n <= _IMAGES + _SPREAD:
        return np.arange(min(_IMAGES, n), n)
    most = max(_LEAST, _VALUES // int(np.prod(images.shape[1:])))
    draws = np.random.default_rng(2)
    pool = np.arange(_IMAGES, n)
    if len(pool) > most:
        pool = np.sort(draws.choice(pool, most, replace=False))
    statistics: list[tuple[np.ndarray, ...]] = []
    for part in np.split(pool, range(_PART, len(pool), _PART)):
        try:
            pixels = np.asarray(images[part], np.float32).reshape(len(part), -1)
        except ValueError:  # the evaluation reports the damaged image
            continue
        statistics.append((part, pixels.mean(axis=1), pixels.std(axis=1)))
    places, brightness, contrast = map(np.concatenate, zip(*statistics, strict=True))
    classes = np.zeros(n, int) if labels is None else np.asarray(labels)
    shuffled = draws.permutation(len(places))
    classes = classes[places[shuffled]]
    order = np.argsort(classes, kind="stable")
    rank_in_class = np.empty(len(order), int)
    rank_in_class[order] = np.arange(len(order)) - np.searchsorted(classes[order], classes[order])
    by_class = shuffled[np.argsort(rank_in_class, kind="stable")]
    bright, rich = (np.argsort(values, kind="stable") for values in (brightness, contrast))
    ranks = np.linspace(0, len(places) - 1, _RANKS).round().astype(int)
    extremes = [bright[:4], bright[-4:], rich[:4], rich[-4:]]
    preferred = np.concatenate([*extremes, bright[ranks], by_class])
    return np.sort(places[[*dict.fromkeys(preferred.tolist())][:_SPREAD]])


def _spread_noisy(images: Any, labels: Any, rows: int) -> np.ndarray:
    """Read the images that `spread` chooses, except the first `rows`, and add noise."""
    places = spread(images, labels() if callable(labels) else labels)
    places = places[places >= rows]
    noise = np.random.default_rng(3).uniform(-_NOISE, _NOISE, (len(places), *images.shape[1:]))
    if not len(places):
        return noise.astype(np.float32)
    return np.clip(np.asarray(images[places], np.float32) + noise, 0, 1).astype(np.float32)


def _noisy(images: Any, rows: int) -> np.ndarray:
    first = np.full((1, *images.shape[1:]), 0.5, np.float32)  # if there are no images
    if len(images):
        first = np.asarray(images[np.arange(min(rows, len(images)))], np.float32)
    noise = np.random.default_rng(0).uniform(-_NOISE, _NOISE, (rows, *first.shape[1:]))
    return np.clip(np.resize(first, noise.shape) + noise, 0, 1).astype(np.float32)


def _signs(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).choice(np.array([-1, 1], np.int8), shape)


def _sketch(rows: np.ndarray, numbers: int = _NUMBERS, digits: int = 7) -> list[list[float]]:
    """Reduce each row to its length and products with random signs; -1 if not finite."""
    flat = np.where(np.isfinite(rows), rows, 0).reshape(len(rows), -1)
    finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    products = flat @ _signs((flat.shape[1], numbers)).astype(np.float64)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    values = np.where(finite[:, None], np.hstack([lengths, products]), -1)
    return [[float(f"{v:.{digits}g}") for v in row] for row in values]


@functools.cache
def versions() -> dict[str, str]:
    """Read the versions of the software that traces a network's program, and the platform."""
    installed = provenance.versions()
    facts = {key: installed[key] for key in ("jaxrobust", "jax")}
    facts |= {"commit": provenance.commit(), "platform": jax.default_backend()}
    if torch := sys.modules.get("torch"):  # its networks are traced by `torch.export`
        facts["torch"] = str(torch.__version__)
    return facts


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Explain why two networks differ, by the fields of their fingerprints; "" if they do not."""
    if old.get("arrays") != new["arrays"]:
        return "its arrays (weights) differ"
    same = [old.get(key) == new[key] for key in ("program", "gradient")]
    old_versions = old.get("versions") or {}
    if not all(same) and not other_versions(old_versions, new["versions"]):
        return f"a different program computes its {'input gradient' if same[0] else 'logits'}"
    old_probe, probe = old.get("probe") or {}, resolved(new)["probe"]
    for name, limit in _LIMITS.items():
        both = f" (there {words(old_versions)}, here {words(new['versions'])})"
        both = "" if all(same) else both
        if not _near(old_probe.get(name), probe[name], limit):
            return f"its {name} on eight noisy images differ{both}"
        more = _PREFIX + name
        if more in old_probe and more in probe:  # older versions lack it
            rows = probe[more]
            if old_probe[more] != rows and not _near(old_probe[more], rows, limit):
                return f"its {name} on {len(rows)} more noisy images differ{both}"
    return ""


def is_shown(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Tell whether fingerprints without a `difference` prove two networks equal.

    They do not if the programs differ and the old probe covers only the first images.
    """
    same = all(old.get(key) == new[key] for key in EXACT)
    return same or _PREFIX + "logits" in (old.get("probe") or {})


def other_versions(old: dict[str, str], new: dict[str, str]) -> bool:
    """Tell whether versions differ, so that programs may differ for the same computation."""
    return any(old[key] != new[key] for key in old.keys() & new.keys())


def words(versions: dict[str, str]) -> str:
    """Format versions."""
    commit = versions.get("commit", "")
    at = f" at {commit[:12] + '+changes' * commit.endswith('+changes')}" if commit else ""
    others = [f"{key} {versions[key]}" for key in ("jax", "torch", "platform") if key in versions]
    return ", ".join([f"jaxrobust {versions.get('jaxrobust', '?')}{at}", *others])


def _near(old: Any, new: list[list[float]], limit: float) -> bool:
    try:
        a, b = np.array(old, float), np.array(new, float)
    except (TypeError, ValueError):
        return False
    if a.shape != b.shape:
        return False
    lengths = np.maximum(a[:, :1], b[:, :1])
    floor = 1e-6 * lengths.max(initial=0)  # shorter rows are rounding noise
    return bool((np.abs(a - b) <= limit * np.maximum(lengths, floor) + 1e-30).all())
