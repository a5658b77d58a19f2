// The base models that other programs have on this computer, to choose one from.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const NAMES = { sd15: "SD 1.5", sdxl: "SDXL", flux1: "Flux.1", flux2: "Flux.2" };

  Studio.BaseDialog = class {
    /** `take` gets the id of the base that was chosen. */
    constructor(server, take) {
      Object.assign(this, { server, take, bases: [], places: null });
      this.said = h("p", { class: "st-small", role: "status" });
      this.kind = h("select", { id: "studio-base-kind", onchange: () => this.show() },
        h("option", { value: "" }, "All kinds"), Object.entries(NAMES).map(([family, name]) => h("option", { value: family }, name)));
      this.list = h("ul", { class: "st-bases" });
      this.element = h("dialog", { class: "st-base-dialog", "aria-label": "Base models on this computer" },
        h("header", { class: "st-row" }, h("h3", {}, "Base models on this computer"), h("span", { class: "st-space" }),
          h("button", { type: "button", class: "st-button", onclick: () => this.element.close() }, "Close")),
        h("div", { class: "st-row" }, h("label", { for: "studio-base-kind" }, "Kind"), this.kind), this.said, this.list);
    }

    async open(family) {
      this.kind.value = family in NAMES ? family : "";
      Object.assign(this, { bases: [], places: null });
      this.list.replaceChildren();
      this.said.textContent = "Looking through the folders of ComfyUI, A1111, Forge, OneTrainer and the Hugging Face cache…";
      if (!this.element.open) this.element.showModal();
      try {
        const { bases, places } = await Studio.ask(this.server, "list_bases");
        Object.assign(this, { bases, places });
        this.show();
      } catch (error) {
        this.said.textContent = error.message;
      }
    }

    show() {
      if (this.places === null) return; // still looking
      const chosen = this.bases.filter((base) => base.family && (!this.kind.value || base.family === this.kind.value));
      const others = this.bases.filter((base) => base.family).length - chosen.length;
      const rest = others ? ` ${others} of other kinds.` : "";
      this.said.textContent = chosen.length ? `${chosen.length} found.${rest}`
        : `None of this kind was found.${rest} Looked at: ${this.places.join(", ") || "no folder"}. Start the app with --models FOLDER to look elsewhere, or type a path or a hub id into the field.`;
      this.list.replaceChildren(...chosen.map((base) => this.row(base)));
    }

    row(base) {
      const parts = Object.keys(base.parts).length;
      const state = base.ready ? (parts ? "ready, its parts were found" : "ready") : `missing: ${base.missing.join("; ")}`;
      return h("li", {}, h("button", { type: "button", class: "st-base", onclick: () => this.choose(base.id) },
        h("span", { class: "st-row" }, h("strong", {}, base.name), h("span", { class: "st-tag" }, NAMES[base.family]), h("span", { class: "st-small" }, [base.program, base.bytes ? Studio.bytes(base.bytes) : ""].filter(Boolean).join(", "))),
        h("span", { class: base.ready ? "st-small" : "st-warn" }, state), base.note ? h("span", { class: "st-warn" }, base.note) : null, h("span", { class: "st-small st-path" }, base.base)));
    }

    async choose(id) {
      try {
        await this.take(id);
        this.element.close();
      } catch (error) {
        this.said.textContent = error.message;
      }
    }
  };
})();
