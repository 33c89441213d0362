// A prompt: what every expert adds to every token, layer by layer, and what was left out.

const promptView = { at: 0, layer: 0 };

function promptScreen() {
  const prompts = store.index.prompts ?? [];
  if (!prompts.length) {
    return panel("Prompt", null, el("p", null, "No prompt was looked at. Make one with:"),
      el("div.command", null, el("code", null, 'moefy inspect MODEL -o FOLDER --prompt "your text"')));
  }
  promptView.at = Math.min(promptView.at, prompts.length - 1);
  const prompt = prompts[promptView.at], box = el("div"), characters = Array.from(prompt.text);
  const piece = (at) => characters.slice(at ? prompt.ends[at - 1] : 0, prompt.ends[at]).join("");
  const draw = () => {
    const layer = prompt.layers.find((one) => one.layer === promptView.layer) ?? prompt.layers[0];
    box.replaceChildren(choice(prompt.layers.map((one) => [one.layer, `L${one.layer}`]), layer.layer, (number) => { promptView.layer = number; draw(); }), promptMap(layer, piece));
  };
  draw();
  return el("div", null, el("h1", null, "Prompt"), el("p", null, el("bdi.context", { dir: "auto" }, visible(prompt.text))),
    prompts.length > 1 ? choice(prompts.map((_, at) => [at, `prompt ${at + 1}`]), promptView.at, (at) => { promptView.at = at; render(); }) : null,
    panel("Experts at every token",
      "A column is a token, a row an expert; a frame marks those that ran. Colour is the share of the layer's dense output: blue adds, orange works against; shares sum to 1 over experts at every token. The row set apart is the error: what is missing because experts did not run. It says what is written here, not what later layers make of it.",
      box),
    logitAccount(prompt, piece));
}

function promptMap({ layer, share, ran, error }, piece) {
  const size = share.length, experts = share[0].length, cell = Math.max(9, Math.min(28, Math.floor(1080 / size)));
  const most = Math.max(...share.flat().map(Math.abs)) || 1;
  const at = (row, column) => (row < experts ? share[column][row] : row === experts ? null : error[column]);
  const map = canvasMap({
    across: size, down: experts + 2, cell, label: `shares of ${experts} experts at ${size} tokens of layer ${layer}`,
    value: (row, column) => { const one = at(row, column); return one === null ? null : one / most; },
    mark: (row, column) => row < experts && ran[column][row],
    tip: (row, column) => `${JSON.stringify(piece(column))}\n` + (row < experts
      ? `${expertName(layer, row)} ${percent(share[column][row])}, ${ran[column][row] ? "ran" : "did not run"}` : `error ${percent(error[column])}`),
    pick: (row) => { if (row < experts) go(expertName(layer, row)); },
  });
  map.prepend(el("div.tokens", null, share.map((_, column) => el("span", { style: { width: `${cell}px` } }, el("bdi.piece", null, visible(piece(column)) || "∅")))));
  const off = Math.max(...share.map((one) => Math.abs(one.reduce((a, b) => a + b, 0) - 1)));
  return el("div", null, map, el("p.how", null, `Full colour: ${percent(most)}. Rows E0 to E${experts - 1} from above, then the error, which may lie beyond full colour. Sums are at most ${num(off, 2)} from 1, as rounded here.`));
}

const PARTS = [["embedding", "embedding"], ["attention", "attention"], ["experts", "all experts"], ["bias", "biases"], ["error", "error"], ["constant", "constant"], ["logit", "logit"]];

// Where the logit of the next token comes from; some models' accounts cannot be kept, and say why.
function logitAccount(prompt, piece) {
  if (!prompt.account) return prompt.reason ? panel("Account of the logit", null, el("p.none", null, `Not given: ${prompt.reason}.`)) : null;
  const all = rows(prompt.account), shown = (at) => el("bdi.piece", null, visible(piece(at)) || "∅");
  const line = (row) => el("tr", null, el("td", null, shown(row.position)), el("td", null, row.position + 1 < all.length ? shown(row.position + 1) : token(row.target)),
    PARTS.map(([name]) => td(signed(row[name]))));
  return panel("Account of the logit",
    `Parts of the next token's logit, less the mean over the vocabulary, with the final norm's scale held fixed; at the last token, of the one that the model puts first. They sum to the model's logit: largest gap ${num(prompt.largest_gap, 2)} of the largest logit. Layers' parts are what they write directly.`,
    longGrid(["token", "next", ...PARTS.map(([, title]) => th(title))], all, 40, "tokens", line));
}
