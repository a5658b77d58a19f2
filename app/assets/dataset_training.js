// How images and captions will be trained on: the settings of a preset that the panels count with, and captions as steps will see them.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const KEPT = "studio.training";
  const PLAIN = { family: "sd15", resolution: 512, buckets: true, batch: 1, repeats: 1, timesteps: null,
    handling: { trigger: "", shuffle_tags: false, keep_tags: 1, caption_variants: 8, caption_dropout: 0 } };

  /** One element that the open panel shows: a preset, and its resolution and trigger word, which may be changed here. */
  Studio.TrainingSettings = class {
    constructor(store) {
      Object.assign(this, { store, id: "", values: structuredClone(PLAIN), changed: () => {} });
      this.choice = h("select", { onchange: () => this.read() });
      this.resolution = Studio.input("512", { inputmode: "numeric", onchange: () => this.typed() });
      this.trigger = Studio.input("", { maxlength: "200", onchange: () => this.typed() });
      this.said = h("p", { class: "st-warn st-small" });
      this.element = h("div", { class: "st-training" }, Studio.field("As in the preset", this.choice), Studio.field("Resolution", this.resolution),
        Studio.field("Trigger word", this.trigger), this.said);
    }

    /** Have it at hand, a preset that uses the data set first; `changed` is called when a setting is another one. */
    async use(changed) {
      this.changed = changed;
      const { id } = this.store;
      if (this.id === id) return;
      const shelves = await this.store.ask("list_trainings");
      if (id !== this.store.id) return; // another data set is open by now, and asks for itself
      this.id = id;
      const group = (shelf, label) => (shelves[shelf].length ? h("optgroup", { label }, shelves[shelf].map((name) => h("option", { value: `${shelf}/${name}` }, name))) : null);
      this.choice.replaceChildren(...[group("own", "Yours"), group("shipped", "Shipped")].filter(Boolean));
      const kept = shelves.using ? `own/${shelves.using}` : localStorage.getItem(KEPT);
      if ([...this.choice.options].some((option) => option.value === kept)) this.choice.value = kept;
      await this.read(false);
    }

    async read(isTold = true) {
      const [shelf, ...name] = this.choice.value.split("/");
      if (!shelf) return;
      if (isTold) localStorage.setItem(KEPT, this.choice.value);
      this.said.textContent = "";
      try {
        this.values = await Studio.ask(this.store.server, "read_training", { shelf, name: name.join("/") });
      } catch (error) {
        this.said.textContent = `This preset cannot be used yet: ${error.message.split("\n")[0]}`;
      }
      this.resolution.value = this.values.resolution;
      this.trigger.value = this.values.handling.trigger;
      if (isTold) this.changed();
    }

    typed() {
      const side = Number(this.resolution.value);
      const isGood = Number.isInteger(side) && side >= 64 && side <= 4096 && side % 8 === 0;
      this.said.textContent = isGood ? "" : "The resolution is 64 to 4096 pixels, a multiple of 8.";
      this.resolution.setAttribute("aria-invalid", String(!isGood));
      if (isGood) this.values.resolution = side;
      this.values.handling.trigger = this.trigger.value.trim();
      this.changed();
    }
  };

  /** Five captions as steps would train on them. */
  Studio.RehearsalPanel = class {
    constructor(page) {
      Object.assign(this, { page, turn: 0 });
      this.seed = Math.floor(Math.random() * 1e6);
      this.how = h("p", { class: "st-small" });
      this.list = h("ol", { class: "st-rehearsal", "aria-label": "Captions as trained" });
      this.again = page.button("Five others", "", () => { this.seed += 1; this.load(); });
      this.element = h("div", {}, this.slot = h("div"), this.how, this.list, h("div", { class: "st-row" }, this.again));
    }

    opened() {
      this.slot.replaceChildren(this.page.settings.element);
      return this.page.store.attempt(async () => { await this.page.settings.use(() => this.load()); await this.load(); });
    }

    changed() { this.load(); }

    load() {
      return this.page.store.attempt(async () => {
        const turn = (this.turn += 1);
        const { handling } = this.page.settings.values;
        const { captions } = await this.page.store.ask("rehearse_captions", { handling, seed: this.seed });
        if (turn !== this.turn) return;
        this.how.textContent = [handling.shuffle_tags ? `Tags are shuffled, the first ${handling.keep_tags} stay.` : "Tags keep their order.",
          handling.caption_dropout ? `${Math.round(100 * handling.caption_dropout)} % of the samples are trained without their caption.` : "No caption is left out.",
          handling.trigger ? `The trigger word is put first where it is missing.` : "There is no trigger word."].join(" ");
        this.list.replaceChildren(...captions.map(({ name, text, dropped, fault }) => h("li", {}, h("button", { type: "button", class: "st-link st-small", onclick: () => this.page.open(name) }, name),
          h("p", { class: fault ? "st-warn" : dropped || !text ? "st-small" : "" }, fault || (dropped ? "left out: trained without a caption" : text || "no caption")))));
      });
    }
  };
})();
