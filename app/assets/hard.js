// The images whose loss is the highest for their noise level, each with its course and the way to its caption.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h, number, svg } = Studio;
  const [FEW, ALL] = [8, 30];
  const PAUSE = 30; // seconds between two looks while a run goes on

  Studio.HardPanel = class {
    /** `ask(most)` asks the server for so many images. */
    constructor(ask) {
      Object.assign(this, { ask, most: FEW, asked: 0, hasData: false, turn: 0, wait: 0, looks: 0 });
      this.rows = h("tbody");
      this.table = h("div", { class: "st-sideways", tabindex: "0", role: "region", "aria-label": "Hardest images" }, h("table", { class: "st-hard" }, h("thead", {}, h("tr", {},
        h("th", { scope: "col" }, "Image"), h("th", { scope: "col" }, "Hardness"), h("th", { scope: "col" }, "Over the run"), h("th", { scope: "col" }, "Seen"))), this.rows));
      this.more = h("button", { type: "button", class: "st-button st-quiet", onclick: () => { this.most = this.most === FEW ? ALL : FEW; this.load(); } });
      this.said = h("p", { class: "st-small", role: "status" });
      this.empty = h("p", { class: "st-empty" });
      this.element = h("section", { class: "st-card st-wide-card", "aria-label": "Images that are hard to learn" },
        h("header", {}, h("h3", {}, "Images that are hard to learn"), Studio.helpOn("hard")), this.empty, this.table, h("div", { class: "st-row" }, this.said, h("span", { class: "st-space" }), this.more));
      this.show({ images: [], harder: 0, measured: 0 });
    }

    clear() {
      clearTimeout(this.wait);
      Object.assign(this, { asked: 0, most: FEW, wait: 0, looks: 0 });
      this.turn += 1;
      this.show({ images: [], harder: 0, measured: 0 });
    }

    /** There is news; it is fetched at once, or when the last look is some seconds old. */
    news(pause = PAUSE) {
      if (this.wait) return;
      const seconds = this.asked ? Math.max(0, pause - (performance.now() - this.asked) / 1000) : 0;
      this.wait = setTimeout(() => { this.wait = 0; this.load(); }, seconds * 1000);
      this.hasData = true;
    }

    /** Pictures that are being made are looked for a few times. */
    look() {
      this.looks += 1;
      if (this.looks < 5) this.news(2 * this.looks);
    }

    async load() {
      const turn = (this.turn += 1);
      this.asked = performance.now();
      try {
        const answer = await this.ask(this.most);
        if (turn !== this.turn) return;
        this.show(answer);
        if (answer.images.some(({ thumb }) => thumb === "")) this.look(); // pictures are being made
      } catch (error) {
        if (turn === this.turn) this.said.textContent = error.message;
      }
    }

    show({ images, harder, measured }) {
      this.hasData = measured > 0;
      this.table.hidden = harder === 0;
      this.empty.hidden = harder > 0;
      this.empty.textContent = measured ? `${Studio.count(measured, "image")} measured. None is harder than the usual one.` : "Comes with the first measurement (log.rank_every in the preset).";
      this.more.hidden = harder <= FEW;
      this.more.textContent = this.most === FEW ? `Show ${Math.min(harder, ALL)}` : `Show ${FEW}`;
      this.said.textContent = harder ? `${Studio.count(measured, "image")} measured, ${harder} harder than the usual one.` : "";
      const focused = document.activeElement?.dataset?.hard;
      const most = Math.max(2, ...images.flatMap(({ course }) => course.map((value) => value ?? 0)));
      this.rows.replaceChildren(...images.map((image) => this.row(image, most)));
      if (focused) this.rows.querySelector(`[data-hard="${CSS.escape(focused)}"]`)?.focus();
    }

    row({ file, times, ratio, course, thumb, set }, most) {
      const name = file.split("/").at(-1);
      const picture = thumb === null ? "" : thumb ? h("img", { src: Studio.fileUrl(thumb), alt: "", loading: "lazy", width: "44", height: "44" }) : h("span", { class: "st-nothumb", "aria-hidden": "true" });
      const title = set ? h("button", { type: "button", class: "st-link", "data-hard": file, title: `Open ${file} with its caption`, onclick: () => Studio.showImage(set, file) }, name) : h("span", { title: file }, name);
      return h("tr", {}, h("th", { scope: "row" }, h("span", { class: "st-hard-name" }, picture, title)), h("td", {}, `${number(ratio, 3)} ×`),
        h("td", {}, spark(course, most)), h("td", {}, times === 1 ? "once" : `${times} times`));
    }
  };

  /** Open the tab "Data set" at an image; a tab that is not made yet looks for the wish when it is. */
  Studio.showImage = (set, name) => {
    Studio.wantedImage = { set, name };
    Studio.goTo("Data set");
    document.dispatchEvent(new Event("studio:show-image"));
  };

  /** A small curve with the line of 1; what was not seen is passed over. */
  function spark(course, most) {
    const points = course.map((value, part) => [value, 2 + (part * 92) / Math.max(1, course.length - 1)]).filter(([value]) => value !== null);
    const y = (value) => 24 - (22 * Math.min(value, most)) / most;
    const [first, last] = [points[0]?.[0], points.at(-1)?.[0]];
    const told = points.length > 1 ? `from ${number(first, 2)} to ${number(last, 2)}` : points.length ? number(first, 2) : "not seen yet";
    return svg("svg", { viewBox: "0 0 96 26", width: "96", height: "26", role: "img", "aria-label": `Hardness over the run: ${told}` },
      svg("line", { x1: 0, x2: 96, y1: y(1), y2: y(1), class: "st-gridline" }), svg("polyline", { points: points.map(([value, x]) => `${x},${y(value)}`).join(" "), class: "st-spark" }),
      ...(points.length ? [svg("circle", { cx: points.at(-1)[1], cy: y(last), r: 2.2, class: "st-spark-end" })] : []));
  }
})();
