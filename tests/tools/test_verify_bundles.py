"""The workflow that verifies the bundles of a pull request: its script, in a repository."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import yaml
from absl.testing import absltest

from tests.support import bundles, corrupted_bundles, paths

FILE = paths.ROOT / "tools" / "launch" / "verify_bundles.yml"


class WorkflowTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.create_tempdir())
        self.honest = self.enterContext(tempfile.TemporaryDirectory())
        self.bundle = bundles.honest(Path(self.honest))
        self.place = self.root / "board"
        self.place.mkdir()
        self.served = self.root / "served"
        self.served.mkdir()
        pixels = np.rint(self.bundle.images * 255).astype(np.uint8)
        padded = np.zeros((bundles.SPLIT, *bundles.SHAPE), np.uint8)
        padded[: bundles.N] = pixels
        labels = np.zeros(bundles.SPLIT, np.int32)
        labels[: bundles.N] = self.bundle.labels
        np.save(self.served / "noise.npy", padded)
        np.save(self.served / "noise.labels.npy", labels)
        self.git("init", "-q", "-b", "main")
        program = self.bundle.folder / "verify.py"
        done = subprocess.run(["sha256sum", program], capture_output=True, text=True, check=True)
        (self.place / "programs.sha256").write_text(done.stdout)
        self.base = self.commit()

    def git(self, *words) -> str:
        own = ("-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *own, *words], cwd=self.place, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def commit(self) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "x", "--allow-empty")
        return self.git("rev-parse", "HEAD")

    def add(self, name="noise/linear", *, weights=None) -> Path:
        folder = self.place / "bundles" / name
        shutil.copytree(self.bundle.folder, folder)
        network = self.place / "networks" / f"{name}.py"
        network.parent.mkdir(parents=True, exist_ok=True)
        network.write_text(bundles.LINEAR_MODULE)
        own = bundles._WEIGHTS if weights is None else weights
        np.save(network.with_suffix(".npy"), own)
        return folder

    def ran(self) -> tuple[int, str]:
        """Exit code and output of the script, on what is committed now."""
        self.commit()
        steps = yaml.safe_load(FILE.read_text())["jobs"]["verify"]["steps"]
        binaries = self.root / "bin"
        binaries.mkdir(exist_ok=True)
        python = binaries / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "$@"\n')
        python.chmod(0o755)
        settings = {"BASE": self.base, "IMAGES_URL": self.served.as_uri()}
        path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", steps[-1]["run"]], cwd=self.place, capture_output=True, text=True,
            env=os.environ | settings | {"PATH": path},
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def test_what_the_workflow_may_do(self):
        flow = yaml.safe_load(FILE.read_text())
        self.assertEqual(flow[True], "pull_request")  # `on`; the code of a stranger gets no secrets
        self.assertEqual(flow["permissions"], {"contents": "read"})
        checkout = flow["jobs"]["verify"]["steps"][0]["with"]
        self.assertEqual(checkout, {"fetch-depth": 0, "persist-credentials": False})
        self.assertNotIn("secrets.", FILE.read_text())
        self.assertNotIn("${{", flow["jobs"]["verify"]["steps"][-1]["run"])

    def test_nothing_to_verify(self):
        code, said = self.ran()
        self.assertEqual((code, said.strip()), (0, "0 bundles or networks were changed"))

    @absltest.skipUnless(importlib.util.find_spec("torch"), paths.PARITY)
    def test_bundles_of_a_request(self):
        self.add()
        code, said = self.ran()
        self.assertEqual(code, 0, said)
        self.assertRegex(said, r"(\d+) of \1 fooled: confirmed")
        self.add("noise/other", weights=bundles._WEIGHTS[::-1].copy())
        code, said = self.ran()
        self.assertEqual(code, 1, said)
        self.assertIn("::error::bundles/noise/other: exit code 1", said)
        self.assertIn("bundles/noise/linear", said)  # is verified although another fails
        self.assertNotIn("::error::bundles/noise/linear", said)
        self.base = self.commit()
        code, said = self.ran()
        self.assertEqual((code, said.count("::group::")), (0, 0), said)
        shutil.rmtree(self.place / "bundles" / "noise" / "other")
        np.save(self.place / "networks" / "noise" / "linear.npy", bundles._WEIGHTS[::-1].copy())
        code, said = self.ran()  # a bundle whose network alone is another is looked at
        self.assertEqual(code, 1, said)
        self.assertIn("::error::bundles/noise/linear: exit code 1", said)
        self.assertNotIn("noise/other", said)

    @absltest.skipUnless(importlib.util.find_spec("torch"), paths.PARITY)
    def test_bundles_of_common_corruptions(self):
        own = corrupted_bundles.corrupted(self.root)
        images = corrupted_bundles.stored(self.root / "stored", own.images, own.labels)
        with tarfile.open(self.served / "noisy.tar", "w") as packed:
            packed.add(images, ".")
        for name, weights in (("right", bundles._WEIGHTS), ("wrong", bundles._WEIGHTS[::-1])):
            folder = self.add(f"noisy/{name}", weights=weights.copy())
            shutil.rmtree(folder)
            shutil.copytree(own.folder, folder)
        code, said = self.ran()
        self.assertEqual(code, 1, said)
        self.assertRegex(said, r"160 of 160 answers: confirmed")
        self.assertEqual(said.count("::error::"), 1, said)
        self.assertIn("::error::bundles/noisy/wrong: exit code 1", said)

    def test_a_program_that_is_not_known_does_not_run(self):
        folder = self.add()
        (folder / "verify.py").write_text("print('all is confirmed')\n")
        (self.place / "programs.sha256").write_text("")  # that of the base counts
        code, said = self.ran()
        self.assertEqual(code, 1, said)
        self.assertIn("::error::bundles/noise/linear: verify.py is not in programs.sha256", said)
        self.assertNotIn("all is confirmed", said)
        (folder / "verify.py").unlink()
        code, said = self.ran()
        self.assertIn("::error::bundles/noise/linear: verify.py is not in programs.sha256", said)

    def test_no_file_passes_unseen(self):
        """As a bundle at another depth would, or one whose name Git writes in quotes."""
        for name in ("bundles/linear/verify.py", 'bundles/noise/a"b/verify.py', "networks/all.py"):
            with self.subTest(name):
                path = self.place / name
                path.parent.mkdir(parents=True)
                path.write_text("")
                code, said = self.ran()
                self.assertEqual(code, 1, said)
                self.assertIn("::error::these are not paths of a bundle or a network", said)
                shutil.rmtree(self.place / name.partition("/")[0])
        (self.place / "bundles" / "noise").mkdir(parents=True)
        (self.place / "bundles" / "noise" / "networks.toml").write_text("")
        code, said = self.ran()
        self.assertEqual(code, 0, said)

    def test_names_that_a_shell_would_read(self):
        self.add("noise/$(touch there)")
        code, said = self.ran()
        self.assertEqual(code, 1, said)
        self.assertIn("use letters, digits, - and _ in names", said)
        self.assertFalse((self.place / "there").exists())
