"""What an evaluation keeps and counts: ledgers of processes, points of others, costs."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.engine import (
    cascade,
    engine,
    ledger,
    outcome,
    replay,
)
from jaxrobust.evaluation.engine.ledger import Ledger, open_ledger
from jaxrobust.evaluation.engine.outcome import AttackContext, Outcome
from jaxrobust.evaluation.engine.schedule import ImageVerdict, Sample
from jaxrobust.evaluation.network import fingerprint, randomised
from jaxrobust.types import Threat
from tests.support import sweeps

IDS = np.array([30, 10, 20, 40], np.uint32)  # in no order
SHAPE = (2, 2, 1)
IMAGES = np.random.default_rng(0).random((4, *SHAPE), np.float32)
FOOLED = {"attack": "a", "fooled": True, "flat": False, "norm": 0.5, "reached": 3}
STANDS = {"attack": "a", "fooled": False, "flat": True}


def identity(**changes) -> dict:
    probe = {"logits": [[1.0]], "gradients": [[1.0]]}
    known = fingerprint.Fingerprint("program", "gradient", "network", probe, {"jax": "1"})
    own = {"network": None, "search": None, "version": "standard", "seed": 0}
    about = {
        key: changes.pop(key) for key in list(changes) if key in ("images", "versions", "arrays")
    }
    return own | {"fingerprint": known._asdict() | {"images": "images"} | about} | changes


class LedgerTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = Path(self.create_tempdir()) / "ledger.jsonl"

    def opened(self, path="own", ids=IDS, **changes) -> Ledger:
        place = self.path if path == "own" else path
        book = Ledger(place, identity(**changes), ids)
        self.addCleanup(book.close)
        return book

    def written(self, ids=IDS):
        book = self.opened(ids=ids)
        book.add(0, FOOLED, IMAGES[0])
        book.add(2, STANDS, None)
        book.add(1, FOOLED | {"once": True, "norm": 0.25}, IMAGES[1].astype(np.float64))
        book.close()

    def test_parts_know_their_jobs(self):
        tried = {"targets": [3, 1], "restarts": 2}
        own = {"attack": "a (part)", "fooled": False, "flat": True, "tried": tried}
        book = self.opened()
        book.add(3, own, None)
        book.add(2, STANDS | {"doubtful": True}, None)
        book.add(1, FOOLED, IMAGES[1])
        book.close()
        again, name = self.opened(), STANDS["attack"]
        self.assertEqual(again.tried(3, "a"), ([3, 1], 2))
        found = again.survived(np.arange(4), ("a (part)", name))
        self.assertEqual(found[0], (3, own | {"doubtful": False}))
        self.assertEqual([place for place, _ in found], [3, 2])
        other = Ledger(None, identity(), IDS)
        other.take_over_survived(0, found)  # of this very process
        self.assertFalse(other.rows("a (part)")["known"].any())
        other.take_over_survived(1, found)
        self.assertEqual(other.tried(3, "a"), ([3, 1], 2))
        self.assertEqual(other.rows("a (part)")["flat"].tolist(), [False] * 3 + [True])
        for key in ("known", "doubtful"):
            self.assertEqual(other.rows(name)[key].tolist(), [False, False, True, False])

    def test_lines_are_of_ids_and_rows_of_places(self):
        self.written()
        head, *lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        self.assertEqual(head["identity"]["fingerprint"]["images"], "images")
        self.assertEqual([line["image"] for line in lines], [30, 20, 10])
        self.assertEqual([line.get("stored") for line in lines], [0, None, 1])
        order = np.array([3, 2, 1, 0])  # another order of the same images
        book = self.opened(ids=IDS[order])
        rows = book.rows("a")
        self.assertEqual(rows["known"].tolist(), [False, True, True, True])
        self.assertEqual(rows["fooled"].tolist(), [False, False, True, True])
        self.assertEqual(rows["once"].tolist(), [False, False, True, True])
        self.assertEqual(rows["flat"].tolist(), [False, True, False, False])
        self.assertEqual(rows["norm"].tolist(), [0, 0, 0.25, 0.5])
        self.assertEqual(rows["reached"].tolist(), [0, -1, 3, 3])
        np.testing.assert_array_equal(book.adversarial(3, "a", SHAPE), IMAGES[0])
        np.testing.assert_array_equal(book.adversarial(2, "a", SHAPE), IMAGES[1])

    def test_an_image_that_a_kill_cut_off_is_not_in_the_way_of_the_next(self):
        book = self.opened()
        book.add(0, FOOLED, IMAGES[0])
        book.close()
        with self.path.with_suffix(".images").open("ab") as images:
            images.write(IMAGES[1].tobytes()[:7])  # its verdict is not in the ledger yet
        book = self.opened()
        self.assertEqual(book.rows("a")["known"].tolist(), [True, False, False, False])
        book.add(1, FOOLED, IMAGES[1])
        book.add(2, STANDS, None)
        book.add(3, FOOLED, IMAGES[3])
        book.close()
        book = self.opened()
        self.assertEqual(book.rows("a")["fooled"].tolist(), [True, True, False, True])
        for place in (0, 1, 3):
            np.testing.assert_array_equal(book.adversarial(place, "a", SHAPE), IMAGES[place])

    def test_images_that_are_cut_off_are_named(self):
        self.written()
        images = self.path.with_suffix(".images")
        images.write_bytes(images.read_bytes()[:-1])
        book = self.opened()
        book.adversarial(0, "a", SHAPE)
        with self.assertRaisesRegex(ValueError, "lacks the adversarial image from a for image 10"):
            book.adversarial(1, "a", SHAPE)
        images.unlink()
        with self.assertRaisesRegex(ValueError, "lacks the adversarial image from a for image 30"):
            book.adversarial(0, "a", SHAPE)

    def test_every_process_reads_all_files_and_writes_its_own(self):
        self.written()
        with mock.patch.object(ledger.jax, "process_index", return_value=1):
            book = self.opened()
            book.add(3, FOOLED, IMAGES[3])
            book.close()
        other = self.path.with_name("ledger.process-1.jsonl")
        self.assertEqual(json.loads(other.read_text().splitlines()[1])["image"], 40)
        book = self.opened()
        self.assertEqual(book.rows("a")["known"].tolist(), [True] * 4)
        np.testing.assert_array_equal(book.adversarial(3, "a", SHAPE), IMAGES[3])
        np.testing.assert_array_equal(book.adversarial(1, "a", SHAPE), IMAGES[1])
        with mock.patch.object(ledger.jax, "process_count", return_value=2):
            book.check_files()
        with (
            mock.patch.object(ledger.jax, "process_count", return_value=3),
            self.assertRaisesRegex(ValueError, "process 0 cannot see .*process-2.jsonl"),
        ):
            book.check_files()

    def test_what_another_process_found(self):
        book = self.opened()
        rows = np.zeros(2, ledger.ROW)
        rows["known"], rows["fooled"], rows["stored"] = True, True, [5, 6]
        book.take_over(0, np.array([0, 1]), "a", (rows, []))  # one's own
        self.assertFalse(book.rows("a")["known"].any())
        book.take_over(2, np.array([3, 1]), "a", (rows, []))
        own = book.rows("a")
        self.assertEqual(own["stored"].tolist(), [0, 6, 0, 5])
        names = [book._files[n].name for n in own["file"][[3, 1]]]
        self.assertEqual(names, ["ledger.process-2.images"] * 2)
        memory = self.opened(None)
        memory.take_over(1, np.array([2, 0]), "a", (rows, [IMAGES[2], IMAGES[0]]))
        np.testing.assert_array_equal(memory.adversarial(0, "a", SHAPE), IMAGES[0])
        found, points = memory.results(np.array([0, 2]), "a")
        self.assertEqual((found["known"].tolist(), len(points)), ([True, True], 2))
        np.testing.assert_array_equal(points[0], IMAGES[0])
        memory.add(1, FOOLED, IMAGES[1])
        np.testing.assert_array_equal(memory.adversarial(1, "a", SHAPE), IMAGES[1])

    def test_what_is_known_tells_attacks_and_images_apart(self):
        def known(*verdicts):
            book = self.opened(None)
            for place, attack in verdicts:
                book.add(place, STANDS | {"attack": attack}, None)
            return book.known()

        self.assertEqual(known((0, "a"), (1, "a")), known((1, "a"), (0, "a")))
        others = [known((0, "a"), (1, "a")), known((0, "a"), (2, "a")), known((0, "b"), (1, "b"))]
        self.assertEqual({count for count, _ in others}, {2})
        self.assertLen({digest for _, digest in others}, 3)

    @sweeps.rows(
        {"image": "x"},
        {"attack": 3},
        {"fooled": 1},
        {"flat": None},
        {"stored": -1},
        {"stored": None},
        {"stored": "0"},
        {"reached": "x"},
    )
    def test_what_is_no_verdict(self, **changes):
        sound = FOOLED | {"image": 10, "stored": 0}
        self.assertTrue(ledger._is_verdict(sound))
        self.assertTrue(ledger._is_verdict(STANDS | {"image": 10}))
        self.assertFalse(ledger._is_verdict(sound | changes))

    def test_another_evaluation(self):
        self.written()
        self.opened(network="a name").close()  # which is not part of an evaluation
        search = {"arrays": "x", "program": "p"}
        for changes, words in (
            ({"seed": 1}, "seed is 0 there, 1 here"),
            ({"images": "others"}, "its images or labels differ"),
            ({"arrays": "others"}, r"its arrays \(weights\) differ"),
            ({"search": search}, "its search used another network"),
            ({"version": "rand"}, "version is"),
        ):
            message = f"belongs to another evaluation: .*{words}"
            with self.subTest(words), self.assertRaisesRegex(ValueError, message):
                self.opened(**changes)

    def test_versions_that_began_it_stay_known(self):
        self.written()
        text = self.path.read_text().replace('"jax": "1"', '"jax": "0"')
        self.path.write_text(text)
        own = {"identity": identity()}
        other = self.path.with_name("ledger.process-1.jsonl")
        other.write_text(json.dumps(own) + "\n")
        self.assertEqual(self.opened().begun_by, {"jax": "0"})

    def test_a_ledger_of_nothing_is_begun_once(self):
        for _ in range(2):
            with open_ledger(self.path, identity(), IDS) as book:
                del book
        self.assertEqual(self.path.read_text().count("identity"), 1)
        with open_ledger(self.path, identity(), IDS) as book:
            book.add(0, STANDS, None)
            book.add(1, STANDS, None)
        self.assertEqual(self.path.read_text().count("identity"), 1)
        with self.assertRaisesRegex(ValueError, "name a file that ends in .jsonl"):
            self.opened(self.path.with_suffix(".json"))

    def test_processes_must_see_the_same_verdicts(self):
        def other(own):
            return [own, (own[0], "another digest")] if isinstance(own, tuple) else [own]

        with (
            mock.patch.object(ledger.hosts, "everyone", other),
            self.assertRaisesRegex(ValueError, r"processes see different verdicts \(0, 0\)"),
            open_ledger(self.path, identity(), IDS),
        ):
            pass


LINF = Threat("linf", 0.5)


def context(n=4, clean=None, names=("a", "b"), slots=2, rule=None, **more):
    """An evaluation of n images of three classes; the first class is the label of each."""
    held = np.zeros((n, *SHAPE), np.float32) + 0.5
    labels, ids = np.zeros(n, np.int32), np.arange(n, dtype=np.uint32) + 10
    right = np.ones(n, bool) if clean is None else np.array(clean, bool)
    sample = Sample(held, labels, ids, right, labels[:, None], 3, LINF, 7)
    own = Outcome.of(right, [SimpleNamespace(name=name) for name in names], {}, more.get("once"))
    book = Ledger(None, identity(), ids)
    runner = SimpleNamespace(slots=slots, traces=[SimpleNamespace(classes=3)], logits_fn=None)
    return AttackContext(runner, sample, own, book, rule)


class RefusedPointsTest(parameterized.TestCase):
    """Points of a ledger, judged again."""

    def refuse(self, margins, lowest=-100.0):
        of = context(len(margins))
        for place in range(len(margins)):
            of.book.add(place, FOOLED, of.sample.images[place] + np.float32(0.25))

        def forward(runner, images, ids, *, seed, draw):
            return np.float32([[margins[row], 0.0, lowest] for row in ids - 10])

        with mock.patch.object(outcome.engine, "forward", forward):
            outcome.refuse_damaged(of, "a", 3, np.arange(len(margins)))

    def test_rounding_is_forgiven(self):
        spread = 100.0
        self.refuse([0.5 * outcome.hosts.ROUNDING * spread])
        with self.assertRaisesRegex(ValueError, "from a for image 10 does not fool this network"):
            self.refuse([2 * outcome.hosts.ROUNDING * spread])
        with self.assertRaisesRegex(ValueError, "from a for image 11 does not fool this network"):
            self.refuse([-1.0, 5.0])

    def test_a_masked_class_forgives_nothing(self):
        """Behind a mask of -1e9 a margin of a million was rounding."""
        with self.assertRaisesRegex(ValueError, "from a for image 11 does not fool this network"):
            self.refuse([-1.0, 5.0], lowest=-1e9)

    def test_draws_of_a_network_that_is_random(self):
        how = randomised.verdict("majority", 3)
        of = context(1, rule=how)
        of.book.add(0, FOOLED | {"reached": -1}, of.sample.images[0])
        asked = []

        def forward(runner, images, ids, *, seed, draw):
            asked.append(draw)
            return np.float32([[0.0, -1.0, 1.0]])

        with mock.patch.object(outcome.engine, "forward", forward):
            outcome.refuse_damaged(of, "a", 5, np.array([0]))
        self.assertEqual(asked, [5, 1005, 2005])
        self.assertEqual(of.book.rows("a")["reached"].tolist(), [2])


class ReplayTest(parameterized.TestCase):
    def test_networks_of_ledgers(self):
        known = {"program": "p", "gradient": "g", "arrays": "a", "versions": {}}
        self.assertEqual(replay.network_of({"fingerprint": known}), ["p", "g", "a"])
        older = {"network": "n", "weights": "w"}
        self.assertEqual(replay.network_of(older), ["n", "w"])

    @sweeps.rows(("linf", 0.25), ("l2", 0.25), ("l1", 0.25))
    def test_points_are_pulled_into_the_ball(self, norm, epsilon):
        images = np.full((3, *SHAPE), 0.5, np.float32)
        order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
        deltas = np.zeros((3, 4), np.float32)
        deltas[:, 0] = 0.1, 0.25, 0.4
        points = (images.reshape(3, 4) + deltas).reshape(images.shape)
        sizes = lambda found: np.linalg.norm((found - images).reshape(3, -1), order, axis=1)  # noqa: E731
        kept = np.asarray(replay._pull(norm)(points, images, np.float32(epsilon), False))
        np.testing.assert_allclose(sizes(kept), [0.1, 0.25, 0.25], atol=1e-6)
        np.testing.assert_array_equal(kept[0], points[0])  # to the last bit
        rim = np.asarray(replay._pull(norm)(points, images, np.float32(epsilon), True))
        np.testing.assert_allclose(sizes(rim), [0.25] * 3, atol=1e-6)


class CascadeTest(parameterized.TestCase):
    """The bookkeeping of one attack."""

    def attack(self, of=None, name="a", suffix="", targets=0):
        setting = mock.Mock(targets=targets, machine="apgd")
        setting.configure_mock(name=name, norm="linf")
        patch = lambda key, value: self.enter_context(  # noqa: E731
            mock.patch.object(cascade.ensembles, key, return_value=value)
        )
        patch("passes", 3), patch("named", SimpleNamespace(number=41))
        return cascade.Attack(of or context(), setting, mock.Mock(), suffix=suffix)

    def test_what_the_ledger_knows(self):
        once = np.array([True, True, False, False])
        of = context(4, once=once, rule=randomised.verdict("mean"))
        of.book.add(0, FOOLED | {"once": True}, IMAGES[0])
        of.book.add(1, STANDS | {"once": False}, None)
        of.outcome.strike("b", [3])
        of.book.add(3, FOOLED | {"once": True}, IMAGES[3])  # which another attack has fooled
        attack = self.attack(of)
        with mock.patch.object(cascade.outcome, "refuse_damaged") as refused:
            left = attack.recall()
        self.assertEqual(left.tolist(), [2])
        self.assertEqual(refused.call_args.args[3].tolist(), [0])
        self.assertEqual(refused.call_args.args[2], 42)
        self.assertEqual(attack.flat, [False, True])
        self.assertEqual(of.outcome.standing.tolist(), [False, True, True, False])
        self.assertEqual(of.outcome.once.tolist(), [False, True, False, False])

    def verdict(self, image, fooled=True):
        point = np.zeros(SHAPE, np.float32) if fooled else None
        return ImageVerdict(image, fooled, 1, 2, 9, 4, image == 0, point)

    def test_points_wait_for_a_batch_or_five_seconds(self):
        attack = self.attack(context(6, slots=2))
        asked = []
        attack.refuted = lambda part: asked.append([v.image for v in part]) or part[:1]
        with mock.patch.object(cascade.time, "perf_counter", return_value=attack.confirmed + 4.9):
            self.assertEqual(attack.confirm([self.verdict(0)], False), [])
            self.assertEqual(asked, [])
            wrong = attack.confirm(
                [self.verdict(1), self.verdict(2), self.verdict(5, False)], False
            )
        self.assertEqual((asked, [v.image for v in wrong]), ([[0, 1], [2]], [0, 2]))
        self.assertTrue(attack.book.rows("a")["known"][5])  # what survives does not wait
        with mock.patch.object(cascade.time, "perf_counter", return_value=attack.confirmed + 5.1):
            attack.confirm([self.verdict(3)], False)
        self.assertEqual(asked[2:], [[3]])
        attack.confirm([self.verdict(4)], True)
        self.assertEqual(asked[3:], [[4]])
        self.assertEqual(attack.waiting, [])

    @sweeps.rows(
        ({}, True, 0, "", "first gradient is exactly zero for 1 of 2 images"),
        ({"targets": 9}, True, 0, "", "^$"),
        ({"suffix": " (full)"}, True, 0, "", "^$"),
        (
            {},
            False,
            3,
            None,
            "the search fooled 3 images .* robust. .* batch statistics, or .* batch_size=1",
        ),
        ({}, False, 3, "bfloat16", "in bfloat16 .*DEFAULT_MATMUL_PRECISION=highest .*batch_size=1"),
    )
    def test_flags(self, how, flat, unconfirmed, narrower, words):
        attack = self.attack(**how)
        attack.flat, attack.unconfirmed = [True, False], unconfirmed
        with (
            mock.patch.object(cascade, "MACHINES", {"apgd": SimpleNamespace(flat=flat)}),
            mock.patch.object(cascade.slots, "narrower_products", lambda platform: narrower),
        ):
            attack.flag()
        self.assertLen(attack.outcome.flags, words != "^$")
        self.assertRegex(" ".join(attack.outcome.flags.values()), words)

    def test_images_that_stand_aside_are_robust_so_far(self):
        of = context(4)
        aside = of._replace(outcome=of.outcome.without(np.array([True, False, False, True])))
        self.assertEqual(self.attack(aside).standing(), 4)


class EngineTest(parameterized.TestCase):
    @sweeps.rows(
        ("cpu", 32, 1, None, 8),
        ("cpu", 224, 3, None, 24),
        ("gpu", 64, 1, None, 512),
        ("gpu", 65, 2, None, 128),
        ("gpu", 32, 3, 7, 9),
        ("gpu", 32, 3, 9, 9),
    )
    def test_slots(self, platform, size, devices, wished, slots):
        here = [SimpleNamespace(platform=platform)] * devices
        with (
            mock.patch.object(engine, "local_devices", return_value=here),
            mock.patch.object(engine, "Mesh"),
            mock.patch.object(engine.tracing, "argument"),
        ):
            made = engine.make("f", image_size=size, slots=wished)
        self.assertEqual(made.slots, slots)
