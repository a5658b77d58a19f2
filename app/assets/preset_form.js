// Fields made from the schema: a few first, the others folded away by section, each with its fault and its difference.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const PAUSE = 300; // milliseconds without a key before what was typed is told

  /** Fields as the server describes them; `change` is called with {section, key, value} as typed. Of `hooks`, `folders`
   * lists data sets, `chooseBase` opens the list of base models, `back` takes a setting back to the shipped value. */
  Studio.PresetForm = class {
    constructor(form, change, hooks = {}) {
      this.fields = form.map((field) => new Field(field, change, hooks));
      this.broken = h("p", { class: "st-warn", hidden: true }, "The text is not valid TOML at the moment, so the fields cannot follow it.");
      this.element = h("div", { class: "st-form" }, this.broken, this.fields.map((field) => field.element));
    }

    show(values, problems, differences = []) {
      this.broken.hidden = values !== null;
      this.shown = { values, problems, differences };
      for (const field of this.fields) field.show(values, problems, differences);
    }

    /** Back to what the text says, after a change that was refused. */
    refresh() {
      if (this.shown) this.show(this.shown.values, this.shown.problems, this.shown.differences);
    }
  };

  /** All settings: the main ones, then the others in a group for each section, with a search. */
  Studio.PresetSettings = class {
    constructor(form, change, hooks) {
      this.main = new Studio.PresetForm(form.filter((field) => field.main), change, hooks);
      const others = form.filter((field) => !field.main);
      this.groups = [...new Set(others.map((field) => field.group))].map((name) => {
        const part = new Studio.PresetForm(others.filter((field) => field.group === name), change, hooks);
        part.broken.remove();
        const count = h("span", { class: "st-small" });
        const element = h("details", { class: "st-group" }, h("summary", {}, h("span", {}, name), count), part.element);
        return { name, part, count, element };
      });
      this.search = h("input", { type: "search", id: "studio-find-setting", placeholder: "Find a setting", "aria-label": "Find a setting", autocomplete: "off", oninput: () => this.find() });
      this.none = h("p", { class: "st-small", role: "status" });
      this.element = h("div", { class: "st-settings" }, this.main.element,
        h("section", { class: "st-advanced", "aria-label": "Advanced settings" },
          h("header", { class: "st-row" }, h("h3", {}, "Advanced"), h("span", { class: "st-space" }), this.search), this.none,
          this.groups.map(({ element }) => element)));
    }

    get forms() { return [this.main, ...this.groups.map(({ part }) => part)]; }

    show(values, problems, differences) {
      for (const form of this.forms) form.show(values, problems, differences);
      for (const { part, count } of this.groups) {
        const given = part.fields.filter((field) => field.isGiven(values)).length;
        const faulty = part.fields.filter((field) => field.fault.textContent).length;
        count.textContent = [given ? `${given} set` : "", faulty ? `${faulty} with a fault` : ""].filter(Boolean).join(", ");
        count.classList.toggle("st-fault", faulty > 0);
      }
    }

    refresh() { for (const form of this.forms) form.refresh(); }

    find() {
      const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let found = 0;
      for (const { name, part, element } of this.groups) {
        let here = 0;
        for (const field of part.fields) {
          const about = `${field.section}.${field.key} ${field.label} ${field.help} ${name} ${(field.choices ?? []).join(" ").replaceAll("_", " ")}`.toLowerCase();
          const fits = words.every((word) => about.includes(word));
          field.element.hidden = !fits;
          here += fits ? 1 : 0;
        }
        element.hidden = !here;
        element.open = words.length > 0 && here > 0;
        found += here;
      }
      this.none.textContent = words.length && !found ? "No advanced setting is called so." : "";
    }

    has(where) { return this.forms.some((form) => form.fields.some((field) => field.where === where)); }

    labelOf(where) {
      for (const form of this.forms) for (const field of form.fields) if (field.where === where) return field.label;
      return where;
    }

    /** Show a field and put the cursor in it. */
    goTo(where) {
      if (this.search.value) { this.search.value = ""; this.find(); }
      for (const { part, element } of this.groups) if (part.fields.some((field) => field.where === where)) element.open = true;
      for (const form of this.forms) {
        const field = form.fields.find((one) => one.where === where);
        if (!field) continue;
        field.element.scrollIntoView({ block: "center" });
        (field.input.matches?.("fieldset") ? field.input.querySelector("input") : field.input).focus({ preventScroll: true });
      }
    }
  };

  class Field {
    constructor(field, change, hooks) {
      Object.assign(this, field);
      this.where = `${this.section}.${this.key}`;
      const id = `studio-${this.section}-${this.key}`;
      let timer = 0;
      const tell = () => {
        clearTimeout(timer);
        const value = this.read();
        if (value === this.told) return; // leaving a field tells again what typing told
        this.told = value;
        change({ section: this.section, key: this.key, value });
      };
      const wait = () => { clearTimeout(timer); timer = setTimeout(tell, PAUSE); };
      this.input = this.draw(id, { id, "aria-describedby": `${id}-help ${id}-fault`, autocomplete: "off", spellcheck: "false" }, tell, wait);
      this.fault = h("p", { id: `${id}-fault`, class: "st-fault" });
      this.rest = h("p", { class: "st-small" });
      this.differs = h("p", { class: "st-differs" });
      this.back = () => hooks.back(this.where);
      const label = [this.label, this.required ? h("span", { class: "st-small" }, " (needed)") : ""];
      const helper = hooks.chooseBase && this.where === "model.base"
        ? h("button", { type: "button", class: "st-button", onclick: hooks.chooseBase }, "Choose one on this computer…")
        : this.picks ? this.picker(hooks.folders, tell) : null;
      const own = this.kind === "several";
      this.element = h("div", { class: `st-field st-kind-${this.kind}` }, own ? null : h("label", { for: id }, label),
        this.input, helper, h("p", { id: `${id}-help`, class: "st-small" }, [this.help, this.limits()].filter(Boolean).join(" ")), this.rest, this.fault, this.differs);
    }

    draw(id, attributes, tell, wait) {
      if (this.follows) return h("output", { id, class: "st-derived" });
      if (this.kind === "choice") return h("select", { ...attributes, onchange: tell }, this.choices.map((choice) => h("option", { value: choice }, choice)));
      if (this.kind === "bool") return h("input", { ...attributes, type: "checkbox", onchange: tell });
      if (this.kind === "several") {
        return h("fieldset", { id, "aria-describedby": attributes["aria-describedby"] }, h("legend", {}, this.label),
          this.choices.map((choice) => h("label", { class: "st-check" }, h("input", { type: "checkbox", value: choice, onchange: tell }), choice.replaceAll("_", " "))));
      }
      const typed = { ...attributes, oninput: wait, onchange: tell };
      if (this.kind === "lines") return h("textarea", { ...typed, rows: "3" });
      return h("input", { ...typed, inputmode: { int: "numeric", float: "decimal" }[this.kind] ?? "text", placeholder: asTyped(this.default ?? "") });
    }

    read() {
      if (this.kind === "bool") return this.input.checked;
      if (this.kind === "several") return [...this.input.querySelectorAll("input:checked")].map((box) => box.value).join("\n");
      return this.input.value;
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
      return Number.isFinite(max) && max < 1e6 ? `${asTyped(min)} to ${asTyped(max)}${multiple}.` : `At least ${asTyped(min)}${multiple}.`;
    }

    isGiven(values) { return Boolean(values?.[this.section] && Object.hasOwn(values[this.section], this.key)); }

    show(values, problems, differences) {
      const fault = problems.find((problem) => problem.where === this.where);
      this.fault.textContent = fault ? fault.text.slice(fault.text.indexOf(`${this.where}: `) + this.where.length + 2) : "";
      if (!this.follows && this.kind !== "several") this.input.setAttribute("aria-invalid", fault ? "true" : "false");
      this.showDifference(differences.find((difference) => difference.where === this.where));
      this.input.disabled = values === null;
      if (values === null) return;
      this.showValue(values);
      if (!this.isTyped()) this.told = this.follows ? null : this.read();
    }

    showDifference(difference) {
      this.element.classList.toggle("st-changed", Boolean(difference));
      this.differs.replaceChildren(...(difference ? [`Shipped: ${difference.shipped}. `,
        h("button", { type: "button", class: "st-link", onclick: this.back, "aria-label": `${this.label}: back to the shipped value` }, "Back to it")] : []));
    }

    showValue(values) {
      const value = this.isGiven(values) ? values[this.section][this.key] : undefined;
      if (this.follows) { this.input.textContent = values[this.section]?.[this.follows] ?? "as the rank"; return; }
      if (this.rates) { this.showRate(values, value); return; }
      if (this.kind === "bool") this.input.checked = value ?? this.default;
      else if (this.kind === "several") this.tick([value ?? this.default].flat());
      else this.put(asTyped(value ?? (this.kind === "choice" ? this.default : "")));
    }

    tick(chosen) { for (const box of this.input.querySelectorAll("input")) box.checked = chosen.includes(box.value); }

    /** A setting that may be one number, or one for each method: then it is the chosen method's. */
    showRate(values, value) {
      const [section, key] = this.by;
      const given = values[section]?.[key];
      const by = Object.hasOwn(this.rates, given ?? "") ? given : this.by_default;
      const isTable = typeof value === "object" && value !== null;
      this.input.placeholder = asTyped(this.rates[by]);
      this.put(asTyped((isTable ? value[by] : value) ?? ""));
      const others = isTable ? Object.entries(value).filter(([name]) => name !== by).map(([name, rate]) => `${name} ${asTyped(rate)}`) : [];
      this.rest.textContent = isTable ? `This is ${by}'s.${others.length ? ` Others: ${others.join(", ")}.` : ""}` : "";
    }

    isTyped() { return document.activeElement === this.input && !["choice", "bool"].includes(this.kind); }

    /** What is being typed stays as it is. */
    put(text) {
      if (!this.isTyped() && this.input.value !== text) this.input.value = text;
      if (this.kind === "choice" && this.input.value !== text) this.input.selectedIndex = -1; // none of the choices: the fault says so
    }
  }

  function asTyped(value) {
    if (Array.isArray(value)) return value.join("\n");
    if (typeof value !== "number" || value === 0 || Math.abs(value) >= 1e-3) return String(value);
    return value.toExponential().replace("e+", "e");
  }
})();
