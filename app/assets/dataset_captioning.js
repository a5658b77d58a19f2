// Captions by a model: what it shall do, how far it is, and its proposals, which are written only when one says so.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const MOST = 200; // proposals that are shown
  const OTHER = "other";

  Studio.CaptioningPanel = class {
    constructor(page) {
      const { models, captioning } = page.offered;
      Object.assign(this, { page, models, fields: captioning.filter(({ key }) => key !== "model"), values: {}, problems: [] });
      this.model = Studio.select([...models.map(({ id, label }) => [id, label]), [OTHER, "Another one…"]], models[0].id, { onchange: () => this.showModel() });
      this.other = Studio.input("", { placeholder: "Hub id or folder" });
      this.otherField = Studio.field("Hub id or folder", this.other, "A Florence-2, BLIP or Qwen-VL model; or a folder with model.onnx and selected_tags.csv.");
      this.needs = h("p", { class: "st-small" });
      const change = ({ key, value }) => { this.values[key] = this.typed(key, value); };
      const isOfTagger = ({ help }) => help.startsWith("Tagger:");
      const form = (isIn) => new Studio.PresetForm(this.fields.filter(isIn), change);
      this.forms = [form((field) => !isOfTagger(field) && !field.advanced), form(isOfTagger), form((field) => !isOfTagger(field) && field.advanced)];
      this.tagger = h("details", {}, h("summary", {}, "For taggers"), this.forms[1].element);
      this.start = page.button("Start", "st-primary", () => this.begin());
      this.scope = h("p", { class: "st-small" });
      this.said = h("p", { class: "st-warn", role: "alert" });
      this.asking = h("div", {}, Studio.field("Model", this.model), this.otherField, this.needs, this.forms[0].element,
        this.tagger, h("details", {}, h("summary", {}, "More settings"), this.forms[2].element), this.scope, h("div", { class: "st-row" }, this.start));
      this.element = h("div", { class: "st-captioning" }, this.said, this.asking, this.task = new Task(this));
      this.element.replaceChildren(this.said, this.asking, this.task.element);
      this.showModel();
      this.showForms();
    }

    typed(key, value) {
      const { kind } = this.fields.find((field) => field.key === key);
      if (kind === "int" || kind === "float") return value.trim() === "" || Number.isNaN(Number(value)) ? value : Number(value);
      return kind === "lines" ? value.split("\n").map((line) => line.trim()).filter(Boolean) : value;
    }

    showModel() {
      const model = this.models.find(({ id }) => id === this.model.value);
      this.otherField.hidden = Boolean(model);
      this.needs.textContent = model?.needs ? `${model.needs}.` : "";
      const isTagger = /tagger/i.test(model?.id ?? "");
      this.tagger.hidden = Boolean(model) && !isTagger;
      this.tagger.open = isTagger;
    }

    showForms() { this.forms.forEach((form) => form.show({ captioning: this.values }, this.problems)); }

    opened() {
      this.chosen();
      this.task.begin();
    }

    /** Say which images are meant; the task passes over excluded ones when none are named. */
    chosen() {
      const { images = 0, excluded = 0 } = this.page.store.info ?? {};
      const all = `all ${Studio.count(images - excluded, "image")}${excluded ? " that are not excluded" : ""}`;
      this.scope.textContent = `For ${this.page.scope() ? this.page.scopeText() : all}, as the mode says.`;
    }
    found() { this.chosen(); }
    poll() { this.task.poll(); }

    async begin() {
      const given = Object.entries(this.values).filter(([, value]) => value !== "");
      const model = this.model.value === OTHER ? this.other.value.trim() : this.model.value;
      const instruction = this.models.find(({ id }) => id === model)?.instruction;
      const settings = { model, ...(instruction ? { instruction } : {}), ...Object.fromEntries(given) };
      this.problems = [];
      this.said.textContent = "";
      const { store } = this.page;
      const { id } = store; // its images are meant, though another data set may open meanwhile
      try {
        if (!model) throw new Error("Give the model: a hub id or a folder.");
        const images = this.page.scope();
        if (images?.length === 0) throw new Error("No image is shown: change the search or the filter, or choose images, before you start.");
        if (!await store.flush()) throw new Error("A caption is not saved yet: look at the marked card first.");
        const { task } = await store.ask("start_captioning", { id, settings, images: images ?? [] });
        if (id === store.id) this.task.follow(task);
      } catch (error) {
        const lines = error.message.split("\n");
        this.problems = lines.map((text) => ({ where: text.match(/^captioning\.\w+(?=: )/)?.[0], text }));
        this.said.textContent = lines.filter((line) => !/^captioning\.(?!model)/.test(line)).join(" ").replace("captioning.model", "Model");
      }
      this.showForms();
    }
  };

  /** A task of the captioner: progress, and a table of captions before and after. */
  class Task {
    constructor(panel) {
      Object.assign(this, { panel, name: null, rows: [], off: new Set(), isBusy: false, turn: 0 });
      const { page } = panel;
      this.text = h("p", { role: "status" });
      this.bar = h("progress", { "aria-label": "Captions written" });
      this.stop = page.button("Stop", "", () => this.ask("stop_captioning"));
      this.apply = page.button("Apply", "st-primary", () => this.write());
      this.drop = page.button("Throw away", "", async () => { if (await this.ask("dismiss_captioning")) this.begin(); });
      this.left = h("div");
      this.table = h("tbody");
      this.head = h("table", { class: "st-proposals" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, h("span", { class: "st-unseen" }, "Apply")), h("th", { scope: "col" }, "Image"),
        h("th", { scope: "col" }, "Before"), h("th", { scope: "col" }, "Proposed"))), this.table);
      this.element = h("section", { class: "st-part", hidden: true, "aria-label": "Proposed captions" }, h("h4", {}, "Proposals"), this.text, this.bar,
        h("div", { class: "st-row" }, this.apply, this.stop, this.drop), this.left, h("div", { class: "st-scroll", tabindex: "0", role: "region", "aria-label": "Captions before and after" }, this.head));
    }

    begin() { return this.follow(null); }

    follow(name) {
      Object.assign(this, { name, id: this.panel.page.store.id, rows: [], off: new Set(), isAlive: true, turn: this.turn + 1 });
      this.table.replaceChildren();
      return this.poll(true);
    }

    async poll(isFirst = false) {
      if (this.isBusy || (!isFirst && (!this.name || !this.isAlive))) return;
      this.isBusy = true;
      const { turn } = this;
      await this.panel.page.store.attempt(async () => {
        const answer = await this.panel.page.store.ask("read_captioning", { id: this.id, task: this.name, start: this.rows.length });
        if (turn !== this.turn) return; // another task is followed by now, or another data set is open
        this.name = answer.task;
        if (answer.task) this.take(answer);
      });
      this.isBusy = false;
      if (turn !== this.turn) { await this.poll(true); return; }
      this.element.hidden = !this.name;
      this.panel.asking.hidden = Boolean(this.name);
    }

    take({ word, text, done, of, alive, skipped, rows }) {
      this.isAlive = alive;
      this.rows.push(...rows);
      const said = word === "working" ? `At work: ${text}` : word === "done" && !of ? "There was nothing to do: in this mode no image needs a caption." : text;
      if (this.text.textContent !== said) this.text.textContent = said;
      this.text.className = word === "failed" || word === "crashed" ? "st-warn st-lines" : "";
      this.bar.hidden = !alive;
      if (of) Object.assign(this.bar, { max: of, value: done });
      else this.bar.removeAttribute("value");
      this.stop.hidden = !alive;
      this.drop.hidden = alive;
      for (const row of rows) if (this.table.children.length < MOST) this.table.append(this.row(row));
      this.left.replaceChildren(...(skipped.length ? [h("details", { class: "st-warn" }, h("summary", {}, `${Studio.count(skipped.length, "image")} without a proposal`),
        h("ul", { class: "st-trash" }, skipped.slice(0, 200).map(({ file, reason }) => h("li", {}, `${file}: ${reason}`))))] : []));
      this.showCount();
    }

    row({ image, before, after }) {
      const box = h("input", { type: "checkbox", checked: true, "aria-label": `Apply to ${image}`, onchange: () => {
        if (box.checked) this.off.delete(image);
        else this.off.add(image);
        this.showCount();
      } });
      return h("tr", {}, h("td", {}, box), h("th", { scope: "row" }, image), h("td", {}, before || "–"), h("td", {}, after));
    }

    showCount() {
      const count = this.rows.length - this.off.size;
      this.apply.textContent = count ? `Apply ${Studio.count(count, "caption")}` : "Apply";
      this.apply.disabled = count === 0 || this.isAlive;
      this.head.hidden = this.rows.length === 0;
    }

    async write() {
      const { id, name: task } = this; // what is shown: the panel may be another data set's before this ends
      const images = this.off.size ? this.rows.map(({ image }) => image).filter((image) => !this.off.has(image)) : null;
      const answer = await this.panel.page.change("apply_captioning", { task, images }, id);
      if (!answer) return;
      if (!answer.skipped.length) this.panel.page.say(`Wrote ${Studio.count(answer.changed, "caption")}. “Undo” takes it back.`);
      if (await this.ask("dismiss_captioning", id, task)) this.begin();
    }

    ask(name, id = this.id, task = this.name) { return this.panel.page.store.attempt(() => this.panel.page.store.ask(name, { id, task })); }
  }
})();
