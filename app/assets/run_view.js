// One run, live: what it does, what can be asked of it, its curves, its pictures, its result.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const ASKED = {
    stop: "Asked to stop: it finishes this step, saves a checkpoint and ends.", pause: "Asked to pause after this step.",
    continue: "Asked to go on.", save: "Asked to save: a checkpoint and a LoRA file of this moment will follow.",
    sample: "Asked for samples: they appear below when they are drawn.",
  };

  const FORMATS = { U1: "kohya format", U2: "kohya format, Stability's names", F1: "diffusers format", F5: "kohya format",
    F6: "ComfyUI format" };

  Studio.runView = (element, server) => {
    const view = new RunView(server);
    element.replaceChildren(view.element);
    view.again = Studio.poll(element, () => view.poll());
    document.addEventListener("studio:run", () => view.choose(Studio.selected));
    view.choose(Studio.selected);
  };

  class RunView {
    constructor(server) {
      this.server = server;
      this.again = () => {};
      this.group = new Studio.ChartGroup("run");
      this.loss = new Studio.LossPanel(this.group);
      this.ranks = new Studio.RankPanel(this.group);
      this.rate = new Studio.RatePanel(this.group);
      this.distance = new Studio.DistancePanel(this.group);
      this.samples = new Studio.Samples();
      this.controls = new Studio.RunControls((order, prompts) => this.order(order, prompts), () => this.resume());
      this.title = h("h2", {});
      this.badge = h("span");
      this.text = h("p", { class: "st-status" });
      this.spoken = h("output", { role: "status", class: "st-unseen" });
      this.asked = h("p", { class: "st-asked", role: "status" });
      this.bar = h("progress", { "aria-label": "Progress" });
      this.facts = h("dl", { class: "st-numbers", "aria-live": "off" });
      this.trouble = h("div", { class: "st-trouble", role: "alert" });
      this.result = h("div", { class: "st-result" });
      this.notes = h("ol", { class: "st-notes" });
      const wide = h("button", { type: "button", class: "st-button st-quiet", hidden: true, onclick: () => this.group.zoom(null) }, "Show all steps");
      this.group.onzoom = (isZoomed) => { wide.hidden = !isZoomed; };
      this.happened = h("section", { class: "st-card", "aria-label": "What happened" }, h("header", {}, h("h3", {}, "What happened")), this.notes);
      this.element = h("div", { class: "st-run", hidden: true },
        h("section", { class: "st-card st-top", "aria-label": "Run" }, h("div", { class: "st-row st-title" }, this.title, this.badge, h("span", { class: "st-space" }), this.controls.element),
          this.spoken, this.text, this.bar, this.asked, this.facts), this.trouble, this.result,
        this.above = h("div", { class: "st-row st-above" }, h("p", { class: "st-small" }, "Drag over a curve to look closer; a double click shows all again."), h("span", { class: "st-space" }), wide),
        this.charts = h("div", { class: "st-charts" }, this.loss.element, this.ranks.element, this.distance.element, this.rate.element),
        this.samples.element, this.happened);
      this.samples.element.id = "samples";
    }

    /** Look at another run, from its beginning. */
    choose(name) {
      this.run = name;
      this.element.hidden = !name;
      this.title.textContent = name ?? "";
      this.clear();
      this.cursor = this.word = this.folder = "";
      this.group.zoom(null);
      this.showState(["starting", "", 0, 0, false]);
      this.word = "";
      this.showTrouble({ trouble: "", log: "" });
      this.draw();
      this.again();
    }

    clear() {
      Object.assign(this, { steps: {}, rank: {}, validation: {}, distances: [], exports: [], told: [], skipped: [], now: {}, machine: "", saved: 0 });
      this.group.last = 1;
      this.samples.clear();
    }

    async poll() {
      const name = this.run;
      if (!name) return 1;
      let answer;
      try {
        answer = await Studio.ask(this.server, "read_run", { run: name, cursor: this.cursor, word: this.word });
      } catch (error) {
        if (!(error instanceof Studio.Lost) && name === this.run) this.showState(["failed", error.message, 0, 0, false]);
        throw error;
      }
      if (name !== this.run) return 0;
      this.take(answer);
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
      for (const columns of [this.steps, this.rank, this.validation]) Studio.rewind(columns, step);
      this.distances = this.distances.filter((row) => (row.step ?? 0) <= step);
      this.exports = this.exports.filter((row) => (row.step ?? 0) <= step);
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
      if (isAll || answer.notes || answer.skipped) this.drawNotes();
      if (isAll || answer.exports) this.result.replaceChildren(...Studio.results(this.exports, this.folder));
      this.drawFacts();
      // A run that failed before its first step has a message, and nothing else to show
      const isEmpty = !this.isAlive && this.steps.step === undefined && this.samples.shots.length === 0 && this.rank.step === undefined;
      this.above.hidden = this.charts.hidden = this.samples.element.hidden = isEmpty;
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

    async order(order, prompts = []) {
      await this.tell(() => Studio.ask(this.server, "order_run", { run: this.run, order, prompts }), ASKED[order]);
    }

    async resume() {
      await this.tell(() => Studio.ask(this.server, "resume_run", { run: this.run }), "Starting the trainer again.");
    }

    async tell(work, text) {
      try {
        await work();
        this.asked.textContent = text;
      } catch (error) {
        this.asked.textContent = error.message;
      }
      this.again();
    }
  }

  /** The files that a run has written, the result first, each with what reading it back has shown. */
  Studio.results = (exports, folder) => {
    const newest = [...new Map(exports.filter(({ file }) => file).map((row) => [row.file, row])).values()];
    const [results, others] = [newest.filter(({ file }) => !file.includes("/")), newest.filter(({ file }) => file.includes("/"))];
    const cards = results.map((row) => h("section", { class: "st-card st-good-card", "aria-label": "Result" },
      h("div", { class: "st-row" }, h("div", {}, h("h3", {}, row.file), h("p", { class: "st-small" }, about(row)), checked(row)),
        h("span", { class: "st-space" }), download(row, folder, "st-primary", "Download")),
      h("p", { class: "st-small st-where" }, `On this machine: ${folder}/${row.file}`)));
    if (others.length) {
      cards.push(h("details", { class: "st-card" }, h("summary", {}, `${others.length} file${others.length > 1 ? "s" : ""} of earlier steps`),
        h("ul", { class: "st-files" }, others.reverse().map((row) => h("li", {}, h("span", {}, row.file.split("/").at(-1)), h("span", { class: "st-small" }, about(row)), download(row, folder, "", "Download"))))));
    }
    return cards;
  };

  function about(row) {
    const weights = row.weights === "ema" ? "running average (EMA)" : "";
    const format = FORMATS[row.format] ?? row.format;
    return [Number.isFinite(row.step) ? `step ${row.step}` : "", Studio.bytes(row.bytes), row.dtype, format, weights].filter(Boolean).join(" · ");
  }

  function checked(row) {
    if (row.unmatched) return h("p", { class: "st-warn" }, `${row.unmatched} of its keys match nothing in the model.`);
    if (!Number.isFinite(row.worst_rel_error)) return null;
    const good = h("p", { class: "st-good" }, `✓ Read back and compared with the trained weights: worst relative error ${Studio.number(row.worst_rel_error, 2)}.`);
    return row.readers ? h("div", {}, good, ...readBy(row)) : good;
  }

  function readBy(row) {
    const named = row.readers.length ? [h("p", { class: "st-good" }, `✓ All of it is read, at full strength, by ${row.readers.join(", ")}.`)] : [];
    return [...named, ...(row.others ?? []).map((text) => h("p", { class: "st-warn" }, `${text}.`))];
  }

  function download(row, folder, kind, text) {
    const name = row.file.split("/").at(-1);
    return h("a", { class: `st-button ${kind}`, href: Studio.fileUrl(`${folder}/${row.file}`), download: name, "aria-label": `${text} ${name}` }, text);
  }
})();
