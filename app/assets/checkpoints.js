// The checkpoints that a run has on the disk: which is the best, which are kept, and a branch from any of them.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h, number } = Studio;

  Studio.Checkpoints = class {
    /** `hooks`: pin(step, pinned), branch(step, name, changes), begun() after a branch, and file(row) for a download. */
    constructor(hooks) {
      Object.assign(this, { hooks, steps: [] });
      this.rows = h("tbody");
      this.dialog = new BranchDialog((step, name, changes) => hooks.branch(step, name, changes), () => hooks.begun());
      this.element = h("section", { class: "st-card st-checkpoints", "aria-label": "Checkpoints", hidden: true },
        h("header", {}, h("h3", {}, "Checkpoints"), Studio.helpOn("checkpoints")), h("div", { class: "st-sideways", tabindex: "0", role: "region", "aria-label": "Checkpoints by step" },
          h("table", { class: "st-hard" }, h("thead", {}, h("tr", {}, ["Step", "Measured there", ""].map((name) => h("th", { scope: "col" }, name || h("span", { class: "st-unseen" }, "What can be done"))))), this.rows)), this.dialog.element);
    }

    /** `measured`: {validation: Map of step to loss, kid: Map of step to the distance's row, files: Map of step to export}. */
    show(steps, best, measured) {
      this.steps = steps;
      this.element.hidden = steps.length === 0;
      const focused = document.activeElement?.dataset?.checkpoint;
      this.rows.replaceChildren(...[...steps].reverse().map(([step, isPinned]) => this.row(step, isPinned, best?.step === step, measured)));
      if (focused) this.rows.querySelector(`[data-checkpoint="${focused}"]`)?.focus();
    }

    row(step, isPinned, isBest, { validation, kid, files }) {
      const distance = kid.get(step);
      const loss = validation.get(step);
      const told = [loss === undefined ? "" : `validation ${number(loss)}`, distance ? `KID ×10³ ${number(distance.kid, 3)}${Number.isFinite(distance.kid_low) ? ` (${number(distance.kid_low, 3)} to ${number(distance.kid_high, 3)})` : ""}` : ""].filter(Boolean);
      const pin = h("button", { type: "button", class: "st-button st-quiet", "data-checkpoint": `pin ${step}`, "aria-pressed": String(isPinned), "aria-label": `Keep the checkpoint of step ${step}`, onclick: () => this.hooks.pin(step, !isPinned) }, isPinned ? "✓ Kept" : "Keep");
      const branch = h("button", { type: "button", class: "st-button", "data-checkpoint": `branch ${step}`, "aria-label": `Branch from step ${step}`, onclick: () => this.dialog.open(step) }, "Branch from here");
      const file = files.get(step);
      return h("tr", {}, h("th", { scope: "row" }, h("span", { class: "st-row" }, `Step ${step}`, isBest ? h("span", { class: "st-tag st-best" }, "★ best") : "")),
        h("td", {}, told.length ? told.map((text) => h("div", {}, text)) : "–"), h("td", {}, h("span", { class: "st-row st-acts" }, file ? this.hooks.file(file) : "", pin, branch)));
    }
  };

  /** A new run from a checkpoint: its name, and what is to be other than in the old one. */
  class BranchDialog {
    constructor(begin, begun) {
      this.title = h("h3", {});
      this.name = h("input", { id: "studio-branch-name", autocomplete: "off", spellcheck: "false", maxlength: "100", placeholder: "The first free name" });
      this.changes = h("textarea", { id: "studio-branch-changes", rows: "5", spellcheck: "false", placeholder: "train.lr = 5e-5\ntrain.steps = 2000" });
      this.said = h("p", { class: "st-warn", role: "alert" });
      this.go = h("button", { type: "submit", class: "st-button st-primary" }, "Start the branch");
      this.element = h("dialog", { class: "st-ask", "aria-label": "Branch" }, h("form", { onsubmit: async (event) => {
        event.preventDefault();
        this.go.disabled = true;
        this.said.textContent = "";
        try {
          await begin(this.step, this.name.value.trim(), this.changes.value.split("\n").map((line) => line.trim()).filter((line) => line && !line.startsWith("#")));
          this.element.close();
          begun();
        } catch (error) {
          this.said.textContent = error.message;
        }
        this.go.disabled = false;
      } }, this.title, h("p", { class: "st-small" }, "A new run goes on from this checkpoint with the settings of this one, but for what you change. It counts on from this step, so train.steps must be more than that."),
      h("label", { for: this.name.id }, "Name of the new run"), this.name, h("label", { for: this.changes.id }, "Changed settings, one a line"), this.changes, this.said,
      h("div", { class: "st-row" }, this.go, h("button", { type: "button", class: "st-button", onclick: () => this.element.close() }, "Cancel"))));
    }

    open(step) {
      this.step = step;
      this.title.textContent = `Branch from step ${step}`;
      this.said.textContent = this.name.value = "";
      this.element.showModal();
      this.name.focus();
    }
  }
})();
