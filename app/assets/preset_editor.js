// A preset as form and as text, in step, checked while one types; saved, or started as a run.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const PAUSE = 250; // milliseconds without a key before a text is checked
  const DRAFT = "studio.draft";

  Studio.presetEditor = (element, server, { form }) => {
    const editor = new PresetEditor(server, form);
    element.replaceChildren(editor.element);
    editor.begin();
  };

  class PresetEditor {
    constructor(server, form) {
      this.server = server;
      Object.assign(this, { shelf: "shipped", name: "", saved: "", asked: 0, timer: 0 });
      this.form = new Studio.PresetForm(form, (change) => this.check(change), async () => (await Studio.ask(this.server, "list_sets")).sets);
      this.text = new Studio.TextEditor(() => { this.draft(); clearTimeout(this.timer); this.timer = setTimeout(() => this.check(), PAUSE); });
      this.choice = h("select", { id: "studio-preset", onchange: () => this.open(...this.choice.value.split("/")) });
      this.runName = h("input", { id: "studio-run", autocomplete: "off", spellcheck: "false", maxlength: "100" });
      const button = (text, kind, work) => h("button", { type: "button", class: `st-button ${kind}`, onclick: () => this.attempt(work) }, text);
      this.saveButton = button("Save", "", () => this.save(this.name, true));
      this.saveAs = new SaveDialog((name, replace) => this.save(name, replace));
      this.startButton = button("Start training", "st-primary", () => this.start());
      this.status = h("p", { role: "status", class: "st-asked" });
      this.faults = h("ul", { class: "st-faults", "aria-label": "What is wrong with the preset" });
      this.element = h("div", { class: "st-editor" },
        h("section", { class: "st-card st-top", "aria-label": "Preset and run" },
          h("div", { class: "st-row st-bottom" },
            h("div", { class: "st-field" }, h("label", { for: "studio-preset" }, "Preset"), this.choice),
            this.saveButton, h("button", { type: "button", class: "st-button", onclick: () => this.saveAs.open(this.name) }, "Save as…"),
            h("span", { class: "st-space" }),
            h("div", { class: "st-field" }, h("label", { for: "studio-run" }, "Name of the run"), this.runName), this.startButton),
          this.status, this.faults),
        h("div", { class: "st-columns" },
          h("section", { class: "st-card", "aria-label": "Main settings" }, h("header", {}, h("h3", {}, "Main settings")), this.form.element),
          h("section", { class: "st-card", "aria-label": "Preset as text" }, h("header", {}, h("h3", {}, "All settings, as text")), this.text.element)),
        this.saveAs.element);
    }

    /** The unsaved text of the last visit, else the first preset. */
    async begin() {
      await this.attempt(async () => {
        const shelves = await this.list();
        const draft = JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
        if (draft) { await this.restore(draft); return; }
        const shelf = shelves.own.length && !shelves.shipped.length ? "own" : "shipped";
        const name = shelves[shelf].includes("demo") ? "demo" : shelves[shelf][0];
        if (name) await this.open(shelf, name);
        else this.check();
      });
    }

    async list() {
      const shelves = await Studio.ask(this.server, "list_presets");
      const group = (shelf, label) => (shelves[shelf].length
        ? h("optgroup", { label }, shelves[shelf].map((name) => h("option", { value: `${shelf}/${name}` }, name))) : null);
      this.choice.replaceChildren(...[group("shipped", "Shipped"), group("own", "Yours")].filter(Boolean));
      return shelves;
    }

    open(shelf, name) {
      return this.attempt(async () => {
        const answer = await Studio.ask(this.server, "open_preset", { shelf, name });
        const aside = this.isChanged() ? { shelf: this.shelf, name: this.name, saved: this.saved, text: this.text.value } : null;
        sessionStorage.removeItem(DRAFT);
        this.take({ shelf, name, saved: answer.text, text: answer.text });
        this.runName.value = answer.run;
        this.show(answer);
        if (aside) this.offer(aside);
      });
    }

    async restore(draft) {
      this.take(draft);
      this.runName.value ||= draft.run ?? draft.name;
      this.draft();
      await this.check();
      this.status.textContent = `Your unsaved changes to ${draft.name || "the preset"} are here again.`;
    }

    /** Another preset was opened over unsaved changes: they can be had back. */
    offer(aside) {
      const back = h("button", { type: "button", class: "st-button st-quiet", onclick: () => this.attempt(() => this.restore(aside)) }, "Bring them back");
      this.status.replaceChildren(`Your unsaved changes to ${aside.name || "the preset"} were set aside. `, back);
    }

    take({ shelf, name, saved, text }) {
      Object.assign(this, { shelf, name, saved });
      this.text.value = text;
      this.choice.value = `${shelf}/${name}`;
      this.status.textContent = "";
      this.showChanged();
    }

    isChanged() { return this.text.value !== this.saved; }

    showChanged() {
      const isChanged = this.isChanged();
      this.saveButton.hidden = this.shelf !== "own";
      this.saveButton.disabled = !isChanged;
      for (const option of this.choice.options) {
        const isThis = option.value === `${this.shelf}/${this.name}`;
        option.textContent = option.value.split("/")[1] + (isThis && isChanged ? " (changed)" : "");
      }
    }

    draft() {
      this.showChanged();
      const { shelf, name, saved } = this;
      if (!this.isChanged()) sessionStorage.removeItem(DRAFT);
      else sessionStorage.setItem(DRAFT, JSON.stringify({ shelf, name, saved, text: this.text.value, run: this.runName.value }));
    }

    /** Ask the server what is wrong; a change by the form comes back as text. */
    async check(change = null) {
      clearTimeout(this.timer);
      const turn = (this.asked += 1);
      const before = this.text.value;
      const request = { text: before, name: this.name };
      try {
        const answer = await Studio.ask(this.server, "check_preset", change ? { ...request, change } : request);
        // An answer about a text that is not there any more is of no use
        if (before !== this.text.value) { if (change) await this.check(change); return; }
        if (answer.text !== undefined) { this.text.value = answer.text; this.draft(); }
        if (turn === this.asked || change) this.show(answer);
      } catch (error) {
        this.status.textContent = error.message;
        this.form.refresh();
      }
    }

    show({ values, problems }) {
      this.form.show(values, problems);
      this.text.mark(problems.map((problem) => problem.line).filter(Boolean));
      this.faults.replaceChildren(...problems.map(({ text, line }) => h("li", {},
        line ? h("button", { type: "button", class: "st-link", onclick: () => this.text.goTo(line) }, text) : text)));
      this.startButton.disabled = problems.length > 0;
      this.startButton.title = problems.length ? "The preset has faults; they are listed below" : "";
    }

    async save(name, replace) {
      const answer = await Studio.ask(this.server, "save_preset", { text: this.text.value, name, shelf: this.shelf, replace });
      if (answer.exists) return false;
      sessionStorage.removeItem(DRAFT);
      await this.list();
      this.take({ shelf: "own", name, saved: answer.text, text: answer.text });
      this.show(answer);
      this.status.textContent = `Saved as ${name}.`;
      return true;
    }

    async start() {
      const { shelf, name } = this;
      const { run, waits } = await Studio.ask(this.server, "start_run", { text: this.text.value, name, shelf, run: this.runName.value.trim() });
      this.status.textContent = waits ? `${run} waits in the queue, since another run is on.` : "";
      this.runName.value = nextName(run);
      document.dispatchEvent(new CustomEvent("studio:started", { detail: run }));
    }

    async attempt(work) {
      this.startButton.ariaBusy = "true";
      try {
        await work();
      } catch (error) {
        this.status.textContent = error.message;
      }
      this.startButton.ariaBusy = "false";
    }
  }

  /** The name for the run after this one: demo, demo-2, demo-3. */
  function nextName(name) {
    const [, stem, number] = name.match(/^(.*?)(?:-(\d+))?$/);
    return `${stem}-${Number(number ?? 1) + 1}`;
  }

  class SaveDialog {
    constructor(save) {
      this.name = h("input", { id: "studio-save-name", autocomplete: "off", maxlength: "80" });
      this.said = h("p", { class: "st-warn", role: "alert" });
      this.button = h("button", { type: "submit", class: "st-button st-primary" }, "Save");
      this.element = h("dialog", { class: "st-ask", "aria-label": "Save preset as" }, h("form", { onsubmit: async (event) => {
        event.preventDefault();
        try {
          if (await save(this.name.value.trim(), this.isWarned === this.name.value)) this.element.close();
          else {
            this.isWarned = this.name.value;
            this.said.textContent = "You have a preset of that name. Save again to replace it.";
            this.button.textContent = "Replace it";
          }
        } catch (error) {
          this.said.textContent = error.message;
        }
      } }, h("label", { for: "studio-save-name" }, "Name"), this.name, this.said, h("div", { class: "st-row" }, this.button,
        h("button", { type: "button", class: "st-button", onclick: () => this.element.close() }, "Cancel"))));
    }

    open(name) {
      this.isWarned = null;
      this.said.textContent = "";
      this.button.textContent = "Save";
      this.name.value = name;
      this.element.showModal();
      this.name.select();
    }
  }
})();
