// One open data set as the page knows it: which images are listed, their cards, and captions that are typed but not yet saved.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const PAGE = 200; // cards asked for at once
  const GATHER = 20; // milliseconds in which wanted cards are gathered into one request
  const THUMBS = 400; // milliseconds between two looks for thumbnails that are being made
  const RETRY = 3000; // milliseconds until a caption that could not be sent is sent again
  const IN_TURN = 5000; // milliseconds that a change waits for the one before it, which may be of thousands of files
  const KEPT_COUNTS = 3000;

  /**
   * `hooks`: leave() before another data set opens, false to stay; listed() when the list is another, changed(names) when cards are, state(answer) for what can be undone,
   * conflict(name) when a caption was changed by somebody else, failed(sentence).
   */
  Studio.SetStore = class {
    constructor(server, hooks) {
      Object.assign(this, { server, hooks, id: "", tag: "", info: null, turn: 0, toldAt: 0, changedAt: 0 });
      this.query = { search: "", filter: "all", sort: "name", tag: "", names: null };
      this.counts = new Map(); // text -> [tokens, where the limit falls]
      this.clear();
    }

    clear() {
      clearTimeout(this.gathering);
      clearTimeout(this.retrying);
      Object.assign(this, { names: [], at: new Map(), cards: new Map(), wanted: new Set(), pending: new Set(), kept: new Set(),
        drafts: new Map(), saving: new Map(), line: Promise.resolve(), changing: Promise.resolve(), asOf: new Map(), selected: new Set(), turn: this.turn + 1, isNew: false, gathering: 0, retrying: 0, tag: "", info: null });
    }

    /** Call a function for this data set; who asks after a wait gives the `id` of the one that was open before it. */
    ask(name, request = {}) { return Studio.ask(this.server, name, { id: this.id, ...request }); }

    /** Open another data set; what was typed in it and never saved comes back. */
    async open(id) {
      const info = await Studio.ask(this.server, "read_info", { id });
      if (this.id && !await this.hooks.leave()) throw new Error("A mask is not saved yet: look at the image that is open large.");
      if (this.id) await this.flush(); // what was typed meanwhile
      this.clear();
      Object.assign(this, { id, info, tag: info.tag });
      this.hooks.listed(true, true); // nobody shall type into cards of the other one
      this.query = { search: "", filter: "all", sort: this.query.sort, tag: "", names: null };
      this.drafts = new Map(JSON.parse(sessionStorage.getItem(this.shelf) ?? "[]"));
      this.hooks.state(info);
      await this.list();
      this.flush();
      return info;
    }

    get shelf() { return `studio.captions.${this.id}`; }

    isFiltered() {
      const { search, filter, tag, names } = this.query;
      return Boolean(search.trim() || filter !== "all" || tag || names);
    }

    // The list

    /** Ask for the list as the query says, and be done when the newest list is there; `isNew` when the query is another one. */
    list(isNew = true) {
      this.turn += 1;
      this.isNew ||= isNew; // also for the list that takes its place
      if (isNew) this.kept.clear();
      this.listing = this.read(this.turn);
      return this.listing;
    }

    async read(turn) {
      const begun = performance.now();
      const answer = await this.ask("list_images", this.query);
      if (turn !== this.turn) { await this.listing; return; }
      this.want(this.take(answer.cards, begun), true);
      const there = new Set(answer.names);
      const kept = [...this.kept].filter((name) => !there.has(name));
      const still = kept.length ? new Set((await this.ask("read_cards", { names: kept.slice(0, PAGE) })).names) : new Set();
      if (turn !== this.turn) { await this.listing; return; }
      const { isNew } = this;
      this.isNew = false;
      this.setNames(Studio.mergeNames(this.names, answer.names, still), isNew);
    }

    setNames(names, isNew) {
      const isSame = names.length === this.names.length && names.every((name, index) => name === this.names[index]);
      if (!isSame) {
        this.names = names;
        this.at = new Map(names.map((name, index) => [name, index]));
        for (const name of [...this.selected]) if (!this.at.has(name)) this.selected.delete(name);
      }
      this.hooks.listed(isNew || !isSame, isNew);
    }

    /** Look whether anything is another than the page shows; returns the seconds to wait. */
    async look() {
      const { id } = this;
      const begun = performance.now();
      const info = await this.ask("read_info");
      if (id !== this.id) return 0;
      if (begun < this.toldAt) return this.look(); // it is from before a change that is shown already
      const isOther = info.tag !== this.tag;
      Object.assign(this, { info, tag: info.tag });
      this.hooks.state(info);
      if (isOther) {
        this.want([...this.cards.keys()].filter((name) => this.hooks.isShown(name)), true);
        for (const name of [...this.cards.keys()]) if (!this.hooks.isShown(name)) this.cards.delete(name);
        await this.list(false);
      }
      return info.looked_at < info.images ? 1.5 : 2;
    }

    // Cards

    /** The card of an image, if it is known; else it is asked for. */
    card(name) {
      const card = this.cards.get(name);
      if (!card) this.want([name]);
      return card;
    }

    want(names, isAgain = false) {
      for (const name of names) if (isAgain || !this.cards.has(name)) this.wanted.add(name);
      if (!this.wanted.size || this.gathering) return;
      this.gathering = setTimeout(() => { this.gathering = 0; this.fetch(); }, GATHER);
    }

    async fetch() {
      const names = [...this.wanted].slice(-PAGE);
      names.forEach((name) => this.wanted.delete(name));
      if (this.wanted.size) this.want([]);
      await this.attempt(() => this.bring(names));
    }

    /** Cards are there as they are now; those that a change overtakes on their way are asked for again. */
    async bring(names) {
      const { id } = this;
      const begun = performance.now();
      const { cards } = await this.ask("read_cards", { names });
      const old = id === this.id ? this.take(cards, begun) : [];
      if (old.length) await this.bring(old);
    }

    /** Take cards as they were at `begun`, when they were asked for; returns the names of those that are older than what is known. */
    take(cards, begun) {
      const old = [];
      for (const card of cards) {
        const { name } = card;
        if (this.saving.has(name) || Math.max(this.changedAt, this.asOf.get(name) ?? 0) > begun) { old.push(name); continue; }
        this.cards.set(name, card);
        this.asOf.set(name, begun);
        if (!card.thumb && !card.trouble) this.pending.add(name);
      }
      if (this.pending.size) this.thumbs();
      if (cards.length) this.hooks.changed(cards.map((card) => card.name));
      return old;
    }

    /** Ask for thumbnails that are not made yet, as long as their cards are shown. */
    thumbs() {
      if (this.watching) return;
      this.watching = setTimeout(() => this.attempt(async () => {
        this.watching = 0;
        for (const name of [...this.pending]) if (!this.hooks.isShown(name)) this.pending.delete(name);
        const names = [...this.pending].slice(0, PAGE);
        if (!names.length) return;
        const { id } = this;
        const { thumbs } = await this.ask("read_thumbs", { names });
        if (id !== this.id) return; // another data set is open now, with images of the same name perhaps
        const made = names.filter((name) => thumbs[name] && this.cards.has(name));
        made.forEach((name) => { this.cards.get(name).thumb = thumbs[name]; this.pending.delete(name); });
        if (made.length) this.hooks.changed(made);
        if (this.pending.size) this.thumbs();
      }), THUMBS);
    }

    /** Tokens of texts, for those that are not counted yet. */
    async count(texts) {
      const fresh = [...new Set(texts)].filter((text) => !this.counts.has(text)).slice(0, PAGE);
      if (!fresh.length) return false;
      const { counts } = await Studio.ask(this.server, "count_tokens", { texts: fresh });
      if (this.counts.size > KEPT_COUNTS) this.counts.clear();
      fresh.forEach((text, index) => this.counts.set(text, counts[index]));
      return true;
    }

    // Captions that are typed

    /** What is in the caption field of an image: what was typed, else what is saved. */
    textOf(name) { return this.drafts.get(name)?.text ?? this.cards.get(name)?.caption ?? ""; }

    /** Something was typed over `before`, a caption and its version. */
    edit(name, text, before = this.cards.get(name)) {
      const draft = this.drafts.get(name);
      if (!before && !draft) return;
      if (!draft && text === before.caption) return;
      this.kept.add(name);
      if (draft) Object.assign(draft, { text });
      else this.drafts.set(name, { text, version: before.version });
      this.remember();
    }

    remember() {
      const kept = [...this.drafts].map(([name, { text, version, unheard }]) => [name, { text, version, unheard }]);
      if (kept.length) sessionStorage.setItem(this.shelf, JSON.stringify(kept));
      else sessionStorage.removeItem(this.shelf);
    }

    /** Save what was typed; one request after the other, so that undo goes back in the order in which one typed. */
    save(name) {
      const running = this.saving.get(name);
      if (running) return running.then(() => (this.drafts.get(name)?.theirs ? undefined : this.save(name)));
      const draft = this.drafts.get(name);
      if (!draft || draft.theirs) return Promise.resolve();
      const work = this.line.then(() => this.send(name)).finally(() => this.saving.delete(name));
      this.line = work;
      this.saving.set(name, work);
      return work;
    }

    async send(name) {
      const draft = this.drafts.get(name);
      if (!draft || draft.theirs) return;
      const { text, version } = draft;
      const { id } = this;
      delete draft.fault;
      try {
        const answer = await this.ask("save_caption", { name, text, version });
        if (id !== this.id) return; // another data set is open now
        this.told(answer, name);
        if (!answer.saved && draft.unheard?.includes(answer.conflict.text)) { // no one else's: it arrived, only its answer did not
          Object.assign(draft, { version: answer.conflict.version, unheard: [] });
          await this.send(name);
          return;
        }
        if (!answer.saved) {
          draft.theirs = answer.conflict;
          this.hooks.conflict(name);
        } else {
          Object.assign(draft, { version: answer.version, unheard: [] });
          const card = this.cards.get(name);
          if (card) Object.assign(card, { caption: text, version: answer.version });
          if (draft.text === text) this.drafts.delete(name);
        }
      } catch (error) {
        if (id !== this.id) return;
        draft.fault = error instanceof Studio.Lost ? "not saved yet: trying again" : error.message;
        if (error instanceof Studio.Lost) {
          draft.unheard = [...new Set([...(draft.unheard ?? []), text])]; // the same text goes out every few seconds
          this.retry();
        } else this.hooks.failed(`${name}: ${error.message}`);
      }
      this.remember();
      this.hooks.changed([name]);
    }

    retry() {
      clearTimeout(this.retrying);
      this.retrying = setTimeout(() => this.flush(), RETRY);
    }

    /** Save everything that was typed; true when nothing is left unsaved. */
    async flush() {
      await Promise.all([...this.drafts.keys()].map((name) => this.save(name)));
      return this.drafts.size === 0;
    }

    /** End a conflict: keep `text`, over what the other one wrote, or drop what was typed here. */
    async settle(name, text) {
      const { theirs } = this.drafts.get(name);
      const card = this.cards.get(name);
      if (card) Object.assign(card, { caption: theirs.text, version: theirs.version });
      this.drafts.delete(name);
      if (text !== theirs.text) {
        this.drafts.set(name, { text, version: theirs.version });
        await this.save(name);
      }
      this.remember();
      this.hooks.changed([name]);
    }

    // Changes of images

    /** A change was answered, of one image or of any: what was asked before and comes after may know nothing of it. */
    told(answer, name = "") {
      this.toldAt = performance.now();
      this.last = answer;
      if (name) this.asOf.set(name, this.toldAt);
      else this.changedAt = this.toldAt;
      this.hooks.state(answer);
    }

    /**
     * Make a change and show what came of it; returns the answer, or null when it was refused. It is made to the data set
     * `id`, though another one may be open when it goes out. It waits for the answer to the change before it, which says
     * what undo would take back: a `request` that hangs on that is a function.
     */
    change(name, request, id = this.id) {
      const asked = this.changing.then(() => this.put(name, request, id));
      this.changing = Promise.race([asked.catch(() => {}), new Promise((go) => { setTimeout(go, IN_TURN); })]);
      return this.attempt(async () => {
        const answer = await asked;
        if (answer && id === this.id) {
          this.tag = "";
          await this.look();
        }
        return answer;
      });
    }

    async put(name, request, id) {
      if (id === this.id && !await this.flush()) throw new Error("A caption is not saved yet: look at the marked card first.");
      const wanted = typeof request === "function" ? request() : request;
      if (!wanted) return null;
      const answer = await this.ask(name, { id, ...wanted });
      if (id === this.id) this.told(answer);
      return answer;
    }

    async attempt(work) {
      try {
        return await work();
      } catch (error) {
        if (!(error instanceof Studio.Lost)) this.hooks.failed(error.message);
        return null;
      }
    }
  };

  /** The fresh list, with those that were edited under this filter still at their place, so that nothing jumps away while one works. */
  Studio.mergeNames = (old, fresh, still) => {
    if (!still.size) return fresh;
    const merged = [...fresh];
    let before = null;
    for (const name of old) {
      if (still.has(name)) merged.splice(before === null ? 0 : merged.indexOf(before) + 1, 0, name);
      if (still.has(name) || merged.includes(name)) before = name;
    }
    return merged;
  };
})();
