"""What an evaluation keeps and counts: ledgers of processes, points of others, costs, progress."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.engine import (
    autoattack,
    cascade,
    engine,
    evaluation_progress,
    ledger,
    outcome,
    replay,
)
from jaxrobust.evaluation.engine.evaluation_progress import Counts, Decisions
from jaxrobust.evaluation.engine.ledger import ROW, Ledger, open_ledger
from jaxrobust.evaluation.engine.outcome import AttackContext, Cost, Outcome, Sample
from jaxrobust.evaluation.engine.replay import KnownVerdicts, LedgerSource, Points
from jaxrobust.evaluation.engine.schedule import Aims, ImageVerdict
from jaxrobust.evaluation.network import fingerprint, randomised
from jaxrobust.types import Threat

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

    def test_an_older_line_has_no_draw_of_its_own(self):
        self.written()
        rows = self.opened().rows("a")
        self.assertEqual(rows["once"].tolist(), rows["fooled"].tolist())

    def test_images_that_are_cut_off_are_named(self):
        self.written()
        images = self.path.with_suffix(".images")
        images.write_bytes(images.read_bytes()[:-1])
        book = self.opened()
        book.adversarial(0, "a", SHAPE)
        with self.assertRaisesRegex(ValueError, "lacks the adversarial image of a on image 10"):
            book.adversarial(1, "a", SHAPE)
        images.unlink()
        with self.assertRaisesRegex(ValueError, "lacks the adversarial image of a on image 30"):
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
            self.assertRaisesRegex(ValueError, "process 0 does not see .*process-2.jsonl"),
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

    @parameterized.parameters(
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

    @parameterized.parameters(
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"images": "others"}, "its images or labels are others"),
        ({"arrays": "others"}, r"its arrays \(weights\) are others"),
        ({"search": {"arrays": "x", "program": "p"}}, "it was searched with another network"),
        ({"version": "rand"}, "version is"),
    )
    def test_another_evaluation(self, changes, words):
        self.written()
        with self.assertRaisesRegex(ValueError, f"belongs to another evaluation: .*{words}"):
            self.opened(**changes)

    def test_a_name_is_no_part_of_an_evaluation(self):
        self.written()
        self.opened(network="a name").close()

    def test_other_versions_go_on_where_arrays_and_probe_agree(self):
        search = {"arrays": "x", "program": "p"}
        known = {"images": "images"}
        theirs = identity(search=search, versions={"jax": "0"}, **known)
        ours = identity(search=search | {"program": "q"})
        self.assertEqual(ledger._begun_by(self.path, theirs, ours), {"jax": "0"})
        self.assertIsNone(
            ledger._begun_by(self.path, identity(search=search), identity(search=search))
        )
        ours = identity(search=search | {"arrays": "y"})
        with self.assertRaisesRegex(ValueError, "it was searched with another network"):
            ledger._begun_by(self.path, theirs, ours)
        ours = identity(search=search | {"program": "q"}, versions={"jax": "0"})
        with self.assertRaisesRegex(ValueError, "it was searched with another network"):
            ledger._begun_by(self.path, theirs, ours)

    def test_versions_that_began_it_stay_known(self):
        self.written()
        text = self.path.read_text().replace('"jax": "1"', '"jax": "0"')
        self.path.write_text(text)
        own = {"identity": identity()}
        other = self.path.with_name("ledger.process-1.jsonl")
        other.write_text(json.dumps(own) + "\n")
        self.assertEqual(self.opened().begun_by, {"jax": "0"})

    def test_verdicts_of_before_were_those_of_one_draw(self):
        theirs = identity(version="rand")
        one = randomised.verdict(randomised.ONE)._asdict()
        ours = identity(version="rand", verdict=one)
        self.assertIsNone(ledger._begun_by(self.path, theirs, ours))
        other = randomised.verdict("mean")._asdict()
        with self.assertRaisesRegex(ValueError, "verdict"):
            ledger._begun_by(self.path, theirs, identity(version="rand", verdict=other))
        known = identity(version="rand", verdict=other)
        self.assertIsNone(ledger._begun_by(self.path, known, known))

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


def context(n=4, clean=None, names=("a", "b"), slots=2, how=None, **more):
    """An evaluation of n images of three classes; the first class is the label of each."""
    held = np.zeros((n, *SHAPE), np.float32) + 0.5
    labels, ids = np.zeros(n, np.int32), np.arange(n, dtype=np.uint32) + 10
    right = np.ones(n, bool) if clean is None else np.array(clean, bool)
    sample = Sample(held, labels, ids, right, labels[:, None], 3, LINF, 7)
    own = Outcome.of(right, [SimpleNamespace(name=name) for name in names], {}, more.get("once"))
    book = Ledger(None, identity(), ids)
    runner = SimpleNamespace(slots=slots, traces=[SimpleNamespace(classes=3)], logits_fn=None)
    return AttackContext(runner, sample, own, book, how)


class RefusedPointsTest(parameterized.TestCase):
    """Points of a ledger, judged again."""

    def refuse(self, margins, move=0.25, reached=-1, slots=2, lowest=-100.0):
        of = context(len(margins), slots=slots)
        for place in range(len(margins)):
            record = FOOLED | {"reached": reached}
            of.book.add(place, record, of.sample.images[place] + np.float32(move))
        asked = []

        def forward(runner, images, ids, *, seed, draw):
            asked.append((ids.tolist(), seed, draw))
            rows = ids - 10
            return np.stack([[margins[row], 0.0, lowest] for row in rows]).astype(np.float32)

        with mock.patch.object(outcome.engine, "forward", forward):
            outcome.refuse_damaged(of, "a", 3, np.arange(len(margins)))
        return of, asked

    def test_every_point_in_batches_of_the_slots(self):
        of, asked = self.refuse([-1.0, -2.0, -3.0, -4.0, -5.0])
        self.assertEqual([ids for ids, _, _ in asked], [[10, 11], [12, 13], [14]])
        self.assertEqual({(seed, draw) for _, seed, draw in asked}, {(7, 3)})
        self.assertEqual(of.book.rows("a")["reached"].tolist(), [1] * 5)
        of, _ = self.refuse([-1.0], reached=2)
        self.assertEqual(of.book.rows("a")["reached"].tolist(), [2])  # as it was noted

    def test_rounding_is_forgiven(self):
        spread = 100.0
        self.refuse([0.5 * outcome.hosts.ROUNDING * spread])
        with self.assertRaisesRegex(ValueError, "of a on image 10 does not fool this network"):
            self.refuse([2 * outcome.hosts.ROUNDING * spread])
        with self.assertRaisesRegex(ValueError, "of a on image 11 does not fool this network"):
            self.refuse([-1.0, 5.0])

    def test_a_masked_class_forgives_nothing(self):
        """Behind a mask of -1e9 a margin of a million was rounding."""
        with self.assertRaisesRegex(ValueError, "of a on image 11 does not fool this network"):
            self.refuse([-1.0, 5.0], lowest=-1e9)

    def test_points_outside(self):
        with self.assertRaisesRegex(
            ValueError, "of a on image 10 is outside the ball: its .images"
        ):
            self.refuse([-1.0], move=0.75)

    def test_draws_of_a_network_that_is_random(self):
        how = randomised.verdict("majority", 3)
        of = context(1, how=how)
        of.book.add(0, FOOLED | {"reached": -1}, of.sample.images[0])
        asked = []

        def forward(runner, images, ids, *, seed, draw):
            asked.append(draw)
            return np.float32([[0.0, -1.0, 1.0]])

        with mock.patch.object(outcome.engine, "forward", forward):
            outcome.refuse_damaged(of, "a", 5, np.array([0]))
        self.assertEqual(asked, [5, 1005, 2005])
        self.assertEqual(of.book.rows("a")["reached"].tolist(), [2])

    def test_a_last_word(self):
        of = context(2)
        points = of.sample.images[:2] + np.float32(0.25)
        logits = np.float32([[0.0, 3.0, 1.0], [2.0, 1.0, 0.0]])
        with (
            mock.patch.object(outcome.engine, "settled", lambda runner, norm, p, images: p),
            mock.patch.object(outcome.engine, "forward", return_value=logits),
        ):
            found, sure, norms, others = outcome.confirmed(of, points, np.array([0, 1]), 4)
        np.testing.assert_array_equal(found, points)
        self.assertEqual((sure.tolist(), others.tolist()), ([True, False], [1, 1]))
        np.testing.assert_allclose(norms, 0.25)


class ReplayTest(parameterized.TestCase):
    def source(self, name, network="ours", norm="linf", epsilon=0.5):
        return LedgerSource(Path(name), network, Threat(norm, epsilon), SHAPE)

    def test_the_likeliest_first(self):
        own = [
            self.source("far", epsilon=0.1),
            self.source("near", epsilon=0.4),
            self.source("b-same", epsilon=0.5),
            self.source("a-same", epsilon=0.5),
            self.source("larger", epsilon=0.6),
            self.source("other-norm", norm="l2", epsilon=0.5),
            self.source("other-network", network="theirs", epsilon=0.5),
            self.source("neither", network="theirs", norm="l2", epsilon=0.5),
        ]
        known = KnownVerdicts(own[::-1], np.zeros(4, bool))
        evaluation = {"network": "x", "norm": "linf", "epsilon": 0.5}
        with mock.patch.object(replay, "network_of", return_value="ours"):
            found = replay.ordered(known, evaluation)
        names = [source.path.name for source in found.sources]
        first = ["a-same", "b-same", "near", "far", "larger"]
        self.assertEqual(names, [*first, "other-network", "other-norm", "neither"])
        self.assertEqual(found.network, "ours")

    def test_points_are_read_by_their_ids(self):
        folder = Path(self.create_tempdir())
        path = folder / "ledger.jsonl"
        lines = [{"identity": {}}]
        lines += [
            {"image": i, "fooled": f, "stored": s} for i, f, s in ((9, 1, 2), (4, 1, 0), (7, 0, 1))
        ]
        path.write_text("".join(json.dumps(line | {"attack": "a"}) + "\n" for line in lines))
        IMAGES.tofile(path.with_suffix(".images"))
        found = replay.points(LedgerSource(path, None, Threat("linf", 0.5), SHAPE))
        self.assertEqual((found.ids.tolist(), found.stored.tolist()), ([4, 9], [0, 2]))
        np.testing.assert_array_equal(found.read(np.array([9, 4, 9])), IMAGES[[2, 0, 2]])
        path.with_suffix(".images").write_bytes(IMAGES.tobytes()[: 3 * IMAGES[0].nbytes - 1])
        with self.assertRaisesRegex(ValueError, "lacks adversarial images of ledger.jsonl"):
            found.read(np.array([9]))
        np.testing.assert_array_equal(found.read(np.array([4])), IMAGES[[0]])

    def test_networks_of_ledgers(self):
        known = {"program": "p", "gradient": "g", "arrays": "a", "versions": {}}
        self.assertEqual(replay.network_of({"fingerprint": known}), ["p", "g", "a"])
        older = {"network": "n", "weights": "w"}
        self.assertEqual(replay.network_of(older), ["n", "w"])

    @parameterized.parameters(("linf", 0.25), ("l2", 0.25), ("l1", 0.25))
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

    def test_what_is_tried_on_what_stands(self):
        of = context(5, clean=[1, 1, 1, 1, 0], slots=2)
        of.book.add(0, FOOLED | {"attack": "replay"}, of.sample.images[0])
        of.outcome.strike("a", [1])
        tried = []

        def trying(evaluation, source, there, stretched, part):
            tried.append((source.path.name, stretched, part.tolist()))
            if source.path.name == "first.jsonl":
                of.book.add(2, FOOLED | {"attack": "replay"}, of.sample.images[2])
                of.outcome.strike("replay", 2)

        first = self.source("first.jsonl")
        second = self.source("second.jsonl", network="theirs")
        ids = {"first.jsonl": [10, 12, 13, 14], "second.jsonl": [11, 12, 13, 99]}

        def there(source):
            return Points(source.path, "sha", SHAPE, np.array(ids[source.path.name]), None)

        known = KnownVerdicts([first, second], np.zeros(5, bool), "ours")
        with (
            mock.patch.object(replay, "_try", trying),
            mock.patch.object(replay, "points", there),
            mock.patch.object(replay, "refuse_damaged") as refused,
            mock.patch.object(replay.hosts, "total", lambda own: own + 20),  # as if of two more
        ):
            cost, shares = replay.run(of, known)
        self.assertEqual(refused.call_args.args[1:3], ("replay", 0))
        self.assertEqual(refused.call_args.args[3].tolist(), [0])
        self.assertEqual(tried, [("first.jsonl", False, [2, 3]), ("second.jsonl", True, [3])])
        self.assertEqual((cost.fooled, cost.forward, cost.idle), (2, 3, 21))
        self.assertEqual([s["ledger"] for s in shares], ["first", "second"])
        self.assertEqual([(s["tried"], s["fooled"]) for s in shares], [(2, 1), (1, 0)])
        self.assertEqual(of.outcome.standing.tolist(), [False, False, False, True, False])


class CascadeTest(parameterized.TestCase):
    """The bookkeeping of one attack."""

    def attack(self, of=None, name="a", suffix="", targets=0, **known):
        setting = mock.Mock(targets=targets, machine="apgd")
        setting.configure_mock(name=name, norm="linf")
        patch = lambda key, value: self.enter_context(  # noqa: E731
            mock.patch.object(cascade.ensembles, key, return_value=value)
        )
        patch("passes", known.get("passes", 3)), patch("most_passes", 100)
        patch("forward", 2), patch("backward", 5)
        patch("named", SimpleNamespace(number=41))
        return cascade.Attack(of or context(), setting, mock.Mock(), suffix)

    def test_what_calls_take(self):
        attack = self.attack()
        attack.count(engine.Call(0, 0, 7.0, True), 50)
        attack.count(engine.Call(40, 30, 2.0, False), 50)
        attack.count(engine.Call(40, 35, 3.0, True), 50)
        self.assertEqual((attack.steps, attack.idle, attack.compile_seconds), (65, 15, 10.0))
        calls = attack.meter.advance.call_args_list
        self.assertEqual([call.args for call in calls][1], (30 * 3, 2.0, False, 100, 50))
        self.assertEqual(attack.draw(), 42)

    def test_what_a_run_costs_and_which_compilations_are_remembered(self):
        attack, now = self.attack(), mock.Mock(return_value=100.0)
        attack.join, attack.meter.awaited = mock.Mock(), lambda calls: calls
        attack.flag = lambda: now.configure_mock(return_value=110.0)
        calls = [
            engine.Call(0, 0, 0.9, True),
            engine.Call(40, 30, 2.0, False),
            engine.Call(0, 0, 3.0, True),  # of fewer slots
        ]
        known = {"program": mock.Mock(return_value="p"), "expected": mock.Mock()}
        remember = mock.Mock()
        with (
            mock.patch.multiple(cascade.compilation, **known, remember=remember),
            mock.patch.object(cascade.ensembles, "targets"),
            mock.patch.object(cascade.engine, "decide", return_value=iter(calls)),
            mock.patch.object(cascade.time, "perf_counter", now),
        ):
            cost = attack.run(50)
        remember.assert_called_once_with("p", 3.0, hit=False)
        self.assertEqual((cost.attack, cost.fooled), (attack.name, 0))
        self.assertEqual((cost.forward, cost.backward, cost.idle), (30 * 2, 30 * 5, 10 * 2))
        self.assertAlmostEqual(cost.compile_seconds, 3.9)
        self.assertAlmostEqual(cost.seconds, 10 - 3.9)

    def test_what_the_ledger_knows(self):
        once = np.array([True, True, False, False])
        of = context(4, once=once, how=randomised.verdict("mean"))
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

    def test_what_does_not_hold_is_doubted(self):
        attack = self.attack()
        points = np.zeros((2, *SHAPE), np.float32)
        answer = (points, np.array([True, False]), np.array([0.5, 0.6]), np.array([1, 2]))
        with mock.patch.object(cascade.outcome, "confirmed", return_value=answer):
            wrong = attack.refuted([self.verdict(1), self.verdict(2)])
            attack.refuted([self.verdict(3), self.verdict(0)])
        self.assertEqual([v.image for v in wrong], [2])
        self.assertEqual(attack.doubtful, {2, 0})
        row = attack.book.rows("a")[1]
        self.assertEqual((row["fooled"], row["norm"], row["reached"]), (True, 0.5, 1))
        self.assertEqual(attack.meter.decided.call_args_list[0].args, (3, 9 * 3))

    def test_a_line_of_the_ledger(self):
        attack, part = self.attack(), np.zeros(4, ROW)
        attack.book = mock.Mock()
        attack.book.rows.return_value = part
        attack.write(self.verdict(1), IMAGES[1], 0.5, 2)
        place, record, point = attack.book.add.call_args.args
        self.assertEqual(place, 1)
        self.assertEqual(
            record,
            {"attack": "a", "fooled": True, "target": 1, "restart": 2, "iterations": 9, "norm": 0.5}
            | {"reached": 2, "seed": 7, "flat": False},
        )
        np.testing.assert_array_equal(point, IMAGES[1])
        attack.book.rows.assert_called_with("a (part)")
        with self.subTest("what a part has found is in it"):
            part["flat"][2] = part["doubtful"][2] = True
            attack.write(self.verdict(2))
            record = attack.book.add.call_args.args[1]
            self.assertTrue(record["flat"] and record["doubtful"] and not record["fooled"])
            self.assertEqual(attack.doubtful, {2})
            attack.write(self.verdict(2), IMAGES[1])
            self.assertNotIn("doubtful", attack.book.add.call_args.args[1])

    def test_jobs_of_a_part_are_made(self):
        attack = self.attack()
        attack.setting = SimpleNamespace(restarts=2)
        attack.book = Ledger(None, identity(), IDS)
        tried = {"targets": [7, 5], "restarts": 1}
        own = {"attack": "a (part)", "fooled": False, "flat": False, "tried": tried}
        attack.book.add(2, own, None)
        which, targets = np.array([1, 2]), np.array([[5, 6, 7], [5, 6, 7]])
        made = attack.made(which, targets)
        self.assertEqual(made[0].tolist(), [[False, False]] * 3)
        self.assertEqual(made[1].tolist(), [[True, False], [False, False], [True, False]])
        self.assertIsNone(attack.made(which[:1], targets[:1]))

    def test_flags(self):
        for how, flagged in (({}, True), ({"targets": 9}, False), ({"suffix": " (full)"}, False)):
            attack = self.attack(**how)
            attack.flat, attack.unconfirmed = [True, False], 0
            with mock.patch.object(cascade, "MACHINES", {"apgd": SimpleNamespace(flat=True)}):
                attack.flag()
            self.assertEqual("zero-gradients" in attack.outcome.flags, flagged, str(how))
        attack = self.attack()
        attack.flat, attack.unconfirmed = [True], 3
        with mock.patch.object(cascade, "MACHINES", {"apgd": SimpleNamespace(flat=False)}):
            attack.flag()
        self.assertEqual([*attack.outcome.flags], ["unconfirmed by a"])
        self.assertIn(
            "3 images were fooled in the search", attack.outcome.flags["unconfirmed by a"]
        )

    @parameterized.parameters(
        (None, "look for batch statistics, or compare with batch_size=1"),
        (
            "bfloat16",
            "may multiply in bfloat16 .*: JAX_DEFAULT_MATMUL_PRECISION=highest .*batch_size=1",
        ),
    )
    def test_a_narrower_search_is_named_where_images_are_not_confirmed(self, narrower, said):
        attack = self.attack()
        attack.flat, attack.unconfirmed = [True], 1
        with (
            mock.patch.object(cascade.slots, "narrower_products", lambda platform: narrower),
            mock.patch.object(cascade, "MACHINES", {"apgd": SimpleNamespace(flat=False)}),
        ):
            attack.flag()
        self.assertRegex(attack.outcome.flags["unconfirmed by a"], f"count as robust.*{said}")

    def test_images_that_stand_aside_are_robust_so_far(self):
        of = context(4)
        aside = of._replace(outcome=of.outcome.without(np.array([True, False, False, True])))
        self.assertEqual(self.attack(aside).standing(), 4)

    def search(self, n, falls=(), all_fall=()):
        of = context(n + 1, clean=[1] * n + [0])
        of.runner.search_fn = "guide"
        of = of._replace(runner=engine.Engine(None, 2, "f", "guide", False, {}, None))
        chosen = []

        def attacked(evaluation, settings, which):
            chosen.append(np.flatnonzero(which))
            own = falls if len(chosen) == 1 else all_fall
            fallen = np.flatnonzero(which)[list(own)]
            evaluation.outcome.standing[fallen] = False
            self.assertIsNone(evaluation.runner.search_fn)
            return [Cost("x (full)", len(own), 10, 20, 1, 0.5, 0.25)] * 2

        with mock.patch.object(cascade, "_attacked", attacked):
            cost, found = cascade.search_again(of, ["settings"])
        return cost, found, chosen, of

    def test_all_of_few_survivors_are_searched_again(self):
        cost, found, chosen, of = self.search(64, falls=(3,))
        self.assertLen(chosen[0], 64)
        self.assertLen(chosen, 1)
        self.assertEqual((found["survivors"], found["sampled"], found["fooled"]), (64, 64, 1))
        self.assertEqual((found["at_most"], found["fooled_of_all"]), (1 / 64, None))
        self.assertAlmostEqual(found["robust_at_least"], 63 / 65)
        self.assertEqual(cost, Cost("full", 2, 20, 40, 2, 1.0, 0.5))
        self.assertIn("there are no others; search with logits_fn", of.outcome.flags["search-gap"])

    def test_a_sample_of_many_survivors(self):
        _, found, chosen, of = self.search(100)
        self.assertLen(chosen, 1)
        self.assertNotEqual(chosen[0].tolist(), [*range(64)])
        self.assertLen({*chosen[0].tolist()}, 64)
        self.assertEqual(found["at_most"], cascade.checks.upper_bound(0, 64))
        least = (100 - 36 * found["at_most"]) / 101
        self.assertAlmostEqual(found["robust_at_least"], least)
        words = of.outcome.flags["search-gap"]
        self.assertIn(f"of the other 36 up to {found['at_most'] * 36:.0f} may fall so", words)
        self.assertNotIn("; search with logits_fn", words)

    def test_if_one_of_the_sample_falls_all_are_searched(self):
        cost, found, chosen, of = self.search(100, falls=(0, 5), all_fall=(1,))
        self.assertEqual(sorted([*chosen[0], *chosen[1]]), [*range(100)])
        self.assertEqual((found["fooled"], found["fooled_of_all"]), (2, 3))
        self.assertAlmostEqual(found["robust_at_least"], 97 / 101)
        self.assertEqual(cost.forward, 40)
        self.assertIn("hence all 100 were attacked so, and 3 fell", of.outcome.flags["search-gap"])

    def test_attacks_on_some_leave_the_others_alone(self):
        of = context(4)
        of.outcome.strike("a", [0])

        class Attack:
            def __init__(self, evaluation, setting, meter, suffix):
                self.evaluation, self.name = evaluation, f"{setting}{suffix}"

            def run(self, later):
                self.standing = self.evaluation.outcome.standing
                self.standing[np.flatnonzero(self.standing)[0]] = False
                return self.name, later

        chosen = np.array([False, True, True, False])
        with mock.patch.object(cascade, "Attack", Attack):
            costs = cascade._attacked(of, ["x"], chosen)
        self.assertEqual(costs, [("x (full)", 0)])
        self.assertEqual(of.outcome.standing.tolist(), [False, False, True, True])
        self.assertEqual(chosen.tolist(), [False, True, True, False])


class ProgressTest(parameterized.TestCase):
    def test_what_is_left(self):
        counts = Counts(
            undecided=90, passes=500, survived=2, fooled=8, of_fooled=80, of_survived=200
        )
        found = counts.left(slots=16, most=100, later=50, standing=92)
        under_way, cheap = 500 - 80 - 200, 10
        endured = min(under_way / 20, 16)
        share = 8 / (10 + endured)
        each = (1 - share) * 100 + share * cheap
        expected = endured * 100 + (90 - endured) * each - under_way
        self.assertAlmostEqual(found.attack, expected)
        self.assertAlmostEqual(found.later, (92 - share * (90 - endured)) * 50)
        self.assertFalse(found.bound)
        none = Counts(undecided=5).left(slots=16, most=100, later=2, standing=7)
        self.assertEqual((none.attack, none.later, none.bound), (500, 14, True))
        dear = Counts(undecided=5, fooled=1, of_fooled=1000, passes=1000)
        self.assertLessEqual(dear.left(slots=1, most=100, later=0, standing=5).attack, 500)

    def meter(self, enabled=True, watched=False, **how):
        self.said = io.StringIO()
        self.enter_context(contextlib.redirect_stderr(self.said))
        self.enter_context(mock.patch.object(evaluation_progress, "watched", return_value=watched))
        self.enter_context(mock.patch.object(evaluation_progress, "columns", return_value=200))
        interval = lambda k, n: (k / n - 0.125, k / n + 0.125)  # noqa: E731
        return Decisions(8, interval=interval, enabled=enabled)

    def test_a_line(self):
        meter = self.meter()
        meter.begin("square", 4, 1, 6, 2)
        self.assertIn("square: 1 of 4 images are in the ledger", self.said.getvalue())
        meter.advance(0, 0.9, True, 10, 0)
        self.assertNotIn("compiled in", self.said.getvalue())
        meter.advance(0, 1.1, True, 10, 0)
        self.assertIn("square: compiled in 1.1 s", self.said.getvalue())
        meter.decided(5, 4, fooled=True)
        with mock.patch.object(evaluation_progress.time, "perf_counter", return_value=100.0):
            meter.advance(8, 6.0, False, 10, 3)
        line = self.said.getvalue().splitlines()[-1]
        self.assertRegex(line, r"2/4 decided, robust at most 62.5% \(50.0% to 75.0%\)")
        counts = meter._counts.left(slots=2, most=10, later=3, standing=5)
        seconds = (counts.attack + counts.later) * 6 / 8
        self.assertIn(f"ETA {evaluation_progress.clock(seconds)},", line)
        before = self.said.getvalue()
        with mock.patch.object(evaluation_progress.time, "perf_counter", return_value=107.9):
            meter.advance(8, 1.0, False, 10, 3)
        self.assertEqual(self.said.getvalue(), before)  # a line in eight seconds
        with mock.patch.object(evaluation_progress.time, "perf_counter", return_value=108.1):
            meter.advance(8, 1.0, False, 10, 3)
        self.assertNotEqual(self.said.getvalue(), before)

    def test_the_pace_is_that_after_the_first_call(self):
        meter = self.meter()
        meter.begin("square", 4, 0, 6, 2)
        for passes, seconds in ((1, 9.0), (10, 1.0), (10, 1.0)):
            meter.advance(passes, seconds, False, 100, 0)
        self.assertEqual((meter._passes, meter._seconds), (20, 2.0))

    @parameterized.parameters((True, 0, True), (True, 1, False), (False, 0, False))
    def test_who_speaks(self, enabled, process, speaks):
        with mock.patch.object(evaluation_progress.jax, "process_index", return_value=process):
            meter = self.meter(enabled)
        meter.begin("square", 4, 0, 6, 2)
        self.assertEqual("compiling" in self.said.getvalue(), speaks)


class ArgumentsTest(parameterized.TestCase):
    @parameterized.parameters(
        (None, 3, [0, 1, 2]),
        ([5, 2, 9], 3, [5, 2, 9]),
        ([2**32 - 1, 0], 2, [2**32 - 1, 0]),
        ([], 0, []),
    )
    def test_ids(self, ids, n, expected):
        found = autoattack._ids(ids, n)
        self.assertEqual((found.tolist(), found.dtype), (expected, np.uint32))

    @parameterized.parameters(([1, 1], 2), ([2**32, 0], 2), ([-1, 0], 2), ([1.0, 2.0], 2), ([1], 2))
    def test_no_ids(self, ids, n):
        with self.assertRaisesRegex(ValueError, f"image_ids: pass {n} different ints"):
            autoattack._ids(ids, n)

    def test_rules(self):
        self.assertIsNone(autoattack._verdict("standard", None, None))
        self.assertEqual(autoattack._verdict("rand", None, None), randomised.verdict())
        for rule, draws in (("mean", None), (None, 3)):
            with self.assertRaisesRegex(
                ValueError, "judges a randomised network: pass version='rand'"
            ):
                autoattack._verdict("plus", rule, draws)

    def test_flags_of_all_processes(self):
        runner = SimpleNamespace(slots=6, mesh=SimpleNamespace(size=2), logits_fn="f")
        with (
            mock.patch.object(
                autoattack.reliability, "check_network", return_value={"a": "1"}
            ) as check,
            mock.patch.object(autoattack.hosts, "everyone", lambda own: [own, {"b": "2"}]),
        ):
            found = autoattack._check_network(runner, "images", "labels")
        self.assertEqual(found, {"a": "1", "b": "2"})
        self.assertEqual(check.call_args.kwargs, {"batch_size": 3})

    @parameterized.parameters(None, "mean")
    def test_clean_verdicts_are_shared_by_processes(self, rule):
        how = None if rule is None else randomised.verdict(rule, 2)
        runner = SimpleNamespace(slots=2, traces=[SimpleNamespace(classes=3)])
        logits = np.float32([[3, 2, 1], [1, 2, 3], [3, 1, 2], [np.nan, 0, 0], [1, 3, 2]])
        asked = []

        def forward(runner, images, ids, *, seed, draw):
            asked.append((ids.tolist(), draw))
            return logits[ids]

        theirs = [
            np.array([True, True]),
            np.array([True, False]),
            np.array([True, True]),
            np.array([False, True]),
            np.array([[7], [8]]),
        ]
        with (
            mock.patch.object(autoattack.hosts, "share", lambda all_of: all_of[::2]),
            mock.patch.object(autoattack.hosts, "everyone", lambda own: [own, theirs]),
            mock.patch.object(autoattack.jax, "process_count", return_value=2),
            mock.patch.object(outcome.engine, "forward", forward),
        ):
            ids = np.arange(5, dtype=np.uint32)
            labels = np.zeros(5, np.int32)
            found = autoattack._classified(runner, np.zeros((5, *SHAPE)), labels, ids, 7, 1, how)
        clean, once, finite, sure, likely = (part.tolist() for part in found)
        self.assertEqual(sure, [rule is None, False, rule is None, True, rule is None])
        self.assertEqual(clean, [True, True, True, True, False])
        self.assertEqual(once, [True, True, True, False, False])
        self.assertEqual(finite, [True] * 5)
        self.assertEqual(likely, [[1], [7], [2], [8], [1]])
        self.assertEqual([ids for ids, draw in asked if draw == 0], [[0, 2], [4]])


class EngineTest(parameterized.TestCase):
    @parameterized.parameters(
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

    @parameterized.parameters(0, -1, 1.5, "8")
    def test_no_slots(self, slots):
        with self.assertRaisesRegex(ValueError, "is not a number of images; pass an int >= 1"):
            engine.make(lambda x: x, slots=slots)

    def test_points_of_one_draw_and_of_the_tally(self):
        shape = (3, 1, 1, 1)
        slots = SimpleNamespace(
            fooled=np.array([True, False, False]),
            excess=np.array([-1.0, 0.0, -1.0]),
            adversarial=np.full(shape, 5.0),
            strongest=np.full(shape, 6.0),
        )
        self.assertEqual(engine._fooled(slots).tolist(), [True, True, False])
        found = engine._points(slots).reshape(3, 2)
        np.testing.assert_array_equal(found, [[5, np.nan], [np.nan, 6], [np.nan, np.nan]])
        slots.excess = None
        self.assertEqual(engine._fooled(slots).tolist(), [True, False, False])
        self.assertEqual(engine._points(slots).shape, shape)

    def decided(self, takes, search=None, seconds=100.0, idle=5):
        """The moves to fewer slots in an attack of three calls, and the limits of those."""
        off = np.zeros(8, bool)
        about = {"live": ~off, "fooled": off, "flat": off, "steps": np.full(8, 10)}
        slots = SimpleNamespace(**about, excess=None, adversarial=0, keys=0)
        limits, clock = [], iter(np.arange(99) * seconds)

        def proceed(network, searched, epsilon, slots, limit, floor, prepared):
            limits.append(int(limit))
            return slots, np.array([2])

        programs = {engine.devices.programs: (lambda *given: slots, proceed)}
        runner = SimpleNamespace(
            compiled=lambda program, *of: programs.get(program, lambda *given: []),
            **{"mesh": mock.Mock(size=1), "keyed": False, "tally": False, "slots": 8},
            **{"logits_fn": "net", "search_fn": search},
        )
        jobs = mock.Mock(**{"assign.side_effect": [True] * 3 + [False], "floor.return_value": 0})
        jobs.needed.return_value, jobs.narrow.return_value = 8 - idle, np.arange(8 - idle)
        jobs.verdicts.return_value, jobs.rows.return_value = [], "rows"
        asked = lambda network, image, each, keyed: network in takes  # noqa: E731
        with (
            mock.patch.object(engine, "Jobs", return_value=jobs),
            mock.patch.object(engine, "NamedSharding"),
            mock.patch.object(engine.jax, "device_put", lambda array, sharding: array),
            mock.patch.object(engine.jax, "eval_shape", return_value=()),
            mock.patch.object(engine.tracing, "takes", asked),
            mock.patch.object(engine, "_moved", side_effect=lambda slots, *to: slots) as moved,
            mock.patch.object(engine.time, "perf_counter", lambda: next(clock)),
        ):
            setting = engine.ensembles.base("apgd-ce", "linf")
            aims = Aims(np.zeros((8, 1), int))
            data = np.zeros((8, *SHAPE)), np.zeros(8, int), np.arange(8), np.arange(8)
            how = {"epsilon": 0.1, "seed": 1, "confirm": lambda found, all_of: []}
            calls = list(engine.decide(runner, setting, *data, aims, **how))
        self.assertEqual([call[3] for call in calls], [limit == 0 for limit in limits])
        return [len(call.args[1]) for call in moved.call_args_list], limits

    @parameterized.parameters(
        (("net",), None, [3]),
        ((), None, []),
        (("net", "search"), "search", [3]),
        (("net",), "search", []),  # both must take so few images
        (("search",), "search", []),
    )
    def test_fewer_slots_where_all_networks_take_fewer_images(self, takes, search, moves):
        # The first call compiles; what compiles anew makes no step either.
        limits = [0, 8, 0] if moves else [0, 8, 4]
        self.assertEqual(self.decided(takes, search), (moves, limits))

    @parameterized.parameters((100.0, 0, []), (0.3, 5, []), (0.8, 5, [3]))
    def test_fewer_slots_where_that_saves_twenty_seconds(self, seconds, idle, moves):
        """Of some 90 steps of half of so many seconds, as much as the share that is idle."""
        self.assertEqual(self.decided(("net",), None, seconds, idle)[0], moves)

    def test_rows_of_zeros_behind(self):
        found = engine.padded(np.ones((2, 3), np.int32), 4)
        self.assertEqual((found.dtype, found.tolist()), (np.int32, [[1] * 3] * 2 + [[0] * 3] * 2))


if __name__ == "__main__":
    absltest.main()
