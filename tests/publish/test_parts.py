"""Parts of exports and certificates by themselves: which weights, which files, which verdicts."""

import contextlib
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.data.splits.subsets import ROBUSTBENCH_SHA256
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.models.published import PUBLISHED
from jaxrobust.publish import confirm, robustbench_entry
from jaxrobust.weights.store import weights_folder
from jaxrobust.weights.store.hashes import file_sha256
from tests.support import paths, sweeps
from tests.support.modules import hidden

try:
    import torch

    from jaxrobust.publish import certificate, export_torch, references, torch_networks
except ImportError:
    torch = None


@absltest.skipIf(torch is None, paths.PARITY)
class PublishTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.staged, self.out = (Path(self.create_tempdir(name)) for name in ("staged", "out"))

    def write(self, folder, **files):
        for name, text in files.items():
            path = folder / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    def found(self):
        files = [p for p in self.out.rglob("*") if p.is_file()]
        return {str(p.relative_to(self.out)): p.read_text() for p in files}

    def test_again(self):
        self.write(self.out, net="1", x_dot_certificate_dot_json="old", mine="m")
        self.write(self.staged, net="1", x_dot_certificate_dot_json="new", sub__more="2")
        export_torch.publish(self.staged, self.out)
        expected = {"net": "1", "x.certificate.json": "new", "sub/more": "2", "mine": "m"}
        self.assertEqual(self.found(), expected)

    def test_a_move_that_fails_leaves_what_was_there(self):
        self.write(self.out, a="same")
        self.write(self.staged, a="same", b="new", c="new")
        replace = os.replace

        def fails(source, target):
            if Path(target).name == "c":
                raise OSError("no")
            replace(source, target)

        with mock.patch.object(os, "replace", fails), self.assertRaisesRegex(OSError, "no"):
            export_torch.publish(self.staged, self.out)
        self.assertEqual(self.found(), {"a": "same"})


@absltest.skipIf(torch is None, paths.PARITY)
class CertificateTest(absltest.TestCase):
    def test_what_was_not_compared_is_no_difference(self):
        unknown = {"agrees": None, "reference": None, "missing": "no torch", "faults": []}
        self.assertIs(certificate.checked(unknown, "it"), unknown)
        with self.assertRaisesRegex(certificate.Differs, "^it and its reference differ"):
            certificate.checked(unknown | {"agrees": False}, "it")

    def test_what_is_off_by_more_than_rounding(self):
        def faults(relative, rounding=0.0):
            names = {"reference": 3, "matched": 3, "equal": 3, "differing": []}
            single = {"relative": relative, "reference_rounding": rounding}
            logits = {"float32": single, "float64": {"relative": 1e-10}}
            gradients = {"float64": {"relative": 1e-8}}
            return certificate._faults({"names": names, "logits": logits, "gradients": gradients})

        self.assertEmpty(faults(0.9e-5))
        self.assertEmpty(faults(1.9e-5, 1e-5))  # twice the reference's own
        for given in ((1.1e-5,), (2.1e-5, 1e-5), (float("nan"), 1e-5)):
            (said,) = faults(*given)
            self.assertRegex(said, "^logits differ by .* in float32, more than")

    def test_names_and_arrays_that_are_not_the_references(self):
        def said(**names):
            names = {"reference": 5, "matched": 5, "equal": 5, "differing": []} | names
            fine = {"float32": {"relative": 0.0}, "float64": {"relative": 0.0}}
            return certificate._faults({"names": names, "logits": fine, "gradients": fine})

        self.assertEmpty(said())
        self.assertEqual(
            said(matched=3, equal=1, differing=["a", "b", "c", "d"]),
            ["2 names of the reference are missing here", "2 arrays differ (a, b, c)"],
        )
        self.assertEqual(said(equal=4, differing=["a"]), ["1 arrays differ (a)"])

    def test_an_import_is_certified_by_timms_names_where_the_loader_fails(self):
        asked, certified = [], {"agrees": True}

        def reference(network, source, layout, which):
            asked.append((layout, which))
            if layout != "timm":
                raise RuntimeError("Missing key(s)")
            return "reference"

        with (
            mock.patch.object(references, "reference", reference),
            mock.patch.object(certificate, "certify", return_value=certified) as certify,
            mock.patch.object(certificate, "checked", lambda *given: given),
        ):
            found = certificate.of_import("network", Path("w.pt"), "Wong2020Fast", "ema")
        self.assertEqual(asked, [("Wong2020Fast", "ema"), ("timm", "ema")])
        self.assertEqual(found, (certified, "w.pt"))
        compared = {"theirs": Path("w.pt")}
        certify.assert_called_once_with("network", "reference", compared=compared)
        with self.assertRaisesRegex(ValueError, "^--against nowhere.pt: no such file$"):
            certificate.compare(Path("w.safetensors"), Path("nowhere.pt"))

    def test_the_file_beside_which_it_is_written_is_one_of_those_compared(self):
        weights = Path(self.create_tempfile("net.pt", "weights").full_path)
        own = {"name": weights.name, "sha256": file_sha256(weights)}
        other = {"name": "x", "sha256": "0"}
        for before, expected in (
            ({"theirs": own, "ours": other}, {"theirs": own, "ours": other}),
            ({"theirs": other}, {"theirs": other, "ours": own}),
            (
                {"theirs": other, "ours": {"name": "y", "sha256": "1"}},
                {"theirs": other, "ours": own},
            ),
        ):
            path = certificate.write(weights, {"files": before})
            self.assertEqual(json.loads(path.read_text())["files"], expected)

    def compared(self, about=None, **how):
        folder = Path(self.create_tempdir())
        weights, against = folder / "ours", folder / "theirs.pt"
        weights.mkdir()
        against.write_text("x")
        calls = {}
        network = SimpleNamespace(image_size=8)

        def certify(*given, **rest):
            calls["certify"] = rest
            return {}

        def reference(*given):
            calls["layout"] = given[2]

        with (
            mock.patch.object(weights_folder, "about", lambda folder: about),
            mock.patch.object(certificate.sources, "at", lambda path: path),
            mock.patch.object(certificate.reading, "artifact_of", lambda source: "artifact"),
            mock.patch.object(
                certificate.load, "fitted", lambda a, name, **k: calls.update(name=name) or network
            ),
            mock.patch.object(references, "reference", reference),
            mock.patch.object(certificate, "certify", certify),
            mock.patch.object(certificate, "write", lambda file, found: calls.update(at=file)),
            mock.patch.object(certificate, "lines", lambda found: []),
            mock.patch.object(certificate.side_by_side, "photographs", lambda *given: given),
            mock.patch("builtins.print"),
        ):
            certificate.compare(weights, against, **how)
        self.assertEqual(calls["at"], weights / weights_folder.WEIGHTS)
        self.assertEqual(calls["certify"]["compared"], {"ours": calls["at"], "theirs": against})
        return calls["layout"], calls["name"], calls["certify"]["images"]

    def test_names(self):
        key = "Salman2020Do_R18"
        self.assertEqual(self.compared(), ("timm", None, None))
        self.assertEqual(self.compared(model="vit_s"), ("timm", "vit_s", None))
        self.assertEqual(self.compared(model=key), (key, "resnet18", None))
        self.assertEqual(self.compared(about={"published_id": key}), (key, None, None))
        folder = Path("photographs")
        self.assertEqual(self.compared(images=folder)[2], (folder, 8))


@absltest.skipIf(torch is None, paths.PARITY)
class ReferenceTest(parameterized.TestCase):
    """With whose arrays a reference is filled."""

    def rebuilt(self, stored, wanted=("a", "b"), normalised=False):
        net = torch.nn.ParameterDict({name: torch.zeros(2) for name in wanted})
        stats = {"normalize.mean": np.float32([0.5]), "normalize.std": np.float32([0.25])}
        network = SimpleNamespace(name="n", normalised=normalised, stats=stats, params={})
        ours = {name: np.full(2, 7, np.float32) for name in wanted}
        with (
            mock.patch.object(references, "_independent", lambda network: (net, "timm 9")),
            mock.patch.object(references.files, "read", lambda path, weights_kind: stored),
            mock.patch.object(references, "named", lambda network, wrapped: ours),
        ):
            found = references._rebuilt(network, Path("x.pt"), None)
        self.assertFalse(found.net.training)
        return found

    def test_of_the_file_where_it_fits(self):
        arrays = {"a": np.float32([1, 2]), "b": np.float32([3, 4])}
        found = self.rebuilt(arrays)
        self.assertEqual(found.net["b"].tolist(), [3, 4])
        self.assertEqual(found.weights, "read from the file by name")
        for other in (
            {"a": arrays["a"]},
            arrays | {"c": arrays["a"]},
            arrays | {"b": np.float32([1, 2, 3])},
        ):
            found = self.rebuilt(other)
            self.assertEqual(found.net["a"].tolist(), [7, 7])
            self.assertIn("ours, under its names", found.weights)

    def test_its_normalisation_is_the_files_where_it_has_one(self):
        arrays = {"a": np.float32([1, 2]), "b": np.float32([3, 4])}
        normalize = self.rebuilt(arrays, normalised=True).net.normalize
        self.assertEqual((normalize.mean.item(), normalize.std.item()), (0.5, 0.25))
        own = {"normalize.mean": np.float32([0.1]), "normalize.std": np.float32([0.2])}
        normalize = self.rebuilt(arrays | own, normalised=True).net.normalize
        self.assertAlmostEqual(normalize.mean.item(), 0.1)
        self.assertAlmostEqual(normalize.std.item(), 0.2)

    def test_timms_network_where_nothing_deviates(self):
        network = SimpleNamespace(
            name="resnet18", options={}, num_classes=5, in_channels=1, image_size=32
        )
        made = []

        def built(name, **how):
            made.append((name, how))
            return "net"

        with (
            mock.patch.object(torch_networks, "network", built),
            mock.patch.object(torch_networks, "source", lambda name: "timm 9"),
        ):
            self.assertEqual(references._independent(network), ("net", "timm 9"))
            expected = {"img_size": 32, "num_classes": 5, "in_chans": 1}
            self.assertEqual(made, [("resnet18", expected)])
            network.options = {"drop_path": 0.5, "small_stem": True}
            self.assertEqual(references._independent(network), (None, ""))

    def test_of_robustbenchs_loader_where_it_is(self):
        key, own = "Salman2020Do_R18", Path(self.create_tempfile("net.pt", "own").full_path)
        seen = []

        def load_model(name, *, model_dir, **where):
            link = Path(model_dir) / PUBLISHED[key].file
            seen.append((name, where, os.environ["TORCH_HOME"] == model_dir, link.read_text()))
            print("Downloading")
            return "net"

        there = SimpleNamespace(load_model=load_model)
        network = SimpleNamespace(name="resnet18")
        before = dict(os.environ)
        with (
            mock.patch.dict("sys.modules", {"robustbench": there, "robustbench.utils": there}),
            mock.patch.object(torch_networks, "import_robustbench") as imported,
            mock.patch.object(references.importlib.metadata, "version", lambda name: f"{name} 7"),
            mock.patch.object(references, "_rebuilt", lambda *given: given),
            contextlib.redirect_stdout(io.StringIO()) as said,
        ):
            found = references.reference(network, own, key)
            self.assertEqual(
                found, ("net", "robustbench robustbench 7", True, "by its load_model()", key)
            )
            where = {"dataset": "imagenet", "threat_model": "Linf"}
            self.assertEqual(seen, [(key, where, True, "own")])
            self.assertEqual(said.getvalue(), "")
            for layout in ("timm", "Standard_R50"):  # no file, no loader
                expected = (network, own, "raw")
                self.assertEqual(references.reference(network, own, layout, "raw"), expected)
            self.assertEqual(imported.call_count, 1)
            imported.side_effect = ImportError("not there")
            self.assertEqual(references.reference(network, own, key), (network, own, None))
        self.assertEqual(dict(os.environ), before)
        with hidden("torch"):
            self.assertIsNone(references.reference(network, own, key))

    def test_deviations(self):
        network = SimpleNamespace(name="resnet18", options={"small_stem": True, "drop_path": 0.3})
        found = references.deviations(network, "resnet18")
        self.assertEqual(found, {"small_stem": (True, False)})
        network.options = {}
        self.assertEqual(references.deviations(network, "resnet18"), {})
        self.assertIn("bottleneck", references.deviations(network, "resnet50"))


class EntryTest(parameterized.TestCase):
    def record(self, **changes):
        row = {"dataset": "imagenet2012", "split": "validation@robustbench", "image_ids": "0..4999"}
        row |= {"ids_sha256": ROBUSTBENCH_SHA256, "method": "autoattack standard"}
        row |= {"attacks": [{"name": "apgd-ce", "norm": "linf", "epsilon": 4 / 255}]}
        return AccuracyRecord.from_json(row | {"dtype": "float32"} | changes)

    @sweeps.rows(
        ({}, ""),
        ({"ids_sha256": "0" * 64}, "are not the 5,000 images of RobustBench's list"),
        ({"ids_sha256": None}, "are not the 5,000 images of RobustBench's list"),
        ({"dtype": "bfloat16"}, "its network computes in bfloat16, not float32"),
        ({"image_ids": "0..999"}, "its images are 0..999, not 0..4999"),
        ({"attacks": []}, "its threats are , not linf 4/255"),
        ({"method": None}, "its attack is not AutoAttack, not autoattack standard"),
    )
    def test_of_imagenet(self, changes, message):
        lacks = robustbench_entry.lacks(self.record(**changes))
        self.assertEqual(len(lacks), bool(message), lacks)
        if message:
            self.assertIn(message, lacks[0])

    def test_the_last_one_counts(self):
        file = Path(self.create_tempfile("results.jsonl").full_path)
        keys = dict.fromkeys(robustbench_entry._KEYS)
        keys |= {"flags": {}, "attacks": []}
        rows = [
            keys
            | self.record().to_json()
            | {"weights_sha256": sha, "evaluation": name, "robust": r}
            for sha, name, r in (("a" * 64, "e1", 0.1), ("a" * 64, "e2", 0.2), ("ab", "e3", 0.3))
        ]
        rows.append(rows[1] | {"evaluation": "e4", "dtype": "bfloat16"})
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = [robustbench_entry.find(file, "a" * 64, one) for one in (None, "e1")]
        self.assertEqual([record.evaluation for record in found], ["e2", "e1"])
        with self.assertRaisesRegex(ValueError, "has no evaluation e9"):
            robustbench_entry.find(file, "a" * 64, "e9")
        with self.assertRaisesRegex(
            ValueError, "has no record of these weights .sha256 " + "b" * 12
        ):
            robustbench_entry.find(file, "b" * 64, None)
        with self.assertRaisesRegex(ValueError, "computes in bfloat16"):
            robustbench_entry.find(file, "a" * 64, "e4")


@absltest.skipIf(torch is None, paths.PARITY)
class VerdictsTest(absltest.TestCase):
    def test_pyautoattack_is_asked_in_its_own_words(self):
        calls = []

        class AutoAttack:
            def __init__(self, net, **how):
                calls.append((net, how))

            def run_standard_evaluation(self, x, y, batch_size):
                calls.append((tuple(x.shape), x.dtype, y.tolist(), batch_size))
                return x, torch.tensor([3, 0, 5])

        net = torch.nn.Linear(2, 2).double()
        images = np.zeros((3, 4, 5, 2), np.float32)
        ball = robustbench_entry.Threat("l2", 0.5)
        library = SimpleNamespace(AutoAttack=AutoAttack)
        found = confirm._theirs(library, net, images, np.array([3, 1, 5]), ball)
        self.assertEqual(found.tolist(), [True, False, True])
        own, how = calls[0]
        self.assertFalse(own.training or own.weight.requires_grad)
        self.assertEqual(own.weight.dtype, torch.float32)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        expected = {"norm": "L2", "eps": 0.5, "version": "standard", "seed": 0, "device": device}
        self.assertEqual(how, expected)
        self.assertEqual(calls[1], ((3, 2, 4, 5), torch.float32, [3, 1, 5], 250))

    def test_the_exported_network_is_attacked(self):
        given = SimpleNamespace(layout="module", record=Path("r.jsonl"), confirm=8, data_dir="d")
        subject, asked = SimpleNamespace(network="network"), []

        def reference(*given):
            asked.append(given)
            return SimpleNamespace(net="net") if len(asked) == 1 else None

        with (
            mock.patch.object(references, "reference", reference),
            mock.patch.object(robustbench_entry, "ledger_of", lambda *given: ("ledger", *given)),
            mock.patch.object(confirm, "verdicts", lambda *given, **how: (given, how)),
        ):
            found = export_torch._confirmed(given, subject, "record", Path("net.pt"))
            with self.assertRaisesRegex(ValueError, "^--confirm needs PyTorch: pip install"):
                export_torch._confirmed(given, subject, "record", Path("net.pt"))
        ledger = ("ledger", Path("r.jsonl"), "record")
        self.assertEqual(found, (("net", "record", ledger, 8), {"data_dir": "d"}))
        self.assertEqual(asked[0], ("network", Path("net.pt"), "module"))
