"""A ledger with one image, for tests that look at its files."""

import numpy as np

from jaxrobust.evaluation.network import fingerprint

VERDICT = {"attack": "square", "fooled": False, "flat": False}
IDS = np.arange(1, dtype=np.uint32)


def evaluated(network):
    """What a ledger says that it is of."""
    probe = {"logits": [[1.0]], "gradients": [[1.0]]}
    known = fingerprint.Fingerprint("program", "gradient", network, probe, fingerprint.versions())
    known_of_all = known._asdict() | {"images": "images"}
    return {"network": None, "fingerprint": known_of_all, "search": None}
