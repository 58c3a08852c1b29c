"""From the command line's words to an estimate: what is refused, changed, asked, priced, told."""

from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized

from jaxrobust.config import base
from jaxrobust.doctor.estimate import (
    account,
    account_lines,
    attacked,
    changes,
    command,
    devices,
    here,
    work,
)
from jaxrobust.doctor.estimate.command import EstimateSettings
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.doctor.programs import topology
from tests.support import command_calls, sweeps
from tests.support.estimates import H100, imagenet

HERE = Target("cpu", "cpu", 1, None, True, True)


def settings(**given) -> EstimateSettings:
    return EstimateSettings(**({"config": "quickstart", "on": "h100:8", "robust": 0.5} | given))


class CheckTest(parameterized.TestCase):
    def test_numbers_are_checked_before_anything_else(self):
        with (
            mock.patch.object(command.targets, "prepare") as prepare,
            self.assertRaisesRegex(ValueError, "--images=-1 must be at least 0"),
        ):
            command.answer(settings(images=-1), [], 0.0)
        prepare.assert_not_called()

    @sweeps.rows(
        {"price": 1e-9},
        {"utilisation": 1.0},
        {"utilisation": 1e-9},
        {"robust": 0.0},
        {"robust": 1.0},
        {"seconds": 1e-9},
        {"seconds": 3599.9},
        {"batch": 1},
        {"images": 0},
    )
    def test_ends_of_a_range(self, **given):
        command.check(settings(**given))

    @sweeps.rows(
        {"price": 0.0},
        {"price": float("inf")},
        {"price": float("nan")},
        {"utilisation": 0.0},
        {"utilisation": 1.001},
        {"robust": -0.01},
        {"robust": 1.01},
        {"robust": float("nan")},
        {"seconds": 0.0},
        {"seconds": 3600.0},
        {"batch": 0},
        {"images": -1},
    )
    def test_outside_of_a_range(self, **given):
        (name,) = given
        with self.assertRaisesRegex(ValueError, f"--{name}"):
            command.check(settings(**given))


class AnswerTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.config = base().unlock()
        self.config.pretrain.epochs = 2  # so that there are two phases
        self.calls = mock.Mock()
        self.calls.account.return_value = {"known": ["a"], "training": {"chip_hours": 3.0}}
        self.calls.starts.return_value = []
        self.calls.target.return_value = H100
        self.calls.configured.return_value = self.config
        for place, name, own in (
            (command.targets, "prepare", self.calls.prepare),
            (command.targets, "target", self.calls.target),
            (changes, "configured", self.calls.configured),
            (account, "account", self.calls.account),
            (account, "start_costs", self.calls.starts),
            (topology, "devices", self.calls.topology),
            (account_lines, "page", self.calls.page),
            (jax.config, "update", self.calls.update),
        ):
            self.enter_context(mock.patch.object(place, name, own))
        self.calls.page.return_value = "the page"
        size = mock.Mock(return_value=SimpleNamespace(columns=50))
        self.enter_context(mock.patch("shutil.get_terminal_size", size))
        self.enter_context(mock.patch("time.perf_counter", return_value=107.5))

    def answer(self, **given):
        found = []
        ended = command_calls.ended(
            lambda: found.append(command.answer(settings(**given), ["--config.a=b"], 100.0))
        )
        self.assertEqual((ended.code, ended.out), (0, "the page\n"))
        return found[0]

    @parameterized.parameters((True, False, True), (True, True, False), (False, False, False))
    def test_the_compiler_of_chips_that_are_not_here(self, compiles, fast, asked):
        self.calls.target.return_value = H100._replace(compiles=compiles)
        self.answer(on="v5e:2x4", fast=fast)
        calls = [mock.call("v5e:2x4", flag="--on")] if asked else []
        self.assertEqual(self.calls.topology.mock_calls, calls)
        chips = self.calls.account.call_args.kwargs["chips"]
        self.assertEqual(chips, self.calls.topology.return_value if asked else None)

    def test_devices_that_are_here_are_measured_from_the_start_of_the_process(self):
        self.calls.target.return_value = HERE
        self.answer(on="cpu")
        self.assertEqual(self.calls.account.call_args.kwargs["start"], 7.5)
        self.calls.topology.assert_not_called()
        for given, words in (
            ({"price": 1.0}, "--on cpu has no chips; name some"),
            ({"utilisation": 0.5}, "and --on cpu is measured; leave it out"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                command.answer(settings(on="cpu", **given), [], 0.0)

    def test_runs_that_it_starts_from(self):
        row = {"run": "runs/a", "state": account.start_run.FINISHED, "training": None}
        self.calls.starts.return_value = [row]
        found = self.answer()
        self.assertEqual(found["starts"], [row])
        said = ["a", "It starts from runs/a, which is finished and costs nothing."]
        self.assertEqual(found["known"], said)


class StartTest(parameterized.TestCase):
    @sweeps.rows((account.start_run.BEGUN, ", and was begun"), ("none", ""))
    def test_a_start_that_is_not_finished(self, state, said):
        row = {"run": "r", "state": state, "training": {"hours": 1234.5, "chip_hours": 0.1234}}
        self.assertEqual(
            account.start_sentence(row),
            f"It starts from r, which is not finished{said}: that run costs 1.23e+03 hours and "
            "0.123 chip-hours more, once for all that start from it.",
        )


class AccountTest(parameterized.TestCase):
    @sweeps.rows(
        ("NVIDIA H100 SXM", 8, False, ""),
        ("TPU v5e", 8, True, ""),
        ("TPU v5e", 1, False, ", as libtpu compiles for four chips at least"),
        ("TPU v5e", 8, False, "; pip install 'jaxrobust[tpu-aot]' brings the compiler"),
    )
    def test_why_a_step_is_not_compiled(self, kind, chips, compiles, words):
        target = H100._replace(kind=kind, chips=chips, compiles=compiles)
        self.assertEqual(account._why(target), words)

    def test_devices_that_are_here(self):
        part = SimpleNamespace(config=imagenet(), train=SimpleNamespace(source=None))
        result = {"phases": [{"step_s": 1.0}]}
        assumed = " ".join(account._assumed([part], HERE, result, 0.25))
        self.assertIn("random images", assumed)
        self.assertNotIn("peak", assumed)
        (measured,) = account._known(HERE, result)
        self.assertIn("Measured on this machine", measured)


class PhaseTest(parameterized.TestCase):
    def phase(self, target, once, chips=None, *, at=1, one_device="a reason"):
        config = imagenet()
        part = work.work(config)[at]
        with (
            mock.patch.object(account.build, "flops_per_image", return_value=2e9),
            mock.patch.object(account.elsewhere, "computed", return_value=once) as computed,
            mock.patch.object(account.here, "measured", return_value=once) as measured,
            mock.patch.object(account.build, "one_device", return_value=one_device),
        ):
            row = account._phase(part, target, 0.25, 2.0, chips)
        return part, row, computed, measured

    def test_one_device_of_a_cpu_where_training_takes_one(self):
        once = work.PhaseCost(0.5, 0.1, 2.0, 3.0, 7, {})
        part, row, _, measured = self.phase(HERE, once)
        measured.assert_called_once_with(part, jax.devices("cpu")[:1], seconds=2.0)
        self.assertEqual((row["mfu"], row["data_cores"]), (None, None))

    @sweeps.rows(("gpu", "a reason"), ("cpu", None))
    def test_all_devices_where_training_takes_all(self, name, one_device):
        once = work.PhaseCost(0.5, 0.1, 2.0, 3.0, 7, {})
        with mock.patch.object(account.jax, "devices", return_value=["a", "b"]) as asked:
            part, *_, measured = self.phase(HERE._replace(name=name), once, one_device=one_device)
        asked.assert_called_once_with(name)
        measured.assert_called_once_with(part, ["a", "b"], seconds=2.0)


class LinesTest(parameterized.TestCase):
    @sweeps.rows(
        (0.0004, "0 ms"),
        (0.9994, "999 ms"),
        (1, "1.0 s"),
        (119.9, "119.9 s"),
        (120, "2.0 min"),
        (7199, "120.0 min"),
        (7200, "2.0 h"),
        (36e6, "10,000.0 h"),
    )
    def test_durations(self, seconds, text):
        self.assertEqual(account_lines.duration(seconds), text)

    @sweeps.rows((0.01, "0.01"), (0.0099, "< 0.01"), (12345.678, "12,345.68"))
    def test_money(self, money, text):
        self.assertEqual(account_lines._money(money), text)

    @sweeps.rows((2**30 / 10, "0.1 GiB"), (2**30 / 10 - 1, "102.4 MiB"))
    def test_bytes(self, number, text):
        self.assertEqual(account_lines._bytes(number), text)

    def test_lines_are_wrapped_below_themselves(self):
        text = "  word" + " word" * 30
        lines = account_lines._wrapped(text, 40)
        self.assertLessEqual(max(map(len, lines)), 40)
        self.assertEqual([len(line) - len(line.lstrip()) for line in lines[:3]], [2, 4, 4])
        self.assertEqual(account_lines._wrapped("x" * 40, 40), ["x" * 40])


class HereTest(parameterized.TestCase):
    def test_the_second_run_is_timed(self):
        clock, runs = [0.0], []

        def run():
            runs.append(clock[0])
            clock[0] += 100.0 if len(runs) == 1 else 3.0

        with mock.patch.object(here.time, "perf_counter", lambda: clock[0]):
            self.assertEqual(here._timed(run), 3.0)
        self.assertLen(runs, 2)

    def test_the_second_checkpoint_is_timed(self):
        clock, saved = [0.0], []
        kept = mock.MagicMock()
        kept.save.side_effect = lambda *of: saved.append(of)
        kept.wait.side_effect = lambda: clock.__setitem__(
            0, clock[0] + (50 if len(saved) == 1 else 4)
        )
        with (
            mock.patch.object(here, "Checkpoints", return_value=kept),
            mock.patch.object(here.time, "perf_counter", lambda: clock[0]),
        ):
            self.assertEqual(here._saved("state"), 4)
        self.assertEqual(saved, [(1, "state", {}), (2, "state", {})])
        kept.close.assert_called_once_with()

    def test_random_images(self):
        model = SimpleNamespace(image_size=6, in_channels=2, num_classes=3)
        images, labels = here._random(SimpleNamespace(config=SimpleNamespace(model=model)), 500)
        self.assertEqual((images.shape, images.dtype), ((500, 6, 6, 2), np.uint8))
        self.assertEqual((images.min(), images.max()), (0, 255))
        self.assertEqual(({*labels.tolist()}, labels.dtype), ({0, 1, 2}, np.int32))

    def test_batches_are_random_where_the_data_are_not_here(self):
        none = SimpleNamespace(train=SimpleNamespace(source=None), batch_size=5)
        phase = SimpleNamespace(mesh="mesh")
        with (
            mock.patch.object(here, "_random", return_value=("x", "y")) as random,
            mock.patch.object(here.sharding, "global_arrays", side_effect=lambda mesh, of: of),
            here._batches(none, phase) as batches,
        ):
            self.assertEqual(tuple(next(batches))[:2], ("x", "y"))
            self.assertEqual(tuple(next(batches))[:2], ("x", "y"))
        random.assert_called_once_with(none, 5)

    def test_what_a_phase_takes_is_added_up(self):
        config = base().unlock()
        config.seed = 3
        part = SimpleNamespace(
            config=config, name="train", rows=100, probes=2, train=SimpleNamespace(source="s")
        )
        phase = mock.MagicMock(mesh=jax.make_mesh((1,), ("data",)))
        phase.init.return_value = SimpleNamespace(params="p", stats="s")
        batches = mock.MagicMock()
        batches.__enter__.return_value = iter(["first", "second"])
        clock = iter(np.arange(100.0))
        built = mock.Mock()
        built.phase.return_value = phase
        built.abstract_arguments.return_value = ("arguments",)
        with (
            mock.patch.object(here, "build", built),
            mock.patch.object(here.jax, "block_until_ready", side_effect=lambda x: x),
            mock.patch.object(
                here.compilation, "compiled", side_effect=[("step", 10.0, 0), ("probe", 20.0, 0)]
            ),
            mock.patch.object(here.best_weights, "counter", return_value="selecting"),
            mock.patch.object(
                here, "_evaluation", side_effect=[(2.0, 100.0), (3.0, 200.0)]
            ) as evaluation,
            mock.patch.object(here, "_batches", return_value=batches),
            mock.patch.object(here, "_timed", return_value=0.25),
            mock.patch.object(here, "_saved", return_value=7.0),
            mock.patch.object(here, "_steps", return_value=(9, 0.5)) as steps,
            mock.patch.object(here, "peak_memory", return_value=77),
            mock.patch.object(here.time, "perf_counter", lambda: next(clock)),
        ):
            found = here._measured(part, jax.devices()[:1], 4.0)
        self.assertEqual((found.step, found.probe, found.save), (0.5, 0.25, 7.0))
        self.assertEqual((found.selection, found.test), (2.0, 3.0))
        self.assertEqual(found.compile, 1 + 10 + 100 + 200 + 20)  # one tick of the clock first
        self.assertEqual(found.figures, {"measured_steps": 9, "measured_with_data": True})
        self.assertEqual(found.memory, 77)
        keys = [(call.args[1], call.args[4]) for call in evaluation.call_args_list]
        self.assertEqual(
            keys, [("evaluation", "selecting"), ("test", built.evaluation.return_value)]
        )
        how = {"steps": config.test.steps, "dtype": "float32", "top5": True}
        built.evaluation.assert_called_once_with(config, phase.mesh, **how)
        self.assertEqual([*steps.call_args.args[2]], ["second"])
        self.assertEqual((steps.call_args.args[0], steps.call_args.args[4]), ("step", 4.0))


class PresentTest(parameterized.TestCase):
    @sweeps.rows(("cpu", 1), ("gpu", 3))
    def test_devices_that_are_here(self, name, count):
        chips = [SimpleNamespace(device_kind="NVIDIA H100 SXM")] * 3
        with mock.patch.object(jax, "devices", return_value=chips):
            found = devices.target(name)
        self.assertEqual((found.name, found.chips, found.kind), (name, count, "NVIDIA H100 SXM"))
        self.assertTrue(found.here and found.compiles)
        self.assertEqual(found.float32, count * found.chip.flops / 2)

    @sweeps.rows(
        ("cpu", True, False),
        ("gpu", False, False),
        ("v5e:2x2", True, True),
        ("v4:2x2x1", True, True),
        ("v6e:2x2", True, True),
        ("h100:8", True, False),
    )
    def test_what_jax_is_told_before_it_is_imported(self, name, cpu, tpu):
        with mock.patch.dict("os.environ", clear=True):
            devices.prepare(name)
            own = dict(devices.os.environ)
        self.assertEqual(own.get("JAX_PLATFORMS"), "cpu" if cpu else None)
        self.assertEqual(topology.ENVIRONMENT.items() <= own.items(), tpu)

    @sweeps.rows((1, True, False), (4, True, True), (4, False, False))
    def test_compilers_of_tpus(self, chips, installed, compiles):
        spec = object() if installed else None
        with mock.patch.object(devices.importlib.util, "find_spec", return_value=spec):
            found = devices.target("v5e:1x1" if chips == 1 else "v5e:2x2")
            self.assertEqual((found.chips, found.compiles), (chips, compiles))
            self.assertFalse(devices.target("h100:8").compiles)


class WorkRulesTest(parameterized.TestCase):
    def evaluated(self, images, wanted):
        config = imagenet()
        config.evaluation.images = wanted
        part = work.work(config)[0]
        return part._replace(selection=work.SizedSplit(images, None)).evaluated("evaluation")

    def test_images_of_an_evaluation(self):
        self.assertEqual([self.evaluated(100, wanted) for wanted in (0, 30, 300)], [100, 30, 100])

    @sweeps.rows(0, 1281168)
    def test_no_batch(self, size):
        config = imagenet()
        config.train.batch_size = size
        with self.assertRaisesRegex(ValueError, f"train.batch_size={size} must be at least 1, at"):
            work.work(config)

    def test_passes_of_an_evaluation(self):
        part = work.work(imagenet())[1]
        part.config.evaluation.update(attack="pgd-5", steps=9)
        part.config.test.update(steps=7)
        with mock.patch.object(work.build, "forward_flops", return_value=10):
            selection = work.evaluation_flops(part, "evaluation")
            test = work.evaluation_flops(part, "test")
        named = work.fixed_steps.parse("pgd-5")
        passes = 2 + named.forward + named.backward
        self.assertEqual(selection, 10 * passes * part.evaluated("evaluation"))
        self.assertEqual(test, 10 * (2 + 2 * 7 + 1) * part.evaluated("test"))


class TriedTest(parameterized.TestCase):
    def test_calls_are_timed_until_the_seconds_are_over(self):
        def call(compiles, steps, seconds):
            return attacked.engine.Call(steps, steps, seconds, compiles)

        calls = iter(
            [call(True, 0, 9.0), call(False, 40, 2.0), call(False, 60, 2.0), call(False, 99, 9.0)]
        )
        runner = SimpleNamespace(traces=[SimpleNamespace(classes=10)])
        setting = SimpleNamespace(targets=0)
        with (
            mock.patch.object(attacked.engine, "forward", return_value="logits"),
            mock.patch.object(attacked.ensembles, "ranks") as ranks,
            mock.patch.object(attacked.ensembles, "targets"),
            mock.patch.object(attacked.ensembles, "passes", return_value=4),
            mock.patch.object(attacked.engine, "decide", return_value=calls) as decide,
        ):
            labels = np.arange(5)
            found = attacked._tried(runner, setting, np.zeros((5, 1)), labels, 3.5)
        self.assertEqual(found, (9.0, 4.0 / (100 * 4)))
        self.assertLen([*calls], 1)  # which was not made
        self.assertEqual(ranks.call_args.args[2], 1)
        how = decide.call_args.kwargs
        self.assertEqual((how["epsilon"], how["seed"]), (1e-7, 0))
        self.assertEqual(how["confirm"]([1], True), [])

    def test_what_is_done_once_is_without_the_attacks(self):
        cost = SimpleNamespace(seconds=2.0, compile_seconds=5.0)
        clock = iter([100.0, 110.0])
        config = imagenet()
        with (
            mock.patch.object(
                attacked, "autoattack", return_value=SimpleNamespace(costs=[cost])
            ) as aa,
            mock.patch.object(attacked.time, "perf_counter", lambda: next(clock)),
        ):
            self.assertEqual(attacked._once("f", "x", "y", config), 3.0)
        how = aa.call_args.kwargs
        self.assertEqual(
            (how["norm"], how["epsilon"], how["attacks"]), ("linf", 1e-7, ("apgd-ce",))
        )
        self.assertEqual(how["overrides"], {"apgd-ce": {"steps": 1, "restarts": 1}})
