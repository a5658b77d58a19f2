// A caption as tags: each can be moved, changed or taken out, and new ones are completed from the data set's own.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const PAUSE = 120; // milliseconds without a key before tags are offered
  let count = 0;

  /** Lines of tags: [["a", "b"], ["c"]] for "a, b\nc". */
  Studio.splitTags = (text) => text.split("\n").map((line) => line.split(",").map((tag) => tag.trim()).filter(Boolean));
  Studio.joinTags = (lines) => lines.map((tags) => tags.join(", ")).join("\n");

  /** `changed(text)` for each whole change; `walk(event)` for keys that lead to another card. */
  Studio.Chips = class {
    constructor(store, changed, walk) {
      Object.assign(this, { store, changed, name: "", text: null, lines: [[]], editing: null, dragged: null, turn: 0 });
      count += 1;
      this.list = h("ul", { class: "st-chips", "aria-label": "Tags", ondragover: (event) => this.over(event), ondrop: (event) => this.drop(event) });
      this.choices = h("ul", { class: "st-choices", role: "listbox", id: `studio-tags-${count}`, "aria-label": "Tags of this data set", hidden: true });
      this.entry = h("input", { class: "st-chip-entry", autocomplete: "off", spellcheck: "false", placeholder: "Add a tag", role: "combobox",
        "aria-expanded": "false", "aria-controls": this.choices.id, "aria-autocomplete": "list", oninput: () => this.offerSoon(),
        onkeydown: (event) => this.onentry(event, walk), onblur: () => { this.add(); this.close(); } });
      this.element = h("div", { class: "st-chipbox" }, this.list, h("div", { class: "st-entry-box" }, this.entry, this.choices));
    }

    /** Show the tags of an image; while one of them is in the field to be changed, the rest stay as they are. */
    show(name, text, isOther) {
      const isSame = name === this.name;
      if (isSame && (this.editing || (text === this.text && !isOther))) return;
      if (!isSame) {
        this.entry.value = "";
        this.editing = null;
      }
      this.name = name;
      this.entry.ariaLabel = `Add a tag to ${name}`;
      this.draw(text);
    }

    draw(text) {
      Object.assign(this, { text, lines: Studio.splitTags(text) });
      const focused = this.focusedAt();
      this.list.replaceChildren(...this.lines.flatMap((tags, line) => [
        ...(line ? [h("li", { class: "st-break", "aria-label": "New line" }, "↵")] : []), ...tags.map((tag, at) => this.chip(tag, line, at))]));
      if (focused) this.focusChip(...focused);
    }

    chip(tag, line, at) {
      return h("li", { class: "st-chip", draggable: "true", "data-line": line, "data-at": at,
        ondragstart: (event) => { this.dragged = [line, at]; event.dataTransfer.effectAllowed = "move"; event.dataTransfer.setData("text/plain", tag); },
        ondragend: () => { this.dragged = null; } },
      h("button", { type: "button", class: "st-chip-name", title: "Alt and arrows move it, Delete takes it out, Enter changes it",
        "aria-label": `${tag}, tag ${at + 1} of ${this.lines[line].length}`, onclick: () => this.change(line, at),
        onkeydown: (event) => this.onchip(event, line, at) }, tag),
      h("button", { type: "button", class: "st-chip-off", tabindex: "-1", "aria-label": `Take out ${tag}`, onclick: () => this.remove(line, at) }, "×"));
    }

    focusedAt() {
      const chip = this.list.contains(document.activeElement) && document.activeElement.closest(".st-chip");
      return chip ? [Number(chip.dataset.line), Number(chip.dataset.at)] : null;
    }

    focusChip(line, at) {
      const chips = [...this.list.querySelectorAll(".st-chip")];
      const chip = chips.find((item) => Number(item.dataset.line) === line && Number(item.dataset.at) === at) ?? chips.at(-1);
      (chip?.firstElementChild ?? this.entry).focus();
    }

    /** Write the tags down and say so. */
    commit(line, at) {
      const text = Studio.joinTags(this.lines);
      this.draw(text);
      if (at !== undefined) this.focusChip(line, at);
      this.changed(text);
    }

    remove(line, at) {
      this.lines[line].splice(at, 1);
      if (!this.lines[line].length && this.lines.length > 1) this.lines.splice(line, 1);
      this.commit(Math.min(line, this.lines.length - 1), Math.max(0, at - 1));
    }

    move(from, [line, at]) {
      const [tag] = this.lines[from[0]].splice(from[1], 1);
      this.lines[line].splice(at, 0, tag);
      this.commit(line, at);
    }

    /** Take a tag into the field, to write it otherwise. */
    change(line, at) {
      const [tag] = this.lines[line].splice(at, 1);
      this.editing = [line, at, tag];
      this.draw(Studio.joinTags(this.lines));
      this.entry.value = tag;
      this.entry.focus();
      this.entry.select();
    }

    onchip(event, line, at) {
      const tags = this.lines[line];
      if (event.altKey && event.key === "ArrowLeft" && at > 0) this.move([line, at], [line, at - 1]);
      else if (event.altKey && event.key === "ArrowRight" && at < tags.length - 1) this.move([line, at], [line, at + 1]);
      else if (event.altKey) return;
      else if (event.key === "ArrowLeft") this.focusChip(line, Math.max(0, at - 1));
      else if (event.key === "ArrowRight") this.focusChip(line, Math.min(tags.length - 1, at + 1));
      else if (event.key === "Delete" || event.key === "Backspace") this.remove(line, at);
      else return;
      event.preventDefault();
      event.stopPropagation();
    }

    // Dragging

    over(event) {
      if (!this.dragged) return;
      event.preventDefault();
      event.stopPropagation();
    }

    drop(event) {
      if (!this.dragged) return;
      event.preventDefault();
      event.stopPropagation();
      const chip = event.target.closest(".st-chip");
      const [fromLine, fromAt] = this.dragged;
      const line = chip ? Number(chip.dataset.line) : this.lines.length - 1;
      let at = chip ? Number(chip.dataset.at) : this.lines[line].length;
      if (chip && event.offsetX > chip.clientWidth / 2) at += 1;
      if (line === fromLine && at > fromAt) at -= 1;
      this.dragged = null;
      if (line !== fromLine || at !== fromAt) this.move([fromLine, fromAt], [line, at]);
    }

    // The field for a new tag

    onentry(event, walk) {
      const isDone = event.key === "Enter" && (event.ctrlKey || event.metaKey);
      const isOpen = !this.choices.hidden;
      if (isOpen && (event.key === "ArrowDown" || event.key === "ArrowUp") && !event.altKey) this.mark(event.key === "ArrowDown" ? 1 : -1);
      else if (isOpen && event.key === "Escape") this.close();
      else if (this.editing && event.key === "Escape") this.add(this.editing[2]);
      else if ((event.key === "Enter" && !isDone) || event.key === ",") this.add(this.marked()?.dataset.tag);
      else if (event.key === "Backspace" && !this.entry.value && !this.editing && this.lines.at(-1).length) this.remove(this.lines.length - 1, this.lines.at(-1).length - 1);
      else {
        if (isDone || (event.altKey && event.key.startsWith("Arrow"))) this.add();
        walk(event);
        return;
      }
      event.preventDefault();
      event.stopPropagation();
      if (event.key === "Backspace") this.entry.focus();
    }

    /** Put in what was typed, at the end or in place of the tag that is changed. */
    add(chosen) {
      const typed = (chosen ?? this.entry.value).split(",").map((tag) => tag.trim()).filter(Boolean);
      const { editing } = this;
      this.editing = null;
      this.entry.value = "";
      this.close();
      if (!typed.length && !editing) return;
      const now = this.store.textOf(this.name); // another tab may have changed it meanwhile
      const lines = Studio.splitTags(now);
      if (editing) this.replace(lines, editing, typed);
      else lines.at(-1).push(...typed);
      const isAsBefore = editing && typed.join(", ") === editing[2];
      const text = isAsBefore ? now : Studio.joinTags(lines);
      this.draw(text);
      if (text !== now) this.changed(text);
    }

    /** Put tags in place of the one that was taken into the field, wherever it is by now; else at the end. */
    replace(lines, [line, at, old], tags) {
      const isThere = lines[line]?.[at] === old;
      const found = isThere ? lines[line] : lines.find((row) => row.includes(old));
      if (found) found.splice(isThere ? at : found.indexOf(old), 1, ...tags);
      else lines.at(-1).push(...tags);
    }

    offerSoon() {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.store.attempt(() => this.offer()), PAUSE);
    }

    async offer() {
      const turn = (this.turn += 1);
      const prefix = this.entry.value.trim();
      if (!prefix) { this.close(); return; }
      const { tags } = await this.store.ask("list_tags", { prefix });
      if (turn !== this.turn || document.activeElement !== this.entry) return;
      const own = new Set(this.lines.flat().map((tag) => tag.toLowerCase()));
      const offered = tags.filter(([tag]) => !own.has(tag.toLowerCase())).slice(0, 8);
      this.choices.replaceChildren(...offered.map(([tag, times], index) => h("li", { role: "option", id: `${this.choices.id}-${index}`, "data-tag": tag,
        "aria-selected": "false", onpointerdown: (event) => { event.preventDefault(); this.add(tag); } }, tag, h("span", { class: "st-small" }, ` ${times}`))));
      this.choices.hidden = offered.length === 0;
      this.entry.setAttribute("aria-expanded", String(!this.choices.hidden));
    }

    marked() { return this.choices.hidden ? null : this.choices.querySelector('[aria-selected="true"]'); }

    mark(by) {
      const options = [...this.choices.children];
      const at = (options.indexOf(this.marked()) + by + options.length + (by < 0 && !this.marked() ? 1 : 0)) % options.length;
      options.forEach((option, index) => option.setAttribute("aria-selected", String(index === at)));
      this.entry.setAttribute("aria-activedescendant", options[at].id);
    }

    close() {
      this.turn += 1;
      clearTimeout(this.timer);
      this.choices.hidden = true;
      this.entry.setAttribute("aria-expanded", "false");
      this.entry.removeAttribute("aria-activedescendant");
    }
  };
})();
