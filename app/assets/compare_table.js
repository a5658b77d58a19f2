// What can be said of the settings in words, their numbers as a table, and what quality costs.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const COLOURS = 8;
  const DASHES = [[], [7, 4], [2, 4], [10, 3, 2, 3]]; // beside the colour, for who cannot tell them
  const TAGS = { best: "st-tag-good", worse: "st-bad", noise: "", unknown: "st-tag-warn", significant: "st-tag-good", "not comparable": "st-bad" };
  const SVG = "http://www.w3.org/2000/svg";
  const SIZE = { width: 560, height: 280, left: 62, right: 18, top: 14, bottom: 42 };
  const AXES = { time: ["Training time (minutes)", 60], memory: ["Peak memory (GB)", 1e9] };
  const NAMES = { time: "time", memory: "memory" };

  /** How a setting looks in every chart: a colour (a CSS variable) and a dash. */
  Studio.settingStyle = (index) => ({ colour: `--st-c${(index % COLOURS) + 1}`, dash: DASHES[index % DASHES.length] });

  /** An element of a drawing. */
  const draw = (tag, attributes = {}, ...children) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children.flat());
    return element;
  };

  /** A piece of a setting's line. */
  Studio.styleKey = ({ colour, dash }) => draw("svg", { viewBox: "0 0 34 10", class: "st-cmp-key", "aria-hidden": "true" },
    draw("path", { d: "M1,5H33", "stroke-width": 3, "stroke-dasharray": dash.join(" "), style: `stroke: var(${colour})` }));

  const tag = (text, kind) => h("span", { class: `st-tag ${TAGS[kind] ?? ""}` }, text);

  /** Each finding as a sentence, with its verdict in words. */
  Studio.CompareFindings = class {
    constructor() {
      this.element = h("ul", { class: "st-cmp-findings", "aria-label": "What can be said", "aria-live": "polite" });
    }

    show({ findings, rows }) {
      const lines = findings.map(([verdict, word, text, why]) => h("li", {}, tag(word, verdict), h("span", {}, text), h("span", { class: "st-small" }, why)));
      const why = rows.length < 2 ? "One setting alone has nothing to be compared with: choose runs of another one too."
        : "Nothing was measured on held-out images for two of these settings yet (evaluate.folder or evaluate.holdout in the preset).";
      this.element.replaceChildren(...(lines.length ? lines : [h("li", { class: "st-small" }, why)]));
    }
  };

  /** A row a setting; columns that nobody has are left out. */
  Studio.CompareTable = class {
    constructor() {
      this.box = h("div", { class: "st-cmp-scroll", tabindex: "0", role: "region", "aria-label": "Numbers of the settings" });
      this.element = h("section", { class: "st-card", "aria-label": "Numbers" }, h("header", {}, h("h3", {}, "Numbers"), Studio.help("this table",
        "A row for each setting; runs that differ in the seed alone share one, and stand as their mean with a 95 % interval.\nThe word under a number says what the "
        + "difference to the lowest one is worth. “No difference shown” does not mean equal: more seeds may show one.")), this.box);
    }

    show({ measures, rows }, styles) {
      const known = measures.filter(([key]) => rows.some((row) => row.cells[key][0] !== null));
      const cell = (row, key) => {
        const [, text, spread, verdict, kind] = row.cells[key];
        return h("td", {}, kind === "best" ? h("strong", {}, text) : text, spread ? h("small", {}, spread) : null, verdict ? tag(verdict, kind) : null);
      };
      const name = (row) => h("th", { scope: "row" }, Studio.styleKey(styles.get(row.name)), row.name, row.runs.length > 1 ? h("small", {}, `${row.runs.length} runs`) : h("small", {}, row.states[0]));
      this.box.replaceChildren(h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Setting"), known.map(([, label]) => h("th", { scope: "col" }, label)))),
        h("tbody", {}, rows.map((row) => h("tr", {}, name(row), known.map(([key]) => cell(row, key)))))));
    }
  };

  /** Quality against time and against memory, the settings that no other one beats in both marked. */
  Studio.CompareFronts = class {
    constructor() {
      this.charts = h("div", { class: "st-charts" });
      this.element = h("section", { class: "st-cmp-fronts", "aria-label": "Quality against cost" }, this.charts);
    }

    show({ fronts }, styles) {
      this.element.hidden = Object.keys(fronts).length === 0;
      this.charts.replaceChildren(...Object.entries(fronts).map(([cost, [quality, points]]) => {
        const best = points.filter(([, , , isFront]) => isFront).map(([name]) => name).join(", ");
        const title = `${quality} against ${NAMES[cost]}`;
        return h("section", { class: "st-card", "aria-label": title }, h("header", {}, h("h3", {}, title), Studio.help("this chart",
          "Lower and further left is better. Filled points are on the Pareto front: no other setting is better in both.")),
        scatter(`${title}. On the front: ${best}.`, points, AXES[cost], quality, styles), h("p", { class: "st-small" }, `On the front: ${best}.`));
      }));
    }
  };

  function scatter(label, points, [axis, factor], quality, styles) {
    const { width, height, left, right, top, bottom } = SIZE;
    const [xs, ys] = [span(points.map(([, x]) => x / factor)), span(points.map(([, , y]) => y))];
    const place = ([, x, y]) => [left + ((x / factor - xs[0]) / (xs[1] - xs[0])) * (width - left - right),
      height - bottom - ((y - ys[0]) / (ys[1] - ys[0])) * (height - top - bottom)];
    const text = (x, y, words, more = {}) => draw("text", { x, y, ...more }, words);
    const grid = [...ticks(...xs).flatMap((tick) => {
      const x = place([0, tick * factor, ys[0]])[0];
      return [draw("path", { d: `M${x},${top}V${height - bottom}`, class: "st-cmp-grid" }), text(x, height - bottom + 17, Studio.number(tick), { "text-anchor": "middle" })];
    }), ...ticks(...ys).flatMap((tick) => {
      const y = place([0, xs[0] * factor, tick])[1];
      return [draw("path", { d: `M${left},${y}H${width - right}`, class: "st-cmp-grid" }), text(left - 8, y + 4, Studio.number(tick), { "text-anchor": "end" })];
    })];
    const front = points.filter((point) => point[3]).map(place).sort((a, b) => a[0] - b[0]);
    const dots = points.flatMap((point) => {
      const [x, y] = place(point);
      const isRight = x > width * 0.62;
      const colour = `var(${styles.get(point[0])?.colour ?? "--st-mute"})`;
      return [draw("circle", { cx: x, cy: y, r: 6, "stroke-width": 2, style: `stroke: ${colour}; fill: ${point[3] ? colour : "var(--st-card)"}` }),
        text(x + (isRight ? -10 : 10), y - 9, point[0].length > 30 ? `${point[0].slice(0, 29)}…` : point[0], { "text-anchor": isRight ? "end" : "start", class: "st-cmp-name" })];
    });
    return draw("svg", { viewBox: `0 0 ${width} ${height}`, class: "st-cmp-scatter", role: "img", "aria-label": label }, grid,
      draw("polyline", { points: front.map((point) => point.join(",")).join(" "), class: "st-cmp-front" }), dots,
      text((left + width - right) / 2, height - 6, axis, { "text-anchor": "middle" }),
      draw("text", { transform: `translate(13,${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, quality));
  }

  function span(values) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const spread = high - low || Math.abs(high) * 0.1 || 1;
    return [low - spread * 0.18 < 0 && low >= 0 ? 0 : low - spread * 0.18, high + spread * 0.18];
  }

  /** Round numbers between two ends. */
  function ticks(low, high) {
    const rough = (high - low) / 5;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const gap = [1, 2, 5, 10].map((factor) => factor * unit).find((step) => step >= rough * 0.999);
    const found = [];
    for (let count = Math.ceil(low / gap - 1e-9); count * gap <= high + gap * 1e-9; count += 1) found.push(Number((count * gap).toPrecision(12)));
    return found;
  }
})();
