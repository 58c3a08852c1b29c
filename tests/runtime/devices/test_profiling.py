"""A trace holds the steps that were asked for, by the name of the program."""

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.runtime.devices import profiling
from tests.support import sweeps


@jax.jit
def traced_step(x):
    return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, None, length=10)[0]


class ProfileTest(parameterized.TestCase):
    def test_start_and_steps(self):
        self.assertEqual(profiling.profile("10:5"), (10, 5))

    @sweeps.rows("10", "10:0", "10:", "-1:5", "1.5:2", "a:b", "10:5:2", "")
    def test_anything_else_says_how_to_write_it(self, text):
        with self.assertRaisesRegex(
            ValueError, f"--profile {text} is not START:STEPS; write two integers, such as 10:5"
        ):
            profiling.profile(text)


class TraceTest(parameterized.TestCase):
    def run_steps(self, profile, *, start=0, end=8):
        """(numbers of the traced steps, calls of the program in the trace, what is said)."""
        directory = self.create_tempdir().full_path
        said, x = [], jnp.ones((16, 16))
        traced_step(x).block_until_ready()
        touched = []
        with (
            absltest.mock.patch.object(profiling, "say", said.append),
            profiling.PhaseTrace(profile, profiling.Path(directory) / "train", start) as trace,
        ):
            for step in range(start + 1, end + 1):
                x = traced_step(x)
                if trace.dispatched(step, x):
                    touched.append(step)
        steps, calls = [], 0
        for path in profiling.Path(directory).rglob("*.xplane.pb"):
            self.assertIn(b"traced_step", path.read_bytes())
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for line in plane.lines:
                    for event in line.events:
                        calls += event.name == "PjitFunction(traced_step)"
                        if event.name == "train":
                            steps.append(dict(event.stats)["step_num"])
        return sorted(set(steps)), calls, " ".join(said), touched

    def test_every_host_s_trace_has_the_name_of_its_first_step(self):
        trace = profiling.PhaseTrace(profiling.Profile(2, 3), profiling.Path("there"), 40)
        patched = absltest.mock.patch.object
        with (
            patched(jax.profiler, "start_trace") as start,
            patched(jax.profiler, "stop_trace") as stop,
            patched(profiling, "say") as say,
        ):
            touched = [step for step in range(41, 47) if trace.dispatched(step, None)]
        self.assertEqual(touched, [42, 45])
        (call,) = start.call_args_list
        self.assertEqual(call.args, (profiling.Path("there").absolute(),))
        self.assertEqual(call.kwargs["profiler_options"].session_id, "step-42")
        stop.assert_called_once_with()
        self.assertStartsWith(say.call_args.args[0], "there: steps 43 to 45 were traced; view them")

    @sweeps.fast(1)
    @parameterized.parameters((0, 3, 0), (2, 3, 0), (2, 3, 1000))
    def test_the_steps_asked_for(self, first, count, start):
        """Counted from where the command continues."""
        steps, calls, said, touched = self.run_steps(
            profiling.Profile(first, count), start=start, end=start + 8
        )
        self.assertEqual(steps, list(range(start + first + 1, start + first + count + 1)))
        self.assertEqual(calls % count, 0)
        self.assertGreater(calls, 0)
        self.assertEqual(touched, [n for n in (start + first, start + first + count) if n > start])
        self.assertRegex(
            said,
            f"train: steps {start + first + 1} to {start + first + count} were traced; view "
            r"them with: pip install xprof; xprof --logdir /.*/train",
        )

    @pytest.mark.slow
    def test_a_phase_that_ends_earlier_ends_the_trace(self):
        steps, _, said, _ = self.run_steps(profiling.Profile(6, 10))
        self.assertEqual(steps, [7, 8, 9])  # it was waiting for the ninth
        self.assertIn("steps 7 to 8 are traced", said)

    def test_a_phase_that_ends_before_says_so(self):
        steps, _, said, _ = self.run_steps(profiling.Profile(9, 1))
        self.assertEmpty(steps)
        self.assertIn(
            "nothing was traced, because the phase ended at step 8, but --profile starts after",
            said,
        )

    def test_without_a_profile_nothing_happens(self):
        steps, calls, said, touched = self.run_steps(None)
        self.assertEqual((steps, calls, said, touched), ([], 0, "", []))
