// Samples as a matrix of prompts and steps, the base model first; any picture opens large beside its base.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;

  Studio.Samples = class {
    constructor() {
      this.shots = []; // {step, cells: [[prompt, file, seed]], at}
      this.folder = "";
      this.box = h("div", { class: "st-matrix", tabindex: "0", role: "region", "aria-label": "Samples by prompt and step" });
      this.empty = h("p", { class: "st-empty" }, "Pictures appear here as they are drawn (sample.every in the preset), or with “Sample now”.");
      this.element = h("section", { class: "st-card", "aria-label": "Samples" },
        h("header", {}, h("h3", {}, "Samples"), Studio.helpOn("samples")), this.empty, this.box);
      this.viewer = new Studio.SampleViewer(this);
      this.element.append(this.viewer.element);
    }

    clear() { this.shots = []; this.draw(); }

    rewind(step) {
      this.shots = this.shots.filter((shot) => shot.step <= step);
      this.draw();
    }

    add(shots) {
      this.shots.push(...shots);
      this.draw();
    }

    /** Steps as columns, a row for each prompt and seed; of two pictures for one cell the later counts. */
    draw() {
      this.steps = [...new Set(this.shots.map((shot) => shot.step))].sort((a, b) => a - b);
      this.rows = new Map(); // seed and prompt -> prompt
      this.cells = new Map();
      for (const shot of this.shots) {
        for (const [prompt, file, seed] of shot.cells) {
          const row = `${seed}\n${prompt}`;
          this.rows.set(row, prompt);
          this.cells.set(`${shot.step}\n${row}`, { url: `${Studio.fileUrl(`${this.folder}/${file}`)}?at=${shot.at ?? 0}`, seed });
        }
      }
      const wasAtEnd = !this.box.clientWidth || this.box.scrollLeft + this.box.clientWidth >= this.box.scrollWidth - 8;
      this.empty.hidden = this.steps.length > 0;
      this.box.hidden = this.steps.length === 0;
      this.box.replaceChildren(this.steps.length ? this.table() : "");
      if (wasAtEnd) requestAnimationFrame(() => { this.box.scrollLeft = this.box.scrollWidth; }); // it may not be shown yet
    }

    table() {
      const heads = this.steps.map((step) => h("th", { scope: "col" }, this.nameOf(step)));
      const rows = [...this.rows].map(([row, prompt]) => h("tr", {}, h("th", { scope: "row", title: prompt }, h("span", {}, prompt)),
        this.steps.map((step) => h("td", {}, this.picture(row, step)))));
      return h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Prompt"), heads)), h("tbody", {}, rows));
    }

    picture(row, step) {
      const cell = this.cell(row, step);
      if (!cell) return h("span", { class: "st-small" }, "–");
      const name = `${this.nameOf(step)}: ${this.rows.get(row)}`;
      return h("button", { type: "button", class: "st-shot", "aria-label": `Enlarge ${name}`, onclick: () => this.viewer.open(row, step) },
        h("img", { src: cell.url, alt: name, loading: "lazy", decoding: "async", onerror: (event) => event.target.replaceWith(
          h("span", { class: "st-small" }, "not there any more")) }));
    }

    cell(row, step) { return this.cells.get(`${step}\n${row}`); }

    nameOf(step) { return step === 0 ? "Base model" : `Step ${step}`; }
  };
})();
