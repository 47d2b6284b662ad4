"use strict";
// The page reads without this: it sorts and searches the table, links marks with rows, and switches the theme.
(() => {
  const root = document.documentElement;
  const table = document.querySelector(".nodes table");
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // theme: what the system says, until somebody chooses
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // paper shows what is folded, and folds it again afterwards
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details:not([open])");
    opened.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((part) => { part.open = false; }));

  // what is folded opens where a link leads
  const unfold = () => {
    const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    if (!target) return;
    if (target.hidden) clear();
    const folded = target.closest("details:not([open])");
    if (folded) folded.open = true;
    const show = () => target.scrollIntoView({ block: target.tagName === "TR" ? "center" : "start" });
    show();
    requestAnimationFrame(() => requestAnimationFrame(show)); // parts in between have their sizes only now
  };

  // a mark and the row of the same node light up together
  let lit = [];
  document.addEventListener("mouseover", (event) => {
    const node = event.target.closest("[data-node]")?.dataset.node;
    lit.forEach((mark) => mark.classList.remove("lit"));
    lit = node === undefined ? [] : all(`[data-node="${node}"]`);
    lit.forEach((mark) => mark.classList.add("lit"));
  });

  let clear = () => {};
  if (table) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const words = rows.map(() => "");
    const tally = document.getElementById("tally");
    const search = document.getElementById("search");
    const chips = all(".chip");
    const many = (count) => `${count} node${count === 1 ? "" : "s"}`;
    document.querySelector(".tools").hidden = false;

    const filter = () => {
      const asked = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const states = new Set(chips.filter((chip) => chip.getAttribute("aria-pressed") === "true").map((chip) => chip.value));
      let count = 0;
      rows.forEach((row, i) => {
        if (asked.length && !words[i]) words[i] = row.textContent.toLowerCase();
        const found = (!states.size || states.has(row.dataset.state)) && asked.every((word) => words[i].includes(word));
        row.hidden = !found;
        count += found;
      });
      tally.textContent = count === rows.length ? many(rows.length) : `${count} of ${many(rows.length)}`;
    };
    clear = () => {
      search.value = "";
      chips.forEach((chip) => chip.setAttribute("aria-pressed", "false"));
      filter();
    };
    search.addEventListener("input", filter);
    search.addEventListener("keydown", (event) => { if (event.key === "Escape") clear(); });
    chips.forEach((chip) => chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
      filter();
    }));

    // numbers by their value, words by the alphabet, blanks last whichever way
    const key = (row, column, numeric) => {
      const cell = row.cells[column];
      if (!numeric) return cell.textContent.trim().toLowerCase();
      return cell.dataset.v === "" ? NaN : Number(cell.dataset.v);
    };
    const order = (a, b, way) => {
      const blank = (value) => value === "" || value !== value;
      if (blank(a) || blank(b)) return blank(a) - blank(b);
      return way * (a < b ? -1 : a > b ? 1 : 0);
    };
    all("thead th", table).forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const numeric = head.classList.contains("n");
      const first = numeric && column > 0 ? "descending" : "ascending";
      const next = now === null ? first : now === "ascending" ? "descending" : "ascending";
      all("th[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      const keyed = [...body.rows].map((row) => [key(row, column, numeric), row]);
      keyed.sort((a, b) => order(a[0], b[0], next === "ascending" ? 1 : -1));
      body.append(...keyed.map((pair) => pair[1]));
    }));
    filter();
  }

  addEventListener("hashchange", unfold);
  document.addEventListener("click", (event) => { // the same link once more changes no hash
    if (event.target.closest('a[href^="#"]')?.getAttribute("href") === location.hash) unfold();
  });
  unfold();
})();
