"""The wheel `jaxrobust-attacks`: its files, and a script that runs them with JAX alone."""

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

import jaxrobust
from tests.support import paths
from tests.support.layers import imports
from tools.release import attacks_wheel
from tools.release import make as release

SCRIPT = """
import sys
import jax, jax.numpy as jnp
import jaxrobust_attacks
from jaxrobust_attacks import apgd, autoattack, fmn, tasks

weights = jax.random.normal(jax.random.key(0), (48, 4))
network = lambda images: (images.reshape(len(images), -1) - 0.5) @ weights
images = jax.random.uniform(jax.random.key(1), (24, 4, 4, 3))
labels = network(images).argmax(1)
attack = apgd(norm="linf", epsilon=0.03, steps=10)
accuracy = (network(attack(network, jax.random.key(2), images, labels)).argmax(1) == labels).mean()
assert 0 < accuracy < 0.5, accuracy
ball = dict(norm="linf", epsilon=0.03, attacks=["apgd-ce"], version="custom", verbose=False)
first = autoattack(network, images, labels, ledger="evaluation.jsonl", **ball)
again = autoattack(network, images, labels, ledger="evaluation.jsonl", **ball)
assert (first.robust == again.robust).all() and 0 < first.robust.mean() < 1
assert sum(cost.forward for cost in first.costs) and not sum(cost.forward for cost in again.costs)
pixels = lambda images: jnp.stack([images.sum(3) - 1.5, 1.5 - images.sum(3)], 3)
masks = pixels(images).argmax(3)
found = autoattack(
    pixels, images, masks, norm="linf", epsilon=0.2, task=tasks.segmentation(), verbose=False
)
assert found.robust.mean() < 1
print(jaxrobust_attacks.__version__, *sorted({name.split(".")[0] for name in sys.modules}))
"""


def pip(python: str | Path, *words: str) -> None:
    """Install into an environment, or skip the test."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise absltest.SkipTest(f"nothing can be installed here: {done.stderr[-300:]}")


class SourcesTest(parameterized.TestCase):
    def test_needs_only_jax_and_is_small(self):
        folder = Path(self.create_tempdir())
        lines = attacks_wheel.write(folder, "1.2.3")
        self.assertLess(lines, 9_000)
        self.assertGreater(lines, 5_000)
        files = {path: imports(path) for path in folder.rglob("*.py")}
        for path, names in files.items():
            for name, _ in names:
                if name.startswith("jaxrobust"):
                    with self.subTest(path=path, name=name):
                        self.assertIsNotNone(self.file(folder, name))
        about = (folder / "pyproject.toml").read_text()
        self.assertIn('version = "1.2.3"', about)
        self.assertIn('dependencies = ["jax>=', about)
        self.assertEqual(about.count(">="), 5)  # three, Python and setuptools
        self.assertIn("import jaxrobust_attacks", (folder / "README.md").read_text())

    def file(self, folder: Path, name: str) -> Path | None:
        """The file of a module, or of a name in it."""
        for place in (name, name.rpartition(".")[0]):
            path = folder / place.replace(".", "/")
            for file in (path.with_suffix(".py"), path / "__init__.py"):
                if file.is_file() and place.startswith("jaxrobust_attacks"):
                    return file
        return None

    @parameterized.parameters(
        ("import flax", "imports flax, on which jaxrobust-attacks does not depend; move what"),
        ("from rich import box", "imports rich, on which"),
        ("def f():\n    import optax", "imports optax, on which"),
    )
    def test_other_packages_are_refused(self, line, said):
        folder = Path(self.create_tempdir())
        (folder / "jaxrobust" / "attacks").mkdir(parents=True)
        (folder / "jaxrobust" / "attacks" / "__init__.py").write_text(f"import jax\n{line}\n")
        refused = self.assertRaisesRegex(ValueError, f"jaxrobust/attacks/__init__.py {said}")
        with mock.patch.object(attacks_wheel, "ROOT", folder), refused:
            attacks_wheel.closure()

    def test_too_much_is_refused(self):
        refused = self.assertRaisesRegex(ValueError, "lines of code, more than 100; let attacks")
        with mock.patch.object(attacks_wheel, "MOST_LINES", 100), refused:
            attacks_wheel.write(Path(self.create_tempdir()), "1.2.3")

    @parameterized.parameters(
        ("import jaxrobust", "import jaxrobust_attacks"),
        ("import jaxrobust.types", "import jaxrobust_attacks.types"),
        ('f"jaxrobust.{room}.names"', 'f"jaxrobust_attacks.{room}.names"'),
        ("jaxrobust.__version__", "jaxrobust_attacks.__version__"),
        ("pip install 'jaxrobust[cuda]'", "pip install 'jaxrobust[cuda]'"),
        ("~/.cache/jaxrobust, `jaxrobust train`", "~/.cache/jaxrobust, `jaxrobust train`"),
        ("jaxrobust.pytorch", "jaxrobust.pytorch"),
        ('rooms.optional("jaxrobust.models")', 'rooms.optional("jaxrobust_attacks.models")'),
        ("; install a newer jaxrobust", "; install a newer jaxrobust-attacks"),
    )
    def test_names(self, text, renamed):
        self.assertEqual(attacks_wheel.renamed(text, frozenset({"types", "attacks"})), renamed)

    def test_lines_of_code(self):
        head = '"""Text.\n\nMore.\n"""\n\nx = (\n    1,  # one\n)\n'
        body = 'def f():\n    """Text."""\n    # why\n    return """\n"""\n'
        self.assertEqual(attacks_wheel.code_lines(f"{head}\n\n{body}"), 6)


@pytest.mark.slow
class WheelTest(absltest.TestCase):
    def test_a_script_in_a_fresh_environment(self):
        folder = Path(self.create_tempdir())
        try:
            release.attacks(release.Release(folder))
        except subprocess.CalledProcessError as error:
            raise absltest.SkipTest(f"no wheel can be built here: {error}") from error
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as file:  # so the other package's files stay
            self.assertEqual(
                {name.split("/")[0].partition("-")[0] for name in file.namelist()},
                {"jaxrobust_attacks"},
            )
        venv.create(folder / "new")
        python = folder / "new" / "bin" / "python"
        pip(python, str(wheel))  # with what it depends on
        done = subprocess.run(
            [python, "-c", SCRIPT], cwd=folder, capture_output=True, text=True, env={}
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        large = folder / "new" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
        large = large / "site-packages" / "jaxrobust"  # as if it were installed too, without Flax
        shutil.copytree(paths.ROOT / "jaxrobust", large)
        subprocess.run([python, "-c", SCRIPT], cwd=folder / "new", check=True, env={})
        uninstall = [sys.executable, "-m", "pip", "--python", str(python), "uninstall", "-qy"]
        subprocess.run([*uninstall, "jaxrobust-attacks"], check=True)
        other = "from jaxrobust import attacks; attacks.pgd(epsilon=0.1, steps=1)"
        subprocess.run([python, "-c", other], cwd=folder, check=True, env={})
        version, *loaded = done.stdout.split()
        self.assertEqual(version, jaxrobust.__version__)
        others = ("jaxrobust", "flax", "grain", "orbax", "optax", "rich")
        self.assertNoCommonElements(loaded, others)

    def test_types(self):
        folder = Path(self.create_tempdir())
        attacks_wheel.write(folder, "1.2.3")
        command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / "cache")]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        self.assertIn("Success: no issues found", done.stdout)
