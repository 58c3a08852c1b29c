"""Which run an evaluation is shown beside."""

from pathlib import Path

from absl.testing import absltest

from jaxrobust.report import gathered
from tests.support import reports


class PlacedTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())

    def names(self, *runs: str) -> list[str]:
        """Evaluate elsewhere the weights of a config, which each of some runs has."""
        for name in runs:
            reports.run(self.folder / name)
        found = gathered.gather([self.folder])
        sha256 = found.runs[0].config_sha256
        reports.evaluation(self.folder / "elsewhere", config_sha256=sha256)
        return [one.name for one in gathered.gather([self.folder]).evaluations]

    def test_the_only_run_of_its_config(self):
        self.assertEqual(self.names("run"), ["run"])

    def test_of_two_runs_of_one_config_neither(self):
        self.assertEqual(self.names("first", "second"), ["elsewhere"])


class PhasesTest(absltest.TestCase):
    def test_in_the_order_of_the_config_and_what_it_lacks_last(self):
        folder = Path(self.create_tempdir(), "run")
        reports.run(folder)
        (run,) = gathered.gather([folder]).runs
        curves = {phase: {} for phase in ("extra", "second", "first")}
        for listed, phases in [
            (["first", "unmade", "second"], ["first", "second", "extra"]),
            (None, ["extra", "second", "first"]),
        ]:
            metrics = run.metrics._replace(curves=curves)
            run = run._replace(config=run.config | {"phases": listed}, metrics=metrics)
            self.assertEqual(run.phases, phases)


if __name__ == "__main__":
    absltest.main()
