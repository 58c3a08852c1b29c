"""The rooms of the package: who may import whom, and what `import jaxrobust` costs."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from absl.testing import absltest

from tests.support import paths

ROOT = paths.ROOT
PACKAGE = ROOT / "jaxrobust"

# Who stands further down may be imported; those of one line do not know each other.
ROOMS = (
    {"types"},
    {"runtime"},
    {"data"},
    {"attacks", "models"},
    {"config"},
    {"weights", "interop"},
    {"evaluation"},
    {"training"},
    {"convert", "diagnosis"},
    {"report"},
    {"main", "evaluate", "estimate", "doctor", "scaling", "__main__"},
)
FLOOR = {name: number for number, names in enumerate(ROOMS) for name in names}

# third party -> where it may be imported, as prefixes of module paths
ALLOWED = {
    "flax": ("models",),
    "optax": ("training.optim", "training.objectives", "training.step"),
    "orbax": ("weights.checkpoint",),
    "grain": ("data", "weights.checkpoint"),
    "tensorflow_datasets": ("data.tfds_source", "data.prepare"),
    "array_record": ("data",),
    "simplejpeg": ("data.decoding",),
    "clu": ("training.metrics", "models.table"),
    "tensorboardX": ("training.trackers",),
    "wandb": ("training.trackers",),
    "resvg_py": ("runtime.raster",),
    "ml_collections": ("main", "doctor", "estimate.changes", "config", "runtime.commandline"),
    "torch": ("interop", "weights.files", "convert", "evaluation.claims_torch"),
    "huggingface_hub": ("weights.download", "data.huggingface"),
    "datasets": ("data.huggingface",),
    "pyarrow": ("data.huggingface",),
    "timm": ("convert.torch_networks",),
    "torchvision": ("convert.torch_networks",),
    "tensorflow": (),
    "robustbench": ("convert",),
}
INSIDE_FUNCTIONS = {
    *("tensorflow_datasets", "torch", "tensorboardX", "huggingface_hub"),
    *("datasets", "pyarrow", "wandb", "resvg_py"),
}

# The modules whose names people type, and what takes a second to import.
DOORS = ("__main__", "main", "evaluate", "doctor", "estimate.__main__", "report.__main__")
DOORS += ("convert", "data.prepare.__main__")
HEAVY = ("jax", "flax", "optax", "orbax", "grain", "torch", "tensorflow_datasets")


def modules() -> dict[str, Path]:
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
        for p in sorted(PACKAGE.rglob("*.py"))
        if p != PACKAGE / "__init__.py"
    }


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported dotted name, is at module level)."""
    found: list[tuple[str, bool]] = []
    todo: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), True)]
    while todo:
        node, outside = todo.pop()
        if isinstance(node, ast.Import):
            found += [(alias.name, outside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(f"{node.module}.{alias.name}", outside) for alias in node.names]
        typed = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or typed
        outside = outside and not inside
        inner = ast.iter_child_nodes(node)  # no expression imports anything
        todo += [(child, outside) for child in inner if not isinstance(child, ast.expr)]
    return found


def loaded(door: str) -> set[str]:
    """The third parties that importing a module of ours loads, before any function is called."""
    known = modules()
    todo, seen, others = [door], set(), set()
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


class LayeringTest(absltest.TestCase):
    def test_every_module_has_a_room(self):
        unknown = {name.split(".")[0] for name in modules()} - FLOOR.keys()
        self.assertEmpty(unknown, "name their place in ROOMS")

    def test_imports_go_down(self):
        breaches = []
        for module, path in modules().items():
            room = module.split(".")[0]
            for name, _ in imports(path):
                parts = name.split(".")
                if parts[0] != "jaxrobust" or len(parts) < 2 or parts[1] in (room, "__version__"):
                    continue
                if FLOOR[parts[1]] >= FLOOR[room]:
                    breaches.append(f"{module} imports {name}")
        self.assertEmpty(breaches)

    def test_models_stand_on_the_floors_that_their_docstring_names(self):
        doc = ast.get_docstring(ast.parse((PACKAGE / "models/__init__.py").read_text()))
        rows = re.findall(r"^    ([a-z_, ]+?)  +\S", doc or "", re.MULTILINE)
        floor = {name: i for i, row in enumerate(rows) for name in row.split(", ")}
        files = {p: m.split(".")[1] for m, p in modules().items() if m.startswith("models.")}
        self.assertSameElements(floor, set(files.values()) - {"__main__"})
        for path, module in files.items():
            inside = f"jaxrobust.models.{module}."  # files of a package may know each other
            for name, _ in imports(path) if module in floor else ():
                if name.startswith("jaxrobust.models.") and not name.startswith(inside):
                    self.assertLess(floor[name.split(".")[2]], floor[module], f"{path}: {name}")

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
            self.skipTest("this is no git checkout")
        found = {line.strip('"').split("/")[0] for line in done.stdout.splitlines()}
        folders = {".ci", "configs", "examples", "jaxrobust", "tests", "tools"}
        self.assertEqual(found, folders | {".gitignore", "LICENSE", "README.md", "pyproject.toml"})

    def test_third_parties_stay_where_they_belong(self):
        breaches = []
        for module, path in modules().items():
            for name, top_level in imports(path):
                package = name.split(".")[0]
                if package in ALLOWED and not module.startswith(ALLOWED[package] or ("\0",)):
                    breaches.append(f"{module} imports {name}")
                asked_for = module.startswith("convert.torch_")
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
            if module != "models.classifier":
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

    def test_doors_load_nothing_that_takes_long(self):
        """A line can come within two seconds: `patience` begins before what is heavy is loaded."""
        for door in DOORS:
            with self.subTest(door):
                self.assertNoCommonElements(loaded(door), HEAVY)

    def test_no_test_module_is_imported_by_another(self):
        tests = Path(__file__).parent
        breaches = [
            f"{path.relative_to(tests)} imports {name}"
            for path in sorted(tests.rglob("*.py"))
            for name, _ in imports(path)
            if re.search(r"\btests(\.\w+)*\.test_", name)
        ]
        self.assertEmpty(breaches)

    def test_no_utils(self):
        self.assertEmpty([n for n in modules() if "util" in n or "helper" in n])


if __name__ == "__main__":
    absltest.main()
