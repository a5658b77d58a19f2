// A preset as form and as text, in step, checked while one types; saved, or started as a run.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const PAUSE = 250; // milliseconds without a key before a text is checked

  Studio.presetEditor = (element, server, { form }) => {
    const editor = new PresetEditor(server, form);
    element.replaceChildren(editor.element);
    editor.begun = editor.begin();
    document.addEventListener("studio:open-preset", (event) => editor.present(event.detail));
  };

  const button = (text, kind, onclick, more = {}) => h("button", { type: "button", class: `st-button ${kind}`, onclick, ...more }, text);

  class PresetEditor {
    constructor(server, form) {
      this.server = server;
      Object.assign(this, { shelf: "shipped", name: "", saved: "", tag: "", reference: "", own: [], asked: 0, opens: 0, opening: null, timer: 0 });
      this.form = new Studio.PresetSettings(form, (change) => this.check(change), {
        folders: async () => (await Studio.ask(this.server, "list_sets")).sets,
        chooseBase: async () => { await this.check(); this.bases.open(this.values?.model?.family); },
        back: (where) => this.takeBack(where),
      });
      this.text = new Studio.TextEditor(() => { this.draft(); clearTimeout(this.timer); this.timer = setTimeout(() => this.check(), PAUSE); });
      this.checks = new Studio.PresetCheck(server);
      this.bases = new Studio.BaseDialog(server, (id) => this.useBase(id));
      this.saveAs = new Studio.SaveDialog((name, replace) => this.save(name, { replace }));
      this.build();
    }

    build() {
      const work = (text, kind, what) => button(text, kind, () => this.act(what));
      this.choice = h("select", { id: "studio-preset", onchange: () => this.open(...splitId(this.choice.value)) });
      this.saveButton = work("Save", "st-primary", () => this.save(this.name, { tag: this.tag }));
      this.resetButton = work("Reset", "", () => this.reset());
      this.deleteButton = work("Delete", "st-danger", () => this.delete());
      this.runName = h("input", { id: "studio-run", autocomplete: "off", spellcheck: "false", maxlength: "100" });
      this.cards = new Studio.PresetCards();
      this.startButton = work("Start training", "st-primary", () => this.start(false));
      this.queueButton = work("Add to queue", "", () => this.start(true));
      this.status = h("p", { role: "status", class: "st-asked" });
      this.faults = h("ul", { class: "st-faults", "aria-label": "What is wrong with the preset" });
      this.differences = h("div", { class: "st-differences" });
      this.element = h("div", { class: "st-editor", onkeydown: (event) => this.shortcut(event) },
        h("div", { class: "st-columns st-tops" },
          h("section", { class: "st-card st-top", "aria-label": "Which preset" },
            h("div", { class: "st-field" }, h("label", { for: "studio-preset" }, "Preset"), this.choice),
            h("div", { class: "st-row st-actions" }, this.saveButton, button("Save as…", "", () => this.saveAs.open(this.name)),
              work("Duplicate", "", () => this.duplicate()), this.resetButton, this.deleteButton),
            this.status, this.faults, this.differences),
          h("section", { class: "st-card st-before", "aria-label": "Start a run" },
            h("div", { class: "st-row st-bottom" },
              h("div", { class: "st-field" }, h("label", { for: "studio-run" }, "Name of the run"), this.runName), this.cards.element, this.startButton, this.queueButton),
            this.checks.element)),
        h("div", { class: "st-columns" },
          h("section", { class: "st-card", "aria-label": "Settings" }, h("header", {}, h("h3", {}, "Settings")), this.form.element),
          h("section", { class: "st-card st-as-text", "aria-label": "Preset as text" }, h("header", {}, h("h3", {}, "The same, as text")), this.text.element)),
        this.saveAs.element, this.bases.element);
    }

    get id() { return `${this.shelf}/${this.name}`; }

    /** The unsaved text of the last visit, else the first preset. */
    async begin() {
      await this.attempt(async () => {
        this.listCards();
        const shelves = await this.list();
        const draft = Studio.drafts.newest();
        if (draft && (shelves[draft.shelf] ?? []).includes(draft.name)) { await this.open(draft.shelf, draft.name); return; }
        if (draft) { await this.restore(draft); return; } // its file is gone
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
      const chosen = this.opening ? this.choice.value : this.id;
      this.choice.replaceChildren(...[group("shipped", "Shipped"), group("own", "Yours")].filter(Boolean));
      this.choice.value = chosen;
      Object.assign(this, { own: shelves.own, shipped: shelves.shipped });
      return shelves;
    }

    async listCards() {
      const { cards } = await Studio.ask(this.server, "list_cards").catch(() => ({ cards: [] })); // a start still works
      this.cards.show(cards);
    }

    /** Open a preset, with what was unsaved of it unless `asSaved`. Of several that are on their way, the last one counts. */
    async open(shelf, name, asSaved = false) {
      const turn = (this.opens += 1);
      this.opening = this.attempt(() => this.fetch(turn, { shelf, name }, asSaved));
      const isHere = await this.opening;
      if (turn !== this.opens) return;
      this.opening = null;
      if (!isHere) this.choice.value = this.id;
    }

    async fetch(turn, { shelf, name }, asSaved) {
      const answer = await Studio.ask(this.server, "open_preset", { shelf, name });
      if (turn !== this.opens) return;
      const left = this.isChanged() && this.text.value ? { id: this.id, name: this.name } : null;
      const draft = Studio.drafts.get(`${shelf}/${name}`);
      const isBack = draft && draft.text !== answer.text;
      this.reference = "";
      this.take({ shelf, name, saved: answer.text, tag: answer.tag, text: answer.text });
      this.runName.value = answer.run;
      this.show(answer);
      if (isBack && !asSaved) await this.restore(draft, answer);
      else if (left && left.id !== this.id) this.say(`Your unsaved changes to ${left.name || "the preset"} were set aside. `, ["Bring them back", () => this.open(...splitId(left.id))]);
    }

    /** Come to the front with a preset that another tab has made or found, ready to start. */
    async present({ shelf, name, said }) {
      Studio.goTo("Preset");
      await this.begun; // else the first preset might come after it, in its place
      await this.attempt(() => this.list());
      await this.open(shelf, name);
      if (this.name === name && !this.isChanged()) this.say(said);
      this.startButton.focus();
    }

    /** Unsaved work comes back over what the file says now. */
    async restore(draft, file = null) {
      this.take({ ...draft, saved: file ? file.text : draft.saved });
      this.runName.value = draft.run || this.runName.value || draft.name;
      this.draft();
      await this.check();
      const isOther = file && draft.saved !== file.text;
      this.say(`Your unsaved changes to ${draft.name || "the preset"} are here again.${isOther ? " The file was changed meanwhile." : file ? "" : " Its file is gone."} `,
        ...(file ? [["Drop them", () => this.reset()]] : []));
    }

    /** A sentence, with things that can be done about it. */
    say(text, ...ways) {
      this.status.replaceChildren(text, ...ways.map(([label, way]) => button(label, "st-quiet", () => this.attempt(way))));
    }

    take({ shelf, name, saved, tag, text }) {
      Object.assign(this, { shelf, name, saved, tag: tag ?? "" });
      this.text.value = text;
      this.choice.value = this.id;
      this.status.textContent = "";
      this.showChanged();
    }

    isChanged() { return this.text.value !== this.saved; }

    showChanged() {
      const isChanged = this.isChanged();
      const kept = Studio.drafts.all();
      this.saveButton.hidden = this.deleteButton.hidden = this.shelf !== "own";
      this.saveButton.disabled = this.resetButton.disabled = !isChanged;
      for (const option of this.choice.options) {
        const isThis = option.value === this.id;
        option.textContent = splitId(option.value)[1] + ((isThis ? isChanged : option.value in kept) ? " (changed)" : "");
      }
    }

    draft() {
      const { shelf, name, saved, tag } = this;
      if (!this.isChanged()) Studio.drafts.drop(this.id);
      else Studio.drafts.put(this.id, { shelf, name, saved, tag, text: this.text.value, run: this.runName.value });
      this.showChanged();
    }

    /** Ask the server what is wrong; a change by the form comes back as text. */
    async check(change = null) {
      clearTimeout(this.timer);
      const turn = (this.asked += 1);
      const before = this.text.value;
      const { name, shelf, reference } = this;
      const request = { text: before, name, shelf, reference };
      try {
        const answer = await Studio.ask(this.server, "check_preset", change ? { ...request, change } : request);
        // An answer about a text that is not there any more is of no use
        if (before !== this.text.value) { if (change) await this.check(change); return; }
        if (answer.text !== undefined) { this.text.value = answer.text; this.draft(); }
        if (turn === this.asked || change) this.show(answer);
      } catch (error) {
        this.say(error.message);
        this.form.refresh();
      }
    }

    show({ values, problems, reference, differences }) {
      Object.assign(this, { values, reference: reference || this.reference });
      this.form.show(values, problems, differences);
      this.text.mark(problems.map((problem) => problem.line).filter(Boolean));
      this.faults.replaceChildren(...problems.map((problem) => this.problem(problem)));
      this.showDifferences(values, differences);
      for (const start of [this.startButton, this.queueButton]) {
        start.disabled = problems.length > 0;
        start.title = problems.length ? "The preset has faults; they are listed beside the preset's name" : "";
      }
      this.checks.update(problems.length ? null : { text: this.text.value, name: this.name, shelf: this.shelf });
    }

    problem({ text, line, where }) {
      const toField = where && this.form.has(where);
      const words = line ? h("button", { type: "button", class: "st-link", onclick: () => this.text.goTo(line) }, text) : text;
      return h("li", {}, words, toField ? [" ", h("button", { type: "button", class: "st-link st-to-field", onclick: () => this.form.goTo(where), "aria-label": `Show the field ${this.form.labelOf(where)}` }, "Show the field")] : null);
    }

    showDifferences(values, differences) {
      if (values === null) return; // as they were, until the text can be read again
      const isOpen = this.differences.querySelector("details")?.open ?? false;
      const compared = h("select", { id: "studio-reference", onchange: () => { this.reference = compared.value; this.check(); } }, (this.shipped ?? []).map((name) => h("option", { value: name }, name)));
      compared.value = this.reference;
      const rows = differences.map(({ where, now, shipped }) => h("tr", {},
        h("th", { scope: "row" }, h("button", { type: "button", class: "st-link", onclick: () => this.form.goTo(where) }, this.form.labelOf(where)), h("span", { class: "st-small" }, ` ${where}`)),
        h("td", {}, shipped), h("td", {}, now),
        h("td", {}, h("button", { type: "button", class: "st-link", onclick: () => this.takeBack(where), "aria-label": `${this.form.labelOf(where)}: back to the shipped value` }, "Back"))));
      const count = differences.length;
      const summary = count ? `${count} ${count === 1 ? "difference" : "differences"} from the shipped preset ${this.reference}` : `No difference from the shipped preset ${this.reference}`;
      const details = h("details", {}, h("summary", {}, summary),
        h("div", { class: "st-row" }, h("label", { for: "studio-reference" }, "Compare with"), compared),
        count ? h("div", { class: "st-scroll", tabindex: "0", role: "group", "aria-label": "Differences" }, h("table", {}, h("thead", {}, h("tr", {}, ["Setting", "Shipped", "Now", ""].map((text) => h(text ? "th" : "td", text ? { scope: "col" } : {}, text)))), h("tbody", {}, rows))) : null);
      details.open = isOpen;
      this.differences.replaceChildren(...(this.reference ? [details] : []));
    }

    /** One setting as in the shipped preset. */
    takeBack(where) {
      const [section, key] = where.split(".");
      return this.check({ section, key, value: null });
    }

    async useBase(id) {
      const answer = await Studio.ask(this.server, "use_base", { text: this.text.value, base: id });
      this.text.value = answer.text;
      this.draft();
      await this.check();
      this.say(answer.said);
    }

    // Files

    async save(name, { tag = "", replace = false } = {}) {
      const answer = await Studio.ask(this.server, "save_preset", { text: this.text.value, name, shelf: this.shelf, tag, replace });
      if (answer.exists) return false;
      if (answer.changed) { this.sayChanged(answer.changed); return false; }
      Studio.drafts.drop(this.id);
      Studio.drafts.drop(`own/${name}`);
      await this.list();
      if (this.shelf !== "own" || this.name !== name) this.reference = this.shelf === "shipped" ? this.name : this.reference;
      this.take({ shelf: "own", name, saved: answer.text, tag: answer.tag, text: answer.text });
      this.show(answer);
      const { thrown } = answer;
      if (thrown) this.say(`Saved as ${name}; what was there is in the trash. `, ["Undo", () => this.swap(thrown, "What was there before is back. ")]);
      else this.say(`Saved as ${name}.`);
      return true;
    }

    /** A preset from the trash, in the place of the one of its name, which goes there. */
    async swap(thrown, said) {
      const back = await Studio.ask(this.server, "restore_preset", { thrown, replace: true });
      await this.list();
      await this.open("own", back.name);
      this.say(said, ["Undo", () => this.swap(back.thrown, "Yours is back. ")]);
    }

    sayChanged(text) {
      const mine = { id: this.id };
      this.say(`${text}. Yours is not saved. `, ["Overwrite it", () => this.save(this.name, { replace: true })], ["Save as…", () => this.saveAs.open(Studio.nextName(this.name, this.own))],
        ["Show theirs", async () => {
          await this.open(...splitId(mine.id), true);
          this.say("This is what is saved. Your changes are kept. ", ["Bring mine back", () => this.open(...splitId(mine.id))]);
        }]);
    }

    async duplicate() {
      const name = Studio.nextName(this.name, this.own);
      const from = this.name;
      if (await this.save(name)) this.say(`${name} is a copy of ${from}.`);
    }

    /** Back to the file; what was typed can be had again. */
    async reset() {
      const typed = this.text.value;
      this.text.value = this.saved;
      this.draft();
      await this.check();
      this.say("The text is as it was saved. ", ["Undo", async () => { this.text.value = typed; this.draft(); await this.check(); this.say("Your changes are back."); }]);
    }

    async delete() {
      const { name } = this;
      const { thrown } = await Studio.ask(this.server, "delete_preset", { name });
      const shelves = await this.list();
      this.saved = this.text.value; // it is in the trash, not unsaved
      const next = shelves.own[0] ? ["own", shelves.own[0]] : ["shipped", shelves.shipped.includes(this.reference) ? this.reference : shelves.shipped[0]];
      await this.open(...next);
      this.say(`${name} is in the trash. `, ["Undo", async () => {
        const back = await Studio.ask(this.server, "restore_preset", { thrown });
        await this.list();
        await this.open("own", back.name);
      }]);
    }

    shortcut(event) {
      if (event.key !== "s" || !(event.ctrlKey || event.metaKey) || event.altKey) return;
      event.preventDefault();
      if (this.shelf !== "own") this.saveAs.open(this.name);
      else if (this.isChanged()) this.act(() => this.save(this.name, { tag: this.tag }));
    }

    // Runs

    async start(queued) {
      const { shelf, name } = this;
      const request = { text: this.text.value, name, shelf, run: this.runName.value.trim(), queued, ...this.cards.asked() };
      const { run, waits } = await Studio.ask(this.server, "start_run", request);
      this.say(waits ? `${run} waits in the queue${queued ? "" : ", since another run is on"}.` : "");
      this.runName.value = Studio.nextName(run);
      document.dispatchEvent(new CustomEvent("studio:started", { detail: run }));
    }

    /** What a button does is done to the preset that was chosen last, also when it is still on its way. */
    act(work) {
      return this.attempt(async () => {
        await this.begun;
        while (this.opening) if (!(await this.opening)) return; // it cannot be opened, and that is said
        await work();
      });
    }

    /** Whether the work was done; what hindered it is said. */
    async attempt(work) {
      this.startButton.ariaBusy = "true";
      try {
        await work();
        return true;
      } catch (error) {
        this.say(error.message);
        return false;
      } finally {
        this.startButton.ariaBusy = "false";
      }
    }
  }

  /** "own/my preset": shelf and name. */
  function splitId(id) {
    const place = id.indexOf("/");
    return [id.slice(0, place), id.slice(place + 1)];
  }
})();
