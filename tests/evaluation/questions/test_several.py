"""Several threats, sizes and radii in one command of evaluation, and what they tell each other."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.evaluation.engine.cascade import Attack
from jaxrobust.evaluation.records import verdicts
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.publish import network_account
from tests.support import paths, result_lines, sweeps
from tests.support.ensemble import GOLDEN, LABELS
from tests.support.evaluations import call, run_for, trained
from tests.support.outcomes import ended, refused

RADII = [0.0, 0.0025, 0.005, 0.0075, 0.01]


def passes(found) -> int:
    return sum(cost["forward"] + 2 * cost["backward"] for r in found for cost in r["costs"])


@pytest.mark.computes
class SeveralTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.workdir = run_for(cls, pretrained=False)

    def asked(self, out, **more):
        """The records and the answer of the command."""
        printed, _ = ended(call(workdir=str(self.workdir), out=os.fspath(out), **more))
        return result_lines.read(Path(out)), printed

    def refused(self, message, **more):
        out = Path(self.create_tempdir()) / "out"
        said = refused(call(**{"workdir": str(self.workdir), "out": str(out)} | more))
        self.assertRegex(said, message)
        self.assertEmpty(list(out.glob("results.jsonl")))

    @pytest.mark.slow
    def test_several_threats_and_their_union(self):
        out, alone = Path(self.create_tempdir()), Path(self.create_tempdir())
        few = {"workdir": str(self.workdir), "attack": "apgd-ce,square", "n": 80, "steps": 5}
        threats = ["linf:0.012", "l2:0.05"]
        printed, _ = ended(call(out=str(out), threat=threats, **few))
        *each, union = result_lines.read(out)
        self.assertLen(each, 2)
        survives = np.ones(80, bool)
        for threat, record in zip(threats, each, strict=True):
            norm, _, epsilon = threat.partition(":")
            self.assertEqual(call(out=str(alone), norm=norm, epsilon=epsilon, **few)[0], 0)
            own = result_lines.read(alone)[-1]
            self.assertEqual(record["evaluation"], own["evaluation"])
            for key in ("clean", "robust", "accuracy_after", "attacks", "method"):
                self.assertEqual(record[key], own[key], key)
            found = verdicts.read(out / record["verdicts"])
            for one, other in zip(found, verdicts.read(alone / own["verdicts"]), strict=True):
                np.testing.assert_array_equal(one, other)
            survives &= found.robust
        self.assertLess(union["robust"], min(record["robust"] for record in each))
        self.assertGreater(union["robust"], 0)
        self.assertEqual(union["robust"], survives.mean())
        self.assertEqual(union["method"], "union")
        self.assertEqual(
            network_account.row(AccuracyRecord.from_json(union))[1], "union of linf 0.012, l2 0.05"
        )
        self.assertEqual(list(union["accuracy_after"]), ["linf 0.012", "l2 0.05"])
        whole = verdicts.read(out / union["verdicts"])
        fooled = whole.clean & ~whole.robust
        self.assertEqual((whole.reached >= 0).tolist(), fooled.tolist())
        self.assertFalse((whole.reached == whole.labels).any())
        np.testing.assert_array_equal(whole.robust, survives)
        self.assertContainsSubset(["clean", "linf 0.012: apgd-ce"], set(whole.fooled_by.tolist()))
        self.assertRegex(printed, r"union of linf 0.012, l2 0.05 +8 +[\d.]+% +[\d.]+% +[\d.]")
        self.assertEqual(call(out=str(out), threat=threats, **few)[1], printed)

        ended(call(out=str(alone), threat=threats, union_only=True, **few))
        only = result_lines.read(alone)[-1]
        self.assertEqual(only["robust"], union["robust"])
        np.testing.assert_array_equal(verdicts.read(alone / only["verdicts"]).robust, survives)
        passes = [sum(c["forward"] for c in record["costs"]) for record in (only, union)]
        self.assertLess(*passes)

    @pytest.mark.slow
    def test_a_ladder_is_what_each_radius_finds_alone(self):
        few = {"attack": "apgd-ce,apgd-t,square", "n": 80, "steps": 10}
        out, alone = Path(self.create_tempdir()), Path(self.create_tempdir())
        found, printed = self.asked(out, ladder="linf:0:0.01:5", **few)
        self.assertEqual([r["ladder"]["radii"] for r in found], 5 * [RADII])
        self.assertEqual((found[0]["method"], found[0]["robust"]), ("clean", None))
        self.assertRegex(
            printed, r"clean +8 .*\napgd-ce \+ .*, ladder, linf 0.0025 .*by replayed points\) +8 "
        )
        self.assertEqual(network_account.row(AccuracyRecord.from_json(found[0]))[1], "none")
        below = None
        for radius, record in zip(RADII[1:], found[1:], strict=True):
            self.assertEqual(record["attacks"][0]["epsilon"], radius)
            own = self.asked(alone, norm="linf", epsilon=str(radius), noreplay=True, **few)[0][-1]
            self.assertNotIn("replayed", own)
            robust = verdicts.read(out / record["verdicts"]).robust
            plain = verdicts.read(alone / own["verdicts"]).robust
            self.assertLessEqual((robust & ~plain).sum(), 1)
            self.assertLessEqual(record["robust"], own["robust"] + 1 / 128)
            self.assertTrue(below is None or not (robust & ~below).any())
            below = robust
        self.assertLess(passes(found), 0.6 * passes(result_lines.read(alone)))
        self.assertNotIn("replayed", found[-1])
        self.assertEqual(found[1]["ladder"]["of_these_attacked_by"], ["apgd-ce"])
        beyond = verdicts.read(out / found[2]["verdicts"]).robust
        self.assertEqual(found[1]["ladder"]["robust_beyond"], beyond.sum())
        self.assertEqual(self.asked(out, ladder="linf:0:0.01:5", **few), (found, printed))

    @pytest.mark.slow
    def test_one_compilation_for_all_radii(self):
        compiled = []

        def listen(event, *unused, **ignored):
            compiled.append(event == "/jax/core/compile/backend_compile_duration")

        jax.monitoring.register_event_duration_secs_listener(listen)
        self.addCleanup(jax.monitoring.unregister_event_duration_listener, listen)
        few = {"attack": "apgd-ce,square", "n": 16, "steps": 5}
        counts = []
        for high in ("0.02", "0.03"):
            before = sum(compiled)
            for radii in ("2", "6"):
                self.asked(self.create_tempdir(), ladder=f"linf:0.01:{high}:{radii}", **few)
            counts.append(sum(compiled) - before)
        of_one = self.of_a_command(compiled, few)
        self.assertGreater(of_one, 0)  # else the listener hears nothing, and all are equal
        self.assertEqual(counts[1], 2 * of_one)

    def of_a_command(self, compiled, few) -> int:
        """How many programs a command with one radius compiles, each time."""
        before = sum(compiled)
        self.asked(self.create_tempdir(), norm="linf", epsilon="0.02", **few)
        return sum(compiled) - before

    @pytest.mark.slow
    def test_a_ladder_goes_on_where_it_was_killed(self):
        few = {"attack": "apgd-ce,square", "n": 40, "steps": 5, "ladder": "l2:0.05:0.15:3"}
        whole, _ = self.asked(self.create_tempdir(), **few)
        out, add, count = Path(self.create_tempdir()), Attack.write, [0]

        def dies(attack, *verdict):
            count[0] += 1
            if count[0] % 12 == 0:
                raise KeyboardInterrupt
            return add(attack, *verdict)

        codes = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Attack, "write", dies)
            while codes[-1:] != [0]:
                codes.append(call(workdir=str(self.workdir), out=str(out), **few)[0])
                self.assertLess(len(codes), 20)
        self.assertGreater(codes.count(130), 2)
        for one, other in zip(whole, result_lines.read(out), strict=True):
            for key in ("evaluation", "robust", "accuracy_after", "ladder"):
                self.assertEqual(one[key], other[key], key)

    @pytest.mark.slow
    def test_another_folder_is_replayed(self):
        few = {"attack": "apgd-ce", "n": 60, "steps": 5, "epsilon": "0.02"}
        there, out = Path(self.create_tempdir()), Path(self.create_tempdir())
        self.asked(there, seed=1, **few)
        *_, record = self.asked(out, replay=[str(there)], **few)[0]
        (replayed,) = record["replayed"]
        (ledger,) = there.glob("ledger-*.jsonl")
        self.assertEqual(replayed["ledger"], ledger.stem)
        self.assertLen(replayed["sha256"], 64)
        self.assertGreater(replayed["fooled"], 10)
        *_, plain = self.asked(out, **few)[0]
        self.assertNotEqual(plain["evaluation"], record["evaluation"])

    @pytest.mark.slow
    def test_replays_that_cannot_be(self):
        few = {"attack": "apgd-ce", "n": 8, "steps": 2, "epsilon": "0.02"}
        there = Path(self.create_tempdir())
        self.asked(there, **few)
        folder = [str(there)]
        for more, message in (
            (
                {"image_size": [16]},
                "is for different images: .*image_size.*; replay an evaluation of",
            ),
            ({"split": "train[:8]"}, "--replay=.* is for different images: .*split"),
            ({"preprocessing": "Res256Crop224"}, "is for different images: .*preprocessing"),
            ({"replay": [str(self.workdir)]}, "--replay=.* has no ledger; name the folder of"),
        ):
            self.refused(message, **few | {"replay": folder} | more)
        (ledger,) = there.glob("ledger-*.jsonl")
        record = json.loads((there / "results.jsonl").read_text())
        (there / "results.jsonl").write_text(json.dumps(record | {"schema": 99}) + "\n")
        self.refused("a record of schema 99, .* install a newer jaxrobust", replay=folder, **few)
        # Without a record, the images themselves tell.
        (there / "results.jsonl").unlink()
        ledger.rename(there / "ledger-other.jsonl")
        ledger.with_suffix(".images").rename(there / "ledger-other.images")
        message = r"is for different images: \d of \d images with the same names"
        self.refused(message, replay=folder, **few | {"split": "train[:8]"})

    @sweeps.rows(
        ("linf:0:0.1", "--ladder=linf:0:0.1 has 3 parts; write NORM:LOW:HIGH:RADII, such as"),
        ("linf:0.1:0:3", "--ladder=linf:0.1:0:3 must start at the smallest"),
        ("linf:0:4:3", "--ladder=linf:0:4:3: .* larger than the pixel range"),
        ("l1:0:0.5:3", "an l1 radius of 0.25 .* is probably meant for linf"),
        ("l2:0:9:3", "an l2 ball of radius 9 contains all"),
    )
    def test_ladders_that_are_none(self, ladder, message):
        self.refused(message, ladder=ladder, n=8)


@pytest.mark.matrix
class GoldenTest(absltest.TestCase):
    def test_three_threats_and_their_union(self):
        """The verdicts of the reference; draws differ, so one image may too (the golden README)."""
        folder = Path(self.create_tempdir())
        text = "from tests.support.ensemble import NETS\nlogits_fn = NETS['conv']\n"
        (folder / "net.py").write_text(text)
        np.savez(folder / "golden.npz", image=GOLDEN["images"], label=LABELS)
        own = {"function": f"{folder}/net.py:logits_fn", "dataset": f"npz:{folder}/golden.npz"}
        own |= {"split": "all", "out": f"{folder}/out"}
        ended(call(threat=["linf:8/255", "l2:0.5", "l1:12"], **own))
        *each, union = result_lines.read(folder / "out")
        whole = np.ones(len(LABELS), bool)
        for norm, record in zip(("Linf", "L2", "L1"), each, strict=True):
            found = verdicts.read(folder / "out" / record["verdicts"])
            np.testing.assert_array_equal(found.clean, GOLDEN["clean_correct"])
            after = GOLDEN[f"{norm}_seed0_after_square"]
            self.assertLessEqual(np.sum(found.robust != after), 1)
            whole &= found.robust
        self.assertEqual(union["robust"], whole.mean())
        self.assertEqual(passes([union]), passes(each))  # the three, and nothing more

    def test_kill_9_at_twenty_random_moments(self):
        """Two threats and a ladder in the same folder: the records of a command in peace."""
        folder, chance = Path(self.create_tempdir()), random.Random(1)
        trained(folder / "run")
        flags = [f"--workdir={folder}/run", "--attack=apgd-ce,square", "--steps=20", "--n=80"]

        def start(out, *more):
            words = ["-m", "jaxrobust.evaluate", *flags, f"--out={folder / out}", *more]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            return subprocess.Popen([sys.executable, *words], cwd=paths.ROOT, **quiet)

        def size(out) -> int:
            return sum(path.stat().st_size for path in (folder / out).glob("ledger-*.jsonl"))

        killed = 0
        for more in (["--threat=linf:0.012", "--threat=l2:0.05"], ["--ladder=linf:0:0.02:5"]):
            before = size("whole")
            self.assertEqual(start("whole", *more).wait(300), 0)
            most = (size("whole") - before) // 6  # so that ten kills are spread over all verdicts
            for _ in range(10):
                process, wanted = start("parts", *more), size("parts") + chance.randrange(1, most)
                while process.poll() is None and size("parts") < wanted:
                    time.sleep(0.001)
                killed += process.poll() is None
                process.kill()
                process.wait()
            self.assertEqual(start("parts", *more).wait(300), 0)
        self.assertGreaterEqual(killed, 8)
        whole, parts = (result_lines.read(folder / name) for name in ("whole", "parts"))
        for one, other in zip(whole, parts, strict=True):
            for key in ("evaluation", "clean", "robust", "accuracy_after", "ladder"):
                self.assertEqual(one.get(key), other.get(key), key)
            theirs = verdicts.read(folder / "whole" / one["verdicts"])
            ours = verdicts.read(folder / "parts" / other["verdicts"])
            # After a kill an image stands among others, with which XLA sums in another order.
            np.testing.assert_allclose(theirs.norms, ours.norms, rtol=1e-5)
            for there, here in zip(theirs, ours._replace(norms=theirs.norms), strict=True):
                np.testing.assert_array_equal(there, here)
