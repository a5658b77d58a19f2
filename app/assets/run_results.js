// The files that a run has written, with what reading them back has shown.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const FORMATS = { U1: "kohya format", U2: "kohya format, Stability's names", F1: "diffusers format", F5: "kohya format",
    F6: "ComfyUI format" };

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
    if (row.worst_rel_error === null && row.readers) return h("p", { class: "st-warn" }, "Read back: it holds numbers that are not finite, and draws black or broken pictures. Use an earlier checkpoint.");
    if (!Number.isFinite(row.worst_rel_error)) return null;
    const good = h("p", { class: "st-good" }, `✓ Read back and compared with the trained weights: worst relative error ${Studio.number(row.worst_rel_error, 2)}.`);
    return row.readers ? h("div", {}, good, ...readBy(row)) : good;
  }

  function readBy(row) {
    const named = row.readers.length ? [h("p", { class: "st-good" }, `✓ All of it is read, at full strength, by ${row.readers.join(", ")}.`)] : [];
    return [...named, ...(row.others ?? []).map((text) => h("p", { class: "st-warn" }, `${text}.`))];
  }

  Studio.download = download;
  function download(row, folder, kind, text) {
    const name = row.file.split("/").at(-1);
    return h("a", { class: `st-button ${kind}`, href: Studio.fileUrl(`${folder}/${row.file}`), download: name, "aria-label": `${text} ${name}` }, text);
  }
})();
