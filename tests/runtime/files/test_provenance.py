"""Which code computes: a checkout, an installation, or files of neither."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

from absl.testing import parameterized

import jaxrobust
from jaxrobust.runtime.files import provenance

PACKAGE = Path(jaxrobust.__file__).parent
SAID = f"jaxrobust {jaxrobust.__version__}"
OF_PACKAGE = Path(provenance.__file__).relative_to(PACKAGE).as_posix()


class CommitTest(parameterized.TestCase):
    """Copies of provenance.py in checkouts and installations, with git's own repositories."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        author = {
            f"GIT_{who}_{k}": "x" for who in ("AUTHOR", "COMMITTER") for k in ("NAME", "EMAIL")
        }
        nothing = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        self.enter_context(mock.patch.dict(os.environ, author | nothing))

    def git(self, folder: Path, *arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def repository(self, folder: Path, *files: str) -> str:
        """The commit of a new repository that tracks these files."""
        folder.mkdir(exist_ok=True)
        self.git(folder, "init", "-q")
        self.git(folder, "add", *files)
        self.git(folder, "commit", "-q", "-m", "all", "--allow-empty")
        return self.git(folder, "rev-parse", "HEAD")

    def package(self, folder: Path):
        """The module of a copy of the package that lies in a folder."""
        path = folder / "jaxrobust" / OF_PACKAGE
        path.parent.mkdir(parents=True)
        path.write_bytes(Path(provenance.__file__).read_bytes())
        spec = importlib.util.spec_from_file_location("jaxrobust_copy", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def installed(self, noted: dict | str | None = None):
        """The same in a `.venv` of somebody's repository, after what the installer noted."""
        site = self.folder / "paper" / ".venv" / "lib" / "site-packages"
        module, about = self.package(site), site / "jaxrobust-7.7.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: jaxrobust\nVersion: 7.7\n")
        if noted is not None:
            text = noted if isinstance(noted, str) else json.dumps(noted)
            (about / "direct_url.json").write_text(text)
        (self.folder / "paper" / "paper.tex").write_text("x")
        self.others = self.repository(self.folder / "paper", "paper.tex")
        self.enter_context(mock.patch.object(sys, "path", [str(site), *sys.path]))
        return module

    def sources(self) -> str:
        content = Path(provenance.__file__).read_bytes()
        return hashlib.sha256(f"{OF_PACKAGE}\n".encode() + content).hexdigest()

    def test_of_a_checkout_and_its_changes(self):
        module = self.package(self.folder)
        commit = self.repository(self.folder, ".")
        self.assertEqual(module.commit(), commit)
        (self.folder / "new.py").write_text("x")
        self.assertEqual(module.commit(), f"{commit}+changes")

    def test_a_hooks_variables_name_another_repository(self):
        module = self.package(self.folder / "checkout")
        commit = self.repository(self.folder / "checkout", ".")
        self.repository(self.folder / "other")
        with mock.patch.dict(os.environ, GIT_DIR=str(self.folder / "other" / ".git")):
            self.assertEqual(module.commit(), commit)

    @parameterized.parameters(
        ({"url": "https://x", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}, "c0ffee"),
        (
            {"url": "https://x", "archive_info": {"hash": "sha256=5e", "hashes": {"sha256": "5e"}}},
            "archive sha256 5e",
        ),
        ({"url": "https://x", "archive_info": {}}, None),
        ({"url": "file:///elsewhere/secret", "dir_info": {"editable": True}}, None),
        (None, None),
        ("[]", None),
        ("{", None),
        ('{"vcs_info": 3}', None),
    )
    def test_an_installation_is_not_the_repository_around_it(self, noted, expected):
        module = self.installed(noted)
        said = module.commit()
        self.assertNotIn(self.others, said)
        self.assertEqual(said, expected or f"{SAID}, sources sha256 {self.sources()}")

    def test_a_checkout_beside_an_installation(self):
        self.installed({"url": "x", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}})
        module = self.package(self.folder / "unpacked")
        self.assertNotIn("c0ffee", module.commit())

    @parameterized.parameters(("jaxrobust", "0.1.0"), ("jaxrobust", None), ("optax", None))
    def test_what_the_installer_noted_of_a_checkout_may_be_old_or_missing(self, package, noted):
        real = importlib.metadata.version

        def version(name):
            if name == package and noted is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return noted if name == package else real(name)

        module = self.package(self.folder)
        with mock.patch.object(importlib.metadata, "version", version):
            found, said = module.versions(), module.commit()
        self.assertEqual(found["jaxrobust"], jaxrobust.__version__)
        self.assertEqual(found["jax"], real("jax"))
        self.assertEqual(found["optax"], "not installed" if package == "optax" else real("optax"))
        self.assertEqual(said, f"{SAID}, sources sha256 {self.sources()}")

    def test_what_is_built_has_the_version_that_the_package_says(self):
        built = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
        self.assertNotIn("version", built["project"])
        self.assertEqual(
            built["tool"]["setuptools"]["dynamic"]["version"], {"attr": "jaxrobust.__version__"}
        )

    def test_git_is_asked_without_locks_and_not_for_ever(self):
        module = self.package(self.folder)
        with mock.patch.object(subprocess, "run") as asked:
            asked.return_value.stdout = " abc\n"
            self.assertEqual(module.commit(), "abc+changes")
        self.assertLen(asked.call_args_list, 3)
        for call in asked.call_args_list:
            self.assertEqual(call.args[0][:2], ["git", "--no-optional-locks"])
            self.assertEqual(call.kwargs["stdin"], subprocess.DEVNULL)
            self.assertLessEqual(call.kwargs["timeout"], 60)
            self.assertTrue(call.kwargs["check"])

    def test_versions_of_all_that_a_number_may_depend_on(self):
        found = provenance.versions()
        of = {"jaxrobust", "jax", "jaxlib", "flax", "optax", "numpy", "pillow", "python"}
        self.assertEqual(found.keys(), of)
        self.assertEqual(found["python"], sys.version.split()[0])
        self.assertEqual(found["numpy"], importlib.metadata.version("numpy"))

    @parameterized.parameters("missing", "hangs", "refuses another owner")
    def test_no_answer_of_git(self, trouble):
        module, binaries = self.package(self.folder), self.folder / "bin"
        self.repository(self.folder, ".")
        binaries.mkdir()
        changes = {"PATH": str(binaries)}
        if trouble == "hangs":
            (binaries / "git").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
            (binaries / "git").chmod(0o755)
        elif trouble == "refuses another owner":
            changes = {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}
        with mock.patch.dict(os.environ, changes), mock.patch.object(module, "_PATIENCE_S", 0.1):
            said = module.commit()
        self.assertRegex(said, f"^jaxrobust .*, sources sha256 {self.sources()}$")
