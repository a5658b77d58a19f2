// Questions that the data set tab asks: folders, names, two versions of a caption, the trash, what stands against an undo.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  let count = 0;

  /**
   * A dialog that goes away when it is closed. `actions`: [label, kind, work]; work may throw a sentence, and the dialog
   * stays open when it returns false. The first one is what Enter does.
   */
  Studio.dialog = (title, body, actions = [], wide = false) => {
    const said = h("p", { class: "st-warn", role: "alert" });
    const buttons = actions.map(([label, kind, work], index) => h("button", { type: index ? "button" : "submit", class: `st-button ${kind}`,
      onclick: index ? () => run(work) : null }, label));
    const run = async (work) => {
      said.textContent = "";
      try {
        if (await work() !== false) element.close();
      } catch (error) {
        said.textContent = error.message;
      }
    };
    const element = h("dialog", { class: wide ? "st-ask st-wide-ask" : "st-ask", "aria-label": title, onclose: () => element.remove() },
      h("form", { onsubmit: (event) => { event.preventDefault(); if (actions.length) run(actions[0][2]); } }, h("h3", {}, title), body, said,
        h("div", { class: "st-row" }, buttons, h("button", { type: "button", class: "st-button", onclick: () => element.close() }, actions.length ? "Cancel" : "Close"))));
    document.querySelector(".st-data").append(element);
    element.showModal();
    return element;
  };

  /** A field with its label above. */
  Studio.field = (label, input, help = "") => {
    count += 1;
    input.id ||= `studio-field-${count}`;
    const about = help ? h("p", { class: "st-small", id: `${input.id}-about` }, help) : null;
    if (about) input.setAttribute("aria-describedby", about.id);
    return h("div", { class: "st-field" }, h("label", { for: input.id }, label), input, about);
  };

  Studio.input = (value = "", attributes = {}) => {
    const input = h("input", { autocomplete: "off", spellcheck: "false", ...attributes });
    input.value = value;
    return input;
  };

  Studio.select = (options, value, attributes = {}) => {
    const select = h("select", attributes, options.map(([key, label]) => h("option", { value: key }, label)));
    if (value !== undefined) select.value = value;
    return select;
  };

  /** Ask for a name; `work(name)` may refuse it. */
  Studio.askName = (title, label, value, button, work) => {
    const input = Studio.input(value, { maxlength: "200" });
    Studio.dialog(title, Studio.field(label, input), [[button, "st-primary", () => work(input.value.trim())]]);
    input.select();
  };

  /** Walk the folders that the app may read, to use one in place or to copy it in. */
  Studio.browse = (server, roots, opened) => {
    const where = h("p", { class: "st-where" });
    const list = h("ul", { class: "st-folders", "aria-label": "Folders" });
    const name = Studio.input("", { maxlength: "200" });
    let at = roots[0]?.id;
    let turn = 0;
    let coming; // the folder that was chosen last, which the buttons mean though it may still be on its way
    const open = async (id) => {
      const asked = (turn += 1);
      const answer = await Studio.ask(server, "browse_folder", { id });
      if (asked !== turn) return;
      at = id;
      where.textContent = `${answer.folder}: ${Studio.count(answer.images, "image")}`;
      name.value = answer.folder.split("/").at(-1);
      const go = (to, text) => h("li", {}, h("button", { type: "button", class: "st-folder", onclick: () => show(to) }, text));
      list.replaceChildren(...[answer.up ? go(answer.up, "↑ One folder up") : null,
        ...answer.folders.map((folder) => go(folder.id, `${folder.name}${folder.images ? ` (${Studio.count(folder.images, "image")})` : ""}`))].filter(Boolean));
    };
    const show = (id) => {
      coming = open(id);
      coming.catch((error) => { where.textContent = error.message; });
    };
    const choice = Studio.select(roots.map(({ id, folder }) => [id, folder]), at, { onchange: () => show(choice.value) });
    const none = h("p", {}, "The app may read only its own workspace so far. Start it with --root FOLDER to open data sets below that folder: ",
      h("code", {}, "python launch.py --root ~/images"));
    if (!roots.length) { Studio.dialog("Open a folder", none); return; }
    Studio.dialog("Open a folder", [Studio.field("Below", choice), where, list, Studio.field("Name of the copy", name, "A copy in the workspace leaves the originals alone.")],
      [["Use it in place", "st-primary", async () => { await coming; await opened(at); }],
        ["Copy it into the workspace", "", async () => { await coming; await opened((await Studio.ask(server, "copy_set", { id: at, name: name.value.trim() })).id); }]]);
    show(at);
  };

  /** Somebody else has changed a caption: both texts, and what shall stand. */
  Studio.conflict = (name, mine, theirs, settle) => {
    const text = h("textarea", { rows: "8" });
    text.value = mine;
    const other = h("textarea", { rows: "8", readonly: true });
    other.value = theirs;
    const dialog = Studio.dialog(`${name} was changed elsewhere`, [
      h("p", {}, "Another tab or program saved this caption after you began to edit it. Nothing was overwritten. Choose, or edit yours first."),
      h("div", { class: "st-both" }, Studio.field("Yours", text), Studio.field("As it is saved now", other))],
    [["Save yours", "st-primary", () => settle(text.value)], ["Take the saved one", "", () => settle(theirs)]], true);
    dialog.lastElementChild.querySelector("button:last-child").textContent = "Decide later";
  };

  /** What was deleted, to be brought back or removed for good. */
  Studio.trash = async (store, changed) => {
    const { id } = store;
    const { files, bytes } = await store.ask("read_trash");
    const boxes = files.map((file) => h("input", { type: "checkbox", value: file.key }));
    const all = h("input", { type: "checkbox", onchange: () => boxes.forEach((box) => { box.checked = all.checked; }) });
    const rows = files.map((file, index) => h("li", {}, h("label", {}, boxes[index], h("span", {}, file.name), h("span", { class: "st-small" }, `${Studio.day(file.at)} · ${Studio.bytes(file.bytes)}`))));
    const body = files.length ? [h("p", { class: "st-small" }, `${Studio.count(files.length, "file")}, ${Studio.bytes(bytes)}, in the hidden folder .studio of the data set.`),
      h("label", { class: "st-check" }, all, "All"), h("ul", { class: "st-trash" }, rows)] : h("p", {}, "The trash is empty.");
    const restore = async () => {
      const keys = boxes.filter((box) => box.checked).map((box) => box.value);
      if (!keys.length) throw new Error("Choose the files that shall come back.");
      return Boolean(await changed("restore_files", { keys }, id));
    };
    let isSure = false;
    const empty = async () => {
      if (isSure) return Boolean(await changed("empty_trash", {}, id));
      isSure = true;
      throw new Error("These files will be gone for good, and their deletion can no longer be undone. Press again to empty the trash.");
    };
    Studio.dialog("Trash", body, files.length ? [["Restore", "st-primary", restore], ["Empty the trash", "st-danger", empty]] : [], true);
  };

  /** Files were changed outside since: undo the rest, or nothing. */
  Studio.against = (verb, { what, files }, work) => Studio.dialog(`Not everything can be ${verb === "Undo" ? "undone" : "redone"}`, [
    h("p", {}, `${verb} “${what}” would overwrite what was changed since by another program:`),
    h("ul", { class: "st-trash" }, files.slice(0, 200).map(([file, reason]) => h("li", {}, `${file}: ${reason}`)))],
  [[`${verb} the rest`, "st-primary", work]]);

  /** Where to put images: a folder of this data set, or another data set. */
  Studio.moveTo = (names, info, sets, work) => {
    const others = sets.filter((set) => set.id !== info.id);
    const folders = info.folders.map(({ name }) => name);
    const where = Studio.select([["folder", "A folder of this data set"], ...others.map((set) => [`set:${set.id}`, `Data set ${set.name}`])], others.length ? `set:${others[0].id}` : "folder",
      { onchange: () => show() });
    const folder = Studio.input("", { list: "studio-folders", maxlength: "500" });
    const keep = h("input", { type: "checkbox", checked: true });
    const folderField = Studio.field("Folder", folder, "Empty is the top. A folder called 5_name counts each image five times in training.");
    const keepField = h("label", { class: "st-check" }, keep, "Keep them here, too (a copy)");
    const show = () => { folderField.hidden = where.value !== "folder"; keepField.hidden = where.value === "folder"; };
    show();
    Studio.dialog(`Move or copy ${Studio.count(names.length, "image")}`, [Studio.field("Where to", where), folderField, keepField,
      h("datalist", { id: "studio-folders" }, folders.filter(Boolean).map((name) => h("option", { value: name })))],
    [["Go", "st-primary", async () => (where.value === "folder" ? work("move_images", { names, folder: folder.value.trim() }, info.id)
      : work("send_images", { names, to: where.value.slice(4), keep: keep.checked }, info.id))]]);
  };

  Studio.count = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
})();
