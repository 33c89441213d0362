// Page one: what to believe, before what was found.

function overview() {
  const screen = el("div.overview", null, headline(), honestyBox());
  screen.append(...[routingBars(), expertMap(), randomWeights(), strongest(), keepOnly(), missing(), provenance()].filter(Boolean));
  return screen;
}

function headline() {
  const { layers } = meta(), documents = table("documents");
  const counts = [...new Set(layers.map((layer) => layer.experts))];
  const read = documents ? `${num(documents.domain.length)} documents of ${new Set(documents.domain).size} domains` : "";
  const tokens = documents?.tokens ? `, ${num(documents.tokens.reduce((a, b) => a + b, 0))} tokens` : "";
  return el("div.headline", null,
    el("h1", null, el("bdi", null, modelName())),
    el("p", null, layers.length ? `${layers.length} layers of ${counts.join(" or ")} experts${read ? "; read on " + read + tokens : ""}.` : ["Two models compared token by token: ", el("a", { href: "#hunt" }, "Diff hunt"), "."]));
}

function modelName() {
  const { model } = meta();
  return String(model?.name ?? model ?? "model").split("/").at(-1);
}

// What page one opens with; the record's other figures are folded below.
const PRINCIPAL = ["ce_increase", "bigram_skill", "kl", "kl_p99", "rank_over_10_share_of_kl", "induction_moefied", "share_token", "share_domain",
  "stability", "random_weights", "perfect", "bits_read"];

function honestyBox() {
  const facts = Object.entries(store.index.honesty ?? {});
  if (!facts.length) return null;
  const first = facts.filter(([name]) => PRINCIPAL.includes(name)), rest = facts.filter(([name]) => !PRINCIPAL.includes(name));
  return el("section.panel.honesty", null, el("h2", null, "Before you believe the rest"),
    el("p.how", null, "How good the model is, and how much of what follows chance, tokens or the architecture alone explain. Brackets are 95 % intervals over documents where nothing else is said."),
    el("div.facts", null, (first.length ? first : rest).map(([name, given]) => fact(name, given))),
    first.length && rest.length ? folded(`${rest.length} more figures`, () => grid([th("value"), "what it is"], rest.map(([name, given]) =>
      el("tr", { "data-fact": name }, el("td", null, withInterval(factRow(given), "value")),
        el("td.text", null, given.what ?? words(name), given.verdict ? el("span.muted", null, ` – ${given.verdict}`) : null))), { class: "figures" })) : null);
}

function fact(name, given) {
  const row = given && typeof given === "object" ? given : { value: given };
  const plain = row.value === null || typeof row.value !== "object";
  return el("div.fact", { "data-fact": name },
    el("div.value", null, plain ? num(row.value) : Object.entries(row.value).map(([key, one]) => `${words(key)} ${num(one)}`).join(", "),
      typeof row.low === "number" ? el("span.range", null, ` [${num(row.low)}, ${num(row.high)}]`) : null),
    el("div.what", null, row.what ?? words(name)),
    row.verdict ? el("div.verdict", null, String(row.verdict)) : null);
}

// In the order in which they are added: each is what it tells beyond those before it.
const SHARES = [["share_token", "token", "the token"], ["share_domain", "domain", "the domain, beyond the token"],
  ["share_previous", "previous", "the token before, beyond both"], ["share_position", "position", "the position, beyond all"]];

function routingBars() {
  const layers = table("layers");
  if (!layers?.share_token) return null;
  const bars = rows(layers).map((row) => el("div.row", null,
    el("a", { href: `#L${row.layer}` }, `L${row.layer}`), stacked(shareParts(row)),
    el("span.n", null, percent(row.share_token))));
  return panel("What explains routing",
    "A bar is the entropy of a layer's routing, a coloured part the share that this cause predicts on documents it was not fitted on (a lower bound, at right the token's). The pale rest holds chance and longer context: it is not meaning. Only what stands beside the token can be about more than words.",
    legend([...SHARES.filter(([key]) => layers[key]).map(([, kind, title]) => [kind, title]), ["rest", "none of these"]]),
    el("div.bars", null, bars));
}

function shareParts(row) {
  const parts = SHARES.filter(([key]) => typeof row[key] === "number").map(([key, kind, title]) =>
    ({ kind, value: row[key], tip: `${title}: ${percent(row[key])} ${between(row, key, percent)}` }));
  const rest = 1 - parts.reduce((sum, part) => sum + Math.max(0, part.value), 0);
  return [...parts, { kind: "rest", value: rest, tip: `none of these: ${percent(rest)}` }];
}

function expertMap() {
  const experts = table("experts");
  const names = figuresOf(experts).filter((name) => experts[name].some((value) => typeof value === "number"));
  if (!names.length) return null;
  const across = Math.max(...meta().layers.map((layer) => layer.experts)), box = el("div");
  const values = new Map(rows(experts).map((row) => [expertName(row.layer, row.expert), row]));
  const draw = (name) => {
    const own = experts[name].filter((value) => typeof value === "number");
    const most = Math.max(...own.map(Math.abs)) || 1;
    const at = (layer, expert) => values.get(expertName(layer, expert))?.[name];
    box.replaceChildren(
      el("p.how", null, `${meaningOf(name)}: ${num(Math.min(...own))} to ${num(Math.max(...own))}; blue is above zero, orange below.`),
      canvasMap({
        across, down: layerCount(), cell: Math.max(4, Math.min(18, Math.floor(1100 / across))), label: `${titleOf(name)} of every expert`,
        value: (layer, expert) => { const v = at(layer, expert); return typeof v === "number" ? v / most : null; },
        tip: (layer, expert) => `${expertName(layer, expert)} ${labelOf(layer, expert)}\n${titleOf(name)} ${num(at(layer, expert))}`,
        pick: (layer, expert) => { location.hash = expertName(layer, expert); },
      }));
  };
  const first = names.includes("load") ? "load" : names[0];
  const select = el("select", { "aria-label": "figure", onchange: () => draw(select.value) },
    names.map((name) => el("option", { value: name, selected: name === first }, titleOf(name))));
  draw(first);
  return panel("All experts", "A row is a layer, a cell an expert: click one to open it.", select, box);
}

function randomWeights() {
  const given = tableRows("random_weights");
  if (!given.length) return null;
  const figures = new Map();
  for (const row of given) figures.set(row.figure, [...(figures.get(row.figure) ?? []), row]);
  const mean = (list, key) => {
    const known = list.map((row) => row[key]).filter((value) => typeof value === "number");
    return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  };
  const body = [...figures].map(([figure, list]) => {
    const separated = list.filter((row) => row.separates === true).length;
    return el("tr", null, td(titleOf(figure), { class: "text" }), ...["trained", "permuted", "reinitialised"].map((key) => td(num(mean(list, key)))),
      td(trio(mean, list)), td(`${separated} of ${list.length}`, { class: separated ? "n" : "n muted" }));
  });
  return panel("Trained beside random weights",
    "Means over layers of the same figures, from the same pipeline, on MLPs whose weights were permuted or drawn anew. A figure that does not tell trained from random weights is no evidence of what was learned.",
    grid(["figure", "trained", "permuted", "drawn anew", "on one axis", "layers told apart"], body, { class: "figures" }));
}

function trio(mean, list) {
  const values = ["trained", "permuted", "reinitialised"].map((key) => mean(list, key));
  const known = values.filter((value) => value !== null);
  const from = Math.min(0, ...known), to = Math.max(0, ...known) || 1, at = (v) => 5 + ((v - from) / (to - from || 1)) * 102;
  return svg("svg.mark", { viewBox: "0 0 112 14", "aria-hidden": "true" }, svg("line.axis", { x1: 4, x2: 108, y1: 7, y2: 7 }),
    values.map((value, i) => (value === null ? null : svg(i ? "circle.control" : "circle.dot", { cx: at(value), cy: 7, r: 3.2 }))));
}

function strongest() {
  const causal = table("causal");
  if (!causal?.csi) return null;
  const best = new Map();
  causal.csi.forEach((csi, at) => {
    if (typeof csi !== "number" || !isMain(causal.model?.[at], causal.mode?.[at])) return;
    const name = expertName(causal.layer[at], causal.expert[at]);
    if (!best.has(name) || causal.csi[best.get(name)] < csi) best.set(name, at);
  });
  const top = rowsAt(causal, [...best.values()].sort((a, b) => causal.csi[b] - causal.csi[a]).slice(0, 10));
  if (!top.length) return null;
  const axis = axisOf(top, "csi");
  return panel("The ten most selective experts",
    "How much more the loss of one domain rises than that of the others when an expert is replaced by its mean (nats per token). The percentile is among random neuron sets of the same size and energy. Being the largest of many, these values are flattered: q counts all cells.",
    grid(["expert", "domain", "selectivity", "", "null percentile", "q", "documents"], top.map((row) => el("tr", { class: isThin(row) ? "thin" : null },
      el("td", null, expertLink(row.layer, row.expert)), el("td", null, el("bdi", null, row.domain)), el("td", null, intervalMark(row, "csi", axis)),
      el("td", null, withInterval(row, "csi")), td(num(row.percentile)), td(num(row.csi_q ?? row.q)), td(num(row.documents))))));
}

function keepOnly() {
  const given = table("keep_only");
  return given ? generic("Keep only some experts", "Which experts are kept for a domain, and what the loss becomes when all others are replaced by their means.", given) : null;
}

// A table that has no screen of its own: its columns as they are.
// Tables of so few rows are not folded.
const FEW_ROWS = 8;

function generic(title, how, given, most = 200) {
  const names = Object.keys(given).filter((name) => !/_(low|high)$/.test(name) || !(name.replace(/_(low|high)$/, "") in given));
  const all = rows(given);
  const cells = (row) => el("tr", { class: isThin(row) ? "thin" : null }, names.map((name) =>
    (typeof row[name] === "number" ? el("td", null, withInterval(row, name)) : el("td", null, el("bdi", null, num(row[name]))))));
  const shown = () => [grid(names.map(titleOf), all.slice(0, most).map(cells)),
    el("p.how", null, all.length > most ? `The first ${most} rows; inspection.json has all.` : "")];
  return panel(title, how, all.length > FEW_ROWS ? folded(`${num(all.length)} rows`, shown) : shown());
}

function missing() {
  if (!layerCount()) return null;
  const gone = Object.entries(NEEDED).filter(([name]) => !has(name));
  return gone.length ? panel("Not in this report", "Panels that need these are left out.",
    grid(["what", "how to get it"], gone.map(([, [what, how]]) => [what, el("td", null, el("code", null, how))]))) : null;
}

const ASIDE = ["recipe", "settings", "machine", "seconds", "peak_memory"];

function provenance() {
  const { layers, vocabulary, command, corpora, ...rest } = meta();
  const text = typeof command === "string" ? command : (command ?? []).join(" ");
  const copy = el("button", { type: "button", onclick: async () => {
    await navigator.clipboard.writeText(text).catch(() => getSelection().selectAllChildren(copy.previousElementSibling));
    copy.textContent = "copied";
  } }, "copy");
  const list = (names) => el("dl.meta", null, Object.entries(flat(Object.fromEntries(names.map((name) => [name, rest[name]])))).map(([key, value]) =>
    [el("dt", null, key), el("dd", null, el("bdi", null, typeof value === "number" ? String(value) : num(value)))]));
  const aside = ASIDE.filter((name) => name in rest);
  return panel("Where this comes from", "The command that makes this report again, with what, from which bytes.",
    text ? el("div.command", null, el("code", null, text), copy) : null, list(Object.keys(rest).filter((name) => !ASIDE.includes(name))),
    aside.length ? folded("recipe, settings, machine", () => list(aside)) : null);
}

function flat(given, prefix = "") {
  return Object.entries(given).reduce((found, [key, value]) => {
    const name = prefix + words(key);
    if (value && typeof value === "object") return { ...found, ...flat(value, name + " / ") };
    return { ...found, [name]: value };
  }, {});
}
