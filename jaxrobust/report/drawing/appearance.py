"""How a page looks and answers: its style sheet and its script, neither of which loads anything."""

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--paper:#fff;--panel:#f6f8fa;
--rule:#d0d7de;--c1:#0b5fa5;--c2:#b3420a;--c3:#1a7340;--c4:#7d3cb5;--c5:#7a5f00;--c6:#4d5560;
--warn:#8a4b00;--warnback:#fff4e0}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#a3adb8;--paper:#0d1117;
--panel:#161b22;--rule:#3a424c;--c1:#6cb6ff;--c2:#ff9a5c;--c3:#5fd38d;--c4:#d2a8ff;--c5:#e3c04a;
--c6:#b0bac5;--warn:#ffc66b;--warnback:#2c2110}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1400px;margin:0 auto;padding:16px;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.4em 0}h2{font-size:1.25rem;margin:1.6em 0 .4em;
border-bottom:1px solid var(--rule)}h3{font-size:1.05rem;margin:1.2em 0 .3em}
.lead{font-size:1.15rem;max-width:60em}p{max-width:60em}
.doubts{background:var(--warnback);border-left:4px solid var(--warn);padding:.5em 1em .5em 2em;
margin:.6em 0;max-width:64em}
.figures{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
.beside2{grid-template-columns:repeat(auto-fill,minmax(min(100%,640px),1fr))}
.beside3{grid-template-columns:repeat(auto-fill,minmax(min(100%,960px),1fr))}
.phases{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
figure{margin:0;padding:10px;background:var(--panel);border:1px solid var(--rule);
border-radius:6px;break-inside:avoid;min-width:0}
figcaption{font-weight:600;font-size:.95rem}
svg{display:block;width:100%;max-width:520px;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.start{text-anchor:start}.middle{text-anchor:middle}.end{text-anchor:end}
.grid{stroke:var(--rule);stroke-width:.6}.zero{stroke:var(--ink);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1;fill:none}
.line{fill:none;stroke-width:1.6;stroke-linejoin:round;stroke:var(--c)}
.dots{stroke-width:5;stroke-linecap:round}.interval{stroke-width:2.4;opacity:.45}
.dashed{stroke-dasharray:5 3}.dots.dashed,.interval.dashed{stroke-dasharray:none}
.dot{fill:var(--c)}.ring{fill:var(--panel);stroke:var(--ink);stroke-width:1.2}
.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}.mark{stroke:var(--warn);stroke-width:1.2;stroke-dasharray:2 2}
.harmless{stroke:var(--soft)}
svg .ink{fill:var(--ink)}.heat{fill:var(--c1)}
.cursor{stroke:var(--ink);stroke-width:1;fill:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:2px 0;padding:0;
font-size:.85rem}.swatch{display:inline-block;width:22px;height:10px;margin-right:5px}
.sign{margin-right:5px;color:var(--c1)}
output{display:block;min-height:1.5em;font-size:.85rem;font-variant-numeric:tabular-nums}
.note{font-size:.85rem;color:var(--soft);margin:2px 0}
.wide{overflow-x:auto;margin:.6em 0}table{border-collapse:collapse;font-size:.92rem}
caption{text-align:left;font-weight:600;padding:2px 0}
th,td{border-bottom:1px solid var(--rule);padding:4px 10px 4px 0;text-align:left;
vertical-align:top;overflow-wrap:normal}.n{font-variant-numeric:tabular-nums;white-space:nowrap}
details{margin:.5em 0}summary{cursor:pointer;font-weight:600}
pre{background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:10px;
white-space:pre-wrap;font:13px/1.45 ui-monospace,monospace;max-height:32em;overflow:auto}
button{font:inherit;padding:2px 10px;margin:4px 0;color:var(--ink);background:var(--panel);
border:1px solid var(--soft);border-radius:6px;cursor:pointer}
:focus-visible{outline:3px solid var(--c1);outline-offset:2px}
a{color:var(--c1)}nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0}
.images{display:grid;gap:12px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,220px),1fr))}.images figure{max-width:300px}
.images img{width:31%;margin-right:2%;image-rendering:pixelated;border:1px solid var(--rule)}
.images img:last-of-type{margin-right:0}
@media print{@page{margin:14mm}:root{--ink:#000;--soft:#333;--paper:#fff;--panel:#fff;
--rule:#bbb;--c1:#0b5fa5;--c2:#b3420a;--c3:#1a7340;--c4:#7d3cb5;--c5:#7a5f00;--c6:#4d5560;
--warn:#8a4b00;--warnback:#fff}main{max-width:none;padding:0}
.figures,.beside2 .phases,.beside3 .phases{grid-template-columns:1fr 1fr}
.beside2,.beside3{grid-template-columns:1fr}output,button,nav{display:none}
pre{max-height:none}.wide{overflow:visible}table{font-size:.75rem}h2,h3{break-after:avoid}}
"""

SCRIPT = """
(() => {
const format = (v, percent) => v === null || v === undefined ? 'not finite' :
  percent ? +(100 * v).toPrecision(4) + ' %' : Math.abs(v) >= 1000 ?
  Math.round(v).toLocaleString('en') : '' + +v.toPrecision(4);
const place = (f, v) => {
  const [low, high, start, end, log] = f;
  const s = log ? Math.log10 : q => q;
  return start + (s(v) - s(low)) / (s(high) - s(low)) * (end - start);
};
const nearest = (all, v) => {
  let best = 0;
  all.forEach((one, i) => { if (Math.abs(one - v) < Math.abs(all[best] - v)) best = i; });
  return best;
};
const lines = d => {
  const all = [...new Set(d.series.flatMap(s => s.x))].sort((a, b) => a - b);
  const texts = all.map(x => {
    const parts = d.series.map(s => {
      const i = s.x.indexOf(x);
      if (i < 0) return null;
      const ends = s.low ? ` (${format(s.low[i], d.percent)} to ${format(s.high[i], d.percent)})`
        : '';
      return `${s.name} ${format(s.y[i], d.percent)}${ends}`;
    }).filter(t => t !== null);
    return `${d.x} ${format(x)}: ${parts.join(', ')}`;
  });
  d.marks.forEach(([at, text]) => {
    if (all.length) texts[nearest(all, at)] += `. At ${format(at)}: ${text}`;
  });
  const xs = all.map(x => place(d.frame.x, x));
  return {texts, at: p => nearest(xs, p.x),
    path: i => `M${xs[i]} ${d.frame.top}V${d.frame.bottom}`};
};
const rows = d => {
  const ys = d.rows.map((r, i) => d.frame.top + d.frame.row * (i + .5));
  const texts = d.rows.map(r => {
    const ends = r.low === null ? '' :
      ` (${format(r.low, d.percent)} to ${format(r.high, d.percent)})`;
    const other = r.second === null ? '' : `, ${d.names[1]} ${format(r.second, d.percent)}`;
    return `${r.name}: ${d.names[0]} ${format(r.value, d.percent)}${ends}${other}`;
  });
  return {texts, at: p => nearest(ys, p.y), path: i => `M116 ${ys[i] + 8}H332`};
};
const cells = d => {
  const n = d.names.length, {left, top, cell} = d.frame;
  const texts = d.counts.flatMap((row, a) => {
    const all = row.reduce((x, y) => x + y, 0);
    return row.map((count, b) => a === b ? `${d.names[a]}: ${all} were fooled` :
      `${d.names[a]} became ${d.names[b]}: ${count} of the ${all} that were fooled`);
  });
  const inside = v => Math.max(0, Math.min(n - 1, Math.floor(v / cell)));
  return {texts, down: n, at: p => n * inside(p.y - top) + inside(p.x - left),
    path: i => `M${left + cell * (i % n)} ${top + cell * Math.floor(i / n)}` +
      `h${cell}v${cell}h${-cell}z`};
};
const start = figure => {
  const source = document.getElementById('data-' + figure.id);
  const svg = figure.querySelector('svg'), out = figure.querySelector('output');
  if (!source || !svg || !out) return;
  let seen = null, at = -1;
  const all = () => {
    if (!seen) { const d = JSON.parse(source.textContent); seen = {lines, rows, cells}[d.kind](d); }
    return seen;
  };
  const show = i => {
    const s = all();
    if (!s.texts.length) return;
    at = Math.max(0, Math.min(s.texts.length - 1, i));
    out.textContent = s.texts[at];
    svg.querySelector('.cursor').setAttribute('d', s.path(at));
  };
  svg.addEventListener('pointermove', event => {
    const s = all(), m = svg.getScreenCTM();
    if (!m) return;
    const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(m.inverse());
    if (s.texts.length) show(s.at(p));
  });
  svg.addEventListener('keydown', event => {
    const down = all().down || 1;
    const step = {ArrowRight: 1, ArrowDown: down, ArrowLeft: -1, ArrowUp: -down}[event.key];
    if (step) { event.preventDefault(); show(at + step); }
  });
};
const begin = () => {
  document.querySelectorAll('figure[id]').forEach(start);
  document.querySelectorAll('button.copy').forEach(b => b.addEventListener('click', () => {
    const text = b.parentElement.querySelector('pre');
    const done = () => { b.textContent = 'Copied'; };
    const select = () => {
      getSelection().selectAllChildren(text);
      document.execCommand('copy');
      done();
    };
    if (navigator.clipboard) navigator.clipboard.writeText(text.textContent).then(done, select);
    else select();
  }));
};
addEventListener('beforeprint', () =>
  document.querySelectorAll('details:not(.copyonly)').forEach(d => { d.open = true; }));
begin();
const every = +document.documentElement.dataset.refresh;
if (every) setInterval(async () => {
  try {
    const page = new DOMParser().parseFromString(await (await fetch(location.href)).text(),
      'text/html');
    const open = [...document.querySelectorAll('details')].map(d => d.open);
    const main = page.querySelector('main');
    if (!main) return;
    document.querySelector('main').replaceWith(main);
    document.querySelectorAll('details').forEach((d, i) => { if (i in open) d.open = open[i]; });
    begin();
  } catch (error) { document.title = 'no answer: is the server still running?'; }
}, 1000 * every);
})();
"""
