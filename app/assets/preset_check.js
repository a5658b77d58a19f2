// What training with a preset takes, asked of the trainer before it starts: memory, time, images, and what is wrong.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const PAUSE = 1500; // milliseconds without a change before a preset is looked at
  const LOOK = 700;
  const GIB = 2 ** 30;
  const ROWS = [["held as", "Held as"], ["GPU memory", "GPU memory"], ["memory", "Computer's memory"], ["text encoder", "Text encoder"], ["disk", "Disk"], ["download", "To download"],
    ["time", "Time"], ["steps", "Steps"], ["training images", "Images"], ["buckets", "Sizes"], ["remarks", "Remarks"], ["adapter", "Adapter"], ["continues", "Continues"], ["base model", "Base model"], ["device", "Device"]];

  Studio.PresetCheck = class {
    constructor(server) {
      Object.assign(this, { server, key: "", text: "", wanted: null, timer: 0 });
      this.said = h("p", { class: "st-small", role: "status" });
      this.button = h("button", { type: "button", class: "st-button", onclick: () => (this.key && !this.isDone ? this.stop(true) : this.begin(true)) }, "Check now");
      this.body = h("div", { class: "st-check-body" });
      this.element = h("section", { class: "st-check-panel", "aria-label": "What it takes" },
        h("header", { class: "st-row" }, h("h3", {}, "What it takes"), h("span", { class: "st-space" }), this.button), this.said, this.body);
      new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && this.wake()).observe(this.element);
    }

    /** The preset as it stands now; null: it has faults. */
    update(preset) {
      const text = preset ? JSON.stringify(preset) : "";
      if (text === this.text) return;
      this.stop(false);
      Object.assign(this, { text, wanted: preset, isDone: false, isHeld: false });
      this.body.classList.add("st-old");
      this.button.disabled = !preset;
      this.button.textContent = "Check now";
      const before = this.body.childElementCount ? " Below: as it was before." : "";
      this.said.textContent = `${preset ? "The preset is looked at when you pause." : "Mend the faults first; then this is looked at."}${before}`;
      if (preset) this.timer = setTimeout(() => this.begin(false), PAUSE);
    }

    isShown() { return this.element.offsetParent !== null && !document.hidden; }

    /** The tab is shown (again). */
    wake() {
      if (!this.wanted || this.isDone || this.isHeld) return;
      clearTimeout(this.timer);
      this.timer = setTimeout(() => (this.key ? this.look() : this.begin(false)), this.key ? 0 : PAUSE);
    }

    async begin(asked) {
      clearTimeout(this.timer);
      if (!this.wanted || (!asked && !this.isShown())) return;
      const wanted = this.text;
      const again = asked && this.isDone;
      try {
        const answer = await Studio.ask(this.server, "start_check", { ...this.wanted, asked, again });
        if (wanted !== this.text) { if (answer.key) Studio.ask(this.server, "stop_check", { key: answer.key }).catch(() => {}); return; }
        if (answer.held) {
          this.isHeld = true;
          this.said.textContent = answer.held;
          this.button.textContent = "Check anyway";
          return;
        }
        Object.assign(this, { key: answer.key, isDone: false, isHeld: false });
        this.button.textContent = "Stop";
        await this.look();
      } catch (error) {
        if (wanted === this.text) this.said.textContent = error.message;
      }
    }

    async look() {
      clearTimeout(this.timer);
      const { key } = this;
      if (!key || !this.isShown()) return; // asked again when it is shown
      try {
        const answer = await Studio.ask(this.server, "read_check", { key });
        if (key !== this.key) return;
        if (answer.state === "done") { this.show(answer); return; }
        if (answer.state === "unknown") { this.key = ""; await this.begin(false); return; }
        this.said.textContent = answer.state === "waiting" ? "Another preset is being looked at; this one is next."
          : `Looking at the base model, the images and the memory: ${Math.round(answer.seconds)} s so far.`;
      } catch (error) {
        if (!(error instanceof Studio.Lost)) { this.said.textContent = error.message; return; }
      }
      this.timer = setTimeout(() => this.look(), LOOK);
    }

    stop(isSaid) {
      clearTimeout(this.timer);
      if (this.key && !this.isDone) Studio.ask(this.server, "stop_check", { key: this.key }).catch(() => {});
      this.key = "";
      if (!isSaid) return;
      this.isHeld = true;
      this.said.textContent = "Stopped.";
      this.button.textContent = "Check now";
    }

    show({ report, at }) {
      const { errors, warnings, facts, numbers } = report;
      this.isDone = true;
      this.button.textContent = "Check again";
      this.body.classList.remove("st-old");
      this.said.textContent = `${errors.length ? "This cannot be trained yet." : warnings.length ? "It can be trained; read the remarks." : "Ready to train."} Looked at ${Studio.clock(at)}.`;
      const list = (kind, texts) => (texts.length ? h("ul", { class: `st-${kind}s` }, texts.map((text) => h("li", {}, text))) : null);
      const rows = ROWS.filter(([name]) => facts[name] !== undefined && !(name === "GPU memory" && numbers.limit));
      this.body.replaceChildren(...[list("fault", errors), list("remark", warnings), meter(numbers),
        h("dl", { class: "st-takes" }, rows.map(([name, label]) => [h("dt", {}, label), h("dd", {}, words(name, facts))]))].filter(Boolean));
    }
  };

  /** The predicted peak on a bar as long as the card's memory. */
  function meter({ peak, limit }) {
    if (!peak || !limit) return null;
    const share = peak / limit;
    const state = share > 1 ? "bad" : share > 0.9 ? "warn" : "good";
    const text = `${(peak / GIB).toFixed(1)} of ${(limit / GIB).toFixed(1)} GiB of GPU memory${share > 1 ? ": too much" : ""}`;
    return h("div", { class: `st-memory st-memory-${state}` }, h("strong", {}, text),
      h("div", { class: "st-bar", "aria-hidden": "true" }, h("i", { style: `width: ${Math.min(100, share * 100).toFixed(1)}%` })));
  }

  function words(name, facts) {
    if (name === "buckets") return Object.entries(facts.buckets).map(([size, count]) => `${size}: ${count}`).join(", ");
    if (name === "training images") return `${facts[name]} to train on, ${facts["held-out images"] ?? 0} held out`;
    if (name === "steps") return `${facts.steps}, each image about ${facts.epochs} times`;
    return String(facts[name]);
  }
})();
