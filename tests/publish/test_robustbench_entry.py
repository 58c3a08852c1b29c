"""Leaderboard entries for CIFAR next to ImageNet, and what pyautoattack confirms of them."""

import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import evaluation, models
from jaxrobust.data import evaluation_batches, open_source
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.publish import confirm, robustbench_entry
from jaxrobust.weights.load import Network
from tests.support import paths, sweeps
from tests.support.modules import hidden
from tests.support.random_weights import drawn

SHA256 = "f" * 64
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")


def record(dataset="cifar10", norm="linf", epsilon=8 / 255, **changes) -> dict:
    """The record of standard AutoAttack on all 10,000 test images."""
    ball = {"norm": norm, "epsilon": epsilon}
    model = {"name": "convnext_n", "num_classes": 10, "image_size": 32, "options": {}}
    return {
        "time": "2026-11-21T10:00:00+00:00",
        "evaluation": "abc123",
        "commit": "0123456789abcdef",
        "weights": "train, step 7, ema",
        "weights_sha256": SHA256,
        "dataset": dataset,
        "split": "test",
        "image_ids": "0..9999",
        "preprocessing": "none",
        "dtype": "float32",
        "method": "autoattack standard",
        "attacks": [ball | {"name": name} for name in ATTACKS],
        "clean": 0.8123,
        "robust": 0.4567,
        "seed": 3,
        "flags": {},
        "versions": {"jax": "0.10"},
        "device": "1 x cpu",
        "model": model,
    } | changes


typed = AccuracyRecord.from_json


class CifarTest(parameterized.TestCase):
    def find(self, *rows):
        path = Path(self.create_tempfile("results.jsonl").full_path)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return robustbench_entry.find(path, SHA256, None)

    @sweeps.rows(
        ("cifar10", "linf", 8 / 255, "8/255", "Linf"),
        ("cifar10", "l2", 0.5, "0.5", "L2"),
        ("cifar100", "linf", 8 / 255, "8/255", "Linf"),
        ("cifar100", "l2", 0.5, "0.5", "L2"),
    )
    def test_entries(self, dataset, norm, epsilon, eps, threat):
        found = self.find(record(dataset, norm, epsilon))
        files = robustbench_entry.files("Me2026Small", found, "net.pt", "0" * 64)
        place, issue = files.keys()
        self.assertEqual(place, f"model_info/{dataset}/{threat}/Me2026Small.json")
        hand = robustbench_entry.BY_HAND
        entry = {
            "link": hand,
            "name": hand,
            "authors": hand,
            "additional_data": hand,
            "number_forward_passes": 1,
            "dataset": dataset,
            "venue": hand,
            "architecture": "ConvNeXt-N",
            "eps": eps,
            "clean_acc": "81.23",
            "reported": "45.67",
            "autoattack_acc": "45.67",
            "unreliable": False,
        }
        self.assertEqual(json.loads(files[place]), entry)
        self.assertEqual([*json.loads(files[place])], [*entry])  # RobustBench's order
        for text in (
            f"- **Threat Model**: {threat}\n",
            f"- **eps**: {eps}\n",
            f"on the 10,000 test images ({dataset}, test), preprocessing none, float32, seed 3",
        ):
            self.assertIn(text, files[issue])
        unlisted = "RobustBench has no leaderboard for cifar100, L2 yet."
        self.assertEqual(unlisted in files[issue], (dataset, norm) == ("cifar100", "l2"))

    def test_names_of_prepared_data(self):
        for name in ("cifar10", "tfds:cifar10", "cifar10:3.0.2"):
            self.assertEmpty(robustbench_entry.lacks(typed(record(name))))
        self.assertEqual(
            robustbench_entry.protocol_of(typed(record("cifar100"))).dataset, "cifar100"
        )
        self.assertEqual(
            robustbench_entry.protocol_of(typed(record("mycifar10"))).dataset, "imagenet"
        )

    def test_one_of_several_balls_is_not_enough(self):
        own = record("cifar10")
        other = [attack | {"epsilon": 4 / 255} for attack in own["attacks"]]
        (lack,) = robustbench_entry.lacks(typed(own | {"attacks": own["attacks"] + other}))
        self.assertRegex(lack, "its threats are linf 0.03137, linf 0.01569, not linf 8/255")
        several = [own["attacks"][0] | {"norm": norm} for norm in ("l1", "l2")]
        found = robustbench_entry.protocol_of(typed(own | {"attacks": several}))
        self.assertEqual(found.norm, "Linf")  # a union is meant for no other leaderboard

    @sweeps.rows((8 / 255, 0), (np.float32(8 / 255), 0), (0.0314, 1), (7.9 / 255, 1))
    def test_a_radius_that_is_nearly_the_leaderboards(self, epsilon, lacks):
        """One that was rounded to float32 is the same, and 0.0314 is not 8/255."""
        found = robustbench_entry.lacks(typed(record("cifar10", "linf", float(epsilon))))
        self.assertLen(found, lacks, found)

    def test_replayed_images(self):
        replayed = record("cifar10") | {"replayed": [{"ledger": "ledger-1"}]}
        (lack,) = robustbench_entry.lacks(typed(replayed))
        self.assertRegex(lack, "of other evaluations were replayed; evaluate with --noreplay")

    @sweeps.rows(
        ({"epsilon": 4 / 255}, r"its threats are .*0\.015.*, not linf 8/255", "linf", "8/255"),
        ({"norm": "l2", "epsilon": 1.0}, "its threats are .*, not l2 0.5", "l2", "0.5"),
        ({"image_ids": "0..999"}, "its images are 0..999, not 0..9999", "linf", "8/255"),
        ({"split": "train"}, "cifar10, split train, are not the test split", "linf", "8/255"),
        ({"method": "apgd-ce"}, "its attack is apgd-ce, not autoattack st", "linf", "8/255"),
        ({"method": "fast version"}, "its attack is fast version, not autoatt", "linf", "8/255"),
        (
            {"preprocessing": "bicubic-36-crop-32"},
            "its preprocessing is bicubic-36-crop-32",
            "linf",
            "8/255",
        ),
    )
    def test_what_does_not_count(self, changes, message, norm, eps):
        with self.assertRaisesRegex(
            ValueError,
            f"not an AutoAttack accuracy as RobustBench defines it, because.*{message}.*evaluate .*"
            f"--dataset cifar10 --split test --norm {norm} --epsilon {eps} --attack autoattack",
        ):
            self.find(record(**changes))

    def test_confirmation_stands_in_the_issue(self):
        said = "pyautoattack 0.2.0 ...: 8 of 8 verdicts agree"
        text = robustbench_entry.issue("Me2026Small", typed(record()), "net.pt", "0" * 64, said)
        self.assertIn(f"with jaxrobust's implementation; {said}\n", text)

    def test_an_evaluation_of_a_network_of_the_zoo(self):
        own = record(method="apgd-ce + apgd-t", replayed=[{"ledger": "ledger-1"}])
        text = robustbench_entry.external_evaluation(typed(own), "points.pt", "0" * 64)
        for line in (
            "+ **Leaderboard(s):** cifar10, Linf, eps 8/255\n",
            f"URL of points.pt; sha256 {'0' * 64})\n",
            "+ **Robust accuracy:** 45.67%\n",
            "the method used:** apgd-ce + apgd-t, float32, seed 3, with jaxrobust's",
        ):
            self.assertIn(line, text)
        for changes, said in (
            ({"image_ids": "0..999"}, "its images are 0..999, not 0..9999"),
            ({"epsilon": 4 / 255}, "its threats are .*, not linf 8/255"),
            ({"dataset": "cifar100", "norm": "l2", "epsilon": 0.5}, "has none for cifar100, L2"),
        ):
            with self.subTest(said), self.assertRaisesRegex(ValueError, f"no leaderboard.*{said}"):
                robustbench_entry.external_evaluation(typed(record(**changes)), "x.pt", "0")


class ConfirmTest(parameterized.TestCase):
    """Digits in place of CIFAR: the verdicts are read and compared in the same way."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.ledger = self.folder / "ledger-abc123.jsonl"
        self.record = record("digits", image_ids="0..7", robust=3 / 8) | {
            "model": {"name": "convnext_n", "num_classes": 10, "image_size": 8, "options": {}}
        }
        rows = [{"identity": {}}]
        for image in range(6):  # the others were misclassified
            rows.append({"image": image, "attack": "apgd-ce", "fooled": image >= 4})
            if image < 4:
                rows.append({"image": image, "attack": "square", "fooled": image == 3})
        self.write(rows)

    def write(self, rows):
        self.ledger.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def verdicts(self, theirs, count=8):
        try:
            import pyautoattack  # noqa: F401
        except ImportError:
            self.skipTest(paths.PARITY)
        seen = {}

        def run(library, net, images, labels, ball):
            seen.update(images=images, labels=labels, ball=ball)
            return np.array(theirs[: len(images)])

        with mock.patch.object(confirm, "_theirs", run):
            said = confirm.verdicts(None, typed(self.record), self.ledger, count)
        return said, seen

    def test_equal(self):
        said, seen = self.verdicts([True] * 3 + [False] * 5)
        self.assertRegex(
            said, r"^pyautoattack 0.2.0 on .*, 8 of the record's images: 8 of 8 verdicts"
        )
        self.assertTrue(said.endswith("agree"))
        self.assertEqual(seen["images"].shape, (8, 8, 8, 1))
        self.assertBetween(seen["images"].max(), 0.9, 1.0)
        labels = [open_source("digits", "test")[i].label for i in range(8)]
        self.assertEqual(seen["labels"].tolist(), labels)
        self.assertEqual((seen["ball"].norm, seen["ball"].epsilon), ("linf", 8 / 255))

    def test_others_are_named(self):
        said, _ = self.verdicts([True, False, True, True, False, False, False, False])
        self.assertIn("6 of 8 verdicts agree, but not for image 1 (robust here), 3 (fooled", said)
        said, _ = self.verdicts([True] * 8, count=3)
        self.assertIn("3 of the record's images: 3 of 3 verdicts agree", said)
        said, _ = self.verdicts([True] * 3 + [False] * 5, count=100)
        self.assertIn("8 of 8", said)

    def test_of_many_others_eight_are_named(self):
        self.record |= {"image_ids": "0..8", "robust": 3 / 9}
        said, _ = self.verdicts([False] * 3 + [True] * 6, count=9)
        self.assertRegex(said, r"0 of 9 verdicts agree.* 7 \(fooled here\), \.\.\.$")

    def test_a_ledger_of_several_hosts(self):
        rows = [json.loads(line) for line in self.ledger.read_text().splitlines()]
        self.write(rows[:3])
        other = self.folder / "ledger-abc123.process-1.jsonl"
        other.write_text("".join(json.dumps(row) + "\n" for row in rows[3:]))
        self.assertIn("8 of 8", self.verdicts([True] * 3 + [False] * 5)[0])

    def test_no_ledger_or_anothers(self):
        self.record["robust"] = 0.5
        with self.assertRaisesRegex(ValueError, "has 3 robust images of 8, but its record says 50"):
            self.verdicts([True] * 8)
        self.ledger.unlink()
        with self.assertRaisesRegex(
            ValueError, "ledger-abc123.jsonl is missing or empty.*results.jsonl"
        ):
            self.verdicts([True] * 8)

    def test_without_pyautoattack(self):
        with (
            hidden("pyautoattack"),
            self.assertRaisesRegex(
                ValueError, r"--confirm needs pyautoattack: pip install 'jaxrobust\[parity\]'"
            ),
        ):
            confirm.verdicts(None, typed(self.record), self.ledger, 8)

    @pytest.mark.slow
    def test_pyautoattack_itself(self):
        """The same verdicts on the exported module, of a network that some images withstand."""
        try:
            import torch  # noqa: F401

            from jaxrobust.publish import layouts, network_account, references, torch_networks

            torch_networks.import_timm()
            import pyautoattack  # noqa: F401
        except ImportError:
            self.skipTest(paths.PARITY)
        options = {"depths": (1,), "dims": (8,), "stem_strides": (1,)}
        sizes = {"num_classes": 10, "image_size": 8}
        params, stats = drawn("convnext_n", in_channels=1, **sizes, **options)
        source = open_source("digits", "test[:12]")
        (batch,) = evaluation_batches(source, batch_size=12, image_size=8)
        images = batch.images / np.float32(255)
        net = models.create("convnext_n", in_channels=1, **sizes, **options)
        with jax.numpy_dtype_promotion("standard"):
            logits_fn = jax.tree_util.Partial(lambda *p: net.apply(*p)[0], params, stats)
            labels = np.asarray(logits_fn(images)).argmax(1)  # all right before the attacks
            self.ledger.unlink()
            ball = {"norm": "linf", "epsilon": 0.01}
            found = evaluation.autoattack(
                logits_fn, images, labels, **ball, ledger=self.ledger, verbose=False
            )
        self.assertBetween(found.robust.sum(), 1, 11, "else nothing is compared")
        self.record |= {"image_ids": "0..11", "robust": float(found.robust.mean())}
        self.record["attacks"] = [attack | ball for attack in found.attacks]
        network = Network("convnext_n", params, stats, 10, 8, options)
        file = layouts.stage(self.folder, network, network_account.Account("drawn"), "module")
        reference = references.reference(network, file, "module")
        read = np.arange(12), images, labels.astype(int)
        with mock.patch.object(confirm, "_images", lambda *unused: read):
            said = confirm.verdicts(reference.net, typed(self.record), self.ledger, 12)
        self.assertIn("12 of its images: 12 of 12 verdicts agree", said)
