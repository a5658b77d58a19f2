// The workshop for LoRA files: other formats, other ranks, several merged into one, two compared.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const WORDS = { U1: "U1: kohya's, usual for SD 1.5", U2: "U2: kohya's with Stability's names, usual for SDXL", F1: "F1: diffusers', usual for Flux",
    F5: "F5: kohya's for Flux", F6: "F6: ComfyUI's own for Flux" };
  const MOST = 8;

  Studio.ExportTools = class {
    constructor(page) {
      this.page = page;
      this.tools = [new Convert(page), new Resize(page), new Merge(page), new Compare(page), new Studio.BakeTool(page), new Studio.ExtractTool(page)];
      this.buttons = this.tools.map((tool) => h("button", { type: "button", class: "st-button", "aria-expanded": "false", "aria-controls": "studio-workshop", onclick: () => this.open(tool) }, tool.title));
      this.body = h("div", { id: "studio-workshop" });
      this.element = h("section", { class: "st-card st-workshop", "aria-label": "Workshop" }, h("h3", {}, "Workshop"),
        h("p", { class: "st-small" }, "Tools for any LoRA of SD 1.5, SDXL, Flux.1 or Flux.2, whoever made it. The original file stays as it is."),
        h("div", { class: "st-row st-tools" }, this.buttons), this.body);
    }

    open(tool) {
      const isShut = this.current === tool;
      this.current = isShut ? null : tool;
      this.buttons.forEach((button, index) => button.setAttribute("aria-expanded", String(this.tools[index] === this.current)));
      this.body.replaceChildren(...(isShut ? [] : [tool.element]));
      if (!isShut) tool.opened();
    }

    offer(sources) {
      this.sources = sources;
      for (const tool of this.tools) tool.offer(sources);
    }
  };

  /** A form that starts a tool; what comes of it is a card beside the other results. */
  const Tool = Studio.ExportTool = class {
    constructor(page, title, words, button) {
      Object.assign(this, { page, title });
      this.said = h("p", { class: "st-warn", role: "alert" });
      this.name = Studio.input("", { maxlength: "100" });
      this.dtype = Studio.dtypeChoice();
      this.paths = new Studio.PathsChoice(`studio-${title.toLowerCase()}-paths`);
      this.fields = h("div", { class: "st-tool-fields" });
      this.go = h("button", { type: "submit", class: "st-button st-primary" }, button);
      this.element = h("form", { class: "st-tool", "aria-label": title, onsubmit: (event) => { event.preventDefault(); this.start(); } }, h("p", {}, words), this.fields, this.said, h("div", { class: "st-row" }, this.go));
    }

    offer(sources) { this.file.offer(sources); }

    written() { return h("div", { class: "st-form" }, Studio.field("Precision", this.dtype), Studio.field("Name of the new file", this.name), this.paths.element); }

    /** What the server takes of the fields of `written`. */
    writing() { return { dtype: this.dtype.value, name: this.name.value, no_paths: this.paths.value }; }

    async run(name, request) {
      this.go.disabled = true;
      await this.page.run(name, request, "", this.said, "");
      this.go.disabled = false;
    }

    /** A file's kind and a free name for what is made of it. */
    async look(id, ending) {
      const asked = this.asked = id;
      try {
        const found = await Studio.ask(this.page.server, "look_at", { id });
        if (asked !== this.asked) return null;
        this.name.value = `${found.stem}${ending}`;
        this.said.textContent = "";
        return found;
      } catch (error) {
        if (asked === this.asked) this.said.textContent = error.message;
        return null;
      }
    }

    /** When its form is shown. */
    opened() {}

    /** Buttons for more and fewer files. */
    fileButtons(least) {
      const show = () => {
        more.disabled = this.file.rows.length >= MOST;
        less.hidden = this.file.rows.length <= least;
      };
      const change = (work) => () => { work(); show(); };
      const more = h("button", { type: "button", class: "st-button", onclick: change(() => this.file.add()) }, "One more file");
      const less = h("button", { type: "button", class: "st-button st-quiet", onclick: change(() => this.file.drop()) }, "One less");
      show();
      return h("div", { class: "st-row" }, more, less);
    }

    /** Start; what is wrong with the form is said. */
    attempt(work) {
      try {
        return work();
      } catch (error) {
        this.said.textContent = error.message;
        return null;
      }
    }
  };

  class Convert extends Tool {
    constructor(page) {
      super(page, "Convert", "The same change of every layer, under the names of another format.", "Convert");
      this.format = Studio.select([], "", { onchange: () => { this.name.value = `${this.stem}-${this.format.value}`; } });
      this.file = new Studio.FileChoice("File", async (id) => {
        const found = await this.look(id, "");
        if (!found) return;
        this.stem = found.stem;
        this.format.replaceChildren(...found.formats.map((name) => h("option", { value: name, disabled: name === found.format }, WORDS[name] + (name === found.format ? " (it has that)" : ""))));
        this.format.value = found.formats.find((name) => name !== found.format) ?? found.formats[0];
        this.name.value = `${this.stem}-${this.format.value}`;
      });
      this.fields.append(this.file.element, Studio.field("Format", this.format), this.written());
    }

    start() {
      return this.run("start_export", { id: this.file.value, format: this.format.value, ...this.writing() });
    }
  }

  class Resize extends Tool {
    constructor(page) {
      super(page, "Resize", "A smaller file: the nearest change that has a lower rank, and what is lost by it.", "Resize");
      this.file = new Studio.FileChoice("File", (id) => this.look(id, "-small"));
      this.how = Studio.select([["rank", "To a rank"], ["energy", "To one rank that keeps a share"], ["dynamic", "To each layer's own rank that keeps a share"]], "rank", { onchange: () => this.showHow() });
      this.rank = Studio.input("8", { inputmode: "numeric" });
      this.share = Studio.input("98", { inputmode: "decimal" });
      this.rankField = Studio.field("Rank", this.rank);
      this.shareField = Studio.field("Keep, in percent", this.share, "Of the change's squared norm.");
      this.warning = h("p", { class: "st-small" }, "The smallest file; but versions of diffusers before 0.40 misread files of several ranks.");
      this.fields.append(this.file.element, h("div", { class: "st-form" }, Studio.field("How", this.how), this.rankField, this.shareField), this.warning, this.written());
      this.showHow();
    }

    showHow() {
      this.rankField.hidden = this.how.value !== "rank";
      this.shareField.hidden = this.how.value === "rank";
      this.warning.hidden = this.how.value !== "dynamic";
    }

    start() {
      const how = this.how.value;
      const rank = Number(this.rank.value);
      const share = Number(this.share.value) / 100;
      if (how === "rank" && !(Number.isInteger(rank) && rank >= 1 && rank <= 4096)) { this.said.textContent = "Rank: give a whole number from 1 on."; return null; }
      if (how !== "rank" && !(share > 0 && share <= 1)) { this.said.textContent = "Keep: give a number above 0 and up to 100."; return null; }
      return this.run("start_resize", { id: this.file.value, how, ...(how === "rank" ? { rank } : { share }), ...this.writing() });
    }
  }

  /** A list of files, each with its weight. */
  const WeightedFiles = Studio.WeightedFiles = class {
    constructor() {
      this.rows = [];
      this.element = h("div", { class: "st-weighted" });
    }

    add() {
      const row = { file: new Studio.FileChoice(`File ${this.rows.length + 1}`), weight: Studio.input("1", { inputmode: "decimal" }) };
      row.element = h("div", { class: "st-weighted-row" }, row.file.element, Studio.field(`Weight ${this.rows.length + 1}`, row.weight));
      this.rows.push(row);
      this.element.append(row.element);
      if (this.sources) this.fill(row.file);
    }

    /** Each file begins with another one than those above it. */
    fill(file) {
      const isNew = !file.value;
      file.offer(this.sources);
      if (isNew) file.choose(this.rows.findIndex((row) => row.file === file));
    }

    drop() { this.rows.pop().element.remove(); }

    offer(sources) {
      this.sources = sources;
      for (const { file } of this.rows) this.fill(file);
    }

    /** What the server takes; a weight that is none throws a sentence. */
    request() {
      const weights = this.rows.map(({ weight }) => Number(weight.value.trim() || "?"));
      const wrong = weights.findIndex((weight) => !(Math.abs(weight) <= 100));
      if (wrong >= 0) throw new Error(`Weight ${wrong + 1}: give a number, such as 0.8.`);
      return { ids: this.rows.map(({ file }) => file.value), weights };
    }
  };

  class Merge extends Tool {
    constructor(page) {
      super(page, "Merge", "Several LoRAs of one family as one file. Exactly, their ranks add up; at a lower rank it is the nearest to their sum.", "Merge");
      this.file = new WeightedFiles();
      this.file.add();
      this.file.add();
      this.rank = Studio.input("", { inputmode: "numeric", placeholder: "exact" });
      this.name.value = "merged";
      this.fields.append(this.file.element, this.fileButtons(2), h("div", { class: "st-form" }, Studio.field("Rank", this.rank, "Empty: exactly, at the sum of the ranks.")), this.written());
    }

    start() {
      return this.attempt(() => {
        const rank = this.rank.value.trim() ? Number(this.rank.value) : null;
        if (rank !== null && !(Number.isInteger(rank) && rank >= 1 && rank <= 4096)) throw new Error("Rank: give a whole number from 1 on, or leave it empty.");
        return this.run("start_merge", { ...this.file.request(), rank, ...this.writing() });
      });
    }
  }

  class Compare extends Tool {
    constructor(page) {
      super(page, "Compare", "Whether two LoRAs change the same layers in the same directions, and what becomes of them together.", "Compare");
      this.file = new WeightedFiles();
      this.file.add();
      this.file.add();
      this.fields.append(this.file.element);
    }

    start() { return this.attempt(() => this.run("start_comparison", this.file.request())); }
  }
})();
