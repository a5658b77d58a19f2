// Samples as a matrix of prompts and steps, the base model first; any picture opens large beside its base.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const HELP = "The same prompts with the same seeds at different steps, so that what changes is the adapter alone. "
    + "The first column is the base model.\nGood: the style comes in while the subject of the prompt stays. When all "
    + "pictures begin to look alike or like a training image, it is trained too far.";

  Studio.Samples = class {
    constructor() {
      this.shots = []; // {step, cells: [[prompt, file, seed]], at}
      this.folder = "";
      this.box = h("div", { class: "st-matrix", tabindex: "0", role: "region", "aria-label": "Samples by prompt and step" });
      this.empty = h("p", { class: "st-empty" }, "Pictures appear here as they are drawn (sample.every in the preset), or with “Sample now”.");
      this.element = h("section", { class: "st-card", "aria-label": "Samples" },
        h("header", {}, h("h3", {}, "Samples"), Studio.help("this matrix", HELP)), this.empty, this.box);
      this.viewer = new Viewer(this);
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
      const wasAtEnd = this.box.scrollLeft + this.box.clientWidth >= this.box.scrollWidth - 8;
      this.empty.hidden = this.steps.length > 0;
      this.box.hidden = this.steps.length === 0;
      this.box.replaceChildren(this.steps.length ? this.table() : "");
      if (wasAtEnd) this.box.scrollLeft = this.box.scrollWidth;
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

  /** The picture large, beside the base model's; arrows go through steps and prompts. */
  class Viewer {
    constructor(samples) {
      this.samples = samples;
      this.pictures = h("div", { class: "st-pair" });
      this.caption = h("p", { class: "st-caption", "aria-live": "polite" });
      const button = (label, text, dx, dy) => h("button", { type: "button", class: "st-button", "aria-label": label, onclick: () => this.go(dx, dy) }, text);
      this.element = h("dialog", { class: "st-viewer", "aria-label": "Sample", onkeydown: (event) => this.onkey(event),
        onclick: (event) => event.target === this.element && this.element.close() },
      this.pictures, this.caption, h("div", { class: "st-row" }, button("Earlier step", "← Earlier", -1, 0), button("Later step", "Later →", 1, 0),
        button("Prompt above", "↑ Prompt", 0, -1), button("Prompt below", "↓ Prompt", 0, 1), h("span", { class: "st-space" }),
        h("button", { type: "button", class: "st-button", onclick: () => this.element.close() }, "Close")));
    }

    open(row, step) {
      this.show(row, step);
      this.element.showModal();
    }

    show(row, step) {
      Object.assign(this, { row, step });
      const { samples } = this;
      const prompt = samples.rows.get(row);
      const steps = samples.steps.includes(0) && step !== 0 && samples.cell(row, 0) ? [0, step] : [step];
      this.pictures.replaceChildren(...steps.map((at) => h("figure", {},
        h("img", { src: samples.cell(row, at).url, alt: `${samples.nameOf(at)}: ${prompt}` }), h("figcaption", {}, samples.nameOf(at)))));
      const seed = samples.cell(row, step).seed;
      this.caption.textContent = `${prompt} · ${samples.nameOf(step)}${Number.isFinite(seed) ? ` · seed ${seed}` : ""}`;
    }

    /** To the next step or prompt that has a picture. */
    go(dx, dy) {
      const { steps } = this.samples;
      const rows = [...this.samples.rows.keys()];
      let x = steps.indexOf(this.step);
      let y = rows.indexOf(this.row);
      do {
        x += dx;
        y += dy;
        if (this.samples.cell(rows[y], steps[x])) { this.show(rows[y], steps[x]); return; }
      } while (x >= 0 && y >= 0 && x < steps.length && y < rows.length);
    }

    onkey(event) {
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      if (!moves[event.key]) return;
      event.preventDefault();
      this.go(...moves[event.key]);
    }
  }
})();
