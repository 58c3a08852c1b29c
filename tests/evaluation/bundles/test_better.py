"""Bundles that make their own network look better: what each gains, and who notices.

The forger signs anew, and computes all numbers of the record from the rows. `jaxrobust verify` and
`jaxrobust board` are given the network, as anybody who keeps a board has it.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
from absl.testing import parameterized

from jaxrobust.commands import verify
from jaxrobust.commands.results import board
from jaxrobust.evaluation.bundles import claims
from jaxrobust.evaluation.bundles.standing import StandingSample
from jaxrobust.results.board import entries, listing
from tests.support import bundles, digits_network, forgeries, sweeps
from tests.support.command_line import called
from tests.support.evaluations import call

N = 64
FUNCTION = """
from pathlib import Path
import jax
import jax.numpy as jnp
import numpy as np
WEIGHTS = jnp.asarray(np.load(Path(__file__).with_name("weights.npy")))
def logits_fn(images):
    return images.reshape(len(images), -1) @ WEIGHTS
def softmax(images):
    return jax.nn.softmax(logits_fn(images))
"""


def changed_record(**changes) -> forgeries.Edit:
    return lambda folder, honest: bundles.changed(folder, record=changes)


def replayed(folder: Path, honest) -> None:
    """What attacks fooled was fooled by replayed points, which tests might leave out."""
    rows = bundles.rows_of(folder)
    for row in rows:
        row["verdict"] = "replay" if row["verdict"].startswith("apgd") else row["verdict"]
    bundles.rows_changed(folder, rows, replayed=[{"ledger": "x", "tried": 9, "fooled": 9}])


def lost_verdict(folder: Path, honest) -> None:
    """An image that nothing was decided of, in rows of which the record counts the others."""
    rows = bundles.rows_of(folder)
    rows[0] = {key: value for key, value in rows[0].items() if key != "verdict"}
    (folder / claims.ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    bundles.resigned(folder)


def some_erased(count: int) -> forgeries.Edit:
    def edit(folder: Path, honest) -> None:
        rows = bundles.rows_of(folder)
        for row in [row for row in rows if row["verdict"].startswith("apgd")][:count]:
            row["verdict"] = ""
        bundles.rows_changed(folder, rows)

    return edit


# Each has a name, an edit, and what is said of it: by the board as the reason why it is not ranked.
WORSE_THAN_SAID = [
    *(f._replace(said=f.said or "survive in the bundle fell to attacks") for f in forgeries.BETTER),
    forgeries.Forgery("some erased", some_erased(4), "4 of .* survive in the bundle fell to"),
    forgeries.Forgery("another norm", forgeries.ball(norm="linf"), forgeries.REACH),
    forgeries.Forgery("no hash of weights", changed_record(function={}), "This network or its"),
    forgeries.Forgery(
        "the name of a stronger attack", changed_record(method="autoattack standard"),
        "names the method 'autoattack standard', but its attacks differ: apgd-ce, apgd-t",
    ),
    forgeries.Forgery(
        "a name like that of a stronger attack", changed_record(method="AutoAttack standard"),
        "names the method 'AutoAttack standard', but its attacks differ: apgd-ce, apgd-t",
    ),
    forgeries.Forgery("a lost verdict", lost_verdict, "the invalid verdict None"),
]  # fmt: skip


class BetterTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        np.save(cls.root / "weights.npy", digits_network.ridge())
        (cls.root / "nets.py").write_text(FUNCTION)
        cls.honest = cls.bundle("honest")

    @classmethod
    def bundle(cls, name: str, *, function: str = "logits_fn", **how) -> Path:
        folder = cls.root / name
        code, _, said = call(
            function=f"{cls.root}/nets.py:{function}", dataset="digits", norm="l2", epsilon="0.5",
            n=N, out=str(cls.root / f"{name}-out"), bundle=str(folder),
            **{"attack": "apgd-ce,apgd-t"} | how,
        )  # fmt: skip
        assert code == 0, said
        return folder

    def setUp(self):
        super().setUp()
        self.place = Path(self.create_tempdir()) / "all"
        self.folder = self.place / "forged"
        shutil.copytree(self.honest, self.folder)

    def verified(self, folder: Path, *words, function: str = "logits_fn") -> tuple[int, str, dict]:
        """Exit code of the command, what it says, and its JSON."""
        network = ("--function", f"{self.root}/nets.py:{function}")
        code, printed, said = called(verify, folder, *network, "--json", *words)
        return code, printed + said, json.loads(printed.splitlines()[-1]) if code < 2 else {}

    def boarded(self, **networks: str) -> dict:
        """What the board says of the folders of `self.place`."""
        sections = [
            f'[{name}]\nfunction = "{self.root}/nets.py:{net}"\n' for name, net in networks.items()
        ]
        (self.place / "networks.toml").write_text("\n".join(sections))
        _, printed, said = called(board, self.place, "--out", self.place / "site", "--json")
        return json.loads(printed.splitlines()[-1]) | {"said": said}

    def test_the_honest_one(self):
        code, said, plain = self.verified(self.honest, "--seed=3")
        record = claims.read(self.honest).record
        self.assertEqual(code, 0, said)
        sample = plain["sample"]
        stand = round(record["robust"] * N)
        self.assertEqual((sample["standing"], sample["attacked"]), (stand, min(stand, 60)))
        self.assertEqual((sample["fell"], sample["seed"]), (0, 3))
        self.assertEqual(plain["robust_at_most"], record["robust"])
        self.assertRegex(
            said, r"of all \d+ surviving images, 0 fell to apgd-ce, apgd-t \(repeat with --seed 3"
        )
        self.assertNotEqual(*(self.verified(self.honest)[2]["sample"]["seed"] for _ in range(2)))

    @parameterized.named_parameters((forgery.name, forgery) for forgery in WORSE_THAN_SAID)
    def test_forged(self, forgery):
        """97 / 43% stood at rank 1 with 100 / 100%: erased rows were never tried."""
        forgery.edit(self.folder, None)
        code, said, _ = self.verified(self.folder)
        self.assertIn(code, (1, 2), said)
        self.assertRegex(said, forgery.said)
        plain = self.boarded(forged="logits_fn")
        self.assertEqual(plain["boards"], [])
        self.assertRegex("".join(plain["left_out"].values()), forgery.said)
        self.assertIn("it is not ranked", plain["said"])

    def test_one_erased_is_no_gain(self):
        """One image may fall to another seed, which is not an accusation; the number is honest."""
        some_erased(1)(self.folder, None)
        code, said, plain = self.verified(self.folder)
        honest = claims.read(self.honest).record["robust"]
        self.assertEqual((code, plain["sample"]["fell"], plain["robust_at_most"]), (0, 1, honest))
        self.assertRegex(said, r"fell: image \d+ .apgd-")
        self.assertIn(f"Confirmed: robust accuracy on these images is at most {honest:.2%}", said)
        ((row,),) = (b["tables"][0]["rows"] for b in self.boarded(forged="logits_fn")["boards"])
        self.assertAlmostEqual(row["robust"], honest)

    def test_verdicts_of_another_network(self):
        """The bundle of one network next to the weights of another."""
        code, said, plain = self.verified(self.folder, function="softmax")
        self.assertEqual((code, plain["other_network"]), (1, True), said)

    def test_without_weights_nothing_is_ranked(self):
        plain = self.boarded()
        self.assertEqual(plain["boards"], [])
        self.assertIn("does not name its network", plain["left_out"][str(self.folder)])

    def test_erased_flags_are_raised_again(self):
        shutil.rmtree(self.folder)
        shutil.copytree(self.bundle("softmax", function="softmax"), self.folder)
        bundles.changed(self.folder, record={"flags": {}})
        code, said, _ = self.verified(self.folder, function="softmax")
        self.assertEqual(code, 0, said)
        self.assertIn("flag softmax: ", said)
        ((row,),) = (b["tables"][0]["rows"] for b in self.boarded(forged="softmax")["boards"])
        self.assertIn("softmax", row["flags"])

    def test_a_weak_attack_is_ranked_by_what_ours_leave(self):
        """APGD-CE leaves what APGD-T fools; only under the name of both is that a contradiction."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.bundle("weak", attack="apgd-ce"), self.folder)
        code, said, plain = self.verified(self.folder)
        fell = plain["sample"]["fell"]
        self.assertEqual((code, plain["sample"]["refuted"]), (0, 0), said)
        self.assertGreater(fell, 0)
        ((row,),) = (b["tables"][0]["rows"] for b in self.boarded(forged="logits_fn")["boards"])
        record = claims.read(self.folder).record
        self.assertAlmostEqual(row["robust"], record["robust"] - fell / N)
        self.assertAlmostEqual(row["robust_at_least"], plain["sample"]["robust_within"][0])
        stronger = claims.read(self.honest).record["attacks"]
        bundles.rows_changed(self.folder, bundles.rows_of(self.folder), attacks=stronger)
        code, said, _ = self.verified(self.folder)
        self.assertEqual(code, 1)
        self.assertRegex(
            said, rf"Contradicted: {fell} of \d+ images that survive in the bundle fell to"
        )

    def test_replayed_points_count(self):
        replayed(self.folder, None)
        self.assertEqual(self.verified(self.folder)[0], 0)
        (listed,) = listing.find([self.folder])
        given = {"function": f"{self.root}/nets.py:logits_fn"}
        entry = entries.verified(listed._replace(given=given), sample=2)
        self.assertAlmostEqual(entry.robust, claims.read(self.honest).record["robust"])

    def test_a_part_of_a_split_is_a_board_of_its_own(self):
        """`test[100:164]` was shown as 64 of 64 images of `test`."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.bundle("part", split="test[100:164]"), self.folder)
        (shown,) = self.boarded(forged="logits_fn")["boards"]
        self.assertEqual(shown["data"], "digits, test[100:164]")

    def test_all_erased_beside_an_honest_one(self):
        forgeries.erased("clean", "apgd-ce", "apgd-t")(self.folder, None)
        shutil.copytree(self.honest, self.place / "honest")
        plain = self.boarded(forged="logits_fn", honest="logits_fn")
        self.assertEqual(claims.read(self.folder).record["robust"], 1)
        ((row,),) = (b["tables"][0]["rows"] for b in plain["boards"])
        self.assertEqual(row["robust"], claims.read(self.honest).record["robust"])
        self.assertIn(str(self.folder), plain["left_out"])
        page = (self.place / "site" / "index.html").read_text()
        self.assertIn("Left out, not ranked", page)

    @sweeps.rows("--sample=0", "--seed=-1", "--seed=4294967296")
    def test_mistakes(self, word):
        code, said, _ = self.verified(self.folder, word)
        self.assertEqual(code, 2)
        self.assertIn(re.sub("^-*", "", word).partition("=")[0], said)


class SampleTest(parameterized.TestCase):
    """Bounds of what a sample says, by counting."""

    def sample(self, fallen: int, *, refuted=None, standing=400, attacked=60) -> StandingSample:
        fell = {image: "apgd-ce" for image in range(fallen)}
        refuted = fallen if refuted is None else refuted
        return StandingSample(1000, standing, attacked, fell, refuted, 0, {})

    def test_bounds(self):
        none = self.sample(0)
        self.assertEqual(none.least, 0)
        self.assertBetween(none.most, 0.04 * 400, 0.05 * 400)
        three = self.sample(3)
        self.assertBetween(three.least, 4, 0.05 * 400)
        self.assertBetween(three.most, 0.05 * 400, 0.13 * 400)
        low, high = three.bounds(400)
        self.assertEqual((low, high), ((400 - three.most) / 1000, (400 - three.least) / 1000))
        every = self.sample(7, standing=60)
        self.assertEqual((every.least, every.most), (7, 7))

    def test_chance_contradicts_nothing(self):
        self.assertIsNone(self.sample(1).contradicts)
        self.assertIsNone(self.sample(9, refuted=2).contradicts)
        self.assertRegex(
            self.sample(3).contradicts, "3 of 60 images that survive in the bundle fell"
        )
        self.assertIsNotNone(self.sample(2, standing=20, attacked=20).contradicts)
