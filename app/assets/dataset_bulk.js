// Changes many captions at once: shows what would change while one types, then makes it one step that can be undone.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const PAUSE = 180; // milliseconds without a key before a preview
  const text = (key, label, help = "") => ({ key, label, help, kind: "text" });
  const tick = (key, label, value = false) => ({ key, label, kind: "tick", value });
  const pick = (key, label, options) => ({ key, label, kind: "pick", options });
  const OPERATIONS = {
    replace: ["Find and replace", [text("find", "Find"), text("replace", "Replace by"), pick("mode", "As", [["plain", "Text"], ["tag", "Whole tag"], ["regex", "Regular expression"]]),
      tick("case", "Upper and lower case count")]],
    add: ["Add before or behind", [text("text", "Add"), pick("where", "Where", [["before", "Before every caption"], ["after", "Behind every caption"]]),
      { ...text("joiner", "With this between"), value: ", " }, tick("skip_present", "Not where it is already", true)]],
    remove_tags: ["Remove tags", [{ ...text("tags", "Tags", "Several are parted by commas."), isList: true, isTag: true }]],
    rename_tag: ["Rename a tag", [{ ...text("tag", "Tag"), isTag: true }, { ...text("to", "New name"), isTag: true }]],
    sort_tags: ["Sort tags", [pick("order", "Order", [["alphabet", "Alphabet"], ["frequency", "The most frequent first"]]),
      { ...text("keep", "First tags that stay"), value: "0", isNumber: true }]],
    remove_duplicates: ["Remove repeated tags", []],
    trigger: ["Set the trigger word", [text("word", "Trigger word", "Put first in every caption that does not have it."), text("old", "Instead of", "A former trigger word that goes; may be empty.")]],
    separator: ["Change the separator", [{ ...text("old", "Parted by", "\\n is a new line."), value: ";" }, { ...text("new", "From now on by"), value: "," }]],
  };

  Studio.BulkPanel = class {
    constructor(page) {
      Object.assign(this, { page, turn: 0, shown: 20, plan: null });
      this.choice = Studio.select(Object.entries(OPERATIONS).map(([kind, [label]]) => [kind, label]), "replace", { onchange: () => this.fields() });
      this.form = h("div", { class: "st-panel-form" });
      this.told = h("p", { class: "st-status", role: "status" });
      this.list = h("ul", { class: "st-diffs", "aria-label": "What changes" });
      this.more = page.button("Show more", "st-quiet", () => { this.shown += 40; this.preview(); }, { hidden: true });
      this.go = page.button("Apply", "st-primary", () => this.apply(), { disabled: true });
      this.suggested = h("datalist", { id: "studio-bulk-tags" });
      this.element = h("div", {}, Studio.field("What to do", this.choice), this.form, h("div", { class: "st-row st-apply" }, this.go, this.told), this.list, this.more, this.suggested);
      this.fields();
    }

    fields() {
      this.inputs = OPERATIONS[this.choice.value][1].map((field) => ({ ...field, input: this.input(field) }));
      this.form.replaceChildren(...this.inputs.map(({ kind, label, help, input }) => (kind === "tick" ? h("label", { class: "st-check" }, input, label) : Studio.field(label, input, help))));
      this.soon();
    }

    input({ kind, value, options, isTag }) {
      const changed = { oninput: () => { if (isTag) this.suggest(); this.soon(); } };
      if (kind === "tick") return h("input", { type: "checkbox", checked: value, onchange: () => this.soon() });
      if (kind === "pick") return Studio.select(options, options[0][0], { onchange: () => this.soon() });
      return Studio.input(value ?? "", { ...changed, list: isTag ? this.suggested.id : null });
    }

    suggest() {
      const typed = document.activeElement?.value?.split(",").at(-1).trim();
      if (!typed) return;
      this.page.store.attempt(async () => {
        const { tags } = await this.page.store.ask("list_tags", { prefix: typed });
        this.suggested.replaceChildren(...tags.map(([tag]) => h("option", { value: tag })));
      });
    }

    /** What is asked for; null while a needed field is empty. */
    operation() {
      const operation = { kind: this.choice.value };
      for (const { key, kind, isList, isNumber, input } of this.inputs) {
        if (kind === "tick") operation[key] = input.checked;
        else if (isList) operation[key] = input.value.split(",").map((tag) => tag.trim()).filter(Boolean);
        else if (isNumber) operation[key] = Number.parseInt(input.value, 10) || 0;
        else operation[key] = this.choice.value === "separator" ? input.value.replaceAll("\\n", "\n") : input.value;
      }
      const needed = { replace: "find", add: "text", remove_tags: "tags", rename_tag: "tag", trigger: "word", separator: "old" }[operation.kind];
      const isRenamed = operation.kind !== "rename_tag" || operation.to.trim();
      return (!needed || operation[needed].length) && isRenamed && (operation.kind !== "separator" || operation.new) ? operation : null;
    }

    soon() {
      clearTimeout(this.timer);
      this.turn += 1; // what is shown, or still on its way, is not what the form says any more
      this.plan = null;
      this.go.disabled = true;
      this.shown = 20;
      this.timer = setTimeout(() => this.preview(), PAUSE);
    }

    opened() { this.soon(); }
    changed() { this.soon(); }
    found() { this.soon(); }
    chosen() { this.soon(); }

    async preview() {
      const turn = (this.turn += 1);
      const operation = this.operation();
      this.plan = null;
      if (!operation) { this.tell("Nothing to do yet."); return; }
      try {
        const names = this.page.scope();
        const first = await this.page.store.ask("preview_bulk", { operation, names, start: 0 });
        const changes = [...first.changes];
        while (changes.length < Math.min(this.shown, first.changed)) {
          const more = await this.page.store.ask("preview_bulk", { operation, names, start: changes.length });
          if (!more.changes.length) break;
          changes.push(...more.changes);
        }
        if (turn !== this.turn) return;
        this.plan = { operation, names, token: first.token };
        this.show(first, changes);
      } catch (error) {
        if (turn === this.turn) this.tell(error.message, true);
      }
    }

    show({ changed, of, hits }, changes) {
      const places = hits > changed ? ` in ${Studio.count(hits, "place")}` : "";
      this.tell(changed ? `${changed} of ${Studio.count(of, "caption")} of ${this.page.scopeText()} would change${places}.` : `No caption of ${this.page.scopeText()} would change.`);
      this.go.disabled = changed === 0;
      this.go.textContent = changed ? `Change ${Studio.count(changed, "caption")}` : "Apply";
      this.list.replaceChildren(...changes.map(({ name, spans }) => h("li", {}, h("span", { class: "st-small" }, name), h("p", {}, Studio.diff(spans)))));
      this.more.hidden = changes.length >= changed;
    }

    tell(text, isBad = false) {
      this.told.textContent = text;
      this.told.classList.toggle("st-warn", isBad);
      this.list.replaceChildren();
      this.more.hidden = true;
      this.go.disabled = true;
      this.go.textContent = "Apply";
    }

    async apply() {
      if (!this.plan) return;
      const { plan } = this;
      this.go.disabled = true;
      const answer = await this.page.change("apply_bulk", plan);
      if (answer?.stale) { this.tell("Captions have changed since this preview. Look at it again."); this.soon(); }
      else if (answer) this.page.say(`Changed ${Studio.count(answer.changed, "caption")}. “Undo” takes it back.`);
    }
  };

  /** Pieces of a text before and after: what goes is struck out, what comes is underlined. */
  Studio.diff = (spans) => spans.map(([kind, piece]) => (kind === "-" ? h("del", {}, piece) : kind === "+" ? h("ins", {}, piece) : shortened(piece)));

  function shortened(piece) {
    return piece.length > 120 ? `${piece.slice(0, 50)} … ${piece.slice(-50)}` : piece;
  }
})();
