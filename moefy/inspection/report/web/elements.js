// Elements and numbers. What comes from the inspection enters the page as text nodes only.

const SVG = document.getElementById("namespace").namespaceURI;

// el("p.how", {title: "x"}, "text", child): a tag with classes, attributes or handlers, and children.
function el(name, given, ...children) {
  const [tag, ...classes] = name.split(".");
  return filled(document.createElement(tag), classes, given, children);
}

function svg(name, given, ...children) {
  const [tag, ...classes] = name.split(".");
  return filled(document.createElementNS(SVG, tag), classes, given, children);
}

function filled(node, classes, given, children) {
  if (classes.length) node.classList.add(...classes);
  for (const [key, value] of Object.entries(given ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(node.style, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

// Three digits, a true minus, and a dash where nothing was measured.
function num(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  let text;
  if (Number.isInteger(value)) text = size.toLocaleString("en-US");
  else if (size < 1e-3 || size >= 1e7) text = size.toExponential(digits - 2);
  else if (size >= 10 ** (digits - 1)) text = Math.round(size).toLocaleString("en-US");
  else text = size.toPrecision(digits);
  return (value < 0 ? "−" : "") + text;
}

function signed(value, digits = 3) {
  return typeof value === "number" && value > 0 ? "+" + num(value, digits) : num(value, digits);
}

function percent(value) {
  if (typeof value !== "number") return "–";
  const text = Math.abs(value * 100).toFixed(Math.abs(value) < 0.0995 ? 1 : 0) + " %";
  return (value < 0 && !/^0(\.0)? %$/.test(text) ? "−" : "") + text;
}

// "[low, high]" of a row's figure, or nothing where it has no interval.
function between(row, name, shown = num) {
  const low = row[name + "_low"], high = row[name + "_high"];
  return typeof low === "number" && typeof high === "number" ? `[${shown(low)}, ${shown(high)}]` : "";
}

// "within_cosine" -> "within cosine"
const words = (name) => name.replaceAll("_", " ");

const expertName = (layer, expert) => `L${layer}.E${expert}`;

function expertLink(layer, expert) {
  const own = labelOf(layer, expert);
  const name = el("a.expert", { href: `#${expertName(layer, expert)}` }, expertName(layer, expert));
  return own ? el("span", null, name, " ", el("bdi.label", null, own)) : name;
}

// A titled part of a screen, with one line on how to read it and what it cannot say.
function panel(title, how, ...children) {
  return el("section.panel", null, el("h2", null, title), how ? el("p.how", null, how) : null, children);
}

// A table that scrolls in itself where it is wider than the page.
function grid(head, rows, given) {
  const cell = (tag) => (value) => (value instanceof Node ? value : el(tag, null, value ?? ""));
  return el("div.scroll", null, el("table", given,
    el("thead", null, el("tr", null, head.map(cell("th")))),
    el("tbody", null, rows.map((row) => (row instanceof Node ? row : el("tr", null, row.map(cell("td"))))))));
}

const td = (value, given) => el("td.n", given, value);
const th = (value, given) => el("th.n", given, value);

// A row of buttons of which one is on.
function choice(names, chosen, pick) {
  return el("div.choice", { role: "group" }, names.map(([key, title]) =>
    el("button", { type: "button", "aria-pressed": String(key === chosen), onclick: () => pick(key) }, title)));
}

// A table of which the first few rows are made, and the others when they are asked for.
function longGrid(head, items, few, what, draw) {
  const box = grid(head, items.slice(0, few).map(draw));
  if (items.length <= few) return box;
  const more = el("button.more", { type: "button", onclick: () => {
    box.querySelector("tbody").append(...items.slice(few).map(draw));
    more.remove();
  } }, `all ${num(items.length)} ${what}`);
  return el("div", null, box, more);
}

// A part that is made when it is first unfolded.
function folded(summary, make, open = false) {
  const box = el("details", { open, ontoggle: fill }, el("summary", null, summary));
  function fill() {
    if (box.open && box.children.length === 1) box.append(...[make()].flat());
  }
  fill();
  return box;
}

// A longer list, of which the first few are shown until asked for more.
function shortened(items, few, draw, what) {
  const box = el("div", null, items.slice(0, few).map(draw));
  if (items.length > few) {
    const more = el("button.more", { type: "button", onclick: () => {
      more.remove();
      box.append(...items.slice(few).map(draw));
    } }, `all ${items.length} ${what}`);
    box.append(more);
  }
  return box;
}

// The little window beside the pointer; `data-tip` of what is under it says what it holds.
function showTip(text, left, top) {
  const tip = document.getElementById("tip");
  tip.hidden = false;
  tip.textContent = text;
  tip.style.left = `${Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(top, innerHeight - tip.offsetHeight - 4))}px`;
}

function watchTips() {
  const show = (event) => {
    const owner = event.target.closest?.("[data-tip]");
    if (!owner) { document.getElementById("tip").hidden = true; return; }
    showTip(owner.dataset.tip, event.clientX ?? owner.getBoundingClientRect().left, owner.getBoundingClientRect().bottom + 6);
  };
  for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, show);
  document.addEventListener("scroll", () => { document.getElementById("tip").hidden = true; }, true);
}

function download(name, text) {
  const link = el("a", { download: name, href: URL.createObjectURL(new Blob([text], { type: "application/json" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// A button that opens the file picker and hands over the text of what was picked.
function picker(title, taken) {
  const input = el("input", { type: "file", accept: ".json,.gz", hidden: true, onchange: async () => {
    const [file] = input.files;
    input.value = "";
    if (file) taken(await textOf(file), file.name);
  } });
  return el("span", null, el("button", { type: "button", onclick: () => input.click() }, title), input);
}
