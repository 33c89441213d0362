// Documents in context. Offsets count characters of the original text, never pieces of a vocabulary.

const AROUND = 24;

// Where every token of a document ends, and its characters (a character may take two units here).
async function documentOf(number) {
  const given = (await readTexts())[number];
  if (!given) return null;
  if (!given.ends) {
    let at = 0;
    given.ends = given.lengths.map((length) => (at += length));
    given.characters = Array.from(given.text);
  }
  return given;
}

const tokenSlice = (doc, at) => doc.characters.slice(at ? doc.ends[at - 1] : 0, doc.ends[at]).join("");

// Line ends are shown by a sign, so that a context is one paragraph; all else stands as it is.
const visible = (text) => text.replace(/\r\n|\n|\r/g, "↵");

// A context: `shade(position)` gives {share, tip} or null for the tokens around `position`.
function contextOf(doc, position, shade, around = AROUND) {
  if (!doc) return el("span.none", null, "the text is not in this report");
  const first = Math.max(0, position - around), last = Math.min(doc.ends.length - 1, position + around);
  const line = el("bdi.context", { dir: "auto" });
  if (first > 0) line.append("… ");
  for (let at = first; at <= last; at++) {
    const group = [at];
    // Tokens that end a character share one place: a character that was split shows once.
    while (at < last && doc.ends[at + 1] === doc.ends[at]) group.push(++at);
    const text = visible(tokenSlice(doc, group[0]));
    const shades = group.map((token) => shade(token)).filter(Boolean);
    const focus = group.includes(position);
    if (!shades.length && !focus) { line.append(text); continue; }
    const strongest = shades.reduce((a, b) => (Math.abs(b.share) > Math.abs(a.share) ? b : a), { share: 0, tip: "" });
    line.append(el(focus ? "span.token.focus" : "span.token", {
      style: { background: strongest.share ? tint(strongest.share) : "" },
      class: Math.abs(strongest.share) > 0.6 ? "token strong" + (focus ? " focus" : "") : null,
      "data-tip": shades.map((one) => one.tip).join("\n") || null,
    }, text));
  }
  if (last < doc.ends.length - 1) line.append(" …");
  return line;
}

// A token by itself, set apart from the direction of the text around it.
function token(id) {
  const text = tokenText(id);
  return el("bdi.piece", { "data-tip": `token ${id}: ${JSON.stringify(text)}` }, visible(text) || "∅");
}
