"""Accuracy under corruptions: the record of the command, and every refusal."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized
from PIL import Image

from jaxrobust import data
from jaxrobust.commands import verify
from jaxrobust.commands.results import board
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import corrupted_images
from jaxrobust.data.transforms import corruptions, decoding
from jaxrobust.data.transforms.corruptions import Corruption
from jaxrobust.evaluation.bundles import claims, claims_torch, contradictions, findings
from jaxrobust.evaluation.questions import corrupted
from jaxrobust.evaluation.records import verdicts
from tests.support import bundles, result_lines, sweeps
from tests.support.command_line import called
from tests.support.evaluations import call
from tests.support.outcomes import ended, refused

NET = """
import jax.numpy as jnp
def logits_fn(images):  # tells 5 classes apart by how bright they are
    return -jnp.abs(images.mean((1, 2, 3))[:, None] - jnp.linspace(0.3, 0.6, 5)[None])
"""
FAKE = "fake:32x32x3:5"


def answers(images) -> np.ndarray:
    means = np.stack(images).mean((1, 2, 3)) / 255
    return np.abs(means[:, None] - np.linspace(0.3, 0.6, 5)).argmin(1)


class CommandCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        (self.folder / "net.py").write_text(NET)

    def evaluate(self, out="out", **given) -> tuple[int, str, str]:
        function = f"{self.folder / 'net.py'}:logits_fn"
        given = {"dataset": FAKE, "split": "test", "n": 24} | given
        return call(function=function, out=str(self.folder / out), **given)

    def record(self, **given) -> dict:
        printed, _ = ended(self.evaluate(**given))
        self.printed = printed
        return result_lines.read(self.folder / given.get("out", "out"))[-1]


class Killed(BaseException):
    """Ends a command, which answers every other error."""


class ComputedTest(CommandCase):
    def test_record(self):
        found = self.record(corruptions="contrast,fog-2", seed=3)
        source = data.open_source(FAKE, "test")
        places = spread.places(source, 24).tolist()
        images = [decoding.decode(r.image, channels=3) for r in source.read(places)]
        labels = np.array([r.label for r in source.read(places)])
        said = found["corruptions"]
        self.assertEqual(said["images"], "computed")
        self.assertEqual(list(said["accuracy"]), ["fog", "contrast"])
        reached = []
        for kind, row in said["accuracy"].items():
            for severity, value in row.items():
                asked = Corruption(kind, int(severity))
                changed = [
                    corruptions.corrupt(image, asked, corruptions.draws(3, asked, number))
                    for number, image in zip(places, images, strict=True)
                ]
                reached.append((answers(changed) == labels).mean())
                self.assertAlmostEqual(value, reached[-1], places=9)
        self.assertLen(reached, 6)
        self.assertGreater(np.ptp(reached), 0.1)  # else nothing would be compared
        self.assertAlmostEqual(said["mean"], np.mean(reached), places=9)
        self.assertAlmostEqual(found["clean"], (answers(images) == labels).mean(), places=9)
        self.assertEqual((found["robust"], found["attacks"]), (None, []))
        self.assertEqual(found["method"], "corruptions")
        self.assertIn(f"1 - mean error    {said['mean']:8.1%}", self.printed)
        kept = verdicts.read(self.folder / "out" / found["verdicts"])
        self.assertEqual(kept.clean.mean(), found["clean"])

    def test_an_interrupted_evaluation_goes_on(self):
        whole = self.record(corruptions="contrast,pixelate")
        with (
            mock.patch.object(corrupted.jsonl, "append", side_effect=self._until_the_third()),
            self.assertRaises(Killed),
        ):
            self.evaluate("again", corruptions="contrast,pixelate")
        (ledger,) = (self.folder / "again").glob("corruptions-*.jsonl")
        lines = ledger.read_text().splitlines()
        self.assertLen(lines, 2)
        changed = json.loads(lines[0]) | {"accuracy": 0.123}  # shows that it is not computed again
        ledger.write_text("\n".join([json.dumps(changed), lines[1], ""]))
        found = self.record(out="again", corruptions="contrast,pixelate")["corruptions"]["accuracy"]
        expected = whole["corruptions"]["accuracy"]
        self.assertEqual(found["contrast"].pop("1"), 0.123)
        expected["contrast"].pop("1")
        self.assertEqual(found, expected)

    @staticmethod
    def _until_the_third():
        append, calls = corrupted.jsonl.append, []

        def stops(path, row):
            if len(calls) == 2:
                raise Killed
            calls.append(row)
            append(path, row)

        return stops

    def test_the_same_command_prints_what_is_done(self):
        first = self.record(corruptions="pixelate-1")
        again = self.record(corruptions="pixelate-1")
        self.assertEqual(first, again)
        self.assertLen(result_lines.read(self.folder / "out"), 1)
        self.record(corruptions="pixelate-1", seed=1)
        self.assertLen(result_lines.read(self.folder / "out"), 2)

    def test_other_photographs_of_frost_are_another_evaluation(self):
        given = {"corruptions": "frost-1", "frost": str(self.folder / "frost"), "n": 8}
        (self.folder / "frost").mkdir()
        for light in (200, 40):
            image = Image.new("RGB", (200, 220), (light, light, 255))
            image.save(self.folder / "frost" / "frost1.png")
            last = self.record(**given)
        first, second = result_lines.read(self.folder / "out")
        self.assertEqual(last, second)
        sums = [each["corruptions"]["frost_sha256"] for each in (first, second)]
        self.assertNotEqual(*sums)
        self.assertEqual(sums[1], corrupted_images.photographs(self.folder / "frost", 32).sha256)
        self.assertNotEqual(first["evaluation"], second["evaluation"])

    @sweeps.rows(
        ({"corruptions": "fgo"}, "--corruptions=fgo: there is no corruption 'fgo'; did you mean"),
        ({"corruptions": "fog-6"}, "fog has no severity '6'; write fog-1 to fog-5"),
        ({"corruptions": "all"}, "frost needs photographs; give --frost FOLDER"),
        ({"corruptions": "frost", "frost": "nowhere"}, "photographs nowhere does not exist; ch"),
        ({"corruptions": "fog", "frost": "nowhere"}, "has no effect without the corruption frost"),
        ({"attack": "clean", "frost": "nowhere"}, "has no effect without --corruptions"),
        ({"corruptions": "fog", "attack": "pgd-2"}, "without an attack; leave --attack=pgd-2 out"),
        ({"corruptions": "fog", "image_size": [32, 224]}, "only one --image_size"),
        ({"corruptions": "fog", "dataset": "fake:28x28x3:5"}, "color images of 32 or 224 px"),
        ({"corruptions": "fog", "dataset": "fake:32x32x1:5"}, "px, not 32 px with 1"),
        ({"corruptions": "fog", "threat": ["linf:4/255"]}, "--threat has no effect with"),
    )
    def test_refused(self, given, said):
        error = refused(self.evaluate(**given))
        self.assertIn(said, error)
        self.assertLen(error.splitlines(), 1)
        self.assertFalse((self.folder / "out" / "results.jsonl").exists())


class BundleTest(CommandCase):
    """The bundle of an evaluation, checked by the command and put on a board."""

    def setUp(self):
        super().setUp()
        self.given = {"corruptions": "contrast,fog-2", "seed": 3, "split": "test"}
        self.bundle = self.folder / "bundles" / "bright"
        self.bundle.parent.mkdir()

    def check(self, *words, function="net.py") -> tuple[int, str, str]:
        given = ("--function", f"{self.folder / function}:logits_fn") if function else ()
        return called(verify, self.bundle, *given, *words)

    def test_it_is_confirmed(self):
        found = self.record(**self.given, bundle=str(self.bundle))
        printed, _ = ended(self.check("--json"))
        self.assertIn("168 of 168 answers: confirmed", printed)
        mean = found["corruptions"]["mean"]
        self.assertIn(
            f"Confirmed: the accuracy on these images under these corruptions is {mean:.2%}",
            printed,
        )
        plain = json.loads(printed.splitlines()[-1])
        self.assertEqual((plain["whole"], plain["answers"]), (True, 168))
        self.assertAlmostEqual(plain["mean"], mean)
        kept = claims.read(self.bundle)
        rows = contradictions.rights(kept.rows)
        np.testing.assert_allclose(rows[:, 0].mean(), found["clean"])
        np.testing.assert_allclose(rows[:, 1:].mean(), mean)

    def test_another_network_and_another_seed_are_not(self):
        self.record(**self.given, bundle=str(self.bundle))
        (self.folder / "other.py").write_text(NET.replace("0.6", "0.7"))
        code, printed, _ = self.check(function="other.py")
        self.assertEqual(code, 1)
        self.assertIn("a different answer here", printed)
        self.assertIn("This network or its weights differ from the record's", printed)
        bundles.changed(self.bundle, record={"seed": 4})
        code, printed, _ = self.check()
        self.assertEqual(code, 1)
        self.assertIn("24 images not confirmed: not the image that was evaluated", printed)

    def test_a_corruption_that_there_is_not(self):
        found = self.record(corruptions="fog-2", split="test", bundle=str(self.bundle))
        own = found["corruptions"] | {"accuracy": {"all": {"2": found["corruptions"]["mean"]}}}
        bundles.changed(self.bundle, record={"corruptions": own}, corruptions=["clean", "all-2"])
        self.assertIn("which this version does not support", refused(self.check()))

    def test_computed_images_are_no_published_files(self):
        found = self.record(**self.given, bundle=str(self.bundle))
        own = found["corruptions"] | {"images": "files"}
        bundles.changed(self.bundle, record={"corruptions": own})
        said = refused(self.check())
        self.assertIn("the bundle was made from published files, but data set", said)

    def test_it_is_written_of_a_record_that_is_there(self):
        first = self.record(**self.given)
        self.assertEqual(self.record(**self.given, bundle=str(self.bundle)), first)
        self.assertEqual(self.check()[0], 0)
        number = claims.read(self.bundle).number
        self.record(**self.given, bundle=str(self.bundle))
        self.assertEqual(claims.read(self.bundle).number, number)
        said = refused(self.evaluate(**self.given | {"seed": 5}, bundle=str(self.bundle)))
        self.assertIn("holds the bundle of evaluation", said)

    def test_a_ledger_of_an_older_version_has_no_answers(self):
        self.record(**self.given)
        (ledger,) = (self.folder / "out").glob("corruptions-*.jsonl")
        rows = [json.loads(line) for line in ledger.read_text().splitlines()]
        for row in rows:
            del row["right"]
        ledger.write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = refused(self.evaluate(**self.given, bundle=str(self.bundle)))
        self.assertFalse(self.bundle.exists())
        self.assertIn("lacks the per-image answers that --bundle needs, like ledgers from", said)
        self.assertEqual(self.record(**self.given, again=True, bundle=str(self.bundle))["seed"], 3)

    def test_images_for_pytorch(self):
        self.record(**self.given, bundle=str(self.bundle))
        place = self.folder / "images"
        printed, _ = ended(self.check("--write_images", place, function=None))
        count = 256  # all of the split, so that the bundle's program can count them
        self.assertIn(f"{count} images under 7 corruptions", printed)
        fog, labels = np.load(place / "fog.npy"), np.load(place / "labels.npy")
        self.assertEqual((fog.shape, fog.dtype), ((5 * count, 32, 32, 3), np.uint8))
        shown = np.flatnonzero(fog.any(axis=(1, 2, 3))).tolist()
        self.assertEqual(shown, list(range(count, 2 * count)))
        names = claims.read(self.bundle).about["corruptions"]
        shown, count, own = claims_torch.stored_corruptions(place, names, (32, 32, 3))
        np.testing.assert_array_equal(own, labels)

        def net(images, ids):
            return -np.abs(images.mean((1, 2, 3))[:, None] - np.linspace(0.3, 0.6, 5)[None])

        read = claims.read(self.bundle)
        judged = findings.judge(read, shown, net, count=count, labels=own)
        self.assertTrue(judged.whole, judged)
        code, _, said = self.check("--write_images", place, function=None)
        self.assertEqual((code, said.count("\n")), (2, 1))
        self.assertIn("images exists; name a new folder", said)
        code, _, said = self.check("--write_adversarial", self.folder / "x.pt", function=None)
        self.assertEqual((code, said.count("\n")), (2, 1))
        self.assertIn("covers common corruptions and has no adversarial images", said)

    def test_frost(self):
        place = self.folder / "frost"
        place.mkdir()
        for number, light in enumerate((200, 40), 1):
            image = Image.new("RGB", (200, 220), (light, light, 255))
            image.save(place / f"frost{number}.png")
        given = {"corruptions": "frost-1", "frost": str(place), "bundle": str(self.bundle)}
        self.record(**given)
        self.assertEqual(self.check("--frost", place)[0], 0)
        said = refused(self.check())
        self.assertIn("the bundle has images under frost, which needs photographs", said)
        (place / "frost2.png").unlink()
        said = refused(self.check("--frost", place))
        self.assertIn("has different photographs from the bundle's; give the same five files", said)

    def test_a_board(self):
        """Two networks on the same images, and one that does not verify."""
        (self.folder / "dark.py").write_text(NET.replace("0.6", "0.7"))
        sections = []
        for name, file in (("bright", "net.py"), ("dark", "dark.py"), ("wrong", "net.py")):
            function = f"{self.folder / file}:logits_fn"
            given = {"dataset": FAKE, "n": 24, "out": str(self.folder / "out")} | self.given
            ended(call(function=function, bundle=str(self.bundle.parent / name), **given))
            named = function if name != "wrong" else f"{self.folder / 'dark.py'}:logits_fn"
            sections.append(f'[{name}]\nfunction = "{named}"\nname = "{name} one"\n')
        (self.bundle.parent / "networks.toml").write_text("\n".join(sections))
        site = self.folder / "site"
        code, printed, _ = called(board, self.bundle.parent, "--out", site, "--json")
        self.assertEqual(code, 1)
        plain = json.loads(printed.splitlines()[-1])
        self.assertEqual([key.rpartition("/")[2] for key in plain["left_out"]], ["wrong"])
        (own,) = plain["boards"]
        self.assertEqual(own["threat"], "common corruptions: fog-2, contrast")
        (table,) = own["tables"]
        self.assertEqual(table["attack"], "computed with seed 3")
        self.assertLen(table["rows"], 2)
        means = [row["robust"] for row in table["rows"]]
        self.assertEqual(means, sorted(means, reverse=True))
        self.assertEqual([row["passes"] for row in table["rows"]], [168.0, 168.0])
        page = (site / "index.html").read_text()
        self.assertIn("Images: computed with seed 3", page)
        self.assertIn('data-head="mean"', page)
        self.assertNotIn("A stronger attack can only fool", page)

    def test_published_files(self):
        (self.folder / "net.py").write_text(NET.replace("5)", "10)"))
        files = self.folder / "files"
        files.mkdir()
        draw = np.random.default_rng(0)
        images = np.lib.format.open_memmap(files / "fog.npy", "w+", np.uint8, (50_000, 32, 32, 3))
        for severity in range(5):
            images[10_000 * severity :][:12] = draw.integers(0, 256, (12, 1, 1, 3), np.uint8)
        images.flush()
        np.save(files / "labels.npy", np.tile(np.arange(10, dtype=np.uint8), 5000))
        name = f"cifar10-c:{files}"
        self.record(dataset=name, split=None, corruptions="fog", n=12, bundle=str(self.bundle))
        said = refused(self.check())
        self.assertIn(
            "which the author of the bundle may have made; give your own path, as in --dataset",
            said,
        )
        printed, _ = ended(self.check("--dataset", name))
        self.assertIn("60 of 60 answers: confirmed", printed)
        names = claims.read(self.bundle).about["corruptions"]
        shown, count, _ = claims_torch.stored_corruptions(files, names, (32, 32, 3))
        self.assertEqual((count, shown("fog-5", [3]).shape), (10_000, (1, 32, 32, 3)))
        toml = f'[bright]\nfunction = "{self.folder}/net.py:logits_fn"\ndataset = "{name}"\n'
        (self.bundle.parent / "networks.toml").write_text(toml)
        printed, _ = ended(called(board, self.bundle, "--out", self.folder / "site", "--json"))
        (own,) = json.loads(printed.splitlines()[-1])["boards"]
        self.assertEqual((own["data"], own["threat"]), ("cifar10-c", "common corruptions: fog"))
        self.assertEqual(own["tables"][0]["attack"], "the published files")
        self.assertIsNone(own["tables"][0]["rows"][0]["clean"])


class FilesTest(CommandCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.images = np.random.default_rng(0).integers(0, 256, (5, 12, 1, 1, 3)).astype(np.uint8)

    def setUp(self):
        super().setUp()
        self.files = self.folder / "files"
        self.files.mkdir()
        for kind in ("fog", "snow"):
            self.write(kind)
        np.save(self.files / "labels.npy", np.tile(np.arange(10, dtype=np.uint8), 5000))

    def write(self, kind, count=50_000):
        """Twelve images of each severity, the rest is a hole."""
        path = self.files / f"{kind}.npy"
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 32, 32, 3))
        for severity in range(count // 10_000):
            images[10_000 * severity :][:12] = self.images[severity]
        images.flush()

    def record(self, **given):
        (self.folder / "net.py").write_text(NET.replace("5)", "10)"))
        return super().record(**{"dataset": f"cifar10-c:{self.files}", "split": None} | given)

    def test_record(self):
        found = self.record(corruptions="fog,snow-4", n=12)
        said = found["corruptions"]
        self.assertEqual((said["images"], found["clean"]), ("files", None))
        self.assertEqual((found["verdicts"], found["interval"]["clean"]), (None, None))
        means = self.images.astype(float).mean((2, 3, 4)) / 255
        right = (
            np.abs(means[..., None] - np.linspace(0.3, 0.6, 10)).argmin(-1) == np.arange(12) % 10
        )
        self.assertGreater(np.ptp(right.mean(1)), 0)
        for severity in range(5):
            self.assertEqual(said["accuracy"]["fog"][str(severity + 1)], right[severity].mean())
        self.assertEqual(said["accuracy"]["snow"], {"4": right[3].mean()})

    @sweeps.rows(
        ({"corruptions": "all"}, "has no gaussian_noise.npy in"),
        ({"corruptions": "fog", "split": "fog-1"}, "--split=fog-1 has no effect on the files"),
        ({"corruptions": "frost", "frost": "x"}, "--frost=x has no effect on the files"),
        ({"attack": "clean"}, "name one corruption and severity, such as fog-3"),
    )
    def test_refused(self, given, said):
        given = {"dataset": f"cifar10-c:{self.files}", "split": None} | given
        error = refused(self.evaluate(**given))
        self.assertIn(said, error)
        self.assertLen(error.splitlines(), 1)

    def test_files_of_another_length_or_without_labels(self):
        self.write("snow", 20_000)
        for kind, said in (("snow", "snow.npy is uint8[20000"), ("fog", "has no labels.npy")):
            error = refused(
                self.evaluate(dataset=f"cifar10-c:{self.files}", split=None, corruptions=kind)
            )
            self.assertIn(said, error)
            (self.files / "labels.npy").unlink(missing_ok=True)
