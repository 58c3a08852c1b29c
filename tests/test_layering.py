"""The rooms of the package: who may import whom, and what `import jaxrobust` costs."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

from absl.testing import absltest

from jaxrobust.__main__ import COMMANDS, module_of
from tests.support import paths
from tests.support.layers import FLOOR, PACKAGE, arrows, imports, modules, room

ROOT = paths.ROOT

# The same inside a room, of its folders and files; `.` stands for the files that are not named.
INSIDE = {
    "runtime": (".", "text", "files", "devices", "processes", "commandline"),
    "data": ("source", "imagenet", "transforms", "splits", "sources", "stream", "prepare"),
    "attacks": ("geometry", ".", "", "ensembles", "fixed_steps"),
    "models": (
        *("names", "published", "counted", "kernels", "modules", "interface", "families"),
        *("", "table"),
    ),
    "weights": ("store", "naming", "fetch", "trained", "reading", "imports", "load", "start"),
    "evaluation": ("network", "records", "engine", "bundles", "questions"),
    "training": ("update", "build", "run"),
    "publish": (".",),
    "report": ("markup", "curves", "figures", "gathered", "parts", "page", "pictures", "watching"),
    "results": (
        *("plotting", "key_sources", "run_records", "comparison", "selection", "stages"),
        *("listing", "board", "configs"),
    ),
    "commands": ("flags", ".", "configure", "conversion", "results"),
    "zoo": ("names", "shared", ".", "convolutional", "transformers", "objectives"),
    "pytorch": (
        *("names", "program", "blocks", "operators", "trainable", "kept", "reading", "modules"),
        *("agreement", "torch", "networks", "state_dicts", "users_module", "named"),
    ),
    "papers": ("names", ".", "tables", "networks", "planning", "figures", "commands"),
}
MOST_FILES = 15  # of a folder: more is a drawer
MOST_LINES = 120  # of a command

# third party -> where it may be imported, as prefixes of module paths
ALLOWED = {
    "flax": ("models", "zoo"),
    "optax": ("training.update",),
    "orbax": ("weights.store.checkpoint",),
    "grain": ("data", "weights.store.checkpoint"),
    "tensorflow_datasets": ("data.sources.tfds", "data.prepare"),
    "array_record": ("data",),
    "simplejpeg": ("data.transforms.decoding",),
    "clu": ("training.run.metrics", "models.table"),
    "tensorboardX": ("training.run.trackers",),
    "wandb": ("training.run.trackers",),
    "resvg_py": ("runtime.text.raster",),
    "rich": ("runtime.text.panel",),
    "ml_collections": (
        "commands",
        "papers.commands",
        "doctor.estimate.changes",
        "config",
        "runtime.commandline",
    ),
    "torch": ("pytorch", "weights.store.files", "publish", "evaluation.bundles.claims_torch"),
    "huggingface_hub": (*("weights.fetch.remote_weights", "data.sources.huggingface", "publish"),),
    "datasets": ("data.sources.huggingface",),
    "pyarrow": ("data.sources.huggingface",),
    "timm": ("publish.torch_networks", "pytorch.networks.torch_modules"),
    "torchvision": ("publish.torch_networks",),
    "tensorflow": (),
    "robustbench": ("publish",),
    "matplotlib": ("results", "papers", "commands"),
}
INSIDE_FUNCTIONS = {
    *("tensorflow_datasets", "torch", "tensorboardX", "huggingface_hub"),
    *("datasets", "pyarrow", "wandb", "resvg_py"),
}

# The modules that people start by their names; each says a line before it loads what takes long.
ENTRY_POINTS = ("__main__", "main", "evaluate", "doctor.__main__", "convert")
HEAVY = ("jax", "flax", "optax", "orbax", "grain", "torch", "tensorflow_datasets")


def loaded(entry: str) -> set[str]:
    """The third parties that importing a module of ours loads, before any function is called."""
    known = modules()
    todo, seen, others = [entry], set(), set()
    while todo:
        name = todo.pop()
        packages = [".".join(name.split(".")[: i + 1]) for i in range(name.count(".") + 1)]
        for part in packages:  # of which Python runs the `__init__`, too
            if part not in known or part in seen:
                continue
            seen.add(part)
            for imported, top in imports(known[part]):
                if top and imported.startswith("jaxrobust."):
                    todo.append(imported.removeprefix("jaxrobust."))
                elif top:
                    others.add(imported.split(".")[0])
    return others


def floor_inside(module: str) -> int:
    """How high a module stands inside its room: its `__init__` above all, or where "" stands."""
    order, parts = INSIDE[room(module)], module.split(".")
    if len(parts) == 1:
        return order.index("") if "" in order else len(order)
    return order.index(parts[1] if parts[1] in order else ".")


class LayeringTest(absltest.TestCase):
    def test_every_module_has_a_room(self):
        unknown = {room(name) for name in modules()} - FLOOR.keys()
        self.assertEmpty(unknown, "name their place in ROOMS")
        self.assertLessEqual(len(FLOOR), 24)

    def test_imports_go_down(self):
        breaches = [
            f"{module} imports {name}"
            for module, name in arrows()
            if room(name) != room(module) and FLOOR[room(name)] >= FLOOR[room(module)]
        ]
        self.assertEmpty(breaches)

    def test_imports_inside_a_room_go_down(self):
        breaches = [
            f"{module} imports {name}"
            for module, name in arrows()
            if room(name) == room(module) and room(module) in INSIDE
            if floor_inside(name) > floor_inside(module)
        ]
        self.assertEmpty(breaches)

    def test_no_circle_of_modules(self):
        below: dict[str, set[str]] = {name: set() for name in modules()}
        for module, name in arrows():
            below[module].add(name)
        with self.subTest("a list of modules, each behind all that it imports"):
            self.assertLen(list(graphlib.TopologicalSorter(below).static_order()), len(below))

    def test_no_folder_is_a_drawer(self):
        files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
        folders = Counter(path.parent.relative_to(ROOT) for path in files)
        self.assertEmpty({str(f): count for f, count in folders.items() if count > MOST_FILES})

    def test_no_two_classes_of_one_name(self):
        """But a network and its counterpart for small images share their words."""
        networks = ("zoo", "models.families")
        named = Counter(
            node.name
            for module, path in modules().items()
            if not module.startswith(networks) and "class " in path.read_text()
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        )
        self.assertEmpty({name: count for name, count in named.items() if count > 1})

    def test_no_string_names_a_module_further_up(self):
        """What is imported by its name is an import too."""
        breaches = []
        for module, path in modules().items():
            if path.name == "__main__.py" or module in ("main", "evaluate"):
                continue
            for name in re.findall(r'import_module\(f?"jaxrobust\.([\w.]+)', path.read_text()):
                if FLOOR[room(name)] > FLOOR[room(module)]:
                    breaches.append(f"{module} names {name}")
        self.assertEmpty(breaches)

    def test_the_wheel_has_every_package(self):
        named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
            "packages"
        ]
        there = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
        self.assertSameElements(set(named) - {"jaxrobust.configs"}, there)

    def test_nothing_of_a_checkout_is_imported(self):
        """A wheel has neither of these."""
        for module, path in modules().items():
            found = {name.split(".")[0] for name, _ in imports(path)}
            self.assertNoCommonElements(found, ("tools", "tests", "configs"), module)

    def test_the_top_of_the_repository(self):
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            self.skipTest("this is not a git checkout")
        found = {line.strip('"').split("/")[0] for line in done.stdout.splitlines()}
        folders = {".ci", ".github", "configs", "docs", "examples", "jaxrobust", "tests", "tools"}
        pages = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md"}
        pages.add("SECURITY.md")
        self.assertEqual(found, folders | pages | {".gitignore", "pyproject.toml"})

    def test_third_parties_stay_where_they_belong(self):
        breaches = []
        for module, path in modules().items():
            for name, top_level in imports(path):
                package = name.split(".")[0]
                if package in ALLOWED and not module.startswith(ALLOWED[package] or ("\0",)):
                    breaches.append(f"{module} imports {name}")
                asked_for = module.startswith("publish.torch_")
                if package in INSIDE_FUNCTIONS and top_level and not asked_for:
                    breaches.append(f"{module} imports {name} outside of a function")
        self.assertEmpty(breaches)

    def test_data_does_not_touch_jax(self):
        for module, path in modules().items():
            if module.startswith("data"):
                found = [name for name, _ in imports(path) if name.split(".")[0] == "jax"]
                self.assertEmpty(found, module)

    def test_nnx_becomes_functions_in_one_file(self):
        for module, path in modules().items():
            if module != "models.interface.classifier":
                for call in ("nnx.split", "nnx.merge", "nnx.state", "nnx.jit", "nnx.grad"):
                    self.assertNotIn(call, path.read_text(), module)

    def test_import_is_light(self):
        code = (
            "import sys, jaxrobust, jaxrobust.models, jaxrobust.attacks, jaxrobust.data, "
            "jaxrobust.convert; heavy = ('torch', 'tensorflow', 'grain', 'orbax', "
            "'tensorflow_datasets'); print(*[m for m in heavy if m in sys.modules])"
        )
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        self.assertEqual(out.strip(), "")

    def test_entry_points_load_nothing_that_takes_long(self):
        """A line can come within two seconds: `patience` begins before what is heavy is loaded."""
        commands = [name for name in modules() if room(name) == "commands"]
        self.assertGreater(len(commands), 18)
        for name in (*ENTRY_POINTS, *commands):
            with self.subTest(name):
                self.assertNoCommonElements(loaded(name), HEAVY)

    def test_commands_are_short_and_in_one_place(self):
        """A command reads its flags into a dataclass and calls one function; rooms compute."""
        for name, path in modules().items():
            if room(name) == "commands":
                self.assertLessEqual(len(path.read_text().splitlines()), MOST_LINES, name)
        for name in COMMANDS:
            self.assertIn(module_of(name).removeprefix("jaxrobust."), modules())

    def test_no_test_module_is_imported_by_another(self):
        tests = Path(__file__).parent
        breaches = [
            f"{path.relative_to(tests)} imports {name}"
            for path in sorted(tests.rglob("*.py"))
            if re.search(r"\btests\b.* import (\(|.*test_)|import tests.*test_", path.read_text())
            for name, _ in imports(path)
            if re.search(r"\btests(\.\w+)*\.test_", name)
        ]
        self.assertEmpty(breaches)

    def test_no_utils(self):
        self.assertEmpty([n for n in modules() if "util" in n or "helper" in n])
