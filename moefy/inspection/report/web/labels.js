// The reader's own names of experts: kept in this browser for this model, given out and taken in as JSON.

const labels = {};
let labelsKept = true;

// Names go with the partition: the same model cut in another way has other experts.
function labelsKey() {
  const text = JSON.stringify([meta().hashes ?? meta().model, meta().layers.map((layer) => layer.owner ?? layer)]);
  let sum = 0;
  for (const letter of text) sum = (Math.imul(sum, 31) + letter.codePointAt(0)) | 0;
  return "moefy labels " + (sum >>> 0).toString(16);
}

const labelOf = (layer, expert) => labels[expertName(layer, expert)] ?? "";

function readLabels() {
  try {
    Object.assign(labels, JSON.parse(localStorage.getItem(labelsKey()) ?? "{}"));
  } catch {
    // Frames of notebooks have no storage: labels live as long as the page.
    labelsKept = false;
  }
}

function setLabel(layer, expert, text) {
  const name = expertName(layer, expert);
  if (text.trim()) labels[name] = text.trim();
  else delete labels[name];
  keepLabels();
}

function keepLabels() {
  try {
    localStorage.setItem(labelsKey(), JSON.stringify(labels));
  } catch {
    labelsKept = false;
  }
}

const exportLabels = () => download("labels.json", JSON.stringify({ kind: "labels", model: meta().model, labels }, null, 1));

// Labels of a file replace those of the same experts; returns what to say of it.
function importLabels(text) {
  let given;
  try { given = JSON.parse(text); } catch { return "This file is no JSON; give one that was exported here."; }
  if (given?.kind !== "labels" || typeof given.labels !== "object") return "This file holds no labels; give one that was exported here.";
  const taken = Object.entries(given.labels).filter(([name, label]) => /^L\d+\.E\d+$/.test(name) && typeof label === "string");
  for (const [name, label] of taken) labels[name] = label;
  keepLabels();
  return `${taken.length} labels taken in.`;
}
