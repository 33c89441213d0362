// Marks: interval bars, stacked bars, maps. Colours are those of style.css, so that both themes serve.

// A dot at the value with its interval, on an axis that all rows of a column share.
function intervalMark(row, name, axis, given) {
  const value = row[name], { from, to } = axis;
  if (typeof value !== "number") return el("span.none", null, "–");
  const width = 112, at = (v) => 4 + ((Math.min(Math.max(v, from), to) - from) / (to - from || 1)) * (width - 8);
  const low = row[name + "_low"], high = row[name + "_high"], known = typeof low === "number" && typeof high === "number";
  return svg("svg.mark", { viewBox: `0 0 ${width} 14`, "aria-hidden": "true", ...given },
    svg("line.axis", { x1: 4, x2: width - 4, y1: 7, y2: 7 }),
    from <= 0 && to >= 0 ? svg("line.zero", { x1: at(0), x2: at(0), y1: 1, y2: 13 }) : null,
    known ? svg("line.range", { x1: at(low), x2: at(high), y1: 7, y2: 7 }) : null,
    svg("circle.dot", { cx: at(value), cy: 7, r: 3 }));
}

// The common axis of a column; it holds 0 where values come near it.
function axisOf(all, name) {
  let from = Infinity, to = -Infinity;
  for (const row of all) {
    for (const value of [row[name], row[name + "_low"], row[name + "_high"]]) {
      if (typeof value === "number") { from = Math.min(from, value); to = Math.max(to, value); }
    }
  }
  if (from > to) return { from: 0, to: 1 };
  if (from > 0 && from < to / 2) from = 0;
  if (to < 0 && to > from / 2) to = 0;
  return { from, to };
}

// Parts of a whole from left to right; a part below zero has no width and says its value.
function stacked(parts) {
  return el("div.stacked", null, parts.map((part) => el("span.part", {
    class: "part " + part.kind, style: { width: `${Math.max(0, part.value) * 100}%` }, "data-tip": part.tip, tabindex: 0,
  })));
}

// Background of a cell: `share` in 0..1 of the sequential colour, or -1..1 of the diverging pair.
function tint(share) {
  const size = Math.round(Math.min(1, Math.abs(share)) * 100);
  return `color-mix(in oklab, var(${share < 0 ? "--below" : "--above"}) ${size}%, var(--blank))`;
}

// How to draw every canvas of the screen again when the theme changes.
const redraws = new Map();

// A map of many cells on a canvas. value(row, column) is in -1..1 or null; mark() frames a cell; tip() and
// pick() get places.
function canvasMap({ across, down, value, tip, pick, mark, label, cell = 12 }) {
  const canvas = el("canvas", { role: "img", "aria-label": label, tabindex: pick ? 0 : null });
  const draw = () => {
    const scale = devicePixelRatio || 1;
    canvas.width = across * cell * scale;
    canvas.height = down * cell * scale;
    canvas.style.aspectRatio = `${across} / ${down}`;
    canvas.style.width = `${across * cell}px`;
    const paint = canvas.getContext("2d"), gap = cell > 6 ? scale : 0;
    paint.strokeStyle = getComputedStyle(document.body).color;
    paint.lineWidth = scale;
    const ramps = { above: ramp("--above"), below: ramp("--below") };
    for (let row = 0; row < down; row++) {
      for (let column = 0; column < across; column++) {
        const share = value(row, column);
        if (share === null || share === undefined) continue;
        const steps = share < 0 ? ramps.below : ramps.above;
        paint.fillStyle = steps[Math.round(Math.min(1, Math.abs(share)) * (steps.length - 1))];
        const corner = [column * cell * scale, row * cell * scale], size = cell * scale - gap;
        paint.fillRect(...corner, size, size);
        if (mark?.(row, column)) paint.strokeRect(corner[0] + scale / 2, corner[1] + scale / 2, size - scale, size - scale);
      }
    }
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * across);
    const row = Math.floor(((event.clientY - box.top) / box.height) * down);
    return [Math.min(down - 1, Math.max(0, row)), Math.min(across - 1, Math.max(0, column))];
  };
  const say = (event) => {
    canvas.dataset.tip = tip(...place(event));
    showTip(canvas.dataset.tip, event.clientX + 12, event.clientY + 16);
  };
  canvas.addEventListener("pointermove", say);
  if (pick) canvas.addEventListener("click", (event) => pick(...place(event)));
  redraws.set(canvas, draw);
  draw();
  return el("div.scroll.map", null, canvas);
}

// 64 colours from blank to full, as the theme that is on has them.
function ramp(name) {
  const probe = el("span", { hidden: true });
  document.body.append(probe);
  const read = (variable) => {
    probe.style.color = `var(${variable})`;
    return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  };
  const [blank, full] = [read("--blank"), read(name)];
  probe.remove();
  return Array.from({ length: 64 }, (_, step) =>
    `rgb(${blank.map((from, i) => Math.round(from + ((full[i] - from) * step) / 63)).join(" ")})`);
}

function legend(items) {
  return el("div.legend", null, items.map(([kind, title]) =>
    el("span", null, el("i", { class: "swatch " + kind }), title)));
}
