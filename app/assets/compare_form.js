// A comparison from one preset, as a form: how many runs and how long is said before anything starts.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const PAUSE = 300; // milliseconds without a key before a plan is asked for
  const LABELS = { lora: "LoRA", stiefel: "Stiefel", stella: "StelLA", trilora: "TriLoRA" };
  const FIRST = ["lora", "stiefel", "stella"];
  const SHOWN = 6; // names of runs

  Studio.CompareForm = class {
    constructor(server, methods, started) {
      Object.assign(this, { server, started, timer: 0, asked: 0 });
      const later = () => this.later();
      this.preset = h("select", { onchange: later });
      this.methods = methods.map((name) => h("input", { type: "checkbox", value: name, checked: FIRST.includes(name), onchange: later, id: `studio-method-${name}` }));
      const text = (value, placeholder) => Studio.input(value, { maxlength: "200", placeholder, oninput: later });
      this.ranks = text("", "the preset's");
      this.rates = text("", "each method's own");
      this.seeds = text("0, 1, 2", "the preset's");
      this.name = Studio.input("", { maxlength: "80", oninput: later });
      this.said = h("div", { class: "st-cmp-plan", role: "status" });
      this.start = h("button", { type: "submit", class: "st-button st-primary", disabled: true }, "Start");
      this.close = h("button", { type: "button", class: "st-button st-quiet", onclick: () => this.toggle(this.opener) }, "Close");
      this.element = h("form", { class: "st-card st-cmp-form", hidden: true, "aria-label": "New comparison", onsubmit: (event) => { event.preventDefault(); this.begin(); } },
        h("header", {}, h("h3", {}, "New comparison"), Studio.help("a comparison", "One run for each combination of what you choose here. Runs of the same seed see the same images, "
          + "captions and noise in the same order, whatever their method: what differs between them is the setting.\nThree seeds or more tell a difference from the noise between seeds.")),
        h("div", { class: "st-form" }, Studio.field("Preset", this.preset), this.methodField(),
          Studio.field("Ranks", this.ranks, "Such as 8, 16, 32."), Studio.field("Learning rates", this.rates, "Such as 1e-4, 3e-4 for all, or x0.5, x1, x2 times each method's own."),
          Studio.field("Seeds", this.seeds, "With three seeds or more, a difference between settings can be told from noise."), Studio.field("Name", this.name, "Its runs' names begin with it.")),
        this.said, h("div", { class: "st-row" }, this.start, this.close));
    }

    methodField() {
      return h("fieldset", { class: "st-field st-cmp-methods" }, h("legend", {}, "Methods"), h("div", { class: "st-targets" },
        this.methods.map((box) => h("label", { class: "st-target" }, box, LABELS[box.value] ?? box.value))));
    }

    async toggle(opener) {
      this.opener = opener;
      this.element.hidden = !this.element.hidden;
      opener.setAttribute("aria-expanded", String(!this.element.hidden));
      if (this.element.hidden) { opener.focus(); return; }
      const before = this.preset.value;
      const shelves = await Studio.ask(this.server, "list_bases");
      const group = (shelf, label) => (shelves[shelf].length ? [h("optgroup", { label }, shelves[shelf].map((name) => h("option", { value: `${shelf}/${name}` }, name)))] : []);
      this.preset.replaceChildren(...group("own", "Yours"), ...group("shipped", "Shipped"));
      if (before) this.preset.value = before;
      else if (shelves.shipped.includes("demo") && !shelves.own.length) this.preset.value = "shipped/demo";
      this.preset.focus();
      this.plan();
    }

    request() {
      const [shelf, ...name] = this.preset.value.split("/");
      return { shelf, name: name.join("/"), methods: this.methods.filter((box) => box.checked).map((box) => box.value),
        ranks: this.ranks.value, rates: this.rates.value, seeds: this.seeds.value, title: this.name.value };
    }

    later() {
      clearTimeout(this.timer);
      this.asked += 1; // a plan on its way is not of what the form says now
      this.start.disabled = true;
      this.timer = setTimeout(() => this.plan(), PAUSE);
    }

    async plan() {
      if (!this.preset.value) { this.said.replaceChildren(h("p", {}, "There is no preset yet: make one on the tab Preset.")); return; }
      this.asked += 1;
      const { asked } = this;
      try {
        const plan = await Studio.ask(this.server, "plan_sweep", this.request());
        if (asked !== this.asked) return;
        this.name.placeholder = plan.name;
        this.say(plan);
      } catch (error) {
        if (asked === this.asked) this.fault(error);
      }
    }

    say({ shape, runs, seconds, remarks }) {
      const time = seconds === null ? "How long they take is not known: nothing like them has trained here yet."
        : `They train for about ${Studio.duration(seconds)}, one after the other, with pictures and measurements on top.`;
      const more = runs.length > SHOWN ? ` and ${runs.length - SHOWN} more` : "";
      this.said.replaceChildren(h("p", {}, h("strong", {}, shape), `. ${time}`), h("p", { class: "st-small" }, `${runs.slice(0, SHOWN).join(", ")}${more}`),
        ...remarks.map((remark) => h("p", { class: "st-warn" }, `Note: ${remark}.`)));
      this.start.textContent = `Start ${runs.length} run${runs.length === 1 ? "" : "s"}`;
      this.start.disabled = false;
    }

    fault(error) {
      this.start.textContent = "Start";
      this.start.disabled = true;
      this.said.replaceChildren(h("ul", { class: "st-faults" }, error.message.split("\n").map((line) => h("li", {}, line))));
    }

    async begin() {
      this.start.disabled = true;
      try {
        const made = await Studio.ask(this.server, "start_sweep", this.request());
        this.name.value = "";
        this.toggle(this.opener);
        this.started(made);
      } catch (error) {
        this.fault(error);
      }
    }
  };
})();
