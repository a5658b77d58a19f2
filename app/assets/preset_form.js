// The two halves of the preset editor: fields made from the schema, and the text with its line numbers.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;

  /** Fields as the server describes them; `change` is called with {section, key, value} as typed, `folders` lists data sets. */
  Studio.PresetForm = class {
    constructor(form, change, folders = null) {
      this.fields = form.map((field) => new Field(field, change, folders));
      this.broken = h("p", { class: "st-warn", hidden: true }, "The text is not valid TOML at the moment, so the fields cannot follow it.");
      this.element = h("div", { class: "st-form" }, this.broken, this.fields.map((field) => field.element));
    }

    show(values, problems) {
      this.broken.hidden = values !== null;
      this.shown = { values, problems };
      for (const field of this.fields) field.show(values, problems);
    }

    /** Back to what the text says, after a change that was refused. */
    refresh() {
      if (this.shown) this.show(this.shown.values, this.shown.problems);
    }
  };

  class Field {
    constructor(field, change, folders) {
      Object.assign(this, field);
      const id = `studio-${this.section}-${this.key}`;
      const described = `${id}-help ${id}-fault`;
      const tell = () => change({ section: this.section, key: this.key, value: this.kind === "bool" ? this.input.checked : this.input.value });
      const attributes = { id, "aria-describedby": described, onchange: tell, autocomplete: "off", spellcheck: "false" };
      if (this.follows) this.input = h("output", { id, class: "st-derived" });
      else if (this.kind === "choice") this.input = h("select", attributes, this.choices.map((choice) => h("option", { value: choice }, choice)));
      else if (this.kind === "bool") this.input = h("input", { ...attributes, type: "checkbox" });
      else if (this.kind === "lines") this.input = h("textarea", { ...attributes, rows: "3" });
      else this.input = h("input", { ...attributes, inputmode: { int: "numeric", float: "decimal" }[this.kind] ?? "text", placeholder: this.default ?? "" });
      this.fault = h("p", { id: `${id}-fault`, class: "st-fault" });
      this.element = h("div", { class: `st-field st-kind-${this.kind}` }, h("label", { for: id }, this.label, this.required ? h("span", { class: "st-small" }, " (needed)") : ""),
        this.input, this.picks ? this.picker(folders, tell) : null, h("p", { id: `${id}-help`, class: "st-small" }, [this.help, this.limits()].filter(Boolean).join(" ")), this.fault);
    }

    /** A list of the data sets, whose folders need not be typed then. */
    picker(folders, tell) {
      const choice = h("select", { class: "st-picker", "aria-label": `Choose a data set for ${this.label}`, onfocus: () => fill(), onpointerdown: () => fill(), onchange: () => {
        this.input.value = choice.value;
        choice.value = "";
        tell();
      } }, h("option", { value: "" }, "Choose a data set…"));
      const fill = async () => {
        const sets = await folders().catch(() => []); // the page says by itself when the server is gone
        const known = sets.map(({ folder }) => folder).join("\n");
        if (known === this.known) return;
        this.known = known;
        choice.replaceChildren(h("option", { value: "" }, sets.length ? "Choose a data set…" : "No data set yet"), ...sets.map(({ name, folder }) => h("option", { value: folder }, name)));
      };
      return choice;
    }

    limits() {
      const { min, max, step } = this;
      if (this.follows || !Number.isFinite(min)) return "";
      const multiple = step ? `, a multiple of ${step}` : "";
      return Number.isFinite(max) && max < 1e6 ? `${min} to ${max}${multiple}.` : `At least ${min}${multiple}.`;
    }

    show(values, problems) {
      const where = `${this.section}.${this.key}`;
      const fault = problems.find((problem) => problem.where === where);
      this.fault.textContent = fault ? fault.text.slice(fault.text.indexOf(`${where}: `) + where.length + 2) : "";
      if (!this.follows) this.input.setAttribute("aria-invalid", fault ? "true" : "false");
      if (values === null) { this.input.disabled = true; return; }
      const isGiven = (section, key) => values[section] && Object.hasOwn(values[section], key);
      const value = isGiven(this.section, this.key) ? values[this.section][this.key] : undefined;
      if (this.follows) { this.input.textContent = values[this.section]?.[this.follows] ?? "as the rank"; return; }
      const isTable = typeof value === "object" && value !== null && !Array.isArray(value);
      this.input.disabled = isTable;
      if (this.kind === "bool") this.input.checked = value ?? this.default;
      else if (isTable) this.input.value = `${Object.entries(value).map(([key, item]) => `${key} ${item}`).join(", ")} (in the text)`;
      else this.input.value = asTyped(value ?? (this.kind === "choice" ? this.default : ""));
    }
  }

  function asTyped(value) {
    return Array.isArray(value) ? value.join("\n") : String(value);
  }

  /** A text area with line numbers, on which lines with a fault are marked. */
  Studio.TextEditor = class {
    constructor(changed) {
      this.numbers = h("div", { class: "st-gutter", "aria-hidden": "true" });
      this.area = h("textarea", { class: "st-toml", "aria-label": "Preset as TOML text", spellcheck: "false", autocomplete: "off",
        wrap: "off", rows: "28", oninput: () => { this.number(); changed(); }, onscroll: () => { this.numbers.scrollTop = this.area.scrollTop; } });
      this.element = h("div", { class: "st-code" }, this.numbers, this.area);
      this.marked = [];
    }

    get value() { return this.area.value; }

    set value(text) {
      if (this.area.value === text) return;
      const { scrollTop } = this.area;
      this.area.value = text;
      this.area.scrollTop = scrollTop;
      this.number();
    }

    mark(lines) {
      this.marked = lines;
      this.number();
    }

    number() {
      const count = this.area.value.split("\n").length;
      while (this.numbers.children.length > count) this.numbers.lastChild.remove();
      while (this.numbers.children.length < count) this.numbers.append(h("span", {}, String(this.numbers.children.length + 1)));
      [...this.numbers.children].forEach((span, index) => span.classList.toggle("st-marked", this.marked.includes(index + 1)));
    }

    /** Put the cursor at the end of a line and show it. */
    goTo(line) {
      const end = this.area.value.split("\n").slice(0, line).join("\n").length;
      this.area.focus();
      this.area.setSelectionRange(end, end);
      this.area.scrollTop = Math.max(0, (line - 6) * 20);
    }
  };
})();
