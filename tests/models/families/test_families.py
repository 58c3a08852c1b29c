"""What every architecture must do: the table of tests/support/families.py, and all tools."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import parameterized
from ml_collections import ConfigDict

from jaxrobust import models
from jaxrobust.evaluation import autoattack
from tests.support import behaviour, parity, sweeps
from tests.support.evaluations import call
from tests.support.families import CASES, all_families
from tests.support.runs import quiet_run, tiny

DIGITS = {name: row for case in CASES.values() for name, row in case.digits.items()}


def check_tools(test, name: str) -> None:
    """Training lowers the loss, and stored weights are evaluated and attacked."""
    changes = {"pretrain__epochs": 6, "train__epochs": 2}
    config = tiny(model__name=name, model__options=ConfigDict(DIGITS[name]), **changes)
    workdir = Path(test.create_tempdir()) / "run"
    quiet_run(config, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["phase"] == "pretrain" and "loss" in row]
    test.assertLess(losses[-1], losses[0])
    code, out, error = call(workdir=str(workdir), attack="apgd-ce", n=16)
    test.assertEqual(code, 0, error)
    test.assertIn("after apgd-ce", out)


def check_autoattack(test, name: str) -> None:
    """APGD and FAB run in the engine and find something against random weights."""
    net = models.create(name, num_classes=10, image_size=8, in_channels=1, **DIGITS[name])
    params, stats = jax.jit(net.init)(jax.random.key(0))
    params = {k: 8 * p if p.ndim > 1 else p for k, p in params.items()}  # less than constant
    logits_fn = jax.tree_util.Partial(lambda p, s, x: net.apply(p, s, x)[0], params, stats)
    images = np.random.default_rng(0).random((8, 8, 8, 1), np.float32)
    labels = np.asarray(logits_fn(images)).argmax(1)
    for attack in ("apgd-ce", "fab-t"):
        result = autoattack(
            logits_fn, images, labels, norm="linf", epsilon=0.5, attacks=(attack,), batch_size=8
        )
        test.assertLess(result.robust.mean(), 1, attack)


def every(field: str) -> list[tuple[str, str]]:
    """(family, name or listing) of all that a field of the cases names."""
    return [(family, key) for family, case in CASES.items() for key in getattr(case, field)]


COUNTED = ("convnext_t", "vit_s", "resnet18", "wide_resnet50_2", "xcit_s12", "cifar_vgg16")
SMALL = [family for family, case in CASES.items() if case.small]


class NamesTest(parameterized.TestCase):
    def test_every_family_is_here(self):
        self.assertEqual({family.file for family in all_families()}, CASES.keys())
        # ConvNeXt is the network of all other tests of tools.
        self.assertEqual({name for name, case in CASES.items() if not case.digits}, {"convnext"})

    def check_parameters(self, names):
        for family, name in every("counts"):
            if name in names:
                with self.subTest(name):
                    self.assertEqual(parity.parameters(name), CASES[family].counts[name])

    def test_parameters(self):
        self.check_parameters(COUNTED)

    @pytest.mark.slow
    def test_parameters_of_the_others(self):
        self.check_parameters({name for _, name in every("counts")} - {*COUNTED})

    @sweeps.rows(*every("listings"))
    def test_names_of_the_reference(self, family, name):
        self.assertEqual(models.torch_keys(name), parity.listing(CASES[family].listings[name]))

    @sweeps.rows(*every("more_listings"))
    def test_names_of_published_files(self, family, listing):
        name = CASES[family].more_listings[listing]
        self.assertEqual(models.torch_keys(name), parity.listing(listing))


class GoldenTest(parameterized.TestCase):
    """Float32 of some networks; float64 and the others: tests that are slow, and the matrix."""

    @sweeps.fast("vit_m_cvst")
    @parameterized.parameters(*every("fast32"))
    def test_float32(self, family, name):
        parity.check_golden(self, name, CASES[family].golden32[name], dtype="float32")

    @parameterized.parameters(*every("fast64"))
    @pytest.mark.slow
    def test_float64(self, family, name):
        with CASES[family].stored():
            parity.check_golden(self, name, CASES[family].golden64[name], dtype="float64")


class SmallTest(parameterized.TestCase):
    @sweeps.fast("vit", "cifar_poolformer")
    @parameterized.parameters(*SMALL)
    def test_bfloat16_computes_and_returns_float32(self, family):
        behaviour.check_bfloat16(self, CASES[family].small, **CASES[family].tiny)

    @sweeps.rows(*CASES["convnext"].scanned)
    @pytest.mark.slow
    def test_remat_and_scan_change_nothing(self, **changes):
        case = CASES["convnext"]
        behaviour.check_remat_and_scan(self, case.small, **case.tiny | changes)


@pytest.mark.matrix
class MatrixTest(parameterized.TestCase):
    """What takes minutes: every golden array, every reference, every behavior."""

    @parameterized.parameters(*sorted(set(every("golden32")) - set(every("fast32"))))
    def test_golden_float32(self, family, name):
        parity.check_golden(self, name, CASES[family].golden32[name], dtype="float32")

    @parameterized.parameters(*every("golden64"))
    def test_golden_float64(self, family, name):
        with CASES[family].stored():
            parity.check_golden(self, name, CASES[family].golden64[name], dtype="float64")

    @parameterized.parameters(*every("forward"))
    def test_forward_of_the_thesis(self, family, listing):
        name, options = CASES[family].forward[listing]
        with CASES[family].stored():
            parity.check_forward(self, name, listing, **options)

    @parameterized.parameters(*every("references"))
    def test_reference(self, family, name):
        with CASES[family].here():
            parity.check_reference(self, name, image_size=CASES[family].references[name])

    @parameterized.parameters(*(family for family in SMALL if CASES[family].scanned))
    def test_remat_and_scan_change_nothing(self, family):
        case = CASES[family]
        for changes in case.scanned:
            behaviour.check_remat_and_scan(self, case.small, **case.tiny | changes)

    @parameterized.parameters(*(family for family in SMALL if CASES[family].outcomes))
    def test_drop_path(self, family):
        case = CASES[family]
        behaviour.check_drop_path(self, case.small, outcomes=case.outcomes, **case.tiny)

    @parameterized.parameters(*sorted(DIGITS))
    def test_tools(self, name):
        check_tools(self, name)

    @parameterized.parameters("xcit_n12", "swin_b")
    def test_autoattack(self, name):
        check_autoattack(self, name)
