// The card of one image: picture, caption as text or as tags, and what there is to know of both.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;

  /** Elements of a card, which show one image after another; `grid` is told what is done with it. */
  Studio.Card = class {
    constructor(grid) {
      Object.assign(this, { grid, store: grid.store, name: "", mode: "" });
      this.picture = h("img", { alt: "", decoding: "async", draggable: "false" });
      this.words = h("span", { class: "st-tile-words" });
      this.box = h("span", { class: "st-crop", hidden: true });
      this.thumb = h("button", { type: "button", class: "st-thumb", tabindex: "-1", onclick: (event) => grid.click(this.name, event),
        ondblclick: () => grid.hooks.open(this.name), onkeydown: (event) => grid.onkey(this.name, event) },
      this.picture, this.box, h("span", { class: "st-tick", "aria-hidden": "true" }), this.words);
      this.title = h("span", { class: "st-file" });
      this.body = h("div", { class: "st-caption-box" });
      this.meta = h("span", { class: "st-small" });
      this.compare = h("button", { type: "button", class: "st-link st-warn", hidden: true, onclick: () => grid.hooks.compare(this.name) }, "Compare");
      this.look = h("button", { type: "button", class: "st-link st-small", tabindex: "-1", onclick: () => grid.hooks.open(this.name) }, "Open");
      this.element = h("div", { class: "st-tile", role: "listitem", onfocusin: () => grid.focused(this), onpointerenter: () => grid.hooks.point(this),
        onpointerleave: () => grid.hooks.point(null) },
      this.thumb, h("div", { class: "st-tile-side" }, this.title, this.body,
        h("div", { class: "st-tile-foot" }, this.meta, this.compare, h("span", { class: "st-space" }), this.look)));
    }

    /** Show an image; `index` of `total` in the list. */
    show(name, index, total) {
      const isOther = name !== this.name;
      this.name = name;
      if (isOther) {
        this.title.textContent = this.title.title = name;
        this.look.setAttribute("aria-label", `Open ${name}`);
        this.box.hidden = true;
        if (this.area) this.area.scrollTop = 0;
      }
      this.element.setAttribute("aria-posinset", index + 1);
      this.element.setAttribute("aria-setsize", total);
      this.update(isOther);
    }

    update(isOther = false) {
      const card = this.store.card(this.name);
      this.showPicture(card, isOther);
      this.showSelected();
      this.showCaption(card, isOther);
      this.showMeta(card);
    }

    showPicture(card, isOther) {
      const url = card?.thumb ? Studio.fileUrl(card.thumb) : "";
      if (url !== this.url || isOther) {
        this.url = url;
        if (url) this.picture.src = url;
        else this.picture.removeAttribute("src");
      }
      const words = card ? [card.trouble ? "cannot be used" : "", card.excluded ? "excluded" : "", card.mask ? "mask" : "",
        card.repeats > 1 ? `× ${card.repeats}` : ""].filter(Boolean) : [];
      const said = words.join("\n");
      if (said !== this.said) {
        this.said = said;
        this.words.replaceChildren(...words.map((word) => h("span", { class: word === "cannot be used" ? "st-tag st-bad" : "st-tag" }, word)));
      }
      this.element.classList.toggle("st-excluded", Boolean(card?.excluded));
      const size = card?.width ? `, ${card.width} × ${card.height}` : "";
      const label = `${this.name}${size}${words.length ? `, ${words.join(", ")}` : ""}${card?.trouble ? `: ${card.trouble}` : ""}`;
      if (label !== this.label) {
        this.label = label;
        this.thumb.setAttribute("aria-label", label);
        this.thumb.title = label;
      }
    }

    showSelected() {
      const isSelected = this.store.selected.has(this.name);
      this.thumb.setAttribute("aria-pressed", String(isSelected));
      this.element.classList.toggle("st-selected", isSelected);
      this.thumb.tabIndex = this.grid.current === this.name ? 0 : -1;
    }

    showCaption(card, isOther) {
      const mode = card?.fault ? "fault" : this.grid.view;
      if (mode !== this.mode) this.build(mode);
      this.mode = mode;
      const text = this.store.textOf(this.name);
      if (mode === "fault") this.body.firstChild.textContent = card.fault;
      else if (mode === "tags") this.chips.show(this.name, text, isOther);
      else this.showText(text, card);
    }

    build(mode) {
      this.area = this.chips = null;
      if (mode === "fault") this.body.replaceChildren(h("p", { class: "st-warn st-small" }));
      else if (mode === "tags") {
        this.chips = new Studio.Chips(this.store, (text) => this.typed(text, true), (event) => this.walk(event));
        this.body.replaceChildren(this.chips.element);
      } else {
        this.mirror = h("div", { class: "st-mirror", "aria-hidden": "true" });
        this.area = h("textarea", { class: "st-caption-text", spellcheck: "true", autocomplete: "off", rows: "1",
          oninput: () => this.typed(this.area.value), onblur: () => this.store.save(this.name), onkeydown: (event) => this.walk(event),
          onscroll: () => { this.mirror.scrollTop = this.area.scrollTop; } });
        this.body.replaceChildren(this.mirror, this.area);
      }
    }

    showText(text, card) {
      const isDisabled = !card;
      if (this.area.value !== text) this.area.value = text;
      if (this.area.disabled !== isDisabled) this.area.disabled = isDisabled;
      const label = `Caption of ${this.name}`;
      if (this.area.ariaLabel !== label) this.area.ariaLabel = label;
      this.area.placeholder = card ? "No caption" : "";
      const cut = this.store.counts.get(text)?.[1] ?? null;
      const marked = cut === null ? "" : `${cut}\n${text}`;
      if (marked !== this.marked) {
        this.marked = marked;
        this.mirror.replaceChildren(...(cut === null ? [] : [text.slice(0, cut), h("mark", {}, text.slice(cut))]));
        this.mirror.scrollTop = this.area.scrollTop;
      }
    }

    showMeta(card) {
      const text = this.store.textOf(this.name);
      const draft = this.store.drafts.get(this.name);
      const counted = this.store.counts.get(text);
      const tokens = counted ? `${counted[0]} tokens` : "";
      const long = counted && counted[1] !== null ? `, ${counted[0] - 77} beyond 77` : "";
      const state = draft?.theirs ? "changed elsewhere" : draft?.fault ?? (draft ? "not saved" : "");
      const said = card && !card.fault ? [state, `${tokens}${long}`, Studio.count([...text].length, "character")].filter(Boolean).join(" · ") : "";
      if (this.meta.textContent !== said) this.meta.textContent = said;
      this.meta.classList.toggle("st-warn", Boolean(long || draft?.theirs || draft?.fault));
      this.compare.hidden = !draft?.theirs;
    }

    /** Something was typed; tags are saved at once, as each is a whole step. */
    typed(text, isWhole = false) {
      this.store.edit(this.name, text);
      if (isWhole) this.store.save(this.name);
      this.showMeta(this.store.cards.get(this.name));
      this.grid.count();
    }

    /** From caption to caption by keyboard. */
    walk(event) {
      const isDone = event.key === "Enter" && (event.ctrlKey || event.metaKey);
      const isMove = event.altKey && (event.key === "ArrowDown" || event.key === "ArrowUp");
      if (isDone || isMove) {
        event.preventDefault();
        this.store.save(this.name);
        this.grid.go(this.name, isDone ? (event.shiftKey ? -1 : 1) : event.key === "ArrowDown" ? 1 : -1, "text");
      } else if (event.key === "Escape" && !event.defaultPrevented) {
        this.thumb.focus();
      }
    }

    focus(where) {
      if (where === "text") (this.area ?? this.chips?.entry ?? this.thumb).focus({ preventScroll: true });
      else this.thumb.focus({ preventScroll: true });
    }

    /** Show what of the picture a crop keeps: a box in shares of width and height. */
    crop(answer) {
      this.box.hidden = !answer;
      if (answer) Studio.placeCrop(this.box, this.picture, answer.box);
    }
  };

  /** Lay a box over what `object-fit: contain` shows of a picture. */
  Studio.placeCrop = (box, picture, [left, top, right, bottom]) => {
    const { clientWidth: width, clientHeight: height, naturalWidth, naturalHeight } = picture;
    const scale = Math.min(width / naturalWidth, height / naturalHeight) || 0;
    const [w, t] = [naturalWidth * scale, naturalHeight * scale];
    const [x, y] = [picture.offsetLeft + (width - w) / 2, picture.offsetTop + (height - t) / 2];
    Object.assign(box.style, { left: `${x + left * w}px`, top: `${y + top * t}px`, width: `${(right - left) * w}px`, height: `${(bottom - top) * t}px` });
  };
})();
