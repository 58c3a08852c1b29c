"""One small network of every family through the tools: trained, stored, evaluated, attacked."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from jaxrobust import models
from jaxrobust.evaluation import autoattack
from tests import parity
from tests.test_evaluate import call
from tests.test_train import quiet_run, tiny

# For 8x8 grey digits; drop path, batch statistics in groups and recomputed blocks take part.
ROWS = {
    "vit_m_cvst": {
        **{"dim": 16, "depth": 2, "heads": 2, "stem_widths": (8,), "stem_strides": (2,)},
        **{"drop_path": 0.1, "gamma_init": 0.1, "scan": True},
    },
    "cait_xxs24": {"dim": 16, "depth": 2, "heads": 2, "stem_strides": (2,), "gamma_init": 0.1},
    "iso_convnext_s": {"dim": 16, "depth": 2, "stem_strides": (2,), "scan": True},
    "xcit_n12": {
        **{"dim": 16, "depth": 2, "heads": 2, "stem_strides": (2,), "bn_group": 4},
        **{"drop_path": 0.1, "scan": True},
    },
    "resnet18": {"depths": (1, 1), "small_stem": True, "bn_group": 4},
    "swin_b": {"dim": 8, "depths": (2, 2), "heads": (1, 2), "patch": 1, "window": 3},
}


def check_tools(test, name: str) -> None:
    """Training lowers the loss, and stored weights are evaluated and attacked."""
    changes = {"pretrain__epochs": 6, "train__epochs": 2}
    config = tiny(model__name=name, model__options=ConfigDict(ROWS[name]), **changes)
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
    net = models.create(name, num_classes=10, image_size=8, in_channels=1, **ROWS[name])
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


class FamiliesTest(absltest.TestCase):
    def test_every_family_has_a_row(self):
        missing = {models.family(name) for name in models.available()} - {
            models.family(name) for name in (*ROWS, "convnext_n")
        }
        self.assertEmpty(missing)


@pytest.mark.slow
class GoldenTest(parameterized.TestCase):
    """Float64 of one network of each family; all of them: `python tools/check.py --matrix`."""

    @parameterized.parameters(
        ("convnext_t_cvst", "Singh2023Revisiting_ConvNeXt-T-ConvStem"),
        ("iso_convnext_s", "meta_convnext_isotropic_small"),
        ("vit_s_cvst", "Singh2023Revisiting_ViT-S-ConvStem"),
        ("cait_xxs24", "cait_xxs24_224"),
        ("resnet18", "Salman2020Do_R18"),
    )
    def test_float64(self, name, listing):
        parity.check_golden(self, name, listing, dtype="float64")


@pytest.mark.matrix
class MatrixTest(parameterized.TestCase):
    @parameterized.parameters(*sorted(ROWS))
    def test_tools(self, name):
        check_tools(self, name)

    @parameterized.parameters("xcit_n12", "swin_b")
    def test_autoattack(self, name):
        check_autoattack(self, name)


if __name__ == "__main__":
    absltest.main()
