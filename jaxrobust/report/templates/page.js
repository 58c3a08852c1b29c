(() => {
const format = (v, percent) => v === null || v === undefined ? 'not finite' :
  percent ? +(100 * v).toPrecision(4) + '%' : Math.abs(v) >= 1000 ?
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
