"""Files of RobustBench's ids: whose network they are, and its logits next to those of its class."""

import gc
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import models
from jaxrobust.models.published import PUBLISHED, own_id
from jaxrobust.publish import import_torch, layouts
from jaxrobust.weights import load, reading
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.naming import convert
from jaxrobust.weights.naming.networks import Request
from tests.support import golden32, parity

_OWN = re.compile(r"mu|sigma|mean|std|normalize\..*")  # what classes hold and files do not


def kinds() -> list[str]:
    """One id of each network, normalization and naming, but for those that other tests have."""
    found: dict[str, str] = {}
    for key, net in PUBLISHED.items():
        tested = models.family(net.model).file[:3] in ("dm_", "ra_", "swi")
        if not tested and (net.board.image_size == 32 or net.board.norm is None):
            kind = (net.model, net.options, net.board.dataset, net.buffers, net.inside)
            found.setdefault(str((*kind, net.renamed, net.unused)), key)
    return [*found.values()]


def stored(key: str) -> dict[str, np.ndarray]:
    """The arrays of an id's file, of constants, as its authors call them."""
    net = PUBLISHED[key]
    sizes = {"num_classes": net.board.num_classes, "image_size": net.board.image_size}
    shapes = jax.eval_shape(
        models.create(net.model, **sizes, **net.options).init, jax.random.key(0)
    )
    ours = {k: np.full(a.shape, 0.5, np.float32) for part in shapes for k, a in part.items()}
    theirs = convert.reference_names(net.model, ours, wrapped=False, **net.options)
    for old, new in net.renamed:
        theirs = {k.replace(old, new): array for k, array in theirs.items()}
    for part, copy in [net.unused] if net.unused else []:
        theirs |= {k.replace(part, copy): a for k, a in theirs.items() if k.startswith(part)}
    return theirs


class FileTest(parameterized.TestCase):
    @parameterized.parameters(
        ("Carmon2019Unlabeled", (0.0, 0.0, 0.0), "state_dict"),
        ("cifar100/Linf/Hendrycks2019Using", (0.5, 0.5, 0.5), "state_dict"),
        (
            "cifar100/Linf/Rice2020Overfitting",
            (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
            "state_dict",
        ),
        ("Andriushchenko2020Understanding", (0.0, 0.0, 0.0), "last"),
        ("cifar10/Linf/Engstrom2019Robustness", (0.4914, 0.4822, 0.4465), "state_dict"),
        ("cifar10/corruptions/Hendrycks2020AugMix_WRN", (0.5, 0.5, 0.5), "state_dict"),
        ("cifar100/Linf/Debenedetti2022Light_XCiT-S12", (0.5071, 0.4867, 0.4408), "model"),
    )
    def test_what_an_id_says_of_it(self, key, mean, place):
        torch = parity.torch_or_skip(self)
        path, net = Path(self.create_tempdir()) / f"{own_id(key)}.pt", PUBLISHED[key]
        state = {name: torch.from_numpy(np.array(array)) for name, array in stored(key).items()}
        torch.save({place: state, "best": {}}, path)
        artifact = reading.artifact_of(sources.at(path)._replace(published=key))
        network = load.fitted(artifact)
        about = load.about(network)
        self.assertEqual((about["architecture"], about["options"]), (net.model, net.options))
        self.assertEqual((about["published_id"], about["norm"]), (key, net.board.norm))
        self.assertEqual(about["accuracies"] is None, net.board.norm is None)
        np.testing.assert_array_equal(network.stats["normalize.mean"], np.float32(mean))
        back = layouts.arrays(network, key)
        self.assertContainsSubset(state.keys(), back.keys())
        self.assertEqual(back.keys() - state.keys(), {*(net.buffers or ())} - state.keys())


class RobustbenchTest(parameterized.TestCase):
    @parameterized.parameters("Andriushchenko2020Understanding", "cifar10/Linf/Wong2020Fast")
    @pytest.mark.matrix
    def test_an_import_is_certified(self, key):
        torch = parity.torch_or_skip(self)
        from jaxrobust.publish import torch_networks

        try:
            theirs = torch_networks.published(key)
        except ImportError as error:
            self.skipTest(str(error))
        out, state = Path(self.create_tempdir()), theirs.state_dict()
        torch.save({"last": state} if key.startswith("Andri") else state, out / "file.pt")
        request = Request(model=key)
        done = import_torch.import_weights(str(out / "file.pt"), out / "imported", request)
        self.assertStartsWith(done["certificate"], "agrees with robustbench 1.1.1: logits ")

    @parameterized.parameters(*kinds())
    @pytest.mark.matrix
    def test_logits(self, key):
        """Of its own class with random weights, and of our import of their file."""
        torch = parity.torch_or_skip(self)
        from jaxrobust.publish import torch_networks

        try:
            theirs = torch_networks.published(key)
        except ImportError as error:
            self.skipTest(str(error))
        state = {
            k: a if _OWN.fullmatch(k) else torch.tensor(golden32.drawn(k, tuple(a.shape)))
            for k, a in theirs.state_dict().items()
        }
        theirs.load_state_dict(state)
        side = PUBLISHED[key].board.image_size
        x = np.random.default_rng(0).random((2, 3, side, side), np.float32)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(x)).numpy()
        file = {k.removeprefix("model."): a for k, a in state.items() if not _OWN.fullmatch(k)}
        path = Path(self.create_tempdir()) / f"{own_id(key)}.pt"
        torch.save({"state_dict": {f"module.{k}": a for k, a in file.items()}}, path)
        artifact = reading.artifact_of(sources.at(path)._replace(published=key))
        del state, file
        network = load.fitted(artifact)
        back = layouts.arrays(network, key)
        prefix = "" if back.keys() & theirs.state_dict().keys() else "model."
        named = {prefix + k: torch.from_numpy(a) for k, a in back.items()}
        missing, unexpected = theirs.load_state_dict(named, strict=False)
        self.assertEqual(([k for k in missing if not _OWN.fullmatch(k)], unexpected), ([], []))
        self.assertEqual([*named], [k for k in theirs.state_dict() if k not in missing])
        with torch.no_grad():
            np.testing.assert_array_equal(theirs(torch.from_numpy(x)).numpy(), expected)
        del theirs, back, named
        found = network.create().apply(network.params, network.stats, x.transpose(0, 2, 3, 1))[0]
        off = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
        print(f"{key}: {off:.1e}")
        self.assertLess(off, 1e-5)
        gc.collect()
