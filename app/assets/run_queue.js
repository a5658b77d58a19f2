// Runs that wait for their turn: their order, and what the queue could not train.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;

  /** `order(run, what)` asks the server; it throws what the server says. */
  Studio.RunQueue = class {
    constructor(order) {
      this.order = order;
      this.waiting = [];
      this.isEmpty = true;
      this.list = h("ol", { class: "st-queue" });
      this.failures = h("ul", { class: "st-queue" });
      this.said = h("p", { class: "st-asked", role: "status" });
      this.element = h("section", { "aria-label": "Queue", hidden: true }, h("h2", {}, "Queue"), this.list, this.failures, this.said);
    }

    show({ waiting, failed }) {
      this.waiting = waiting;
      const focused = document.activeElement?.dataset?.queue;
      this.list.replaceChildren(...waiting.map((name, index) => this.row(name, index)));
      this.failures.replaceChildren(...failed.map(([name, reason]) => this.failure(name, reason)));
      this.isEmpty = !waiting.length && !failed.length;
      this.element.hidden = this.isEmpty && !this.said.textContent;
      if (focused) this.focus(focused);
    }

    /** The same button of the same run; at an end of the list, the one for the other direction. */
    focus(key) {
      const at = (wanted) => this.element.querySelector(`button[data-queue="${CSS.escape(wanted)}"]:not(:disabled)`);
      const [what, name] = [key.slice(0, key.indexOf(" ")), key.slice(key.indexOf(" ") + 1)];
      const other = { up: "down", down: "up" }[what];
      (at(key) ?? at(`${other} ${name}`) ?? this.said.querySelector("button"))?.focus();
    }

    row(name, index) {
      const button = (what, sign, label, isOff = false) => h("button", { type: "button", class: "st-button st-quiet", "data-queue": `${what} ${name}`, title: label,
        "aria-label": `${label}: ${name}`, disabled: isOff, onclick: () => this.ask(name, what) }, sign);
      return h("li", {}, h("span", { class: "st-place" }, `${index + 1}.`), h("button", { type: "button", class: "st-link st-name", onclick: () => Studio.chooseRun(name) }, name),
        h("span", { class: "st-row" }, button("up", "↑", "Earlier", index === 0), button("down", "↓", "Later", index === this.waiting.length - 1), button("cancel", "✕", "Cancel")));
    }

    failure(name, reason) {
      return h("li", { class: "st-queue-failed" }, h("details", {}, h("summary", {}, Studio.badge("failed"), ` ${name}`), h("p", { class: "st-small" }, reason)),
        h("button", { type: "button", class: "st-button st-quiet", "data-queue": `dismiss ${name}`, "aria-label": `Dismiss: ${name}`, onclick: () => this.ask(name, "dismiss") }, "Dismiss"));
    }

    async ask(name, what) {
      try {
        await this.order(name, what);
        const undo = h("button", { type: "button", class: "st-button st-quiet", onclick: () => this.ask(name, "restore") }, "Undo");
        this.said.replaceChildren(...(what === "cancel" ? [`${name} does not wait any more. `, undo] : []));
        this.element.hidden = this.isEmpty && what !== "cancel";
        if (what === "cancel") undo.focus();
      } catch (error) {
        this.said.textContent = error.message;
        this.element.hidden = false;
      }
    }
  };
})();
