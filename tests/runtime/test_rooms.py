"""What the optional rooms add to the core's registries, and that the core loads none of them."""

import subprocess
import sys
from types import ModuleType
from typing import Any
from unittest import mock

from absl.testing import absltest

from jaxrobust.runtime import rooms

# Imports the core's modules that name papers, mistypes a command, and prints the papers' modules.
PROGRAM = """
import importlib, pkgutil, sys
import jaxrobust.__main__ as overview
import jaxrobust.results.comparison as comparison, jaxrobust.results.listing
import jaxrobust.commands.estimate, jaxrobust.evaluation.questions.command
import jaxrobust.report as report
for package in (comparison, report):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
sys.argv = ["jaxrobust", "sparsty"]
try:
    overview.main()
except SystemExit:
    pass
analysis = [f"jaxrobust.results.{name}" for name in ("papers", "planning", "figures", "networks")]
entries = overview.rooms.entries
rows = [row for name in ("EVALUATIONS", "ESTIMATES") for row in entries(name).values()]
rows += [row[0] for row in entries("COMMANDS").values()]
others = ("jaxrobust.papers.worst_case", "jaxrobust.papers.scaling")
print(*(name for name in sys.modules if name.startswith((*analysis, *others, *rows))))
"""


def names(room: str) -> dict[str, dict[str, Any]]:
    module = sys.modules.get(f"jaxrobust.{room}.names") or __import__(
        f"jaxrobust.{room}.names", fromlist=["names"]
    )
    return {key: rows for key, rows in vars(module).items() if key.isupper()}


class RoomsTest(absltest.TestCase):
    def test_the_core_loads_nothing_of_papers(self):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (0, "\n"), done.stderr)
        self.assertIn("sparsty is not a command; did you mean sparsity?", done.stderr)

    def test_every_entry_can_be_imported(self):
        for room in rooms.ROOMS:
            for registry, rows in names(room).items():
                for row in rows.values():
                    entry = row[0] if registry == "COMMANDS" else row
                    with self.subTest(registry, entry=entry):
                        self.assertIsNotNone(rooms.resolve(entry))

    def test_an_entry_that_cannot_be_imported_is_named(self):
        for entry, reason in (
            ("jaxrobust.no_such:THING", "No module named 'jaxrobust.no_such'"),
            ("jaxrobust.types:NOTHING", "has no attribute 'NOTHING'"),
        ):
            with self.assertRaisesRegex(ValueError, f"registry entry '{entry}' cannot.*{reason}"):
                rooms.resolve(entry)

    def test_what_a_wheel_leaves_out(self):
        self.assertIs(rooms.optional("jaxrobust.runtime.rooms"), rooms)
        self.assertIsNone(rooms.optional("jaxrobust.no_such.module"))
        missing = ModuleNotFoundError("No module named 'flax'", name="flax")
        with (
            mock.patch.object(rooms.importlib, "import_module", side_effect=missing),
            self.assertRaises(ModuleNotFoundError),
        ):
            rooms.optional("jaxrobust.models")

    def test_a_room_that_is_left_out_adds_nothing(self):
        every = rooms.entries("COMMANDS")
        with mock.patch.object(rooms, "ROOMS", (*rooms.ROOMS, "attic")):
            self.assertEqual(rooms.entries("COMMANDS"), every)

    def test_two_rooms_with_one_name_are_refused(self):
        same = ModuleType("names")
        same.THINGS = {"one": "math:pi"}
        modules = {f"jaxrobust.{room}.names": same for room in ("zoo", "papers")}
        with (
            mock.patch.dict(sys.modules, modules),
            self.assertRaisesRegex(ValueError, "THINGS: jaxrobust/papers/names.py repeats one"),
        ):
            rooms.entries("THINGS")
