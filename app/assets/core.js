// What all of the app's scripts share: elements, words for numbers, talking to the server, the page's header.
"use strict";
(() => {
  const Studio = (globalThis.Studio ??= {});

  /** An element. Attributes that begin with "on" are listeners; text is always set as text, never as markup. */
  Studio.h = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.flat(9).filter((child) => child !== null && child !== undefined));
    return element;
  };
  const { h } = Studio;

  // Words for numbers

  Studio.number = (value, digits = 4) => {
    if (value === null || value === undefined || !Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) {
      return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    }
    return String(Number(value.toPrecision(digits)));
  };

  Studio.duration = (seconds) => {
    if (!Number.isFinite(seconds) || seconds < 0) return "–";
    const s = Math.round(seconds);
    if (s < 60) return `${s} s`;
    if (s < 600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
    if (s < 3600) return `${Math.round(s / 60)} min`;
    if (s < 172800) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
    return `${Math.round(s / 86400)} days`;
  };

  Studio.bytes = (count) => {
    if (!Number.isFinite(count)) return "–";
    let amount = count;
    for (const unit of ["B", "kB", "MB"]) {
      if (amount < 1000) return `${Number(amount.toPrecision(3))} ${unit}`;
      amount /= 1000;
    }
    return `${Number(amount.toPrecision(3))} GB`;
  };

  Studio.speed = (seconds) => {
    if (!Number.isFinite(seconds) || seconds <= 0) return "–";
    return seconds >= 1 ? `${Number(seconds.toPrecision(3))} s/step` : `${Number((1 / seconds).toPrecision(3))} steps/s`;
  };

  Studio.clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });
  Studio.day = (seconds) => {
    const then = new Date(seconds * 1000);
    const isToday = then.toDateString() === new Date().toDateString();
    return isToday ? Studio.clock(seconds) : then.toLocaleDateString([], { day: "numeric", month: "short" });
  };

  // The server

  Studio.root = () => {
    const root = new URL(globalThis.gradio_config?.root || "/", location.href).pathname;
    return root.endsWith("/") ? root : `${root}/`;
  };

  Studio.fileUrl = (path) => `${Studio.root()}gradio_api/file=${path.split("/").map(encodeURIComponent).join("/")}`;

  const LOOK_AGAIN = 1000; // milliseconds until a lost server is asked again
  const LOST = {
    offline: "No answer from the server. Training goes on; trying again.",
    changed: "The app runs, but it is not the one that this page came from: reload the page. Training was not touched.",
    signedOut: "The app was restarted: sign in again to go on. Training was not touched.",
  };

  function showConnection(state) {
    if (Studio.connection === state) return;
    Studio.connection = state;
    const banner = document.getElementById("studio-connection");
    if (!banner) return;
    const signIn = h("button", { class: "st-button", type: "button", onclick: () => location.reload() }, "Sign in");
    banner.replaceChildren(...(state === "ok" ? [] : [LOST[state], state === "signedOut" ? signIn : ""]));
  }

  let suspected = null; // since when the app seems another one; one that came back between question and look does, too

  async function whyNoAnswer() {
    try {
      const asked = await fetch(`${Studio.root()}config`, { cache: "no-store" });
      if (asked.status === 401) return "signedOut";
      if (!asked.ok) return "offline";
      suspected ??= Date.now();
      return Date.now() - suspected > LOOK_AGAIN / 2 ? "changed" : "offline";
    } catch {
      return "offline";
    }
  }

  function reloadOnce() {
    const last = Number(sessionStorage.getItem("studio.reloaded") || 0);
    if (Date.now() - last < 60000) return;
    sessionStorage.setItem("studio.reloaded", String(Date.now()));
    location.reload();
  }

  // A press becomes a click only if what was pressed is still there when it ends. News redraw lists, so they wait for that.
  const LONGEST_PRESS = 1000; // ms: who holds on, such as to drag something, sees news too
  let pressed = null;
  let lift = () => {};

  function endPress() {
    setTimeout(lift); // the click itself comes first
    pressed = null;
  }

  document.addEventListener?.("pointerdown", () => { pressed ??= new Promise((done) => { lift = done; }); }, true);
  for (const end of ["pointerup", "pointercancel"]) document.addEventListener?.(end, endPress, true);
  document.addEventListener?.("pointermove", (event) => pressed && !event.buttons && endPress(), true); // it ended outside

  /** Call a function of the server. Its `error` (a sentence) is thrown as `Error`; a lost server as `Studio.Lost`. */
  Studio.ask = async (server, name, request = {}) => {
    let answer;
    try {
      answer = await server[name](request);
    } catch {
      answer = undefined;
    }
    if (pressed) await Promise.race([pressed, new Promise((go) => { setTimeout(go, LONGEST_PRESS); })]);
    if (answer === undefined || answer === null) { // Gradio's client keeps its failures to itself
      const reason = await whyNoAnswer();
      if (reason === "changed") reloadOnce(); // another version of the app runs there now
      showConnection(reason);
      throw new Studio.Lost(LOST[Studio.connection]);
    }
    suspected = null;
    showConnection("ok");
    if (answer && answer.error) throw new Error(answer.error);
    return answer;
  };

  Studio.Lost = class extends Error {};

  /** Look every `pause` milliseconds until `see` makes something of the answer; a server that is lost is waited for. */
  Studio.watch = async (look, see, pause) => {
    for (;;) {
      let wait = pause;
      try {
        const seen = see(await look());
        if (seen !== undefined) return seen;
      } catch (error) {
        if (!(error instanceof Studio.Lost)) throw error;
        wait = LOOK_AGAIN;
      }
      await new Promise((wake) => { setTimeout(wake, wait); });
    }
  };

  /** Call `work` again and again while `element` can be seen; it returns the seconds to wait. Returns "do it now". */
  Studio.poll = (element, work) => {
    let timer = 0;
    let isBusy = false;
    let again = false;
    let patience = 1;
    const tick = async () => {
      clearTimeout(timer);
      if (isBusy) { again = true; return; }
      let wait = 1;
      if (!document.hidden && element.offsetParent !== null) {
        isBusy = true;
        try {
          wait = await work();
          patience = 1;
        } catch (error) {
          if (!(error instanceof Studio.Lost)) console.error(error);
          patience = Math.min(patience * 1.5, 5);
          wait = patience;
        }
        isBusy = false;
      }
      if (again) { again = false; wait = 0; }
      timer = setTimeout(tick, wait * 1000);
    };
    document.addEventListener("visibilitychange", () => document.hidden || tick());
    new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && tick()).observe(element);
    tick();
    return tick;
  };

  // The page

  /** Bring a tab to the front by its label. */
  Studio.goTo = (label) => {
    const tabs = [...document.querySelectorAll("button[role=tab]")];
    tabs.find((tab) => tab.textContent.trim() === label)?.click();
  };

  Studio.selected = typeof location === "undefined" ? null : new URLSearchParams(location.search).get("run");

  /** Look at another run; the address says which, so that it can be kept and sent. */
  Studio.chooseRun = (name) => {
    if (Studio.selected === name) return;
    Studio.selected = name;
    const address = new URL(location.href);
    if (name) address.searchParams.set("run", name);
    else address.searchParams.delete("run");
    history.replaceState(null, "", address);
    document.dispatchEvent(new CustomEvent("studio:run", { detail: name }));
  };

  /** A short explanation that opens at a question mark, moved to where the window has room for it. */
  Studio.help = (what, text) => {
    const box = h("div", { class: "st-help-text" }, text.split("\n").map((line) => h("p", {}, line)));
    return h("details", { class: "st-help", ontoggle: () => {
      box.style.left = "0";
      const { left, right } = box.getBoundingClientRect();
      box.style.left = `${-Math.max(0, Math.min(right + 8 - document.documentElement.clientWidth, left - 8))}px`;
    } }, h("summary", { "aria-label": `What is ${what}?`, title: `What is ${what}?` }, "?"), box);
  };

  document.addEventListener?.("click", (event) => closeHelp(event.target));
  document.addEventListener?.("keydown", (event) => event.key === "Escape" && closeHelp(null));
  function closeHelp(except) {
    for (const open of document.querySelectorAll(".st-help[open]")) if (!open.contains(except)) open.open = false;
  }

  const THEMES = { light: "Light", dark: "Dark" };
  const isDark = () => document.body.classList.contains("dark");

  function applyTheme(theme) {
    document.body.classList.toggle("dark", theme === "dark");
    document.documentElement.style.colorScheme = theme;
    document.dispatchEvent(new Event("studio:theme"));
  }

  /** The page's head: name, connection, light or dark. */
  Studio.header = (element) => {
    const other = () => (isDark() ? "light" : "dark");
    const label = () => `${THEMES[other()]} theme`;
    const button = h("button", { type: "button", class: "st-button st-quiet", onclick: () => {
      const theme = other();
      localStorage.setItem("studio.theme", theme);
      applyTheme(theme);
      button.textContent = label();
    } }, "");
    const kept = localStorage.getItem("studio.theme");
    if (kept in THEMES) applyTheme(kept);
    button.textContent = label();
    element.replaceChildren(h("header", { class: "st-head" },
      h("h1", {}, h("span", { class: "st-mark", "aria-hidden": "true" }), "Stiefel Studio"), button),
    h("output", { id: "studio-connection", role: "status", class: "st-connection" }));
  };
})();
