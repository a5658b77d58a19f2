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
