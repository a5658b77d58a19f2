// Rows of a run as columns: add, cut back, smooth, put side by side. Pure functions, without a page.
"use strict";
(() => {
  const Studio = (globalThis.Studio ??= {});

  /** Add the rows of `more` to `columns` (both {name: array, or nested}); a column that is new begins with nulls. */
  Studio.append = (columns, more) => {
    const before = columns.step?.length ?? 0;
    const count = more.step.length;
    const add = (into, from, names) => {
      for (const name of names) {
        const value = from?.[name];
        if (isGroup(value) || isGroup(into[name])) {
          into[name] ??= {};
          add(into[name], value, new Set([...Object.keys(into[name]), ...Object.keys(value ?? {})]));
        } else {
          into[name] ??= new Array(before).fill(null);
          const rows = value ?? new Array(count).fill(null);
          for (const row of rows) into[name].push(row);
        }
      }
    };
    add(columns, more, new Set([...Object.keys(columns), ...Object.keys(more)]));
    return columns;
  };

  /** Drop the rows beyond a step: a run that was resumed there goes another way from there. */
  Studio.rewind = (columns, step) => {
    const keep = (columns.step ?? []).map((at) => at <= step);
    const cut = (group) => {
      for (const [name, value] of Object.entries(group)) {
        if (isGroup(value)) cut(value);
        else group[name] = value.filter((_, row) => keep[row]);
      }
    };
    cut(columns);
    return columns;
  };

  /**
   * Exponential running mean without a bias at the start. `weight` is what stays of the past a row; a row of a
   * thinned answer stands for `n` rows with the mean `mean`.
   */
  Studio.smooth = ({ loss, mean, n }, weight) => {
    let sum = 0;
    let norm = 0;
    return loss.map((value, row) => {
      const known = mean?.[row] ?? value;
      if (known === null || known === undefined) return norm ? sum / norm : null;
      const stays = weight ** (n?.[row] ?? 1);
      sum = sum * stays + known * (1 - stays);
      norm = norm * stays + (1 - stays);
      return norm ? sum / norm : known;
    });
  };

  /** Series with x of their own, each [x, y, y…] and rising, on one x axis: [x, y…] with null where one says nothing. */
  Studio.align = (...tables) => {
    const steps = [...new Set(tables.flatMap(([x]) => x))].sort((a, b) => a - b);
    const row = new Map(steps.map((step, index) => [step, index]));
    const columns = tables.flatMap(([x, ...ys]) => ys.map((y) => {
      const column = new Array(steps.length).fill(null);
      x.forEach((step, index) => { column[row.get(step)] = y[index] ?? null; });
      return column;
    }));
    return [steps, ...columns];
  };

  /**
   * Columns with at most `most` rows: the smallest and the largest loss of each bucket, each with the mean of all rows
   * that it stands for (`mean`, `n`), as the server thins its first answer.
   */
  Studio.thin = (columns, most) => {
    const { step, loss, lr, mean, n } = columns;
    if ((step?.length ?? 0) <= most) return columns;
    const rows = { step: [], loss: [], lr: [], mean: [], n: [] };
    const keep = (row, average, count) => {
      rows.step.push(step[row]); rows.loss.push(loss[row]); rows.lr.push(lr[row]); rows.mean.push(average); rows.n.push(count);
    };
    const size = Math.ceil(step.length / Math.floor(most / 2));
    for (let start = 0; start < step.length; start += size) {
      const bucket = Array.from({ length: Math.min(size, step.length - start) }, (_, index) => start + index);
      const known = bucket.filter((row) => loss[row] !== null);
      const all = bucket.reduce((sum, row) => sum + (n?.[row] ?? 1), 0);
      if (!known.length) { keep(start, null, all); continue; }
      const weight = known.reduce((sum, row) => sum + (n?.[row] ?? 1), 0);
      const average = known.reduce((sum, row) => sum + (mean?.[row] ?? loss[row]) * (n?.[row] ?? 1), 0) / weight;
      const low = known.reduce((best, row) => (loss[row] < loss[best] ? row : best));
      const high = known.reduce((best, row) => (loss[row] > loss[best] ? row : best));
      if (low === high) { keep(low, average, all); continue; }
      keep(Math.min(low, high), average, all - Math.floor(all / 2));
      keep(Math.max(low, high), average, Math.floor(all / 2));
    }
    return rows;
  };

  /** Means of the loss by noise level over the first and the newest tenth of the steps; null where there was no sample. */
  Studio.binMeans = ({ step = [], loss = [], count = [] }) => {
    const [first, last] = [step[0] ?? 0, step.at(-1) ?? 0];
    const reach = (last - first) / 10;
    const mean = (isIn) => Array.from({ length: 10 }, (_, bin) => {
      let sum = 0;
      let samples = 0;
      step.forEach((at, row) => {
        if (!isIn(at) || loss[row][bin] === null) return;
        sum += loss[row][bin] * count[row][bin];
        samples += count[row][bin];
      });
      return samples ? sum / samples : null;
    });
    return { first: mean((at) => at <= first + reach), newest: mean((at) => at >= last - reach) };
  };

  /** The last value that is there, at or before `row`. */
  Studio.latest = (column, row = column.length - 1) => {
    for (let index = Math.min(row, column.length - 1); index >= 0; index -= 1) {
      if (column[index] !== null && column[index] !== undefined) return column[index];
    }
    return null;
  };

  /** Whether two intervals tell two values apart. */
  Studio.compareIntervals = ([low, high], [otherLow, otherHigh]) => {
    if ([low, high, otherLow, otherHigh].some((end) => !Number.isFinite(end))) return "unknown";
    if (high < otherLow) return "below";
    return low > otherHigh ? "above" : "overlapping";
  };

  function isGroup(value) {
    return typeof value === "object" && value !== null && !Array.isArray(value);
  }
})();
