"""What stands on the page and what is folded, how long its lists are, and how it is served."""

import json
from pathlib import Path
from unittest import mock

from absl.testing import parameterized
from markupsafe import Markup

from jaxrobust.report import gathered, page
from jaxrobust.report.parts import training
from tests.support import reports

ALARM = {"alarm_loss": 0.1, "alarm_loss_stronger": 5.0, "alarm_gradient_agreement": 1.0}
ALARM |= {"alarm_gradient_zero": 0.0, "skipped": 1}


class PageTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir().full_path)

    def page(self) -> str:
        return page.page(gathered.gather([self.folder]))

    def test_three_headlines_and_many_evaluations_are_folded(self):
        for count in range(1, 6):
            reports.evaluation(self.folder / f"n{count}", f"{count}{count}", n=8)
            text = self.page()
            lead, _, body = text.partition("<nav")
            self.assertEqual(lead.count('<p class="lead">'), min(count, 3))
            more = f"{count - 3} more networks are in the table below"
            self.assertEqual(more in lead, count > 3)
            self.assertEqual(body.count("<details><summary>"), count if count > 4 else 0)
            # A sentence of the lead does not stand again above its evaluation.
            again = body.count("convnext_n (train, step ")
            self.assertEqual(again, {1: 0, 2: 0, 3: 0, 4: 1, 5: 5}[count])

    def test_many_notes_are_folded(self):
        reports.evaluation(self.folder / "a", n=8)
        for count in (3, 4):
            contents = gathered.gather([self.folder])._replace(notes=["lost"] * count)
            text = page.page(contents)
            self.assertEqual(text.count("<summary>4 notes</summary>"), int(count == 4))
            self.assertEqual(text.count("<li>lost</li>"), count)

    def test_runs_that_are_not_tested_yet(self):
        for name in "abcde":
            reports.run(self.folder / name, lines=4)
        reports.evaluation(self.folder / "a" / "evaluation", n=8)
        lead = self.page().partition("<nav")[0]
        said = [f">{name}: phase train is at step 4" in lead for name in "abcde"]
        self.assertEqual(said, [False, True, True, True, False])
        self.assertEqual(lead.count("It has not been tested yet."), 3)

    def test_ten_alarms_and_all_notes(self):
        run = reports.run(self.folder / "run", lines=4)
        for count in (2, 12):  # skipped steps are no reason to doubt
            with (run / "metrics.jsonl").open("a") as lines:
                lines.write("damaged\n")
                for step in range(1000, 1000 + count):
                    row = {"phase": "train", "step": step, "loss": 1.0} | ALARM
                    lines.write(json.dumps(row) + "\n")
            lead = self.page().partition("<nav")[0]
            self.assertIn("<li>run, train, step 1,000: the loss is", lead)
            self.assertEqual(lead.count("<li>run, train, step 1,0"), min(count, 10))
            self.assertIn("<li>1 damaged" if count == 2 else "<li>2 damaged", lead)

    def test_curves_of_many_runs_have_fewer_points(self):
        run = gathered.gather([reports.run(self.folder / "run", lines=4)]).runs[0]
        for count, most in ((1, 400), (9, 400), (20, 200), (99, 40), (101, 40)):
            runs = [run._replace(name=f"r{at}") for at in range(count)]
            with mock.patch.object(training, "part", return_value=Markup()) as part:
                page.page(gathered.Gathered(runs, [], []))
            self.assertEqual({call.args[2] for call in part.call_args_list}, {most})
            self.assertEqual(
                [c.args[1] for c in part.call_args_list], [f"t{i}" for i in range(count)]
            )
