"""The documentation: nothing public is missing, no page lacks an example, and the site is whole."""

import ast
import contextlib
import html
import io
import json
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

import jaxrobust
from tests.support.paths import ROOT
from tools.docs import (
    build,
    comments,
    docstrings,
    kernels,
    links,
    notebooks,
    outputs,
    pages,
    public,
    reference,
)

DOCS = ROOT / "docs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
_FLAGS += ("--no-first-run", "--disable-component-update", "--disable-sync", "--disable-quic")
# What stands out of a page, what it fetched from elsewhere, and its color.
_PROBE = """
<script>
addEventListener('load', () => setTimeout(() => {
  const wide = [...document.querySelectorAll('article *')].filter(e =>
    !e.closest('.table-wrapper, pre, .highlight') && e.getBoundingClientRect().width > 0 &&
    e.getBoundingClientRect().right > innerWidth + 1);
  const out = document.createElement('pre');
  out.id = 'probe';
  out.textContent = JSON.stringify({width: innerWidth,
    wide: wide.map(e => e.outerHTML.slice(0, 90)),
    scrolls: document.documentElement.scrollWidth,
    loaded: performance.getEntriesByType('resource').map(e => e.name)
      .filter(name => !/^(file|data):/.test(name)),
    color: getComputedStyle(document.body).backgroundColor});
  parent.document.body.append(out);
}, 500));
</script>
"""


def every() -> dict[str, str]:
    """The text of each page by its name in docs/, with what it includes, but nothing generated."""
    found = {}
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text()
        for file in re.findall(r"^```\{include\} (\S+)\n```$", text, re.MULTILINE):
            text += (path.parent / file).read_text()
        found[path.relative_to(DOCS).as_posix()] = text
    return found


def python_cells(text: str) -> list[ast.Module]:
    """The cells and blocks of a page that are Python and nothing else."""
    found = re.findall(
        r"^```(?:\{code-cell\} ipython3|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    plain = ["".join(re.findall(r"^(?!:).*\n", cell, re.MULTILINE)) for cell in found]
    return [ast.parse(cell) for cell in plain if not cell.startswith(("%%", "\n%%"))]


def names_of(cell: ast.Module) -> set[str]:
    """The names of the package that a cell imports or reads, without `jaxrobust.`; no modules."""
    modules, names = {}, set()
    for node in ast.walk(cell):
        if isinstance(node, ast.Import):
            modules |= {alias.name: "" for alias in node.names if alias.name == "jaxrobust"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxrobust"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                place = ROOT / name.replace(".", "/")
                if place.is_dir() or place.with_suffix(".py").is_file():
                    modules[alias.asname or alias.name] = f"{name}.".partition(".")[2]
                else:
                    names.add(name.partition(".")[2])
    for node in ast.walk(cell):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in modules:
            names.add(f"{modules[node.value.id]}{node.attr}")
    return names - {*public.MODULES}


class PagesTest(parameterized.TestCase):
    def test_each_has_an_example(self):
        example = re.compile(r"^```(?!\{(include|generated|toctree)\})", re.MULTILINE)
        typed = re.compile(r"`(jaxrobust|python|pip|git) [^`]+`")
        lacking = [
            n for n, text in every().items() if not (example.search(text) or typed.search(text))
        ]
        self.assertEmpty(lacking)

    def test_each_is_in_the_contents(self):
        listed = re.findall(r"^[\w/]+$", (DOCS / "index.md").read_text(), re.MULTILINE)
        self.assertLen({*listed}, len(listed))
        self.assertSameElements([f"{name}.md" for name in listed], {*every()} - {"index.md"})

    def test_each_readme_is_a_page(self):
        readmes = {p.relative_to(ROOT).as_posix() for p in (ROOT / "jaxrobust").glob("*/README.md")}
        readmes |= {"tools/README.md", "tools/launch/README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
        readmes.add("jaxrobust/doctor/estimate/README.md")
        self.assertSameElements(readmes | {"SECURITY.md"}, pages.places())

    def test_links_lead_somewhere(self):
        """Those of the sources, as a viewer of the repository follows them."""
        for path in sorted(DOCS.rglob("*.md")):
            for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
                if "://" not in link and not link.startswith("#"):
                    target = path.parent / link.partition("#")[0]
                    self.assertTrue(target.is_file(), f"{path.name}: {link}")

    def test_a_room_that_is_left_out(self):
        text = "```{include} ../../jaxrobust/attic/README.md\n```"
        expected = "This installation does not include `jaxrobust/attic`."
        self.assertEqual(pages.expanded(text, "guide/attic.md"), expected)

    def test_a_link_is_turned(self):
        for text, expected in (
            ("[a](../data/README.md#b-c)", "[a](data.md#b-c)"),
            ("[`a`](../../tools/README.md)", "[`a`](tools.md)"),
            ("[a](../../configs/quickstart.py)", "a (`configs/quickstart.py`)"),
            ("[configs/quickstart.py](../../configs/quickstart.py)", "configs/quickstart.py"),
            (
                "[a](https://arxiv.org/abs/1) and [b](#c)",
                "[a](https://arxiv.org/abs/1) and [b](#c)",
            ),
            ("```\n[a](../data/README.md)\n```", "```\n[a](../data/README.md)\n```"),
            ('<img src="x.png" width="9" alt="b">', "![b](../../jaxrobust/training/x.png)"),
        ):
            with self.subTest(row=(text, expected)):
                turned = pages.turned(text, "jaxrobust/training/README.md", "guide/training.md")
                self.assertEqual(turned, expected)


class ReferenceTest(parameterized.TestCase):
    def test_no_public_name_is_missing(self):
        made = reference.api()
        shown = re.findall(r"^::::\{py:\w+\} jaxrobust\.([\w.]+)", made, re.MULTILINE)
        self.assertEqual(shown, public.names())
        self.assertGreater(len(shown), 80)
        for block in re.findall(r"^::::\{py:\w+\} .*?^::::$", made, re.MULTILINE | re.DOTALL):
            said = block.split("\n", 1)[1].rpartition("\n")[0].strip()
            self.assertGreater(len(said), 20, block[:90])
            self.assertFalse(said.startswith("."), block[:90])

    def test_what_the_package_and_its_pages_use_is_public(self):
        """No page for users calls what the reference does not show."""
        # Of the numbers of schemas, of parts that are added, and of commands that are written.
        inner = ("versions.md", "guide/runtime.md")
        known, used = set(public.names()), {}
        self.assertContainsSubset({*jaxrobust.__all__} - {*public.MODULES, "__version__"}, known)
        for page, text in (every() | {"README": (ROOT / "README.md").read_text()}).items():
            for cell in () if page in inner or "/add_" in page else python_cells(text):
                used |= dict.fromkeys(names_of(cell), page)
        self.assertGreater(len(used), 15)
        self.assertEmpty({name: page for name, page in used.items() if name not in known})

    def test_no_key_of_a_config_is_missing(self):
        made = reference.keys()
        rows = re.findall(r"^\| `(\w+)` \| `(.*)` \| (.*) \|$", made, re.MULTILINE)
        values = reference.config.base().to_dict()
        found = {name for name, _, _ in rows}
        for key, value in values.items():
            own = value if isinstance(value, dict) and key not in ("changes",) else {key: value}
            self.assertContainsSubset(own, found, key)
        self.assertEmpty([name for name, _, meaning in rows if not meaning])

    def test_no_field_of_a_record_is_missing(self):
        made = reference.fields()
        for field in reference.record.keys_of(reference.record.AccuracyRecord):
            self.assertIn(f"| `{field.name}` |", made)
        self.assertIn("## AttackSettings", made)

    def test_no_check_is_missing(self):
        made = reference.checks()
        for row in (
            *reference.network_checks.NETWORK_CHECKS,
            *reference.config_checks.CONFIG_CHECKS,
        ):
            self.assertIn(f"### {row.name}\n", made)
            self.assertIn(docstrings.escaped(row.remedy), made)

    def test_refusals_and_commands(self):
        found = [*reference.messages('raise ValueError(f"n={n} is too large; give a smaller one")')]
        self.assertEqual(found, [("n=… is too large", "give a smaller one")])
        self.assertEmpty([*reference.messages('raise ValueError("something is odd")')])
        made = reference.refusals_of(ROOT / "jaxrobust" / "attacks")
        self.assertGreater(made.count("\n| "), 20)
        self.assertIn("| Choose one of … |", made)
        shown = reference.commands()
        self.assertEqual(shown.count("\n## ") + 1, len(reference.COMMANDS))


class WritingTest(parameterized.TestCase):
    def test_a_docstring(self):
        made = docstrings.myst(
            "Do it to f32[B].\n\nArgs:\n  x: one of `a|b`,\n    or two.\n  **more: others.\n"
            "Raises:\n  ValueError: no `x`.\n\n>>> 1 + 1\n2\n"
        )
        self.assertEqual(
            made,
            "Do it to f32\\[B\\].\n\n**Args**\n\n"
            "- `x`: one of `a|b`, or two.\n- `**more`: others.\n\n"
            "**Raises**\n\n- `ValueError`: no `x`.\n\n```pycon\n>>> 1 + 1\n2\n```",
        )

    def test_comments_of_fields(self):
        found = {f.name: f for f in comments.fields(reference.config.AttackSection)}
        self.assertEqual(found["epsilon"].default, "4 / 255")
        self.assertEqual(found["epsilon"].meaning, "in units of the [0, 1] pixel range")
        self.assertStartsWith(found["warmup_epochs"].meaning, "The radius grows by epsilon /")

    def test_links_that_lead_nowhere(self):
        site = Path(self.create_tempdir())
        (site / "a.html").write_text(
            '<a href="b.html#there">b</a><a href="b.html#gone">b</a><a href="c.html">c</a>'
            '<a href="https://host.example/">d</a><img src="https://host.example/x.png">'
            '<link href="own.css?v=1"><a href="#here" id="here">e</a>'
        )
        (site / "b.html").write_text('<p id="there">x</p>')
        (site / "own.css").write_text("")
        self.assertEqual(
            links.broken(site),
            [
                "a.html loads https://host.example/x.png",
                "a.html links to b.html#gone, which has no such anchor",
                "a.html links to c.html, which is not there",
            ],
        )


class OutputsTest(absltest.TestCase):
    """Cells on CIFAR-10 run where it is, and elsewhere say what they printed once."""

    def setUp(self):
        super().setUp()
        folder = Path(self.create_tempdir())
        self.enter_context(mock.patch.dict(os.environ, TFDS_DATA_DIR=str(folder)))
        os.environ.pop("JAXROBUST_DOCS_KEEP", None)
        self.file = folder / "kept" / "cifar10.json"
        self.info = folder / "cifar10" / "3.0.2" / "dataset_info.json"

    def put(self) -> None:
        self.info.parent.mkdir(parents=True)
        self.info.write_text("{}")

    def test_all_that_pages_need_is_kept(self):
        cells = [
            cell
            for text in every().values()
            for cell in re.findall(r"^%%bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
            if "cifar10" in cell
        ]
        self.assertNotEmpty(cells)
        self.assertSameElements(outputs.kept(), cells)
        for cell, row in outputs.kept().items():
            self.assertNotIn("+", row.commit, cell)  # of a checkout without changes
            self.assertEqual(outputs.of_cell(cell).split("\n", 1)[1], row.text)

    def test_a_cell_runs_or_is_repeated(self):
        cell = "echo cifar10 of $((3 + 4))"
        with mock.patch.object(outputs, "KEPT", self.file):
            self.assertEqual(outputs.of_cell("echo $((3 + 4))"), "7\n")  # which needs no data
            with self.assertRaisesRegex(LookupError, "run `jaxrobust prepare cifar10`, then"):
                outputs.of_cell(cell)
            self.put()
            self.assertEqual(outputs.of_cell(cell), "cifar10 of 7\n")
            self.assertEqual(outputs.kept(), {})
            os.environ["JAXROBUST_DOCS_KEEP"] = "0123abcd"
            outputs.of_cell(cell)
            self.assertEqual(outputs.kept()[cell].commit, "0123abcd")
            self.info.unlink()
            first, rest = outputs.of_cell(cell).split("\n", 1)
        self.assertEqual(rest, "cifar10 of 7\n")
        self.assertRegex(first, r"^\[CIFAR-10 is not on the .* made this page; printed on \d{4}-")

    def test_a_command_that_fails_fails_the_cell(self):
        failing = self.assertRaises(subprocess.CalledProcessError)
        with contextlib.redirect_stderr(io.StringIO()) as said, failing:
            outputs.of_cell("echo why >&2; false; echo more")
        self.assertEqual(said.getvalue(), "why\n")

    def test_nothing_is_kept_without_the_data(self):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.assertEqual(build.main(["--keep"]), 2)
        self.assertEqual(
            said.getvalue(), "build: --keep needs CIFAR-10; `jaxrobust prepare cifar10`\n"
        )


@pytest.mark.slow
class SiteTest(parameterized.TestCase):
    """Builds it anew, every cell too, without a warning; some minutes."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if missing := [name for name in build.NEEDED if find_spec(name) is None]:
            raise absltest.SkipTest(f"needs {missing[0]}: pip install -e '.[docs,torch]'")
        cls.folder = Path(absltest.get_default_test_tmpdir()) / "docs"
        cls.site = cls.folder / "html"
        cls.code = build.main([f"--out={cls.site}", "--fresh"])

    def test_builds(self):
        self.assertEqual(self.code, 0)
        there = {p.relative_to(self.site).as_posix() for p in self.site.rglob("*.html")}
        self.assertContainsSubset({name.replace(".md", ".html") for name in every()}, there)
        tutorial = (self.site / "tutorial.html").read_text()
        self.assertIn("digits, split test", tutorial)
        self.assertGreater(tutorial.count("<img"), 1)

    def browser(self, *words: str) -> str:
        if CHROMIUM is None:
            self.skipTest("needs Chromium: apt-get install chromium")
        own = f"--user-data-dir={self.folder / 'browser'}"
        command = [CHROMIUM, *_FLAGS, own, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    @parameterized.product(
        page=("index", "tutorial", "guide/evaluation", "reference/api", "reference/errors"),
        width=(360, 1440),
        dark=(False, True),
    )
    def test_in_a_browser(self, page, width, dark):
        file = self.site / f"{page}.html"
        text = file.read_text().replace("</body>", f"{_PROBE}</body>")
        probed = file.with_name(f"{file.stem}-probed.html")
        probed.write_text(text)
        frame = (
            f'<iframe src="{probed.name}" width="{width}" height="900" style="border:0"></iframe>'
        )
        outside = file.with_name(f"{file.stem}-frame.html")
        outside.write_text(f'<meta charset="utf-8"/>{frame}')
        # The frame looks into its page, which is another file.
        flags = ["--allow-file-access-from-files"]
        flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
        size, time = "--window-size=1600,1000", "--virtual-time-budget=20000"
        shown = self.browser(*flags, size, time, "--dump-dom", f"file://{outside}")
        probed.unlink()
        outside.unlink()
        found = re.search(r'<pre id="probe">(.*?)</pre>', shown, re.DOTALL)
        self.assertIsNotNone(found, shown[-300:])
        said = json.loads(html.unescape(found[1]))
        self.assertEqual(said["width"], width)
        self.assertLessEqual(said["scrolls"], width)
        self.assertEqual(said["wide"], [])
        self.assertEqual(said["loaded"], [])
        light = sum(map(int, re.findall(r"\d+", said["colour"])[:3])) > 3 * 128
        self.assertEqual(light, not dark, said["colour"])

    def test_search_works_without_a_network(self):
        for word, page in (("smoothing", "evaluation"), ("apgd_machine", "api.html")):
            with self.subTest(row=(word, page)):
                time = "--virtual-time-budget=20000"
                address = f"file://{self.site / 'search.html'}?q={word}"
                shown = self.browser(time, "--dump-dom", address)
                results = re.findall(r'<ul[^>]*class="search".*?</ul>', shown, re.DOTALL)
                self.assertNotEmpty(results, shown[-300:])
                self.assertIn(page, results[0])


# What a notebook does in a test: the same, of fewer epochs and images.
SMALL = {
    "train --config quickstart": "train --config quickstart --config.pretrain.epochs=2 "
    "--config.train.epochs=3 --config.pretrain.warmup_epochs=1 --config.train.warmup_epochs=1",
    # As few images as the doctor takes; of a network of few epochs it may find something red.
    "jaxrobust doctor runs/quickstart --n 100": "(jaxrobust doctor runs/quickstart --n 32 || "
    "test $? = 1) | grep green",
    "--n 100": "--n 20",
    "--n 50": "--n 10",
    "linf:0:0.4:5 --n 20": "linf:0:0.4:3 --n 8",
    "epochs=8,": "epochs=3,",
    "epochs=10,": "epochs=3,",
}


class NotebooksTest(parameterized.TestCase):
    def test_is_that_of_the_page(self):
        for name in notebooks.PAGES:
            with self.subTest(name=name):
                made = notebooks.notebook(name)
                self.assertEqual((notebooks.FOLDER / name).read_text(), made)
                found = json.loads(made)
                self.assertEqual((found["nbformat"], found["nbformat_minor"]), (4, 5))
                code = ["".join(c["source"]) for c in found["cells"] if c["cell_type"] == "code"]
                page = (DOCS / notebooks.PAGES[name]).read_text()
                self.assertLen(code, 1 + page.count("```{code-cell}"))
                self.assertIn("pip", code[0])
                self.assertTrue(any("jaxrobust train" in text for text in code))
                self.assertLen({cell["id"] for cell in found["cells"]}, len(found["cells"]))
                self.assertNotIn("{code-cell}", made)
                self.assertNotIn(".md)", made.replace(".md`)", ""))

    @parameterized.parameters(*notebooks.PAGES)
    @pytest.mark.slow
    def test_runs(self, name):
        if missing := [name for name in build.NEEDED if find_spec(name) is None]:
            self.skipTest(f"needs {missing[0]}: pip install -e '.[docs,torch]'")
        import nbclient
        import nbformat

        folder = Path(self.create_tempdir())
        with mock.patch.dict(os.environ):
            kernels.prepare(folder)
            found = nbformat.reads(notebooks.notebook(name), as_version=4)
            for cell in found.cells:
                for text, small in SMALL.items():
                    cell.source = cell.source.replace(text, small)
            nbclient.NotebookClient(found, timeout=900).execute()
        said = json.dumps(found)
        self.assertIn("records: runs/", said)
        self.assertGreater(said.count("image/png") + said.count("(1400, 8, 8, 1)"), 0)


class WordsTest(absltest.TestCase):
    def test_what_is_missing_is_named(self):
        told = io.StringIO()
        there = mock.patch.object(build, "find_spec", lambda name: None if name == "furo" else 1)
        with there, contextlib.redirect_stderr(told):
            self.assertEqual(build.main([]), 2)
        self.assertEqual(told.getvalue(), "build: furo is missing; pip install -e '.[docs]'\n")
