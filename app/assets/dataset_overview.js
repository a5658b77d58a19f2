// What a data set is made of: tags, lengths, sizes, and how its images will be cut for training.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const MOST_TAGS = 20;

  /** Rows of name, bar and count; `rows`: [name, count, what a click does or null]. */
  Studio.bars = (caption, rows) => {
    const most = Math.max(1, ...rows.map(([, count]) => count));
    return h("table", { class: "st-bars" }, h("caption", { class: "st-unseen" }, caption), h("tbody", {}, rows.map(([name, count, work, note]) => h("tr", {},
      h("th", { scope: "row" }, work ? h("button", { type: "button", class: "st-link", onclick: work }, name) : name),
      h("td", { class: "st-bar" }, h("i", { style: `width:${(100 * count) / most}%`, "aria-hidden": "true" })), h("td", {}, note ?? count.toLocaleString("en"))))));
  };

  const span = (edges, index, unit = "") => (edges[index + 1] >= 1000 && unit !== "" ? `${edges[index]}${unit} and more`
    : `${edges[index]} to ${edges[index + 1]}${unit}`);
  const whole = (edges, index) => (edges[index + 1] >= 100000 ? `${edges[index]} and more` : `${edges[index]} to ${edges[index + 1] - 1}`);
  const percent = (share) => `${Number((100 * share).toPrecision(2))} %`;

  Studio.OverviewPanel = class {
    constructor(page) {
      Object.assign(this, { page, crops: new Map(), turn: 0, shownTags: MOST_TAGS });
      this.tagFind = Studio.input("", { type: "search", placeholder: "Find a tag", "aria-label": "Find a tag", oninput: () => this.showTags() });
      this.tags = h("div");
      this.lengths = h("div");
      this.sizes = h("div");
      this.steps = h("div");
      const part = (title, ...children) => h("section", { class: "st-part", "aria-label": title }, h("h4", {}, title), children);
      this.element = h("div", {}, this.slot = h("div"), part("Tags", this.tagFind, this.tags), part("Buckets and crops", this.sizes), part("Lengths of captions", this.lengths),
        part("Timesteps", this.steps));
    }

    opened() {
      this.slot.replaceChildren(this.page.settings.element);
      return this.page.store.attempt(async () => { await this.page.settings.use(() => this.load()); await this.load(); });
    }

    changed() { this.load(); }
    closed() { this.pointed?.crop(null); }

    poll() {
      if (this.pointed?.box.hidden) this.point(this.pointed); // its size may be known by now
      if (this.known !== undefined && this.known < this.of) this.load();
    }

    load() {
      return this.page.store.attempt(async () => {
        const turn = (this.turn += 1);
        const { family, resolution, buckets, batch, repeats, handling, timesteps } = this.page.settings.values;
        this.crops.clear();
        const [captions, sizes] = await Promise.all([this.page.store.ask("read_captions", { trigger: handling.trigger }),
          this.page.store.ask("read_sizes", { family, resolution, buckets, batch, repeats })]);
        if (turn !== this.turn) return;
        Object.assign(this, { captions, known: sizes.known, of: sizes.of });
        this.showTags();
        this.showLengths(captions);
        this.showSizes(sizes);
        this.showSteps(timesteps, family);
      });
    }

    showTags() {
      const { tags, with_trigger: together, of, different_tags: different } = this.captions;
      const { trigger } = this.page.settings.values.handling;
      const wanted = this.tagFind.value.trim().toLowerCase();
      const found = tags.filter(([tag]) => tag.toLowerCase().includes(wanted));
      const rows = found.slice(0, this.shownTags).map(([tag, count, both]) => [short(tag), count, () => this.page.find({ tag }), both < count && trigger ? `${count} (${both})` : `${count}`]);
      const told = trigger ? `${together} of ${Studio.count(of, "caption")} have the trigger word “${trigger}”; in brackets, how many have it and the tag. ` : "";
      this.tags.replaceChildren(h("p", { class: "st-small" }, `${told}${Studio.count(different, "different tag")}. Press one to see its images.`), Studio.bars("Tags", rows),
        ...(found.length > this.shownTags ? [this.page.button("Show more", "st-quiet", () => { this.shownTags += 200; this.showTags(); })] : []));
    }

    showLengths({ lengths, tokens, empty }) {
      const over = tokens.over ? h("p", { class: "st-warn" }, h("button", { type: "button", class: "st-link", onclick: () => this.page.find({ names: tokens.names }, "Longer than 77 tokens") },
        `${Studio.count(tokens.over, "caption")} longer than 77 tokens`), ". Models with CLIP alone read them in pieces, or cut them off elsewhere.") : null;
      this.lengths.replaceChildren(...[h("p", { class: "st-small" }, `Half of the captions have ${Math.round(lengths.median)} characters or fewer; ${empty} have none.`), over,
        h("h5", {}, "Tokens (CLIP)"), Studio.bars("Captions by tokens", tokens.counts.map((count, index) => [whole(tokens.edges, index), count])),
        h("h5", {}, "Characters"), Studio.bars("Captions by characters", lengths.counts.map((count, index) => [whole(lengths.edges, index), count]))].filter(Boolean));
    }

    showSizes({ known, of, buckets, images_per_epoch: images, steps_per_epoch: steps, ratios, megapixels }) {
      const waiting = known < of ? h("p", { class: "st-small" }, `Looked at ${known} of ${Studio.count(of, "image")} so far.`) : null;
      const rows = buckets.map(({ size: [width, height], images: count, crop, most_crop: most, enlarged, names }) => [`${width} × ${height}`, count,
        () => this.page.find({ names }, `Bucket ${width} × ${height}`), `${count}, cut ${percent(crop)}${most > crop + 0.005 ? `, at most ${percent(most)}` : ""}${enlarged ? `, ${enlarged} enlarged` : ""}`]);
      this.sizes.replaceChildren(...[waiting, h("p", { class: "st-small" }, `An epoch shows ${Studio.count(images, "image")} in ${Studio.count(steps, "step")}. `
        + "Point at a picture, or go to it by keyboard, to see what of it is kept."), Studio.bars("Images by bucket", rows),
      h("h5", {}, "Width to height"), Studio.bars("Images by shape", ratios.counts.map((count, index) => [span(ratios.edges, index, " : 1"), count])),
      h("h5", {}, "Millions of pixels"), Studio.bars("Images by pixels", megapixels.counts.map((count, index) => [span(megapixels.edges, index, " MP"), count]))].filter(Boolean));
    }

    showSteps(timesteps, family) {
      if (!timesteps) { this.steps.replaceChildren(h("p", { class: "st-small" }, "Shown when the preset can be read.")); return; }
      const most = Math.max(...timesteps.shares);
      const half = quantile(timesteps, 0.5);
      const label = `Share of the samples by timestep, for ${family}: half of them lie below ${half} of 1000.`;
      this.steps.replaceChildren(h("div", { class: "st-steps", role: "img", "aria-label": label }, timesteps.shares.map((share) => h("i", { style: `height:${(100 * share) / most}%` }))),
        h("div", { class: "st-row st-small" }, "0, the picture", h("span", { class: "st-space" }), "1000, the noise"), h("p", { class: "st-small" }, label));
    }

    /** Show the crop on the card that is pointed at. */
    point(card) {
      if (this.pointed && this.pointed !== card) this.pointed.crop(null);
      this.pointed = card;
      const data = card && this.page.store.cards.get(card.name);
      if (!data?.width) return;
      const { name } = card;
      this.page.store.attempt(async () => {
        const { family, resolution, buckets } = this.page.settings.values;
        if (!this.crops.has(name)) this.crops.set(name, await this.page.store.ask("read_crop", { name, family, resolution, buckets }));
        if (this.pointed === card && card.name === name) card.crop(this.crops.get(name));
      });
    }
  };

  function quantile({ edges, shares }, wanted) {
    let sum = 0;
    const at = shares.findIndex((share) => (sum += share) >= wanted);
    return Math.round(edges[at + 1]);
  }

  function short(tag) {
    return tag.length > 60 ? `${tag.slice(0, 59)}…` : tag;
  }
})();
