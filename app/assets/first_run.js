// The strip under the page's head that leads to the first LoRA in five steps, and what the steps need of the tabs.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const HIDDEN = "studio.first-run"; // "hidden" or "shown", once somebody has said so
  const USED = "studio.downloaded";
  const PAUSE = 8; // seconds between two looks
  const STEPS = [
    { key: "pictures", label: "Pictures", tab: "Data set", todo: "Choose or drop ten pictures or more of one style, person or thing." },
    { key: "captions", label: "Captions", tab: "Data set", todo: "Say under each picture what it shows, or let a model do it. It works without, too: then the data set's name is the word to learn." },
    { key: "settings", label: "Settings", tab: "Preset", todo: "Press “Train with these pictures” in the tab Data set: it writes a preset that fits this computer." },
    { key: "training", label: "Training", tab: "Train", todo: "Press “Start training” in the tab Preset." },
    { key: "use", label: "Use it", tab: "Train", todo: "Press “Download” beside the result. The tab Export makes it for ComfyUI, A1111, Forge or diffusers." },
  ];

  Studio.firstRun = (element, server) => new FirstSteps(element, server);

  let hasPictures = false;

  /** The button that begins with one's own pictures: it asks which ones, and shows the data set where there is one already. */
  Studio.ownPictures = () => {
    const picker = Studio.fileButton("", "", false, (files) => Studio.tellTab("Data set", "studio:add-pictures", files));
    const begin = () => (hasPictures ? Studio.goTo("Data set") : picker.querySelector("input").click());
    return h("span", {}, h("button", { type: "button", class: "st-button st-large", onclick: begin }, "Use my own pictures"), h("span", { hidden: true }, picker));
  };

  /** Bring a tab to the front and tell it something. A tab's page is made when it is first shown. */
  const PAGES = { "Data set": ".st-data", Preset: ".st-editor" };
  Studio.tellTab = async (label, name, detail) => {
    Studio.goTo(label);
    while (!document.querySelector(PAGES[label])) await new Promise((done) => { setTimeout(done, 30); });
    document.dispatchEvent(new CustomEvent(name, { detail }));
  };

  class FirstSteps {
    constructor(element, server) {
      Object.assign(this, { server, facts: null });
      this.list = h("ol", {});
      this.hint = h("p", { class: "st-small" });
      this.strip = h("nav", { class: "st-guide", "aria-label": "Your first LoRA, in five steps", hidden: true }, this.list, this.hint,
        h("button", { type: "button", class: "st-button st-quiet", onclick: () => this.keep("hidden") }, "Hide the steps"));
      this.back = h("button", { type: "button", class: "st-button st-quiet", hidden: true, onclick: () => this.keep("shown") }, "First steps");
      element.replaceChildren(this.strip);
      this.again = Studio.poll(element, () => this.look());
      this.listen();
    }

    listen() {
      for (const name of ["studio:started", "studio:pictures", "studio:run"]) document.addEventListener(name, () => this.again());
      document.addEventListener("click", ({ target }) => {
        if (!target.closest?.("a[download$='.safetensors']")) return;
        localStorage.setItem(USED, "yes");
        this.show();
      });
      document.addEventListener("studio:train-with", ({ detail }) => this.prepare(detail));
    }

    async look() {
      this.facts = await Studio.ask(this.server, "read_steps");
      hasPictures = this.facts.pictures;
      // Who has a LoRA of their own already needs no guide, unless they ask for it
      if (localStorage.getItem(HIDDEN) === null && this.facts.trained) localStorage.setItem(HIDDEN, this.wasShown ? "shown" : "hidden");
      this.show();
      return this.strip.hidden ? 60 : PAUSE;
    }

    keep(word) {
      localStorage.setItem(HIDDEN, word);
      this.show();
      if (word === "hidden") this.back.focus();
      else { this.list.querySelector("button").focus(); this.again(); }
    }

    /** Which steps are done: by what there is, and for the last one by what this browser has loaded down. */
    done() {
      const { pictures, captions, settings, trained, made } = this.facts;
      return { pictures, captions, settings, training: Boolean(trained), use: Boolean(trained) && (made || localStorage.getItem(USED) === "yes") };
    }

    show() {
      if (!this.facts) return;
      document.querySelector(".st-head h1")?.after(this.back);
      const isHidden = localStorage.getItem(HIDDEN) === "hidden";
      this.wasShown ||= !isHidden;
      this.strip.hidden = isHidden;
      this.back.hidden = !isHidden;
      const done = this.done();
      // Captions may be left out: who has settings is past them
      const current = STEPS.find(({ key }) => !done[key] && !(key === "captions" && done.settings));
      const state = JSON.stringify([done, this.facts.running]);
      if (state === this.shown) return;
      this.shown = state;
      const focused = this.list.querySelector("button:focus")?.dataset.step;
      this.list.replaceChildren(...STEPS.map((step, index) => this.step(step, index, done[step.key], step === current)));
      if (focused) this.list.querySelector(`[data-step="${focused}"]`).focus();
      this.hint.textContent = this.words(current);
    }

    step({ key, label, tab }, index, isDone, isCurrent) {
      const way = key === "use" && this.facts.trained ? () => Studio.chooseRun(this.facts.trained) : () => {};
      return h("li", { class: isDone ? "st-guide-done" : "" }, h("button", { type: "button", class: "st-button st-quiet", "data-step": key, "aria-current": isCurrent ? "step" : null,
        onclick: () => { way(); Studio.goTo(tab); } }, h("span", { class: "st-guide-step", "aria-hidden": "true" }, isDone ? "✓" : String(index + 1)),
      h("span", { class: "st-guide-name" }, label), isDone ? h("span", { class: "st-unseen" }, " (done)") : null));
    }

    words(current) {
      if (!current) return "You have made and used your first LoRA. These steps can go now.";
      if (current.key === "training" && this.facts.running) return `${this.facts.running} is being trained. It goes on without this page.`;
      return current.todo;
    }

    /** A preset for a data set, opened and ready to start. */
    async prepare({ id, failed }) {
      try {
        const { shelf, name, said } = await Studio.ask(this.server, "prepare_preset", { id });
        await Studio.tellTab("Preset", "studio:open-preset", { shelf, name, said });
        this.again();
      } catch (error) {
        failed(error.message);
      }
    }
  }
})();
