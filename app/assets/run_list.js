// The list of runs with their states, and the way to a new one.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;

  Studio.STATES = {
    new: "not started", waiting: "waiting", starting: "starting", training: "training", paused: "paused", silent: "no sign of life",
    done: "done", stopped: "stopped", early: "stopped early", failed: "failed", crashed: "crashed",
  };

  Studio.badge = (word) => h("span", { class: `st-badge st-is-${word}` }, Studio.STATES[word] ?? word);

  Studio.runList = (element, server, { hasDemo }) => {
    let tag = "";
    let rows = null;
    let live = {};
    let expected = ""; // a run that was started a moment ago, and may not be in the list yet
    const list = h("ol", { class: "st-runs" });
    const count = h("span", { class: "st-count" });
    const fresh = h("button", { type: "button", class: "st-button st-primary", onclick: () => Studio.goTo("Preset") }, "New run");
    const queue = new Studio.RunQueue(async (run, order) => {
      await Studio.ask(server, "order_queue", { run, order });
      await refresh();
    });
    const said = h("p", { class: "st-asked", role: "status" });
    const fault = h("p", { class: "st-warn", role: "alert" });
    const panel = h("nav", { class: "st-runlist", "aria-label": "Runs" },
      h("div", { class: "st-row" }, h("h2", {}, "Runs ", count), h("span", { class: "st-space" }), fresh), said, fault, list, queue.element);
    element.replaceChildren(panel, Studio.welcome(hasDemo, startDemo));
    const welcome = element.lastElementChild;

    async function startDemo() {
      const { run } = await Studio.ask(server, "start_demo");
      document.dispatchEvent(new CustomEvent("studio:started", { detail: run }));
    }

    async function refresh() {
      const answer = await Studio.ask(server, "list_runs", { seen: tag }).catch((error) => {
        if (!(error instanceof Studio.Lost)) fault.textContent = `The list is not up to date: ${error.message}`;
        throw error;
      });
      fault.textContent = "";
      live = answer.live;
      if (answer.rows) {
        ({ tag, rows } = answer);
        queue.show(answer.queue);
      }
      const names = rows.map(([name]) => name);
      if (names.includes(expected)) expected = "";
      if (!Studio.selected && !expected && names.length) Studio.chooseRun(names[0]);
      draw();
      return Object.keys(live).length ? 2 : 4;
    }
    const now = Studio.poll(element, refresh);

    function draw() {
      const isFirst = rows.length === 0 && !Studio.selected && queue.isEmpty;
      document.getElementById("train")?.classList.toggle("st-first", isFirst);
      welcome.hidden = !isFirst;
      panel.hidden = isFirst;
      count.textContent = rows.length || "";
      const drawn = rows.map(row);
      const focused = list.querySelector("a:focus")?.dataset.run;
      list.replaceChildren(...drawn);
      if (focused) list.querySelector(`a[data-run="${CSS.escape(focused)}"]`)?.focus();
    }

    function row([name, word, started, steps, step]) {
      const [at, of] = live[name] ?? [step, steps];
      const address = new URL(location.href);
      address.searchParams.set("run", name);
      const isShown = name === Studio.selected;
      const link = h("a", { href: address, "data-run": name, "aria-current": isShown ? "true" : null, onclick: (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        Studio.chooseRun(name);
      } }, h("span", { class: "st-name" }, name), h("span", { class: "st-row" }, Studio.badge(word),
        h("span", { class: "st-small" }, of ? `${at} of ${of}` : ""), h("span", { class: "st-space" }),
        h("time", { class: "st-small", datetime: new Date(started * 1000).toISOString() }, Studio.day(started))));
      if (live[name] && of) link.append(h("span", { class: "st-thin", "aria-hidden": "true" }, h("i", { style: `width:${(100 * at) / of}%` })));
      return h("li", {}, link);
    }

    document.addEventListener("studio:run", () => rows && draw());
    document.addEventListener("studio:deleted", ({ detail: { run, undo } }) => {
      const back = h("button", { type: "button", class: "st-button st-quiet", onclick: async () => {
        try {
          const answer = await undo();
          said.textContent = "";
          document.dispatchEvent(new CustomEvent("studio:started", { detail: answer.run }));
        } catch (error) {
          said.textContent = error.message;
        }
      } }, "Undo");
      rows = rows.filter(([name]) => name !== run);
      tag = "";
      said.replaceChildren(`${run} is in the trash. `, back);
      Studio.chooseRun(rows[0]?.[0] ?? null);
      draw();
      back.focus();
      now();
    });
    document.addEventListener("studio:started", (event) => {
      expected = event.detail;
      Studio.chooseRun(event.detail);
      Studio.goTo("Train");
      now();
    });
  };

  /** What one sees before there is any run. */
  Studio.welcome = (hasDemo, startDemo) => {
    const error = h("p", { class: "st-warn", role: "alert" });
    const demo = h("button", { type: "button", class: "st-button st-primary st-large", onclick: async () => {
      demo.disabled = true;
      error.textContent = "";
      try {
        await startDemo();
      } catch (problem) {
        error.textContent = problem.message;
      }
      demo.disabled = false;
    } }, "Run the demo");
    const own = Studio.ownPictures();
    const points = ["A small real diffusion model learns a drawing style from 24 pictures.",
      "You see loss, effective rank and pictures as they come, and can pause or stop at any time.",
      "At the end there is a LoRA file to download, checked against the trained weights."];
    return h("section", { class: "st-welcome", hidden: true }, h("h2", {}, "Train your first LoRA"),
      h("p", { class: "st-lead" }, "The demo takes about two minutes and needs no graphics card. Your own pictures take a few presses more: ten of them are enough to begin."),
      h("ul", {}, points.map((point) => h("li", {}, point))),
      h("div", { class: "st-row" }, hasDemo ? demo : null, own), error,
      hasDemo ? null : h("p", { class: "st-small" }, "The demo preset is not in this copy of the program."));
  };
})();
