// A person's own notes on a run, saved as they are typed.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const PAUSE = 700; // milliseconds without a key before the text is saved
  const MOST = 100000;

  Studio.RunNotes = class {
    /** `save(run, text, before)` asks the server; `before` is the tag of the text that it takes the place of. */
    constructor(save) {
      Object.assign(this, { save, run: null, known: "", tag: "", timer: 0, savedAt: 0, line: Promise.resolve() });
      this.text = h("textarea", { id: "studio-notes", rows: "4", maxlength: MOST, placeholder: "What you tried, what you saw, what comes next.", oninput: () => this.typed(), onblur: () => this.flush() });
      this.said = h("span", { class: "st-small", role: "status" });
      this.choices = h("div", { class: "st-row", hidden: true });
      this.element = h("section", { class: "st-card", "aria-label": "Notes" }, h("header", {}, h("h3", {}, h("label", { for: "studio-notes" }, "Your notes")), h("span", { class: "st-space" }), this.said), this.text, this.choices);
      addEventListener("beforeunload", (event) => { if (!this.text.disabled && this.text.value !== this.known) event.preventDefault(); });
    }

    /** Another run is looked at; what was typed for the one before is saved, beside what another window wrote. */
    choose(run) {
      if (!this.choices.hidden) this.both();
      this.flush();
      Object.assign(this, { run, known: "", tag: "" });
      this.text.value = this.said.textContent = "";
      this.text.disabled = true;
      this.choices.hidden = true;
    }

    /** What the server had when it was asked at `begun`; false when that is older than what was saved since. */
    take(text, tag, begun) {
      if (begun < this.savedAt) return false;
      this.text.disabled = false;
      if (tag === this.tag) return true;
      if (this.text.value !== this.known) this.differ(text, tag);
      else {
        Object.assign(this, { known: text, tag });
        this.text.value = text;
      }
      return true;
    }

    /** When all that was typed is saved. */
    settled() {
      this.flush();
      return this.line;
    }

    typed() {
      clearTimeout(this.timer);
      this.said.textContent = this.text.value === this.known ? "" : "Not saved yet";
      this.timer = setTimeout(() => this.flush(), PAUSE);
    }

    flush() {
      clearTimeout(this.timer);
      const { run } = this;
      const text = this.text.value;
      if (!run || this.text.disabled || text === this.known || !this.choices.hidden) return;
      this.line = this.line.then(() => this.send(run, text));
    }

    async send(run, text) {
      try {
        this.savedAt = Infinity; // what is asked meanwhile may be older than this
        const { saved, own_notes: theirs, notes_tag: tag } = await this.save(run, text, this.run === run ? this.tag : "");
        this.savedAt = performance.now();
        if (run !== this.run) return;
        if (!saved) { this.differ(theirs, tag); return; }
        Object.assign(this, { known: text, tag });
        this.said.textContent = this.text.value === text ? "Saved" : "Not saved yet";
      } catch (error) {
        this.savedAt = performance.now();
        this.said.textContent = `Not saved: ${error.message}`;
        if (run === this.run) this.timer = setTimeout(() => this.flush(), 4000);
      }
    }

    /** Somebody else wrote other notes meanwhile. */
    differ(theirs, tag) {
      Object.assign(this, { known: theirs, tag });
      const button = (label, work) => h("button", { type: "button", class: "st-button", onclick: work }, label);
      this.said.textContent = "The notes were changed in another window.";
      this.choices.replaceChildren(button("Keep mine", () => this.settle(this.text.value)), button("Take theirs", () => this.settle(theirs)), button("Keep both", () => this.both()));
      this.choices.hidden = false;
    }

    both() { this.settle(`${this.known}\n\n${this.text.value}`); }

    settle(text) {
      this.text.value = text;
      this.choices.hidden = true;
      this.said.textContent = "";
      this.flush();
    }
  };
})();
