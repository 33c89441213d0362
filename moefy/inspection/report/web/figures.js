// What the columns are called here, and how to make a table that is missing.

const FIGURES = {
  load: ["load", "share of tokens that run it"],
  documents: ["documents", "documents in which it ran; under 30 the row is grey"],
  tokens: ["tokens", "tokens that ran it"],
  norm: ["norm", "mean contribution norm over all tokens; first tokens dominate it"],
  norm_later: ["norm, later tokens", "mean contribution norm over all tokens but the first of each document"],
  energy: ["energy, all tokens", "share of the energy of all experts of the layer; first tokens dominate it"],
  energy_later: ["energy", "share of the energy of all experts of the layer, first tokens left out"],
  share_routed: ["share where it ran", "mean signed share of the layer's output over tokens that ran it"],
  share_token: ["token", "share of the bits of its routing that the token tells"],
  share_domain: ["domain", "share of the bits of its routing that the domain tells beyond the token"],
  router_recall: ["recall", "of the tokens for which the oracle would run it, how many did"],
  router_precision: ["precision", "of the tokens that ran it, for how many the oracle would have"],
  stability: ["stability", "overlap (Jaccard) with its counterpart when the model is clustered again"],
  causal_ce: ["loss without it", "rise of the loss without it, mean over domains, nats per token"],
  causal_domain: ["selective in", "the domain whose loss rises most beyond the others'"],
  causal_csi: ["selectivity", "how much more that domain's loss rises than the others', nats per token"],
  causal_percentile: ["null percentile", "among random neuron sets of the same size and energy"],
  within_cosine_z: ["likeness, z", "how alike its neurons are, against random partitions"],
  ds_adj: ["DS_adj", "how much more often it runs in the domain than its tokens alone explain"],
};
const titleOf = (name) => FIGURES[name]?.[0] ?? words(name);
const meaningOf = (name) => FIGURES[name]?.[1] ?? words(name);

// Tables that a panel needs, what they show, and how to get them.
const NEEDED = {
  layers: ["what explains routing, figures of layers", "moefy inspect MODEL"],
  experts: ["figures of every expert", "moefy inspect MODEL"],
  domains: ["domains of an expert", "moefy inspect MODEL with texts of several domains"],
  tokens: ["tokens of an expert", "moefy inspect MODEL"],
  examples: ["examples in context", "moefy inspect MODEL"],
  logits: ["direct effects on logits", "moefy inspect MODEL, of a decoder"],
  causal: ["effects of ablation", "moefy inspect MODEL, without --skip causal"],
  random_weights: ["trained beside random weights", "moefy inspect MODEL, without --skip controls"],
  enrichment: ["neurons of a concept", "moefy inspect MODEL"],
  hunt: ["tokens on which two models differ most", "moefy diff BASE OTHER"],
};

const FEW_DOCUMENTS = 30;
const isThin = (row) => row.few ?? (typeof row.documents === "number" && row.documents < FEW_DOCUMENTS);

const documentsOf = (row) => (typeof row.documents === "number" ? `${num(row.documents)} documents` : "");

// A fact of page one as a row with an interval.
const factRow = ({ value, low, high }) => ({ value, value_low: low, value_high: high });

// "0.042 [0.031, 0.055]"
function withInterval(row, name, shown = num) {
  const range = between(row, name, shown);
  return el("span.n", null, shown(row[name]), range ? el("span.range", null, " " + range) : null);
}
