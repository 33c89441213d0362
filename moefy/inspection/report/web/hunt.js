// Where two models differ most: both ends of the change of every token's log-probability.

async function huntScreen() {
  const found = tableRows("hunt");
  if (!found.length) {
    return panel("Diff hunt", null, el("p", null, "No second model was compared. Make one with:"),
      el("div.command", null, el("code", null, "moefy diff BASE OTHER")));
  }
  await readTexts();
  const ends = [["loses", "Worse in the other model"], ["gains", "Better in the other model"]];
  return el("div", null, el("h1", null, "Diff hunt"),
    el("p.how", null, "delta is the log-probability of the true token in the base model minus that in the other (nats), one token for each document. The ends of a distribution show what can go wrong, not how often: see the tables below for that."),
    el("div.two", null, ends.map(([tail, title]) => panel(title, null, shortened(found.filter((row) => row.tail === tail), 12, huntLine, "tokens")))),
    huntMeans("hunt_domains", "domain", "By domain"), huntMeans("hunt_classes", "class", "By class of token"),
    has("saturation") ? generic("Router saturation", "How many of the experts that a token runs in the other model it also runs in the base. chance: k / E. load: the experts of the base dealt to tokens by how often each runs. What is above both is agreement on tokens.", table("saturation")) : null,
    has("hunt_summary") ? generic("All tokens", "concentration: the share of all losses that the worst 1 % of tokens hold. worse share: how many tokens are worse at all.", table("hunt_summary")) : null);
}

function huntMeans(name, key, title) {
  const given = tableRows(name);
  if (!given.length) return null;
  const axis = axisOf(given, "delta");
  return panel(title, "Mean of delta with its interval over documents; share of losses: how much of all that is lost is lost here, beside its share of the tokens.",
    grid(["", th("delta"), "", th("KL"), th("share of losses"), th("of tokens"), th("documents")], [...given].sort((a, b) => b.delta - a.delta).map((row) => el("tr", { class: isThin(row) ? "thin" : null },
      el("td", null, el("bdi", null, row[key])), el("td", null, withInterval(row, "delta", signed)), el("td", null, intervalMark(row, "delta", axis)), td(num(row.kl)),
      td(percent(row.share_of_losses)), td(percent(row.share_of_tokens)), td(num(row.documents))))));
}

// The token that was to be predicted comes after the position.
function huntLine(row) {
  const holder = el("div.text"), next = row.position + 1;
  documentOf(row.document).then((doc) => holder.replaceChildren(contextOf(doc, Math.min(next, (doc?.ends.length ?? 1) - 1),
    (at) => (at === next ? { share: -Math.sign(row.delta) * 0.45, tip: `delta ${signed(row.delta)}\np ${num(row.p_base)} in the base, ${num(row.p_other)} in the other` } : null))));
  return el("div.example", null, el("div.place", null, el("span.n", null, signed(row.delta)), el("span.n.muted", { "data-tip": "probability in the base, in the other" }, `${num(row.p_base, 2)} → ${num(row.p_other, 2)}`),
    el("bdi.muted", null, row.domain ?? "")), holder);
}
