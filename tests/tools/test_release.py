"""What a release is made of: one version everywhere, and steps that run up to the upload."""

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import yaml
from absl.testing import absltest, parameterized

import jaxrobust
from tests.support import signatures
from tests.support.paths import ROOT
from tools.docs import public
from tools.release import make as release

MISSING = "needs what makes packages: pip install -e '.[release]'"
PYPROJECT = '[project]\nversion = "0.2.0"\n[project.urls]\nRepository = "https://repository.invalid/jaxrobust"\n'


def tree(folder: Path, **files: str) -> Path:
    """A checkout of those files that the first step reads."""
    texts = {
        "pyproject.toml": PYPROJECT,
        "CHANGELOG.md": "# Changelog\n\n## 0.2.0\n\n- All of it.\n\n## 0.1.0\n\n- Less.\n",
        "CITATION.cff": "title: x\nversion: 0.2.0\nlicense: y\n",
        "README.md": "version = {0.2.0}}\n",
        "jaxrobust/__init__.py": '__version__ = "0.2.0"\n',
    }
    for name, text in (texts | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


class VersionTest(parameterized.TestCase):
    def test_this_one_is_everywhere(self):
        release.check(release.Release(ROOT))
        self.assertEqual(release.version(), jaxrobust.__version__)
        cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
        about = release.project()
        self.assertEqual(cited["version"], jaxrobust.__version__)
        self.assertEqual(cited["license"], about["license"])
        self.assertEqual([one["name"] for one in cited["authors"]], [about["authors"][0]["name"]])
        self.assertIn(cited["authors"][0]["name"], (ROOT / "README.md").read_text())

    def test_one_that_is_not_is_named(self):
        for name, text, said in (
            (
                "CHANGELOG.md",
                "# Changelog\n",
                "CHANGELOG.md has no section 0.2.0; write '## 0.2.0'",
            ),
            ("CITATION.cff", "version: 0.1.0\n", "CITATION.cff does not say 'version: 0.2.0'"),
            ("README.md", "version = {0.1.0}", "README.md does not say 'version = {0.2.0}'"),
            (
                "jaxrobust/__init__.py",
                '__version__ = "2"\n',
                "version 2 is not a semantic version; write",
            ),
        ):
            with self.subTest(row=(name, text, said)):
                folder = tree(Path(self.create_tempdir()), **{name: text})
                with mock.patch.object(release, "ROOT", folder):
                    self.assertRaisesRegex(
                        ValueError, re.escape(said), release.check, release.Release(folder)
                    )

    def test_what_may_not_go_out(self):
        folder = tree(Path(self.create_tempdir()))
        changed = mock.patch.object(release, "_git", lambda *_: " M README.md")
        with mock.patch.object(release, "ROOT", folder), changed:
            going = release.Release(folder, publish=True, tag="v0.2.0")
            with self.assertRaisesRegex(ValueError, "names no repository yet; `python tools/rel"):
                release.check(going)
            with self.assertRaisesRegex(
                ValueError, "HOST/OWNER/x is not an address; write https://"
            ):
                release.address("HOST/OWNER/x")
            release.address("https://host.example/me/jaxrobust/")
            with self.assertRaisesRegex(ValueError, "has the address https://host.example/me/jax"):
                release.address("https://host.example/you/jaxrobust")
            with self.assertRaisesRegex(ValueError, "some tracked files have changes; commit them"):
                release.check(going)
            with self.assertRaisesRegex(ValueError, "the tag v0.3.0 is not v0.2.0; tag the commit"):
                release.check(going._replace(tag="v0.3.0"))
            (folder / "CHANGELOG.md").write_text("\n## 0.2.0\n\nNot uploaded yet.\n")
            with self.assertRaisesRegex(ValueError, "says that 0.2.0 is not uploaded; remove that"):
                release.check(going)

    def test_words(self):
        with mock.patch.object(sys, "stderr") as told:
            self.assertEqual(release.main(["fly"]), 2)
            self.assertEqual(release.main(["address"]), 2)
        said = "".join(str(call.args[0]) for call in told.write.call_args_list)
        self.assertIn("fly is not a step; use check, packages", said)
        self.assertIn("address takes one address", said)


class PublicNamesTest(absltest.TestCase):
    """Those of the last version continue working, as docs/versions.md promises."""

    def test_all_are_there(self):
        listed = (ROOT / "tests" / "golden" / "public_names.txt").read_text().split()
        self.assertGreater(len(listed), 70)
        self.assertLen({*listed}, len(listed))
        for name in listed:
            with self.subTest(name):
                self.assertIsNotNone(public.value(name))

    def test_signatures_are_the_reviewed_ones(self):
        """After a change that is meant, `python -m tests.support.signatures` writes them."""
        self.assertEqual(signatures.FILE.read_text(), signatures.text())

    def test_new_ones_are_listed(self):
        listed = (ROOT / "tests" / "golden" / "public_names.txt").read_text().split()
        self.assertEqual(listed, sorted(public.names()))


class FilesTest(parameterized.TestCase):
    def test_the_recipe_says_what_the_project_says(self):
        folder = Path(self.create_tempdir())
        sdist = folder / "jaxrobust-0.2.0.tar.gz"
        sdist.write_bytes(b"x")
        made = yaml.safe_load(release.recipe("0.2.0", sdist))
        needed = [line.replace(" ", "") for line in made["requirements"]["run"]]
        self.assertLen(needed, 1 + len(release.project()["dependencies"]))
        self.assertIn("ml-collections>=1.1.0", needed)
        self.assertIn("etils>=1.9", needed)
        self.assertEqual(needed[0], "python>=3.11")
        self.assertEqual(made["source"]["sha256"][:8], "2d711642")
        self.assertEqual(
            made["build"]["python"]["entry_points"], ["jaxrobust = jaxrobust.__main__:main"]
        )

    def test_the_page_has_ten_lines(self):
        lines = (ROOT / "docs" / "publishing.md").read_text().splitlines()
        self.assertEqual(
            [line.partition(".")[0] for line in lines[2:]], [str(i) for i in range(1, 11)]
        )

    def test_no_file_names_the_address_beside_the_one_place(self):
        done = subprocess.run(
            ["git", "grep", "-l", "repository.invalid"], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode > 1:
            self.skipTest("this is not a git checkout")
        own = {"pyproject.toml", "tools/release/make.py", "tests/tools/test_release.py"}
        self.assertEqual({*done.stdout.split()}, own)

    def test_the_workflow_takes_steps_that_there_are(self):
        made = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
        steps = made["jobs"]["build"]["steps"]
        said = "\n".join(step.get("run", "") for step in steps)
        self.assertIn("python tools/release/make.py --out dist --publish", said)
        extras = re.findall(r"\.\[([\w,-]+)\]", said)[0].split(",")
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        self.assertContainsSubset(extras, known["optional-dependencies"])
        # Only the job that uploads may ask for a token there, and it builds nothing.
        upload = made["jobs"]["upload"]
        self.assertEqual(upload["permissions"], {"id-token": "write"})
        self.assertEmpty([step for step in upload["steps"] if "run" in step])

    def test_forms_of_issues_are_whole(self):
        for name in ("wrong", "number", "wish"):
            with self.subTest(name=name):
                form = yaml.safe_load(
                    (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text()
                )
                self.assertContainsSubset({"name", "description", "body"}, form)
                ids = [part["id"] for part in form["body"]]
                self.assertLen({*ids}, len(ids))
                for part in form["body"]:
                    self.assertIn(part["type"], ("textarea", "input"))
                    self.assertIn("label", part["attributes"])


@pytest.mark.slow
class StepsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        if find_spec("twine") is None or find_spec("cyclonedx_py") is None:
            self.skipTest(MISSING)

    def test_up_to_the_upload(self):
        out = Path(self.create_tempdir())
        words = ["check", "packages", "inspect", "try", "conda", f"--out={out}"]
        self.assertEqual(release.main(words), 0)
        wheel, sdist = next(out.glob("*.whl")), next(out.glob("*.tar.gz"))
        self.assertLess(wheel.stat().st_size, 6_000_000)
        with zipfile.ZipFile(wheel) as file:
            (name,) = (n for n in file.namelist() if n.endswith("METADATA"))
            about = file.read(name).decode()
        self.assertIn(f"\nVersion: {jaxrobust.__version__}\n", about)
        self.assertIn("License-Expression: Apache-2.0", about)
        self.assertIn("Project-URL: Repository, ", about)
        self.assertIn("Classifier: Typing :: Typed", about)
        self.assertIn(
            f"sha256: {release.hashlib.sha256(sdist.read_bytes()).hexdigest()}",
            (out / "recipe" / "recipe.yaml").read_text(),
        )
        with tarfile.open(sdist) as archive:
            names = [n.partition("/")[2] for n in archive.getnames()]
        self.assertIn("configs/quickstart.py", names)
        # A file that is missing is named.
        with (
            mock.patch.object(release, "_git", lambda *_: "jaxrobust/nowhere.py"),
            self.assertRaisesRegex(ValueError, "lacks jaxrobust/nowhere.py; name it in"),
        ):
            release.inspect(release.Release(out))

    def test_the_bill_of_materials(self):
        """Of what is installed here; the step makes an environment of the wheel alone."""
        out = Path(self.create_tempdir())
        (out / "jaxrobust-0.2.0-py3-none-any.whl").write_bytes(b"")
        with mock.patch.object(release, "_environment", lambda *_: sys.executable):
            release.sbom(release.Release(out))
        bill = json.loads((out / f"jaxrobust-{jaxrobust.__version__}.cdx.json").read_text())
        self.assertEqual(bill["bomFormat"], "CycloneDX")
        component = bill["metadata"]["component"]
        self.assertEqual(
            (component["name"], component["version"]), ("jaxrobust", jaxrobust.__version__)
        )
