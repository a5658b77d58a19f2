// "Try it": a prompt drawn with a LoRA at any strength, and without it beside it. The model stays loaded meanwhile.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const PAUSE = 300; // milliseconds between two looks
  const NO_BASE = "No base model for this LoRA was found. Start the app with --models and the folder of your base models, or train with one first.";

  Studio.TryOut = class {
    constructor(server) {
      Object.assign(this, { server, asked: 0, task: null, hasDrawn: false });
      this.files = new Studio.FileChoice("LoRA", (id) => this.look(id));
      this.base = new Studio.BaseChoice("Base model");
      this.prompt = h("textarea", { rows: "2", maxlength: "10000", spellcheck: "true" });
      this.negative = Studio.input("", { maxlength: "10000" });
      this.strength = h("input", { type: "range", min: "0", max: "1.5", step: "0.05", oninput: () => this.showStrength(), onchange: () => this.hasDrawn && this.draw() });
      this.strength.value = "1";
      this.amount = h("output", { class: "st-try-amount" });
      this.seed = Studio.input("1", { inputmode: "numeric" });
      this.steps = Studio.input("", { inputmode: "numeric", placeholder: "usual" });
      this.guidance = Studio.input("", { inputmode: "decimal", placeholder: "usual" });
      this.width = Studio.input("", { inputmode: "numeric", placeholder: "as trained" });
      this.height = Studio.input("", { inputmode: "numeric", placeholder: "as trained" });
      this.without = h("input", { type: "checkbox", checked: true, id: "studio-try-without" });
      this.go = h("button", { type: "submit", class: "st-button st-primary", disabled: true }, "Draw");
      this.away = h("button", { type: "button", class: "st-button st-quiet", hidden: true, onclick: () => this.putAway() }, "Put the model away");
      this.text = h("p", { role: "status", class: "st-small" });
      this.bar = h("progress", { "aria-label": "Steps drawn", hidden: true });
      this.said = h("p", { class: "st-warn", role: "alert" });
      this.notes = h("div", {});
      this.pictures = h("div", { class: "st-try-pictures", hidden: true });
      this.element = h("form", { class: "st-card st-try", "aria-label": "Try it", onsubmit: (event) => { event.preventDefault(); this.draw(); } },
        h("h3", {}, "Try it"), h("p", { class: "st-small" }, "Draw with a LoRA before you use it elsewhere. The base model stays loaded for ten minutes, so another strength takes no loading."),
        this.fields(), this.said, this.text, this.bar, this.pictures, this.notes);
      this.showStrength();
    }

    fields() {
      const slider = Studio.field("Strength", this.strength);
      slider.querySelector("label").append(" ", this.amount);
      const more = h("details", {}, h("summary", {}, "Negative prompt, steps, guidance, size"),
        h("div", { class: "st-form" }, Studio.field("Negative prompt", this.negative), Studio.field("Steps", this.steps), Studio.field("Guidance", this.guidance), Studio.field("Width", this.width), Studio.field("Height", this.height)));
      return h("div", { class: "st-tool-fields" }, this.files.element, this.base.element, Studio.field("Prompt", this.prompt),
        h("div", { class: "st-form" }, slider, Studio.field("Seed", this.seed)),
        h("div", { class: "st-field st-kind-bool" }, this.without, h("label", { for: "studio-try-without" }, "The base model's own picture beside it")),
        more, h("div", { class: "st-row" }, this.go, this.away));
    }

    offer(sources) { this.files.offer(sources); }

    showStrength() {
      this.amount.textContent = Number(this.strength.value).toFixed(2);
      this.strength.setAttribute("aria-valuetext", this.amount.textContent);
    }

    /** What the file's run drew with; a prompt that was typed stays. */
    async look(id) {
      this.said.textContent = "";
      this.go.disabled = true; // until the base models are known
      try {
        const about = await Studio.ask(this.server, "about_try", { id });
        if (this.files.value !== id) return;
        this.base.offer(about.bases);
        if (about.base) this.base.select.value = about.base;
        if (!this.prompt.value || this.prompt.value === this.offered) this.prompt.value = about.prompt;
        this.offered = about.prompt;
        this.negative.value = about.negative;
        this.seed.value = about.seed;
        for (const name of ["steps", "guidance", "width", "height"]) this[name].value = about[name] || "";
        if (!about.bases.length) this.said.textContent = NO_BASE;
        this.go.disabled = !about.bases.length;
      } catch (error) {
        if (this.files.value === id) this.said.textContent = error.message;
      }
    }

    request() {
      const number = (label, input, most, least = 0) => {
        const value = Number(input.value.trim() || 0);
        if (!(Number.isInteger(value) && value >= least && value <= most)) throw new Error(`${label}: give a whole number up to ${most}.`);
        return value;
      };
      const guidance = this.guidance.value.trim() ? Number(this.guidance.value) : null;
      if (guidance !== null && !(guidance >= 0 && guidance <= 50)) throw new Error("Guidance: give a number from 0 to 50, or leave it empty.");
      return { id: this.files.value, base: this.base.value, prompt: this.prompt.value, negative: this.negative.value, strength: Number(this.strength.value), seed: number("Seed", this.seed, 4294967295),
        steps: number("Steps", this.steps, 200), guidance, width: number("Width", this.width, 4096), height: number("Height", this.height, 4096), without: this.without.checked };
    }

    async draw(again = false) {
      const turn = this.asked += 1;
      this.said.textContent = "";
      try {
        const request = this.request();
        const posted = await Studio.ask(this.server, "draw_try", request);
        this.task = posted.task;
        this.away.hidden = false;
        this.show("Starting…");
        const end = await this.follow(turn, posted);
        if (!end) return;
        if (end.word === "ended" && !again) { await this.draw(true); return; }
        this.hide();
        if (end.word === "done") this.finish(end, request);
        else this.said.textContent = end.text;
      } catch (error) {
        if (turn !== this.asked) return;
        this.hide();
        this.said.textContent = error.message;
      }
    }

    /** How a request ends; null when a newer one was made meanwhile. */
    follow(turn, { task, request }) {
      return Studio.watch(() => Studio.ask(this.server, "read_try", { task, request }), (answer) => {
        if (turn !== this.asked) return null;
        if (["done", "failed", "ended"].includes(answer.word)) return answer;
        this.show(answer.of ? `${sentence(answer.text)}: step ${answer.done} of ${answer.of}` : `${sentence(answer.text)}…`, answer);
        return undefined;
      }, PAUSE);
    }

    show(text, { done = 0, of = 0 } = {}) {
      this.text.textContent = text;
      this.bar.hidden = false;
      if (of) Object.assign(this.bar, { max: of, value: done });
      else this.bar.removeAttribute("value");
    }

    hide() {
      this.text.textContent = "";
      this.bar.hidden = true;
    }

    finish({ pictures, notes, seconds }, { strength, prompt }) {
      this.hasDrawn = true;
      const shown = [["with", `With it, strength ${strength.toFixed(2)}`], ["without", "Without it"]].filter(([kind]) => pictures[kind]);
      this.pictures.hidden = false;
      this.pictures.replaceChildren(...shown.map(([kind, label]) => picture(pictures[kind], label, prompt)));
      this.text.textContent = `Drawn in ${Studio.duration(seconds)}.`;
      this.notes.replaceChildren(...notes.map((text) => h("p", { class: "st-small" }, `${sentence(text)}.`)));
    }

    async putAway() {
      this.asked += 1;
      this.hide();
      try {
        await Studio.ask(this.server, "stop_try", { task: this.task });
        this.away.hidden = true;
        this.text.textContent = "The model was put away; its memory is free.";
      } catch (error) {
        this.said.textContent = error.message;
      }
    }
  };

  function picture(path, label, prompt) {
    const url = Studio.fileUrl(path);
    return h("figure", {}, h("img", { src: url, alt: `${label}: ${prompt}` }), h("figcaption", {}, h("span", {}, label), h("a", { class: "st-button st-quiet", href: url, download: path.split("/").at(-1), "aria-label": `Save the picture: ${label}` }, "Save")));
  }

  function sentence(text) { return `${text[0].toUpperCase()}${text.slice(1)}`; }
})();
