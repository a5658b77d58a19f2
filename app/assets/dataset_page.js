// The tab "Data set": which one, what can be done with its images, the grid, and the panels beside it.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const TYPING = 40; // milliseconds without a key before a search begins
  const LAST = "studio.dataset";
  const PANELS = [["bulk", "Bulk edit", () => Studio.BulkPanel], ["overview", "Overview", () => Studio.OverviewPanel], ["health", "Health check", () => Studio.HealthPanel],
    ["captioning", "Automatic captions", () => Studio.CaptioningPanel], ["rehearsal", "As trained", () => Studio.RehearsalPanel]];
  const FILTERS = [["all", "All images"], ["no_caption", "Without a caption"], ["too_small", "Smaller than 512 × 512"], ["duplicate", "The same image twice"],
    ["excluded", "Excluded"], ["included", "Not excluded"], ["trouble", "Cannot be used or read"]];
  const SORTS = [["name", "By name"], ["newest", "Newest first"], ["caption", "By caption"], ["longest", "Longest caption"], ["shortest", "Shortest caption"],
    ["largest", "Largest image"], ["smallest", "Smallest image"]];
  const KEYS = "On a picture: arrows move, Space chooses, Shift and arrows choose a range, Ctrl-A all, Escape none, Enter opens it large, C goes to "
    + "its caption, X excludes, Delete puts into the trash.\nIn a caption: Ctrl-Enter saves and goes to the next one (with Shift to the one before), "
    + "Alt and arrow up or down do the same, Escape goes back to the picture.\nOutside of text: Ctrl-Z undoes, Ctrl-Y does it again.";

  Studio.dataSets = (element, server, offered) => {
    const page = new DataSetPage(server, offered);
    element.replaceChildren(page.element);
    page.begin(element);
  };

  /** What a new data set may be called: as the folder or zip that came, else "my pictures". */
  function nameFor(files) {
    const [[first]] = files;
    const isWhole = first.includes("/") || files.length === 1 && first.endsWith(".zip");
    return isWhole ? first.split("/")[0].replace(/\.zip$/, "") : "my pictures";
  }

  class DataSetPage {
    constructor(server, offered) {
      Object.assign(this, { server, offered, sets: [], roots: null, browses: 0, panel: null, panels: {} });
      this.store = new Studio.SetStore(server, {
        leave: () => this.viewer.close(),
        listed: (isOther, isNew) => { if (isOther) this.grid.listed(isNew); this.showFound(); },
        changed: (names) => { this.grid.update(names); this.viewer.update(names); }, isShown: (name) => this.grid.isShown(name) || this.viewer.isShown(name),
        state: (answer) => this.showState(answer), conflict: (name) => this.compare(name), failed: (text) => this.say(text, true) });
      this.grid = new Studio.CardGrid(this.store, { open: (name) => this.open(name), compare: (name) => this.compare(name), selected: () => this.showSelected(),
        point: (card) => this.panel?.point?.(card), remove: (names) => this.change("delete_images", { names }), exclude: (names) => this.exclude(names) });
      this.settings = new Studio.TrainingSettings(this.store);
      this.viewer = new Studio.ImageViewer(this.store, (text) => this.say(text, true), this.settings);
      this.element = h("div", { class: "st-data" }, this.head(), this.welcome(),
        this.work = h("div", { class: "st-work", hidden: true }, this.toolbar(),
          h("div", { class: "st-desk" }, h("section", { class: "st-images", "aria-label": "Images and captions" }, this.finder(), this.chosenBar(), this.grid.element), this.side())));
      Studio.dropZone(this.element, (files) => this.upload(files));
      document.addEventListener("keydown", (event) => this.onkey(event));
      document.addEventListener("studio:add-pictures", (event) => this.upload(event.detail));
      document.addEventListener("studio:show-image", () => this.showWanted());
      addEventListener("beforeunload", (event) => { if (this.store.drafts.size) event.preventDefault(); });
    }

    // Parts

    button(label, kind, work, attributes = {}) {
      return h("button", { type: "button", class: `st-button ${kind}`, onclick: work, ...attributes }, label);
    }

    head() {
      this.choice = h("select", { id: "studio-dataset", onchange: () => this.store.attempt(() => this.use(this.choice.value)) });
      this.facts = h("p", { class: "st-small st-set-facts" });
      this.status = h("div", { class: "st-asked", role: "status" });
      this.undo = this.button("Undo", "st-turn", () => this.turn("Undo"), { disabled: true });
      this.redo = this.button("Redo", "st-turn", () => this.turn("Redo"), { disabled: true });
      this.own = [Studio.fileButton("Add files…", "", false, (files) => this.upload(files)), Studio.fileButton("Add a folder…", "", true, (files) => this.upload(files)),
        this.button("Trash…", "", () => this.store.attempt(() => Studio.trash(this.store, (...asked) => this.change(...asked))))];
      this.train = this.button("Train with these pictures", "st-primary", () => document.dispatchEvent(new CustomEvent("studio:train-with", {
        detail: { id: this.store.id, failed: (text) => this.say(text, true) } })), { hidden: true });
      return h("section", { class: "st-card st-top", "aria-label": "Data set" },
        h("div", { class: "st-row st-bottom" }, h("div", { class: "st-field st-set" }, h("label", { for: "studio-dataset" }, "Data set"), this.choice),
          this.button("New…", "", () => this.create()), this.button("Open a folder…", "", () => this.browse()),
          h("span", { class: "st-space" }), this.own),
        h("div", { class: "st-row" }, this.facts, this.train), this.status);
    }

    welcome() {
      this.first = h("section", { class: "st-welcome", hidden: true }, h("h2", {}, "Your pictures and their captions"),
        h("p", { class: "st-lead" }, "Drop images, captions (.txt) or a zip of them anywhere here, or begin with an empty data set."),
        h("ul", {}, ["Captions are edited side by side, and saved as text files beside the images.", "Every change can be undone, also after a restart.",
          "Your images themselves are never changed."].map((text) => h("li", {}, text))),
        h("div", { class: "st-row" }, Studio.fileButton("Choose pictures…", "st-primary st-large", false, (files) => this.upload(files)),
          this.button("New data set", "st-large", () => this.create()),
          this.button("Open a folder…", "st-large", () => this.browse())));
      return this.first;
    }

    toolbar() {
      this.tabs = PANELS.map(([key, label]) => this.button(label, "", () => this.show(key), { "aria-expanded": "false", "aria-controls": "studio-panel", "data-panel": key }));
      return h("div", { class: "st-row st-tools" }, this.tabs, h("span", { class: "st-space" }), this.undo, this.redo);
    }

    finder() {
      const search = Studio.input("", { type: "search", placeholder: "Search in captions", "aria-label": "Search in captions", maxlength: "2000", oninput: () => {
        clearTimeout(this.typing);
        this.typing = setTimeout(() => this.find({ search: search.value }), TYPING);
      } });
      this.search = search;
      this.filter = Studio.select(FILTERS, "all", { "aria-label": "Show", onchange: () => this.find({ filter: this.filter.value }) });
      this.sort = Studio.select(SORTS, "name", { "aria-label": "Order", onchange: () => this.find({ sort: this.sort.value }) });
      const view = Studio.select([["text", "Captions as text"], ["tags", "Captions as tags"]], localStorage.getItem("studio.view") ?? "text", { "aria-label": "View", onchange: () => {
        localStorage.setItem("studio.view", view.value);
        this.grid.show({ view: view.value });
      } });
      const size = Studio.select([["small", "Small cards"], ["medium", "Medium cards"], ["large", "Large cards"]], localStorage.getItem("studio.cards") ?? "medium", { "aria-label": "Size", onchange: () => {
        localStorage.setItem("studio.cards", size.value);
        this.grid.show({ size: size.value });
      } });
      Object.assign(this.grid, { view: view.value, size: size.value });
      this.active = h("div", { class: "st-row st-active" });
      return h("div", { class: "st-finder" }, h("div", { class: "st-row" }, search, this.filter, this.sort, view, size, Studio.help("the keyboard", KEYS)), this.active);
    }

    chosenBar() {
      this.found = h("span", { class: "st-small", role: "status" });
      const names = () => [...this.store.selected];
      this.chosen = h("span", { class: "st-row", hidden: true }, this.button("Exclude", "st-quiet", () => this.change("exclude_images", { names: names(), excluded: true })),
        this.button("Include", "st-quiet", () => this.change("exclude_images", { names: names(), excluded: false })),
        this.button("Move or copy…", "st-quiet", () => Studio.moveTo(names(), this.store.info, this.sets, (...asked) => this.change(...asked))),
        this.button("Delete", "st-quiet", () => this.change("delete_images", { names: names() })), this.button("Choose none", "st-quiet", () => this.grid.select([])));
      return h("div", { class: "st-row st-chosen" }, this.found, this.button("Choose all", "st-quiet", () => this.grid.select(this.store.names)), this.chosen);
    }

    side() {
      this.panelTitle = h("h3", {});
      this.panelBody = h("div", { class: "st-panel-body" });
      this.aside = h("aside", { class: "st-card st-panel", id: "studio-panel", hidden: true, "aria-label": "Tools" },
        h("header", {}, this.panelTitle, h("span", { class: "st-space" }), this.button("Close", "st-quiet", () => this.show(null))), this.panelBody);
      return this.aside;
    }

    // Opening

    async begin(element) {
      this.showWanted(); // this tab is made when it is first looked at
      this.again = Studio.poll(element, () => this.poll());
    }

    async poll() {
      if (!this.isListed) {
        await this.list();
        const last = [sessionStorage.getItem(LAST), localStorage.getItem(LAST), this.sets[0]?.id].find((id) => id && (this.sets.some((set) => set.id === id) || !id.endsWith(":")));
        if (last) await this.use(last).catch(() => this.sets[0] && this.use(this.sets[0].id));
        this.isListed = true;
      }
      if (!this.store.id) return 2;
      const wait = await this.store.look();
      this.panel?.poll?.();
      return wait;
    }

    async list() {
      const { sets, roots } = await Studio.ask(this.server, "list_sets");
      Object.assign(this, { sets, roots });
      this.first.hidden = sets.length > 0 || Boolean(this.store.id);
      const group = (label, own) => {
        const members = sets.filter((set) => set.own === own);
        return members.length ? h("optgroup", { label }, members.map((set) => h("option", { value: set.id, title: set.folder }, set.name))) : null;
      };
      this.choice.replaceChildren(...[group("In the workspace", true), group("Elsewhere", false)].filter(Boolean));
      if (!sets.length) this.choice.append(h("option", { value: "" }, "None yet"));
      if (this.store.id) this.choice.value = this.store.id;
    }

    async use(id) {
      if (!id) return;
      try {
        await this.store.open(id);
      } catch (error) {
        this.choice.value = this.store.id;
        this.say(error.message, true);
        throw error;
      }
      sessionStorage.setItem(LAST, id);
      localStorage.setItem(LAST, id);
      await this.list();
      Object.assign(this.search, { value: "" });
      this.filter.value = "all";
      this.work.hidden = false;
      this.showActive();
      this.grid.layout();
      this.say(this.store.info.note);
      this.panel?.opened?.();
    }

    create() {
      Studio.askName("New data set", "Name", "", "Create", async (name) => {
        const { id } = await Studio.ask(this.server, "create_set", { name });
        await this.use(id);
      });
    }

    /** Open a folder below the roots, which come with the list of data sets. */
    browse() {
      const turn = (this.browses += 1); // of several presses while the list is on its way, the last one counts
      return this.store.attempt(async () => {
        if (!this.roots) await this.list();
        if (turn === this.browses) Studio.browse(this.server, this.roots, (id) => this.use(id));
      });
    }

    /** Add files, which may still be `coming`, to the data set that they were given to: another one may be open when they are sent. */
    async upload(coming, id = this.store.id) {
      await this.store.attempt(async () => {
        const files = await coming;
        if (!files.length) return;
        if (!id) { this.createFor(files); return; }
        const sent = await Studio.send(files, (done, of) => this.say(`Sending ${done} of ${of} files…`));
        this.say("Looking at the files…");
        const answer = await this.change("add_files", { files: sent }, id);
        const where = id === this.store.id ? "" : `${this.sets.find((set) => set.id === id)?.name ?? "The other data set"}: `;
        if (answer) this.status.replaceChildren(where, ...Studio.added(answer));
        document.dispatchEvent(new Event("studio:pictures"));
      });
    }

    createFor(files) {
      Studio.askName("New data set", "Name", nameFor(files), "Create and add", async (name) => {
        const { id } = await Studio.ask(this.server, "create_set", { name });
        await this.use(id);
        this.upload(files, id);
      });
    }

    // Changes

    async change(name, request, id = this.store.id) {
      const answer = await this.store.change(name, request, id);
      if (!answer) return null;
      const { skipped = [], refused = [], sent } = answer;
      const left = [...skipped, ...refused];
      this.say(sent === undefined ? "" : `${Studio.count(sent, "image")} sent.`);
      if (left.length && name !== "add_files") this.say(`Left as they are: ${left.slice(0, 5).map(([file, reason]) => `${file} (${reason})`).join("; ")}${left.length > 5 ? ` and ${left.length - 5} more` : ""}.`, true);
      if (name === "send_images") await this.list();
      this.panel?.changed?.();
      return answer;
    }

    exclude(names) {
      const areAllOut = names.every((name) => this.store.cards.get(name)?.excluded);
      return this.change("exclude_images", { names, excluded: !areAllOut });
    }

    /** Undo or redo what the button says, or what this page has done by the time that it can; never what another window did. */
    turn(verb) {
      const { info, last } = this.store;
      const key = `${verb.toLowerCase()}_id`;
      const shown = info?.[key];
      return this.turnEntry(verb, () => (this.store.last === last ? shown : this.store.last[key]));
    }

    async turnEntry(verb, find, skip = false, id = this.store.id) {
      const [word, done] = verb === "Undo" ? ["undo", "undone"] : ["redo", "done again"];
      const request = () => { const entry = find(); return entry ? { entry, skip_changed: skip } : null; };
      const answer = await this.store.change(`${word}_change`, request, id);
      if (!answer) return;
      if (answer.conflict) Studio.against(verb, answer.conflict, () => { this.turnEntry(verb, () => answer[`${word}_id`], true, id); });
      else if (answer.done) this.say(`${done[0].toUpperCase()}${done.slice(1)}: ${answer.done}.`);
      else this.say(`Nothing was ${done}: another window has changed this data set since. The button says what it would ${word} now.`, true);
      this.panel?.changed?.();
    }

    compare(name) {
      const draft = this.store.drafts.get(name);
      const { id } = this.store;
      if (draft?.theirs) Studio.conflict(name, draft.text, draft.theirs.text, (text) => {
        if (id !== this.store.id) throw new Error("Another data set was opened. Yours is kept: open the former one again, and decide there.");
        return this.store.settle(name, text);
      });
    }

    open(name) { this.viewer.open(name); }

    /** Show the image that another tab has asked for, with its caption. */
    async showWanted() {
      if (!Studio.wantedImage) return;
      const { set, name } = Studio.wantedImage;
      delete Studio.wantedImage;
      sessionStorage.setItem(LAST, set); // the first look at the tab opens this one, too
      await this.store.attempt(async () => {
        if (!this.isListed) await this.list();
        this.isListed = true;
        if (this.store.id !== set) await this.use(set);
        await this.find({ names: [name] }, name);
        if (!this.store.names.includes(name)) throw new Error(`${name} is not in this data set any more.`);
        this.open(name);
      });
    }

    onkey(event) {
      const isShown = this.element.offsetParent !== null && !this.work.hidden;
      const isText = event.target.closest?.("input:not([type=checkbox], [type=radio], [type=range]), textarea, select, dialog");
      if (!isShown || isText || !(event.ctrlKey || event.metaKey) || event.altKey) return;
      const key = event.key.toLowerCase();
      if (key === "z" && !event.shiftKey) this.turn("Undo");
      else if (key === "y" || (key === "z" && event.shiftKey)) this.turn("Redo");
      else return;
      event.preventDefault();
    }

    // Finding

    /** Show other images; the search goes on from what is set already. */
    async find(query, label = "") {
      if (query.names) this.label = label;
      Object.assign(this.store.query, query);
      if ((query.names || query.tag) && this.aside.offsetParent && matchMedia("(max-width: 900px)").matches) this.show(null);
      this.showActive();
      await this.store.attempt(() => this.store.list());
      this.panel?.found?.();
    }

    showActive() {
      const { tag, names } = this.store.query;
      const off = (text, query) => this.button(`${text} ×`, "st-pill", () => this.find(query), { "aria-label": `Show no longer only: ${text}` });
      this.active.replaceChildren(...[tag ? off(`Tag: ${tag}`, { tag: "" }) : null, names ? off(this.label, { names: null }) : null].filter(Boolean));
    }

    // Showing

    show(key) {
      const isOff = !key || this.panelKey === key;
      this.panelKey = isOff ? null : key;
      this.panel?.closed?.();
      this.panel = null;
      const entry = PANELS.find(([name]) => name === this.panelKey);
      if (entry) {
        this.panel = this.panels[key] ??= new (entry[2]())(this);
        this.panelTitle.textContent = entry[1];
        this.panelBody.replaceChildren(this.panel.element);
        this.panel.opened();
      }
      this.aside.hidden = !entry;
      this.element.classList.toggle("st-open", Boolean(entry));
      this.tabs.forEach((tab) => tab.setAttribute("aria-expanded", String(tab.dataset.panel === this.panelKey)));
    }

    showState(answer) {
      if (this.store.info && "undo" in answer) Object.assign(this.store.info, { undo: answer.undo, undo_id: answer.undo_id, redo: answer.redo, redo_id: answer.redo_id });
      for (const [button, verb, what] of [[this.undo, "Undo", answer.undo], [this.redo, "Redo", answer.redo]]) {
        const text = what ? `${verb}: ${what}` : verb;
        if (button.textContent !== text) button.textContent = button.title = text;
        button.disabled = !what;
      }
      const { info } = this.store;
      this.train.hidden = !info?.images;
      if (!info) return;
      const parts = [Studio.count(info.images, "image"), `${info.captioned} with a caption`, info.excluded ? `${info.excluded} excluded` : "",
        info.looked_at < info.images ? `looked at ${info.looked_at} so far` : "", info.folder].filter(Boolean).join(" · ");
      if (this.facts.textContent !== parts) this.facts.textContent = parts;
    }

    showFound() {
      const { names, info } = this.store;
      const isAll = names.length === info?.images;
      this.grid.empty.hidden = names.length > 0;
      this.grid.empty.textContent = names.length ? "" : info?.images ? "No image matches." : "No images yet: drop some here, or press “Add files…”.";
      this.total = isAll ? Studio.count(names.length, "image") : `${names.length} of ${Studio.count(info?.images ?? 0, "image")}`;
      this.showSelected();
    }

    showSelected() {
      const { size } = this.store.selected;
      this.chosen.hidden = size === 0;
      const text = `${this.total ?? ""}${size ? `, ${size} chosen` : ""}`;
      if (this.found.textContent !== text) this.found.textContent = text;
      this.panel?.chosen?.();
    }

    say(text, isBad = false) {
      this.status.textContent = text ?? "";
      this.status.classList.toggle("st-warn", isBad);
    }

    /** The images that a bulk change is for: the chosen ones, those that are shown, or null for all. */
    scope() {
      if (this.store.selected.size) return [...this.store.selected];
      return this.store.isFiltered() ? this.store.names : null;
    }

    scopeText() {
      const { selected, names, info } = this.store;
      if (selected.size) return `the ${Studio.count(selected.size, "chosen image")}`;
      return this.store.isFiltered() ? `the ${Studio.count(names.length, "image")} shown` : `all ${Studio.count(info?.images ?? 0, "image")}`;
    }
  }
})();
