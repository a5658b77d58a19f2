// One sample large, over the same prompt's picture of another step: a slider uncovers one or the other.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;

  Studio.SampleViewer = class {
    constructor(samples) {
      this.samples = samples;
      this.against = 0; // the step that it is compared with; null: none
      this.under = h("img", { class: "st-under", draggable: "false" });
      this.over = h("img", { class: "st-over", draggable: "false" });
      this.left = h("span", { class: "st-side st-side-left" });
      this.right = h("span", { class: "st-side st-side-right" });
      this.edge = h("span", { class: "st-edge", "aria-hidden": "true" });
      this.stage = h("div", { class: "st-compare", onpointerdown: (event) => this.grab(event), onpointermove: (event) => event.buttons && this.grab(event) }, this.under, this.over, this.edge, this.left, this.right);
      this.slider = h("input", { type: "range", min: "0", max: "100", step: "1", value: "50", id: "studio-compare", oninput: () => this.slide() });
      this.choice = h("select", { id: "studio-against", onchange: () => { this.against = this.choice.value === "" ? null : Number(this.choice.value); this.show(this.row, this.step); } });
      this.caption = h("p", { class: "st-caption", "aria-live": "polite" });
      const button = (label, text, dx, dy) => h("button", { type: "button", class: "st-button", autofocus: label === "Earlier step", "aria-label": label, onclick: () => this.go(dx, dy) }, text);
      this.sliding = h("div", { class: "st-row st-sliding" }, h("label", { for: "studio-compare", class: "st-small" }, "Uncover"), this.slider);
      this.element = h("dialog", { class: "st-viewer", "aria-label": "Sample", onkeydown: (event) => this.onkey(event),
        onclick: (event) => event.target === this.element && this.element.close() },
      this.stage, this.sliding, this.caption, h("div", { class: "st-row" }, button("Earlier step", "← Earlier", -1, 0), button("Later step", "Later →", 1, 0),
        button("Prompt above", "↑ Prompt", 0, -1), button("Prompt below", "↓ Prompt", 0, 1), h("span", { class: "st-space" }),
        h("span", { class: "st-row st-against" }, h("label", { for: "studio-against", class: "st-small" }, "Compare with"), this.choice), h("button", { type: "button", class: "st-button", onclick: () => this.element.close() }, "Close")));
    }

    open(row, step) {
      this.show(row, step);
      this.element.showModal();
    }

    show(row, step) {
      Object.assign(this, { row, step });
      const { samples } = this;
      const prompt = samples.rows.get(row);
      const others = samples.steps.filter((at) => at !== step && samples.cell(row, at));
      this.choice.replaceChildren(...others.map((at) => h("option", { value: at }, samples.nameOf(at))), h("option", { value: "" }, "Nothing"));
      const against = others.includes(this.against) ? this.against : null;
      this.choice.value = against ?? "";
      this.choice.disabled = others.length === 0;
      this.picture(this.under, row, step);
      this.over.hidden = this.edge.hidden = this.sliding.hidden = this.left.hidden = this.right.hidden = against === null;
      if (against === null) this.over.removeAttribute("src");
      else this.picture(this.over, row, against);
      this.left.textContent = against === null ? "" : samples.nameOf(against);
      this.right.textContent = samples.nameOf(step);
      const { seed } = samples.cell(row, step);
      this.caption.textContent = `${prompt} · ${samples.nameOf(step)}${Number.isFinite(seed) ? ` · seed ${seed}` : ""}`;
      this.slide();
    }

    picture(image, row, step) {
      image.src = this.samples.cell(row, step).url;
      image.alt = `${this.samples.nameOf(step)}: ${this.samples.rows.get(row)}`;
    }

    /** Left of the edge is the other step's picture, right of it the one that was opened. */
    slide() {
      const share = Number(this.slider.value);
      this.over.style.clipPath = `inset(0 ${100 - share}% 0 0)`;
      this.edge.style.left = `${share}%`;
      this.slider.setAttribute("aria-valuetext", `${share} % of ${this.left.textContent}, ${100 - share} % of ${this.right.textContent}`);
    }

    grab(event) {
      if (this.over.hidden) return;
      event.preventDefault();
      const { left, width } = this.stage.getBoundingClientRect();
      this.slider.value = String(Math.round((100 * (event.clientX - left)) / width));
      this.slide();
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

    /** Arrows go through steps and prompts; on the slider and the list they are theirs. */
    onkey(event) {
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      if (!moves[event.key] || event.target === this.slider || event.target === this.choice) return;
      event.preventDefault();
      this.go(...moves[event.key]);
    }
  };
})();
