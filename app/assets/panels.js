// The charts of a run: loss, effective rank, learning rate, distance to the held-out images.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h, number } = Studio;
  const COLOURS = ["--st-c1", "--st-c2", "--st-c3", "--st-c4", "--st-c5", "--st-c6", "--st-c7", "--st-c8"];
  const FEW = 50; // generated or held-out images below which a distance is indicative only
  const TOO_FEW = 16;
  const COPY = 0.97; // cosine to the nearest training image from which a picture may be a copy

  /** Loss raw and smoothed, with the validation loss over it. */
  Studio.LossPanel = class {
    constructor(group) {
      this.weight = Number(localStorage.getItem("studio.smooth") ?? 0.95);
      const slider = h("input", { type: "range", min: "0", max: "0.99", step: "0.01", value: this.weight, oninput: () => {
        this.weight = Number(slider.value);
        localStorage.setItem("studio.smooth", slider.value);
        this.update(this.steps, this.validation);
      } });
      this.chart = new Studio.Chart(group, { title: "Loss", help: Studio.helpOn("loss"),
        empty: "The first steps will appear here.", tools: h("label", { class: "st-slider" }, "Smoothing ", slider) });
      this.element = this.chart.element;
    }

    update(steps, validation) {
      Object.assign(this, { steps, validation });
      const train = [steps.step ?? [], steps.loss ?? [], Studio.smooth({ ...steps, loss: steps.loss ?? [] }, this.weight)];
      const series = [{ label: "Each step", colour: "--st-c1", width: 1, faint: true }, { label: "Smoothed", colour: "--st-c1", width: 2.5 }];
      if (!validation.step?.length) return this.chart.update(series, Studio.align(train));
      series.push({ label: "Validation", colour: "--st-c2", points: true });
      return this.chart.update(series, Studio.align(train, [validation.step, validation.loss]));
    }
  };

  /** Validation loss at each fixed noise level. */
  Studio.LevelsPanel = class {
    constructor(group) {
      this.chart = new Studio.Chart(group, { title: "Validation loss by noise level", help: Studio.helpOn("levels"),
        empty: "Measured with the validation loss (evaluate.every), when there are held-out images." });
      this.element = this.chart.element;
    }

    get hasData() { return this.chart.plot !== null; }

    update(validation) {
      const levels = Object.keys(validation.levels ?? {});
      const series = levels.map((level, index) => ({ label: Studio.noiseLevel(index, levels.length), colour: COLOURS[index % COLOURS.length], points: true }));
      this.chart.update(series, [levels.length ? validation.step : [], ...levels.map((level) => validation.levels[level])]);
    }
  };

  /** The middle of one of several equal parts between a clean image and pure noise, in words. */
  Studio.noiseLevel = (index, of) => {
    const share = `${Math.round((100 * (index + 0.5)) / of)} % noise`;
    if (of > 1 && index === 0) return `${share}: fine detail`;
    return of > 1 && index === of - 1 ? `${share}: layout` : share;
  };

  Studio.RatePanel = class {
    constructor(group) {
      this.chart = new Studio.Chart(group, { title: "Learning rate", help: Studio.helpOn("lr"),
        empty: "Appears with the first step." });
      this.element = this.chart.element;
    }

    update(steps) {
      this.chart.update([{ label: "Learning rate", colour: "--st-c3" }], [steps.step ?? [], steps.lr ?? []]);
    }
  };

  /** Effective rank by group of layers, below the line of the rank. */
  Studio.RankPanel = class {
    constructor(group) {
      this.facts = h("p", { class: "st-facts" });
      this.most = 1;
      this.chart = new Studio.Chart(group, { title: "Effective rank", range: () => [0, this.most * 1.1], help: Studio.helpOn("erank"),
        empty: "Measured every few steps (log.rank_every in the preset)." });
      this.element = this.chart.element;
      this.element.append(this.facts);
    }

    update(ranks) {
      const names = Object.keys(ranks.erank ?? {});
      const series = names.map((name, index) => ({ label: name, colour: COLOURS[index % COLOURS.length], points: (ranks.step?.length ?? 0) < 3 }));
      const data = [ranks.step ?? [], ...names.map((name) => ranks.erank[name])];
      if (ranks.rank?.some((rank) => rank !== null)) {
        series.push({ label: "Rank: the most there can be", colour: "--st-mute", dash: [6, 5], width: 1.5 });
        data.push(ranks.rank);
      }
      this.most = Math.max(1, ...data.slice(1).map((column) => Studio.latest(column) ?? 0));
      this.chart.update(series, data);
      const stable = names.map((name) => [name, Studio.latest(ranks.stable?.[name] ?? [])]).filter(([, value]) => value !== null);
      const error = Studio.latest(ranks.orth_error ?? []);
      this.facts.textContent = [
        stable.length ? `Stable rank: ${stable.map(([name, value]) => `${name} ${number(value, 3)}`).join(", ")}.` : "",
        error === null ? "" : `Largest distance of a factor from orthonormal: ${number(error, 2)}.`,
      ].join(" ").trim();
    }
  };

  /** KID with its interval, FD beside it, both with how they were measured. */
  Studio.DistancePanel = class {
    constructor(group) {
      this.facts = h("div", { class: "st-distance" });
      this.group = group;
      this.chart = new Studio.Chart(group, { title: "Distance to held-out images", format: (value) => number(value, 3),
        help: Studio.helpOn("distance"), decorate: (plot, colour) => this.whiskers(plot, colour),
        empty: "Measured at the end, or every so many steps (evaluate.distance_every), when there are held-out images." });
      this.element = this.chart.element;
      this.chart.canvas.before(this.facts);
      this.rows = [];
    }

    update(distances) {
      const newest = distances.at(-1);
      // Values of another extractor or other counts are not comparable: one curve holds only those like the newest
      this.rows = distances.filter((row) => isLike(row, newest));
      const column = (key) => this.rows.map((row) => row[key] ?? null);
      const series = [{ label: "KID ×10³", colour: "--st-c4", points: true },
        { label: "low", colour: "--st-c4", hidden: true }, { label: "high", colour: "--st-c4", hidden: true }];
      const tables = [[column("step"), column("kid"), column("kid_low"), column("kid_high")]];
      if (newest && Number.isFinite(newest.base_kid)) {
        series.push({ label: "KID ×10³ of the base model", colour: "--st-mute", dash: [6, 5], width: 1.5 });
        tables.push([[0, Math.max(this.group.last, newest.step ?? 0)], [newest.base_kid, newest.base_kid]]);
      }
      this.chart.update(series, Studio.align(...tables));
      this.facts.replaceChildren(...(newest ? factsOf(newest) : []));
    }

    whiskers(plot, colour) {
      const { ctx } = plot;
      ctx.save();
      ctx.strokeStyle = colour("--st-c4");
      ctx.setLineDash([]);
      ctx.lineWidth = 1.5 * devicePixelRatio;
      for (const { step, kid_low: low, kid_high: high } of this.rows) {
        if (!Number.isFinite(low) || !Number.isFinite(high)) continue;
        const [x, top, bottom] = [plot.valToPos(step, "x", true), plot.valToPos(high, "y", true), plot.valToPos(low, "y", true)];
        const cap = 5 * devicePixelRatio;
        ctx.beginPath();
        for (const [x1, y1, x2, y2] of [[x, top, x, bottom], [x - cap, top, x + cap, top], [x - cap, bottom, x + cap, bottom]]) {
          ctx.moveTo(x1, y1);
          ctx.lineTo(x2, y2);
        }
        ctx.stroke();
      }
      ctx.restore();
    }
  };

  function isLike(row, other) {
    return ["extractor", "resize", "n_ref", "n_gen"].every((key) => row[key] === other[key]);
  }

  /** Only distances from the FID network are called FID. */
  Studio.distanceName = ({ extractor = "", n_gen: generated }) => {
    const isInception = /inception/i.test(extractor);
    const network = /efflite0|efficientnet.?lite0/i.test(extractor) ? "EffLite0" : extractor;
    return `${isInception ? "FID" : `FD-${network}`}-${generated ?? "?"}`;
  };

  function factsOf(row) {
    const interval = Number.isFinite(row.kid_low) ? ` (95 %: ${number(row.kid_low, 3)} to ${number(row.kid_high, 3)})` : "";
    const few = Math.min(row.n_gen ?? 0, row.n_ref ?? 0);
    const tag = few < TOO_FEW ? h("span", { class: "st-tag st-bad" }, "too few images to say")
      : few < FEW ? h("span", { class: "st-tag" }, "indicative only") : "";
    const fd = [`${Studio.distanceName(row)} ${number(row.fd, 3)}`];
    if (Number.isFinite(row.fd_floor)) fd.push(`floor ${number(row.fd_floor, 3)}`);
    if (Number.isFinite(row.base_fd)) fd.push(`base model ${number(row.base_fd, 3)}`);
    const how = [`${row.n_gen ?? "?"} generated against ${row.n_ref ?? "?"} held-out images`, `extractor ${row.extractor ?? "?"}`,
      row.resize ? `resized: ${row.resize}` : ""].filter(Boolean).join(", ");
    return [
      h("p", { class: "st-big" }, h("strong", {}, `KID ×10³ ${number(row.kid, 3)}`), interval, " ", tag),
      h("p", {}, verdict(row)), Number.isFinite(row.fd) ? h("p", {}, fd.join(" · ")) : null,
      row.nn_cosine >= COPY ? h("p", { class: "st-warn" },
        `Possible copies: a generated image has cosine ${number(row.nn_cosine, 3)} to a training image.`) : null,
      h("p", { class: "st-small" }, `${how}.`),
    ].filter(Boolean);
  }

  /** What the intervals say of the adapter against its base model. */
  function verdict(row) {
    if (!Number.isFinite(row.base_kid)) return "";
    const base = `base model ${number(row.base_kid, 3)}`;
    const told = Studio.compareIntervals([row.kid_low, row.kid_high], [row.base_kid_low, row.base_kid_high]);
    const says = { below: "Closer to the held-out images than the base model, beyond both intervals",
      above: "Further away than the base model, beyond both intervals",
      overlapping: "The intervals overlap: no difference to the base model is shown", unknown: "For comparison" };
    return `${says[told]} (${base}).`;
  }
})();
