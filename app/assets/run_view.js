// One run, live: what it does, what can be asked of it, its curves, its pictures, its result.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h, number } = Studio;
  const MOST_ROWS = 6000; // of the loss curve in the page; then it is thinned out
  const ASKED = {
    stop: "Asked to stop: it finishes this step, saves a checkpoint and ends.", pause: "Asked to pause after this step.",
    continue: "Asked to go on.", save: "Asked to save: a checkpoint and a LoRA file of this moment will follow.",
    sample: "Asked for samples: they appear below when they are drawn.",
    prompts: "Changed: the next samples are drawn for these prompts.",
  };

  Studio.runView = (element, server) => {
    const view = new RunView(server);
    element.replaceChildren(view.element);
    view.again = Studio.poll(element, () => view.poll());
    document.addEventListener("studio:run", () => view.choose(Studio.selected));
    view.choose(Studio.selected);
  };

  class RunView {
    constructor(server) {
      Object.assign(this, { server, turn: 0 });
      this.again = () => {};
      this.group = new Studio.ChartGroup("run");
      this.loss = new Studio.LossPanel(this.group);
      this.ranks = new Studio.RankPanel(this.group);
      this.rate = new Studio.RatePanel(this.group);
      this.distance = new Studio.DistancePanel(this.group);
      this.levels = new Studio.LevelsPanel(this.group);
      this.bins = new Studio.BinsPanel();
      this.heat = new Studio.HeatPanel(this.group, (block, step) => this.ask("read_spectrum", { block, step }));
      this.hard = new Studio.HardPanel((most) => this.ask("read_hard", { most }));
      this.samples = new Studio.Samples();
      this.ownNotes = new Studio.RunNotes((run, text, before) => Studio.ask(server, "save_notes", { run, text, before }));
      this.checkpoints = new Studio.Checkpoints({ pin: (step, pinned) => this.tell(() => this.ask("pin_checkpoint", { step, pinned }), ""),
        branch: (step, branch, changes) => this.branch(step, branch, changes), begun: () => this.title.focus(), file: (row) => Studio.download(row, this.folder, "st-quiet", "Download") });
      this.menu = new Studio.RunMenu({ rename: (name) => this.rename(name), card: () => this.saveCard(), remove: () => this.remove() });
      this.controls = new Studio.RunControls((order, prompts) => this.order(order, prompts), () => this.resume(), () => this.prompts);
      this.title = h("h2", { tabindex: "-1" }); // the focus goes there with a new branch
      this.badge = h("span");
      this.text = h("p", { class: "st-status" });
      this.spoken = h("output", { role: "status", class: "st-unseen" });
      this.asked = h("p", { class: "st-asked", role: "status" });
      this.bar = h("progress", { "aria-label": "Progress" });
      this.facts = h("dl", { class: "st-numbers", "aria-live": "off" });
      this.origin = h("p", { class: "st-small", hidden: true });
      this.best = h("div", { class: "st-bestline", hidden: true });
      this.trouble = h("div", { class: "st-trouble", role: "alert" });
      this.result = h("div", { class: "st-result" });
      this.notes = h("ol", { class: "st-notes", tabindex: "0", "aria-label": "What happened, the newest first" });
      const wide = h("button", { type: "button", class: "st-button st-quiet", hidden: true, onclick: () => this.group.zoom(null) }, "Show all steps");
      this.group.onzoom = (isZoomed) => { wide.hidden = !isZoomed; };
      this.happened = h("section", { class: "st-card", "aria-label": "What happened" }, h("header", {}, h("h3", {}, "What happened")), this.notes);
      this.element = h("div", { class: "st-run", hidden: true },
        h("section", { class: "st-card st-top", "aria-label": "Run" }, h("div", { class: "st-row st-title" }, this.title, this.badge, this.menu.element, h("span", { class: "st-space" }), this.controls.element),
          this.spoken, this.text, this.origin, this.bar, this.asked, h("div", { class: "st-row st-factrow" }, this.facts, Studio.helpOn("facts")), this.best), this.trouble, this.result,
        this.above = h("div", { class: "st-row st-above" }, h("p", { class: "st-small" }, "Drag over a curve to look closer; a double click shows all again."), h("span", { class: "st-space" }), wide),
        this.charts = h("div", { class: "st-charts" }, this.loss.element, this.ranks.element, this.levels.element, this.bins.element,
          this.distance.element, this.rate.element, this.heat.element, this.hard.element),
        this.samples.element, this.checkpoints.element, this.ownNotes.element, this.happened);
      this.samples.element.id = "samples";
    }

    /** Look at another run, from its beginning. */
    choose(name) {
      this.run = name;
      this.turn += 1; // an answer on its way holds rows from a cursor that is void
      this.element.hidden = !name;
      this.title.textContent = name ?? "";
      this.ownNotes.choose(name);
      this.clear();
      this.cursor = this.word = this.folder = this.seen = "";
      this.kept = [];
      this.group.zoom(null);
      this.showState(["starting", "", 0, 0, false]);
      this.word = "";
      this.showTrouble({ trouble: "", log: "" });
      this.draw();
      this.again();
    }

    clear() {
      Object.assign(this, { steps: {}, rank: {}, validation: {}, blocks: {}, noise: {}, distances: [], exports: [], bests: [], told: [], skipped: [], now: {}, machine: "", saved: 0, prompts: [], from: null });
      this.group.last = 1;
      this.samples.clear();
      this.hard.clear();
      this.heat.clear();
    }

    async poll() {
      const { run: name, turn } = this;
      if (!name) return 1;
      let answer;
      const begun = performance.now();
      try {
        answer = await Studio.ask(this.server, "read_run", { run: name, cursor: this.cursor, word: this.word, seen: this.seen });
      } catch (error) {
        if (!(error instanceof Studio.Lost) && turn === this.turn) this.showState(["failed", error.message, 0, 0, false]);
        throw error;
      }
      if (turn !== this.turn) return 0;
      this.take(answer);
      if (answer.seen) this.seen = this.ownNotes.take(answer.own_notes, answer.notes_tag, begun) ? answer.seen : "";
      return answer.state[4] ? 1 : 3;
    }

    take(answer) {
      if (answer.reset) this.clear();
      if (answer.folder) this.folder = this.samples.folder = answer.folder;
      if (answer.rewind !== undefined) this.rewind(answer.rewind);
      if (answer.cursor) this.cursor = answer.cursor;
      if (answer.steps) Studio.append(this.steps, answer.steps);
      if (answer.ranks) Studio.append(this.rank, answer.ranks);
      if (answer.validation) Studio.append(this.validation, answer.validation);
      if (answer.blocks) Studio.append(this.blocks, answer.blocks);
      if (answer.bins) Studio.append(this.noise, answer.bins);
      if (answer.hard) this.hard.news();
      this.steps = Studio.thin(this.steps, MOST_ROWS);
      this.bests.push(...(answer.bests ?? []));
      this.prompts = answer.prompts ?? this.prompts;
      this.from = answer.origin ?? this.from;
      this.kept = answer.checkpoints ?? this.kept;
      this.distances.push(...(answer.distances ?? []));
      this.exports.push(...(answer.exports ?? []));
      this.told.push(...(answer.notes ?? []));
      this.skipped.push(...(answer.skipped ?? []));
      Object.assign(this.now, answer.now);
      this.machine = answer.machine ?? this.machine;
      this.saved = answer.saved ?? this.saved;
      if (answer.samples) this.samples.add(answer.samples);
      this.showState(answer.state);
      this.showTrouble(answer);
      this.draw(answer);
    }

    rewind(step) {
      for (const columns of [this.steps, this.rank, this.validation, this.blocks, this.noise]) Studio.rewind(columns, step);
      this.distances = this.distances.filter((row) => (row.step ?? 0) <= step);
      this.exports = this.exports.filter((row) => (row.step ?? 0) <= step);
      this.bests = this.bests.filter((row) => (row.step ?? 0) <= step);
      this.samples.rewind(step);
      this.isCut = true;
    }

    /** A screen reader is told of changes of state, and not of each step. */
    showState([word, text, step, steps, isAlive]) {
      if (word !== this.word) {
        this.asked.textContent = "";
        this.badge.replaceWith(this.badge = Studio.badge(word));
        this.spoken.textContent = text && this.run ? `${this.run}: ${text}` : "";
        this.controls.show(word, isAlive, this.saved, Boolean(this.folder));
        this.menu.show(this.run, isAlive || word === "waiting", Boolean(this.folder));
      }
      const isSaidByBadge = ["training", "done", "stopped"].includes(word) && text.startsWith(word);
      const said = isSaidByBadge ? "" : text;
      if (this.text.textContent !== said) this.text.textContent = said;
      this.word = word;
      Object.assign(this, { step, planned: steps, isAlive });
      this.bar.hidden = !steps;
      if (steps) Object.assign(this.bar, { max: steps, value: step });
    }

    /** A message that says why it did not start, or the end of its log; and the way on. */
    showTrouble({ trouble, log, saved }) {
      if (trouble === undefined && log === undefined) return;
      this.saved = saved ?? this.saved;
      const parts = [];
      if (trouble) parts.push(h("h3", {}, "The trainer did not start"), h("pre", {}, trouble));
      if (log) parts.push(h("h3", {}, "The last lines of trainer.log"), h("pre", { tabindex: "0" }, log));
      this.trouble.replaceChildren(...parts);
      this.trouble.hidden = parts.length === 0;
      this.controls.show(this.word, this.isAlive, this.saved, Boolean(this.folder));
      this.menu.show(this.run, this.isAlive || this.word === "waiting", Boolean(this.folder));
    }

    /** Draw what an answer brought; all of it without one. */
    draw(answer) {
      const isAll = !answer || answer.reset || this.isCut;
      this.isCut = false;
      const ends = [this.steps, this.rank, this.validation].map(({ step }) => step?.at(-1) ?? 0);
      const last = Math.max(...ends, ...this.distances.map((row) => row.step ?? 0), 1);
      const isWider = last !== this.group.last;
      this.group.last = last;
      if (isAll || answer.steps || answer.validation) this.loss.update(this.steps, this.validation);
      if (isAll || answer.steps) this.rate.update(this.steps);
      if (isAll || answer.ranks || isWider) this.ranks.update(this.rank);
      if (isAll || answer.distances || isWider) this.distance.update(this.distances);
      if (isAll || answer.validation || isWider) this.levels.update(this.validation);
      if (isAll || answer.bins) this.bins.update(this.noise);
      if (isAll || answer.blocks) this.heat.update(this.blocks);
      if (isAll || answer.checkpoints || answer.validation || answer.distances || answer.bests || answer.exports) this.drawCheckpoints();
      if (isAll || answer.notes || answer.skipped) this.drawNotes();
      if (isAll || answer.exports) this.result.replaceChildren(...Studio.results(this.exports, this.folder));
      this.drawFacts();
      // What an older run has not measured will not come; in a run that goes on it has its place
      for (const panel of [this.levels, this.bins, this.heat, this.hard]) panel.element.hidden = !panel.hasData && !this.isAlive;
      this.ownNotes.element.hidden = !this.folder;
      // A run that failed before its first step has a message, and nothing else to show
      const isEmpty = !this.isAlive && this.steps.step === undefined && this.samples.shots.length === 0 && this.rank.step === undefined;
      this.above.hidden = this.charts.hidden = this.samples.element.hidden = isEmpty;
    }

    drawCheckpoints() {
      const best = this.bests.at(-1);
      const { step = [], loss = [] } = this.validation;
      this.checkpoints.show(this.kept, best, { validation: new Map(step.map((at, row) => [at, loss[row]])), kid: new Map(this.distances.map((row) => [row.step, row])),
        files: new Map(this.exports.filter(({ file }) => file?.includes("/")).map((row) => [row.step, row])) });
      this.best.hidden = !best;
      if (best) this.best.replaceChildren(h("span", { class: "st-tag st-best" }, this.isAlive ? "★ best so far" : "★ best"), h("strong", {}, `step ${best.step}`), h("span", {}, bestValue(best)), Studio.helpOn("best"), h("span", { class: "st-small st-why" }, best.why ?? ""));
      this.origin.hidden = !this.from;
      if (this.from) this.origin.replaceChildren("A branch of ", h("button", { type: "button", class: "st-link", onclick: () => Studio.chooseRun(this.from[0]) }, this.from[0]), `, from step ${this.from[1]}.`);
    }

    drawFacts() {
      const { sec, eta, vram, vram_peak: peak, ram } = this.now;
      const share = this.planned && this.isAlive ? ` (${Math.floor((100 * this.step) / this.planned)} %)` : "";
      const facts = [
        ["Step", this.planned ? `${this.step} of ${this.planned}${share}` : "–"],
        ["Speed", Studio.speed(sec)],
        this.isAlive ? ["Time left", Studio.duration(eta)] : null,
        vram ? ["GPU memory", `${Studio.bytes(vram)}${peak ? `, peak ${Studio.bytes(peak)}` : ""}`]
          : ram ? ["Memory", Studio.bytes(ram)] : null,
        ["Loss", Studio.number(Studio.latest(this.steps.loss ?? []))],
        this.validation.loss ? ["Validation", Studio.number(Studio.latest(this.validation.loss))] : null,
        this.machine ? ["Runs on", this.machine] : null,
      ].filter(Boolean);
      facts.forEach(([name, value], index) => {
        const pair = this.facts.children[index] ?? this.facts.appendChild(h("div", {}, h("dt"), h("dd")));
        pair.classList.toggle("st-wide", value.length > 20);
        for (const [element, text] of [[pair.firstChild, name], [pair.lastChild, value]]) if (element.textContent !== text) element.textContent = text;
      });
      while (this.facts.children.length > facts.length) this.facts.lastChild.remove();
    }

    drawNotes() {
      const lines = this.told.slice(-200).reverse().map(([t, step, kind, text]) => h("li", { class: `st-note-${kind}` },
        h("time", { datetime: t ? new Date(t * 1000).toISOString() : null }, t ? Studio.clock(t) : ""),
        h("span", { class: "st-small" }, step === null || step === undefined ? "" : `step ${step}`), h("span", {}, text)));
      const skipped = [...new Map(this.skipped)]; // each start of a run tells them again
      const files = skipped.length ? h("li", { class: "st-note-bad" }, h("details", {}, h("summary", {}, `${skipped.length} file${skipped.length > 1 ? "s" : ""} left out`),
        h("ul", {}, skipped.map(([file, reason]) => h("li", {}, `${file}: ${reason}`))))) : null;
      this.notes.replaceChildren(...[files, ...lines].filter(Boolean));
      this.happened.hidden = this.notes.children.length === 0;
    }

    async saveCard() {
      await this.tell(async () => Studio.saveHtml(await Studio.ask(this.server, "make_card", { run: this.run })), "The run card is saved: one HTML file to share.");
    }

    async order(order, prompts = []) {
      await this.tell(() => Studio.ask(this.server, "order_run", { run: this.run, order, prompts }), ASKED[order]);
    }

    ask(name, request) { return Studio.ask(this.server, name, { run: this.run, ...request }); }

    async resume() {
      await this.tell(() => this.ask("resume_run"), ({ waits }) => (waits ? "It goes on when its turn comes: another run is on, and it waits in the queue." : "Starting the trainer."));
    }

    async branch(step, branch, changes) {
      const { run } = await this.ask("branch_run", { step, branch, changes });
      document.dispatchEvent(new CustomEvent("studio:started", { detail: run }));
    }

    async rename(name) {
      if (name === this.run) return;
      await this.ownNotes.settled();
      const { run } = await this.ask("rename_run", { new: name });
      document.dispatchEvent(new CustomEvent("studio:started", { detail: run }));
    }

    async remove() {
      const { run, server } = this;
      await this.tell(async () => {
        await this.ownNotes.settled();
        const { entry } = await Studio.ask(server, "delete_run", { run });
        document.dispatchEvent(new CustomEvent("studio:deleted", { detail: { run, undo: () => Studio.ask(server, "restore_run", { entry }) } }));
      }, "");
    }

    async tell(work, text) {
      try {
        const answer = await work();
        this.asked.textContent = typeof text === "function" ? text(answer) : text;
      } catch (error) {
        this.asked.textContent = error.message;
      }
      this.again();
    }
  }

  /** "validation loss 0.1234", or the KID with its interval. */
  function bestValue({ by, value, low, high }) {
    if (by !== "kid") return `validation loss ${number(value)}`;
    return `KID ×10³ ${number(value, 3)}${Number.isFinite(low) ? ` (95 %: ${number(low, 3)} to ${number(high, 3)})` : ""}`;
  }
})();
