// What can be asked of a run: only what makes sense in its state.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;

  Studio.RunControls = class {
    constructor(order, resume) {
      const button = (text, kind, work) => h("button", { type: "button", class: `st-button ${kind}`, hidden: true, onclick: async (event) => {
        event.target.disabled = true;
        await work();
        event.target.disabled = false;
      } }, text);
      this.pause = button("Pause", "", () => order("pause"));
      this.go = button("Continue", "st-primary", () => order("continue"));
      this.stop = button("Stop", "st-danger", () => order("stop"));
      this.save = button("Save now", "", () => order("save"));
      this.sample = button("Sample now", "", () => this.dialog.showModal());
      this.resume = button("Resume", "st-primary", resume);
      this.prompts = h("textarea", { rows: "4", id: "studio-prompts", placeholder: "One prompt a line. Empty: the preset's prompts." });
      this.dialog = h("dialog", { class: "st-ask", "aria-label": "Sample now" }, h("form", { method: "dialog", onsubmit: () => order("sample", this.lines()) },
        h("label", { for: "studio-prompts" }, "Prompts"), this.prompts, h("div", { class: "st-row" },
          h("button", { type: "submit", class: "st-button st-primary" }, "Draw samples"),
          h("button", { type: "button", class: "st-button", onclick: () => this.dialog.close() }, "Cancel"))));
      this.element = h("div", { class: "st-controls" }, h("div", { class: "st-row" }, this.resume, this.go, this.pause, this.stop),
        h("div", { class: "st-row" }, this.save, this.sample), this.dialog);
    }

    lines() {
      return this.prompts.value.split("\n").map((line) => line.trim()).filter(Boolean).slice(0, 64);
    }

    /** `hasFolder`: a run that never began cannot be resumed. */
    show(word, isAlive, saved, hasFolder) {
      const isOver = hasFolder && ["new", "stopped", "failed", "crashed"].includes(word);
      this.pause.hidden = word !== "training";
      this.go.hidden = word !== "paused";
      this.stop.hidden = !isAlive || !hasFolder;
      this.save.hidden = this.sample.hidden = !["training", "paused"].includes(word);
      this.resume.hidden = !isOver;
      this.resume.textContent = saved ? `Resume from step ${saved}` : "Start again";
    }
  };
})();
