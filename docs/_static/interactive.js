/* Three figures that a reader can move. No library, no network.
 *
 * Each figure is a pure function from a state to pictures and a sentence; the rest of this file makes controls. So
 * the same code draws the still pictures (node docs/_static/interactive.js FOLDER), which are shown without
 * JavaScript and are compared in the tests.
 */
"use strict";

/* ---- drawing */

const W = 340, H = 250;                                // of one panel
const BOX = { left: 46, top: 26, right: 12, bottom: 40 };  // margins around the axes
const inner = { w: W - BOX.left - BOX.right, h: H - BOX.top - BOX.bottom };

const px = (t) => (BOX.left + t * inner.w).toFixed(1);          // 0..1 to the right
const py = (t) => (BOX.top + (1 - t) * inner.h).toFixed(1);     // 0..1 upwards
const text = (x, y, s, rest = "") => `<text x="${x}" y="${y}" ${rest}>${s}</text>`;
const log = (v, [lo, hi]) => Math.log(v / lo) / Math.log(hi / lo);       // lo..hi to 0..1
const power = (t, [lo, hi]) => lo * (hi / lo) ** t;                      // and back
const clip = (t) => Math.min(1, Math.max(0, t));
const short = (v) => String(Number(v.toPrecision(2)));

function panel(title, xlabel, ylabel, body, xticks = [], yticks = []) {
  const marks = [
    ...xticks.map(([t, s]) => text(px(t), H - BOX.bottom + 14, s, 'text-anchor="middle"')),
    ...yticks.map(([t, s]) => text(BOX.left - 5, Number(py(t)) + 4, s, 'text-anchor="end"')),
  ].join("");
  return (
    text(W / 2, 15, title, 'class="title" text-anchor="middle"') + body +
    `<path class="axis" d="M${px(0)} ${py(1)}V${py(0)}H${px(1)}"/>` + marks +
    text(px(0.5), H - 6, xlabel, 'text-anchor="middle"') +
    text(0, 0, ylabel, `text-anchor="middle" transform="translate(11 ${py(0.5)}) rotate(-90)"`)
  );
}

/* ---- 1: where IKFAC's step on a factor diverges */

const BETA = [0.01, 1], S = [0.1, 1000], Y = [0.1, 100], STEPS = 60;

/* k_0 = 1, ..., k_n of k <- k - beta m k with m = (s k^2 - 1) / 2; guarded: the step is divided by max(1, |m|) */
function iterate(beta, s, guard, n) {
  const ks = [1];
  for (let k = 1; ks.length <= n && Math.abs(k) < 1e9;) {
    const m = 0.5 * (s * k * k - 1);
    k -= (beta * m * k) / (guard ? Math.max(1, Math.abs(m)) : 1);
    ks.push(k);
  }
  return ks;
}

const limit = (beta) => 1 + 4 / beta;
const outcome = (ks) => (Math.abs(ks[ks.length - 1]) >= 1e9 ? "diverges" : "stays");

const divergence = {
  start: { beta: 0.1, s: 20, guard: false },
  controls: [
    { name: "beta", label: "step β₁", range: BETA },
    { name: "s", label: "curvature s", range: S },
    { name: "guard", label: "guard: divide the step by max(1, |m|), as normalize_lr_cov does" },
  ],
  panels({ beta, s, guard }) {
    const ks = iterate(beta, s, guard, STEPS).map((k) => Math.abs(k) * Math.sqrt(s));
    const dots = ks.map((y, i) => [px(i / STEPS), py(clip(log(y, Y)))]);
    const bad = outcome(iterate(beta, s, guard, 5000)) === "diverges";
    const curve = [...Array(41).keys()].map((i) => {
      const b = power(i / 40, BETA);
      return `${px(i / 40)} ${py(clip(log(limit(b), S)))}`;
    });
    const one = py(log(1, Y));
    return [
      { svg: panel("|k| √s, which should become 1", "update", "", `<path class="guide" d="M${px(0)} ${one}H${px(1)}"/>` +
          `<polyline class="${bad ? "b" : "a"} line" points="${dots.map((d) => d.join(",")).join(" ")}"/>` +
          dots.map(([x, y]) => `<circle class="${bad ? "b" : "a"}" cx="${x}" cy="${y}" r="2.2"/>`).join(""),
          [0, 20, 40, 60].map((v) => [v / STEPS, v]), [0.1, 1, 10, 100].map((v) => [log(v, Y), v])) },
      { svg: panel("above the line it diverges", "step β₁", "curvature s",
          (guard ? "" : `<path class="b area" d="M${px(0)} ${py(1)}L${curve.join("L")}V${py(1)}Z"/>`) +
          `<path class="b line" d="M${curve.join("L")}"/>` +
          `<circle class="mark" cx="${px(log(beta, BETA))}" cy="${py(log(s, S))}" r="7"/>`,
          [0.01, 0.1, 1].map((v) => [log(v, BETA), v]), [0.1, 1, 10, 100, 1000].map((v) => [log(v, S), v])),
        drag: (x, y) => ({ beta: power(x, BETA), s: power(y, S) }) },
    ];
  },
  say({ beta, s, guard }) {
    const ks = iterate(beta, s, guard, 5000);
    const head = `β₁ = ${short(beta)}, s = ${short(s)}: the limit is 1 + 4/β₁ = ${short(limit(beta))}. `;
    if (outcome(ks) === "diverges") return head + "The factor diverges.";
    const near = ks.findIndex((k) => Math.abs(k * k * s - 1) < 0.01);
    const first = guard && s > limit(beta) ? "Only the guard saves it: it" : "The factor";
    return head + (near < 0 ? `${first} neither settles nor diverges.` :
      `${first} is within 1 % after ${near} updates.`);
  },
};

/* ---- 2: what damping does to each pair of eigenvalues */

const N = 16, LAMBDA = [1e-6, 1], SCALE = [0.01, 100];
const EIGS = [...Array(N).keys()].map((i) => 10 ** (0.5 - (3.5 * i) / (N - 1)));   // of U: 3.2 to 1e-3
const EIGS_G = EIGS.map((e) => e / 10);                                             // of G
const mean = (a) => a.reduce((x, y) => x + y, 0) / a.length;

/* u g / (what u g is replaced by): 1 where the curvature is trusted, 0 where the step is the gradient's */
function filters({ lam, c }) {
  const us = EIGS.map((u) => u * c), gs = EIGS_G.map((g) => g / c);
  const root = Math.sqrt(lam), pi = Math.sqrt(mean(us) / mean(gs));
  const table = (f) => gs.map((g) => us.map((u) => (u * g) / f(u, g)));
  return {
    pi,
    full: table((u, g) => u * g + lam),
    factored: table((u, g) => (u + root) * (g + root)),
    withPi: table((u, g) => (u + pi * root) * (g + root / pi)),
  };
}

const gap = (a, b) => Math.max(...a.flatMap((row, j) => row.map((v, i) => Math.abs(v - b[j][i]))));

const damping = {
  start: { lam: 1e-3, c: 1 },
  controls: [
    { name: "lam", label: "damping λ", range: LAMBDA },
    { name: "c", label: "scale c: c U, G / c", range: SCALE },
  ],
  panels(state) {
    const f = filters(state);
    const map = (title, values) => ({
      svg: panel(title, "eigenvalues of U, largest left", "of G, largest below",
        values.map((row, j) => row.map((v, i) =>
          `<rect class="a" x="${px(i / N)}" y="${py((j + 1) / N)}" width="${(inner.w / N + 0.1).toFixed(1)}" ` +
          `height="${(inner.h / N + 0.1).toFixed(1)}" fill-opacity="${v.toFixed(3)}"/>`).join("")).join("")),
    });
    return [map("full: u g + λ", f.full), map("factored: (u + √λ)(g + √λ)", f.factored),
      map("with π: (u + π√λ)(g + √λ/π)", f.withPi)];
  },
  say(state) {
    const f = filters(state);
    return `λ = ${short(state.lam)}, c = ${short(state.c)}, π = ${short(f.pi)}. Filled: the curvature is trusted. ` +
      `Largest distance from full damping: factored ${gap(f.full, f.factored).toFixed(2)}, ` +
      `with π ${gap(f.full, f.withPi).toFixed(2)}.`;
  },
};

/* ---- 3: a pattern of zeros and its closure under products */

const SIZE = 6;
const cells = [...Array(SIZE * SIZE).keys()];
const pattern = (test) => cells.map((x) => { const i = Math.floor(x / SIZE), j = x % SIZE; return i === j || test(i, j); });
const PRESETS = {
  diagonal: pattern(() => false),
  blocks: pattern((i, j) => Math.floor(i / 2) === Math.floor(j / 2)),
  "lower triangular": pattern((i, j) => i > j),
  hierarchical: pattern((i, j) => i < 2 || (i >= 4 && j >= 2)),  // the zoo's hierarchical2_2
  arrow: pattern((i, j) => i === 0 || j === 0),
  tridiagonal: pattern((i, j) => Math.abs(i - j) === 1),
};

/* the entries that some product of two members can fill */
function product(p) {
  return cells.map((x) => {
    const i = Math.floor(x / SIZE), j = x % SIZE;
    return [...Array(SIZE).keys()].some((k) => p[i * SIZE + k] && p[k * SIZE + j]);
  });
}

function closure(p) {
  for (let rounds = 0; ; rounds++) {
    const q = product(p);
    if (q.every((v, x) => v === p[x])) return { pattern: p, rounds };
    p = q;
  }
}

const count = (p) => p.filter(Boolean).length;

const closed = {
  start: { pattern: PRESETS.tridiagonal },
  controls: [
    { name: "pattern", label: "entries that may differ from zero", grid: SIZE },
    { name: "pattern", label: "start from", presets: PRESETS },
  ],
  panels(state) {
    const whole = closure(state.pattern).pattern, side = inner.h / SIZE, left = (W - inner.h) / 2;
    const squares = cells.map((x) => {
      const i = Math.floor(x / SIZE), j = x % SIZE;
      const kind = state.pattern[x] ? "a" : whole[x] ? "b" : "empty";
      return `<rect class="${kind} cell" x="${(left + j * side).toFixed(1)}" y="${(BOX.top + i * side).toFixed(1)}" ` +
        `width="${(side - 2).toFixed(1)}" height="${(side - 2).toFixed(1)}"/>`;
    }).join("");
    return [{ svg: text(W / 2, 15, "its closure under products", 'class="title" text-anchor="middle"') + squares +
      text(W / 2, H - 12, "blue: drawn; orange: added by products", 'text-anchor="middle"') }];
  },
  say(state) {
    const { pattern: whole, rounds } = closure(state.pattern), n = count(state.pattern), m = count(whole);
    if (n === m) return `Dimension ${n}, closed: every product and every inverse stays in the pattern.`;
    return `Dimension ${n}, not closed: products fill ${m - n} more. ` +
      `The closure has dimension ${m}, reached in ${rounds} round${rounds > 1 ? "s" : ""}.`;
  },
};

const FIGURES = { divergence, damping, closure: closed };

/* ---- controls: native ones, so that keyboard, touch and screen readers work as everywhere */

function element(tag, attributes, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) k.startsWith("on") ? e.addEventListener(k.slice(2), v) : e.setAttribute(k, v);
  e.append(...children);
  return e;
}

function slider(control, state, change) {
  const show = element("span", { class: "value" });
  const input = element("input", { type: "range", min: 0, max: 1, step: 0.005, name: control.name, "aria-label": control.label,
    oninput: () => change({ [control.name]: power(Number(input.value), control.range) }) });
  return { node: element("label", {}, element("span", {}, control.label), input, show),
    update(now) {
      input.value = log(now[control.name], control.range);
      show.textContent = short(now[control.name]);
      input.setAttribute("aria-valuetext", show.textContent);
    } };
}

function box(control, state, change) {
  const input = element("input", { type: "checkbox", name: control.name, onchange: () => change({ [control.name]: input.checked }) });
  return { node: element("label", { class: "box" }, input, control.label),
    update(now) { input.checked = now[control.name]; } };
}

function presets(control, state, change) {
  const node = element("div", { class: "presets", role: "group", "aria-label": control.label }, control.label + " ");
  for (const [name, value] of Object.entries(control.presets))
    node.append(element("button", { type: "button", onclick: () => change({ [control.name]: value }) }, name));
  return { node, update() {} };
}

/* buttons in a square; arrows move, space and enter toggle; the diagonal belongs to every structure */
function grid(control, state, change) {
  const n = control.grid, node = element("div", { class: "grid", role: "group", "aria-label": control.label });
  let now = state;
  const buttons = cells.map((x) => {
    const i = Math.floor(x / n), j = x % n, fixed = i === j;
    const b = element("button", { type: "button", tabindex: x === 1 ? 0 : -1, "aria-label": `row ${i + 1}, column ${j + 1}`,
      onclick: () => !fixed && change({ [control.name]: now[control.name].map((v, y) => (y === x ? !v : v)) }),
      onkeydown: (event) => {
        const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: n, ArrowUp: -n }[event.key];
        if (!by || buttons[x + by] === undefined) return;
        event.preventDefault();
        event.stopPropagation();
        b.tabIndex = -1;
        buttons[x + by].tabIndex = 0;
        buttons[x + by].focus();
      } });
    if (fixed) b.setAttribute("aria-disabled", "true");
    node.append(b);
    return b;
  });
  return { node, update(next) { now = next; buttons.forEach((b, x) => b.setAttribute("aria-pressed", next[control.name][x])); } };
}

function mount(place) {
  const figure = FIGURES[place.dataset.figure];
  let state = { ...figure.start };
  const pictures = element("div", { class: "panels" }), words = element("output", { "aria-live": "polite" });
  const change = (part) => { state = { ...state, ...part }; draw(); };
  const make = (c) => (c.range ? slider : c.presets ? presets : c.grid ? grid : box)(c, state, change);
  const controls = figure.controls.map(make);
  const svgs = figure.panels(state).map((p, i) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
    svg.setAttribute("role", "img");
    if (p.drag) {
      svg.classList.add("drag");
      const move = (event) => {
        if (event.type === "pointermove" && !event.buttons) return;
        const r = svg.getBoundingClientRect(), k = W / r.width;
        const x = ((event.clientX - r.left) * k - BOX.left) / inner.w, y = 1 - ((event.clientY - r.top) * k - BOX.top) / inner.h;
        change(p.drag(clip(x), clip(y)));
      };
      svg.addEventListener("pointerdown", move);
      svg.addEventListener("pointermove", move);
    }
    pictures.append(svg);
    return svg;
  });
  function draw() {
    figure.panels(state).forEach((p, i) => {
      svgs[i].innerHTML = p.svg;
      svgs[i].setAttribute("aria-label", p.svg.match(/class="title"[^>]*>([^<]*)/)[1]);
    });
    words.textContent = figure.say(state);
    controls.forEach((c) => c.update(state));
  }
  place.replaceChildren(element("div", { class: "controls" }, ...controls.map((c) => c.node)), pictures, words);
  place.addEventListener("keydown", (event) => {  // the theme turns pages with the arrows
    if (event.key.startsWith("Arrow")) event.stopPropagation();
  });
  draw();
}

/* ---- still pictures: the same panels, in one file, on white */

function still(name) {
  const panels = FIGURES[name].panels(FIGURES[name].start);
  const style = "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}.axis{fill:none;stroke:#222}" +
    ".guide{stroke:#777;stroke-dasharray:3 3}.a{fill:#0072b2}.b{fill:#d55e00}.line{fill:none;stroke-width:1.8}" +
    ".a.line{stroke:#0072b2}.b.line{stroke:#d55e00}.area{fill-opacity:.15}.mark{fill:none;stroke:#222;stroke-width:2}" +
    ".empty{fill:#eee}";
  const width = W * panels.length, lines = [""];  // of the sentence: svg breaks none by itself
  for (const word of FIGURES[name].say(FIGURES[name].start).split(" ")) {
    const longer = `${lines[lines.length - 1]} ${word}`.trim();
    if (6.2 * longer.length > width - 16) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${H + 6 + 16 * lines.length}">` +
    `<style>${style}</style><rect width="100%" height="100%" fill="#fff"/>` +
    panels.map((p, i) => `<g transform="translate(${i * W} 0)">${p.svg}</g>`).join("") +
    lines.map((line, i) => text(8, H + 14 + 16 * i, line)).join("") + "</svg>\n";
}

if (typeof document !== "undefined") {
  const start = () => document.querySelectorAll(".interactive[data-figure]").forEach(mount);
  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", start) : start();
} else {
  module.exports = { FIGURES, PRESETS, iterate, limit, outcome, filters, gap, closure, count, still };
  if (require.main === module) {
    const fs = require("fs"), path = require("path");
    for (const name of Object.keys(FIGURES)) fs.writeFileSync(path.join(process.argv[2], `interactive_${name}.svg`), still(name));
  }
}
