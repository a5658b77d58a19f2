// The tab "Compare": which runs, what can be said of them, their numbers, curves, costs and pictures; kept up to date.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const KEPT = "studio.compared";
  const LIST_EVERY = 6; // seconds between two looks for new runs

  Studio.compare = (element, server, { methods, most }) => {
    const page = new ComparePage(server, methods, most);
    element.replaceChildren(page.element);
    page.again = Studio.poll(element, () => page.poll());
  };

  /** Hand a page that was made here to the person, as a file. */
  Studio.saveHtml = ({ file, html }) => {
    const url = URL.createObjectURL(new Blob([html], { type: "text/html" }));
    const link = h("a", { href: url, download: file });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  };

  class ComparePage {
    constructor(server, methods, most) {
      Object.assign(this, { server, most, listTag: "", listedAt: 0, runs: [], comparisons: [], again: () => {} });
      this.chosen = JSON.parse(sessionStorage.getItem(KEPT) ?? "null") ?? { title: "", runs: [] };
      this.choice = new Studio.CompareChoice((title, runs) => this.choose(title, runs), most);
      this.form = new Studio.CompareForm(server, methods, ({ name, runs }) => { this.listedAt = 0; this.choose(name, runs); });
      this.fresh = h("button", { type: "button", class: "st-button st-primary", "aria-expanded": "false", onclick: () => this.form.toggle(this.fresh) }, "New comparison");
      this.title = h("h2", {});
      this.state = h("p", { class: "st-small" });
      this.said = h("p", { class: "st-warn", role: "alert" });
      this.report = h("button", { type: "button", class: "st-button", onclick: () => this.save(this.report, "make_report", { runs: this.chosen.runs, title: this.chosen.title }) }, "Save report");
      this.cardOf = h("select", { "aria-label": "Run of the card" });
      this.card = h("button", { type: "button", class: "st-button", onclick: () => this.save(this.card, "make_card", { run: this.cardOf.value }) }, "Save run card");
      this.findings = new Studio.CompareFindings();
      this.table = new Studio.CompareTable();
      this.charts = new Studio.CompareCharts();
      this.fronts = new Studio.CompareFronts();
      this.shots = new Studio.CompareShots();
      this.empty = h("section", { class: "st-card st-empty" });
      this.body = h("div", { class: "st-cmp-body" },
        h("section", { class: "st-card", "aria-label": "Comparison" }, h("div", { class: "st-row st-title" }, this.title, h("span", { class: "st-space" }),
          h("div", { class: "st-row st-cmp-save" }, this.report, this.cardOf, this.card)), this.state, this.said, this.findings.element),
        this.table.element, this.charts.element, this.fronts.element, this.shots.element);
      this.element = h("div", { class: "st-cmp" },
        h("nav", { class: "st-cmp-side", "aria-label": "Runs to compare" }, h("div", { class: "st-row" }, h("h2", {}, "Compare"), h("span", { class: "st-space" }), this.fresh), this.choice.element),
        h("div", { class: "st-cmp-main" }, this.form.element, this.empty, this.body));
      this.clear();
    }

    clear() {
      Object.assign(this, { cursors: {}, tag: "", curves: new Map(), rows: null });
      this.draw();
    }

    choose(title, runs) {
      this.chosen = { title, runs };
      sessionStorage.setItem(KEPT, JSON.stringify(this.chosen));
      this.choice.mark(this.chosen);
      this.clear();
      this.again();
    }

    async poll() {
      if (Date.now() - this.listedAt > LIST_EVERY * 1000) await this.list();
      const { runs } = this.chosen;
      if (!runs.length) return 2;
      const answer = await Studio.ask(this.server, "read_compared", { runs, cursors: this.cursors, seen: this.tag });
      if (runs === this.chosen.runs) this.take(answer);
      return answer.alive ? 2 : 5;
    }

    async list() {
      const answer = await Studio.ask(this.server, "list_compared", { seen: this.listTag });
      this.listedAt = Date.now();
      if (!answer.tag) return;
      this.listTag = answer.tag;
      this.choice.offer(answer.runs, answer.comparisons, this.chosen);
      this.hasRuns = answer.runs.length > 0;
      this.draw();
    }

    take(answer) {
      let isNew = Boolean(answer.tag);
      for (const [name, more] of Object.entries(answer.curves)) {
        this.cursors[name] = more.cursor;
        if (more.reset || !this.curves.has(name)) this.curves.set(name, { loss: {}, validation: {}, rank: {}, shots: [], folder: more.folder });
        const kept = this.curves.get(name);
        kept.state = more.state;
        for (const kind of ["loss", "validation", "rank"]) if (more[kind]) { Studio.append(kept[kind], more[kind]); isNew = true; }
        if (more.shots) { kept.shots.push(...more.shots); isNew = true; }
      }
      if (answer.tag) {
        this.tag = answer.tag;
        this.rows = answer.table;
      }
      this.waiting = answer.waiting;
      if (isNew) this.draw();
      else this.drawState();
    }

    draw() {
      const hasChosen = this.chosen.runs.length > 0;
      this.body.hidden = !hasChosen || !this.rows;
      this.empty.hidden = hasChosen;
      this.empty.replaceChildren(...emptyText(this.hasRuns));
      if (this.body.hidden) return;
      const styles = new Map(this.rows.rows.map((row, index) => [row.name, Studio.settingStyle(index)]));
      const runs = [...this.curves.keys()];
      if (this.cardOf.options.length !== runs.length) this.cardOf.replaceChildren(...runs.map((name) => h("option", { value: name }, name)));
      this.title.textContent = this.chosen.title || (this.rows.rows.length > 1 ? "Side by side" : this.rows.rows[0]?.name ?? "");
      this.drawState();
      this.findings.show(this.rows);
      this.table.show(this.rows, styles);
      this.charts.show(this.rows, this.curves, styles);
      this.fronts.show(this.rows, styles);
      this.shots.show(this.rows, this.curves);
    }

    drawState() {
      const words = [...this.curves.values()].map(({ state }) => state[0]).concat(Object.keys(this.waiting ?? {}).map(() => "waiting"));
      const counts = new Map();
      for (const word of words) counts.set(word, (counts.get(word) ?? 0) + 1);
      const told = [...counts].map(([word, count]) => `${count} ${Studio.STATES[word] ?? word}`).join(", ");
      const gone = Object.entries(this.waiting ?? {}).filter(([, text]) => text.includes("not there")).map(([name]) => name);
      const text = `${words.length} run${words.length === 1 ? "" : "s"}: ${told}.${gone.length ? ` Not there any more: ${gone.join(", ")}.` : ""}`;
      if (this.state.textContent !== text) this.state.textContent = text;
    }

    async save(button, name, request) {
      button.disabled = true;
      this.said.textContent = "";
      try {
        Studio.saveHtml(await Studio.ask(this.server, name, request));
      } catch (error) {
        this.said.textContent = error.message;
      }
      button.disabled = false;
    }
  }

  function emptyText(hasRuns) {
    if (hasRuns) return [h("p", {}, "Choose runs from the list to see them side by side, or make a new comparison: one run for each method, rank, learning rate and seed.")];
    return [h("p", {}, "There are no runs yet. “New comparison” makes several from one preset, with the same images and noise for each method; or train one on the tab Train.")];
  }

  /** The comparisons that were made, and all runs to tick. */
  Studio.CompareChoice = class {
    constructor(changed, most) {
      Object.assign(this, { changed, most, comparisons: [], boxes: new Map() });
      this.made = h("ul", { class: "st-cmp-made" });
      this.filter = h("input", { type: "search", placeholder: "Find a run", "aria-label": "Find a run", oninput: () => this.sift() });
      this.list = h("ul", { class: "st-cmp-runs" });
      this.none = h("button", { type: "button", class: "st-button st-quiet", onclick: () => this.changed("", []) }, "Choose none");
      this.note = h("p", { class: "st-small" });
      this.element = h("div", { class: "st-cmp-choice" }, this.made, this.head = h("div", { class: "st-row" }, h("h3", {}, "Runs"), h("span", { class: "st-space" }), this.none), this.filter, this.list, this.note);
    }

    offer(runs, comparisons, chosen) {
      this.comparisons = comparisons;
      this.made.replaceChildren(...comparisons.map(([name, preset, names]) => h("li", {}, h("button", { type: "button", class: "st-cmp-one", "data-name": name,
        onclick: () => this.changed(name, names.slice(0, this.most)) }, h("span", { class: "st-name" }, name), h("span", { class: "st-small" }, `${names.length} runs from ${preset}`)))));
      this.boxes = new Map(runs.map((row) => [row[0], row]));
      this.list.replaceChildren(...runs.map(([name, word, , method, rank, lr, seed]) => {
        const box = h("input", { type: "checkbox", value: name, onchange: () => this.changed("", this.ticked()) });
        const facts = [method, rank === null ? "" : `rank ${rank}`, lr === null ? "" : Studio.number(lr, 3), seed === null ? "" : `seed ${seed}`].filter(Boolean).join(" · ");
        return h("li", { "data-name": name }, h("label", {}, box, h("span", {}, h("span", { class: "st-name" }, name), h("span", { class: "st-small" }, `${facts} · ${Studio.STATES[word] ?? word}`))));
      }));
      this.head.hidden = this.list.hidden = runs.length === 0;
      this.filter.hidden = runs.length < 8;
      this.mark(chosen);
      this.sift();
    }

    ticked() { return [...this.list.querySelectorAll("input:checked")].map((box) => box.value); }

    mark({ title, runs }) {
      const chosen = new Set(runs);
      for (const box of this.list.querySelectorAll("input")) {
        box.checked = chosen.has(box.value);
        box.disabled = !box.checked && chosen.size >= this.most;
      }
      for (const button of this.made.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.dataset.name === title));
      this.none.disabled = chosen.size === 0;
      this.note.textContent = chosen.size >= this.most ? `At most ${this.most} runs at once.` : "";
    }

    sift() {
      const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const item of this.list.children) item.hidden = !words.every((word) => item.textContent.toLowerCase().includes(word));
    }
  };
})();
