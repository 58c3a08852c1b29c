"""The page in a real browser: nothing stands out of it, its script runs, and its values are read.

Chromium opens the page with a script that presses keys and measures, and gives back what it became.
"""

import functools
import html
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from unittest import mock

import pytest
from absl.testing import parameterized

from jaxrobust.report import gathered, page, watching
from jaxrobust.report.parts import examples
from tests.support import reports

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
_FLAGS += ("--no-first-run", "--disable-component-update", "--disable-sync", "--disable-quic")
# Opens what is folded, presses a key on each figure, points at its middle, and measures what stands
# out or overlaps.
_PROBE = """
<script>
const failed = [];
addEventListener('error', e => failed.push(e.message));
addEventListener('load', () => {
  document.querySelectorAll('details').forEach(d => { d.open = true; });
  const read = {}, pointed = {};
  document.querySelectorAll('figure[id]').forEach(f => {
    const svg = f.querySelector('svg');
    svg.focus();
    svg.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));
    read[f.id] = document.activeElement === svg ? f.querySelector('output').textContent : '';
    f.querySelector('output').textContent = '';
    const box = svg.getBoundingClientRect();
    svg.dispatchEvent(new PointerEvent('pointermove',
      {clientX: box.left + .63 * box.width, clientY: box.top + .39 * box.height}));
    pointed[f.id] = f.querySelector('output').textContent;
  });
  const wide = [...document.querySelectorAll('main *')].filter(e =>
    !e.closest('.wide, pre, svg') && e.getBoundingClientRect().right > innerWidth + 1);
  const clipped = [];
  document.querySelectorAll('svg[role=img]').forEach(svg => {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent,
      t.getBoundingClientRect()]);
    texts.forEach(([text, r], i) => {
      if (r.left < box.left - 1 || r.right > box.right + 1 || r.bottom > box.bottom + 1)
        clipped.push('clipped: ' + text);
      texts.slice(i + 1).forEach(([other, q]) => {
        if (r.left < q.right - 1 && q.left < r.right - 1 && r.top < q.bottom - 3 &&
            q.top < r.bottom - 3) clipped.push(text + ' overlaps ' + other);
      });
    });
  });
  const least = Math.min(...[...document.querySelectorAll('svg[role=img]')].map(svg =>
    11 * svg.getBoundingClientRect().width / 340));
  const filled = Math.min(...[...document.querySelectorAll('figure[id]')].map(f =>
    f.querySelector('svg').getBoundingClientRect().width / (f.clientWidth - 20)));
  const tall = Math.max(...[...document.querySelectorAll('figure[id]')].map(f =>
    f.getBoundingClientRect().bottom - f.lastElementChild.previousElementSibling
      .getBoundingClientRect().bottom));
  const tables = [...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth);
  const shaded = tables.filter(e => getComputedStyle(e).backgroundImage.includes('gradient'));
  const color = getComputedStyle(document.body).backgroundColor;
  const out = document.createElement('pre');
  out.id = 'probe';
  out.textContent = JSON.stringify({failed, read, pointed, clipped, least, color,
    filled, tall, tables: tables.length, shaded: shaded.length,
    wide: wide.map(e => e.tagName + ' ' + e.className), width: innerWidth});
  parent.document.body.append(out);
});
</script>
"""


# Opens what is folded, and lets axe-core look at all of it.
_AXE = """
<script>
addEventListener('load', async () => {
  document.querySelectorAll('details').forEach(d => { d.open = true; });
  const found = await axe.run(document);
  const out = document.createElement('pre');
  out.id = 'probe';
  const told = found.violations.map(v =>
    ({id: v.id, impact: v.impact, help: v.help, nodes: v.nodes.slice(0, 3).map(n => n.html)}));
  out.textContent = JSON.stringify({passes: found.passes.length, violations: told});
  parent.document.body.append(out);
});
</script>
"""
_GRAVE = ("serious", "critical")


@functools.cache
def axe() -> str | None:
    """The text of axe-core, from npm's registry; None: it is not reached."""
    if shutil.which("npm") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        words = ("npm", "install", "--prefix", folder, "--ignore-scripts", "--no-audit", "axe-core")
        try:
            subprocess.run(words, check=True, capture_output=True, timeout=60)
        except (subprocess.SubprocessError, OSError):
            return None
        return (Path(folder) / "node_modules/axe-core/axe.min.js").read_text()


class BrowserTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        if CHROMIUM is None:
            self.skipTest("needs Chromium: apt-get install chromium")
        self.folder = Path(self.create_tempdir().full_path)
        run = reports.run(self.folder / "run", lines=2000)
        (run / "classes.txt").write_text("a very long name of a class indeed\n<b>\nc\nd\n")
        reports.evaluation(run / "evaluation", n=200)
        reports.evaluation(
            run / "evaluation", "a2", n=200, epsilon=4 / 255, weights_sha256="a1" * 16
        )
        reports.evaluation(self.folder / "other", "b1", n=200, seed=3)
        reports.evaluation(self.folder / "many", "c1", n=200, classes=40, dataset="another")
        reports.ledger(run / "evaluation", {i: ("apgd-ce", i % 5) for i in range(20)})
        found = gathered.gather([run, self.folder / "other", self.folder / "many"])
        self.text = page.page(found, pictures=examples.Album().part)
        assert self.text.count("<img ") == 24 and "most frequent of" in self.text

    def browser(self, *flags: str, address: str = "") -> str:
        own = f"--user-data-dir={self.folder / 'browser'}"
        done = subprocess.run(
            [str(CHROMIUM), *_FLAGS, own, *flags, address or f"file://{self.folder / 'page.html'}"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.stdout

    def probed(self, script: str, width: int, dark: bool) -> dict:
        """What a script in the page leaves behind; the window is so wide."""
        inside = html.escape(self.text.replace("</body>", f"{script}</body>"))
        # Chromium's window is at least 500 wide, so the page stands in a frame.
        frame = f'<iframe srcdoc="{inside}" width="{width}" height="900" style="border:0"></iframe>'
        (self.folder / "page.html").write_text(f'<meta charset="utf-8"/>{frame}')
        flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
        shown = self.browser(
            *flags, "--window-size=1600,1000", "--virtual-time-budget=20000", "--dump-dom"
        )
        found = re.search(r'<pre id="probe">(.*?)</pre>', shown, re.DOTALL)
        assert found is not None, shown[-500:]
        return json.loads(html.unescape(found[1]))

    @parameterized.product(width=(360, 1440), dark=(False, True))
    @pytest.mark.slow
    def test_nothing_overlaps_and_values_are_read(self, width, dark):
        said = self.probed(_PROBE, width, dark)
        self.assertEqual(said["width"], width)
        self.assertEqual(said["failed"], [])
        self.assertEqual(said["wide"], [])
        self.assertEqual(said["clipped"], [])
        self.assertGreater(said["least"], 9)  # pixels of the smallest letters
        self.assertGreater(said["filled"], 0.99)  # of the width of a card
        self.assertLess(said["tall"], 14)  # pixels below the last line of a card
        self.assertEqual(said["shaded"], said["tables"])  # what scrolls shows that it does
        self.assertEqual(said["tables"] > 0, width == 360)
        self.assertLen(said["read"], len(reports.read(self.text)[0]))
        self.assertNotIn("", said["read"].values())
        self.assertNotIn("", said["pointed"].values())
        counts = reports.read(self.text)[0]["e0-confusion"]["counts"]
        self.assertEqual(  # at 0.63 of the width and 0.39 of the height
            said["pointed"]["e0-confusion"],
            f"<b> became c: {counts[1][2]} of the {sum(counts[1])} that were fooled",
        )
        self.assertEqual(said["colour"], "rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
        self.assertEqual(said["read"]["t0-1-loss"][:14], "step 1: loss 2")

    @parameterized.product(width=(360, 1440), dark=(False, True))
    @pytest.mark.slow
    def test_axe_finds_no_serious_fault(self, width, dark):
        script = axe()
        if script is None:
            self.skipTest("needs axe-core: npm did not get it from its registry")
        found = self.probed(f"<script>{script}</script>{_AXE}", width, dark)
        self.assertGreater(found["passes"], 15)
        self.assertEqual([one for one in found["violations"] if one["impact"] in _GRAVE], [])

    @pytest.mark.slow
    def test_axe_sees_a_fault(self):
        script = axe()
        if script is None:
            self.skipTest("needs axe-core: npm did not get it from its registry")
        self.text = self.text.replace("<main>", '<main><img src="data:,"/>').replace(
            ' lang="en"', ""
        )
        found = self.probed(f"<script>{script}</script>{_AXE}", 1440, False)
        named = {one["id"] for one in found["violations"] if one["impact"] in _GRAVE}
        self.assertContainsSubset({"image-alt", "html-has-lang"}, named)

    @pytest.mark.slow
    def test_a_page_that_is_open_follows_the_run(self):
        run = self.folder / "run"
        step, real = itertools.count(2001), watching._page

        def grown(*given):
            with (run / "metrics.jsonl").open("a") as lines:
                row = {"phase": "train", "step": next(step), "loss": 0.5}
                lines.write(json.dumps(row) + "\n")
            return real(*given)

        with (
            mock.patch.object(watching, "_page", grown),
            watching.server([run], host="127.0.0.1", port=0, every=1) as server,
        ):
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_address[1]}/"
            shown = self.browser("--virtual-time-budget=6000", "--dump-dom", address=address)
            server.shutdown()
        data, _, _ = reports.read(shown)
        self.assertGreater(data["t0-1-loss"]["series"][0]["x"][-1], 2002)

    @pytest.mark.slow
    def test_it_prints(self):
        (self.folder / "page.html").write_text(self.text)
        self.browser("--no-pdf-header-footer", f"--print-to-pdf={self.folder / 'page.pdf'}")
        self.assertStartsWith((self.folder / "page.pdf").read_bytes()[:5].decode(), "%PDF")
