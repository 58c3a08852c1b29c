"""What stands on the page and what is folded, and how long its lists are."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from absl.testing import parameterized
from markupsafe import Markup as Html

from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.report import page, watching
from jaxrobust.report.curves import CurveEvent
from jaxrobust.report.gathered import Gathered, ReportedEvaluation


def run(name: str, *events: CurveEvent, folder: Path | None = None):
    place = folder or Path("/runs", name)
    return SimpleNamespace(name=name, folder=place, metrics=SimpleNamespace(events=list(events)))


def evaluation(name: str, *, of=None, verdicts="some", costs=()) -> ReportedEvaluation:
    record = AccuracyRecord(costs=list(costs) or None)
    return ReportedEvaluation(name, Path("f"), record, verdicts, [], of, {})


class PageTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.asked = []
        said = lambda what: lambda *given, **how: self.said(what, given, how)  # noqa: E731
        for place, name in (
            (page.sentences, "headline"),
            (page.sentences, "state"),
            (page.evaluation, "part"),
            (page.evaluation, "title"),
            (page.evaluation, "overview"),
            (page.training, "part"),
            (page.comparison, "part"),
            (page.comparison, "overlays"),
            (page.radii, "attacked"),
        ):
            self.enter_context(mock.patch.object(place, name, said(name)))
        self.enter_context(mock.patch.object(page.sentences, "doubts", return_value=[]))
        self.enter_context(mock.patch.object(page.radii, "ladders", return_value=[]))
        self.chosen = self.enter_context(mock.patch.object(page.sentences, "chosen"))
        self.chosen.side_effect = lambda gathered: gathered.evaluations

    def said(self, what, given, how):
        self.asked.append((what, given, how))
        name = getattr(given[0], "name", "") if given else ""
        return Html(f"[{what} {name}]")

    def of(self, runs=(), evaluations=(), notes=(), **how) -> str:
        return page.page(Gathered(list(runs), list(evaluations), list(notes)), **how)

    def test_three_headlines(self):
        for count, shown, more in ((3, 3, False), (4, 3, True)):
            with self.subTest(row=(count, shown, more)):
                text = self.of(evaluations=[evaluation(f"n{i}") for i in range(count)])
                self.assertEqual(text.count('class="lead">[headline'), shown)
                self.assertEqual("1 more networks are in the table below" in text, more)

    def test_runs_that_are_not_tested_yet(self):
        runs = [run(name) for name in "abcde"]
        text = self.of(runs, [evaluation("a", of=Path("/runs/a"))])
        lead = text.partition("<nav")[0]
        self.assertEqual(
            [f"[state {n}]" in lead for n in "abcde"], [False, True, True, True, False]
        )
        self.assertEqual(lead.count("It has not been tested yet."), 3)

    def test_ten_alarms_and_all_notes(self):
        kinds = ("alarm", "rollback", "resumption", "skipped")
        events = [CurveEvent("train", 1000 + i, kind, "words") for i, kind in enumerate(kinds)]
        text = self.of([run("a", *events)], notes=["note one"])
        self.assertIn("<li>note one</li>", text)
        self.assertIn("<li>a, train, step 1,000: words</li>", text)
        self.assertEqual(text.count(": words</li>"), 2)  # the others are no reason to doubt
        text = self.of([run("a", *[CurveEvent("p", i, "alarm", "words") for i in range(12)])])
        self.assertEqual(text.count(": words</li>"), 10)

    def test_many_evaluations_are_folded(self):
        for count, folded in ((4, False), (5, True)):
            with self.subTest(row=(count, folded)):
                self.asked.clear()
                own = [evaluation(f"n{i}") for i in range(count)]
                text = self.of(evaluations=own)
                self.assertEqual(text.count("<details><summary>[title"), count * folded)
                parts = [entry for entry in self.asked if entry[0] == "part" and len(entry[1]) > 2]
                self.assertEqual(
                    [given[1] for _, given, _ in parts], [f"e{i}" for i in range(count)]
                )
                in_lead = [how["in_lead"] for _, _, how in parts]
                self.assertEqual(in_lead, [not folded and i < 3 for i in range(count)])

    def test_curves_of_many_runs_have_fewer_points(self):
        for count, most in ((1, 400), (9, 400), (20, 200), (99, 40), (101, 40)):
            with self.subTest(row=(count, most)):
                self.asked.clear()
                self.of([run(f"r{i}") for i in range(count)])
                parts = [
                    given for what, given, _ in self.asked if what == "part" and len(given) == 3
                ]
                self.assertEqual({given[2] for given in parts}, {most})
                self.assertEqual([given[1] for given in parts], [f"t{i}" for i in range(count)])


class WatchingRulesTest(parameterized.TestCase):
    def test_no_port(self):
        for port in (-1, 65536):
            with (
                self.subTest(port=port),
                self.assertRaisesRegex(ValueError, f"--port={port} is no port; give one from 1 to"),
            ):
                watching.server([], host="127.0.0.1", port=port, every=1)

    def asked(self, path: str, host: str = "localhost") -> mock.Mock:
        """Ask for a path of a page that this machine alone reaches."""
        kind = watching._handler(lambda: "<p>é</p>", True)
        request = mock.Mock(path=path, headers={"Host": host})
        kind.do_GET(request)
        return request

    def test_the_page_is_sent_and_kept_by_nobody(self):
        for path in ("/", "/?again=1"):
            with self.subTest(path=path):
                request = self.asked(path)
                request.send_response.assert_called_once_with(200)
                headers = dict(call.args for call in request.send_header.call_args_list)
                self.assertEqual(headers["Cache-Control"], "no-store")
                self.assertEqual(headers["Content-Type"], "text/html; charset=utf-8")
                self.assertEqual(headers["Content-Length"], "9")  # bytes, of which é has two
                request.wfile.write.assert_called_once_with("<p>é</p>".encode())

    def test_a_page_is_renewed_every_ten_seconds_at_port_8017(self):
        here = [Path(self.create_tempdir())]
        with mock.patch.object(watching, "server") as server:
            watching.serve(here)
        server.assert_called_once_with(here, host="127.0.0.1", port=8017, every=10)

    def test_every_second_at_most(self):
        here = [Path(self.create_tempdir())]
        with self.assertRaisesRegex(ValueError, "--every=0.99 is too often; give 1 second or more"):
            watching.serve(here, every=0.99)
        with mock.patch.object(watching, "server") as server:
            watching.serve(here, every=1, port=0)
            server.assert_called_once_with(here, host="127.0.0.1", port=0, every=1)
        with self.assertRaisesRegex(ValueError, "nowhere is not there; name a run that has begun"):
            watching.serve([*here, Path("nowhere")])

    def test_what_is_in_the_way_is_text(self):
        with mock.patch.object(watching.gathered, "gather", side_effect=ValueError("<b> & none")):
            text = watching._page([], 2.5, mock.Mock())
        self.assertIn("&lt;b&gt; &amp; none", text)
        self.assertIn('http-equiv="refresh" content="2.5"', text)
