// Per-iteration curves: mean and worst case over tasks, and every task, of any rows; zoom, hover, dips behind switches.

const MEAN = "mean", WORST = "worst";

async function loadCurve(run) {
  // of one run: x by step and by progress through the tasks, channels by name
  const packed = await unpack(`c${run}`);
  if (!packed || packed.ready) return packed;
  const steps = sums(packed.steps), tasks = sums(packed.tasks);
  const progress = steps.map((s, i) => {
    const start = tasks[i] ? packed.ends[tasks[i] - 1] : 0, end = packed.ends[tasks[i]] ?? steps[steps.length - 1];
    return tasks[i] + (end > start ? Math.min((s - start) / (end - start), 1) : 0);
  });
  packed.x = { step: increasing(steps), progress: increasing(progress) };
  packed.switches = { step: packed.ends.slice(0, -1), progress: packed.ends.slice(0, -1).map((_, k) => k + 1) };
  const names = [MEAN, WORST, ...packed.groups.map((_, g) => `g${g}`)];
  packed.channels = new Map(names.map((name, c) => [name, {
    mean: series(packed.mean[c]),
    low: packed.low ? series(packed.low[c]) : null,
    high: packed.high ? series(packed.high[c]) : null,
  }]));
  packed.ready = true;
  return packed;
}

function increasing(values) {
  // two evaluations at one step (end of a task, begin of the next) must not fall on one x
  let last = -Infinity;
  const gap = 1e-6 * Math.max(1, values[values.length - 1] || 1);
  return values.map((v) => (last = v > last ? v : last + gap));
}

function sameGrid(curves, axis) {
  const first = curves[0].x[axis];
  return curves.every((c) => c.x[axis].length === first.length && c.x[axis].every((v, i) => Math.abs(v - first[i]) < 1e-9));
}

function onGrid(grid, x, y) {
  // linear between measured points; null outside of them
  const known = x.map((v, i) => [v, y[i]]).filter(([, v]) => v !== null);
  let at = 0;
  return grid.map((v) => {
    while (at + 1 < known.length && known[at + 1][0] <= v) at++;
    if (!known.length || v < known[0][0] - 1e-9 || v > known[known.length - 1][0] + 1e-9) return null;
    const [x0, y0] = known[at], next = known[at + 1];
    return !next || v <= x0 ? y0 : y0 + ((next[1] - y0) * (v - x0)) / (next[0] - x0);
  });
}

function overSeeds(curves, channel, axis) {
  // mean over seeds, and the band from the lowest to the highest of them
  const longest = curves.reduce((a, b) => (b.x[axis].length > a.x[axis].length ? b : a)), grid = longest.x[axis], exact = sameGrid(curves, axis);
  const of = (curve, part) => {
    const found = curve.channels.get(channel), y = found[part] || found.mean;
    return exact ? y : onGrid(grid, curve.x[axis], y);
  };
  const merge = (part, f) => {
    const all = curves.filter((c) => c.channels.has(channel)).map((c) => of(c, part));
    return grid.map((_, i) => { const v = all.map((y) => y[i]).filter((y) => y !== null); return v.length ? f(v) : null; });
  };
  return {
    x: grid, exact,
    mean: merge("mean", (v) => v.reduce((a, b) => a + b, 0) / v.length),
    low: merge("low", (v) => Math.min(...v)), high: merge("high", (v) => Math.max(...v)),
    band: curves.length > 1 || curves.some((c) => c.low),
  };
}

function curveView(board) {
  const rows = board.rows.map((row, index) => ({ row, index, runs: row.runs.filter((r) => has(`c${r}`)) })).filter((r) => r.runs.length);
  const box = el("div", {});
  if (!rows.length) return el("p", { class: "muted" }, "No curves here: the records of these runs have none (evaluation was off, or only their summaries were given).");
  const state = { rows: new Set(rows.slice(0, 3).map((r) => r.index)), tasks: new Set([MEAN]), axis: "progress", seeds: "mean", zoom: null };
  let turn = 0;
  const render = async () => {
    const mine = ++turn;
    const chosen = rows.filter((r) => state.rows.has(r.index));
    let loaded;
    try {
      loaded = await Promise.all(chosen.map(async (r) => ({ ...r, curves: (await Promise.all(r.runs.map(loadCurve))).filter(Boolean) })));
    } catch (error) { clear(box, el("p", { class: "note" }, String(error.message || error))); return; }
    if (mine !== turn) return; // another choice came meanwhile
    const groups = new Map();
    for (const { curves } of loaded) for (const c of curves) c.groups.forEach((name, g) => groups.has(`g${g}`) || groups.set(`g${g}`, name));
    for (const key of [...state.tasks]) if (key.startsWith("g") && groups.size && !groups.has(key)) state.tasks.delete(key);
    const many = groups.size > 24;
    const byRow = (key) => colour(key);
    clear(box,
      el("div", { class: "controls" },
        chips("methods", rows.map((r) => [r.index, r.row.label]), state.rows, render, { colour: byRow }),
        chips("curves", [[MEAN, "mean over tasks so far", "of all groups evaluated at that point"], [WORST, "worst case so far", "WC-ACC: left tasks count with their lowest accuracy since"],
          ...(many ? [] : [...groups].map(([key, name]) => [key, name]))], state.tasks, render),
        many && select("one group", [["", "choose …"], ...groups], [...state.tasks].find((k) => groups.has(k)) || "", (v) => { for (const k of [...state.tasks]) if (groups.has(k)) state.tasks.delete(k); if (v) state.tasks.add(v); render(); }),
        select("x axis", [["progress", "progress through the tasks"], ["step", "step (updates done)"]], state.axis, (v) => { state.axis = v; state.zoom = null; render(); }),
        select("seeds", [["mean", "mean, band from lowest to highest"], ["each", "each seed"]], state.seeds, (v) => { state.seeds = v; render(); })),
      plotCurves(loaded, groups, state),
      dipTable(loaded, groups));
  };
  render();
  return drawn(box, render, "theme");
}

function linesOf(loaded, groups, state) {
  const lines = [], tasks = [...state.tasks], byTask = loaded.length === 1 && tasks.length > 1;
  for (const { row, index, curves } of loaded) tasks.forEach((task, t) => {
    const name = task === MEAN ? "mean" : task === WORST ? "worst case" : groups.get(task);
    const look = byTask ? { stroke: colour(t), dash: dash(t) } : { stroke: colour(index), dash: DASHES[t % DASHES.length] };
    if (state.seeds === "each") for (const [s, curve] of curves.entries()) {
      const found = curve.channels.get(task);
      if (found) lines.push({ ...look, label: `${row.label}, ${name}, run ${s + 1}`, x: curve.x[state.axis], mean: found.mean, band: false, thin: true, exact: true });
    } else {
      const having = curves.filter((c) => c.channels.has(task));
      if (having.length) lines.push({ ...look, label: tasks.length > 1 || task !== MEAN ? `${row.label}, ${name}` : row.label, ...overSeeds(having, task, state.axis), task, curves: having });
    }
  });
  return lines;
}

function plotCurves(loaded, groups, state) {
  const lines = linesOf(loaded, groups, state);
  if (!lines.length) return el("p", { class: "note" }, "Pick at least one method and one curve.");
  const host = el("div", { class: "plot" }), tip = el("div", { class: "tip", hidden: true }), legend = el("div", { class: "legend" });
  const tables = [], series_ = [{}], bands = [], shownLines = [];
  for (const line of lines) {
    const pct = (y) => y.map((v) => (v === null ? null : v * 100));
    const columns = [line.x, pct(line.mean)], at = series_.length;
    series_.push({ label: line.label, stroke: line.stroke, dash: line.dash, width: line.thin ? 1.25 : 2, spanGaps: true, points: { show: line.x.length < 60, size: 4 } });
    shownLines.push([at, line]);
    if (line.band) {
      columns.push(pct(line.low), pct(line.high));
      for (const label of ["low", "high"]) series_.push({ label, stroke: "transparent", width: 0, spanGaps: true, points: { show: false }, hidden: true });
      bands.push({ series: [at + 2, at + 1], fill: translucent(line.stroke) });
    }
    tables.push(columns);
  }
  const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
  const switches = loaded[0].curves[0].switches[state.axis];
  const progress = state.axis === "progress";
  let plot = null;
  const make = () => {
    if (plot) plot.destroy();
    const width = Math.max(host.clientWidth, 280), ink = css("--muted"), grid = { stroke: css("--line"), width: 1 };
    plot = new uPlot({
      width, height: width < 560 ? 300 : 400, series: series_, bands, legend: { show: false },
      scales: { x: { time: false }, y: { range: (u, low, high) => [Math.max(Math.floor((low - 2) / 5) * 5, 0), Math.min(Math.ceil((high + 2) / 5) * 5, 100)] } },
      axes: [
        { stroke: ink, grid: { show: false }, ticks: grid, label: progress ? "tasks learned" : "step (updates done)", labelSize: 24, size: 40, font: "12px system-ui", labelFont: "12px system-ui",
          ...(progress ? { incrs: (u) => (u.scales.x.max - u.scales.x.min > 1.5 ? [1, 2, 5, 10, 20, 50, 100] : [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]) } : {}),
          values: (u, ticks) => ticks.map((t) => (progress ? (Number.isInteger(t) ? String(t) : t.toFixed(2)) : count(Math.round(t)))) },
        { stroke: ink, grid, ticks: grid, size: 48, font: "12px system-ui", label: "accuracy (%)", labelSize: 22, labelFont: "12px system-ui" },
      ],
      cursor: { drag: { x: true, y: false, setScale: true }, points: { size: 7 } },
      hooks: {
        drawClear: [(u) => {
          const c = u.ctx;
          c.save(); c.strokeStyle = css("--switch"); c.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]); c.lineWidth = devicePixelRatio;
          for (const s of switches) {
            const x = Math.round(u.valToPos(s, "x", true));
            if (x > u.bbox.left && x < u.bbox.left + u.bbox.width) { c.beginPath(); c.moveTo(x, u.bbox.top); c.lineTo(x, u.bbox.top + u.bbox.height); c.stroke(); }
          }
          c.restore();
        }],
        draw: [(u) => drawDips(u, shownLines, state.axis)],
        setScale: [(u, key) => { if (key === "x") state.zoom = [u.scales.x.min, u.scales.x.max]; }],
        setCursor: [(u) => point(u, tip, shownLines, progress)],
      },
    }, data, host);
    if (state.zoom && state.zoom[0] !== null) plot.setScale("x", { min: state.zoom[0], max: state.zoom[1] });
    plot.over.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.shiftKey) return; // a plain wheel scrolls the page
      event.preventDefault();
      zoom(event.deltaY || event.deltaX, plot.posToVal(event.clientX - plot.over.getBoundingClientRect().left, "x"));
    }, { passive: false });
    plot.over.append(tip);
    host.plot = plot;
  };
  const zoom = (direction, middle = null) => {
    const { min, max } = plot.scales.x, factor = direction < 0 ? 0.6 : 1 / 0.6, at = middle ?? (min + max) / 2;
    const xs = data[0];
    plot.setScale("x", { min: Math.max(at - (at - min) * factor, xs[0]), max: Math.min(at + (max - at) * factor, xs[xs.length - 1]) });
  };
  const reset = () => { state.zoom = null; plot.setScale("x", { min: data[0][0], max: data[0][data[0].length - 1] }); };
  for (const [, line] of shownLines) legend.append(el("span", {}, legendMark(line), line.label));
  const thinned = loaded.flatMap((r) => r.curves).filter((c) => c.low), mixed = lines.some((l) => !l.exact);
  const totals = loaded.flatMap((r) => r.curves.flatMap((c) => c.totals)), least = Math.max(Math.min(...totals), 1);
  const figure = el("figure", { class: "curves" },
    el("div", { class: "zoom" }, button("+", () => zoom(-1), { title: "Zoom in" }), button("−", () => zoom(1), { title: "Zoom out" }), button("Reset", reset, { title: "Show all" })),
    host, legend,
    el("figcaption", {}, `Dashed lines: task switches. ▼: the lowest point behind a task's switch. Drag to zoom, double-click for all, shift and wheel to zoom. `
      + `Points rest on ${least}${Math.max(...totals) > least ? " or more" : ""} test rows per group: a sampling error of up to ±${(50 / Math.sqrt(least)).toFixed(1)} points.`
      + (thinned.length ? " Long curves are thinned: the band keeps the lowest and highest value of each column." : "")
      + (mixed ? " Seeds were evaluated at different points and are interpolated for the mean; look at each seed for exact minima." : "")));
  queueMicrotask(make);
  return drawn(figure, make, "width");
}

function legendMark(line) {
  return svg("svg", { width: 26, height: 10, "aria-hidden": "true" }, svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: line.stroke, "stroke-width": 2.5, "stroke-dasharray": line.dash.join(" ") }));
}

function translucent(hex) { return `${hex}2e`; }

function drawDips(u, lines, axis) {
  // a mark at the lowest point behind the switch, for lines of a single task and run or mean
  const c = u.ctx, r = 5 * devicePixelRatio;
  for (const [, line] of lines) {
    if (!line.task || !line.task.startsWith("g")) continue;
    const group = Number(line.task.slice(1)), curve = line.curves[0], dip = curve.dips.find((d) => d[0] === group), own = curve.group_task[group];
    if (!dip || line.curves.length > 1 && !line.exact) continue;
    const start = curve.ends[own], end = curve.ends[own + 1] ?? Infinity, steps = curve.x.step;
    let best = null;
    line.x.forEach((x, i) => { const s = steps[i]; if (s > start && s <= end + 1e-3 && line.mean[i] !== null && (best === null || line.mean[i] < line.mean[best])) best = i; });
    if (best === null) continue;
    const x = u.valToPos(line.x[best], "x", true), y = u.valToPos(line.mean[best] * 100, "y", true);
    if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
    c.save(); c.fillStyle = line.stroke; c.strokeStyle = css("--panel"); c.lineWidth = devicePixelRatio;
    c.beginPath(); c.moveTo(x, y); c.lineTo(x - r, y - 1.7 * r); c.lineTo(x + r, y - 1.7 * r); c.closePath(); c.fill(); c.stroke(); c.restore();
  }
}

function point(u, tip, lines, progress) {
  const { idx, left, top } = u.cursor;
  if (idx === null || idx === undefined || left < 0) { tip.hidden = true; return; }
  const nearest = (y) => { // the closest measured point of that line
    for (let d = 0; d < y.length; d++) { if (y[idx - d] !== null && y[idx - d] !== undefined) return y[idx - d]; if (y[idx + d] !== null && y[idx + d] !== undefined) return y[idx + d]; }
    return null;
  };
  const values = lines.map(([at, line]) => [line, nearest(u.data[at])]).filter(([, v]) => v !== null).sort((a, b) => b[1] - a[1]);
  const x = u.data[0][idx];
  clear(tip, el("b", {}, progress ? `task ${Math.min(Math.floor(x + 1e-9), 1e9)}, ${Math.round((x % 1) * 100)} % of its steps` : `step ${Math.round(x)}`),
    values.slice(0, 10).map(([line, v]) => el("span", {}, el("i", { class: "swatch", style: `background:${line.stroke}` }), `${v.toFixed(1)} `, el("small", {}, line.label))),
    values.length > 10 && el("small", {}, `and ${values.length - 10} more`));
  tip.hidden = false;
  const width = u.over.clientWidth;
  tip.style.left = `${left > width / 2 ? Math.max(left - tip.offsetWidth - 14, 0) : left + 14}px`;
  tip.style.top = `${Math.min(Math.max(top - 20, 0), Math.max(u.over.clientHeight - tip.offsetHeight, 0))}px`;
}

function dipTable(loaded, groups) {
  // dips behind each task's switch: means over the seeds of each row
  const body = [];
  for (const { row, index, curves } of loaded) for (const [key, name] of groups) {
    const g = Number(key.slice(1)), found = curves.flatMap((c) => c.dips.filter((d) => d[0] === g));
    if (!found.length) continue;
    const mean = (f) => found.map(f).reduce((a, b) => a + b, 0) / found.length;
    const back = found.map((d) => d[4]).filter((v) => v !== null);
    body.push(el("tr", {}, el("td", {}, el("i", { class: "swatch", style: `background:${colour(index)}` }), row.label), el("td", {}, name),
      el("td", { class: "num" }, (mean((d) => d[1]) / 100).toFixed(1)), el("td", { class: "num" }, (mean((d) => d[2]) / 100).toFixed(1)),
      el("td", { class: "num" }, (mean((d) => d[1] - d[2]) / 100).toFixed(1)),
      el("td", { class: "num" }, back.length ? `${(back.reduce((a, b) => a + b, 0) / back.length).toFixed(0)}${back.length < found.length ? ` (${found.length - back.length} of ${found.length} never)` : ""}` : "never")));
  }
  if (!body.length) return null;
  return el("details", { class: "more" }, el("summary", {}, "The dip behind each task's switch, in numbers"),
    el("div", { class: "scroll" }, el("table", { class: "plain" }, el("thead", {}, el("tr", {}, ["method", "task", "before (%)", "lowest (%)", "gap", "steps to 95 % of it"].map((t, i) => el("th", { class: i > 1 ? "num" : null }, t)))), el("tbody", {}, body))),
    el("p", { class: "muted" }, "Means over seeds. Before: accuracy at the end of the own task; lowest: within the next task."));
}
