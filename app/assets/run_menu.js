// What is done with a run as a whole: another name, the trash, and back from there.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;

  Studio.RunMenu = class {
    /** `hooks`: rename(name), card() and remove(); they throw what the server says. */
    constructor(hooks) {
      this.said = h("p", { class: "st-warn", role: "alert" });
      this.name = h("input", { id: "studio-new-name", autocomplete: "off", spellcheck: "false", maxlength: "100" });
      this.dialog = h("dialog", { class: "st-ask", "aria-label": "Rename the run" }, h("form", { onsubmit: async (event) => {
        event.preventDefault();
        this.said.textContent = "";
        try {
          await hooks.rename(this.name.value.trim());
          this.dialog.close();
        } catch (error) {
          this.said.textContent = error.message;
        }
      } }, h("label", { for: this.name.id }, "Name of the run"), this.name, this.said, h("div", { class: "st-row" }, h("button", { type: "submit", class: "st-button st-primary" }, "Rename"),
        h("button", { type: "button", class: "st-button", onclick: () => this.dialog.close() }, "Cancel"))));
      this.rename = h("button", { type: "button", class: "st-button st-quiet", onclick: () => this.open() }, "Rename…");
      this.remove = h("button", { type: "button", class: "st-button st-quiet", onclick: () => hooks.remove() }, "Delete");
      this.card = h("button", { type: "button", class: "st-button st-quiet", onclick: () => hooks.card() }, "Save run card");
      this.element = h("div", { class: "st-row st-menu" }, this.card, this.rename, this.remove, this.dialog);
    }

    show(run, isAlive, hasFolder) {
      this.run = run;
      this.element.hidden = isAlive || !hasFolder;
    }

    open() {
      this.said.textContent = "";
      this.name.value = this.run;
      this.dialog.showModal();
      this.name.select();
    }
  };
})();
