// The workshop's tools that need base models: a LoRA put into one for good, and one taken out of two.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const NONE = "No base model was found. Start the app with --models and the folder of your base models, or train with one first.";

  /** A list of base models; what is not on this machine, or not whole enough, cannot be chosen. */
  Studio.BaseChoice = class {
    constructor(label, help = "", changed = () => {}) {
      this.select = h("select", { onchange: changed });
      this.element = Studio.field(label, this.select, help);
    }

    get value() { return this.select.value; }

    get chosen() { return this.bases?.find(({ id }) => id === this.value) ?? null; }

    offer(bases, empty = "") {
      const before = this.value;
      this.bases = bases.filter(({ here }) => here);
      const label = (base) => `${base.label}, ${Studio.bytes(base.bytes)}`;
      this.select.replaceChildren(...(empty ? [h("option", { value: "" }, empty)] : []), ...this.bases.map((base) => h("option", { value: base.id }, label(base))));
      if (this.bases.some(({ id }) => id === before)) this.select.value = before;
    }

    choose(base) { this.select.value = base.id; }
  };

  /** A tool with base models, which are looked for when it is opened. */
  class BaseTool extends Studio.ExportTool {
    async opened() {
      try {
        const { bases, free } = await Studio.ask(this.page.server, "list_bases");
        this.free = free;
        const count = new Set(bases.filter(({ here }) => here).map(({ place }) => place)).size; // several runs may name one base
        this.said.textContent = count === 0 ? NONE : count < this.least ? "This takes two base models, and only one was found. Start the app with --models and the folder of the other." : "";
        this.go.disabled = count < this.least;
        this.offerBases(bases);
        this.showRoom();
      } catch (error) {
        this.said.textContent = error.message;
      }
    }

    get least() { return 1; } // base models

    showRoom() {}
  }

  Studio.BakeTool = class extends BaseTool {
    constructor(page) {
      super(page, "Put into a base", "A base model with LoRAs in it for good, in its own layout. It then needs no LoRA in any program.", "Write the model");
      this.base = new Studio.BaseChoice("Base model", "", () => this.showRoom());
      this.file = new Studio.WeightedFiles();
      this.file.add();
      this.room = h("p", { class: "st-small" });
      this.name.value = "baked";
      this.fields.append(this.base.element, this.file.element, this.fileButtons(1), Studio.field("Name of the new model", this.name), this.room);
    }

    offerBases(bases) { this.base.offer(bases); }

    showRoom() {
      const size = this.base.chosen?.bytes;
      if (!size) { this.room.textContent = ""; return; }
      const lacks = size > this.free;
      this.room.textContent = `It takes ${Studio.bytes(size)}; ${Studio.bytes(this.free)} are free.${lacks ? " Make room on the disk first." : ""}`;
      this.room.classList.toggle("st-warn", lacks);
      this.go.disabled = lacks;
    }

    start() {
      return this.attempt(() => this.run("start_bake", { ...this.file.request(), base: this.base.value, name: this.name.value }));
    }
  };

  Studio.ExtractTool = class extends BaseTool {
    constructor(page) {
      super(page, "Extract", "A LoRA of the difference between two base models of one family: what a fine-tuned one changed. Large models take some minutes.", "Extract");
      this.before = new Studio.BaseChoice("Before", "", () => this.part());
      this.after = new Studio.BaseChoice("After");
      this.rank = Studio.input("16", { inputmode: "numeric" });
      this.share = Studio.input("100", { inputmode: "decimal" });
      this.name.value = "extracted";
      this.file = null;
      this.fields.append(h("div", { class: "st-form" }, this.before.element, this.after.element, Studio.field("Rank", this.rank), Studio.field("Keep, in percent", this.share, "Fewer ranks where this much of a layer's change needs no more.")), this.written());
    }

    offer() {}

    offerBases(bases) {
      this.before.offer(bases);
      this.after.offer(bases);
      this.part();
    }

    /** "After" is another base than "Before", of its family if there is one. */
    part() {
      const before = this.before.chosen;
      if (!before || this.after.chosen.place !== before.place) return;
      const others = this.after.bases.filter(({ place }) => place !== before.place);
      const other = others.find(({ family }) => family === before.family) ?? others[0];
      if (other) this.after.choose(other);
    }

    get least() { return 2; }

    start() {
      return this.attempt(() => {
        const rank = Number(this.rank.value);
        const share = Number(this.share.value) / 100;
        if (!(Number.isInteger(rank) && rank >= 1 && rank <= 4096)) throw new Error("Rank: give a whole number from 1 on.");
        if (!(share > 0 && share <= 1)) throw new Error("Keep: give a number above 0 and up to 100.");
        const { dtype, name, no_paths } = this.writing();
        return this.run("start_extract", { base: this.before.value, tuned: this.after.value, rank, share, dtype, name, no_paths });
      });
    }
  };
})();
