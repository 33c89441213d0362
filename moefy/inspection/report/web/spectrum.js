// Examples of an expert over its whole range, each panel by the shard that it was chosen from.

const PANELS = {
  top: ["Strongest", "The largest contribution norms, one for each document. The top alone flatters: read on."],
  spectrum: ["By tenths", "Ten bins that hold equally many tokens by norm, from the strongest tenth to the weakest; a few at random from each."],
  random: ["At random", "Tokens that ran it, drawn evenly: what it does as a rule."],
  near: ["At the border", "Pairs from one document: the token that just ran it and the one that just did not. If they look alike, the border is arbitrary here."],
  negative: ["Cancelling", "The most negative shares of the layer's output: here the expert works against the others."],
};
const FEW = 6;

function spectrum(number, expert, layer) {
  const examples = rowsOfExpert(layer, "examples", expert);
  if (!examples.length) return null;
  const largest = layerRows("experts", number).find((row) => row.expert === expert)?.norm_max ?? null;
  const line = (row) => exampleLine(row, largest);
  const box = panel("Examples over the whole range",
    `Colour is the expert's contribution norm at each token, relative to its largest; the chosen token is underlined, hover for values. "Select": documents that examples are chosen from; "held out": others, on which a reading should hold too.`,
    legend([["scale", "norm: none to its largest"]]));
  for (const kind of [...new Set(examples.map((row) => row.panel))]) {
    const [title, how] = PANELS[kind] ?? [words(kind), ""];
    const rows_ = examples.filter((row) => row.panel === kind), shards = [...new Set(rows_.map((row) => row.shard))];
    const part = el("div.spectrum", null, el("h3", null, title), el("p.how", null, how));
    for (const shard of shards) part.append(shardOf(kind, shard, rows_.filter((row) => row.shard === shard), line));
    box.append(part);
  }
  return box;
}

function shardOf(kind, shard, examples, line) {
  const bins = [...new Set(examples.map((row) => row.bin ?? 0))].sort((a, b) => b - a);
  const box = el("div.shard", null, el("div.tag", null, words(shard)));
  if (kind === "spectrum") {
    for (const bin of bins) {
      const own = examples.filter((row) => (row.bin ?? 0) === bin);
      const norms = own.map((row) => row.norm).filter((norm) => typeof norm === "number");
      box.append(folded(`tenth ${bin + 1} of ${Math.max(...bins) + 1}, norms ${num(Math.min(...norms))} to ${num(Math.max(...norms))}`,
        () => own.map(line), bin === bins[0] || bin === bins.at(-1)));
    }
  } else {
    box.append(shortened(examples, FEW, line, "examples"));
  }
  return box;
}

// One example; its text is filled in when the documents are there.
function exampleLine(row, largest) {
  const documents = table("documents"), at = row.document;
  const place = el("div.place", null, el("span.n", null, num(row.norm)),
    row.ran === false ? el("span.off", { "data-tip": "the router did not run it here" }, "off") : null,
    typeof row.share === "number" ? el("span.n.muted", { "data-tip": "share of the layer's output; shares of all experts sum to 100 %" }, percent(row.share)) : null,
    el("bdi.muted", null, documents?.domain?.[documents.document ? documents.document.indexOf(at) : at] ?? ""));
  const holder = el("div.text", null);
  documentOf(at).then((doc) => holder.replaceChildren(contextOf(doc, row.position, shadeOf(row, largest))));
  return el("div.example", null, place, holder);
}

// The window of an example holds a byte for each token around it: 255 is no token, 254 the largest norm.
function shadeOf(row, largest) {
  const first = row.position - (row.window.length >> 1);
  return (position) => {
    const byte = row.window[position - first];
    if (!byte || byte === 255) return null;
    return { share: byte / 254, tip: largest === null ? `${percent(byte / 254)} of its largest norm` : `norm ${num((byte / 254) * largest)}` };
  };
}
