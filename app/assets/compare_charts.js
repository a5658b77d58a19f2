// Curves of several settings over each other, and their samples side by side.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;

  Studio.CompareCharts = class {
    constructor() {
      this.hidden = new Set(); // settings whose curves are switched off
      this.weight = Number(localStorage.getItem("studio.smooth") ?? 0.95);
      this.group = new Studio.ChartGroup("compare");
      const slider = h("input", { type: "range", min: "0", max: "0.99", step: "0.01", value: this.weight, oninput: () => {
        this.weight = Number(slider.value);
        localStorage.setItem("studio.smooth", slider.value);
        this.redraw();
      } });
      const chart = (title, help, empty, tools) => new Studio.Chart(this.group, { title, help: Studio.helpOn(help), empty, tools });
      this.validation = chart("Validation loss", "loss", "Appears when the held-out images were measured.");
      this.loss = chart("Training loss, smoothed", "loss", "Appears with the first steps.", h("label", { class: "st-slider" }, "Smoothing ", slider));
      this.rank = chart("Effective rank", "erank", "Measured every few steps (log.rank_every in the preset).");
      const wide = h("button", { type: "button", class: "st-button st-quiet", hidden: true, onclick: () => this.group.zoom(null) }, "Show all steps");
      this.group.onzoom = (isZoomed) => { wide.hidden = !isZoomed; };
      this.legend = h("ul", { class: "st-cmp-legend", "aria-label": "Settings" });
      this.element = h("section", { class: "st-cmp-curves", "aria-label": "Curves" }, h("div", { class: "st-row" }, this.legend, h("span", { class: "st-space" }), wide),
        h("div", { class: "st-charts" }, this.validation.element, this.loss.element, this.rank.element));
    }

    show({ rows }, curves, styles) {
      Object.assign(this, { rows, curves, styles });
      const known = rows.map(({ name }) => `${name}\n${styles.get(name).colour}`).join("\n");
      if (known !== this.known) this.drawLegend();
      this.known = known;
      this.redraw();
    }

    drawLegend() {
      this.legend.replaceChildren(...this.rows.map(({ name }) => {
        const button = h("button", { type: "button", "aria-pressed": String(!this.hidden.has(name)), title: "Show or hide its curves", onclick: () => {
          if (!this.hidden.delete(name)) this.hidden.add(name);
          button.setAttribute("aria-pressed", String(!this.hidden.has(name)));
          this.redraw();
        } }, Studio.styleKey(this.styles.get(name)), name);
        return h("li", {}, button);
      }));
    }

    redraw() {
      if (!this.rows) return;
      const steps = [...this.curves.values()].flatMap(({ loss, validation, rank }) => [loss, validation, rank].map(({ step }) => step?.at(-1) ?? 0));
      this.group.last = Math.max(1, ...steps);
      this.fill(this.validation, ({ validation }) => validation.step && [validation.step, validation.loss], true);
      this.fill(this.loss, ({ loss }) => loss.step && [loss.step, Studio.smooth({ loss: loss.mean, mean: loss.mean, n: loss.n }, this.weight)], false);
      this.fill(this.rank, ({ rank }) => rank.step && [rank.step, rank.mean], false);
    }

    /** A curve a setting: that of its run, or the mean of its runs with these behind it. */
    fill(chart, columns, hasPoints) {
      const series = [];
      const tables = [];
      for (const { name, runs } of this.rows) {
        if (this.hidden.has(name)) continue;
        const { colour, dash } = this.styles.get(name);
        const found = runs.map((run) => [run, this.curves.get(run) && columns(this.curves.get(run))]).filter(([, table]) => table);
        const mean = found.length > 1 ? Studio.meanCurve(found.map(([, table]) => table)) : null;
        for (const [run, table] of found) {
          const few = hasPoints && !mean && table[0].length < 40;
          series.push(mean ? { label: run, colour, width: 1, faint: true, quiet: true }
            : { label: found.length > 1 ? run : name, colour, dash: dash.length ? dash : undefined, width: 2, points: few || table[0].length < 2 });
          tables.push(table);
        }
        if (mean) {
          series.push({ label: name, colour, dash: dash.length ? dash : undefined, width: 2.5, points: hasPoints && mean[0].length < 40 });
          tables.push(mean);
        }
      }
      chart.update(series, tables.length ? Studio.align(...tables) : [[]]);
    }
  };

  /** The mean of several curves [x, y] at the steps that all of them have; null with fewer than two such steps. */
  Studio.meanCurve = (tables) => {
    const rows = tables.map(([x, y]) => new Map(x.map((step, index) => [step, y[index]])));
    const steps = tables[0][0].filter((step) => rows.every((row) => Number.isFinite(row.get(step))));
    return steps.length < 2 ? null : [steps, steps.map((step) => rows.reduce((sum, row) => sum + row.get(step), 0) / rows.length)];
  };

  /** The same prompt, seed and step of each setting, side by side. */
  Studio.CompareShots = class {
    constructor() {
      this.prompt = h("select", { onchange: () => this.draw() });
      this.step = h("select", { onchange: () => { this.wanted = this.step.value; this.draw(); } });
      this.grid = h("div", { class: "st-cmp-shots" });
      this.element = h("section", { class: "st-card", "aria-label": "Samples side by side" }, h("header", {}, h("h3", {}, "Samples side by side")),
        h("div", { class: "st-cmp-pick" }, Studio.field("Prompt", this.prompt), Studio.field("Step", this.step)), this.grid);
    }

    /** One run a setting stands for it: its first that drew anything. */
    show({ rows }, curves) {
      this.drawn = rows.map(({ name, runs }) => [name, runs.map((run) => curves.get(run)).find((run) => run?.shots.length)]).filter(([, run]) => run);
      const shots = this.drawn.flatMap(([, run]) => run.shots);
      this.element.hidden = shots.length === 0;
      const prompts = new Map(shots.map(([, prompt, seed]) => [JSON.stringify([prompt, seed]), prompt]));
      refill(this.prompt, [...prompts], this.prompt.value);
      const steps = [...new Set(shots.map(([step]) => step))].sort((a, b) => a - b);
      const shared = steps.filter((step) => this.drawn.every(([, run]) => run.shots.some(([at]) => at === step)));
      refill(this.step, steps.map((step) => [String(step), nameOf(step)]), this.wanted ?? String(shared.at(-1) ?? steps.at(-1)));
      this.draw();
    }

    draw() {
      const found = this.drawn.map(([name, run]) => {
        const shot = run.shots.findLast(([step, prompt, seed]) => String(step) === this.step.value && JSON.stringify([prompt, seed]) === this.prompt.value);
        return [name, shot ? Studio.fileUrl(`${run.folder}/${shot[3]}`) : ""];
      });
      const known = JSON.stringify(found);
      if (known === this.known) return;
      this.known = known;
      const what = `${nameOf(Number(this.step.value))}: ${this.prompt.selectedOptions[0]?.textContent ?? ""}`;
      this.grid.replaceChildren(...found.map(([name, url]) => h("figure", {}, url
        ? h("a", { href: url, target: "_blank", rel: "noopener" }, h("img", { src: url, alt: `${name}, ${what}`, loading: "lazy", decoding: "async" }))
        : h("span", { class: "st-small" }, "not drawn at this step"), h("figcaption", {}, name))));
    }
  };

  const nameOf = (step) => (step === 0 ? "Base model" : `Step ${step}`);

  function refill(select, options, wanted) {
    const known = JSON.stringify(options);
    if (select.dataset.known !== known) {
      select.replaceChildren(...options.map(([value, text]) => h("option", { value }, text)));
      select.dataset.known = known;
    }
    if (options.some(([value]) => value === wanted)) select.value = wanted;
  }
})();
