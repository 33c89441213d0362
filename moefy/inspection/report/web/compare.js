// Two inspections of one model side by side; the second is read from a file of this computer.

let second = null;

function compareScreen() {
  const note = el("p.note", { role: "status" });
  const pick = picker("open a second inspection.json", (text) => {
    let given;
    try { given = JSON.parse(text); } catch { given = null; }
    if (given?.kind !== "inspection") {
      note.textContent = "This file is no inspection; give an inspection.json that moefy inspect wrote.";
      return;
    }
    second = given;
    render();
  });
  const screen = el("div", null, el("h1", null, "Compare"), el("p.how", null, "Another inspection of the same model: another partition, router, seed or corpus. The file is read here and goes nowhere."), pick, note);
  if (!second) return screen;
  screen.append(el("p", null, "Beside: ", el("bdi", null, String(second.meta.model?.name ?? second.meta.model ?? "")), ` with ${second.meta.layers.length} layers.`));
  screen.append(...[compareFacts(), compareLayers(), comparePartitions()].filter(Boolean));
  return screen;
}

function compareFacts() {
  const here = store.index.honesty ?? {}, there = second.honesty ?? {};
  const names = Object.keys(here).filter((name) => name in there && typeof here[name]?.value === "number" && typeof there[name]?.value === "number");
  return names.length ? panel("Page one", null, grid(["", th("this"), th("other")], names.map((name) =>
    el("tr", null, el("td.text", null, here[name].what ?? words(name)), el("td", null, withInterval(factRow(here[name]), "value")), el("td", null, withInterval(factRow(there[name]), "value")))))) : null;
}

function compareLayers() {
  const here = table("layers"), there = second.tables.layers;
  const names = figuresOf(here).filter((name) => there?.[name] && here[name].some((value) => typeof value === "number"));
  if (!names.length) return null;
  const box = el("div"), other = rows(there);
  const draw = (name) => {
    const pairs = rows(here).map((row) => [row, other.find((one) => one.layer === row.layer) ?? {}]), axis = axisOf(pairs.flat(), name);
    box.replaceChildren(grid(["layer", "this", "", "other", ""], pairs.map(([row, one]) => el("tr", null, el("td", null, `L${row.layer}`),
      el("td", null, intervalMark(row, name, axis)), el("td", null, withInterval(row, name)), el("td", null, intervalMark(one, name, axis)), el("td", null, withInterval(one, name))))));
  };
  const select = el("select", { "aria-label": "figure", onchange: () => draw(select.value) }, names.map((name) => el("option", { value: name }, titleOf(name))));
  draw(names[0]);
  return panel("Figures of layers", "Both on one axis. Intervals that overlap do not show that there is no difference.", select, box);
}

// Which expert owns each neuron of the dense model, by layer; null where an inspection does not say.
function owners(meta_) {
  return meta_.layers.map((layer) => layer.owner ?? null);
}

function comparePartitions() {
  const here = owners(meta()), there = owners(second.meta);
  const lines = here.map((own, layer) => (own && there[layer] && own.length === there[layer].length ? overlapLine(layer, own, there[layer]) : null)).filter(Boolean);
  return panel("Overlap of partitions", "ARI: agreement of the two partitions beyond chance (1 the same, 0 chance). Best match: the mean over experts of the largest overlap (Jaccard) with any expert of the other.",
    lines.length ? grid(["layer", th("ARI"), th("best match"), "most alike"], lines) : el("p.none", null, "These inspections do not both say which neurons their experts hold, or their layers differ."));
}

function overlapLine(layer, own, other) {
  const counts = new Map(), a = new Map(), b = new Map();
  own.forEach((expert, neuron) => {
    const key = `${expert} ${other[neuron]}`;
    counts.set(key, (counts.get(key) ?? 0) + 1);
    a.set(expert, (a.get(expert) ?? 0) + 1);
    b.set(other[neuron], (b.get(other[neuron]) ?? 0) + 1);
  });
  const pairs = (sizes) => [...sizes.values()].reduce((sum, n) => sum + (n * (n - 1)) / 2, 0);
  // Hubert and Arabie (1985), from the contingency table.
  const all = (own.length * (own.length - 1)) / 2, chance = (pairs(a) * pairs(b)) / all, most = (pairs(a) + pairs(b)) / 2;
  const ari = most === chance ? 1 : (pairs(counts) - chance) / (most - chance);
  const best = new Map();
  for (const [key, n] of counts) {
    const [mine, theirs] = key.split(" ").map(Number), overlap = n / (a.get(mine) + b.get(theirs) - n);
    if (overlap > (best.get(mine)?.overlap ?? 0)) best.set(mine, { mine, theirs, overlap });
  }
  const mean = [...best.values()].reduce((sum, one) => sum + one.overlap, 0) / a.size;
  const top = [...best.values()].sort((x, y) => y.overlap - x.overlap).slice(0, 5);
  return el("tr", null, el("td", null, `L${layer}`), td(num(ari)), td(num(mean)), el("td", null, top.map((one) => [expertLink(layer, one.mine), ` = E${one.theirs} (${num(one.overlap, 2)}) `])));
}
