"""Short evaluations under AutoAttack of the golden networks."""

import functools

import numpy as np

from jaxrobust.evaluation import autoattack
from tests.support import paths
from tests.support.golden import golden_nets, load

NETS = golden_nets()


GOLDEN = load(paths.GOLDEN / "attacks/aa_flags.npz")


IMAGES = GOLDEN["images"].astype(np.float32) / 255


LABELS = GOLDEN["labels"]


QUICK = {name: {"steps": 12} for name in ("apgd-ce", "apgd-t", "fab-t")} | {"square": {"steps": 40}}


evaluate = functools.partial(autoattack, verbose=False)


def quick(net="lin", n=40, **changes):
    """A short evaluation that fools some images with each attack."""
    if "attacks" in changes and "overrides" not in changes:
        changes["overrides"] = {name: QUICK[name] for name in changes["attacks"]}
    settings = {"norm": "linf", "epsilon": 2 / 255, "overrides": QUICK, "batch_size": 8} | changes
    return evaluate(NETS[net], IMAGES[:n], LABELS[:n], **settings)
