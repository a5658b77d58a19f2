// The tab "Export": which LoRA, for which program, with which metadata; then what was made, and the workshop below.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const DTYPES = [["auto", "As it is"], ["fp16", "fp16: usual for SD 1.5 and SDXL"], ["bf16", "bf16: usual for Flux"], ["fp32", "fp32: twice the size"]];

  const USUAL = "The family's usual sizes";

  Studio.exports = (element, server) => {
    const page = new ExportPage(server);
    element.replaceChildren(page.element);
    Studio.poll(element, () => page.poll());
  };

  Studio.dtypeChoice = () => Studio.select(DTYPES, "auto");

  /** Whether the new file's metadata leave out the folders of this computer. */
  Studio.PathsChoice = class {
    constructor(id) {
      this.box = h("input", { type: "checkbox", checked: true, id });
      this.element = h("div", { class: "st-field st-kind-bool" }, this.box, h("label", { for: id }, "Leave out folders of this computer"));
    }

    get value() { return this.box.checked; }
  };

  class ExportPage {
    constructor(server) {
      Object.assign(this, { server, chosen: null, known: "", names: new Map() });
      this.files = new Studio.FileChoice("LoRA", (id) => this.look(id));
      this.facts = h("p", { class: "st-small st-export-facts" });
      this.target = h("div", { class: "st-targets", role: "radiogroup", "aria-label": "Program" });
      this.dtype = Studio.dtypeChoice();
      this.name = Studio.input("", { maxlength: "100" });
      this.titleText = Studio.input("", { maxlength: "200" });
      this.author = Studio.input("", { maxlength: "200" });
      this.triggers = Studio.input("", { maxlength: "400" });
      this.cover = Studio.select([["", "None"]], "", { onchange: () => this.showCover() });
      this.picture = h("img", { class: "st-cover", alt: "The cover", hidden: true });
      this.paths = new Studio.PathsChoice("studio-export-paths");
      this.start = h("button", { type: "submit", class: "st-button st-primary" }, "Export");
      this.check = h("button", { type: "button", class: "st-button", onclick: () => this.run("start_check", { id: this.chosen.id, base: this.base.value }) }, "Only check it");
      this.base = new Studio.BaseChoice("Check against", "For a file of another base than the family's usual ones.");
      this.said = h("p", { class: "st-warn", role: "alert" });
      this.results = h("div", { class: "st-results" }, this.hint = h("div", { class: "st-card st-empty" },
        "What is made appears here: which programs read all of it, the file to download, and how to use it."));
      this.plus = [];
      this.empty = h("div", { class: "st-card st-empty", hidden: true }, h("p", {}, "No LoRA file yet. Train one, add one, or start the app with --root and the folder of your LoRA files."), this.adding(), this.wrong = h("p", { class: "st-warn", role: "alert" }));
      this.tools = new Studio.ExportTools(this);
      this.trying = new Studio.TryOut(server);
      this.desk = h("div", { class: "st-columns" }, h("div", { class: "st-export-side" }, this.form(), this.tools.element), h("div", { class: "st-export-side" }, this.trying.element, this.results));
      this.element = h("div", { class: "st-exports" }, this.empty, this.desk);
    }

    form() {
      this.checking = h("details", { ontoggle: (event) => event.target.open && this.offerBases() }, h("summary", {}, "Check against a base model"),
        h("div", { class: "st-form" }, this.base.element));
      const more = h("details", {}, h("summary", {}, "Title, author, trigger words, cover"),
        h("div", { class: "st-form" }, Studio.field("Title", this.titleText), Studio.field("Author", this.author),
          Studio.field("Trigger words", this.triggers, "Parted by commas."), h("div", { class: "st-cover-field" }, Studio.field("Cover", this.cover, "A small copy goes into the file."), this.picture),
          this.paths.element));
      return h("form", { class: "st-card st-export-form", "aria-label": "Export", onsubmit: (event) => { event.preventDefault(); this.export(); } },
        h("div", { class: "st-row" }, h("h3", {}, "A LoRA for a program"), h("span", { class: "st-space" }), this.adding()), this.files.element, this.facts,
        h("div", { class: "st-field" }, h("span", { class: "st-label" }, "Program"), this.target),
        h("div", { class: "st-form" }, Studio.field("Precision", this.dtype), Studio.field("Name of the new file", this.name)),
        more, this.checking, this.said, h("div", { class: "st-row" }, this.start, this.check));
    }

    /** A LoRA file from the person's own machine. */
    adding() {
      const input = h("input", { type: "file", hidden: true, accept: ".safetensors", tabindex: "-1", "aria-hidden": "true", onchange: async () => {
        const files = [...input.files].map((file) => [file.name, file]);
        input.value = "";
        await this.add(files);
      } });
      const button = h("button", { type: "button", class: "st-button", onclick: () => input.click() }, "Add a file");
      this.plus.push(button);
      return h("span", {}, button, input);
    }

    async add(files) {
      if (!files.length) return;
      const show = (disabled, textContent) => { for (const button of this.plus) Object.assign(button, { disabled, textContent }); };
      show(true, "Adding…");
      this.wrong.textContent = this.said.textContent = "";
      try {
        const [file] = await Studio.send(files, () => {});
        const { id } = await Studio.ask(this.server, "add_lora", file);
        await this.poll();
        for (const choice of [this.files, this.trying.files]) choice.set(id);
      } catch (error) {
        (this.empty.hidden ? this.said : this.wrong).textContent = error.message;
      }
      show(false, "Add a file");
    }

    /** Base models of the chosen file's family. */
    async offerBases() {
      try {
        const { bases } = await Studio.ask(this.server, "list_bases");
        this.base.offer(bases.filter(({ family }) => family === this.chosen?.family), USUAL);
      } catch (error) {
        this.said.textContent = error.message;
      }
    }

    /** New runs and files are found while one looks at the tab. */
    async poll() {
      const sources = await Studio.ask(this.server, "list_files");
      const known = JSON.stringify(sources);
      if (known !== this.known) {
        this.known = known;
        this.names = new Map([...sources.runs.flatMap(({ run, files }) => files.map((file) => [file.id, `${run}, ${file.label}`])),
          ...[...sources.made, ...sources.others].map(({ id, label }) => [id, label])]);
        this.files.offer(sources);
        this.tools.offer(sources);
        this.trying.offer(sources);
        this.empty.hidden = this.names.size > 0;
        this.desk.hidden = this.names.size === 0;
      }
      return 5;
    }

    async look(id) {
      this.chosen = null;
      this.facts.textContent = this.said.textContent = "";
      try {
        const found = await Studio.ask(this.server, "look_at", { id });
        if (this.files.value === id) this.show(found);
      } catch (error) {
        if (this.files.value === id) this.facts.textContent = error.message;
      }
      this.start.disabled = this.check.disabled = !this.chosen;
    }

    show(found) {
      this.chosen = found;
      if (this.checking.open) this.offerBases();
      else this.base.offer([], USUAL);
      const rank = found.ranks.length > 1 ? `ranks ${found.ranks[0]} to ${found.ranks.at(-1)}` : `rank ${found.ranks[0] ?? "?"}`;
      this.facts.textContent = [`For ${found.family_name}`, rank, `${found.layers} layers`, Studio.bytes(found.bytes), `format ${found.format}`].join(" · ");
      const before = this.target.querySelector(":checked")?.value;
      const chosen = found.targets.some((target) => target.id === before) ? before : found.targets[0].id;
      this.target.replaceChildren(...found.targets.map(({ id, label }) => h("label", { class: "st-target" },
        h("input", { type: "radio", name: "studio-target", value: id, checked: id === chosen }), label)));
      this.name.value = found.stem;
      this.titleText.value = found.title;
      this.author.value = found.author;
      this.triggers.value = found.triggers.join(", ");
      this.cover.replaceChildren(h("option", { value: "" }, found.covers.length ? "None" : "None (a run's samples can be covers)"),
        ...found.covers.map(({ name, path }) => h("option", { value: name, "data-path": path }, `Sample ${name}`)));
      this.showCover();
    }

    showCover() {
      const path = this.cover.selectedOptions[0]?.dataset.path;
      this.picture.hidden = !path;
      if (path) this.picture.src = Studio.fileUrl(path);
    }

    async export() {
      const target = this.chosen.targets.find(({ id }) => id === this.target.querySelector(":checked").value);
      await this.run("start_export", { id: this.chosen.id, format: target.format, dtype: this.dtype.value, name: this.name.value, title: this.titleText.value,
        author: this.author.value, triggers: this.triggers.value, cover: this.cover.value, no_paths: this.paths.value }, target.id, this.said, this.triggers.value);
    }

    /** Start a tool and follow it on a card of its own, the newest on top. */
    async run(name, request, target = "", said = this.said, triggers = this.chosen?.triggers.join(", ") ?? "") {
      said.textContent = "";
      try {
        const { task } = await Studio.ask(this.server, name, request);
        this.hint.remove();
        const label = request.name || this.names.get(request.id) || (request.ids ?? []).map((id) => this.names.get(id)).join(" and ");
        const card = new Studio.ExportCard(this.server, task, { label, target, triggers });
        this.results.prepend(card.element);
        card.element.scrollIntoView({ block: "nearest" });
        await card.follow();
        if (this.chosen && this.name.value === request.name) this.name.value = nextName(request.name);
      } catch (error) {
        said.textContent = error.message;
      }
    }
  }

  /** The name for the file after this one. */
  function nextName(name) {
    const [, stem, number] = name.match(/^(.*?)(?:-(\d+))?$/);
    return `${stem}-${Number(number ?? 1) + 1}`;
  }

  /** A list of all LoRA files, by run; a run's checkpoints in a second list. */
  Studio.FileChoice = class {
    constructor(label, changed = () => {}) {
      this.changed = changed;
      this.runs = new Map();
      this.source = h("select", { onchange: () => this.pick() });
      this.step = h("select", { onchange: () => this.tell() });
      this.stepField = Studio.field("Checkpoint", this.step);
      this.element = h("div", { class: "st-file-choice" }, Studio.field(label, this.source), this.stepField);
    }

    get value() { return this.runs.has(this.source.value) ? this.step.value : this.source.value; }

    offer({ runs, made, others }) {
      const before = [this.source.value, this.step.value];
      this.runs = new Map(runs.map(({ run, files }) => [`run/${run}`, files]));
      const group = (label, rows) => (rows.length ? [h("optgroup", { label }, rows)] : []);
      const file = ({ id, label }) => h("option", { value: id }, label);
      this.source.replaceChildren(...group("Runs", runs.map(({ run }) => h("option", { value: `run/${run}` }, run))),
        ...group("Made or added here", made.map(file)), ...group("Your folders", others.map(file)));
      const isThere = [...this.source.options].some(({ value }) => value === before[0]);
      if (isThere) [this.source.value] = before;
      this.pick(isThere ? before[1] : null);
    }

    /** Choose by place in the list; beyond its end, the last one. */
    choose(index) {
      this.source.selectedIndex = Math.min(index, this.source.options.length - 1);
      this.pick();
    }

    /** Choose a file that is in no run. */
    set(id) {
      this.source.value = id;
      this.pick();
    }

    /** Show the chosen run's checkpoints, and tell when the file is another one. */
    pick(step = null) {
      const files = this.runs.get(this.source.value);
      this.stepField.hidden = !files;
      this.step.replaceChildren(...(files ?? []).map(({ id, label }) => h("option", { value: id }, label)));
      if (files?.some(({ id }) => id === step)) this.step.value = step;
      this.tell();
    }

    tell() {
      if (this.value === this.told) return;
      this.told = this.value;
      if (this.value) this.changed(this.value);
    }
  };
})();
