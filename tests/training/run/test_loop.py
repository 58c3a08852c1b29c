"""Where the loop of a phase goes on from, without a step being made."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest

from jaxrobust.training.run import loop
from tests.support.runs import tiny


class OpenedTest(absltest.TestCase):
    def test_begins_behind_what_was_consumed_and_knows_what_was_scored(self):
        events = []

        def noted(name, result):
            def call(*given, **how):
                events.append((name, *given[2:4]))
                return result

            return call

        phase = SimpleNamespace(total_steps=12)
        run = SimpleNamespace(config=tiny(), name="train", phase=phase, profile=None)
        run.workdir, run.source = Path("nowhere"), "digits"
        begun = SimpleNamespace(
            run=run, start=5, step=5, evaluated=0, meta={"examples_consumed": 320}
        )
        begun.signals = contextlib.nullcontext()
        stream = mock.Mock()
        with (
            mock.patch.object(loop.metrics, "writer", noted("writer", "the writer")),
            mock.patch.object(loop, "scored", noted("scored", 4)),
            mock.patch.object(loop.splits, "batches", noted("batches", stream)),
            mock.patch.object(loop, "Progress", lambda *_, **__: contextlib.nullcontext("bar")),
            mock.patch.object(loop, "PhaseTrace", lambda *_: contextlib.nullcontext("trace")),
            loop._Loop.opened(begun) as opened,
        ):
            self.assertIs(opened, begun)
            self.assertEqual(
                (begun.write, begun.progress, begun.trace), ("the writer", "bar", "trace")
            )
            self.assertEqual((begun.evaluated, begun.stream), (4, stream))
            stream.close.assert_not_called()
        # The writer removes lines behind the start, which would count as scored.
        self.assertEqual(events, [("writer",), ("batches", "digits", 320), ("scored",)])
        stream.close.assert_called_once_with()


if __name__ == "__main__":
    absltest.main()
