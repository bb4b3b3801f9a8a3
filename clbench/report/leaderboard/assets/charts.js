// Small drawings: interval in a cell, heat map, scatter with Pareto front, critical-difference diagram.

function whisker(row, metric, domain) {
  // mean and 95 % interval inside a table cell
  const found = row.stats[metric.key];
  if (!found || domain[0] === domain[1]) return null;
  const width = 84, x = (v) => 4 + ((v - domain[0]) / (domain[1] - domain[0])) * (width - 8);
  const clip = (v) => Math.min(Math.max(x(v), 1), width - 1);
  const [mean, , half] = found;
  return svg("svg", { class: "whisker", viewBox: `0 0 ${width} 12`, width, height: 12, "aria-hidden": "true" },
    svg("line", { x1: 0, x2: width, y1: 6, y2: 6, class: "track" }),
    half !== null && svg("line", { x1: clip(mean - half), x2: clip(mean + half), y1: 6, y2: 6, class: "interval" }),
    svg("circle", { cx: x(mean), cy: 6, r: 3 }));
}

function domainOf(rows, key) {
  const means = rows.map((r) => r.stats[key]).filter(Boolean).map((s) => s[0]);
  if (!means.length) return [0, 0];
  const low = Math.min(...means), high = Math.max(...means), margin = (high - low) * 0.12 || 0.01;
  return [low - margin, high + margin];
}

function heatmap({ rows, columns, value, text, describe, rowTitle, columnTitle, bounds = [], square = false, lines = [] }) {
  // rows, columns: labels; value(i, j): share in [0, 1] or null. Hover tells what a cell is.
  const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": `${rowTitle} by ${columnTitle}` });
  const told = el("p", { class: "told" }, "Point at a cell to read it.");
  const box = el("figure", { class: "heat" }, el("div", { class: "scroll" }, canvas), told);
  let geometry = null;
  const draw = () => {
    const left = Math.min(190, 12 + Math.max(...rows.map((r) => r.length)) * 6.6), top = columns.length > 30 ? 24 : 30;
    const room = Math.max((box.parentElement || box).clientWidth - left - 12, 200);
    let size = Math.min(46, Math.floor(room / columns.length));
    if (square) size = Math.min(size, Math.max(Math.floor(560 / rows.length), 3));
    const w = Math.max(size, columns.length > 120 ? 2 : 5), h = square ? w : Math.min(Math.max(w, 18), 30);
    const width = left + w * columns.length + 8, height = top + h * rows.length + 6, ratio = devicePixelRatio || 1;
    canvas.width = width * ratio; canvas.height = height * ratio;
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    const g = canvas.getContext("2d");
    g.scale(ratio, ratio);
    g.font = `11px ${css("--mono-font") || "sans-serif"}`;
    g.textBaseline = "middle";
    geometry = { left, top, w, h };
    for (let i = 0; i < rows.length; i++) for (let j = 0; j < columns.length; j++) {
      const share = value(i, j);
      if (share === null) continue;
      const look = shade(share);
      g.fillStyle = look.fill;
      g.fillRect(left + j * w, top + i * h, w - (w > 8), h - (h > 8));
      if (w >= 27 && text) {
        g.fillStyle = look.ink; g.textAlign = "center";
        g.fillText(text(i, j), left + j * w + w / 2, top + i * h + h / 2);
      }
    }
    g.fillStyle = css("--muted");
    g.textAlign = "right";
    const everyRow = Math.ceil(13 / h), everyColumn = Math.ceil(26 / w);
    rows.forEach((label, i) => { if (i % everyRow === 0) g.fillText(label.slice(0, 26), left - 7, top + i * h + h / 2); });
    g.textAlign = "center";
    const fits = columns.every((label) => label.length * 6.2 <= w * everyColumn);
    columns.forEach((label, j) => { if (j % everyColumn === 0) g.fillText(fits ? label : String(j), left + j * w + w / 2, top - 10); });
    g.strokeStyle = css("--ink"); g.globalAlpha = 0.35;
    for (const at of bounds) {
      g.beginPath();
      g.moveTo(left + at * w, top); g.lineTo(left + at * w, top + rows.length * h);
      g.moveTo(left, top + at * h); g.lineTo(left + columns.length * w, top + at * h);
      g.stroke();
    }
    g.globalAlpha = 0.9; g.lineWidth = 1.5;
    for (const [i, j] of lines) g.strokeRect(left + j * w + 0.5, top + i * h + 0.5, w - 2, h - 2);
  };
  canvas.addEventListener("pointermove", (event) => {
    const at = canvas.getBoundingClientRect(), { left, top, w, h } = geometry;
    const j = Math.floor((event.clientX - at.left - left) / w), i = Math.floor((event.clientY - at.top - top) / h);
    if (i >= 0 && j >= 0 && i < rows.length && j < columns.length) told.textContent = describe(i, j);
  });
  queueMicrotask(draw);
  return drawn(box, draw);
}

function front(points, higher) {
  // indices of points that no other beats in both: lower x, better y
  const better = (a, b) => (higher ? a > b : a < b);
  return points.map((p, i) => i).filter((i) => !points.some((q, j) => j !== i
    && q.x <= points[i].x && !better(points[i].y, q.y) && (q.x < points[i].x || better(q.y, points[i].y))));
}

function ticksOf(low, high, wanted = 5) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const out = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) out.push(Math.abs(t) < step * 1e-9 ? 0 : t);
  return out;
}

function roundTicks(low, high, wanted, base) {
  // round numbers of the unit that they are shown in
  const unit_ = base ** Math.max(Math.floor(Math.log(Math.max(high, 1)) / Math.log(base)), 0);
  return ticksOf(low / unit_, high / unit_, wanted).map((t) => t * unit_);
}

function powers(low, high, wanted, base) {
  // ticks of a logarithmic axis whose ends are given as powers of ten: powers of 10, or of 2 where units are 1024
  const step = base === 1024 ? Math.log10(2) : 1, every = Math.max(Math.ceil((high - low) / step / wanted), 1);
  const out = [];
  for (let k = Math.ceil(low / step / every) * every; k * step <= high; k += every) out.push(10 ** (k * step));
  return out;
}

function scatter(points, { xTitle, base, yTitle, xText, yText, higher }) {
  // points: {x, y, half, label, index}; a Pareto front from the cheapest to the best
  const box = el("figure", { class: "scatter" });
  const draw = () => {
    const width = Math.max(Math.min(box.clientWidth || 640, 900), 300), height = Math.min(420, Math.max(280, width * 0.52));
    const positive = points.map((p) => p.x).filter((x) => x > 0);
    const log = positive.length > 1 && Math.max(...positive) / Math.min(...positive) > 20;
    const least = positive.length ? Math.min(...positive) : 1;
    const tx = (v) => (log ? Math.log10(v > 0 ? v : least / 3) : v);
    const xs = points.map((p) => tx(p.x)), ys = points.flatMap((p) => [p.y - (p.half || 0), p.y + (p.half || 0)]);
    const pad = (a, share) => { const l = Math.min(...a), h = Math.max(...a), m = (h - l) * share || Math.abs(h) * share || 1; return [l - m, h + m]; };
    let [x0, x1] = pad(xs, 0.08), [y0, y1] = pad(ys, 0.1);
    if (!log && x0 < 0) x0 = Math.min(...points.map((p) => p.x)) < 0 ? x0 : -0.03 * x1;
    const L = 52, R = 14, T = 12, B = 44;
    const X = (v) => L + ((tx(v) - x0) / (x1 - x0)) * (width - L - R), Y = (v) => T + ((y1 - v) / (y1 - y0)) * (height - T - B);
    const node = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${yTitle} against ${xTitle}` });
    for (const t of ticksOf(y0, y1)) node.append(
      svg("line", { x1: L, x2: width - R, y1: Y(t), y2: Y(t), class: "grid" }),
      svg("text", { x: L - 8, y: Y(t), class: "tick", "text-anchor": "end", "dominant-baseline": "middle" }, yText(t)));
    const wanted = width < 480 ? 3 : 5;
    let xticks = log ? powers(x0, x1, wanted, base) : roundTicks(x0, x1, wanted, base).filter((t) => t >= 0);
    if (log && xticks.length < 2) xticks = [...new Set([least, Math.max(...positive)])];
    for (const t of xticks) node.append(
      svg("line", { x1: X(t), x2: X(t), y1: T, y2: height - B, class: "grid" }),
      svg("text", { x: X(t), y: height - B + 16, class: "tick", "text-anchor": X(t) > width - 40 ? "end" : "middle" }, xText(t)));
    node.append(svg("text", { x: (L + width - R) / 2, y: height - 6, class: "axis", "text-anchor": "middle" }, xTitle + (log ? " (log scale)" : "")));
    const best = front(points, higher).sort((a, b) => points[a].x - points[b].x);
    node.append(svg("path", { class: "front", d: best.map((i, k) => {
      const p = points[i];
      return k ? `H${X(p.x)}V${Y(p.y)}` : `M${X(p.x)} ${Y(p.y)}`;
    }).join("") }));
    const placed = [];
    const order = [...points.keys()].sort((a, b) => best.includes(b) - best.includes(a));
    for (const i of order) {
      const p = points[i], x = X(p.x), y = Y(p.y), c = colour(p.index), right = x < width - 150;
      const mark = svg("g", { class: "mark" }, svg("title", {}, `${p.label}\n${yTitle}: ${yText(p.y)}\n${xTitle}: ${xText(p.x)}`));
      if (p.half) mark.append(svg("line", { x1: x, x2: x, y1: Y(p.y - p.half), y2: Y(p.y + p.half), stroke: c, "stroke-width": 1.5, opacity: 0.55 }));
      mark.append(svg("circle", { cx: x, cy: y, r: 5.5, fill: best.includes(i) ? c : "var(--panel)", stroke: c, "stroke-width": 2 }));
      const label = p.label.length > 26 ? `${p.label.slice(0, 25)}…` : p.label, spot = { x: right ? x + 10 : x - 10 - label.length * 6.4, y: y - 7, w: label.length * 6.4, h: 14 };
      const free = placed.every((q) => spot.x + spot.w < q.x || q.x + q.w < spot.x || spot.y + spot.h < q.y || q.y + q.h < spot.y);
      if (free) {
        placed.push(spot);
        mark.append(svg("text", { x: right ? x + 10 : x - 10, y: y + 1, class: "name", "text-anchor": right ? "start" : "end", "dominant-baseline": "middle" }, label));
      }
      node.append(mark);
    }
    clear(box, node);
  };
  queueMicrotask(draw);
  return drawn(box, draw);
}

function rankDiagram(found) {
  // Demsar's diagram: methods on a line of mean ranks, best on the left; bars join what is not told apart
  const box = el("figure", { class: "ranks" });
  const draw = () => {
    const k = found.methods.length, width = Math.max(Math.min(box.clientWidth || 720, 860), 320), side = width < 560 ? 92 : 150;
    const half = Math.ceil(k / 2), levels = found.groups.length, top = 46, base = top + 12 + levels * 9;
    const height = base + half * 22 + 14;
    const X = (rank) => side + ((rank - 1) / (k - 1)) * (width - 2 * side);
    const node = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "critical difference diagram" });
    node.append(svg("line", { x1: X(1), x2: X(k), y1: top, y2: top, class: "rule" }));
    for (let r = 1; r <= k; r++) node.append(
      svg("line", { x1: X(r), x2: X(r), y1: top - 5, y2: top, class: "rule" }),
      svg("text", { x: X(r), y: top - 10, class: "tick", "text-anchor": "middle" }, String(r)));
    const span = X(1 + found.critical) - X(1);
    const shown = Math.min(span, width - 2 * side);
    node.append(svg("line", { x1: X(1), x2: X(1) + shown, y1: 12, y2: 12, class: "rule", "stroke-width": 2 }),
      svg("text", { x: X(1) + shown + 8, y: 12, class: "tick", "dominant-baseline": "middle" }, `critical difference ${found.critical.toFixed(2)}`));
    found.groups.forEach(([a, b], level) => node.append(svg("line", {
      x1: X(found.mean_ranks[a]) - 4, x2: X(found.mean_ranks[b]) + 4, y1: top + 10 + level * 9, y2: top + 10 + level * 9, class: "clique" })));
    found.methods.forEach((method, i) => {
      const left = i < half, y = base + 10 + (left ? i : k - 1 - i) * 22, x = X(found.mean_ranks[i]), edge = left ? side - 10 : width - side + 10;
      node.append(svg("path", { d: `M${x} ${top}V${y}H${edge}`, class: "lead" }),
        svg("text", { x: left ? edge - 5 : edge + 5, y, class: "name", "text-anchor": left ? "end" : "start", "dominant-baseline": "middle" },
          `${method} `, svg("tspan", { class: "tick" }, found.mean_ranks[i].toFixed(2))));
    });
    clear(box, node);
  };
  queueMicrotask(draw);
  return drawn(box, draw);
}
