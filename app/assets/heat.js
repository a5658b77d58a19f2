// Effective rank of each block over the steps as a map of colours with its numbers, and the spectrum of any cell.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h, number, svg } = Studio;
  const MOST = 200; // columns that are drawn
  const [LABELS, ROW, AXIS] = [128, 16, 22]; // pixels
  const STOPS = [[38, 24, 82], [57, 73, 158], [33, 133, 150], [92, 184, 116], [246, 226, 84]]; // dark to bright, told apart by all eyes

  /** The colour of a value between low and high. */
  Studio.heatColour = (value, low, high) => {
    const share = Math.min(1, Math.max(0, (value - low) / (high - low || 1))) * (STOPS.length - 1);
    const at = Math.min(STOPS.length - 2, Math.floor(share));
    return `rgb(${STOPS[at].map((from, part) => Math.round(from + (STOPS[at + 1][part] - from) * (share - at))).join(" ")})`;
  };

  Studio.HeatPanel = class {
    /** `spectrum(block, step)` asks the server. */
    constructor(group, spectrum) {
      Object.assign(this, { group, spectrum, blocks: {}, at: null, turn: 0 });
      this.canvas = h("canvas", { class: "st-heat", role: "img", tabindex: "0", "aria-label": "Effective rank by block", onkeydown: (event) => this.onkey(event),
        onclick: (event) => this.choose(this.cellAt(event), true), onpointermove: (event) => this.choose(this.cellAt(event), false) });
      this.low = h("span");
      this.high = h("span");
      this.middle = h("span");
      this.scale = h("p", { class: "st-scale st-small" }, this.low, h("i", { "aria-hidden": "true", style: `background:linear-gradient(90deg,${STOPS.map((stop) => `rgb(${stop.join(" ")})`).join(",")})` }), this.high, this.middle);
      this.said = h("p", { class: "st-facts", role: "status" });
      this.detail = h("div", { class: "st-spectrum", hidden: true });
      this.rows = h("tbody");
      this.numbers = h("details", { class: "st-small" }, h("summary", {}, "As numbers"), h("div", { class: "st-sideways", tabindex: "0", role: "region", "aria-label": "Effective rank by block as numbers" },
        h("table", { class: "st-legend" }, h("thead", {}, h("tr", {}, ["Block", "First", "Newest", "Spectrum"].map((name) => h("th", { scope: "col" }, name)))), this.rows)));
      this.numbers.addEventListener("toggle", () => this.fillTable());
      this.empty = h("p", { class: "st-empty" }, "Comes with the first measurement (log.rank_every in the preset).");
      this.body = h("div", {}, this.scale, this.canvas, this.said, this.detail, this.numbers);
      this.element = h("section", { class: "st-card st-wide-card", "aria-label": "Effective rank by block" },
        h("header", {}, h("h3", {}, "Effective rank by block"), Studio.helpOn("blocks")), this.empty, this.body);
      this.plot = { setScale: () => this.draw(), redraw: () => this.draw() }; // the shared zoom is for this one, too
      group.charts.add(this);
      new ResizeObserver(() => this.draw()).observe(this.body);
      this.update({});
    }

    get names() { return Object.keys(this.blocks.erank ?? {}); }

    clear() {
      this.at = null;
      this.turn += 1; // a spectrum on its way is of what was shown before
      this.detail.hidden = true;
      this.said.textContent = "";
    }

    update(blocks) {
      this.blocks = blocks;
      this.hasData = Boolean(blocks.step?.length);
      this.columns = this.hasData ? this.shown() : []; // for keys, also before it can be drawn
      this.empty.hidden = this.hasData;
      this.body.hidden = !this.hasData;
      if (!this.hasData) { this.clear(); return; }
      const values = this.names.flatMap((name) => blocks.erank[name]).filter((value) => value !== null);
      [this.least, this.most] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
      const rank = Studio.latest(blocks.rank ?? []);
      set(this.low, number(this.least, 3));
      set(this.high, number(this.most, 3));
      set(this.middle, rank === null ? "" : `rank: ${rank}, the most there can be`);
      this.draw();
      this.fillTable();
    }

    /** The rows of `step` that are shown, thinned to what a screen can tell apart. */
    shown() {
      const [low, high] = this.group.range;
      const rows = this.blocks.step.map((step, row) => [step, row]).filter(([step]) => step >= low && step <= high).map(([, row]) => row);
      const stride = Math.ceil(rows.length / MOST) || 1;
      return rows.reverse().filter((_, index) => index % stride === 0).reverse();
    }

    draw() {
      const { names } = this;
      const width = this.canvas.clientWidth;
      if (!this.hasData || !width) return;
      this.columns = this.shown();
      const height = names.length * ROW + AXIS;
      const dots = devicePixelRatio;
      this.left = Math.min(LABELS, width * 0.34);
      this.canvas.style.height = `${height}px`;
      Object.assign(this.canvas, { width: Math.round(width * dots), height: Math.round(height * dots) });
      const pen = this.canvas.getContext("2d");
      pen.scale(dots, dots);
      const slot = (width - this.left) / Math.max(1, this.columns.length);
      const ink = getComputedStyle(this.canvas);
      names.forEach((name, line) => {
        this.columns.forEach((row, index) => {
          const value = this.blocks.erank[name][row];
          if (value === null || value === undefined) return;
          pen.fillStyle = Studio.heatColour(value, this.least, this.most);
          pen.fillRect(this.left + index * slot, line * ROW, Math.ceil(slot * dots) / dots, ROW - 1);
        });
      });
      pen.fillStyle = ink.color;
      pen.font = "12px system-ui, sans-serif";
      pen.textBaseline = "middle";
      names.forEach((name, line) => pen.fillText(name, 0, line * ROW + ROW / 2, this.left - 6));
      this.drawAxis(pen, names.length * ROW, slot, width);
      this.drawMark(pen, slot, ink);
      this.label();
    }

    drawAxis(pen, top, slot, width) {
      const count = Math.max(2, Math.min(7, Math.floor((width - this.left) / 90), this.columns.length));
      const { step } = this.blocks;
      const last = this.columns.length - 1;
      for (let tick = 0; tick < count && last >= 0; tick += 1) {
        const index = Math.round((last * tick) / (count - 1));
        pen.textAlign = tick === 0 ? "left" : tick === count - 1 ? "right" : "center";
        const x = this.left + slot * (tick === 0 ? index : tick === count - 1 ? index + 1 : index + 0.5);
        pen.fillText(String(step[this.columns[index]]), x, top + AXIS / 2 + 2);
        if (last === 0) break;
      }
      pen.textAlign = "left";
    }

    drawMark(pen, slot, ink) {
      const index = this.at ? this.columns.indexOf(this.at.row) : -1;
      if (index < 0) return;
      const box = [this.left + index * slot - 1.5, this.at.line * ROW - 1.5, Math.max(slot, 4) + 3, ROW + 2];
      for (const [width, colour] of [[4, ink.backgroundColor], [2, ink.color]]) {
        pen.lineWidth = width;
        pen.strokeStyle = colour;
        pen.strokeRect(...box);
      }
    }

    label() {
      const { step } = this.blocks;
      const text = `Effective rank of ${this.names.length} blocks, steps ${step[0]} to ${step.at(-1)}, from ${number(this.least, 3)} to ${number(this.most, 3)}. Keys: arrows choose a cell, Enter shows its spectrum.`;
      if (this.canvas.getAttribute("aria-label") !== text) this.canvas.setAttribute("aria-label", text);
    }

    cellAt(event) {
      const { left, top, width } = this.canvas.getBoundingClientRect();
      const index = Math.floor(((event.clientX - left - this.left) / (width - this.left)) * this.columns.length);
      const line = Math.floor((event.clientY - top) / ROW);
      return index >= 0 && index < this.columns.length && line >= 0 && line < this.names.length ? { line, row: this.columns[index] } : null;
    }

    choose(cell, isOpened) {
      if (!cell) return;
      const isOther = cell.line !== this.at?.line || cell.row !== this.at?.row;
      if (isOther) {
        this.at = cell;
        const [name, step] = [this.names[cell.line], this.blocks.step[cell.row]];
        set(this.said, `${name} at step ${step}: effective rank ${number(this.blocks.erank[name][cell.row], 3)}${isOpened ? "" : ". Press for its spectrum"}.`);
        this.draw();
      }
      if (isOpened) this.open(this.names[cell.line], this.blocks.step[cell.row]);
    }

    onkey(event) {
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const now = this.at ?? { line: 0, row: this.columns.at(-1) };
      if (event.key === "Enter" || event.key === " ") this.choose(now, true);
      else if (moves[event.key]) {
        const [right, down] = moves[event.key];
        const index = clamp((this.at ? this.columns.indexOf(now.row) : this.columns.length) + right, 0, this.columns.length - 1);
        this.choose({ line: clamp(now.line + (this.at ? down : 0), 0, this.names.length - 1), row: this.columns[index] }, false);
      } else return;
      event.preventDefault();
    }

    /** The newest values as text; each row leads to its spectrum. */
    fillTable() {
      if (!this.numbers.open || !this.hasData) return;
      const { erank, step } = this.blocks;
      while (this.rows.children.length > this.names.length) this.rows.lastChild.remove();
      this.names.forEach((name, line) => {
        const row = this.rows.children[line] ?? this.rows.appendChild(h("tr", {}, h("th", { scope: "row" }), h("td"), h("td"), h("td", {},
          h("button", { type: "button", class: "st-link", onclick: () => this.open(this.names[line], this.blocks.step.at(-1)) }, "Show"))));
        set(row.children[0], name);
        set(row.children[1], number(erank[name].find((value) => value !== null), 3));
        set(row.children[2], number(Studio.latest(erank[name], step.length - 1), 3));
        row.querySelector("button").setAttribute("aria-label", `Show the spectrum of ${name}`);
      });
    }

    async open(block, step) {
      const turn = (this.turn += 1);
      try {
        const answer = await this.spectrum(block, step);
        if (turn !== this.turn) return;
        this.detail.replaceChildren(...drawn(answer, () => this.clear()));
      } catch (error) {
        if (turn !== this.turn) return;
        this.detail.replaceChildren(h("p", { class: "st-warn", role: "alert" }, error.message));
      }
      this.detail.hidden = false;
    }
  };

  /** Bars for each singular value, with marks for the first measurement. */
  function drawn({ block, step, values, erank, stable, norm, rank, first }, close) {
    const slot = 360 / Math.max(16, values.length);
    const y = (value) => 8 + 112 * (1 - value);
    const bars = values.map((value, index) => svg("rect", { x: 30 + index * slot + slot * 0.15, width: slot * 0.7, y: y(value ?? 0), height: 120 - y(value ?? 0), class: "st-bin" }));
    const marks = first.step === step ? [] : first.values.map((value, index) => svg("line", { x1: 30 + index * slot, x2: 30 + (index + 1) * slot, y1: y(value ?? 0), y2: y(value ?? 0), class: "st-bin-first" }));
    const texts = [[0, "0"], [1, "1"]].map(([value, text]) => svg("text", { x: 24, y: y(value) + 4, "text-anchor": "end" }, text));
    const names = values.map((_, index) => svg("text", { x: 30 + (index + 0.5) * slot, y: 134, "text-anchor": "middle" }, index % 3 === 0 ? String(index + 1) : ""));
    const told = values.map((value) => number(value, 2)).join(", ");
    return [h("header", { class: "st-row" }, h("h4", {}, `Spectrum of ${block} at step ${step}`), Studio.helpOn("spectrum"), h("span", { class: "st-space" }),
      h("button", { type: "button", class: "st-button st-quiet", onclick: close }, "Close")),
    svg("svg", { viewBox: "0 0 394 140", class: "st-drawing", role: "img", "aria-label": `Singular values, each divided by the largest: ${told}` }, ...texts, ...bars, ...marks, ...names),
    h("p", { class: "st-small" }, [`Effective rank ${number(erank, 3)}${Number.isFinite(rank) ? ` of ${rank}` : ""}`, `stable rank ${number(stable, 3)}`, `norm ${number(norm, 3)}`,
      marks.length ? `dashed: step ${first.step}` : ""].filter(Boolean).join(" · ")), h("p", { class: "st-small" }, `Values: ${told}`)];
  }

  function clamp(value, low, high) {
    return Math.min(high, Math.max(low, value));
  }

  function set(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }
})();
