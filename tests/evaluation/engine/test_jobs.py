"""Which slot does which job: in any order, verdicts are those of one job after another."""

import itertools
from types import SimpleNamespace

import numpy as np
from absl.testing import parameterized

from jaxrobust.evaluation.engine.schedule import Aims, Jobs
from tests.support import sweeps


class Bench:
    """Slots that take each job its number of steps, and fool as a table says."""

    def __init__(self, jobs: Jobs, slots: int, needs, fools, flat=None) -> None:
        self.jobs, self.slots, self.needs, self.fools = jobs, slots, needs, fools
        self.flat = np.zeros(needs.shape, bool) if flat is None else flat
        self.made, self.useful, self.begun = np.zeros(slots, int), 0, []

    def call(self, steps: int):
        """Make so many steps in all busy slots; the verdicts that are known then."""
        fresh = self.jobs._fresh
        for slot in fresh:
            self.made[slot] = 0
            self.begun.append(self.jobs._busy[slot])
        live, fooled = np.zeros(self.slots, bool), np.zeros(self.slots, bool)
        flat = np.zeros(self.slots, bool)
        for slot, job in self.jobs._busy.items():
            self.made[slot] = min(self.made[slot] + steps, self.needs[job])
            live[slot] = self.made[slot] < self.needs[job]
            fooled[slot], flat[slot] = not live[slot] and self.fools[job], self.flat[job]
        points = lambda: np.arange(self.slots, dtype=np.float32)  # noqa: E731
        self.useful += self.jobs.collect(live, fooled, self.made.copy(), flat, points)
        return list(self.jobs.verdicts())


def run(needs, fools, slots, restarts=1, devices=1, steps=3, flat=None):
    """Run all jobs; verdicts by image, and the bench."""
    needs, fools = np.array(needs), np.array(fools, bool)
    kinds = needs.shape[1] // restarts
    targets = np.arange(needs.shape[0] * kinds, dtype=np.int32).reshape(-1, kinds) + 100
    which = 10 * np.arange(len(needs))
    jobs = Jobs(slots, devices, which, Aims(targets), restarts)
    bench, found = Bench(jobs, slots, needs, fools, flat), {}
    while jobs.assign():
        for verdict in bench.call(steps):
            found[verdict.image] = verdict
    return found, bench


class VerdictsTest(parameterized.TestCase):
    @sweeps.rows(*itertools.product((1, 2, 3, 8, 24), (1, 4, 100), (0, 1)))
    def test_verdicts_are_those_of_one_job_after_another(self, slots, steps, seed):
        rng = np.random.default_rng(seed)
        needs, fools = rng.integers(1, 20, (7, 6)), rng.random((7, 6)) < 0.2
        flat = rng.random((7, 6)) < 0.5
        found, bench = run(needs, fools, slots, restarts=2, steps=steps, flat=flat)
        self.assertEqual(sorted(found), [10 * i for i in range(7)])
        for image in range(7):
            won = np.flatnonzero(fools[image])
            last = won[0] if len(won) else 5
            verdict = found[10 * image]
            self.assertEqual((verdict.fooled, verdict.job), (len(won) > 0, last))
            self.assertEqual(verdict.target, 100 + 3 * image + last // 2)
            self.assertEqual(verdict.restart, last % 2)
            self.assertEqual(verdict.steps, needs[image, : last + 1].sum())
            self.assertEqual(verdict.flat, flat[image, 0])  # of the first job alone
            self.assertEqual(verdict.adversarial is not None, verdict.fooled)
        self.assertGreaterEqual(bench.useful, sum(v.steps for v in found.values()))
        self.assertLessEqual(bench.useful, needs.sum())
        self.assertLen(set(bench.begun), len(bench.begun))  # none was made twice

    @sweeps.rows(
        ([1, 1, 1], [1, 1, 1], 0, 1), ([1, 1, 1], [0, 1, 1], 1, 2), ([9, 1, 1], [1, 1, 1], 0, 9)
    )
    def test_the_first_of_several_that_fool_counts(self, needs, fools, job, steps):
        found, _ = run([needs], [fools], 3)
        self.assertEqual((found[0].fooled, found[0].job, found[0].steps), (True, job, steps))
        self.assertEqual(found[0].adversarial, job)  # the point of its own slot

    def test_a_point_stays_what_it_was_when_it_fooled(self):
        jobs = Jobs(2, 1, np.array([7]), Aims(np.arange(2, dtype=np.int32)[None]), 1)
        jobs.assign()
        held, both = np.float32([[1], [2]]), np.ones(2, bool)
        jobs.collect(~both, both, np.ones(2, int), ~both, lambda: held)
        held[:] = 0  # the devices' next points
        (verdict,) = jobs.verdicts()
        self.assertEqual(verdict.adversarial.tolist(), [1])

    @sweeps.rows(1, 3, 12)
    def test_jobs_that_are_made_stay_out(self, slots):
        """Verdicts are as if they had been made in vain, also where a later one is refuted."""
        needs = np.array([[2, 3, 4, 5], [6, 7, 8, 9]])
        fools = np.array([[0, 0, 1, 1], [0, 0, 0, 0]], bool)
        made = np.array([[1, 0, 0, 0], [1, 0, 1, 0]], bool).reshape(2, 2, 2)
        targets = np.array([[5, 6], [7, 8]], np.int32)
        jobs = Jobs(slots, 1, np.array([10, 20]), Aims(targets, made), 2)
        bench, found, refuted = Bench(jobs, slots, needs, fools), {}, False
        while jobs.assign():
            for verdict in bench.call(3):
                if verdict.image == 10 and not refuted:
                    refuted, fools[0, 2] = True, False
                    jobs.refute([verdict])
                else:
                    found[verdict.image] = verdict
        self.assertNoCommonElements(bench.begun, [(0, 0), (1, 0), (1, 2)])
        self.assertEqual((found[10].fooled, found[10].job, found[10].target), (True, 3, 6))
        self.assertEqual(found[10].steps, 3 + 4 + 5)
        self.assertEqual((found[20].fooled, found[20].steps), (False, 7 + 9))

    def test_jobs_go_out_target_by_target(self):
        _, bench = run(np.full((3, 2), 1), np.zeros((3, 2)), 1)
        self.assertEqual(bench.begun, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)])

    def test_devices_take_turns(self):
        which, targets = np.arange(4), np.zeros((4, 1), np.int32)
        jobs = Jobs(6, 2, which, Aims(targets), 1)
        jobs.assign()
        self.assertEqual(jobs._busy, {0: (0, 0), 3: (1, 0), 1: (2, 0), 4: (3, 0)})
        self.assertEqual(jobs.floor().tolist(), [0, 0])

    def test_later_jobs_of_a_fooled_image_are_dropped(self):
        needs, fools = [[9, 9, 9], [1, 9, 9]], [[0, 0, 0], [1, 0, 0]]
        found, bench = run(needs, fools, 6, steps=2)
        self.assertNotIn((1, 1), [job for job in bench.begun[6:]])
        self.assertEqual(bench.useful, 3 * 9 + 1 + 2 * 2)  # two jobs were stopped after two steps
        self.assertEqual(found[10].steps, 1)


class RowsTest(parameterized.TestCase):
    def test_what_a_fresh_slot_is_told(self):
        images = np.arange(30, dtype=np.float32).reshape(30, 1, 1, 1)
        labels, ids = np.arange(30) + 40, np.arange(30, dtype=np.uint32) + 70
        sample = SimpleNamespace(images=images, labels=labels, ids=ids)
        targets = np.int32([[5, 6], [7, 8]])
        jobs = Jobs(3, 1, np.array([20, 10]), Aims(targets), 2)
        self.assertTrue(jobs.assign())
        rows = jobs.rows(sample)
        self.assertEqual(rows.images.ravel().tolist(), [20, 10, 20])
        self.assertEqual((rows.labels.tolist(), rows.ids.tolist()), ([60, 50, 60], [90, 80, 90]))
        self.assertEqual((rows.targets.tolist(), rows.restarts.tolist()), ([5, 7, 5], [0, 0, 1]))
        self.assertEqual((rows.fresh.tolist(), rows.first.tolist()), ([True] * 3, [0] * 3))
        jobs.assign()
        self.assertIsNone(jobs.rows(sample))  # nothing changed
        live = np.array([True, False, True])
        jobs.collect(live, ~live, np.array([1, 1, 1]), ~live, lambda: images[:3])
        jobs.assign()
        rows = jobs.rows(sample)
        self.assertEqual(rows.fresh.tolist(), [False, True, False])
        self.assertEqual(rows.keep.tolist(), [True] * 3)
        self.assertEqual((rows.targets[1], rows.restarts[1]), (6, 0))

    def test_slots_that_suffice(self):
        suffice = {1: 1, 3: 3, 4: 4, 5: 6, 6: 6, 7: 8, 9: 12, 13: 16}
        rows = [(16, left, each) for left, each in suffice.items()]
        for slots, left, each in (*rows, (4, 5, 4), (6, 5, 6)):  # of (4, 5) others wait
            jobs = Jobs(slots, 1, np.arange(left), Aims(np.zeros((left, 1), np.int32)), 1)
            jobs.assign()
            self.assertEqual(jobs.needed(), each, left)

    def test_fewer_slots_keep_their_jobs(self):
        jobs = Jobs(8, 2, np.arange(3), Aims(np.zeros((3, 1), np.int32)), 1)
        jobs.assign()
        before = dict(jobs._busy)
        places = jobs.narrow()
        self.assertEqual(places.tolist(), [0, 1, 4, -1])
        self.assertEqual(sorted(jobs._busy.values()), sorted(before.values()))
        for slot, job in jobs._busy.items():
            self.assertEqual(before[places[slot]], job)

    @sweeps.rows((8, 20, [6]), (8, 8, [0]), (2, 20, [1]), (8, 3, [0]))
    def test_when_a_device_comes_back_for_work(self, slots, images, floor):
        jobs = Jobs(slots, 1, np.arange(images), Aims(np.zeros((images, 1), np.int32)), 1)
        jobs.assign()
        self.assertEqual(jobs.floor().tolist(), floor)


class RefutedTest(parameterized.TestCase):
    """A point that does not hold: the job continues behind it, as if nothing had been found."""

    def begun(self, kinds=3, repeats=True):
        jobs = Jobs(2, 1, np.array([7]), Aims(np.arange(kinds, dtype=np.int32)[None]), 1, repeats)
        jobs.assign()
        return jobs

    def fool(self, jobs, slot, steps):
        count = jobs.width
        live, fooled = np.ones(count, bool), np.zeros(count, bool)
        live[slot], fooled[slot] = False, True
        made = np.zeros(count, int)
        made[slot] = steps
        jobs.collect(live, fooled, made, ~fooled, lambda: np.zeros((count, 1), np.float32))
        return list(jobs.verdicts())

    def first(self, jobs):
        jobs.assign()
        images = np.zeros((8, 1, 1, 1), np.float32)
        ids = np.arange(8, dtype=np.uint32)
        rows = jobs.rows(SimpleNamespace(images=images, labels=np.arange(8), ids=ids))
        return {int(rows.targets[s]): int(rows.first[s]) for s in np.flatnonzero(rows.fresh)}

    def test_the_same_job_again_from_the_step_behind(self):
        jobs = self.begun()
        (verdict,) = self.fool(jobs, 0, 4)
        self.assertEqual((verdict.fooled, verdict.job, verdict.steps), (True, 0, 4))
        jobs.refute([verdict])
        self.assertEqual(self.first(jobs), {0: 4, 1: 0})  # the second had been dropped
        (verdict,) = self.fool(jobs, 0, 5)
        jobs.refute([verdict])
        self.assertEqual(self.first(jobs)[0], 5 - 1 + 2)
        (verdict,) = self.fool(jobs, 0, 9)
        jobs.refute([verdict])
        self.assertEqual(self.first(jobs)[0], 9 - 1 + 4)

    def test_what_a_later_job_has_found_is_not_lost(self):
        jobs = self.begun(2)
        self.assertEqual(self.fool(jobs, 1, 2), [])  # waits for the first job
        (verdict,) = self.fool(jobs, 0, 4)
        jobs.refute([verdict])
        jobs.assign()
        slot = next(s for s, job in jobs._busy.items() if job == (0, 0))
        live, none = np.zeros(2, bool), np.zeros(2, bool)
        del slot
        jobs.collect(live, none, np.full(2, 6), none, lambda: np.zeros((2, 1), np.float32))
        (verdict,) = jobs.verdicts()
        self.assertEqual((verdict.fooled, verdict.job), (True, 1))

    def test_a_network_whose_own_draws_decided_repeats_nothing(self):
        jobs = self.begun(2, repeats=False)
        (verdict,) = self.fool(jobs, 0, 4)
        jobs.refute([verdict])
        self.assertEqual(self.first(jobs), {1: 0})
        (last,) = self.fool(jobs, next(iter(jobs._busy)), 3)
        self.assertEqual((last.job, last.steps), (1, 7))
