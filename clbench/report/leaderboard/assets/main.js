// Views and routes: #/ overview, #/board/<id>, #/statistics, #/records, #/about.

const main = document.getElementById("main");
const ROUTES = { overview, board: boardRoute, statistics, records, about };

function route() {
  const [, name = "", id = ""] = location.hash.replace(/^#/, "").split("/");
  const view = name in ROUTES ? name : "overview";
  for (const tab of document.querySelectorAll(".tabs a")) {
    if (tab.dataset.view === view) tab.setAttribute("aria-current", "page"); else tab.removeAttribute("aria-current");
  }
  document.getElementById("dialog").close();
  clear(main, ROUTES[view](decodeURIComponent(id)));
  scrollTo(0, 0);
}

// -- overview ---------------------------------------------------------------------------------------------------------
function overview() {
  const made = DATA.made, methods = [...new Set(DATA.boards.flatMap((b) => b.rows.map((r) => r.method)))].sort();
  const finished = DATA.runs.filter((r) => r.state === "done").length;
  const fact = (value, name) => el("div", {}, el("b", {}, String(value)), el("span", {}, name));
  const state = { text: "" }, host = el("div", {});
  const render = () => {
    const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
    const boards = DATA.boards.filter((b) => words.every((w) => `${b.label} ${b.about} ${b.rows.map((r) => r.label).join(" ")}`.toLowerCase().includes(w)));
    clear(host, grid(boards));
  };
  const search = el("input", { type: "search", placeholder: "scenario, method, setting …", "aria-label": "filter scenarios", oninput: () => { state.text = search.value; render(); } });
  render();
  return [
    el("div", { class: "hero" }, el("h1", {}, made.title), el("p", { class: "lead" }, "Continual-learning methods, run in one harness and watched while they train. Every number says where it comes from, and stands only beside numbers it may be compared with."),
      el("div", { class: "facts" }, fact(methods.length, "methods"), fact(new Set(DATA.boards.map((b) => b.scenario)).size, "scenarios"), fact(DATA.boards.length, "tables"), fact(finished, "finished runs"), DATA.left_out.length > 0 && el("a", { href: "#/records" }, el("b", {}, String(DATA.left_out.length)), el("span", {}, "remarks on records")))),
    el("section", { class: "card" }, el("h2", {}, "All tables"), el("div", { class: "controls" }, el("label", { class: "field" }, el("span", {}, "filter"), search)), host,
      el("p", { class: "muted small" }, "The first metric of each table, mean over seeds, best method first; a method with several rows shows its best-founded one (a recipe before values set by hand), never the one with the best number. Underlined: best in its table. Tables do not compare with each other.")),
  ];
}

function standing(board, method) {
  // the row that stands for a method: provenance, then seeds
  const kinds = Object.keys(BADGES), key = board.metrics[0];
  return board.rows.filter((r) => r.method === method && r.stats[key]).sort((a, b) => kinds.indexOf(a.badge) - kinds.indexOf(b.badge) || b.done - a.done)[0];
}

function grid(boards) {
  // methods in order of their mean: a column for each would be wide and nearly empty
  const ranked = (board, metric) => [...new Set(board.rows.map((r) => r.method))].map((m) => [m, metric && standing(board, m)])
    .map(([m, row]) => [m, row ? row.stats[metric.key][0] : null])
    .sort(([, a], [, b]) => (a === null) - (b === null) || (metric && metric.higher ? b - a : a - b));
  return el("div", { class: "scroll" }, el("table", { class: "grid" },
    el("thead", {}, el("tr", {}, ["scenario", "metric", "methods"].map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, boards.map((board) => {
      const metric = METRICS.get(board.metrics[0]), methods = ranked(board, metric), known = methods.filter(([, mean]) => mean !== null);
      const shown = ([m, mean]) => (mean === null ? "…" : known.length > 1 && mean === known[0][1] ? el("u", {}, number(mean, metric)) : el("b", {}, number(mean, metric)));
      return el("tr", {}, el("th", { scope: "row" }, el("a", { href: `#/board/${board.id}` }, board.scenario), board.label !== board.scenario && el("small", {}, board.label.slice(board.scenario.length + 2))),
        el("td", { class: "muted" }, metric ? metric.title : "–"),
        el("td", {}, el("div", { class: "ranked" }, methods.map((one) => el("span", {}, `${one[0]} `, shown(one))))));
    }))));
}

// -- one board --------------------------------------------------------------------------------------------------------
function boardRoute(id) {
  const board = BOARDS.get(id) || DATA.boards[0];
  if (!board) return el("p", { class: "note" }, "There is no table: none of the records could be used. See Records.");
  const links = el("div", { class: "links" }), search = el("input", { type: "search", placeholder: "find a scenario …", "aria-label": "find a scenario", oninput: () => draw() });
  const draw = () => clear(links, DATA.boards.filter((b) => b.label.toLowerCase().includes(search.value.toLowerCase())).map((b) => el("a", { href: `#/board/${b.id}`, "aria-current": b === board ? "page" : null },
    el("span", {}, b.scenario), b.label !== b.scenario && el("small", {}, b.label.slice(b.scenario.length + 2)))));
  draw();
  queueMicrotask(() => { const now = links.querySelector("[aria-current]"); if (now && now.offsetTop > links.clientHeight) links.scrollTop = now.offsetTop - 60; });
  const pick = el("label", { class: "field pick" }, el("span", {}, "scenario"), el("select", { onchange: (e) => { location.hash = `#/board/${e.target.value}`; } }, DATA.boards.map((b) => el("option", { value: b.id, selected: b === board }, b.label))));
  return el("div", { class: "split" }, el("aside", {}, DATA.boards.length > 8 && search, links), el("div", {}, pick, boardView(board)));
}

// -- statistics -------------------------------------------------------------------------------------------------------
function statistics() {
  const possible = DATA.overall.filter((o) => !o.reason), state = { metric: (possible[0] || DATA.overall[0] || {}).metric }, host = el("div", {});
  const render = () => {
    const found = DATA.overall.find((o) => o.metric === state.metric);
    if (!found) { clear(host, el("p", { class: "muted" }, "Nothing has finished yet.")); return; }
    const metric = METRICS.get(found.metric);
    const same = found.reason ? null : found.friedman >= 0.05;
    clear(host, el("div", { class: "controls" }, select("metric", DATA.overall.map((o) => [o.metric, o.title + (o.reason ? " (too few)" : "")]), state.metric, (v) => { state.metric = v; render(); })),
      found.reason ? el("p", { class: "note" }, `No diagram for ${metric ? metric.title : found.metric}: ${found.reason}.`) : [
        rankDiagram(found),
        el("p", {}, `Mean ranks of ${found.methods.length} methods over ${found.num} scenarios by ${metric.title}; 1 is best. Friedman test of "all alike": p = ${probability(found.friedman)}. `
          + (same ? "That is no ground to tell any of them apart, whatever the bars say." : "Methods joined by a bar are not told apart at the 0.05 level (Nemenyi).")),
        el("details", { class: "more" }, el("summary", {}, "Scenarios it is over, and methods left out"), el("ul", {}, found.boards.map((b) => el("li", {}, b))), found.left_out.length > 0 && el("p", {}, `Without a result on one of them: ${found.left_out.join(", ")}.`))]);
  };
  render();
  return [el("h1", {}, "Statistics"), section("Over scenarios: mean ranks and critical difference", host,
    el("p", { class: "muted small" }, "One table per scenario, the one with most methods, since tables of one scenario share their data. A method with several rows is represented by the best-founded one. Paired tests within a scenario stand below its table."))];
}

// -- records ----------------------------------------------------------------------------------------------------------
function records() {
  const state = { text: "", shown: 200 }, host = el("div", {});
  const rows = DATA.boards.flatMap((b) => b.rows.flatMap((r) => r.runs.map((index) => ({ index, run: DATA.runs[index], board: b, row: r }))));
  const render = () => {
    const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter(({ run, board, row }) => words.every((w) => `${run.name} ${run.state} ${board.label} ${row.label}`.toLowerCase().includes(w)));
    clear(host, el("div", { class: "scroll" }, el("table", { class: "plain" }, el("thead", {}, el("tr", {}, ["record", "state", "table", "row", "seed"].map((t) => el("th", { scope: "col" }, t)))),
      el("tbody", {}, found.slice(0, state.shown).map(({ index, run, board, row }) => el("tr", {}, el("td", {}, button(run.name, () => showRun(index), { class: "name" })), el("td", {}, el("span", { class: "badge", "data-kind": run.state, title: run.reason }, run.state)),
        el("td", {}, el("a", { href: `#/board/${board.id}` }, board.label)), el("td", {}, row.label), el("td", { class: "num" }, run.order === run.seed ? String(run.seed) : `${run.order}/${run.seed}`)))))),
      found.length > state.shown && button(`Show more (${found.length - state.shown} left)`, () => { state.shown += 500; render(); }, { class: "chip" }));
  };
  const search = el("input", { type: "search", placeholder: "record, state, method …", "aria-label": "filter records", oninput: () => { state.text = search.value; render(); } });
  render();
  return [el("h1", {}, "Records"),
    section(`Not in the tables, or with a remark (${DATA.left_out.length})`, DATA.left_out.length ? el("ul", { class: "leftout" }, DATA.left_out.map(([name, why]) => el("li", {}, el("code", {}, name), `: ${why}`))) : el("p", { class: "muted" }, "Nothing: every record found is counted.")),
    section(`In the tables (${rows.length})`, el("div", { class: "controls" }, el("label", { class: "field" }, el("span", {}, "filter"), search)), host)];
}

// -- about ------------------------------------------------------------------------------------------------------------
function about() {
  const made = DATA.made;
  return [el("h1", {}, "About this page"),
    section("How it was made", el("p", {}, `By clbench ${made.version} on ${made.date}, from ${made.records} run records. One file: it loads nothing and works offline.`),
      el("p", {}, "The same tables as text: ", el("a", { href: "leaderboard.md" }, "Markdown"), ", ", el("a", { href: "leaderboard.csv" }, "CSV"), ", ", el("a", { href: "runs.csv" }, "CSV of every run"), ", ", el("a", { href: "leaderboard.tex" }, "LaTeX (booktabs)"), ", beside this file. Folders of the machines that runs were on are not shown; the records keep full commands.")),
    section("What may be compared", el("ul", {}, ["A table holds one scenario version with the same parameters, data, setting and answer mask. For the same order seed, fingerprints of the tables of rows must agree; runs where they do not stand in a table of their own.",
      "A row is a method with one set of values: hyperparameters, backbone, views, batch size, epochs, memory. Only its seeds differ.",
      "Metrics of the curve (min-ACC, stability gap, recovery and the like) depend on how often a run was evaluated. Rows on another schedule show them in grey, neither ranked nor tested.",
      "Missing, unfinished and damaged seeds are shown. A contaminated row used a backbone that had been pretrained on the scenario's images."].map((t) => el("li", {}, t)))),
    section("Where hyperparameters come from", el("dl", { class: "wide" }, Object.entries(BADGES).map(([kind, text]) => [el("dt", {}, badge(kind)), el("dd", {}, text)]))),
    section("Metrics", el("p", { class: "muted" }, "R[i, j]: accuracy on group j after task i, on full test sets; A_j(n): accuracy on group j behind update n, on the evaluation subset; e_j: last update of task j."),
      el("dl", { class: "wide" }, DATA.metrics.map((m) => [el("dt", {}, m.title), el("dd", {}, `${m.formula}. `, el("span", { class: "muted" }, `${m.source}; ${m.higher ? "higher" : "lower"} is better`))]))),
    section("Licences", el("p", {}, "Curves are drawn by uPlot 1.6.32, copyright 2022 Leon Sorokin, MIT licence. The rest of the page is part of clbench, Apache 2.0."))];
}

// -- theme and start --------------------------------------------------------------------------------------------------
function setTheme(kind) {
  if (kind === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = kind;
  document.getElementById("theme").textContent = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" }[kind];
  try { localStorage.setItem("clbench-theme", kind); } catch { /* a browser that keeps nothing for local files */ }
  redraw("theme");
}

function start() {
  let kind = "auto";
  try { kind = localStorage.getItem("clbench-theme") || "auto"; } catch { /* as above */ }
  const kinds = ["auto", "light", "dark"];
  setTheme(kinds.includes(kind) ? kind : "auto");
  document.getElementById("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme || "auto";
    setTheme(kinds[(kinds.indexOf(now) + 1) % 3]);
  });
  dark.addEventListener("change", () => redraw("theme"));
  document.title = `${DATA.made.title} · clbench`;
  document.getElementById("dialog").addEventListener("click", (event) => { if (event.target.id === "dialog") event.target.close(); });
  addEventListener("hashchange", route);
  let timer = null, width = innerWidth;
  addEventListener("resize", () => { if (innerWidth === width) return; width = innerWidth; clearTimeout(timer); timer = setTimeout(() => redraw("width"), 150); });
  route();
}

start();
