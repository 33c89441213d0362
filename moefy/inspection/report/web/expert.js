// One expert: what it runs on, what it writes, what goes wrong without it, and how sure that is.

async function expertScreen(number, expert) {
  const layer = await readLayer(number);
  // Contexts fill in as they are drawn; waiting here keeps the page from jumping.
  await readTexts();
  const row = expertsOf(number).find((one) => one.expert === expert);
  const own = (name) => rowsOfExpert(layer, name, expert);
  const side = [figuresPanel(number, expert, row), domainsPanel(own("domains")), causalPanel(number, expert), tokensPanel(own("tokens")), logitsPanel(own("logits"))];
  const wide = [spectrum(number, expert, layer), normsPanel(own("quantiles")), energyPanel(own("energy")), positionsPanel(own("positions")), screenPanel(own("screen")), enrichmentPanel(own("enrichment")), neighboursPanel(number, expert),
    neuronsPanel(number, own("families")), ...otherPanels(layer, expert)];
  return el("div", null, layerStrip(number, expert), expertHead(number, expert, row, own("dead")[0]),
    el("div.columns.expert-page", null, el("div.wide", null, wide.filter(Boolean)), el("div.side", null, side.filter(Boolean))));
}

const KNOWN = ["domains", "tokens", "logits", "examples", "quantiles", "energy", "enrichment", "families", "screen", "dead", "positions"];

function otherPanels(layer, expert) {
  return Object.keys(layer.tables).filter((name) => !KNOWN.includes(name)).map((name) => {
    const rows_ = rowsOfExpert(layer, name, expert);
    return rows_.length ? generic(words(name), "Rows of this expert.", Object.fromEntries(Object.keys(rows_[0]).map((key) => [key, rows_.map((row) => row[key])]))) : null;
  });
}

function expertHead(number, expert, row, dead) {
  const input = el("input.own", { id: "label", value: labelOf(number, expert), placeholder: "your label", "aria-label": "your label", maxlength: 200,
    onchange: () => setLabel(number, expert, input.value) });
  const [before, after] = [neighbourOf(number, expert, -1), neighbourOf(number, expert, 1)];
  const step = (at, sign, title) => el("a.step", { href: `#${expertName(...at)}`, "aria-label": title, "data-tip": title }, sign);
  return el("div.head", null, step(before, "‹", "previous expert (k)"), el("h1", null, expertName(number, expert)), step(after, "›", "next expert (j)"),
    input, badges(row, dead), labelsKept ? null : el("span.muted", null, "labels are not kept here: export them"));
}

function badges(row, dead) {
  const found = [];
  if (dead) found.push(["bad", `never ran in ${num(dead.tokens)} tokens of ${num(dead.documents)} documents`]);
  else if (isThin(row)) found.push(["bad", `only ${num(row.documents)} documents: hardly known`]);
  if (typeof row.stability === "number") {
    const chance = row.stability_chance;
    found.push([row.stability > 0.5 ? "good" : "plain", `stability ${num(row.stability, 2)}${typeof chance === "number" ? `, chance ${num(chance, 2)}` : ""}`]);
  }
  return el("span.badges", null, found.map(([kind, text]) => el("span", { class: "badge " + kind, "data-tip": kind === "bad" ? null : FIGURES.stability[1] }, text)));
}

// The next expert in order of layers, round the end.
function neighbourOf(layer, expert, step) {
  let at = expert + step, number = layer;
  if (at < 0) { number = (number - 1 + layerCount()) % layerCount(); at = expertCount(number) - 1; }
  if (at >= expertCount(number)) { number = (number + 1) % layerCount(); at = 0; }
  return [number, at];
}

function figuresPanel(number, expert, row) {
  const names = figuresOf(Object.fromEntries(Object.entries(row).map(([key, value]) => [key, [value]])));
  if (!names.length) return null;
  const all = expertsOf(number);
  const line = (name) => el("tr", null, el("td", { "data-tip": meaningOf(name) }, titleOf(name)), td(withInterval(row, name)), td(rankOf(all, name, row[name])));
  const first = names.filter((name) => COLUMNS.includes(name) || name in FIGURES), rest = names.filter((name) => !first.includes(name));
  return el("section.panel", null, el("h2", null, "Figures"), el("p.how", null, `Rank: 1 is the largest of the layer's ${all.length}.`),
    grid(["", th("value"), th("rank")], first.map(line), { class: "figures" }),
    rest.length ? folded(`${rest.length} more`, () => grid(["", th("value"), th("rank")], rest.map(line), { class: "figures" })) : null);
}

function rankOf(all, name, value) {
  return typeof value === "number" ? num(1 + all.filter((row) => row[name] > value).length) : "–";
}

function domainsPanel(rows_) {
  if (!rows_.length) return null;
  const axis = axisOf(rows_, "ds_adj"), ordered = [...rows_].sort((a, b) => (b.ds_adj ?? b.ds ?? 0) - (a.ds_adj ?? a.ds ?? 0));
  return panel("Domains",
    "DS: share of the domain's tokens that run it. DS_lex: what a router that sees only tokens would give. DS_adj: their difference, with its interval; only that is about the domain. Grey: under 30 documents.",
    grid(["", th("DS"), th("DS_lex"), th("DS_adj"), "", th("q")], ordered.map((row) => el("tr", { class: isThin(row) ? "thin" : null, "data-tip": `DS ${num(row.ds)} ${between(row, "ds")}\nDS_lex ${num(row.ds_lex)} ${between(row, "ds_lex")}\nDS_adj ${signed(row.ds_adj)} ${between(row, "ds_adj")}\nlift ${signed(row.lift)}\n${documentsOf(row)}, ${num(row.tokens)} tokens` },
      el("td", null, el("bdi", null, row.domain)), td(num(row.ds, 2)), td(num(row.ds_lex, 2)), td(signed(row.ds_adj, 2)), el("td", null, intervalMark(row, "ds_adj", axis)), td(num(row.q_adj ?? row.q, 2))))));
}

function causalPanel(number, expert) {
  const all = layerRows("causal", number).filter((row) => row.expert === expert);
  if (!all.length) return null;
  const kinds = [...new Set(all.map((row) => `${row.model ?? ""} ${row.mode ?? ""}`.trim()))], box = el("div");
  const draw = (kind) => {
    const shown = all.filter((row) => `${row.model ?? ""} ${row.mode ?? ""}`.trim() === kind).sort((a, b) => (b.csi ?? b.ce ?? 0) - (a.csi ?? a.ce ?? 0));
    const axis = axisOf(shown, "ce");
    box.replaceChildren(kinds.length > 1 ? choice(kinds.map((one) => [one, one]), kind, draw) : el("p.tag", null, kind),
      grid(["", th("loss rises by"), "", th("selectivity"), th("pct"), th("q")], shown.map((row) => el("tr", { class: isThin(row) ? "thin" : null,
        "data-tip": `loss ${signed(row.ce)} ${between(row, "ce")} nats per token\nselectivity ${signed(row.csi)} ${between(row, "csi")}\nKL ${num(row.kl)}, p99 ${num(row.kl_p99)}\npercentile ${num(row.percentile)} of random sets, z ${signed(row.z_random)}, q ${num(row.q)}\nq of the selectivity ${num(row.csi_q)}\n${documentsOf(row)}${row.how ? `\n${row.how}` : ""}` },
        el("td", null, el("bdi", null, row.domain)), td(signed(row.ce, 2)), el("td", null, intervalMark(row, "ce", axis)), td(signed(row.csi, 2)), td(num(row.percentile, 2)), td(num(row.csi_q ?? row.q, 2))))));
  };
  draw(kinds[0]);
  return panel("Without this expert",
    "Rise of the loss (nats per token) when it is replaced, with its interval over documents. pct: percentile among random neuron sets of the same size and energy. It is the effect on this model as it is: others may stand in.", box);
}

function tokensPanel(rows_) {
  if (!rows_.length) return null;
  const kinds = [...new Set(rows_.map((row) => row.kind))], box = el("div");
  const list = (some) => longGrid(["token", th("z"), th("lift"), th("recall"), th("n")], some, 8, "tokens", (row) =>
    el("tr", null, el("td", null, token(row.token)), td(signed(row.z, 2)), td(signed(row.lift, 2)), td(percent(row.recall)), td(num(row.count))));
  const draw = (kind) => {
    const own = rows_.filter((row) => row.kind === kind).sort((a, b) => b.z - a.z);
    const above = own.filter((row) => row.z > 0), below = own.filter((row) => row.z <= 0).reverse();
    box.replaceChildren(kinds.length > 1 ? choice(kinds.map((one) => [one, words(one)]), kind, draw) : el("span"),
      list(above), below.length ? folded(`${below.length} that it runs less often on`, () => list(below)) : "");
  };
  draw(kinds[0]);
  return panel("Tokens", "z: weighted log-odds against all routing of the layer. recall: share of the expert's tokens that are this one. lift: log2 over the load.", box);
}

function logitsPanel(rows_) {
  if (!rows_.length) return null;
  const kinds = [...new Set(rows_.map((row) => row.kind))], box = el("div");
  const draw = (kind) => {
    const own = rows_.filter((row) => row.kind === kind).sort((a, b) => b.value - a.value), most = Math.max(...own.map((row) => Math.abs(row.value))) || 1;
    const line = (row) => el("div.effect", null, token(row.token), el("span.bar", { style: { width: `${(Math.abs(row.value) / most) * 45}%`, background: tint(Math.sign(row.value)) } }), el("span.n", null, signed(row.value, 2)));
    const share = own[0]?.share;
    box.replaceChildren(kinds.length > 1 ? choice(kinds.map((one) => [one, words(one)]), kind, draw) : el("span"),
      typeof share === "number" ? el("p.how", null, `This direction holds ${percent(share)} of the variance of what the expert writes.`) : "",
      el("div.two", null, el("div", null, own.filter((row) => row.value > 0).map(line)), el("div", null, own.filter((row) => row.value <= 0).reverse().map(line))));
  };
  draw(kinds[0]);
  return panel("Direct effect on logits",
    "Which next tokens its output raises and lowers through the final norm alone, over what it does on all tokens. In the lower two thirds of the layers most of an effect goes through later layers, which this does not see.", box);
}

// Quantiles as strips: a line from p5 to p95, a bar from p25 to p75, a dot at the median.
function normsPanel(rows_) {
  if (!rows_.length || !("p50" in rows_[0])) return null;
  const most = Math.max(...rows_.map((row) => row.p95 ?? 0)) || 1, width = 220, at = (v) => 3 + (v / most) * (width - 6);
  const strip = (row) => svg("svg.mark.strip", { viewBox: `0 0 ${width} 14`, "aria-hidden": "true" }, svg("line.axis", { x1: 3, x2: width - 3, y1: 7, y2: 7 }),
    svg("line.range", { x1: at(row.p5), x2: at(row.p95), y1: 7, y2: 7 }), svg("line.half", { x1: at(row.p25), x2: at(row.p75), y1: 7, y2: 7 }), svg("circle.dot", { cx: at(row.p50), cy: 7, r: 3 }));
  const line = (row) => el("tr", { class: row.ran ? null : "other", "data-tip": ["p1", "p5", "p25", "p50", "p75", "p95", "p99"].map((name) => `${name} ${num(row[name])}`).join("\n") + `\n${num(row.tokens)} tokens` },
    el("td", null, row.domain === null ? el("strong", null, "all") : el("bdi", null, row.domain)), el("td", null, row.ran ? "ran" : "did not run"), el("td", null, strip(row)), td(num(row.p50)));
  const [whole, parts] = [rows_.filter((row) => row.domain === null), rows_.filter((row) => row.domain !== null && row.ran)];
  return panel("How large its contribution is", `Norms of a sample: dot the median, bar half of the tokens, line nine tenths, up to ${num(most)}. Where the two rows overlap, the router leaves out what would have been as large.`,
    grid(["", "", "norm", th("median")], [...whole, ...parts].map(line)));
}

function energyPanel(rows_) {
  const name = ["energy_later", "energy"].find((one) => rows_[0] && one in rows_[0]);
  if (!name) return null;
  const axis = { ...axisOf(rows_, name), from: 0 };
  return panel("Energy by domain", "Mean squared norm of what it adds, per token, run or not; first tokens left out.", grid(["", th("energy"), ""], [...rows_].sort((a, b) => b[name] - a[name]).map((row) =>
    el("tr", { class: isThin(row) ? "thin" : null }, el("td", null, el("bdi", null, row.domain)), el("td", null, withInterval(row, name)), el("td", null, intervalMark(row, name, axis))))));
}

function positionsPanel(rows_) {
  if (!rows_.length) return null;
  const axis = { ...axisOf(rows_, "load"), from: 0 };
  const range = (row) => (row.position === row.position_last ? num(row.position) : `${num(row.position)} to ${num(row.position_last)}`);
  return panel("Load by position", "Share of the tokens at a position in the document that run it. Position 0 often stands apart.", grid(["position", th("load"), "", th("tokens")], rows_.map((row) =>
    el("tr", { class: isThin(row) ? "thin" : null }, el("td", null, range(row)), td(percent(row.load)), el("td", null, intervalMark(row, "load", axis)), td(num(row.tokens))))));
}

function screenPanel(rows_) {
  if (!rows_.length) return null;
  return panel("A cheap guess, and how good it is", "The screen is one gradient's guess of the loss without this expert. Spearman: how its ranks agree with the true effects of the experts that were measured, domain by domain. It is never the effect itself.",
    folded(`${rows_.length} domains`, () => grid(["", th("screen"), th("true effect"), th("Spearman")], rows_.map((row) => el("tr", null, el("td", null, el("bdi", null, row.domain)),
      td(signed(row.screen)), td(row.measured ? signed(row.ce) : "not measured"), el("td", null, withInterval(row, "spearman")))))));
}

function enrichmentPanel(rows_) {
  const found = rows_.filter((row) => row.q !== null && row.q < 0.05);
  if (!rows_.length) return null;
  return panel("Neurons of a concept",
    "Concepts of which the expert holds more of the best 1 % of neurons than its size gives (hypergeometric, q < .05 over all experts and concepts). Extent 1 is chance.",
    found.length ? grid(["concept", th("extent"), th("q"), "held out"], found.map((row) => el("tr", null, el("td", null, el("bdi", null, row.concept)), td(num(row.extent)), td(num(row.q)),
      el("td", null, typeof row.replicated !== "boolean" ? "not tested" : row.replicated ? "holds" : "does not hold")))) : el("p.none", null, `none of ${rows_.length} concepts`));
}

function neighboursPanel(number, expert) {
  const here = (row, side) => row[`layer_${side}`] === number && row[`expert_${side}`] === expert;
  const found = tableRows("pairs").filter((row) => here(row, "a") || here(row, "b")).sort((a, b) => Math.abs(b.phi) - Math.abs(a.phi));
  const twins = tableRows("duplicates").filter((row) => here(row, "a") || here(row, "b"));
  if (!found.length && !twins.length) return null;
  const other = (row) => (here(row, "a") ? expertLink(row.layer_b, row.expert_b) : expertLink(row.layer_a, row.expert_a));
  return panel("Neighbours", "Experts whose routing goes with its own (phi above zero) or against it (lift: log2), beyond what loads and the number per token give.",
    twins.length ? el("p", null, "Nearly the same routing: ", twins.map((row) => [other(row), " "])) : null,
    longGrid(["", th("phi"), th("lift"), th("z"), th("q")], found, 10, "neighbours", (row) =>
      el("tr", null, el("td", null, other(row)), td(signed(row.phi)), td(signed(row.lift)), td(signed(row.z)), td(num(row.q)))));
}

function neuronsPanel(number, rows_) {
  if (!rows_.length) return null;
  return panel("Member neurons", "Its neurons with the nearest neighbour of each, by the cosine of input and output weights (gauge fixed). The same direction in two experts means that the partition cut a group.",
    longGrid(["neuron", "nearest", th("cosine"), "same expert"], rows_, 8, "neurons", (row) => el("tr", null, td(num(row.neuron)),
      el("td", null, `N${row.neighbour} of `, row.neighbour_expert === undefined ? `L${row.neighbour_layer}` : expertLink(row.neighbour_layer ?? number, row.neighbour_expert)), td(num(row.cosine)), el("td", null, row.same_expert === null ? "–" : row.same_expert ? "yes" : "no"))));
}
