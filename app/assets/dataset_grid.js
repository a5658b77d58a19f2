// The grid of cards: of thousands of images only those that can be seen are on the page.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const GAP = 12;
  const SPARE = 1; // rows above and below that are ready
  const SIZES = { // least width of a card, height of its picture, of its caption
    small: [168, 118, 74], medium: [236, 172, 104], large: [340, 272, 136],
  };
  const FRAME = 84; // pixels of a card that are neither picture nor caption
  const LYING = 178; // height of a card when there is one column: picture left, caption right
  const PAUSE = 250; // milliseconds without a key before tokens are counted

  /** `hooks`: open(name), compare(name), point(card or null), selected(), remove(names), exclude(names). */
  Studio.CardGrid = class {
    constructor(store, hooks) {
      Object.assign(this, { store, hooks, view: "text", size: "medium", columns: 1, current: "", anchor: "", shown: new Map(), spare: [] });
      this.sheet = h("div", { class: "st-sheet", role: "list", "aria-label": "Images" });
      this.empty = h("div", { class: "st-empty" });
      this.element = h("div", { class: "st-grid", tabindex: "-1" }, this.sheet, this.empty);
      this.element.addEventListener("scroll", () => this.later(), { passive: true });
      new ResizeObserver(() => this.layout()).observe(this.element);
    }

    // Layout

    layout() {
      const width = this.element.clientWidth;
      if (!width) return;
      const [least, picture, caption] = SIZES[this.size];
      const first = Math.floor(this.element.scrollTop / (this.row || 1)) * this.columns;
      const columns = Math.max(1, Math.floor((width + GAP) / (least + GAP)));
      const isLying = columns === 1 && width < 520;
      const row = (isLying ? LYING : picture + caption + FRAME) + GAP;
      const card = (width - GAP * (columns - 1)) / columns;
      if (columns === this.columns && row === this.row && card === this.card) return;
      Object.assign(this, { columns, row, card });
      this.sheet.classList.toggle("st-lying", isLying);
      this.sheet.style.setProperty("--picture", `${picture}px`);
      this.sheet.style.setProperty("--card", `${card}px`);
      this.sheet.style.setProperty("--tall", `${row - GAP}px`);
      this.element.scrollTop = Math.floor(first / columns) * row;
      this.draw(true);
    }

    show({ view = this.view, size = this.size }) {
      const isOther = view !== this.view;
      Object.assign(this, { view, size });
      this.layout();
      if (isOther) this.draw(true);
    }

    /** The list is another one. */
    listed(isNew) {
      if (isNew) this.element.scrollTop = 0;
      if (!this.store.at.has(this.current)) this.current = this.store.names[0] ?? "";
      this.draw(true);
    }

    later() {
      if (this.frame) return;
      this.frame = requestAnimationFrame(() => { this.frame = 0; this.draw(); });
    }

    /** Put the cards that can be seen onto the page, in the order of the list; others give theirs back. */
    draw(isAll = false) {
      const { names } = this.store;
      const rows = Math.ceil(names.length / this.columns);
      this.sheet.style.height = `${Math.max(0, rows * this.row - GAP)}px`;
      const first = Math.max(0, Math.floor(this.element.scrollTop / this.row) - SPARE);
      const last = Math.min(rows, Math.ceil((this.element.scrollTop + this.element.clientHeight) / this.row) + SPARE);
      const range = `${first} ${last} ${this.columns} ${names.length}`;
      if (!isAll && range === this.range) return;
      this.range = range;
      const wanted = names.slice(first * this.columns, last * this.columns);
      const held = this.held();
      const keep = new Set(wanted);
      if (held) keep.add(held);
      for (const [name, card] of this.shown) {
        if (keep.has(name)) continue;
        this.shown.delete(name);
        this.spare.push(card);
      }
      this.place(wanted, held, isAll);
      this.spare.splice(0).forEach((card) => card.element.remove());
      this.count();
    }

    /** The image whose card has the focus: it stays on the page, wherever one scrolls. */
    held() {
      const card = document.activeElement?.closest?.(".st-tile");
      const name = card && [...this.shown].find(([, shown]) => shown.element === card)?.[0];
      return name && this.store.at.has(name) ? name : null;
    }

    place(wanted, held, isAll) {
      const all = held && !wanted.includes(held) ? [...wanted, held].sort((a, b) => this.store.at.get(a) - this.store.at.get(b)) : wanted;
      const total = this.store.names.length;
      let next = this.sheet.firstElementChild;
      for (const name of all) {
        const index = this.store.at.get(name);
        let card = this.shown.get(name);
        const isFresh = !card;
        if (isFresh) {
          card = this.spare.pop() ?? new Studio.Card(this);
          if (card.element === next) next = next.nextElementSibling;
          this.shown.set(name, card);
        }
        const x = (index % this.columns) * (this.card + GAP);
        const y = Math.floor(index / this.columns) * this.row;
        const at = `translate(${x}px, ${y}px)`;
        if (card.element.style.transform !== at) card.element.style.transform = at;
        while (next && this.spare.some((other) => other.element === next)) next = next.nextElementSibling;
        if (card.element === next) next = next.nextElementSibling;
        else this.sheet.insertBefore(card.element, next);
        if (isFresh || isAll) card.show(name, index, total);
      }
    }

    isShown(name) { return this.shown.has(name); }

    update(names) {
      for (const name of names) this.shown.get(name)?.update();
      this.count();
    }

    /** Count tokens of the captions that are shown, when no key was pressed for a moment. */
    count() {
      clearTimeout(this.counting);
      this.counting = setTimeout(() => this.store.attempt(async () => {
        const texts = [...this.shown.keys()].filter((name) => this.store.cards.has(name)).map((name) => this.store.textOf(name));
        if (await this.store.count(texts)) for (const card of this.shown.values()) card.update();
      }), PAUSE);
    }

    // Focus and selection

    focused(card) {
      this.hooks.point(card);
      if (this.current === card.name) return;
      const before = this.shown.get(this.current);
      this.current = card.name;
      before?.showSelected();
      card.showSelected();
      this.reveal(card.name);
    }

    /** Scroll so that all of a card can be seen. */
    reveal(name) {
      const index = this.store.at.get(name);
      if (index === undefined) return;
      const top = Math.floor(index / this.columns) * this.row;
      const { scrollTop, clientHeight } = this.element;
      if (top < scrollTop) this.element.scrollTop = top;
      else if (top + this.row > scrollTop + clientHeight) this.element.scrollTop = Math.min(top, top + this.row - clientHeight);
      this.draw();
    }

    /** Go so many images on from one, to its picture or its caption. */
    go(name, by, where) {
      const index = Math.max(0, Math.min(this.store.names.length - 1, (this.store.at.get(name) ?? 0) + by));
      const next = this.store.names[index];
      if (next === undefined) return "";
      this.reveal(next);
      this.shown.get(next)?.focus(where);
      return next;
    }

    /** As files are chosen everywhere: one by a click, more with Ctrl, a range with Shift; the tick adds and takes away. */
    click(name, event) {
      const isTick = Boolean(event.target.closest?.(".st-tick"));
      if (event.shiftKey) this.extend(name);
      else if (isTick || event.ctrlKey || event.metaKey) this.toggle(name);
      else if (event.detail < 2) this.select([name], name);
    }

    toggle(name) {
      const { selected } = this.store;
      if (selected.has(name)) selected.delete(name);
      else selected.add(name);
      this.anchor = name;
      this.showSelected();
    }

    extend(name) {
      const [from, to] = [this.store.at.get(this.anchor) ?? 0, this.store.at.get(name)].sort((a, b) => a - b);
      this.select(this.store.names.slice(from, to + 1), this.anchor || this.store.names[0]);
    }

    select(names, anchor = "") {
      this.store.selected = new Set(names);
      this.anchor = anchor;
      this.showSelected();
    }

    showSelected() {
      for (const card of this.shown.values()) card.showSelected();
      this.hooks.selected();
    }

    onkey(name, event) {
      const page = Math.max(1, Math.floor(this.element.clientHeight / this.row)) * this.columns;
      const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, PageUp: -page, PageDown: page, Home: -1e9, End: 1e9 };
      const isPlain = !event.ctrlKey && !event.metaKey && !event.altKey;
      const chosen = this.store.selected.has(name) ? [...this.store.selected] : [name];
      if (event.key in moves && !event.altKey) {
        const next = this.go(name, moves[event.key], "thumb");
        if (event.shiftKey) { this.anchor ||= name; this.extend(next); }
      } else if (event.key === " ") this.toggle(name);
      else if (event.key === "Enter" && isPlain) this.hooks.open(name);
      else if (event.key === "Enter" || event.key === "F2" || (event.key === "c" && isPlain)) this.shown.get(name)?.focus("text");
      else if (event.key === "a" && (event.ctrlKey || event.metaKey)) this.select(this.store.names, this.anchor);
      else if (event.key === "Escape") this.select([]);
      else if (event.key === "Delete") this.hooks.remove(chosen);
      else if (event.key === "x" && isPlain) this.hooks.exclude(chosen);
      else return;
      event.preventDefault();
    }
  };
})();
