"""What an evaluation computes, so that no number is taken for that of another network or image.

A network is its traced program (of the logits, and of the input gradient, where masked and
straight-through gradients show) and all of its arrays. Another version of this package, of JAX or
of the platform may write the same computation as another program. So a probe goes with it: the
logits and input gradients of a few noisy images, as a few numbers, which then must agree.
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
_NOISE = 8 / 255  # to both sides, of each pixel
_NUMBERS = 8  # products with random signs, which stand for a row beside its length
# By how much the probes of one network may differ on other devices, seen from a row's length: of
# gradients more, because rounding moves some units of a network across their kinks.
_LIMITS = {"logits": hosts.ROUNDING, "gradients": 1e-2}


class Fingerprint(NamedTuple):
    """What a network computes."""

    program: str  # hash of the traced program of the logits, for arrays of any content
    gradient: str  # and of the input gradient
    arrays: str  # hash of all arrays
    probe: "Probe | Future[Probe]"  # "logits" and "gradients", f[8, 9] each
    versions: dict[str, str]  # of what wrote the program
    question: str = ""  # hash of what is asked of it, where its caller has more to ask than one

    @property
    def exact(self) -> dict[str, str]:
        """Gather the hashes of the network."""
        return {key: getattr(self, key) for key in EXACT}

    @property
    def has_answers(self) -> bool:
        """Tell whether the logits of any of the noisy images are finite."""
        return any(row[0] >= 0 for row in self.computed_probe["logits"])

    @property
    def computed_probe(self) -> Probe:
        """Wait for the probe."""
        return resolved(self._asdict())["probe"]


def of_network(network: Any, images: Any, *, each: int, keyed: bool = False) -> Fingerprint:
    """Take the fingerprint of a network, whose probe is computed while its caller goes on.

    `network` is what `tracing.argument` made of it, and is given `each` images at a time, where it
    takes no eight; `keyed`: with one key each. It is probed with the first of the `images`.
    """
    exact, both, operands = _traced(network, tuple(images.shape[1:]), each, keyed)
    rows = len(operands[1])
    use = ("fingerprint", tuple(images.shape[1:]), rows, keyed)
    noisy = _noisy(images, rows)

    def compiled() -> Any:
        # It runs once, on a few images: to compile it well would take longer.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
        return both.lower().compile(compiler_options=quick)

    def probe() -> Probe:
        program = tracing.keep((network,), use, exact["gradient"], compiled)
        outputs = program(network, operands[0], noisy, *operands[2:])
        logits, gradients = (np.asarray(array, np.float64) for array in outputs)
        logits = np.where(unmasked(logits), logits, 0)  # beside -1e9 others would not count
        return dict(zip(_LIMITS, map(_sketch, (logits, gradients)), strict=True))

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


def _noisy(images: Any, rows: int) -> np.ndarray:
    first = np.full((1, *images.shape[1:]), 0.5, np.float32)  # where there are none
    if len(images):
        first = np.asarray(images[np.arange(min(rows, len(images)))], np.float32)
    taken = np.resize(np.arange(len(first)), rows)
    noise = np.random.default_rng(0).uniform(-_NOISE, _NOISE, (rows, *first.shape[1:]))
    return np.clip(first[taken] + noise, 0, 1).astype(np.float32)


def _signs(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).choice(np.array([-1, 1], np.int8), shape)


def _sketch(rows: np.ndarray) -> list[list[float]]:
    """Compute of each row its length, then products with random signs; -1 where not finite."""
    flat = np.where(np.isfinite(rows), rows, 0).reshape(len(rows), -1)
    finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    products = flat @ _signs((flat.shape[1], _NUMBERS)).astype(np.float64)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    numbers = np.where(finite[:, None], np.hstack([lengths, products]), -1)
    return [[float(f"{v:.7g}") for v in row] for row in numbers]


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
    ours = resolved(ours)
    for name, limit in _LIMITS.items():
        if not _near((theirs.get("probe") or {}).get(name), ours["probe"][name], limit):
            both = "" if all(same) else f" (there {words(there)}, here {words(here)})"
            return f"its {name} on eight noisy images are others{both}"
    return ""


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
