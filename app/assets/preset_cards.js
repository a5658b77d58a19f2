// Which GPUs a run takes, where there are several: as the preset says, one, or some of them together.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const TOGETHER = "together";

  Studio.PresetCards = class {
    constructor() {
      this.choice = h("select", { id: "studio-card", "aria-describedby": "studio-card-said", onchange: () => this.follow() });
      this.boxes = h("fieldset", { class: "st-cards", hidden: true, onchange: () => this.follow() });
      this.said = h("p", { id: "studio-card-said", class: "st-small", role: "status" });
      this.element = h("div", { class: "st-field st-gpus", hidden: true }, h("label", { for: "studio-card" }, "GPU"), this.choice, this.boxes, this.said);
    }

    /** The GPUs of this machine; of one alone nothing is to be chosen. */
    show(cards) {
      this.element.hidden = cards.length < 2;
      const named = cards.map(({ index, name, gib }) => ({ index, name: `${index}: ${name}${gib ? `, ${gib} GiB` : ""}` }));
      this.choice.replaceChildren(h("option", { value: "" }, "As the preset says"), ...named.map(({ index, name }) => h("option", { value: index }, name)),
        h("option", { value: TOGETHER }, "Several together"));
      this.boxes.replaceChildren(h("legend", {}, "GPUs of the run"), ...named.map(({ index, name }) => h("label", { class: "st-check" },
        h("input", { type: "checkbox", value: index, checked: true }), name)));
      this.follow();
    }

    follow() {
      const isTogether = this.choice.value === TOGETHER;
      const count = this.numbers().length;
      this.boxes.hidden = !isTogether;
      this.said.textContent = !isTogether ? "" : count > 1 ? `Each takes train.batch_size images at a time, so a step has ${count} times as many.` : count ? "" : "Choose at least one GPU.";
    }

    /** Numbers of the chosen GPUs; none: as the preset says. */
    numbers() {
      if (this.choice.value !== TOGETHER) return this.choice.value === "" ? [] : [Number(this.choice.value)];
      return [...this.boxes.querySelectorAll("input:checked")].map((box) => Number(box.value));
    }

    /** What a request to start a run says of them. Throws where several are wanted and none is chosen. */
    asked() {
      if (this.element.hidden) return {};
      const cards = this.numbers();
      if (this.choice.value === TOGETHER && !cards.length) throw new Error("Choose at least one GPU.");
      return cards.length ? { cards } : {};
    }
  };
})();
