// One live chart: uPlot with our colours, a zoom that holds, a cross-hair shared by all, and its values as a table.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const HEIGHT = 230;

  const colour = (name) => getComputedStyle(document.body).getPropertyValue(name).trim() || "#888";

  /** Charts that show the same steps: one zoom and one cross-hair. */
  Studio.ChartGroup = class {
    constructor(name) {
      this.name = name;
      this.charts = new Set();
      this.zoomed = null;
      this.last = 1;
      this.onzoom = () => {};
      document.addEventListener("studio:theme", () => this.charts.forEach((chart) => chart.plot?.redraw(false)));
    }

    /** The steps that are shown. */
    get range() { return this.zoomed ?? [0, Math.max(this.last, 1)]; }

    zoom(range) {
      const isWide = range && range[1] - range[0] >= 1;
      this.zoomed = isWide ? [Math.max(0, range[0]), Math.min(range[1], Math.max(this.last, 1))] : range ? this.zoomed : null;
      this.charts.forEach((chart) => chart.plot?.setScale("x", { min: this.range[0], max: this.range[1] }));
      this.onzoom(this.zoomed !== null);
    }

    /** Zoom by a factor about the middle, or move by a share of what is shown. */
    move(factor, share) {
      const [low, high] = this.range;
      const middle = (low + high) / 2 + (high - low) * share;
      const half = ((high - low) / 2) * factor;
      if (half * 2 >= this.last) this.zoom(null);
      else this.zoom([middle - half, middle + half]);
    }
  };

  /**
   * A chart with title, help and table. `series`: {label, colour (a CSS variable), width, dash, points, hidden}.
   * `decorate(plot)` draws on top.
   */
  Studio.Chart = class {
    constructor(group, { title, help, format = Studio.number, empty, decorate, range = tallEnough, tools = [] }) {
      Object.assign(this, { group, title, format, decorate, range, plot: null, shape: "" });
      this.canvas = h("div", { class: "st-plot", role: "img", tabindex: "0", "aria-label": title,
        onkeydown: (event) => this.onkey(event) });
      this.empty = h("p", { class: "st-empty" }, empty);
      this.rows = h("tbody");
      this.table = h("table", { class: "st-legend" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Curve"), h("th", { scope: "col" }, "Newest"),
          h("th", { scope: "col" }, "At the cursor"))), this.rows);
      this.element = h("section", { class: "st-card st-chart", "aria-label": title },
        h("header", {}, h("h3", {}, title), help, h("span", { class: "st-space" }), tools),
        this.empty, this.canvas, this.table);
      this.show(false);
      new ResizeObserver(() => this.resize()).observe(this.canvas);
      group.charts.add(this);
    }

    show(isShown) {
      this.canvas.hidden = this.table.hidden = !isShown;
      this.empty.hidden = isShown;
    }

    /** Draw new data ([x, y…]); the zoom stays as it is. */
    update(series, data) {
      const hasData = data[0].length > 0;
      this.show(hasData);
      if (!hasData) { this.plot?.destroy(); this.plot = null; this.shape = ""; return; }
      const shape = JSON.stringify(series);
      if (shape !== this.shape || !this.plot) this.build(series, data);
      else this.plot.setData(data, false);
      this.shape = shape;
      this.plot.setScale("x", { min: this.group.range[0], max: this.group.range[1] });
      this.fillTable();
    }

    build(series, data) {
      this.plot?.destroy();
      this.series = series;
      const axis = { stroke: () => colour("--st-mute"), font: "12px system-ui, sans-serif",
        grid: { stroke: () => colour("--st-grid"), width: 1 }, ticks: { show: false } };
      this.plot = new uPlot({
        width: this.canvas.clientWidth || 400, height: HEIGHT, legend: { show: false },
        scales: { x: { time: false, range: (_, low, high) => [low, Math.max(high, low + 1)] }, y: { range: this.range } },
        axes: [{ ...axis, size: 30, incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1e3, 2e3, 2500, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6] },
          { ...axis, size: 62, values: (_, ticks, __, ___, gap) => ticks.map((tick) => tickText(tick, gap)) }],
        series: [{}, ...series.map(drawn)],
        cursor: { y: false, sync: { key: this.group.name, scales: ["x", null] }, drag: { x: true, y: false, setScale: false } },
        hooks: {
          setSelect: [(plot) => this.select(plot)],
          setCursor: [() => this.fillTable()],
          draw: this.decorate ? [(plot) => this.decorate(plot, colour)] : [],
          ready: [(plot) => plot.over.addEventListener("dblclick", () => this.group.zoom(null))],
        },
      }, data, this.canvas);
    }

    select(plot) {
      const { left, width } = plot.select;
      if (width > 4) this.group.zoom([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
      if (width > 0) plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    }

    onkey(event) {
      const moves = { "+": [0.5, 0], "=": [0.5, 0], "-": [2, 0], "PageDown": [1, 0.5], "PageUp": [1, -0.5] };
      if (moves[event.key]) this.group.move(...moves[event.key]);
      else if (event.key === "Escape" || event.key === "0") this.group.zoom(null);
      else if (event.key === "ArrowLeft" || event.key === "ArrowRight") this.step(event.key === "ArrowLeft" ? -1 : 1);
      else return;
      event.preventDefault();
    }

    /** Move the cross-hair to the next row that is shown, by keyboard; it begins at the newest. */
    step(by) {
      if (!this.plot) return;
      const x = this.plot.data[0];
      const [low, high] = this.group.range;
      const first = x.findIndex((step) => step >= low);
      const last = x.findLastIndex((step) => step <= high);
      const from = this.plot.cursor.left >= 0 ? this.plot.cursor.idx : last + 1;
      const at = Math.max(first, Math.min(last, from + by));
      this.plot.setCursor({ left: this.plot.valToPos(x[at], "x"), top: 10 });
    }

    resize() {
      const width = this.canvas.clientWidth;
      if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
    }

    /** The newest values, and those at the cross-hair, as text. */
    fillTable() {
      if (!this.plot) return;
      const [x, ...ys] = this.plot.data;
      const at = this.plot.cursor.left >= 0 ? this.plot.cursor.idx : null;
      const shown = this.series.map((series, index) => ({ series, y: ys[index] })).filter(({ series }) => !series.hidden && !series.quiet);
      while (this.rows.children.length > shown.length) this.rows.lastChild.remove();
      shown.forEach(({ series, y }, index) => {
        const row = this.rows.children[index] ?? this.rows.appendChild(
          h("tr", {}, h("th", { scope: "row" }, h("i", { "aria-hidden": "true" }), h("span")), h("td"), h("td")));
        const [name, newest, cursor] = row.children;
        name.firstChild.className = series.dash ? "st-key st-dash" : series.points ? "st-key st-dots" : series.faint ? "st-key st-faint" : "st-key";
        name.firstChild.style.color = `var(${series.colour})`;
        setText(name.lastChild, series.label);
        setText(newest, this.format(Studio.latest(y)));
        setText(cursor, at === null || at === undefined ? "" : this.format(Studio.latest(y, at)));
      });
      setText(this.table.tHead.rows[0].cells[2], at === null || at === undefined ? "" : `Step ${x[at]}`);
      const said = shown.map(({ series, y }) => `${series.label} ${this.format(Studio.latest(y))}`).join(", ");
      const label = `${this.title}, steps ${x[0]} to ${x[x.length - 1]}. Newest: ${said}. Keys: arrows, plus, minus, 0.`;
      if (this.canvas.getAttribute("aria-label") !== label) this.canvas.setAttribute("aria-label", label);
    }
  };

  function drawn(series) {
    const stroke = () => colour(series.colour);
    return { label: series.label, stroke, width: series.hidden ? 0 : series.width ?? 2, dash: series.dash, alpha: series.faint ? 0.45 : 1,
      spanGaps: true, points: { show: Boolean(series.points), size: 8, fill: stroke, stroke } };
  }

  /** A range for y that is not flat, also when all values are equal. */
  function tallEnough(_, low, high) {
    if (low === null || high === null || low === undefined || high === undefined) return [0, 1];
    const spread = high - low || Math.abs(high) * 0.1 || 1;
    const bottom = low - spread * 0.06;
    return [low >= 0 && bottom < 0 ? 0 : bottom, high + spread * 0.08];
  }

  /** With as many digits as tell two ticks apart. */
  function tickText(tick, gap) {
    if (gap < 1e-3) return Studio.number(Math.abs(tick) < gap / 2 ? 0 : tick, 3);
    return tick.toFixed(Math.max(0, Math.ceil(-Math.log10(gap) - 1e-9) + (/[1-9]{2}/.test(gap.toPrecision(2)) ? 1 : 0)));
  }

  function setText(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }
})();
