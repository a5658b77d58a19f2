// Saving presets under a name, and unsaved work that outlives the page.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const DRAFTS = "studio.drafts";
  const MOST = 20;

  /** Unsaved texts, by "shelf/name", in this browser. */
  Studio.drafts = {
    all() {
      try {
        const kept = JSON.parse(localStorage.getItem(DRAFTS) ?? "{}");
        return kept && typeof kept === "object" ? kept : {};
      } catch { return {}; }
    },
    get(id) { return Studio.drafts.all()[id] ?? null; },
    /** The one that was worked on last. */
    newest() {
      return Object.entries(Studio.drafts.all()).sort(([, a], [, b]) => b.at - a.at)[0]?.[1] ?? null;
    },
    put(id, draft) {
      const kept = Object.entries({ ...Studio.drafts.all(), [id]: { ...draft, at: Date.now() } }).sort(([, a], [, b]) => b.at - a.at).slice(0, MOST);
      try { localStorage.setItem(DRAFTS, JSON.stringify(Object.fromEntries(kept))); } catch { /* the browser keeps nothing: the page still has it */ }
    },
    drop(id) {
      const kept = Studio.drafts.all();
      if (!(id in kept)) return;
      delete kept[id];
      try { localStorage.setItem(DRAFTS, JSON.stringify(kept)); } catch { /* as above */ }
    },
  };

  /** The first free name like this one: demo, demo-2, demo-3. */
  Studio.nextName = (name, taken = [name]) => {
    const stem = name.replace(/-\d+$/, "") || "preset";
    const small = taken.map((one) => one.toLowerCase());
    for (let number = 2; ; number += 1) if (!small.includes(`${stem}-${number}`.toLowerCase())) return `${stem}-${number}`;
  };

  Studio.SaveDialog = class {
    constructor(save) {
      this.name = h("input", { id: "studio-save-name", autocomplete: "off", maxlength: "80" });
      this.said = h("p", { class: "st-warn", role: "alert" });
      this.button = h("button", { type: "submit", class: "st-button st-primary" }, "Save");
      this.element = h("dialog", { class: "st-ask", "aria-label": "Save preset as" }, h("form", { onsubmit: (event) => { event.preventDefault(); this.submit(save); } },
        h("label", { for: "studio-save-name" }, "Name"), this.name, this.said, h("div", { class: "st-row" }, this.button,
          h("button", { type: "button", class: "st-button", onclick: () => this.element.close() }, "Cancel"))));
    }

    async submit(save) {
      try {
        if (await save(this.name.value.trim(), this.isWarned === this.name.value)) { this.element.close(); return; }
        this.isWarned = this.name.value;
        this.said.textContent = "You have a preset of that name. Save again to replace it.";
        this.button.textContent = "Replace it";
      } catch (error) {
        this.said.textContent = error.message;
      }
    }

    open(name) {
      this.isWarned = null;
      this.said.textContent = "";
      this.button.textContent = "Save";
      this.name.value = name;
      this.element.showModal();
      this.name.select();
    }
  };
})();
