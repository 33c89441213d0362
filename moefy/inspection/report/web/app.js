// The frame: where the address leads, keys, theme, search box, help.

const NAMED = [["overview", "Overview", overview], ["prompt", "Prompt", promptScreen], ["compare", "Compare", compareScreen], ["hunt", "Diff hunt", huntScreen]];

// #L5.E12, #L5, #search=text, or the name of a screen.
function place() {
  const hash = decoded(location.hash.slice(1)), at = /^L(\d+)(?:\.E(\d+))?$/.exec(hash);
  if (at && Number(at[1]) < layerCount() && (at[2] === undefined || Number(at[2]) < expertCount(Number(at[1])))) {
    return { kind: at[2] === undefined ? "layer" : "expert", layer: Number(at[1]), expert: at[2] === undefined ? null : Number(at[2]) };
  }
  if (hash.startsWith("search=")) return { kind: "search", text: hash.slice(7) };
  if (hash && !NAMED.some(([name]) => name === hash)) return { kind: "nowhere", text: hash };
  // A comparison of two models has nothing else to show.
  return { kind: hash || (layerCount() ? "overview" : "hunt") };
}

// An address that someone cut off is no reason to show nothing.
function decoded(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

let drawing = 0;

async function render() {
  const began = performance.now(), own = ++drawing, at = place(), screen = document.getElementById("screen");
  let content;
  try {
    content = await contentOf(at);
  } catch (error) {
    content = panel("This part cannot be shown", null, el("p", null, String(error.message ?? error)));
    console.error(error);
  }
  // Whoever went on meanwhile wants to see the newer place.
  if (own !== drawing) return;
  for (const canvas of redraws.keys()) if (!content.contains(canvas)) redraws.delete(canvas);
  screen.replaceChildren(content);
  document.getElementById("tip").hidden = true;
  for (const link of document.querySelectorAll("#bar nav a")) {
    const here = link.hash === `#${at.kind}` || (link.dataset.layer && at.layer !== undefined);
    if (here) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  document.title = `${at.kind === "expert" ? expertName(at.layer, at.expert) : at.kind === "layer" ? `L${at.layer}` : at.kind} · ${modelName()}`;
  document.body.dataset.screen = at.kind;
  await new Promise((done) => requestAnimationFrame(done));
  performance.measure("moefy " + at.kind, { start: began, detail: at });
}

function contentOf(at) {
  if (at.kind === "layer") return layerScreen(at.layer);
  if (at.kind === "expert") return expertScreen(at.layer, at.expert);
  if (at.kind === "search") return searchScreen(at.text);
  if (at.kind === "nowhere") return panel("No such place", null, el("p", null, el("bdi", null, at.text), ` is not in this report. It has ${layerCount()} layers: #L0 to #L${layerCount() - 1}.`));
  return NAMED.find(([name]) => name === at.kind)[2]();
}

const go = (hash) => { location.hash = hash; };

function bar() {
  const search = el("input", { id: "search", type: "search", placeholder: "search   /", "aria-label": "search contexts, tokens, labels",
    onchange: () => { if (search.value.trim()) go("search=" + encodeURIComponent(search.value.trim())); } });
  const theme = el("button.plain", { type: "button", "data-tip": "light or dark (t)", "aria-label": "light or dark", onclick: switchTheme }, "◐");
  document.getElementById("bar").append(
    el("a.brand", { href: "#overview" }, "moefy"),
    el("nav", { "aria-label": "screens" }, el("a", { href: "#overview" }, "Overview"), el("a", { href: "#L0", "data-layer": "any" }, "Layers"),
      NAMED.slice(1).map(([name, title]) => el("a", { href: "#" + name }, title))),
    search, el("button.plain", { type: "button", "data-tip": "your labels", onclick: labelsDialog }, "labels"), theme,
    el("button.plain", { type: "button", "data-tip": "keys (?)", "aria-label": "help", onclick: helpDialog }, "?"));
}

function switchTheme() {
  const { theme } = document.documentElement.dataset;
  const isDark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(isDark ? "light" : "dark");
}

function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name; else delete document.documentElement.dataset.theme;
  redraws.forEach((draw) => draw());
}

function openDialog(...content) {
  const dialog = document.getElementById("dialog");
  dialog.replaceChildren(...content, el("p", null, el("button", { type: "button", onclick: () => dialog.close() }, "close")));
  dialog.showModal();
}

const KEYS = [["j / →", "next expert"], ["k / ←", "previous expert"], ["J / K", "next, previous layer"], ["r", "another expert at random"], ["l", "label this expert"],
  ["/", "search"], ["o", "overview"], ["t", "light or dark"], ["?", "this help"], ["Esc", "leave a field, close this"]];

function helpDialog() {
  openDialog(el("h2", null, "Keys"), grid(["key", "does"], KEYS.map(([key, does]) => el("tr", null, el("td", null, el("kbd", null, key)), el("td", null, does)))),
    el("p.how", null, "The address names what is shown: #L5.E12 is expert 12 of layer 5. Experts count from 0, always-on experts first."));
}

function labelsDialog() {
  const note = el("p.note", { role: "status" });
  const count = Object.keys(labels).length;
  openDialog(el("h2", null, "Your labels"), el("p.how", null, `${count} labels${labelsKept ? ", kept in this browser for this model" : "; this browser does not keep them, export them before you leave"}.`),
    el("p", null, el("button", { type: "button", onclick: exportLabels }, "export"), " ", picker("import", (text) => { note.textContent = importLabels(text); render(); })), note,
    Object.keys(labels).sort().map((name) => el("p", null, expertLink(...name.slice(1).split(".E").map(Number)))));
}

function random() {
  const all = Array.from({ length: layerCount() }, (_, layer) => Array.from({ length: expertCount(layer) }, (__, expert) => expertName(layer, expert))).flat();
  const others = all.filter((name) => `#${name}` !== location.hash);
  if (others.length) go(others[Math.floor(Math.random() * others.length)]);
}

function onKey(event) {
  if (event.key === "Escape") { document.activeElement?.blur(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog[open]")) return;
  const at = place(), layer = at.layer ?? 0, expert = at.expert ?? (event.key === "k" || event.key === "ArrowLeft" ? 0 : -1);
  const layerStep = (step) => {
    const number = (layer + step + layerCount()) % layerCount();
    go(at.kind === "expert" ? expertName(number, Math.min(expert, expertCount(number) - 1)) : `L${number}`);
  };
  const does = {
    j: () => go(expertName(...neighbourOf(layer, expert, 1))), k: () => go(expertName(...neighbourOf(layer, expert, -1))),
    J: () => layerStep(1), K: () => layerStep(-1), r: random, o: () => go("overview"), t: switchTheme, "?": helpDialog,
    "/": () => document.getElementById("search").focus(), l: () => document.getElementById("label")?.focus(),
  };
  const key = { ArrowRight: "j", ArrowLeft: "k" }[event.key] ?? event.key;
  if (does[key]) { event.preventDefault(); does[key](); }
}

// Paper is light, and shows what is folded.
function watchPrint() {
  let before, closed = [];
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    setTheme("light");
    closed = [...document.querySelectorAll("details:not([open]):not(.chooser)")];
    // The browser's own event would come after the page is printed.
    for (const one of closed) { one.open = true; one.dispatchEvent(new Event("toggle")); }
  });
  addEventListener("afterprint", () => {
    setTheme(before);
    for (const one of closed) one.open = false;
  });
}

async function start() {
  try {
    await readIndex();
  } catch (error) {
    document.getElementById("screen").replaceChildren(panel("The inspection cannot be read", null, el("p", null, String(error.message ?? error))));
    throw error;
  }
  readLabels();
  bar();
  watchTips();
  watchPrint();
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => { scrollTo(0, 0); render(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraws.forEach((draw) => draw()));
  await render();
  document.body.dataset.ready = "yes";
  // The texts are wanted soon: they are inflated while the first screen is read.
  setTimeout(readTexts, 50);
}
