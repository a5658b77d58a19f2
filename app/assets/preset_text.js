// A preset's text with line numbers, on which lines with a fault are marked.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;

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
