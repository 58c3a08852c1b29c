"""What a check finds, what follows from it, and how that is told."""

from absl.testing import parameterized

from jaxrobust.doctor import findings
from jaxrobust.doctor.config_checks import CONFIG_CHECKS
from jaxrobust.doctor.findings import GREEN, RED, SKIPPED, YELLOW, Check, CheckResult, Finding
from jaxrobust.doctor.network_checks import NETWORK_CHECKS
from tests.support import sweeps


def check(name, level, follows=()):
    seen = CheckResult(level, f"seen {name}", 1.5)
    return Check(name, "measures", "cause", "remedy", "paper", lambda patient: seen, follows)


class FindingsTest(parameterized.TestCase):
    def test_one_fault_is_red_once(self):
        rows = [
            check("a", RED),
            check("b", RED, ("a",)),
            check("c", RED),
            check("d", GREEN, ("a",)),
        ]
        found = findings.examined(rows, None)
        self.assertEqual([f.result.level for f in found], [RED, YELLOW, RED, GREEN])
        self.assertEqual([f.after for f in found], [None, "a", None, None])
        self.assertIn("fix a first", findings.line(found[1], coloured=False))
        self.assertEqual(findings.summary(found), "4 checks: 1 green, 1 yellow, 2 red")

    def test_what_follows_from_a_sound_one_is_a_fault_of_its_own(self):
        rows = [check("a", GREEN), check("b", RED), check("c", RED), check("d", RED, "abc")]
        rows += [check("e", YELLOW, "a"), check("f", RED, "e")]
        found = findings.examined(rows, None)
        self.assertEqual([f.after for f in found], [None, None, None, "b", None, None])
        levels = [GREEN, RED, RED, YELLOW, YELLOW, RED]
        self.assertEqual([f.result.level for f in found], levels)
        self.assertEqual(found[3].result.cause, "it follows from b; see that check")

    def test_each_is_told_when_it_is_found(self):
        """A person reads the first findings while the later ones are computed."""
        told, seen = [], []

        def look(number):
            def of(patient):
                seen.append((number, len(told)))
                return CheckResult(RED, f"seen {number}")

            return Check(f"{number}", "measures", "cause", "remedy", "paper", of, ())

        found = findings.examined([look(0), look(1), look(2)], None, told.append)
        self.assertEqual(seen, [(0, 0), (1, 1), (2, 2)])  # what was told before each
        self.assertEqual(told, found)

    def test_a_line_has_words_and_colour_only_on_a_terminal(self):
        (red,) = findings.examined([check("a", RED)], None)
        said = findings.line(red, coloured=False)
        self.assertRegex(said, r"^red +a +seen a\. Cause: cause\. Remedy: remedy \(paper\)$")
        self.assertIn("\033[31mred", findings.line(red, coloured=True))
        (green,) = findings.examined([check("a", GREEN)], None)
        self.assertRegex(findings.line(green, coloured=False), r"^green +a +seen a$")

    def test_a_terminal_breaks_lines_between_words(self):
        said = "seen " + "many words and train.warmup_epochs=20 " * 5
        (red,) = findings.examined([check("label-order", RED)], None)
        red = red._replace(result=red.result._replace(sentence=said.strip()))
        whole = findings.line(red, coloured=False)
        for columns in (40, 80, 120):
            broken = findings.line(red, coloured=False, columns=columns)
            self.assertLessEqual(max(map(len, broken.splitlines())), columns)
            self.assertEqual(broken.split(), whole.replace(". ", " ").split())
        lines = broken.splitlines()
        self.assertRegex(lines[0], r"^red     label-order            seen many")
        self.assertRegex(lines[1], r"^ {31}\S")  # below what was seen
        self.assertEqual(lines[-2:], ["        Cause: cause", "        Remedy: remedy (paper)"])
        coloured = findings.line(red, coloured=True, columns=80)
        self.assertStartsWith(coloured, "\033[31mred\033[0m     label-order")

    def test_cause_and_remedy_are_those_of_the_look_before_those_of_the_check(self):
        look_ = lambda patient: CheckResult(RED, "s", 1, cause="own")  # noqa: E731
        (found,) = findings.examined([Check("a", "m", "cause", "remedy", "p", look_)], None)
        self.assertEqual((found.result.cause, found.result.remedy), ("own", "remedy"))
        plain = found.plain()
        self.assertEqual(
            (plain["cause"], plain["paper"], plain["follows_from"]), ("own", "p", None)
        )
        healthy = found._replace(result=found.result._replace(level=GREEN)).plain()
        self.assertEqual((healthy["cause"], healthy["remedy"]), (None, None))

    def test_a_fault_that_follows_names_no_paper(self):
        check = Check("a", "m", "c", "r", "a paper", lambda patient: None)
        seen = CheckResult(YELLOW, "s", cause="c", remedy="r")
        self.assertIn("(a paper)", findings.line(Finding(check, seen), coloured=False))
        self.assertNotIn("paper", findings.line(Finding(check, seen, "b"), coloured=False))
        none = Finding(check._replace(paper=""), seen)
        self.assertEndsWith(findings.line(none, coloured=False), "Remedy: r")

    @sweeps.rows((61, 8), (62, 31))
    def test_further_lines_stand_below_where_they_fit(self, columns, indent):
        check = Check("a", "m", "c", "r", "p", lambda patient: None)
        found = Finding(check, CheckResult(GREEN, "many words " * 20))
        lines = findings.line(found, coloured=False, columns=columns).splitlines()
        self.assertEqual(len(lines[1]) - len(lines[1].lstrip()), indent)
        narrow = findings.line(found, coloured=False, columns=10).splitlines()
        self.assertLessEqual(max(map(len, narrow)), 40)

    def test_levels_are_counted_in_their_order(self):
        check = Check("a", "m", "c", "r", "p", lambda patient: None)
        levels = (RED, SKIPPED, GREEN, RED)
        own = [Finding(check, CheckResult(level, "s")) for level in levels]
        self.assertEqual(findings.summary(own), "4 checks: 1 green, 2 red, 1 skipped")
        self.assertEqual(findings.summary(own[:1]), "1 check: 1 red")

    def test_rows_of_the_tables(self):
        for table in (NETWORK_CHECKS, CONFIG_CHECKS):
            names = [row.name for row in table]
            self.assertEqual(len(set(names)), len(names))
            for number, row in enumerate(table):
                self.assertRegex(row.paper, r"arXiv \d{4}\.\d{5}", row.name)
                self.assertLessEqual(set(row.follows), set(names[:number]), row.name)
