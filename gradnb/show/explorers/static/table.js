// Runs to choose from: a table that is sorted by a click on a column, searched, and whose rows are shown or not.

const make = (name, props = {}, ...children) => {
  const node = Object.assign(document.createElement(name), props);
  for (const [k, v] of Object.entries(props.attrs ?? {})) node.setAttribute(k, v);
  node.append(...children);
  return node;
};

const cell = (v) => (v === null || v === undefined ? "" : typeof v === "number" ? String(+v.toPrecision(4)) : String(v));

export default {
  render({ model, el }) {
    let by = null, down = false;
    const search = make("input", { type: "search", placeholder: "search", attrs: { "aria-label": "search runs" }, oninput: () => draw() });
    const count = make("span", { className: "gradnb-count", attrs: { role: "status" } });
    const button = (text, title, choose) => make("button", { type: "button", textContent: text, title, attrs: { "aria-label": title }, onclick: () => choose(found()) });
    const table = make("table"), box = make("div", { className: "gradnb-scroll", tabIndex: 0, attrs: { role: "region", "aria-label": "runs" } }, table);
    const root = make("div", { className: "gradnb-table" }, make("div", { className: "gradnb-tools" }, search,
      button("all", "show all that are found", (rows) => choose(rows.map((r) => r[0]))), button("none", "show no run", () => choose([])), count), box);
    el.append(root);

    const choose = (hashes) => { model.set("value", hashes); model.save_changes(); };
    const toggle = (hash, alone) => {
      const chosen = model.get("value");
      choose(alone ? [hash] : chosen.includes(hash) ? chosen.filter((h) => h !== hash) : [...chosen, hash]);
    };

    function found() {
      const words = search.value.toLowerCase().split(/\s+/), rows = model.get("rows").filter((r) => words.every((w) => r.some((v) => cell(v).toLowerCase().includes(w))));
      if (by === null) return rows;
      const rank = (v) => (v === null || v === undefined ? 2 : typeof v === "number" ? 0 : 1), order = (a, b) => rank(a) - rank(b) || (a < b ? -1 : a > b ? 1 : 0);
      return rows.sort((a, b) => (rank(a[by]) === 2 || rank(b[by]) === 2 ? order(a[by], b[by]) : order(a[by], b[by]) * (down ? -1 : 1)));      // what has none comes last
    }

    const written = (hash, column, v, row) => {                                // a cell that is an input; Enter or leaving it sends it
      const line = make("input", { type: "text", defaultValue: cell(v), title: cell(v), attrs: { "data-key": `${column} ${hash}`, "aria-label": `${column} of ${row}`, placeholder: column },
        onchange: () => model.send({ run: hash, column, text: line.value }), onclick: (e) => e.stopPropagation(), ondblclick: (e) => e.stopPropagation() });
      return make("td", {}, line);
    };

    function draw() {
      const columns = model.get("columns"), rows = found(), chosen = new Set(model.get("value")), open = new Set(model.get("editable"));
      const active = root.contains(document.activeElement) && document.activeElement, focus = active && active.dataset.key, top = box.scrollTop, left = box.scrollLeft;
      const typed = focus && active.type === "text" && active.value !== active.defaultValue && active.value;
      const head = columns.map((name, i) => make("th", { attrs: { "aria-sort": by === i + 1 ? (down ? "descending" : "ascending") : "none" } },
        make("button", { type: "button", textContent: `${name}${by === i + 1 ? (down ? " ↓" : " ↑") : ""}`, attrs: { "data-key": `by ${name}`, "aria-label": `sort by ${name}` },
          onclick: () => { down = by === i + 1 && !down; by = i + 1; draw(); } })));
      const body = rows.map(([hash, ...cells]) => {
        const box = make("input", { type: "checkbox", checked: chosen.has(hash), onchange: () => toggle(hash), attrs: { "data-key": hash, "aria-label": `show ${cells.map(cell).join(" ")}` } });
        const row = make("tr", { title: `${hash}; a double click shows it alone`, ondblclick: () => toggle(hash, true), attrs: { "data-run": hash } }, make("td", {}, box),
          ...cells.map((v, i) => (open.has(columns[i]) ? written(hash, columns[i], v, cells.slice(0, 3).map(cell).join(" ")) : make("td", { textContent: cell(v) }))));
        row.onclick = (e) => { if (e.target !== box) box.click(); };
        return row;
      });
      table.replaceChildren(make("thead", {}, make("tr", {}, make("th"), ...head)), make("tbody", {}, ...body));
      count.textContent = `${rows.length} of ${model.get("rows").length} runs, ${chosen.size} shown`;
      Object.assign(box, { scrollTop: top, scrollLeft: left });
      const again = focus && root.querySelector(`[data-key="${CSS.escape(focus)}"]`);
      if (again && typed !== false) again.value = typed;                       // what is being written stays
      if (again) again.focus({ preventScroll: true });
    }

    for (const name of ["rows", "columns", "value"]) model.on(`change:${name}`, draw);
    draw();
    return () => { for (const name of ["rows", "columns", "value"]) model.off(`change:${name}`, draw); };
  },
};
