// What the pages do beyond links and forms: keys, copying, live updates. All
// of it is extra; without it every page still works.
"use strict";
(() => {
  const $ = (s, in_ = document) => in_.querySelector(s);
  const all = (s, in_ = document) => Array.from(in_.querySelectorAll(s));
  const typing = (e) => e.target.closest && e.target.closest("input:not([type=checkbox]), textarea, select, [contenteditable]");

  // The menu is open without scripts; with them it is closed on small screens.
  const menu = $("[data-menu]");
  if (menu) {
    const narrow = matchMedia("(max-width: 62rem)");
    const fit = () => { menu.open = !narrow.matches; };
    fit();
    narrow.addEventListener("change", fit);
  }

  // Lines of lists.
  let here = "";
  const rows = () => all("[data-row]").filter((r) => r.offsetParent !== null);
  const current = () => rows().find((r) => r.classList.contains("here"));
  const mark = (row, focus) => {
    all("[data-row].here").forEach((r) => r.classList.remove("here"));
    if (!row) return;
    row.classList.add("here");
    here = row.id;
    const link = $("[data-open]", row);
    if (focus && link) link.focus({ preventScroll: true });
    if (focus) row.scrollIntoView({ block: "nearest" });
  };
  const move = (by) => {
    const list = rows();
    if (!list.length) return;
    const at = list.indexOf(current());
    mark(list[at < 0 ? (by > 0 ? 0 : list.length - 1) : Math.min(Math.max(at + by, 0), list.length - 1)], true);
  };
  document.addEventListener("focusin", (e) => {
    const row = e.target.closest && e.target.closest("[data-row]");
    if (row) mark(row, false);
  });

  // Ticks.
  const ticks = () => {
    const bar = $("[data-bulkbar]");
    if (!bar) return;
    const n = all("[data-pick]:checked").length;
    $("[data-bulk-count]", bar).textContent = n === 1 ? "1 request ticked" : n + " requests ticked";
    bar.hidden = n === 0;
  };
  document.addEventListener("change", (e) => { if (e.target.matches("[data-pick]")) ticks(); });

  // Copying.
  const setUp = () => {
    ticks();
    if (navigator.clipboard) all("[data-copy]").forEach((b) => { b.hidden = false; });
  };
  document.addEventListener("click", async (e) => {
    const b = e.target.closest && e.target.closest("[data-copy]");
    if (!b) return;
    try {
      await navigator.clipboard.writeText(b.dataset.copy);
      say("Copied");
    } catch { say("The browser does not allow copying"); }
  });
  const say = (text) => { const s = $("[data-status]"); if (s) s.textContent = text; };

  // Keys.
  const focusOn = (key) => {
    const f = $(`[data-focus="${key}"]`);
    if (f) { f.focus(); f.scrollIntoView({ block: "center" }); }
    return !!f;
  };
  const open = (hash) => {
    const link = $("[data-open]", current() || rows()[0] || document.createElement("i"));
    if (!link) return;
    // A line without a page of its own opens its form.
    if (link.matches("summary")) { if (!hash) link.click(); return; }
    location.assign(link.getAttribute("href") + (hash || ""));
  };
  const places = { q: "/", n: "/nodes", s: "/sites", k: "/stacks", i: "/images", e: "/events", l: "/audit", a: "/access", t: "/tokens" };
  let going = 0;
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || e.isComposing) return;
    const dialog = $("#keys");
    if (typing(e)) {
      if (e.key === "Escape") e.target.blur();
      return;
    }
    if (dialog && dialog.open) return;
    if (going && Date.now() - going < 1500 && places[e.key]) {
      location.assign(places[e.key]);
      e.preventDefault();
      return;
    }
    going = 0;
    const keys = {
      j: () => move(1), k: () => move(-1), o: () => open(), u: () => { const up = $("[data-up]"); if (up) up.click(); },
      x: () => { const box = $("[data-pick]", current() || document.createElement("i")); if (box) box.click(); },
      a: () => focusOn("a") || open("#approve"), r: () => focusOn("r") || open("#reject"),
      "/": () => { const q = $("#q"); if (q) { q.focus(); q.select(); } },
      "?": () => { if (dialog) dialog.showModal(); }, g: () => { going = Date.now(); },
      Enter: () => { if (document.activeElement === document.body && current()) open(); else return false; },
    };
    if (!keys[e.key] || e.shiftKey && e.key !== "?") return;
    if (keys[e.key]() !== false) e.preventDefault();
  });
  const wish = { "#approve": "a", "#reject": "r" }[location.hash];
  if (wish) focusOn(wish) || focusOn("r");

  // Live updates: the server says that something changed, htmx asks for the
  // part of the page that shows it. What a person is doing is not disturbed.
  const wants = (document.body.dataset.live || "").split(" ").filter(Boolean);
  const dot = $("[data-live-dot]");
  const state = (on) => {
    if (!dot) return;
    dot.hidden = false;
    dot.classList.toggle("off", !on);
    $("[data-live-word]", dot).textContent = on ? "live" : "not live";
  };
  if (wants.length && window.EventSource) {
    const source = new EventSource("/live");
    source.addEventListener("hello", () => state(true));
    source.addEventListener("error", () => state(false));
    source.addEventListener("change", (e) => {
      const kinds = JSON.parse(e.data);
      if (!kinds.some((k) => wants.some((w) => w === "*" || k.startsWith(w)))) return;
      if ($("[data-live-region]") && !all("[data-pick]:checked").length) {
        document.body.dispatchEvent(new Event("muster:changed"));
        say("The list was updated");
      } else {
        say("Something changed; load the page again to see it");
      }
    });
    addEventListener("pagehide", () => source.close());
  }
  let opened = [];
  document.addEventListener("htmx:beforeSwap", () => { opened = all("#live details[open]").map((d, i) => i); });
  document.addEventListener("htmx:afterSwap", () => {
    all("#live details").forEach((d, i) => { if (opened.includes(i)) d.open = true; });
    const row = here && document.getElementById(here);
    if (row) mark(row, document.activeElement === document.body);
    setUp();
  });
  setUp();
})();
