// What may be wrong with a data set: each kind with its images, and a remedy that can be undone.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const LEVELS = { bad: "must be mended", warn: "worth a look", info: "to know" };

  Studio.HealthPanel = class {
    constructor(page) {
      Object.assign(this, { page, turn: 0 });
      this.told = h("p", { class: "st-small", role: "status" });
      this.list = h("ul", { class: "st-findings", "aria-label": "Findings" });
      this.element = h("div", {}, this.slot = h("div"), this.told, this.list);
    }

    opened() {
      this.slot.replaceChildren(this.page.settings.element);
      return this.page.store.attempt(async () => { await this.page.settings.use(() => this.load()); await this.load(); });
    }

    changed() { this.load(); }

    poll() {
      if (this.known !== undefined && this.known < this.of) this.load();
    }

    get request() {
      const { resolution, handling } = this.page.settings.values;
      return { trigger: handling.trigger, too_small: resolution };
    }

    load() {
      return this.page.store.attempt(async () => {
        const turn = (this.turn += 1);
        const asked = { id: this.page.store.id, ...this.request };
        const { known, of, findings } = await this.page.store.ask("check_health", asked);
        if (turn !== this.turn) return;
        Object.assign(this, { known, of });
        const looked = known < of ? `Looked at ${known} of ${Studio.count(of, "image")} so far. ` : "";
        this.told.textContent = `${looked}${findings.length ? `${Studio.count(findings.length, "finding")}.` : known < of ? "" : "Nothing was found: this data set is in good health."}`;
        this.list.replaceChildren(...findings.map((finding) => this.finding(finding, asked)));
      });
    }

    finding({ kind, title, text, level, count, files, images, remedy }, asked) {
      const show = images ? this.page.button("Show them", "", () => this.page.find({ names: files }, title), { "aria-label": `Show: ${title}` })
        : h("details", { class: "st-small" }, h("summary", {}, "Their names"), h("ul", { class: "st-trash" }, files.slice(0, 200).map((name) => h("li", {}, name)),
          files.length > 200 ? h("li", {}, `and ${files.length - 200} more`) : null));
      const mend = remedy ? this.page.button(remedy.label, "", () => this.mend({ kind, ...asked }), { "aria-label": `${remedy.label}: ${title}` }) : null;
      return h("li", {}, h("div", { class: "st-row" }, h("strong", {}, `${title}: ${count}`), h("span", { class: `st-tag st-level-${level}` }, LEVELS[level])),
        h("p", { class: "st-small" }, text), h("div", { class: "st-row" }, show, mend));
    }

    async mend({ id, ...request }) {
      const answer = await this.page.change("apply_remedy", request, id);
      if (answer && !answer.skipped?.length) this.page.say(`Done: ${answer.undo ?? "nothing was to be changed"}. “Undo” takes it back.`);
    }
  };
})();
