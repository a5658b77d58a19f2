// What a tool has made of a LoRA: its progress, a tick for each program, what was lost, the file, and how to use it.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const PAUSE = 400; // milliseconds between two looks
  const FOLDERS = { a1111: "models/Lora", forge: "models/Lora", comfyui: "models/loras", "comfyui-old": "models/loras" };
  const PROGRAMS = { comfyui: "ComfyUI", "comfyui-old": "ComfyUI", a1111: "A1111", forge: "Forge", diffusers: "diffusers" };

  Studio.ExportCard = class {
    constructor(server, task, about) {
      Object.assign(this, { server, task, about });
      this.text = h("p", { role: "status" }, "Starting…");
      this.bar = h("progress", { "aria-label": "Layers done" });
      this.stop = h("button", { type: "button", class: "st-button st-quiet", onclick: () => this.cancel() }, "Cancel");
      this.body = h("div", { class: "st-export-body" });
      this.element = h("section", { class: "st-card st-export-card", "aria-label": about.label || "Result" },
        h("h3", {}, about.label || "Result"), this.text, this.bar, h("div", { class: "st-row st-cancel" }, this.stop), this.body);
    }

    async cancel() {
      this.stop.disabled = true;
      this.text.textContent = "Cancelling…";
      try {
        await Studio.ask(this.server, "cancel_task", { task: this.task });
      } catch (error) {
        this.text.textContent = error.message;
      }
    }

    async follow() {
      try {
        this.end(await Studio.watch(() => Studio.ask(this.server, "read_task", { task: this.task }), (answer) => this.show(answer), PAUSE));
      } catch (error) {
        this.end({ word: "failed", text: error.message });
      }
    }

    /** How far it is; the answer itself at the end. */
    show(answer) {
      if (answer.word !== "working") return answer;
      if (answer.of) Object.assign(this.bar, { max: answer.of, value: answer.done });
      if (!this.stop.disabled) this.text.textContent = answer.of ? `${answer.done} of ${answer.of} layers` : "At work…";
      return undefined;
    }

    end({ word, text, result }) {
      this.bar.remove();
      this.stop.parentElement.remove();
      this.text.textContent = word === "failed" ? text : "";
      this.text.className = word === "failed" ? "st-warn" : "";
      this.text.hidden = !this.text.textContent;
      if (!result) return;
      if (result.model) { this.body.append(...model(result.model)); return; }
      if (result.comparison) { this.body.append(...compared(result.comparison)); return; }
      this.body.append(...[file(result), losses(result), others(result), ticks(result.report, this.about.target), howTo(result, this.about)].filter(Boolean));
      this.element.classList.toggle("st-good-card", result.report.faults.length === 0 && isRead(result.report, this.about.target));
    }
  };

  function isRead({ ticks: all }, target) {
    const asked = all.filter(({ id }) => !target || target.startsWith(id));
    return asked.length > 0 && asked.every(({ good }) => good);
  }

  function file({ file: name, path, bytes, format, rank, dtype }) {
    if (!name) return null;
    return h("div", {}, h("div", { class: "st-row" }, h("p", { class: "st-small" }, [Studio.bytes(bytes), `rank ${rank}`, dtype, `format ${format}`].join(" · ")),
      h("span", { class: "st-space" }), h("a", { class: "st-button st-primary", href: Studio.fileUrl(path), download: name, "aria-label": `Download ${name}` }, "Download")),
    h("p", { class: "st-small st-where" }, `On this machine: ${path}`));
  }

  /** The program that was asked for first; a sign and words, so that colour alone says nothing. */
  function ticks({ ticks: all, faults, notes }, target) {
    const sorted = [...all].sort((a, b) => Number((target ?? "").startsWith(b.id)) - Number((target ?? "").startsWith(a.id)));
    const line = ({ program, good, words }) => h("li", { class: good ? "st-good" : "st-warn" }, h("span", { class: "st-sign", "aria-hidden": "true" }, good ? "✓" : "!"),
      h("span", {}, h("strong", {}, program), ` ${words.join("; ")}.`));
    const wrong = faults.map((text) => h("li", { class: "st-warn" }, h("span", { class: "st-sign", "aria-hidden": "true" }, "!"), h("span", {}, `Wrong for every program: ${text}.`)));
    return h("div", {}, h("h4", {}, "Who reads it"), h("ul", { class: "st-ticks" }, ...wrong, ...sorted.map(line)),
      ...notes.map((text) => h("p", { class: "st-small" }, `${text[0].toUpperCase()}${text.slice(1)}.`)));
  }

  /** A base model that was written: a file to download, or a folder. */
  function model({ file: name, path, folder, bytes, changed, left_out: left }) {
    const words = [`${changed} tensors changed`, Studio.bytes(bytes), folder ? "a diffusers folder" : "a single file"].join(" · ");
    const download = folder ? [] : [h("span", { class: "st-space" }), h("a", { class: "st-button st-primary", href: Studio.fileUrl(path), download: name, "aria-label": `Download ${name}` }, "Download")];
    return [h("div", { class: "st-row" }, h("p", { class: "st-small" }, words), download), h("p", { class: "st-small st-where" }, `On this machine: ${path}`),
      ...(left ? [h("p", { class: "st-warn" }, `${left} layers of text encoders are not in it: this base does not hold them.`)] : [])];
  }

  function others({ others: found }) {
    return found ? h("p", { class: "st-small" }, `Not in it: ${found[0]} other tensors that differ too, such as ${found[1]}; no LoRA holds norms, biases and embeddings.`) : null;
  }

  function losses({ cuts, kept }) {
    if (!cuts) return null;
    const rows = cuts.map(([layer, before, after, share]) => h("tr", {}, h("th", { scope: "row" }, layer), h("td", {}, `${before} → ${after}`), h("td", {}, percent(share))));
    return h("div", {}, h("p", {}, h("strong", {}, percent(kept)), " of the change is kept in all (its squared norm)."),
      h("details", {}, h("summary", {}, "The layers that lose most"), h("div", { class: "st-scroll", tabindex: "0", role: "region", "aria-label": "The layers that lose most" },
        h("table", { class: "st-layers" }, h("thead", {}, h("tr", {}, ["Layer", "Rank", "Kept"].map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, rows)))));
  }

  function compared({ words, layers, names }) {
    const heads = ["Layer", "Input", "Output", "By chance", "Shared", "Cosine", "Norms"];
    const rows = layers.map((one) => h("tr", {}, h("th", { scope: "row" }, one.layer), [percent(one.into), percent(one.out_of), percent(one.chance), percent(one.shared),
      one.cosine.toFixed(2), one.norms.map((norm) => Studio.number(norm, 3)).join(" / ")].map((text) => h("td", {}, text))));
    const table = h("details", {}, h("summary", {}, "The layers where they overlap most"),
      h("p", { class: "st-small" }, "Input and output: how far the directions that the two read and write agree (mean squared cosine of the principal angles). "
        + `Shared: how much of what ${names[0]} changes lies in the directions of ${names[1]}.`),
      h("div", { class: "st-scroll", tabindex: "0", role: "region", "aria-label": "Overlap by layer" },
        h("table", { class: "st-layers" }, h("thead", {}, h("tr", {}, heads.map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, rows))));
    return [...words.map((text) => h("p", {}, text)), ...(layers.length ? [table] : [])];
  }

  function percent(share) { return `${(100 * share).toFixed(share > 0.9995 || share < 0.0995 ? 2 : 1)} %`; }

  /** Where the file goes, what to type, how strong. */
  function howTo({ file: name, path, family }, { target, triggers }) {
    if (!name || !target) return null;
    const stem = name.replace(/\.safetensors$/, "");
    const words = triggers.trim();
    const prompt = words ? `Write ${words} into the prompt, as in training.` : "Write the prompt as the captions were in training.";
    const strong = "Strength 1 is what was trained: there is no hidden scale. Try 0.6 to 1.";
    const steps = {
      comfyui: [`Put the file into ${FOLDERS.comfyui} of ComfyUI, and press R there to find it.`, `Add the node ${family.startsWith("flux") ? "LoraLoaderModelOnly" : "Load LoRA"} between the model and the sampler, and choose the file there.`, prompt, strong],
      a1111: [`Put the file into ${FOLDERS.a1111} of your program, and press Refresh on its tab Lora.`, ["Write ", h("code", {}, `<lora:${stem}:1>`), words ? " and " : "", words ? h("code", {}, words) : "", " into the prompt."], strong],
      diffusers: [h("pre", { tabindex: "0" }, `pipeline.load_lora_weights(\n    ${JSON.stringify(path.slice(0, -name.length - 1))},\n    weight_name=${JSON.stringify(name)})`), prompt,
        ["For another strength, give it an adapter_name and call ", h("code", {}, "pipeline.set_adapters(name, 0.8)"), "."]],
    };
    const chosen = steps[{ "comfyui-old": "comfyui", forge: "a1111" }[target] ?? target];
    const base = { sd15: "an SD 1.5 model", sdxl: "an SDXL model", flux1: "Flux.1", flux2: "the Flux.2 model of its size" }[family];
    return h("div", { class: "st-how" }, h("h4", {}, `How to use it in ${PROGRAMS[target]}`), h("ol", {}, chosen.map((step) => h("li", {}, step)),
      h("li", {}, `Use the base model that it was trained on, or one near to it (${base}).`)));
  }
})();
