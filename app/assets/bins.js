// Training loss by noise level: ten bars for the newest part of the run, with marks for its beginning.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h, number } = Studio;
  const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [400, 210, 46, 24, 8];
  const SLOT = (WIDTH - LEFT) / 10;

  /** An element of a drawing. */
  Studio.svg = (tag, attributes = {}, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const { svg } = Studio;

  Studio.BinsPanel = class {
    constructor() {
      const slots = Array.from({ length: 10 }, (_, bin) => LEFT + bin * SLOT);
      this.bars = slots.map((x) => svg("rect", { x: x + SLOT * 0.18, width: SLOT * 0.64, class: "st-bin" }));
      this.marks = slots.map((x) => svg("line", { x1: x + SLOT * 0.05, x2: x + SLOT * 0.95, class: "st-bin-first" }));
      this.ticks = [0, 1, 2].map(() => svg("g", {}, svg("line", { x1: LEFT, x2: WIDTH, class: "st-gridline" }), svg("text", { x: LEFT - 6, "text-anchor": "end" })));
      const names = slots.map((x, bin) => svg("text", { x: x + SLOT / 2, y: HEIGHT - 6, "text-anchor": "middle" }, String(bin / 10)));
      this.drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "st-drawing", role: "img" }, ...this.ticks, ...this.bars, ...this.marks, ...names);
      this.rows = h("tbody");
      this.said = h("p", { class: "st-facts" });
      this.numbers = h("details", { class: "st-small" }, h("summary", {}, "As numbers"), h("table", { class: "st-legend" },
        h("thead", {}, h("tr", {}, ["Noise", "Beginning", "Newest", "Change"].map((name) => h("th", { scope: "col" }, name)))), this.rows));
      this.key = h("p", { class: "st-row st-small" }, h("span", {}, h("i", { class: "st-key st-key-bar", "aria-hidden": "true" }), "newest tenth of the run"),
        h("span", {}, h("i", { class: "st-key st-dash", "aria-hidden": "true" }), "first tenth"));
      this.empty = h("p", { class: "st-empty" }, "Comes with the first measurement (log.rank_every in the preset).");
      this.element = h("section", { class: "st-card st-chart", "aria-label": "Training loss by noise level" },
        h("header", {}, h("h3", {}, "Training loss by noise level"), Studio.helpOn("bins")), this.empty, this.drawing, this.key, this.said, this.numbers);
      this.update({});
    }

    update(bins) {
      this.hasData = Boolean(bins.step?.length);
      this.empty.hidden = this.hasData;
      this.drawing.toggleAttribute("hidden", !this.hasData);
      for (const part of [this.key, this.said, this.numbers]) part.hidden = !this.hasData;
      if (!this.hasData) return;
      const { first, newest } = Studio.binMeans(bins);
      const most = Math.max(...first, ...newest, 1e-9) * 1.08;
      const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / most);
      this.ticks.forEach(({ firstChild, lastChild }, index) => {
        const value = (most * index) / 2.2;
        firstChild.setAttribute("y1", y(value));
        firstChild.setAttribute("y2", y(value));
        lastChild.setAttribute("y", y(value) + 4);
        lastChild.textContent = number(value, 2);
      });
      this.bars.forEach((bar, bin) => {
        const top = y(newest[bin] ?? 0);
        bar.setAttribute("y", top);
        bar.setAttribute("height", Math.max(0, y(0) - top));
      });
      this.marks.forEach((mark, bin) => {
        mark.setAttribute("visibility", first[bin] === null ? "hidden" : "visible");
        mark.setAttribute("y1", y(first[bin] ?? 0));
        mark.setAttribute("y2", y(first[bin] ?? 0));
      });
      this.tell(first, newest);
    }

    tell(first, newest) {
      const changes = first.map((value, bin) => (value && newest[bin] !== null ? newest[bin] / value - 1 : null));
      this.rows.replaceChildren(...first.map((value, bin) => h("tr", {}, h("th", { scope: "row" }, `${bin / 10} to ${(bin + 1) / 10}`),
        h("td", {}, number(value, 3)), h("td", {}, number(newest[bin], 3)), h("td", {}, percent(changes[bin])))));
      const said = [words("little noise (fine detail)", changes.slice(0, 3)), words("medium noise", changes.slice(3, 7)), words("much noise (layout)", changes.slice(7))].filter(Boolean);
      this.said.textContent = said.length ? `Since the beginning: ${said.join("; ")}.` : "";
      this.drawing.setAttribute("aria-label", `Training loss in ten noise levels, newest ${newest.map((value) => number(value, 2)).join(", ")}. ${this.said.textContent}`);
    }
  };

  function words(what, changes) {
    const known = changes.filter((change) => change !== null);
    return known.length ? `${what} ${percent(known.reduce((sum, change) => sum + change, 0) / known.length)}` : "";
  }

  function percent(change) {
    if (change === null) return "–";
    const rounded = Math.round(100 * change);
    return `${rounded > 0 ? "+" : rounded < 0 ? "−" : "±"}${Math.abs(rounded)} %`;
  }
})();
