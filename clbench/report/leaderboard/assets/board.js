// One scenario: its table, and what stands below it.

function boardView(board) {
  const out = el("article", { class: "board" });
  const changed = new Set(board.changed);
  out.append(
    el("h1", {}, board.scenario, board.label !== board.scenario && el("small", {}, board.label.slice(board.scenario.length).replace(/^, /, " "))),
    el("p", { class: "lead" }, board.about + "."),
    el("details", { class: "more" }, el("summary", {}, "What makes rows of this table comparable"),
      el("p", {}, "Same scenario version, parameters, data, setting and answer mask; for the same order seed the same table of rows."),
      pairs([["scenario", board.scenario], ["setting", `${board.setting}-incremental`], ["answers from", board.mask], ["data", board.datasets.join(", ")], ["data fingerprint", board.data_fingerprint],
        ...board.params.map(([k, v]) => [k + (changed.has(k) ? " (changed from the preset)" : ""), v]),
        ...board.fingerprints.map(([seed, print]) => [`table, order seed ${seed}`, print])])),
    ...board.notes.map((text) => el("p", { class: "note" }, text)),
    section("Results", resultTable(board), publishedTable(board)),
    section("Per-iteration curves", curveView(board)),
    section("Accuracy matrix", matrixView(board)),
    section("Accuracy against cost", costView(board)),
    section("Are the differences real?", testView(board)),
    section("Confusion matrix", confusionView(board)));
  return out;
}

function section(title, ...children) { return el("section", { class: "card" }, el("h2", {}, title), ...children); }

function pairs(entries) {
  return el("dl", { class: "pairs" }, entries.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value === "" ? "–" : String(value))]));
}

// -- the ranked table -------------------------------------------------------------------------------------------------
function resultTable(board) {
  const metrics = board.metrics.map((key) => METRICS.get(key)).filter(Boolean);
  if (!metrics.length) return el("p", { class: "muted" }, "No run of this scenario has finished yet.", table(board, [], { sort: null, up: false }, "", new Set()));
  const state = { sort: metrics[0].key, up: !metrics[0].higher, text: "", badges: new Set(), interval: false };
  const host = el("div", {}), kinds = [...new Set(board.rows.map((r) => r.badge))];
  const render = () => clear(host, table(board, metrics, state, render));
  const search = el("input", { type: "search", placeholder: "method, backbone, value …", "aria-label": "filter rows", oninput: () => { state.text = search.value; render(); } });
  render();
  return el("div", {}, el("div", { class: "controls" },
    el("label", { class: "field" }, el("span", {}, "filter"), search),
    kinds.length > 1 && filterChips(kinds, state, render)), host,
    el("p", { class: "muted small" }, `Mean ± standard deviation over seeds; below, the 95 % t interval of the mean. Accuracies in percent. Click a heading to sort, a row for its hyperparameters, a seed for that run's command and environment.`));
}

function filterChips(kinds, state, render) {
  const box = el("div", { class: "chips", role: "group", "aria-label": "hyperparameters" });
  const draw = () => clear(box, kinds.map((kind) => button(kind, () => { if (!state.badges.delete(kind)) state.badges.add(kind); draw(); render(); },
    { class: "chip", "aria-pressed": String(state.badges.has(kind)), title: BADGES[kind], "data-key": kind })));
  draw();
  return el("div", { class: "field" }, el("span", {}, "hyperparameters"), box);
}

function rowText(row) {
  return [row.label, row.backbone, row.badge, row.why, row.contaminated && "contaminated", ...row.hyperparameters.map(([k, v]) => `${k}=${v}`)].join(" ").toLowerCase();
}

function sortValue(row, key) {
  if (key === "label") return row.label.toLowerCase();
  if (key === "badge") return Object.keys(BADGES).indexOf(row.badge);
  if (key === "seeds") return row.done;
  if (key in row.cost) return row.cost[key];
  return row.stats[key] ? row.stats[key][0] : null;
}

function sorted(rows, state) {
  return [...rows].sort((a, b) => {
    const x = sortValue(a, state.sort), y = sortValue(b, state.sort);
    if (x === null || x === undefined || y === null || y === undefined) return (x === null || x === undefined) - (y === null || y === undefined); // what lacks a value stays last
    const order = x < y ? -1 : x > y ? 1 : 0;
    return state.up ? order : -order;
  });
}

function ranksOf(board, metric) {
  // among rows that may be compared; equal means share a rank
  const rows = board.rows.filter((r) => r.stats[metric.key] && r.stats[metric.key][4]);
  const better = (a, b) => (metric.higher ? a > b : a < b);
  return new Map(rows.map((r) => [r, 1 + rows.filter((q) => better(q.stats[metric.key][0], r.stats[metric.key][0])).length]));
}

function table(board, metrics, state, render) {
  const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = sorted(board.rows.filter((r) => (!state.badges.size || state.badges.has(r.badge)) && words.every((w) => rowText(r).includes(w))), state);
  const costs = COSTS.slice(0, 2).filter(([key]) => board.rows.some((r) => key in r.cost));
  const ranking = METRICS.get(metrics.some((m) => m.key === state.sort) ? state.sort : metrics[0] && metrics[0].key), ranks = ranking ? ranksOf(board, ranking) : new Map();
  const best = new Map(metrics.map((m) => [m.key, ranksOf(board, m)]));
  const domain = ranking ? domainOf(board.rows, ranking.key) : null;
  const numeric = (key) => metrics.some((m) => m.key === key) || costs.some(([k]) => k === key) || key === "seeds";
  const head = (key, title, extra = {}) => el("th", { scope: "col", class: numeric(key) ? "num" : null, "aria-sort": state.sort === key ? (state.up ? "ascending" : "descending") : "none", ...extra },
    button([title, el("i", { class: "arrow", "aria-hidden": "true" }, state.sort === key ? (state.up ? "▲" : "▼") : "")], () => {
      const metric = METRICS.get(key);
      if (state.sort === key) state.up = !state.up; else { state.sort = key; state.up = metric ? !metric.higher : key !== "seeds"; }
      render();
    }, { "data-sort": key }));
  const withPublished = board.rows.some((r) => r.published.length);
  const columns = 3 + metrics.length + withPublished + costs.length;
  const body = el("tbody", {});
  for (const row of rows) {
    const open = el("tr", { class: "detail", hidden: true });
    const line = el("tr", { class: "row", "data-label": row.label },
      el("td", { class: "rank" }, ranks.has(row) ? String(ranks.get(row)) : "–"),
      el("th", { scope: "row" }, el("button", { type: "button", class: "name", "aria-expanded": "false", onclick: () => toggle() }, row.method, row.label !== row.method && el("small", {}, row.label.slice(row.method.length + 3))),
        el("div", { class: "marks" }, badge(row.badge), row.contaminated && el("span", { class: "badge", "data-kind": "contaminated", title: row.contaminated }, "contaminated"),
          row.own_file && el("span", { class: "badge", title: "a method file from outside the package" }, "own file"), el("span", { class: "muted" }, row.backbone + (row.pretrained.length ? ", pretrained" : "")))),
      el("td", { class: "seeds" }, seedChips(row)),
      metrics.map((m) => metricCell(row, m, best.get(m.key), ranking && m.key === ranking.key ? domain : null)),
      withPublished && el("td", { class: "theirs" }, publishedCell(row)),
      costs.map(([key, , text]) => el("td", { class: "num cost" }, key in row.cost ? text(row.cost[key]) : "–")));
    const toggle = () => {
      const now = open.hidden;
      open.hidden = !now;
      line.querySelector(".name").setAttribute("aria-expanded", String(now));
      if (now && !open.firstChild) open.append(el("td", { colspan: columns + 1 }, rowDetails(row)));
    };
    line.addEventListener("click", (event) => { if (!event.target.closest("button, a, summary")) toggle(); });
    body.append(line, open);
  }
  if (!rows.length) body.append(el("tr", {}, el("td", { colspan: columns + 1, class: "muted" }, "No row matches the filter.")));
  return el("div", { class: "scroll" }, el("table", { class: "results" },
    el("thead", {}, el("tr", {}, el("th", { class: "rank", scope: "col", title: ranking ? `rank by ${ranking.title}` : null }, "#"), head("label", "method"), head("seeds", "seeds"),
      metrics.map((m) => head(m.key, m.title, { title: `${m.formula} (${m.source}); ${m.higher ? "higher" : "lower"} is better` })),
      withPublished && el("th", { scope: "col" }, "published"), costs.map(([key, title]) => head(key, title)))), body));
}

function seedChips(row) {
  const chips_ = row.runs.slice(0, 6).map((index) => {
    const run = DATA.runs[index];
    return button(run.order === run.seed ? String(run.seed) : `${run.order}/${run.seed}`, () => showRun(index), { class: "seed", "data-state": run.state, title: `${run.state}: command, environment and numbers of this run` });
  });
  if (row.runs.length > 6) chips_.push(el("span", { class: "muted" }, `+${row.runs.length - 6}`));
  return [el("div", { class: "chips" }, chips_), row.pending.length > 0 && el("div", { class: "warn small" }, `${row.pending.length} not finished`), row.missing && el("div", { class: "warn small", title: "seeds that other rows of this table have" }, `missing: ${row.missing}`)];
}

function metricCell(row, metric, ranks, domain) {
  const found = row.stats[metric.key];
  if (!found) return el("td", { class: "num" }, "–");
  const [mean, std, half, runs, comparable] = found;
  const top = comparable && ranks.size > 1 && ranks.get(row) === 1;
  return el("td", { class: `num${top ? " best" : ""}${comparable ? "" : " apart"}`, title: comparable ? `${runs} seeds` : `evaluated on another schedule: ${row.schedule}` },
    el("b", {}, number(mean, metric)), std !== null && el("span", { class: "muted" }, ` ±${number(std, metric)}`),
    half !== null && el("div", { class: "ci" }, `[${number(mean - half, metric)}, ${number(mean + half, metric)}]`),
    domain && whisker(row, metric, domain));
}

function rowDetails(row) {
  const table_ = (title, entries) => el("div", {}, el("h4", {}, title), el("table", { class: "plain" }, el("tbody", {}, entries.map(([name, value, source]) =>
    el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, el("code", {}, value === "" ? "–" : value)), el("td", { class: "muted" }, source))))));
  return el("div", { class: "details" },
    el("p", {}, badge(row.badge), " ", row.why), row.remarks.map((text) => el("p", { class: "note" }, text)),
    el("div", { class: "two" }, table_("Hyperparameters, and where each value comes from", row.hyperparameters), table_("Options", [...row.options, ["evaluated", row.schedule, ""]])),
    el("h4", {}, "Cost, mean over seeds"), pairs(COSTS.filter(([key]) => key in row.cost).map(([key, title, text]) => [title, text(row.cost[key])])),
    row.published.length > 0 && [el("h4", {}, "Published"), publishedRows(row.published)],
    el("h4", {}, "Runs"), el("div", { class: "chips" }, row.runs.map((index) => button(`seed ${DATA.runs[index].seed}${DATA.runs[index].order === DATA.runs[index].seed ? "" : `, order ${DATA.runs[index].order}`}`, () => showRun(index), { class: "chip", "data-state": DATA.runs[index].state }))));
}

// -- published --------------------------------------------------------------------------------------------------------
function publishedCell(row) {
  if (!row.published.length) return "–";
  const first = row.published[0], metric = METRICS.get(first.metric);
  return [el("b", {}, metric ? number(first.value, metric) : (first.value * 100).toFixed(1)), first.spread !== null && el("span", { class: "muted" }, ` ±${metric ? number(first.spread, metric) : (first.spread * 100).toFixed(1)}`),
    el("div", { class: "small" }, el("span", { class: "badge", "data-kind": first.status, title: first.source }, first.status)),
    el("div", { class: "small muted", title: first.differs.join("; ") }, first.differs.length ? "other setting" : metric ? metric.title : first.metric)];
}

function publishedRows(entries) {
  return el("div", { class: "scroll" }, el("table", { class: "plain" }, el("thead", {}, el("tr", {}, ["method", "metric", "value", "runs", "status", "setting", "differs from ours", "source"].map((t) => el("th", {}, t)))),
    el("tbody", {}, entries.map((p) => {
      const metric = METRICS.get(p.metric) || { unit: "fraction", title: p.metric };
      return el("tr", {}, el("td", {}, p.method), el("td", {}, metric.title), el("td", { class: "num" }, number(p.value, metric) + (p.spread === null ? "" : ` ± ${number(p.spread, metric)}`)), el("td", {}, p.runs === null ? "–" : String(p.runs)),
        el("td", {}, el("span", { class: "badge", "data-kind": p.status }, p.status)), el("td", {}, p.setting.map(([k, v]) => `${k}=${v}`).join(", ") || "–"), el("td", {}, p.differs.join("; ") || "nothing recorded"), el("td", { class: "muted" }, p.source + (p.note ? `. ${p.note}` : "")));
    }))));
}

function publishedTable(board) {
  if (!board.published.length) return null;
  return el("details", { class: "more" }, el("summary", {}, `Published for methods without a row here (${board.published.length})`), publishedRows(board.published));
}

// -- one run ----------------------------------------------------------------------------------------------------------
function showRun(index) {
  const run = DATA.runs[index], dialog = document.getElementById("dialog");
  const environment = (i) => pairs(Object.entries(DATA.environments[i]).map(([k, v]) => [k.replaceAll("_", " "), v === true ? "yes" : v === false ? "no" : v]));
  const values = Object.entries(run.metrics || {}).map(([key, value]) => [METRICS.get(key), key, value]).filter(([metric]) => metric);
  clear(dialog,
    el("header", {}, el("h2", { id: "dialog-title" }, run.name), button("Close", () => dialog.close(), { class: "close" })),
    el("p", {}, el("span", { class: "badge", "data-kind": run.state }, run.state), ` order seed ${run.order}, run seed ${run.seed}, on ${run.device}`, run.reason && el("span", { class: "warn" }, ` ${run.reason}`)),
    el("h3", {}, "Ask for the same run"), code(run.again),
    run.starts.length ? run.starts.map(([started, env, command, notes], i) => [el("h3", {}, run.starts.length > 1 ? `Start ${i + 1}, ${started}` : `Run on ${started}`), code(command), notes.map((n) => el("p", { class: "muted" }, n)), environment(env)])
      : [el("h3", {}, "Environment"), el("p", { class: "muted" }, "not recorded: this folder holds the run's spec and summary only")],
    values.length > 0 && [el("h3", {}, "Metrics"), pairs(values.map(([metric, , value]) => [metric.title, `${number(value, metric, 2)} ${unit(metric)}`]))],
    run.times && [el("h3", {}, "Time"), pairs(Object.entries(run.times).map(([k, v]) => [k.replace(/_s$/, ""), seconds(v)]))],
    el("h3", {}, "Fingerprints"), pairs([["table of rows", run.fingerprint], ["weights", run.weights || "–"]]));
  dialog.showModal();
}

function code(text) {
  const copy = button("Copy", async () => { await navigator.clipboard.writeText(text); copy.textContent = "Copied"; }, { class: "copy" });
  return el("div", { class: "code" }, el("pre", {}, el("code", {}, text)), navigator.clipboard ? copy : null);
}

// -- matrix, confusion ------------------------------------------------------------------------------------------------
function runPicker(board, prefix, draw) {
  // a method and a run of it that has such a file; `draw(index, row)` gives what to show
  const rows = board.rows.map((row) => ({ row, runs: row.runs.filter((r) => has(prefix + r)) })).filter((r) => r.runs.length);
  if (!rows.length) return null;
  const state = { row: 0, run: 0 }, host = el("div", {}), controls = el("div", { class: "controls" });
  const render = async () => {
    const { row, runs } = rows[state.row];
    clear(controls, select("method", rows.map((r, i) => [String(i), r.row.label]), String(state.row), (v) => { state.row = Number(v); state.run = 0; render(); }),
      select("seed", runs.map((r, i) => [String(i), `seed ${DATA.runs[r].seed}${DATA.runs[r].order === DATA.runs[r].seed ? "" : `, order ${DATA.runs[r].order}`}`]), String(state.run), (v) => { state.run = Number(v); render(); }));
    const index = runs[state.run];
    try { const found = await unpack(prefix + index); if (rows[state.row].runs[state.run] === index) clear(host, draw(found, row)); } catch (error) { clear(host, el("p", { class: "note" }, String(error.message || error))); }
  };
  render();
  return el("div", {}, controls, host);
}

function matrixView(board) {
  return runPicker(board, "m", (found) => {
    const rows = found.rows.map(series), labels = rows.map((_, i) => `after task ${i}`);
    const before = found.before ? [series(found.before)] : [];
    const all = [...before, ...rows], names = [...before.map(() => "before"), ...labels];
    return heatmap({
      rows: names, columns: found.groups, value: (i, j) => all[i][j], text: (i, j) => (all[i][j] * 100).toFixed(0),
      describe: (i, j) => `${names[i]}, ${found.groups[j]}: ${all[i][j] === null ? "not evaluated" : `${(all[i][j] * 100).toFixed(1)} % of ${found.sizes[j]} test rows`}`,
      rowTitle: "state", columnTitle: "test group",
    });
  }) || el("p", { class: "muted" }, "No accuracy matrix here: the records of these runs have none.");
}

function confusionView(board) {
  return runPicker(board, "k", (found) => {
    const n = found.classes.length, cells = new Map(), rowSums = new Array(n).fill(0);
    sums(found.cells).forEach((cell, i) => { cells.set(cell, found.counts[i]); rowSums[Math.floor(cell / n)] += found.counts[i]; });
    const at = (i, j) => cells.get(i * n + j) || 0, share = (i, j) => (rowSums[i] ? at(i, j) / rowSums[i] : null);
    const labels = found.classes.map((c) => `class ${c}`), short = found.classes.map(String);
    return [heatmap({
      rows: n > 30 ? short : labels, columns: short, value: share, text: (i, j) => (share(i, j) >= 0.005 ? (share(i, j) * 100).toFixed(0) : ""), square: true, bounds: found.bounds,
      describe: (i, j) => `${labels[i]} answered as ${labels[j]}: ${at(i, j)} of ${rowSums[i]} test rows (${rowSums[i] ? ((at(i, j) / rowSums[i]) * 100).toFixed(1) : "0"} %)`,
      rowTitle: "true class", columnTitle: "answer",
    }), el("p", { class: "muted small" }, "After the last task. Rows: the true class, in the order in which classes were learned; columns: the answer. Lines separate tasks: answers that gather in the last block are a bias to what came last.")];
  }) || el("p", { class: "muted" }, "No confusion matrix here: the records of these runs hold no predictions.");
}

// -- cost, tests ------------------------------------------------------------------------------------------------------
function costView(board) {
  const metrics = board.metrics.map((k) => METRICS.get(k)).filter(Boolean), costs = COSTS.filter(([key]) => board.rows.some((r) => key in r.cost));
  if (!metrics.length || !costs.length) return el("p", { class: "muted" }, "No finished run yet.");
  const state = { metric: metrics[0].key, cost: costs[0][0] }, host = el("div", {}), controls = el("div", { class: "controls" });
  const render = () => {
    const metric = METRICS.get(state.metric), [, title, text] = costs.find(([k]) => k === state.cost), factor = scale(metric);
    const points = board.rows.map((row, index) => ({ row, index })).filter(({ row }) => row.stats[state.metric] && row.stats[state.metric][4] && state.cost in row.cost)
      .map(({ row, index }) => ({ x: row.cost[state.cost], y: row.stats[state.metric][0] * factor, half: (row.stats[state.metric][2] || 0) * factor, label: row.label, index }));
    const lacking = board.rows.filter((r) => r.done && !(state.cost in r.cost)).length;
    clear(controls, select("vertical", metrics.map((m) => [m.key, m.title]), state.metric, (v) => { state.metric = v; render(); }), select("horizontal", costs.map(([k, t]) => [k, t]), state.cost, (v) => { state.cost = v; render(); }));
    clear(host, points.length ? scatter(points, { xTitle: title, base: text === bytes ? 1024 : 1000, yTitle: `${metric.title} (${unit(metric)})`, xText: text, yText: (v) => v.toFixed(1), higher: metric.higher }) : el("p", { class: "muted" }, "Nothing to compare by this metric."),
      el("p", { class: "muted small" }, "Filled: not beaten in both directions (Pareto front, the line). Bars: 95 % interval. ", state.cost === "memory_bytes" && "Memory is what is kept between tasks besides the network, exemplars counted as stored images. ",
        state.cost === "time_s" && "Time is wall clock without evaluation; it compares only on the same machine (click a seed to see which). ", state.cost === "forward_flops_per_image" && "Of the backbone on one image, 2 per multiply-add. ", lacking > 0 && `${lacking} rows have no such record.`));
  };
  render();
  return el("div", {}, controls, host);
}

function testView(board) {
  const metrics = board.metrics.map((k) => METRICS.get(k)).filter((m) => m && board.tests[m.key] && board.tests[m.key].pairs.length);
  if (!metrics.length) return el("p", { class: "muted" }, "Needs two rows that may be compared.");
  const state = { metric: metrics[0].key }, host = el("div", {}), controls = el("div", { class: "controls" });
  const render = () => {
    const metric = METRICS.get(state.metric), found = board.tests[state.metric];
    clear(controls, select("metric", metrics.map((m) => [m.key, m.title]), state.metric, (v) => { state.metric = v; render(); }));
    const order = [...found.pairs].sort((a, b) => (a[6] ?? a[7] ?? 2) - (b[6] ?? b[7] ?? 2));
    const body = order.map(([first, second, n, difference, half, t, holm, flip]) => {
      const sure = holm !== null && holm < 0.05;
      return el("tr", { class: sure ? "sure" : null }, el("td", {}, board.rows[first].label), el("td", {}, board.rows[second].label), el("td", { class: "num" }, String(n)),
        el("td", { class: "num" }, difference === null ? "–" : [el("b", {}, (difference > 0 ? "+" : "") + number(difference, metric)), half !== null && el("span", { class: "muted" }, ` ±${number(half, metric)}`)]),
        el("td", { class: "num" }, probability(t)), el("td", { class: "num" }, sure ? el("b", {}, probability(holm)) : probability(holm)), el("td", { class: "num" }, probability(flip)));
    });
    clear(host, el("div", { class: "scroll" }, el("table", { class: "plain tests" }, el("thead", {}, el("tr", {}, [["row", ""], ["against", ""], ["pairs", "num"], ["difference", "num"], ["p, paired t", "num"], ["p, Holm", "num"], ["p, sign flip", "num"]].map(([title, kind]) => el("th", { class: kind || null, scope: "col" }, title)))), el("tbody", {}, body))),
      el("p", { class: "muted small" }, `Runs are paired by order seed (class order and stream). Difference: mean with the half width of its 95 % t interval. Holm: corrected for all ${found.pairs.length} pairs here. Sign flip is exact, but with n pairs it cannot fall below 2/2ⁿ: ${[3, 5, 10].map((n) => `${n} seeds ${(2 / 2 ** n).toPrecision(2)}`).join(", ")}. `
        + (found.all > found.rows.length ? `The ${found.rows.length} best of ${found.all} rows are tested.` : "")));
  };
  render();
  return el("div", {}, controls, host);
}
