// One image large, with its caption, its crop and its mask; from here to the next one by keyboard.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;

  Studio.ImageViewer = class {
    constructor(store, failed, settings) {
      Object.assign(this, { store, failed, settings, name: "", before: null, turn: 0 });
      this.picture = h("img", { alt: "", draggable: "false", onload: () => this.placed() });
      this.box = h("span", { class: "st-crop", hidden: true });
      this.brush = new Studio.MaskBrush();
      this.stage = h("div", { class: "st-stage" }, this.picture, this.brush.element, this.box);
      this.title = h("h3", {});
      this.facts = h("p", { class: "st-small" });
      this.said = h("p", { class: "st-warn", role: "alert" });
      this.caption = h("textarea", { id: "studio-large-caption", rows: "6", oninput: () => this.store.edit(this.name, this.caption.value, this.before), onblur: () => this.store.save(this.name),
        onkeydown: (event) => this.ontext(event) });
      this.crop = h("input", { type: "checkbox", onchange: () => this.showCrop() });
      const button = (text, work, kind = "", attributes = {}) => h("button", { type: "button", class: `st-button ${kind}`, onclick: work, ...attributes }, text);
      this.masking = button("Draw a mask", () => this.mask(true), "", { "aria-expanded": "false" });
      this.tools = h("div", { class: "st-mask-tools", hidden: true }, this.brush.tools,
        h("div", { class: "st-row" }, button("Save the mask", () => this.keep(), "st-primary"), this.off = button("Remove the mask", () => this.remove(), "st-danger")));
      this.element = h("dialog", { class: "st-large-view", "aria-label": "Image", onclose: () => this.left(), oncancel: (event) => { event.preventDefault(); this.close(); } },
        h("div", { class: "st-large-body" }, this.stage, h("div", { class: "st-large-side" }, h("div", { class: "st-row" }, this.title), this.facts, this.said,
          h("div", { class: "st-field" }, h("label", { for: this.caption.id }, "Caption"), this.caption), h("label", { class: "st-check" }, this.crop, "Show what training keeps of it"),
          this.masking, this.tools, h("span", { class: "st-space" }),
          h("div", { class: "st-row" }, button("← Before", () => this.go(-1)), button("Next →", () => this.go(1)), h("span", { class: "st-space" }), button("Close", () => this.close())))));
      new ResizeObserver(() => this.placed()).observe(this.stage);
    }

    async open(name) {
      if (!this.element.isConnected) document.querySelector(".st-data").append(this.element);
      const turn = (this.turn += 1);
      Object.assign(this, { name, id: this.store.id });
      this.said.textContent = "";
      this.mask(false);
      this.title.textContent = name;
      const card = this.store.card(name);
      this.before = null;
      this.showCaption();
      this.picture.src = card?.thumb ? Studio.fileUrl(card.thumb) : "";
      this.picture.alt = `${name} large`;
      this.facts.textContent = card?.trouble || (card?.width ? `${card.width} × ${card.height} pixels` : "");
      this.masking.textContent = card?.mask ? "Change the mask" : "Draw a mask";
      this.off.hidden = !card?.mask;
      if (!this.element.open) this.element.showModal();
      this.whole = this.load(name, turn);
      await this.whole;
    }

    isShown(name) { return this.element.open && name === this.name; }

    /** Cards are others: somebody else may have changed the caption. */
    update(names) {
      if (names.some((name) => this.isShown(name))) this.showCaption();
    }

    /** The caption as it is known; what is typed goes over the version that is seen here. */
    showCaption() {
      const card = this.store.card(this.name);
      if (!card && this.before) return; // it was asked for again
      this.before = card ? { caption: card.caption, version: card.version } : null;
      this.caption.disabled = !card || Boolean(card.fault);
      const text = this.store.textOf(this.name);
      if (this.caption.value !== text) this.caption.value = text;
    }

    /** Show the picture large; true when it is there. */
    async load(name, turn) {
      try {
        const { path, width, height } = await this.store.ask("read_large", { name });
        if (turn !== this.turn) return false;
        Object.assign(this, { width, height });
        this.picture.src = Studio.fileUrl(path);
        this.showCrop();
        return true;
      } catch (error) {
        if (turn === this.turn) this.said.textContent = error.message;
        return false;
      }
    }

    async go(by) {
      if (!await this.leave()) return;
      const index = (this.store.at.get(this.name) ?? 0) + by;
      const next = this.store.names[index];
      if (next === undefined) return;
      if (!this.store.cards.has(next)) await this.store.bring([next]);
      await this.open(next);
    }

    ontext(event) {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.store.save(this.name);
      this.go(event.shiftKey ? -1 : 1).then(() => this.caption.focus());
    }

    /** Save what was drawn or typed before another image is shown; false when that was refused. */
    async leave() {
      this.store.save(this.name);
      return !this.brush.isChanged || this.keep();
    }

    /** True when it is closed, with what was drawn and typed saved. */
    async close() {
      const isDone = !this.element.open || await this.leave();
      if (isDone) this.element.close();
      return isDone;
    }

    left() {
      this.turn += 1;
      this.store.want([this.name], true);
    }

    placed() {
      this.brush.place(this.picture);
      if (!this.box.hidden && this.kept) Studio.placeCrop(this.box, this.picture, this.kept);
    }

    async showCrop() {
      this.box.hidden = true;
      if (!this.crop.checked) return;
      const { name } = this;
      try {
        await this.settings.use(this.settings.changed);
        const { family, resolution, buckets } = this.settings.values;
        const { box, size, cut } = await this.store.ask("read_crop", { name, family, resolution, buckets });
        if (name !== this.name) return;
        this.kept = box;
        this.box.hidden = false;
        this.placed();
        this.facts.textContent = `${this.width} × ${this.height} pixels, trained as ${size[0]} × ${size[1]}, ${Number((100 * cut).toPrecision(2))} % is cut off`;
      } catch (error) {
        this.said.textContent = error.message;
      }
    }

    // The mask

    async mask(isOn) {
      this.masking.setAttribute("aria-expanded", String(isOn));
      this.tools.hidden = !isOn;
      this.masking.hidden = isOn;
      if (!isOn) { this.brush.end(); return; }
      const { name } = this;
      try {
        if (!await this.whole) { this.mask(false); return; }
        this.version = null;
        const { png, version } = await this.store.ask("read_mask", { name });
        if (name !== this.name) return;
        this.version = version;
        await this.brush.begin(name, this.width, this.height, png);
        this.placed();
        this.brush.element.focus();
      } catch (error) {
        this.said.textContent = error.message;
        this.mask(false);
      }
    }

    async keep() {
      const png = await this.brush.png();
      return this.write(png, "Change the mask");
    }

    remove() { return this.write(null, "Draw a mask"); }

    async write(png, label) {
      this.said.textContent = "";
      const { id, name } = this;
      try {
        const answer = await this.store.ask("save_mask", { id, name, png, version: this.version });
        if (id === this.store.id) this.store.told(answer, name);
        if (!answer.saved) {
          this.version = answer.version; // one is told: the next time it is written over that one
          throw new Error("Another tab or program changed this mask after you opened it, so yours is not saved. Save again to put yours in its place, or take your strokes back to keep the other one.");
        }
      } catch (error) {
        this.said.textContent = error.message;
        return false;
      }
      this.brush.end();
      this.mask(false);
      this.masking.textContent = label;
      this.off.hidden = png === null;
      this.store.want([name], true);
      this.masking.focus();
      return true;
    }
  };
})();
