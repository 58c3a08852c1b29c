"""What the optional rooms add to the core's registries."""

import sys
from types import ModuleType
from typing import Any
from unittest import mock

from absl.testing import absltest

from jaxrobust.runtime import rooms


def names(room: str) -> dict[str, dict[str, Any]]:
    module = sys.modules.get(f"jaxrobust.{room}.names") or __import__(
        f"jaxrobust.{room}.names", fromlist=["names"]
    )
    return {key: rows for key, rows in vars(module).items() if key.isupper()}


class RoomsTest(absltest.TestCase):
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

    def test_two_rooms_with_one_name_are_refused(self):
        same = ModuleType("names")
        same.THINGS = {"one": "math:pi"}
        modules = {f"jaxrobust.{room}.names": same for room in ("zoo", "papers")}
        with (
            mock.patch.dict(sys.modules, modules),
            self.assertRaisesRegex(ValueError, "THINGS: jaxrobust/papers/names.py repeats one"),
        ):
            rooms.entries("THINGS")


if __name__ == "__main__":
    absltest.main()
