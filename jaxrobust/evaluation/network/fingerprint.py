"""What an evaluation computes, so that no number is taken for that of another network or image.

A network is its traced program (of the logits, and of the input gradient, where masked and
straight-through gradients show) and all of its arrays. Another version of this package, of JAX or
of the platform may write the same computation as another program. So a probe goes with it: the
logits and input gradients of 64 noisy images, as a few numbers, which then must agree: of the first
eight, which is all that older versions probed, and of others that are spread over classes,
brightness and contrast, because the first ones of a folder are of one class.
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
_SPREAD = 56  # images beside the first ones
# Four of them are the darkest, four the brightest, four of the least and four of the most contrast.
_FIRST, _LAST = slice(4), slice(-4, None)
_RANKS = 20  # of them at even ranks of brightness; the others are spread over the classes
# Images of a large set among which those are looked for: so many values, or so many images.
_VALUES, _LEAST = 2**23, 256
_PART = 32  # images that are read at a time
_NOISE = 8 / 255  # to both sides, of each pixel
_NUMBERS = 8  # products with random signs, which stand for a row beside its length
_FEWER = 3  # of them, for images beside the first ones
_PREFIX = "spread_"  # of those images' part of a probe
# By how much the probes of one network may differ on other devices, seen from a row's length: of
# gradients more, because rounding moves some units of a network across their kinks.
_LIMITS = {"logits": hosts.ROUNDING, "gradients": 1e-2}


class Fingerprint(NamedTuple):
    """What a network computes."""

    program: str  # hash of the traced program of the logits, for arrays of any content
    gradient: str  # and of the input gradient
    arrays: str  # hash of all arrays
    # "logits" and "gradients", f[8, 9] each; "spread_logits" and "spread_gradients", f[56, 4] each
    probe: "Probe | Future[Probe]"
    versions: dict[str, str]  # of what wrote the program
    question: str = ""  # hash of what is asked of it, where its caller has more to ask than one

    @property
    def exact(self) -> dict[str, str]:
        """Gather the hashes of the network."""
        return {key: getattr(self, key) for key in EXACT}

    @property
    def has_answers(self) -> bool:
        """Tell whether the logits of any of the noisy images are finite."""
        probe = self.computed_probe
        return any(row[0] >= 0 for row in [*probe["logits"], *probe.get(_PREFIX + "logits", ())])

    @property
    def computed_probe(self) -> Probe:
        """Wait for the probe."""
        return resolved(self._asdict())["probe"]


def of_network(
    network: Any, images: Any, *, each: int, keyed: bool = False, labels: Any = None
) -> Fingerprint:
    """Take the fingerprint of a network, whose probe is computed while its caller goes on.

    `network` is what `tracing.argument` made of it, and is given `each` images at a time, where it
    takes no eight; `keyed`: with one key each. It is probed with the first of the `images`, and
    with others that `spread` chooses by the `labels`, i[N] or a function that reads them.
    """
    exact, both, operands = _traced(network, tuple(images.shape[1:]), each, keyed)
    rows = len(operands[1])
    use = ("fingerprint", tuple(images.shape[1:]), rows, keyed)
    first = _noisy(images, rows)
    # Other image sets than ours may be read by one thread alone.
    others = None if hasattr(images, "image_hashes") else _spread_noisy(images, labels, rows)

    def compiled() -> Any:
        # It runs once, on a few images: to compile it well would take longer.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
        return both.lower().compile(compiler_options=quick)

    def probe() -> Probe:
        program = tracing.keep((network,), use, exact["gradient"], compiled)
        noisy = _spread_noisy(images, labels, rows) if others is None else others
        found: Probe = {}
        for prefix, given in (("", first), (_PREFIX, noisy)):
            if not len(given):
                found |= {prefix + name: [] for name in _LIMITS}
                continue
            batches = [
                program(network, operands[0], np.resize(batch, first.shape), *operands[2:])
                for batch in np.split(given, range(rows, len(given), rows))
            ]
            for name, arrays in zip(_LIMITS, zip(*batches, strict=True), strict=True):
                array = np.concatenate([np.asarray(a, np.float64) for a in arrays])[: len(given)]
                if name == "logits":
                    array = np.where(unmasked(array), array, 0)  # beside -1e9 others do not count
                found[prefix + name] = _sketch(array, *((_FEWER, 5) if prefix else ()))
        return found

    # XLA compiles without Python's lock, so that the attacks' programs are traced meanwhile.
    worker = ThreadPoolExecutor(1, "fingerprint")
    probing = worker.submit(probe)
    worker.shutdown(wait=False)
    return Fingerprint(**exact, probe=probing, versions=versions())


def resolved(known: dict[str, Any]) -> Any:
    """Wait for the probe; return the fields as a record or a ledger holds them."""
    probe = known["probe"]
    return known | {"probe": probe.result() if isinstance(probe, Future) else probe}


def exact(
    network: Any, image: tuple[int, ...], *, each: int, keyed: bool = False
) -> dict[str, str]:
    """Hash a network as its fingerprint does, for images H, W, C; nothing compiles."""
    return _traced(network, image, each, keyed)[0]


def _traced(
    network: Any, image: tuple[int, ...], each: int, keyed: bool
) -> tuple[dict[str, str], Any, tuple[Any, ...]]:
    """Trace logits and gradient: the hashes, the program, and what it takes.

    That is the signs that the gradient goes along, images, keys.
    """
    # Functions that end with this call: JAX keeps a function's programs, and with them the arrays
    # that a network closes over, as long as the function lives.
    call = lambda network, *given: network(*given)  # noqa: E731
    twice = lambda *given: _logits_and_gradient(*given)  # noqa: E731
    with jax.default_matmul_precision(VERDICT_PRECISION):
        try:
            operands, rows = _operands(_IMAGES, image, keyed), _IMAGES
            logits = jax.jit(call).trace(network, *operands)
        except Exception:  # it takes `each` images only
            operands, rows = _operands(each, image, keyed), each
            logits = jax.jit(call).trace(network, *operands)
        (shown,) = jax.tree.leaves(logits.out_info)
        along = _signs((rows, *shown.shape[1:])).astype(shown.dtype)
        both = jax.jit(twice).trace(network, along, *operands)
    programs = tracing.Programs()
    program, gradient = (programs.hashed(traced.jaxpr) for traced in (logits, both))
    seen = tracing.TracedNetwork(shown.shape[1], program, programs.constants(logits.jaxpr))
    facts = {"program": program, "gradient": gradient, "arrays": tracing.weights(network, seen)}
    return facts, both, (along, *operands)


def _operands(rows: int, image: tuple[int, ...], keyed: bool) -> tuple[Any, ...]:
    images = jax.ShapeDtypeStruct((rows, *image), jnp.float32)
    return (images, jax.random.split(jax.random.key(0), rows)) if keyed else (images,)


def _logits_and_gradient(
    network: Any, along: Array, images: Array, *keys: Array
) -> tuple[Array, Array]:
    logits, pull = jax.vjp(lambda images: network(images, *keys), images)
    return logits, pull(along)[0]


def spread(images: Any, labels: Any = None) -> np.ndarray:
    """Choose the places of 56 images beside the first eight, by a fixed rule; of few, all.

    Some are the darkest, the brightest, those of least and of most contrast; some lie at even ranks
    of brightness; the others are spread over the classes.
    """
    n = len(images)
    if n <= _IMAGES + _SPREAD:
        return np.arange(min(_IMAGES, n), n)
    most = max(_LEAST, _VALUES // int(np.prod(images.shape[1:])))
    draws = np.random.default_rng(2)
    pool = np.arange(_IMAGES, n)
    if len(pool) > most:
        pool = np.sort(draws.choice(pool, most, replace=False))
    places, brightness, contrast = _statistics(images, pool)
    of = np.zeros(n, int) if labels is None else np.asarray(labels)
    at = draws.permutation(len(places))
    by_class = at[np.argsort(_rank_in_class(of[places[at]]), kind="stable")]
    bright, rich = (np.argsort(values, kind="stable") for values in (brightness, contrast))
    ranks = np.linspace(0, len(places) - 1, _RANKS).round().astype(int)
    extremes = [order[at] for order in (bright, rich) for at in (_FIRST, _LAST)]
    wanted = np.concatenate([*extremes, bright[ranks], by_class])
    return np.sort(places[[*dict.fromkeys(wanted.tolist())][:_SPREAD]])


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """Count the earlier images of the class of each, i[N]."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    ranks = np.empty(len(labels), int)
    ranks[order] = np.arange(len(labels)) - starts
    return ranks


def _statistics(images: Any, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute mean and standard deviation of images; those that cannot be read are left out."""
    places, means, deviations = [], [], []
    for part in np.split(pool, range(_PART, len(pool), _PART)):
        try:
            pixels = np.asarray(images[part], np.float32).reshape(len(part), -1)
        except ValueError:  # the evaluation says which is damaged
            continue
        places.append(part)
        means.append(pixels.mean(axis=1))
        deviations.append(pixels.std(axis=1))
    return np.concatenate(places), np.concatenate(means), np.concatenate(deviations)


def _spread_noisy(images: Any, labels: Any, rows: int) -> np.ndarray:
    """Read the images that `spread` chooses, with noise; none where the first rows are all."""
    places = spread(images, labels() if callable(labels) else labels)
    places = places[places >= rows]
    noise = np.random.default_rng(3).uniform(-_NOISE, _NOISE, (len(places), *images.shape[1:]))
    if not len(places):
        return noise.astype(np.float32)
    return np.clip(np.asarray(images[places], np.float32) + noise, 0, 1).astype(np.float32)


def _noisy(images: Any, rows: int) -> np.ndarray:
    first = np.full((1, *images.shape[1:]), 0.5, np.float32)  # where there are none
    if len(images):
        first = np.asarray(images[np.arange(min(rows, len(images)))], np.float32)
    taken = np.resize(np.arange(len(first)), rows)
    noise = np.random.default_rng(0).uniform(-_NOISE, _NOISE, (rows, *first.shape[1:]))
    return np.clip(first[taken] + noise, 0, 1).astype(np.float32)


def _signs(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).choice(np.array([-1, 1], np.int8), shape)


def _sketch(rows: np.ndarray, numbers: int = _NUMBERS, digits: int = 7) -> list[list[float]]:
    """Compute of each row its length, then products with random signs; -1 where not finite."""
    flat = np.where(np.isfinite(rows), rows, 0).reshape(len(rows), -1)
    finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    products = flat @ _signs((flat.shape[1], numbers)).astype(np.float64)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    values = np.where(finite[:, None], np.hstack([lengths, products]), -1)
    return [[float(f"{v:.{digits}g}") for v in row] for row in values]


@functools.cache
def versions() -> dict[str, str]:
    """Read the versions of all that writes a network's program, and of what it is written for."""
    known = provenance.versions()
    facts = {key: known[key] for key in ("jaxrobust", "jax")}
    facts |= {"commit": provenance.commit(), "platform": jax.default_backend()}
    if torch := sys.modules.get("torch"):  # whose networks `torch.export` writes down
        facts["torch"] = str(torch.__version__)
    return facts


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Say why one network is not the other, by the fields of their fingerprints; "" if it is."""
    if theirs.get("arrays") != ours["arrays"]:
        return "its arrays (weights) are others"
    same = [theirs.get(key) == ours[key] for key in ("program", "gradient")]
    there, here = theirs.get("versions") or {}, ours["versions"]
    if not all(same) and not other_versions(there, here):
        return f"the program of its {'input gradient' if same[0] else 'logits'} is another one"
    probe, own = theirs.get("probe") or {}, resolved(ours)["probe"]
    for name, limit in _LIMITS.items():
        both = "" if all(same) else f" (there {words(there)}, here {words(here)})"
        if not _near(probe.get(name), own[name], limit):
            return f"its {name} on eight noisy images are others{both}"
        more = _PREFIX + name
        older = more not in probe or more not in own
        if not (older or probe[more] == own[more] or _near(probe[more], own[more], limit)):
            return f"its {name} on {len(own[more])} more noisy images are others{both}"
    return ""


def is_shown(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Return whether fingerprints without a `difference` prove two networks equal.

    Another program with the probe of an older version, of the first images alone, does not.
    """
    same = all(theirs.get(key) == ours[key] for key in EXACT)
    return same or _PREFIX + "logits" in (theirs.get("probe") or {})


def other_versions(theirs: dict[str, str], ours: dict[str, str]) -> bool:
    """Tell whether programs may differ although they compute the same."""
    shared = theirs.keys() & ours.keys()
    return any(theirs[key] != ours[key] for key in shared)


def words(versions: dict[str, str]) -> str:
    """Write versions for people."""
    commit = versions.get("commit", "")
    named = f" at {commit[:12] + '+changes' * commit.endswith('+changes')}" if commit else ""
    others = [f"{key} {versions[key]}" for key in ("jax", "torch", "platform") if key in versions]
    return ", ".join([f"jaxrobust {versions.get('jaxrobust', '?')}{named}", *others])


def _near(theirs: Any, ours: list[list[float]], limit: float) -> bool:
    try:
        a, b = np.array(theirs, float), np.array(ours, float)
    except (TypeError, ValueError):
        return False
    if a.shape != b.shape:
        return False
    lengths = np.maximum(a[:, :1], b[:, :1])
    floor = 1e-6 * lengths.max(initial=0)  # beside the others such a row is rounding
    return bool((np.abs(a - b) <= limit * np.maximum(lengths, floor) + 1e-30).all())
