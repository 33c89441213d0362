// Substrings of contexts, tokens, labels and domains, found in the page itself.

const MOST_FOUND = 60;

async function searchScreen(text) {
  const wanted = text.toLocaleLowerCase(), screen = el("div", null, el("h1", null, "Search"), el("p.how", null, el("bdi", null, `“${text}”`), " in labels, names, tokens and contexts. Upper and lower case are alike."));
  if (!wanted) return screen;
  const name = /^l?(\d+)[.\s]*e?(\d+)$/i.exec(text.trim());
  if (name && Number(name[1]) < layerCount() && Number(name[2]) < expertCount(Number(name[1]))) screen.append(el("p", null, "Go to ", expertLink(Number(name[1]), Number(name[2]))));
  const own = Object.entries(labels).filter(([, label]) => label.toLocaleLowerCase().includes(wanted));
  if (own.length) screen.append(panel(`Labels (${own.length})`, null, own.map(([at]) => el("p", null, expertLink(...at.slice(1).split(".E").map(Number))))));
  const layers = await Promise.all(meta().layers.map((_, number) => readLayer(number)));
  screen.append(tokensFound(wanted, layers), contextsFound(text, await readTexts(), layers));
  return screen;
}

function tokensFound(wanted, layers) {
  const found = new Map();
  layers.forEach(({ tables: { tokens } }, layer) => (tokens?.token ?? []).forEach((id, at) => {
    if (!(tokens.z[at] > 0) || !tokenText(id).toLocaleLowerCase().includes(wanted)) return;
    const name = `${layer} ${tokens.expert[at]}`;
    if (!found.has(name) || found.get(name).z < tokens.z[at]) found.set(name, { layer, expert: tokens.expert[at], id, kind: tokens.kind[at], z: tokens.z[at] });
  }));
  const best = [...found.values()].sort((a, b) => b.z - a.z);
  return panel(`Tokens of experts (${best.length})`, "Experts that run more often on such a token, by z.",
    best.length ? grid(["expert", "token", "kind", th("z")], best.slice(0, MOST_FOUND).map((row) => el("tr", null, el("td", null, expertLink(row.layer, row.expert)), el("td", null, token(row.id)), el("td", null, words(row.kind)), td(signed(row.z)))))
      : el("p.none", null, "none"));
}

function contextsFound(wanted, texts, layers) {
  const shown = new Map();
  layers.forEach(({ tables: { examples } }, layer) => (examples?.document ?? []).forEach((number, at) => {
    if (!shown.has(number)) shown.set(number, []);
    shown.get(number).push({ layer, expert: examples.expert[at], position: examples.position[at] });
  }));
  const lines = [], pattern = new RegExp(wanted.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&"), "iu");
  for (const [number, { text }] of Object.entries(texts)) {
    const found = pattern.exec(text);
    if (found) lines.push({ number: Number(number), text, at: found.index, length: found[0].length });
  }
  const line = ({ number, text, at, length }) => {
    const experts = new Map((shown.get(number) ?? []).map((one) => [expertName(one.layer, one.expert), one]));
    return el("div.found", null, el("div.text", null, el("bdi.context", { dir: "auto" }, at > 60 ? "… " : "", visible(text.slice(Math.max(0, at - 60), at)),
      el("mark", null, visible(text.slice(at, at + length))), visible(text.slice(at + length, at + length + 120)), " …")),
      el("p.how", null, "examples of ", [...experts.values()].slice(0, 12).map((one) => [expertLink(one.layer, one.expert), " "]), experts.size > 12 ? `and ${experts.size - 12} more` : ""));
  };
  return panel(`Contexts (${lines.length})`, "Documents of the examples that hold the text, at its first place, with experts that show them.",
    lines.length ? shortened(lines.slice(0, MOST_FOUND), 10, line, "contexts") : el("p.none", null, "none"));
}
