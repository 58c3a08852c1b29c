"""The check of a bundle, with our network and with PyTorch: what is confirmed, what is refused."""

import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import data
from jaxrobust.attacks import ensembles
from jaxrobust.commands import verify
from jaxrobust.evaluation.bundles import claims, claims_torch
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.questions import verification
from jaxrobust.evaluation.records import verdicts
from jaxrobust.weights.store import files, weights_folder
from jaxrobust.weights.trained import runs
from tests.support import bundles, digits_network, paths, result_lines, sweeps
from tests.support.command_line import called
from tests.support.evaluations import call, run_for
from tests.support.outcomes import ended, refused

TORCH = importlib.util.find_spec("torch") is not None
N = 32
FUNCTION = """
from pathlib import Path
import jax.numpy as jnp
import numpy as np
WEIGHTS = jnp.asarray(np.load(Path(__file__).with_name("weights.npy")))
def logits_fn(images):
    return images.reshape(len(images), -1) @ WEIGHTS
def another(images):
    return images.reshape(len(images), -1) @ WEIGHTS[::-1]
"""
LINEAR = """
from pathlib import Path
import numpy as np
import torch
def load():
    net = torch.nn.Linear(64, 10, bias=False)
    weights = np.load(Path(__file__).with_name("weights.npy"))
    net.weight.data = torch.from_numpy(weights.T.copy())
    return torch.nn.Sequential(torch.nn.Flatten(), net)
def nothing():
    return 3
NETWORK = load()
"""


class Case(parameterized.TestCase):
    def refused(self, *words) -> str:
        code, printed, said = called(verify, *words)
        self.assertEqual((code, printed, said.count("\n")), (2, "", 1), said)
        return said

    def changed(self, folder: Path) -> Path:
        """Return a copy of a bundle in which one byte of a difference is another."""
        other = Path(self.create_tempdir()) / "changed"
        shutil.copytree(folder, other)
        path = other / "differences-0.bin"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        return other


@pytest.mark.slow
class RunTest(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.workdir = run_for(cls)
        root = cls.workdir.parent
        cls.bundle = root / "bundle"
        cls.flags = {
            "workdir": str(cls.workdir), "out": str(root / "out"), "attack": "apgd-ce",
            "epsilon": "0.03", "n": N, "bundle": str(cls.bundle),
        }  # fmt: skip
        code, _, said = call(**cls.flags)
        assert code == 0, said
        (cls.record,) = result_lines.read(root / "out")
        cls.found = verdicts.read(root / "out" / cls.record["verdicts"])
        cls.wrong = {
            "misclassified": int((~cls.found.clean).sum()),
            "fooled": int((cls.found.clean & ~cls.found.robust).sum()),
            "standing": int(cls.found.robust.sum()),
        }
        _, (params, stats) = runs.run_weights(cls.workdir)
        cls.arrays = {k: np.asarray(a) for k, a in (params | stats).items()}

    def file(self, *, says: bool, options=None, **changes) -> Path:
        """Write the weights of the run as a file that says what network it holds, or does not."""
        path = Path(self.create_tempdir()) / "weights.safetensors"
        options = options or self.record["model"]["options"]
        files.write(
            path,
            self.arrays | changes,
            weights_folder.metadata("convnext_n", options) if says else {},
        )
        return path

    def test_everything_is_confirmed(self):
        printed, _ = ended(called(verify, self.bundle, "--weights", self.workdir, "--json"))
        *text, last = printed.splitlines()
        plain = json.loads(last)
        self.assertEqual(plain["claimed"], self.wrong)
        self.assertEqual(plain["confirmed"], self.wrong)
        self.assertGreater(self.wrong["fooled"], 5)
        left = self.wrong["standing"] - plain["sample"]["fell"]  # to the check's own attack
        self.assertEqual(plain["robust_at_most"], left / N)
        expected = checks.binomial_interval(left, N)
        np.testing.assert_allclose(plain["interval"], expected, atol=1e-9)
        self.assertEqual((plain["whole"], plain["other_network"]), (True, False))
        self.assertEqual(plain["bundle"], claims.file_sha256(self.bundle / claims.SUMS))
        self.assertRegex(text[0], "convnext_n, apgd-ce, linf 0.03, on digits test")
        self.assertIn("Confirmed: robust accuracy on these images is at most", text[-1])

    def test_an_erased_flag_of_training_is_raised_again(self):
        folder = self.workdir.parent / "trained_on"
        out = str(self.workdir.parent / "trained_on_out")
        ended(call(**self.flags | {"split": "train", "out": out, "bundle": str(folder), "n": 8}))
        self.assertIn("training", claims.read(folder).record["flags"])
        bundles.changed(folder, record={"flags": {}})
        _, printed, _ = called(verify, folder, "--weights", self.workdir)
        self.assertIn("flag training: the weights (or the weights", printed)

    @sweeps.rows(True, False)
    @pytest.mark.slow
    def test_a_file_of_the_same_weights(self, says):
        printed, _ = ended(
            called(verify, self.bundle, "--weights", self.file(says=says), "--batch=5")
        )
        self.assertNotIn("other weights", printed)

    def test_other_weights_are_judged_and_said(self):
        bias = self.arrays["head.fc.bias"]
        path = self.file(says=True, **{"head.fc.bias": bias + np.float32(1e-7)})
        code, printed, _ = called(verify, self.bundle, "--weights", path, "--json")
        self.assertEqual(code, 1, printed)
        self.assertIn("This network or its weights differ from the record's (convnext_n,", printed)
        plain = json.loads(printed.splitlines()[-1])
        self.assertEqual((plain["whole"], plain["other_network"]), (False, True))
        self.assertEqual(plain["confirmed"], self.wrong)  # so little else they are
        strides = {"downsample_strides": [1, 1]}  # the same weights, another network
        path = self.file(says=True, options=self.record["model"]["options"] | strides)
        said = self.refused(self.bundle, "--weights", path)
        self.assertIn("downsample_strides", said)
        path = self.file(says=True, **{"head.fc.bias": bias + 1000 * np.eye(10, dtype="f")[3]})
        code, printed, _ = called(verify, self.bundle, "--weights", path, "--json")
        plain = json.loads(printed.splitlines()[-1])
        three = [int(i) for i, label in enumerate(self.found.labels) if label == 3]
        right = [i for i in three if not self.found.clean[i]]
        fooled = np.flatnonzero(self.found.clean & ~self.found.robust).tolist()
        expected = {"right": sorted({*right, *fooled} & {*three})}
        expected["wrong"] = [i for i in np.flatnonzero(self.found.clean).tolist() if i not in three]
        ids = self.found.image_ids.tolist()
        expected = {why: [ids[i] for i in places] for why, places in expected.items()}
        self.assertEqual(plain["unconfirmed"], expected)

    def test_mistakes(self):
        weights = ("--weights", self.workdir)
        self.assertIn("--batch=0 must be", self.refused(self.bundle, *weights, "--batch=0"))
        nowhere = Path(self.create_tempdir()) / "none.safetensors"
        self.assertIn("no such file", self.refused(self.bundle, "--weights", nowhere))
        said = self.refused(self.bundle, *weights, "--dataset=fake:8x8x3", "--split=test")
        self.assertIn("channels", said)
        wide = self.file(says=True, **{"head.fc.bias": np.zeros(7, np.float32)})
        said = refused(called(verify, self.bundle, "--weights", wide))
        self.assertIn("head.fc.bias: shape (7,)", said)

    def test_pytorch_confirms_every_image(self):
        """The exported network, in another process that has never heard of this package."""
        if not TORCH:
            self.skipTest(paths.PARITY)
        from jaxrobust.commands.conversion import export_weights

        folder = Path(self.create_tempdir())
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            out = ["--layout=module", "--nocertificate", "--out", str(folder / "ship")]
            export_weights.main(["--workdir", str(self.workdir), *out])
        called(verify, self.bundle, "--write_images", folder / "images.npy")
        done = subprocess.run(
            [
                *(sys.executable, "-I", self.bundle / "verify.py", "--device=cpu"),
                *("--images", folder / "images.npy"),
                *("--labels", folder / "images.labels.npy"),
                *("--module", folder / "ship" / "convnext_n.py:load"),
            ],
            capture_output=True,
            text=True,
            cwd=folder,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        fooled = self.wrong["fooled"]
        self.assertIn(f"{fooled} of {fooled} fooled: confirmed", done.stdout)
        self.assertIn("Confirmed: robust accuracy on these images is at most", done.stdout)


class FunctionTest(Case):
    """A function of the user's, and the same network in PyTorch, in this process."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.root = Path(directory.name)
        cls.bundle = cls.root / "bundle"
        np.save(cls.root / "weights.npy", digits_network.ridge())
        (cls.root / "nets.py").write_text(FUNCTION)
        (cls.root / "linear.py").write_text(LINEAR)
        code, _, said = call(
            function=f"{cls.root}/nets.py:logits_fn", dataset="digits", norm="l2", epsilon="0.3",
            attack="apgd-ce", n=N, out=str(cls.root / "out"), bundle=str(cls.bundle),
        )  # fmt: skip
        assert code == 0, said
        called(verify, cls.bundle, "--write_images", cls.root / "images.npy")
        if TORCH:
            spec = importlib.util.spec_from_file_location("bundled", cls.bundle / "verify.py")
            cls.program = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(cls.program)

    def checked(self, *words, images="images.npy", module="linear.py:load"):
        """Exit code, stdout and stderr of the program in the bundle."""
        if not TORCH:
            self.skipTest(paths.PARITY)
        out, said = io.StringIO(), io.StringIO()
        own = ["--images", self.root / images, "--module", f"{self.root}/{module}", *words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            code = self.program.main([str(word) for word in own])
        found = code, out.getvalue(), said.getvalue()
        again, own_said = io.StringIO(), io.StringIO()  # and the file that it was made of
        with contextlib.redirect_stdout(again), contextlib.redirect_stderr(own_said):
            words = ["--bundle", self.bundle, "--device", "cpu", "--batch", "7", *own]
            code = claims_torch.main([str(word) for word in words])
        self.assertEqual((code, again.getvalue(), own_said.getvalue()), found)
        return found

    def test_our_function(self):
        printed, said = ended(
            called(verify, self.bundle, "--function", f"{self.root}/nets.py:logits_fn")
        )
        self.assertIn("l2 0.3, on digits test", printed)
        self.assertRegex(said, r"nets.py:logits_fn on data set 'digits', split 'test'")
        code, printed, said = called(
            verify, self.bundle, "--function", f"{self.root}/nets.py:another"
        )
        self.assertEqual(code, 1, said)
        self.assertIn("This network or its weights differ from the record's", printed)

    @pytest.mark.slow
    def test_pixels(self):
        place, function = self.root / "pixels", f"{self.root}/nets.py:logits_fn"
        code, _, said = call(
            function=function, dataset="digits", norm="l0", epsilon="2", attack="sparse-pgd",
            n=8, out=str(self.root / "pixels_out"), bundle=str(place),
        )  # fmt: skip
        self.assertEqual(code, 0, said)
        words = ("--function", function, "--seed=1", "--json")
        printed, _ = ended(called(verify, place, *words))
        self.assertIn("sparse-pgd, l0 2, on digits test", printed)
        self.assertIn(
            "surviving images, 0 fell to sparse-pgd, sparse-pgd-p (repeat with --seed 1", printed
        )
        rows = bundles.rows_of(place)
        for row in rows:  # claim that the fooled ones stand
            row["verdict"] = "" if "file" in row else row["verdict"]
        bundles.rows_changed(place, rows)
        code, printed, _ = called(verify, place, *words)
        self.assertEqual(code, 1)
        self.assertRegex(printed, "Contradicted: 7 of 8 images .* fell to attacks in its record")

    @sweeps.rows("linf", "l0")
    def test_the_attacks_of_a_method(self, norm):
        attacks = [row._asdict() for row in ensembles.plan(norm, "standard", None, None)]
        record = {"method": "autoattack standard", "attacks": attacks}
        self.assertIsNone(verification._other_attacks(record))
        said = verification._other_attacks(record | {"attacks": attacks[1:]})
        self.assertIn("names the method 'autoattack standard', but its attacks differ", said)

    def test_a_program_that_somebody_changed(self):
        other = Path(self.create_tempdir()) / "changed"
        shutil.copytree(self.bundle, other)
        program = other / "verify.py"
        text = program.read_text()
        program.write_text(text.replace("return 0 if findings.whole else 1", "return"))
        bundles.resigned(other)
        network = ("--function", f"{self.root}/nets.py:logits_fn")
        printed, _ = ended(called(verify, other, *network))
        self.assertIn("verify.py is not the program that this version writes", printed)

    def test_another_size_of_the_split_is_not_confirmed(self):
        other = Path(self.create_tempdir()) / "changed"
        shutil.copytree(self.bundle, other)
        bundles.changed(other, split_images=5000)
        network = ("--function", f"{self.root}/nets.py:logits_fn")
        code, printed, _ = called(verify, other, *network)
        self.assertEqual(code, 1)
        self.assertIn("but the bundle says 5,000: this is another split or version", printed)

    @sweeps.rows(
        ("dataset", "folder:bundle/images"),
        ("split", "test@bundle/fooled.txt"),
    )
    def test_images_that_whoever_claims_may_have_made(self, key, value):
        other = Path(self.create_tempdir()) / "changed"
        shutil.copytree(self.bundle, other)
        bundles.changed(other, record={key: value})
        said = self.refused(other, "--function", f"{self.root}/nets.py:logits_fn")
        self.assertIn(
            f"which the author of the bundle may have made; give your own path, as in --{key}", said
        )
        images = ("--write_images", Path(self.create_tempdir()) / "images.npy")
        self.assertIn("give your own path", self.refused(other, *images))

    def test_in_pytorch(self):
        code, printed, said = self.checked()
        self.assertEqual((code, said), (1, ""), printed)
        self.assertIn("Confirmed except for the labels: robust accuracy", printed)
        self.assertIn("Pass --labels to check", printed)
        code, printed, said = self.checked("--trust-labels")
        self.assertEqual((code, said), (0, ""), printed)
        self.assertIn(
            "the labels come from the bundle and are taken on trust, as requested", printed
        )
        self.assertRegex(printed, r"(\d+) of \1 fooled: confirmed")
        self.assertIn("This program cannot tell", printed)
        printed, _ = ended(
            self.checked("--labels", self.root / "images.labels.npy", module="linear.py:NETWORK")
        )
        self.assertNotIn("--labels", printed)

    def test_images_as_floats_and_too_few(self):
        images = np.load(self.root / "images.npy")
        np.save(self.root / "floats.npy", images / np.float32(255))
        self.assertEqual(self.checked("--trust-labels", images="floats.npy")[0], 0)
        np.save(self.root / "few.npy", images[:5])
        code, printed, _ = self.checked(images="few.npy")
        self.assertEqual(code, 1)
        self.assertIn("not confirmed: not among the given images", printed)

    @sweeps.rows(
        ({"images": "none.npy"}, "none.npy cannot be read as a .npy file"),
        ({"images": "linear.py"}, "linear.py cannot be read as a .npy file"),
        (
            {"images": "channels.npy"},
            r"is uint8\(397, 1, 8, 8\); the bundle needs uint8 or float32",
        ),
    )
    def test_mistakes(self, given, said):
        images = np.load(self.root / "images.npy")
        np.save(self.root / "channels.npy", images.transpose(0, 3, 1, 2))
        code, printed, error = self.checked(**given)
        self.assertEqual((code, printed, error.count("\n")), (2, "", 1), error)
        self.assertRegex(error, said)

    def test_the_images_as_the_attack_leaves_them(self):
        if not TORCH:
            self.skipTest(paths.PARITY)
        import torch

        path = Path(self.create_tempdir()) / "adversarial.pt"
        clean_path = path.with_name("images.npy")
        words = ("--write_adversarial", path, "--write_images", clean_path)
        printed, _ = ended(called(verify, self.bundle, *words))
        self.assertIn(f"{N} images in {path}", printed)
        self.assertTrue(clean_path.is_file())
        self.assertIn("No issue is written: no network has confirmed the bundle", printed)
        self.assertFalse(path.with_suffix(".issue.md").exists())
        points = torch.load(path, weights_only=True).numpy()
        self.assertEqual((points.shape, points.dtype), ((N, 1, 8, 8), np.float32))
        source = data.open_source("digits", "test")
        clean = data.Prepared(source, image_size=8, preprocessing="none", images=N)[:]
        moved = (points.transpose(0, 2, 3, 1) - clean).reshape(N, -1)
        (record,) = result_lines.read(self.root / "out")
        found = verdicts.read(self.root / "out" / record["verdicts"])
        fooled = found.clean & ~found.robust
        self.assertTrue(fooled.any())
        np.testing.assert_array_equal((moved != 0).any(1), fooled)
        self.assertLessEqual(np.linalg.norm(moved, axis=1).max(), 0.3 + 1e-5)
        logits = points.reshape(N, -1) @ np.load(self.root / "weights.npy")
        np.testing.assert_array_equal(logits.argmax(1) == found.labels, found.robust)

    def test_an_issue_is_of_a_network_that_confirms(self):
        if not TORCH:
            self.skipTest(paths.PARITY)
        path = Path(self.create_tempdir()) / "adversarial.pt"
        entry = "jaxrobust.publish.robustbench_entry.external_evaluation"
        for function, expected in (("logits_fn", 0), ("another", 1)):
            network = ("--function", f"{self.root}/nets.py:{function}")
            with mock.patch(entry, return_value="the issue") as issue:
                words = (*network, "--write_adversarial", path)
                code, printed, said = called(verify, self.bundle, *words)
            self.assertEqual(code, expected, said)
            self.assertEqual(issue.call_count, 1 - expected)
            self.assertEqual("No issue is written: no network has" in printed, bool(expected))
            self.assertTrue(path.is_file())
        self.assertEqual(path.with_suffix(".issue.md").read_text(), "the issue")
        words = ("--function", f"{self.root}/nets.py:logits_fn", "--write_adversarial", path)
        _, printed, _ = called(verify, self.bundle, *words)
        self.assertIn("No issue is written: RobustBench has no leaderboard for", printed)

    def test_adversarial_images_of_other_images(self):
        words = (self.bundle, "--write_adversarial", self.root / "x.pt", "--split=train")
        self.assertIn("differs from the evaluated one; give the --data", self.refused(*words))
        said = self.refused(self.bundle, "--write_adversarial", self.root / "x.npy")
        self.assertIn("name a file that ends in .pt", said)
        said = self.refused(self.bundle, "--write_images", self.root / "x.npz")
        self.assertIn("name a file that ends in .npy", said)

    def test_a_changed_byte_and_other_labels(self):
        said = refused(self.checked("--bundle", self.changed(self.bundle)))
        self.assertRegex(said, "differences-0.bin differs from the file .* download the bundle ag")
        labels = np.load(self.root / "images.labels.npy")
        np.save(self.root / "few.labels.npy", labels[:4])
        said = refused(self.checked("--labels", self.root / "few.labels.npy"))
        self.assertIn("--labels has shape (4,), but there are 397 images", said)
        for kind, expected in ((np.uint8, 0), (np.float32, 2)):
            np.save(self.root / "kind.labels.npy", labels.astype(kind))
            code, _, said = self.checked("--labels", self.root / "kind.labels.npy")
            self.assertEqual(code, expected)
            self.assertEqual("labels must be integers" in said, bool(expected))
        np.save(self.root / "other.labels.npy", (labels + 1) % 10)
        code, printed, _ = self.checked("--labels", self.root / "other.labels.npy")
        self.assertEqual(code, 1)
        self.assertIn("not confirmed: a label that differs from the data set's", printed)


@absltest.skipUnless(TORCH, paths.PARITY)
class NetworkTest(absltest.TestCase):
    def test_a_module_of_any_type_judges_in_float32_and_without_dropout(self):
        text = "import torch\nlayers = torch.nn.Flatten(), torch.nn.Dropout(0.5)\n"
        text += "NET = torch.nn.Sequential(*layers, torch.nn.Linear(6, 2)).double()\n"
        text += "with torch.no_grad():\n    NET[2].weight.copy_(torch.arange(12.0).view(2, 6))\n"
        text += "    NET[2].bias.zero_()\n"
        path = self.create_tempfile("net_of_doubles.py", content=text).full_path
        images = np.zeros((1, 1, 2, 3), np.float32)
        images[0, 0, 1, 2] = 1  # the last channel of the last pixel
        found = claims_torch.network(f"{path}:NET", "cpu")(images, [0])
        self.assertEqual((found.dtype, found.tolist()), (np.float32, [[5, 11]]))

    def test_a_module_or_what_returns_one(self):
        text = "import torch\nclass Sum(torch.nn.Module):\n    def forward(self, x):\n"
        text += "        return x.sum((2, 3)) + self.training\n"
        text += "def load():\n    return Sum()\ndef three():\n    return 3\nTWO = 2\n"
        path = self.create_tempfile("net_of_sums.py", content=text).full_path
        images = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)
        for name in ("load", "Sum"):
            logits = claims_torch.network(f"{path}:{name}", "cpu")
            self.assertEqual(logits(images, [0]).tolist(), [[18, 22, 26]])  # of each channel
        for name in ("three", "TWO", "nothing"):
            with self.assertRaisesRegex(ValueError, f":{name} is not a torch.nn.Module; name one"):
                claims_torch.network(f"{path}:{name}", "cpu")
        for name in (path, "net:", ":load", ""):
            with self.assertRaisesRegex(
                ValueError, f"^--module {name} is not of the form FILE.py:NAME, such"
            ):
                claims_torch.network(name, "cpu")
        for file in ("nowhere.py", "no_such.package"):
            with self.assertRaisesRegex(ValueError, f"^--module {file}: .*No "):
                claims_torch.network(f"{file}:load", "cpu")
