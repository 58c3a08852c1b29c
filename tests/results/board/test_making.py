"""The page of bundles that verified: real ones, of linear networks on digits."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.commands.results import board
from jaxrobust.evaluation.bundles import claims
from jaxrobust.evaluation.questions import verification
from jaxrobust.results.board import board_page, entries
from tests.support import bundles
from tests.support.command_line import called
from tests.support.evaluations import call

N = 48
FUNCTION = """
from pathlib import Path
import jax.numpy as jnp
import numpy as np
WEIGHTS = jnp.asarray(np.load(Path(__file__).with_suffix(".npy")))
def logits_fn(images):
    return images.reshape(len(images), -1) @ WEIGHTS
"""
NAME = 'Ridge <script>alert("1")</script> & more'
GIVEN = {"good": ("good_l2", "good_linf"), "bad": ("bad_l2",)}
THREATS = {"l2": "0.3", "linf": "0.05"}


def networks(text: str = "", **names: str) -> str:
    """The file of networks of the bundles below, and `text` behind it."""
    sections = [
        f'[{bundle}]\nfunction = "{{root}}/{net}.py:logits_fn"\nname = {json.dumps(names[net])}\n'
        for net, own in GIVEN.items()
        for bundle in own
    ]
    return "\n".join(sections) + text


class BoardTest(parameterized.TestCase):
    """Three bundles of two networks; `good` keeps many images under L2 that `bad` loses."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.root = Path(directory.name)
        source = data.open_source("digits", "train")
        ours = data.Prepared(source, image_size=8, preprocessing="none", images=len(source))
        design = ours[:].reshape(len(ours), -1).astype(np.float64)
        ridge = design.T @ design + 30 * np.eye(64)
        good = np.linalg.solve(ridge, design.T @ np.eye(10)[ours.labels()])
        noise = 0.08 * np.random.default_rng(0).standard_normal(good.shape)
        for name, weights in (("good", good), ("bad", good + noise)):
            np.save(cls.root / f"{name}.npy", weights.astype(np.float32))
            (cls.root / f"{name}.py").write_text(FUNCTION)
        for net, own in GIVEN.items():
            for bundle in own:
                norm = bundle.partition("_")[2]
                code, _, said = call(
                    function=f"{cls.root}/{net}.py:logits_fn", dataset="digits", norm=norm,
                    epsilon=THREATS[norm], attack="apgd-ce,apgd-t", n=N, out=str(cls.root / "out"),
                    bundle=str(cls.root / "all" / bundle),
                )  # fmt: skip
                assert code == 0, said
        cls.write(networks(good=NAME, bad="Noise"))
        cls.outcome = called(board, cls.root / "all", "--out", cls.root / "site", "--json")
        cls.page = (cls.root / "site" / "index.html").read_text()

    @classmethod
    def write(cls, text, place=None) -> Path:
        path = (place or cls.root / "all") / "networks.toml"
        path.write_text(text.replace("{root}", str(cls.root)))
        return path

    def copies(self, *names) -> Path:
        """A folder with copies of bundles, and the file of their networks."""
        folder = Path(self.create_tempdir()) / "own"
        for name in names:
            shutil.copytree(self.root / "all" / name, folder / name)
        self.write(networks(good=NAME, bad="Noise"), folder)
        return folder

    def made(self, folder) -> tuple[dict, str, str]:
        """What the command says of a folder whose bundles do not all verify, and its page."""
        code, printed, said = called(board, folder, "--out", folder / "site", "--json")
        self.assertEqual(code, 1, said)
        plain = json.loads(printed.splitlines()[-1])
        self.assertFalse(plain["whole"])
        return plain, said, (folder / "site" / "index.html").read_text()

    def test_all_is_on_two_boards(self):
        code, printed, said = self.outcome
        self.assertEqual(code, 0, said)
        first, last = printed.splitlines()
        self.assertIn("index.html: 3 bundles on 2 boards", first)
        plain = json.loads(last)
        self.assertEqual((plain["whole"], plain["left_out"]), (True, {}))
        l2, linf = plain["boards"]
        self.assertEqual((l2["data"], l2["threat"]), ("digits, test", "L2 0.3"))
        self.assertEqual(linf["threat"], "L∞ 0.05")
        self.assertLen(linf["tables"][0]["rows"], 1)
        good, bad = l2["tables"][0]["rows"]
        self.assertEqual([good["network"], bad["network"]], [NAME, "Noise"])
        self.assertEqual([good["rank"], bad["rank"]], [1, 2])
        self.assertGreater(good["robust"], bad["robust"])

    def test_a_row_says_what_the_record_says(self):
        row = json.loads(self.outcome[1].splitlines()[-1])["boards"][0]["tables"][0]["rows"][0]
        folder = self.root / "all" / "good_l2"
        bundle = claims.read(folder)
        record = bundle.record
        self.assertEqual((row["clean"], row["robust"]), (record["clean"], record["robust"]))
        np.testing.assert_allclose(row["interval"], record["interval"]["robust"], atol=1e-9)
        self.assertEqual(row["bundles"], [bundle.number])
        self.assertEqual(row["robust_at_least"], record["robust"])  # all that survive were attacked
        costs = record["costs"]
        self.assertEqual(row["passes"], sum(c["forward"] + c["backward"] for c in costs))
        self.assertEqual(row["seconds"], sum(c["seconds"] for c in costs))
        command = f"jaxrobust verify good_l2 --function {self.root}/good.py:logits_fn"
        self.assertEqual(row["commands"], [command])
        self.assertEqual(row["images"], N)

    def test_the_page(self):
        text = self.page
        bundle = claims.read(self.root / "all" / "good_l2")
        for part in (
            bundle.number, "jaxrobust verify good_l2 --function", f"{N} of 397",
            f"{100 * bundle.record['robust']:.2f}%", "Attacked by apgd-ce + apgd-t",
            "robust accuracies are at most these", ">digits, test: L2 0.3</h2>",
            ">digits, test: L∞ 0.05</h2>", "The attack, its cost and its",
        ):  # fmt: skip
            self.assertIn(part, text)
        self.assertLess(text.index("Ridge"), text.index("Noise"))
        self.assertNotIn("Left out", text)
        names = re.findall(r' id="([^"]*)"', text)
        links = re.findall(r' href="#([^"]*)"', text)
        self.assertEqual(sorted(names), sorted(links))
        self.assertLen(set(names), 2)

    def test_nothing_is_loaded_and_no_script_runs(self):
        self.assertNotIn("<script", self.page)
        self.assertNotRegex(self.page, r"(src|href)=\"(?!#)|url\(|@import")
        self.assertIn("default-src &#39;none&#39;", self.page)

    def test_names_are_escaped(self):
        self.assertIn("Ridge &lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; more", self.page)

    def test_a_damaged_bundle_is_named_and_left_out(self):
        folder = self.copies("good_l2", "bad_l2")
        with (folder / "bad_l2" / "images.jsonl").open("a") as lines:
            lines.write("\n")
        plain, said, page = self.made(folder)
        reason = "images.jsonl differs from the file in the original bundle; download the"
        self.assertIn(reason, plain["left_out"][str(folder / "bad_l2")])
        self.assertRegex(said, rf"bad_l2 is left out: .*{reason}.*; it is not ranked")
        self.assertIn(reason, page[page.index("Left out") :])
        self.assertIn(str(folder / "bad_l2"), page[page.index("Left out") :])
        self.assertNotIn("Noise", page)
        ((board,),) = ([b["tables"][0]["rows"] for b in plain["boards"]],)
        self.assertEqual([row["network"] for row in board], [NAME])

    def test_another_network_and_images_that_are_not_fooled(self):
        folder = self.copies("good_l2", "bad_l2")
        text = networks(good=NAME, bad="Noise").replace("bad.py", "good.py")
        self.write(text, folder)
        plain, said, page = self.made(folder)
        (reason,) = plain["left_out"].values()
        self.assertIn("This network or its weights differ from the record's", reason)
        self.assertIn("images not confirmed: classified correctly here", reason)
        self.assertIn("bad_l2 is left out: This network or its", said)
        self.assertNotIn("Noise", page)

    def test_every_bundle_is_left_out(self):
        folder = self.copies("bad_l2")
        self.write("", folder)
        plain, _, page = self.made(folder)
        (reason,) = plain["left_out"].values()
        self.assertEqual(
            reason, "networks.toml does not name its network; add the weights under [bad_l2]"
        )
        self.assertEqual(plain["boards"], [])
        self.assertIn("No bundle verified, so there is no board.", page)

    def test_a_maker_of_bundles_cannot_stop_the_board(self):
        """Records that contradict nothing, and lack what a record has."""
        folder = self.copies("good_l2", "good_linf", "bad_l2")
        bundles.changed(folder / "good_linf", record={"model": {"num_classes": 10}})
        bundles.changed(folder / "bad_l2", record={"flags": ["<b>"]})
        plain, _, page = self.made(folder)
        reasons = {Path(name).name: reason for name, reason in plain["left_out"].items()}
        self.assertIn("its record cannot be read (KeyError: ", reasons["good_linf"])
        self.assertIn("has a record whose flags is ['<b>']", reasons["bad_l2"])
        self.assertNotIn("<b>&#39;", page)
        self.assertLen(plain["boards"], 1)

    def test_the_fast_version_is_on_no_board(self):
        """Nor is a record that no longer has its sample: its method still says so."""
        folder = self.copies("good_l2", "good_linf", "bad_l2")
        bundles.changed(folder / "good_linf", record={"fast": {"sampled": 3}})
        bundles.changed(folder / "bad_l2", record={"method": "fast version"})
        plain, _, page = self.made(folder)
        reasons = {Path(name).name: reason for name, reason in plain["left_out"].items()}
        self.assertEqual(set(reasons), {"good_linf", "bad_l2"})
        for reason in reasons.values():
            self.assertIn("the fast version, whose accuracy is not AutoAttack's; complete", reason)
            self.assertIn(reason.partition(";")[0], page)

    def test_the_network_of_a_maker_raises(self):
        folder = self.copies("bad_l2")
        (folder / "raising.py").write_text("def logits_fn(images):\n    raise RuntimeError('no')")
        text = f'[bad_l2]\nfunction = "{folder}/raising.py:logits_fn"\n'
        self.write(text, folder)
        plain, _, _ = self.made(folder)
        (reason,) = plain["left_out"].values()
        self.assertRegex(reason, "raising.py, line 2: RuntimeError: no")

    def test_our_own_faults_are_none_of_a_bundle(self):
        (listed,) = board_page.listing.find([self.root / "all" / "good_l2"])
        with (
            mock.patch.object(verification, "check", side_effect=RuntimeError("ours")),
            self.assertRaisesRegex(RuntimeError, "ours"),
        ):
            entries.verified(listed)

    def test_a_copy_of_a_bundle_is_no_other_network(self):
        folder = self.copies("good_l2")
        shutil.copytree(folder / "good_l2", folder / "copy")
        text = f'[copy]\nfunction = "{self.root}/good.py:logits_fn"\n'
        self.write(networks(text, good=NAME, bad="Noise"), folder)
        code, printed, said = called(board, folder, "--out", folder / "a" / "site")
        self.assertEqual(code, 0, said)
        self.assertIn("1 bundle on 1 board", printed)

    def test_mistakes(self):
        place = Path(self.create_tempdir())
        good = self.root / "all" / "good_l2"
        for words, expected in (
            ((place, "--out", place / "site"), "holds no bundle; name folders that"),
            ((place / "none", "--out", place), "none is not a folder; name bundles, or a folder"),
            ((good,), "--out"),
            (("--out", place), "BUNDLES"),
            ((good, "--out", good / "SHA256SUMS"), "SHA256SUMS is a file; name a folder"),
            ((good, "--out", place, "--batch=0"), "--batch=0 must be at least 1"),
            ((good, "--out", place, "--networks", place / "n"), "n does not exist; name a file of"),
        ):
            with self.subTest(expected):
                code, printed, said = called(board, *words)
                self.assertEqual((code, printed, said.count("\n")), (2, "", 1), said)
                self.assertIn(expected, said)
        self.assertEmpty([*place.iterdir()])
