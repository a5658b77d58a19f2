// Takes files into a data set: dropped or chosen, folders and zips too, sent in small parcels with progress.
"use strict";
(() => {
  const Studio = globalThis.Studio;
  const { h } = Studio;
  const PARCEL = { files: 40, bytes: 64e6 }; // of one request

  /** Makes `element` take dropped files; `upload(files)` is called at once and gets the promise of [name with folders, File] pairs. */
  Studio.dropZone = (element, upload) => {
    const isOurs = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    let depth = 0;
    const show = () => element.classList.toggle("st-dropping", depth > 0);
    element.addEventListener("dragenter", (event) => { if (isOurs(event)) { depth += 1; show(); } });
    element.addEventListener("dragleave", (event) => { if (isOurs(event)) { depth -= 1; show(); } });
    element.addEventListener("dragover", (event) => { if (isOurs(event)) event.preventDefault(); });
    element.addEventListener("drop", (event) => {
      if (!isOurs(event)) return;
      event.preventDefault();
      depth = 0;
      show();
      const files = [...event.dataTransfer.files].map((file) => [file.name, file]);
      const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
      upload(entries.length ? Promise.all(entries.map((entry) => filesOf(entry))).then((found) => found.flat()) : files);
    });
  };

  /** The files of a dropped folder, with their paths from the folder on. */
  async function filesOf(entry, path = "") {
    if (entry.isFile) return [[`${path}${entry.name}`, await new Promise((done, failed) => { entry.file(done, failed); })]];
    const reader = entry.createReader();
    const found = [];
    for (;;) {
      const some = await new Promise((done, failed) => { reader.readEntries(done, failed); });
      if (!some.length) break;
      found.push(...some);
    }
    return (await Promise.all(found.map((inner) => filesOf(inner, `${path}${entry.name}/`)))).flat();
  }

  /** A button that opens the system's file dialog. */
  Studio.fileButton = (label, kind, isFolder, upload) => {
    const input = h("input", { type: "file", multiple: true, webkitdirectory: isFolder, hidden: true, tabindex: "-1", "aria-hidden": "true",
      accept: isFolder ? null : "image/*,.txt,.zip", onchange: () => {
        upload([...input.files].map((file) => [file.webkitRelativePath || file.name, file]));
        input.value = "";
      } });
    return h("span", {}, h("button", { type: "button", class: `st-button ${kind}`, onclick: () => input.click() }, label), input);
  };

  /** Send files to the server; returns [{name, path}] as `add_files` takes them. `progress(done, of)` is told. */
  Studio.send = async (files, progress) => {
    const sent = [];
    for (const parcel of parcels(files)) {
      progress(sent.length, files.length);
      const form = new FormData();
      parcel.forEach(([, file]) => form.append("files", file, file.name));
      const answer = await fetch(`${Studio.root()}gradio_api/upload`, { method: "POST", body: form });
      if (!answer.ok) throw new Error(answer.status === 401 ? "The app was restarted: reload the page and sign in again." : `The upload failed (${answer.status}); try again.`);
      const paths = await answer.json();
      parcel.forEach(([name], index) => sent.push({ name, path: paths[index] }));
    }
    progress(files.length, files.length);
    return sent;
  };

  function parcels(files) {
    const found = [[]];
    let bytes = 0;
    for (const pair of files) {
      if (found.at(-1).length >= PARCEL.files || (bytes + pair[1].size > PARCEL.bytes && found.at(-1).length)) { found.push([]); bytes = 0; }
      found.at(-1).push(pair);
      bytes += pair[1].size;
    }
    return found.filter((parcel) => parcel.length);
  }

  /** What came of an upload, in a sentence and a list. */
  Studio.added = ({ added, captions, refused }) => {
    const told = [added ? Studio.count(added, "image") : "", captions ? Studio.count(captions, "caption") : ""].filter(Boolean).join(" and ");
    const said = told ? `Added ${told}.` : "Nothing was added.";
    if (!refused.length) return [said];
    return [`${said} `, h("details", {}, h("summary", {}, `${Studio.count(refused.length, "file")} left out`),
      h("ul", { class: "st-trash" }, refused.slice(0, 500).map(([name, reason]) => h("li", {}, `${name}: ${reason}`))))];
  };
})();
