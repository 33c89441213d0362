// One layer: its figures, its experts in a table that sorts, and experts against domains.

const COLUMNS = ["load", "energy_later", "router_recall", "causal_csi", "within_cosine_z"];
const layerView = { sort: "expert", down: false, columns: null, map: "lift" };

async function layerScreen(number) {
  const layer = await readLayer(number);
  const experts = expertsOf(number);
  const figures = layerRows("layers", number)[0] ?? {};
  const screen = el("div", null, layerStrip(number), el("h1", null, `Layer ${number}`),
    el("p.how", null, el("bdi", null, meta().layers[number].name ?? "")), routingOf(figures), expertTable(number, experts));
  const [wide, side] = [[domainMap(number, layer)], [errorOf(layer), pairsOf(number)]].map((parts) => parts.filter(Boolean));
  screen.append(wide.length && side.length ? el("div.columns", null, el("div.wide", null, wide), el("div.side", null, side)) : el("div", null, wide, side));
  const last = layerFigures(figures);
  if (last) screen.append(last);
  return screen;
}

function layerStrip(number, expert = null) {
  return el("nav.strip", { "aria-label": "layers" }, meta().layers.map((_, at) =>
    el("a", { href: `#L${at}`, "aria-current": at === number ? "page" : null, class: at === number && expert !== null ? "within" : null }, `L${at}`)));
}

function routingOf(row) {
  return typeof row.share_token === "number" ? el("div.bars.alone", null, el("div.row", null, el("span", null, "routing"), stacked(shareParts(row)),
    el("span.n", null, `${percent(row.share_token)} token`))) : null;
}

// A row for every expert, also where the inspection has no figures of experts.
function expertsOf(number) {
  const experts = layerRows("experts", number);
  return experts.length ? experts : Array.from({ length: expertCount(number) }, (_, expert) => ({ layer: number, expert }));
}

// The causal matrix as it is shown first: of the dense model, with the ablation that was asked for.
const isMain = (model, mode) => (model ?? "dense") === "dense" && (mode ?? "mean") === (meta().settings?.mode ?? "mean");
const mainCausal = (number) => layerRows("causal", number).filter((row) => isMain(row.model, row.mode));

function expertTable(number, experts) {
  const box = el("section.panel"), all = figuresOf(Object.fromEntries(
    [...new Set(experts.flatMap((row) => Object.keys(row)))].map((name) => [name, experts.map((row) => row[name] ?? null)])));
  const marked = (name) => `${name}_low` in experts[0];
  const numeric = (name) => experts.some((row) => typeof row[name] === "number");
  layerView.columns ??= [...COLUMNS.filter((name) => all.includes(name)), ...all.filter((name) => !COLUMNS.includes(name))].slice(0, 6);
  const draw = () => {
    const shown = all.filter((name) => layerView.columns.includes(name));
    const axes = Object.fromEntries(shown.filter(numeric).map((name) => [name, axisOf(experts, name)]));
    const by = layerView.sort, sign = layerView.down ? -1 : 1;
    const ordered = [...experts].sort((a, b) => sign * order(a[by], b[by]) || a.expert - b.expert);
    const head = ["expert", ...shown].map((name) => el("th", { "aria-sort": name === by ? (layerView.down ? "descending" : "ascending") : null, class: name === "expert" ? null : !numeric(name) ? "n text" : marked(name) ? "n marked" : "n" },
      el("button.sort", { type: "button", "data-tip": name === "expert" ? null : meaningOf(name), onclick: () => {
        layerView.down = name === by ? !layerView.down : name !== "expert";
        layerView.sort = name;
        draw();
      } }, titleOf(name))));
    const line = (row) => el("tr", { class: isThin(row) ? "thin" : null }, el("td", null, expertLink(number, row.expert)),
      shown.map((name) => (typeof row[name] === "number"
        ? el("td.n", { "data-tip": `${titleOf(name)} ${num(row[name])} ${between(row, name)}` }, num(row[name]), marked(name) ? intervalMark(row, name, axes[name]) : null)
        : td(num(row[name]), { class: "n text" }))));
    box.replaceChildren(el("h2", null, "Experts"),
      el("p.how", null, "Click a head to sort. Dots are values, lines 95 % intervals over documents, on an axis that the column shares; the tick is zero. Rows of under 30 documents are grey."),
      chooser(all, draw), grid(head, ordered.map(line), { class: "experts" }));
  };
  draw();
  return box;
}

function order(a, b) {
  const known = (value) => value !== null && value !== undefined;
  if (!known(a) || !known(b)) return known(b) - known(a);
  return typeof a === "number" ? a - b : String(a).localeCompare(String(b));
}

function chooser(all, draw) {
  return el("details.chooser", null, el("summary", null, "columns"), el("div", null, all.map((name) =>
    el("label", { "data-tip": meaningOf(name) }, el("input", { type: "checkbox", checked: layerView.columns.includes(name), onchange: (event) => {
      layerView.columns = event.target.checked ? [...layerView.columns, name] : layerView.columns.filter((one) => one !== name);
      const open = event.target.closest("section");
      draw();
      open.querySelector("details").open = true;
    } }), titleOf(name)))));
}

const MAPS = { lift: ["domain lift", "log2 of how much more often the expert runs in the domain than overall"],
  ds_adj: ["domain beyond tokens", "DS_adj: how much more often it runs than its tokens alone explain"],
  csi: ["causal selectivity", "how much more the domain's loss rises than the others' without the expert, nats per token"] };

function domainMap(number, layer) {
  const sources = { lift: rows(layer.tables.domains), ds_adj: rows(layer.tables.domains), csi: mainCausal(number) };
  const kinds = Object.keys(MAPS).filter((kind) => sources[kind].some((row) => typeof row[kind] === "number"));
  if (!kinds.length) return null;
  const box = el("div");
  const draw = (kind) => {
    const cells = sources[kind], domains = [...new Set(cells.map((row) => row.domain))].sort();
    const at = new Map(cells.map((row) => [`${row.expert} ${row.domain}`, row]));
    const most = Math.max(...cells.map((row) => Math.abs(row[kind] ?? 0))) || 1;
    const q = [`${kind}_q`, "q"].find((name) => cells[0] && name in cells[0]);
    const experts = [...new Set(cells.map((row) => row.expert))].sort((a, b) => a - b);
    const cell = (expert) => (domain) => {
      const row = at.get(`${expert} ${domain}`);
      if (!row || typeof row[kind] !== "number") return el("td");
      return el("td", { class: isThin(row) ? "thin" : null, style: { background: tint(row[kind] / most) },
        "data-tip": `${expertName(number, expert)} in ${domain}\n${MAPS[kind][0]} ${signed(row[kind])} ${between(row, kind)}\n${q ? `q ${num(row[q])}, ` : ""}${documentsOf(row)}` },
      q && row[q] !== null && row[q] < 0.05 ? "•" : "");
    };
    box.replaceChildren(choice(kinds.map((one) => [one, MAPS[one][0]]), kind, draw),
      el("p.how", null, `${MAPS[kind][1]}. Blue above zero, orange below, full colour at ${num(most)}. A dot: q < .05 over the whole table. Faded: under 30 documents.`),
      grid(["", ...domains.map((domain) => el("th.turned", null, el("bdi", null, domain)))],
        experts.map((expert) => el("tr", null, el("td", null, el("a.expert", { href: `#${expertName(number, expert)}` }, `E${expert}`)), domains.map(cell(expert)))), { class: "matrix" }));
  };
  draw(kinds.includes(layerView.map) ? layerView.map : kinds[0]);
  return panel("Experts against domains", null, box);
}

function pairsOf(number) {
  const given = tableRows("pairs").filter((row) => row.layer_a === number && row.layer_b === number);
  if (!given.length) return null;
  return panel("Experts that run together",
    "phi is the correlation of two experts' routing over tokens; z compares it with routing of the same loads and the same number per token. It says that they run together, not that they work together.",
    longGrid(["", "", th("phi"), th("lift"), th("z"), th("q")], given, 12, "pairs", (row) => el("tr", null, el("td", null, expertLink(number, row.expert_a)),
      el("td", null, expertLink(number, row.expert_b)), td(signed(row.phi)), td(signed(row.lift)), td(signed(row.z)), td(num(row.q)))));
}

// What the experts that did not run would have added: kept as an expert of its own, numbered -1.
function errorOf(layer) {
  const own = rowsOfExpert(layer, "energy", -1), name = ["energy_later", "energy"].find((one) => own[0] && one in own[0]);
  if (!name) return null;
  const axis = { ...axisOf(own, name), from: 0 };
  return panel("The error by domain", "Energy per token of what the experts that did not run would have added, first tokens left out. Larger is worse; it is not yet the loss.",
    grid(["", th("energy"), ""], [...own].sort((a, b) => b[name] - a[name]).map((row) => el("tr", { class: isThin(row) ? "thin" : null },
      el("td", null, el("bdi", null, row.domain)), el("td", null, withInterval(row, name)), el("td", null, intervalMark(row, name, axis))))));
}

function layerFigures(row) {
  const names = Object.keys(row).filter((name) => name !== "layer" && !(/_(low|high)$/.test(name) && name.replace(/_(low|high)$/, "") in row) && row[name] !== null);
  return names.length ? panel("Figures of the layer", "Brackets are 95 % intervals over documents.",
    el("dl.meta", null, names.map((name) => [el("dt", null, titleOf(name)), el("dd", null, withInterval(row, name))]))) : null;
}
