// The blocks of the inspection. A table is an object of columns; rows are made when they are shown.

const store = { index: null, layers: new Map(), texts: null };

async function inflate(bytes) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

// A block lies in the page, or beside it as a file where the report is a folder.
async function block(name, file) {
  const held = document.getElementById("block-" + name);
  if (held) return inflate(fromBase64(held.textContent));
  const answer = await fetch(file);
  if (!answer.ok) throw new Error(`${file} cannot be read (${answer.status}); show the folder with: moefy serve FOLDER`);
  return inflate(new Uint8Array(await answer.arrayBuffer()));
}

async function json(name, file) {
  return JSON.parse(new TextDecoder().decode(await block(name, file)));
}

const readIndex = async () => { store.index = await json("index", "index.json"); };
const readTexts = async () => { store.texts ??= json("texts", "texts.json.gz"); return store.texts; };
const textOf = async (file) => new TextDecoder().decode(await inflate(new Uint8Array(await file.arrayBuffer())));

function readLayer(number) {
  if (!store.layers.has(number)) {
    const layer = loadLayer(number);
    // A file that could not be read is asked for again the next time.
    layer.catch(() => store.layers.delete(number));
    store.layers.set(number, layer);
  }
  return store.layers.get(number);
}

async function loadLayer(number) {
  const name = "layer_" + String(number).padStart(2, "0");
  const [given, bytes] = await Promise.all([json(name, name + ".json.gz"), block(name + ".windows", name + ".windows.gz")]);
  let at = 0;
  if (given.tables.examples) given.tables.examples.window = given.windows.map((length) => bytes.subarray(at, (at += length)));
  const places = {};
  for (const [table, columns] of Object.entries(given.tables)) places[table] = placesOf(columns);
  return { tables: given.tables, places };
}

// Row numbers of every expert.
function placesOf(columns) {
  const found = new Map();
  (columns.expert ?? columns.expert_a ?? []).forEach((expert, at) => {
    if (!found.has(expert)) found.set(expert, []);
    found.get(expert).push(at);
  });
  return found;
}

// The rows of an expert in a table of its layer; `layer` is what readLayer gave.
function rowsOfExpert(layer, name, expert) {
  return rowsAt(layer.tables[name], layer.places[name]?.get(expert) ?? []);
}

function rowsAt(table, places) {
  const names = Object.keys(table ?? {});
  return places.map((at) => Object.fromEntries(names.map((name) => [name, table[name][at]])));
}

function rows(table) {
  const first = Object.values(table ?? {})[0] ?? [];
  return rowsAt(table, [...first.keys()]);
}

const table = (name) => store.index.tables[name];
const has = (name) => name in store.index.tables || store.index.by_layer.includes(name);
const meta = () => store.index.meta;
const layerCount = () => meta().layers.length;
const expertCount = (layer) => meta().layers[layer]?.experts ?? 0;

// Rows of a table of the index that are about one layer, in the table's order; made once.
const layerRowsMade = new Map();

function layerRows(name, layer) {
  const given = table(name), key = `${name} ${layer}`;
  if (!given) return [];
  if (!layerRowsMade.has(key)) {
    const places = [];
    given.layer.forEach((number, at) => { if (number === layer) places.push(at); });
    layerRowsMade.set(key, rowsAt(given, places));
  }
  return layerRowsMade.get(key);
}

// All rows of a table of the index, made once.
const rowsMade = new Map();

function tableRows(name) {
  if (!rowsMade.has(name)) rowsMade.set(name, rows(table(name)));
  return rowsMade.get(name);
}

// Names of the figures of a table: what is neither a key nor one end of another's interval.
function figuresOf(given) {
  const names = Object.keys(given ?? {});
  return names.filter((name) => !["layer", "expert"].includes(name)
    && !/_(low|high)$/.test(name) && given[name].some((value) => value !== null));
}

// What a token id stands for.
function tokenText(id) {
  return meta().vocabulary?.[id] ?? `#${id}`;
}
