// What can be asked of a run: only what makes sense in its state.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const MOST_PROMPTS = 50;

  Studio.RunControls = class {
    /** `current()` gives the prompts that samples are drawn for. */
    constructor(order, resume, current) {
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
      this.change = button("Prompts…", "", () => this.editor.open(current()));
      this.editor = new PromptEditor((prompts) => order("prompts", prompts));
      this.resume = button("Resume", "st-primary", resume);
      this.prompts = h("textarea", { rows: "4", id: "studio-prompts", placeholder: "One prompt a line. Empty: the preset's prompts." });
      this.dialog = h("dialog", { class: "st-ask", "aria-label": "Sample now" }, h("form", { method: "dialog", onsubmit: () => order("sample", this.lines()) },
        h("label", { for: "studio-prompts" }, "Prompts"), this.prompts, h("div", { class: "st-row" },
          h("button", { type: "submit", class: "st-button st-primary" }, "Draw samples"),
          h("button", { type: "button", class: "st-button", onclick: () => this.dialog.close() }, "Cancel"))));
      this.element = h("div", { class: "st-controls" }, h("div", { class: "st-row" }, this.resume, this.go, this.pause, this.stop),
        h("div", { class: "st-row" }, this.save, this.sample, this.change), this.dialog, this.editor.element);
    }

    lines() {
      return this.prompts.value.split("\n").map((line) => line.trim()).filter(Boolean).slice(0, MOST_PROMPTS);
    }

    /** `hasFolder`: a run that never began cannot be resumed. */
    show(word, isAlive, saved, hasFolder) {
      const isOver = hasFolder && ["new", "stopped", "early", "failed", "crashed"].includes(word);
      this.pause.hidden = word !== "training";
      this.go.hidden = word !== "paused";
      this.stop.hidden = !isAlive || !hasFolder;
      this.save.hidden = this.sample.hidden = !["training", "paused"].includes(word);
      this.change.hidden = this.sample.hidden && !isOver;
      this.resume.hidden = !isOver;
      this.resume.textContent = saved ? `Resume from step ${saved}` : word === "new" ? "Start" : "Start again";
    }
  };

  /** The prompts from now on; a prompt that goes or comes gets its own row of pictures. */
  class PromptEditor {
    constructor(save) {
      this.text = h("textarea", { rows: "8", id: "studio-run-prompts" });
      this.said = h("p", { class: "st-warn", role: "alert" });
      this.element = h("dialog", { class: "st-ask", "aria-label": "Prompts of this run" }, h("form", { onsubmit: (event) => {
        event.preventDefault();
        const prompts = this.text.value.split("\n").map((line) => line.trim()).filter(Boolean);
        const fault = !prompts.length ? "Give at least one prompt." : prompts.length > MOST_PROMPTS ? `At most ${MOST_PROMPTS} prompts; these are ${prompts.length}.` : "";
        this.said.textContent = fault;
        if (fault) return;
        save(prompts);
        this.element.close();
      } }, h("label", { for: this.text.id }, "Prompts of this run, one a line"), h("p", { class: "st-small" }, "All later samples are drawn for these, also after a resume. Pictures that are there stay."),
      this.text, this.said, h("div", { class: "st-row" }, h("button", { type: "submit", class: "st-button st-primary" }, "Use these prompts"),
        h("button", { type: "button", class: "st-button", onclick: () => this.element.close() }, "Cancel"))));
    }

    open(prompts) {
      this.said.textContent = "";
      this.text.value = prompts.join("\n");
      this.element.showModal();
    }
  }
})();
