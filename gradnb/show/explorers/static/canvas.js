// Linked panels on canvases. uPlot draws axes and keeps scales; lines, bands, pictures and words are drawn here.
// A scene is a block of bytes: length of a JSON head, the head, then float32 numbers and pixels (gradnb.show.explorers.series.pack).

const LIGHT = { text: "#222", grid: "#e3e3e3", grey: "#737373", back: "#fff" }, DARK = { text: "#e0e0e0", grid: "#3a3a3a", grey: "#a0a0a0", back: "#111" };
const ON_LIGHT = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B3A000"];
const ON_DARK = ["#4BA3DD", "#F08A3C", "#2DC79A", "#E39BC6", "#F0B93A", "#8CCBF0", "#FFFFFF", "#D6C62E"];
const DASH = [[], [6, 3], [2, 2], [8, 3, 2, 3]];                 // after eight keys colours come again, dashed

function unpack(view) {
  const bytes = view.byteLength ?? 0;
  if (!bytes) return { head: { panels: [], keys: [], stops: null }, floats: () => null, pixels: () => null };
  const size = view.getUint32(0, true), start = 4 + size + ((4 - (size % 4)) % 4);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(view.buffer, view.byteOffset + 4, size)));
  const copy = view.buffer.slice(view.byteOffset + start, view.byteOffset + bytes);          // aligned
  return {
    head,
    floats: (at) => at && new Float32Array(copy, at[0], at[1]),
    pixels: (at) => new Uint8Array(copy, at[0], at[1]),
  };
}

function readItem(entry, scene) {
  if (entry.is === "picture") {
    const [h, w] = entry.size, rgb = scene.pixels(entry.pixels), image = new ImageData(w, h);
    for (let i = 0, j = 0; i < rgb.length; i += 3, j += 4) {
      image.data[j] = rgb[i]; image.data[j + 1] = rgb[i + 1]; image.data[j + 2] = rgb[i + 2]; image.data[j + 3] = 255;
    }
    const canvas = Object.assign(document.createElement("canvas"), { width: w, height: h });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return { ...entry, canvas };
  }
  if (entry.is === "words") return entry;
  const shift = scene.floats(entry.x), x = new Float64Array(shift.length);
  for (let i = 0; i < x.length; i++) x[i] = shift[i] + entry.x0;
  return { ...entry, x, y: scene.floats(entry.y), low: scene.floats(entry.low), high: scene.floats(entry.high) };
}

function readScene(view) {
  const scene = unpack(view), items = (list) => list.map((e) => readItem(e, scene));
  for (const p of scene.head.panels) {
    p.items = items(p.items);
    if (p.steps) {
      const [first, at, count] = p.steps;
      p.steps = Float64Array.from(scene.floats([at, count]), (v) => v + first);
      p.frames = new Map(Object.entries(p.frames).map(([k, list]) => [+k, items(list)]));
    }
  }
  return scene.head;
}

const TICKS = [[[1, 2, 5], 1], [[1, 3], 1], ...[1, 2, 3, 5, 10, 20, 30, 50, 100, 200].map((every) => [[1], every])];

function logTicks(low, high, most) {                               // the rule of gradnb.show.plots.ticks
  if (!(low > 0 && low < high && high < Infinity)) return [];
  let found = [];
  for (const [mantissas, every] of TICKS) {
    found = [];
    for (let e = Math.floor(Math.log10(low)) - 1; e <= Math.ceil(Math.log10(high)); e++) {
      if (e % every === 0) for (const m of mantissas) { const v = +`${m}e${e}`; if (low <= v && v <= high) found.push(v); }
    }
    if (found.length <= most) break;
  }
  return found.length > 2 || high >= 10 * low ? found : evenTicks(low, high, most);
}

function evenTicks(low, high, most) {
  if (high - low < 1e-12 * high) return [low];
  const least = Math.floor(Math.log10((high - low) / most));
  for (const e of [least, least + 1, least + 2]) for (const m of [1, 2, 5]) {
    const step = +`${m}e${e}`, from = Math.floor(low / step), to = Math.ceil(high / step), found = [];
    if (to - from > most + 2) continue;
    for (let k = from; k <= to; k++) { const v = +`${k * m}e${e}`; if (low <= v && v <= high) found.push(v); }
    if (found.length <= most) return found;
  }
}

const WHOLE = Array.from({ length: 36 }, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3));       // distances of ticks between steps

const tickLabel = (v) => (v >= 1e-3 && v < 1e5 ? String(v) : v.toExponential().replace("e+", "e"));

const upTo = (x, value) => {                                       // index of the last entry ≤ value, -1 where there is none
  let low = 0, high = x.length;
  while (low < high) { const mid = (low + high) >> 1; if (x[mid] <= value) low = mid + 1; else high = mid; }
  return low - 1;
};

const brief = (v) => {
  if (!Number.isFinite(v)) return String(v);
  const a = Math.abs(v);
  return a !== 0 && (a < 1e-3 || a >= 1e5) ? v.toExponential(2).replace(/\.?0*e\+?/, "e") : String(+v.toPrecision(4));
};

function between(x, y, at, style) {                                // a line's y between its points
  const k = upTo(x, at);
  if (k < 0 || k + 1 >= x.length || x[k] === at || style === "points" || style === "bars") return NaN;
  return style === "steps" || style === "edge" ? y[k] : y[k] + ((at - x[k]) / (x[k + 1] - x[k])) * (y[k + 1] - y[k]);
}

function yLimits(lines, window, xlog, ylog) {                      // the rule of gradnb.show.explorers.drawing
  const positive = (v) => (v > 0 ? Math.log10(v) : NaN), t = ylog ? positive : (v) => v, s = xlog ? positive : (v) => v;
  let values = [], others = [], widths = [];
  for (const { x, y, low, high, style } of lines) {
    const edge = style === "edge", room = low && !y.some(Number.isFinite), inside = (k) => !window || (x[k] >= window[0] && x[k] <= window[1]);
    const at = window && Float64Array.from(x, s);
    for (const v of [y, low, high]) {
      if (!v) continue;
      const into = room || (v === y && !edge) ? values : others;
      for (let k = 0; k < x.length; k++) if (inside(k)) into.push(t(v[k]));
      if (window) { const drawn = Float64Array.from(v, t); for (const w of window) into.push(between(at, drawn, s(w), style)); }
    }
    if (style === "bars" && !ylog) values.push(0);
    if (!edge && !room) for (let k = 0; k < x.length; k++) if (inside(k)) {
      const l = low ? t(low[k]) : 0, h = low ? t(high[k]) : 0;
      widths.push(low ? (Number.isFinite(l) ? (h - l) / 2 : h - t(y[k])) : Number.isFinite(t(y[k])) ? 0 : NaN);
    }
  }
  [values, others, widths] = [values, others, widths].map((v) => Float64Array.from(v.filter(Number.isFinite)));
  if (!values.length) values = others.length ? others : ylog ? [-1, 0] : [0, 1];
  const ends = (v) => v.reduce(([a, b], c) => [Math.min(a, c), Math.max(b, c)], [Infinity, -Infinity]);
  let [low, high] = ends(values);
  const usual = widths.length ? widths.sort()[(widths.length - 1) >> 1] : 0;
  const reach = Math.max(high - low, 3 * usual) || (ylog ? 1 : Math.max(Math.abs(low), Math.abs(high)) || 1), least = low - reach, most = high + reach;
  [low, high] = ends([low, high, ...others.filter((v) => v >= least && v <= most)]);
  const pad = ylog ? Math.max((high - low) * 0.06, Math.log10(1.02)) : (high - low) * 0.06 || Math.abs(low) * 0.06 || 0.06;
  return [low - pad, high + pad].map((v) => (ylog ? 10 ** Math.min(Math.max(v, -300), 300) : v));
}

const tag = (name, props = {}, ...children) => {
  const node = Object.assign(document.createElement(name), props);
  for (const [k, v] of Object.entries(props.attrs ?? {})) node.setAttribute(k, v);
  node.append(...children);
  return node;
};

class Plot {                                                       // one panel
  constructor(board, panel) {
    this.board = board;
    this.title = tag("span", { className: "gradnb-title", textContent: panel.name.replaceAll("_", " "), draggable: true, title: "to be dragged onto another panel; Shift and an arrow key move it too",
      ondragstart: () => { board.dragged = this.panel.name; }, ondragend: () => { board.dragged = null; } });
    this.reading = tag("span", { className: "gradnb-reading" });
    this.logs = tag("button", { className: "gradnb-small", textContent: "log", title: "logarithmic axis", type: "button",
      onclick: () => board.toggleLog(this.panel.name), attrs: { "aria-label": `${panel.name}: logarithmic axis` } });
    this.alone = tag("button", { className: "gradnb-small", textContent: "large", title: "this panel alone, and again all (m)", type: "button",
      onclick: () => board.enlarge(this.panel.name), attrs: { "aria-label": `${panel.name}: large` } });
    this.note = tag("div", { className: "gradnb-note" });
    this.host = tag("div", { className: "gradnb-host", tabIndex: 0, attrs: { role: "img" } });
    this.host.addEventListener("keydown", (e) => board.key(e, this));
    this.el = tag("div", { className: "gradnb-panel", attrs: { "data-panel": panel.name },
      ondragover: (e) => board.dragged && e.preventDefault(), ondrop: (e) => { e.preventDefault(); board.put(board.dragged, board.arranged().indexOf(this.panel.name)); } },
      tag("div", { className: "gradnb-head" }, this.title, this.reading, this.logs, this.alone), this.host, this.note);
    this.marker = tag("div", { className: "gradnb-marker" });
    this.readout = tag("div", { className: "gradnb-readout" });
    this.zoomed = null;                                            // x range of a panel that is not linked
    this.set(panel);
  }

  set(panel) {                                                     // new content
    this.panel = panel;
    this.note.textContent = panel.note;
    this.host.style.display = panel.note ? "none" : "";
    this.alone.style.display = panel.note ? "none" : "";
    this.logs.style.display = panel.note || !panel.axes || !panel.yaxis ? "none" : "";
    this.logs.setAttribute("aria-pressed", panel.ylog);
    if (this.plot && this.made !== this.kind()) { this.plot.destroy(); this.plot = null; }
    this.frameStep = this.late = undefined;
    this.moveTo(this.board.step);
    this.draw();
  }

  kind() { const { xlog, ylog, axes, yaxis, xlabel, ylabel } = this.panel; return JSON.stringify([xlog, ylog, axes, yaxis, xlabel, ylabel]); }

  content() {                                                      // what is drawn: a refined window before the whole
    const { panel, board } = this, fine = board.detail && panel.linked && board.detail.panels.find((p) => p.name === panel.name);
    return fine ? fine.items : panel.items;
  }

  shown() { return [...this.content(), ...(this.frame ?? [])].filter((i) => !this.board.hidden.has(i.key)); }

  ranges() {
    const { panel, board } = this, x = [Infinity, -Infinity];
    const grow = (r, v, log) => { if (Number.isFinite(v) && !(log && v <= 0)) { if (v < r[0]) r[0] = v; if (v > r[1]) r[1] = v; } };
    const all = [...panel.items, ...(panel.frames ? [...panel.frames.values()].flat() : [])];
    for (const i of all) {
      if (i.is === "picture") { grow(x, i.extent[0]); grow(x, i.extent[1]); } else for (const v of i.x) grow(x, v, panel.xlog);
    }
    const range = panel.linked ? board.range(panel.xlog) : this.zoomed ?? (x[0] <= x[1] ? x : [0, 1]);
    const inside = this.zoomed || panel.linked ? this.shown() : all.filter((i) => !board.hidden.has(i.key)), pictures = inside.filter((i) => i.is === "picture");
    const near = panel.linked || this.zoomed ? range : null, y = pictures.length ? [Infinity, -Infinity] : yLimits(inside.filter((i) => i.is === "line"), near, panel.xlog, panel.ylog);
    for (const i of pictures.length ? inside : []) for (const v of i.extent?.slice(2) ?? [...(i.low ?? []), ...(i.high ?? [])]) grow(y, v);
    if ((this.square = pictures.some((i) => i.square))) {                              // room goes to the right and below
      const { width, height } = this.plot?.bbox ?? { width: this.host.clientWidth, height: board.height }, unit = Math.max((range[1] - range[0]) / width, (y[1] - y[0]) / height);
      return { x: [range[0], range[0] + unit * width], y: [y[1] - unit * height, y[1]] };
    }
    if (panel.linked || this.zoomed || pictures.length) return { x: range, y };
    if (panel.xlog) { const f = Math.max((range[1] / range[0]) ** 0.02, 1.02); return { x: [range[0] / f, range[1] * f], y }; }
    const d = (range[1] - range[0]) * 0.02 || Math.abs(range[0]) * 0.02 || 0.02;
    return { x: [range[0] - d, range[1] + d], y };
  }

  draw() {                                                         // everything anew
    if (this.panel.note) return;
    const { panel, board, host } = this, { x, y } = this.ranges();
    this.limits = { x, y };
    this.el.dataset.limits = JSON.stringify([x, y]);
    const data = [[x[0], x[1]], [y[0], y[1]]];
    if (!this.plot) {
      this.made = this.kind();
      const theme = () => board.theme, font = "11px system-ui, sans-serif";
      const within = (u, ticks, i) => { const at = this.shown().find((e) => e.is === "picture")?.extent.slice(2 * i); return at ? ticks.map((v) => (at[0] <= v && v <= at[1] ? v : null)) : ticks; };      // not beside a picture, where its colour bar is
      const bare = (u, ticks, i) => (this.shown().some((e) => e.is === "picture") ? ticks.map(() => null) : ticks);            // a grid would show beside a picture only
      const axis = (label, log, room, more) => ({
        show: panel.axes, label, labelSize: label ? 16 : 0, labelFont: font, labelGap: 0, font, stroke: () => theme().text, gap: 3,
        grid: { stroke: () => theme().grid, width: 1, filter: bare }, ticks: { stroke: () => theme().grid, width: 1, size: 4, filter: within },
        values: (u, ticks) => ticks.map((v) => (v === null ? null : log ? tickLabel(v) : brief(v))), filter: within,
        ...(log && { incrs: (u, i, low, high) => [Math.max(high - low, 5)], splits: (u, i, low, high) => logTicks(low, high, Math.max(3, Math.floor(room(u) / devicePixelRatio))) }), ...more });
      const scale = (name, log) => ({ time: false, distr: log ? 3 : 1, range: () => this.limits[name] });
      this.plot = new uPlot({
        width: Math.max(host.clientWidth, 120), height: board.height, legend: { show: false }, pxAlign: 1,
        cursor: { points: { show: false }, y: panel.axes, drag: { x: panel.axes, y: false, setScale: false } },
        scales: { x: scale("x", panel.xlog), y: scale("y", panel.ylog) },
        axes: [axis(panel.xlabel, panel.xlog, (u) => u.bbox.width / 55, { size: 24, ...(panel.linked && !panel.xlog && { incrs: WHOLE }) }), axis(panel.ylabel, panel.ylog, (u) => u.bbox.height / 24, { size: 52, show: panel.axes && panel.yaxis })],
        series: [{}, { paths: () => null, points: { show: false } }],
        hooks: { draw: [(u) => this.paint(u)], setSelect: [(u) => this.select(u)], setCursor: [(u) => this.hover(u)] },
      }, data, host);
      this.plot.over.append(this.marker, this.readout);
      this.plot.over.addEventListener("mouseleave", () => board.readOut(null));
      this.plot.over.addEventListener("mousedown", () => { this.dragged = false; });
      this.plot.over.addEventListener("click", (e) => { if (!this.dragged) this.pick(e.offsetX); });
      this.plot.over.addEventListener("dblclick", () => (panel.linked ? board.setWindow(null) : this.zoom(null)));
    } else this.plot.setData(data);
  }

  resize() {
    if (this.plot && this.host.clientWidth) { this.plot.setSize({ width: this.host.clientWidth, height: this.board.height }); if (this.square) this.draw(); }
  }

  zoom(range) { this.zoomed = range; this.draw(); }

  select(u) {
    const { left, width } = u.select;
    if (width < 4) return;
    this.dragged = true;
    const range = [u.posToVal(left, "x"), u.posToVal(left + width, "x")];
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    if (this.panel.linked) this.board.setWindow(range); else this.zoom(range);
  }

  pick(left) { if (this.panel.linked && this.panel.axes) this.board.setStep(this.plot.posToVal(left, "x")); }

  hover(u) {
    const { left, top } = u.cursor;
    if (this.board.hovering && left >= 0) this.pick(left);
    if (this.panel.linked && this.panel.axes) this.board.readOut(left >= 0 ? u.posToVal(left, "x") : null);
    this.host.title = left >= 0 && !this.panel.linked && this.panel.axes ? `${brief(u.posToVal(left, "x"))}, ${brief(u.posToVal(top, "y"))}` : "";
  }

  paint(u) {
    this.el.dataset.beyond = "";
    const { ctx } = u, { left, top, width, height } = u.bbox, ratio = devicePixelRatio, { theme } = this.board, { xlog, ylog } = this.panel;
    const px = (v) => u.valToPos(v, "x", true), py = (v) => u.valToPos(v, "y", true);
    const ok = (v) => Number.isFinite(v) && !(ylog && v <= 0), [bottom, ceiling] = this.limits.y, clipped = (v) => py(Math.min(Math.max(v, bottom), ceiling));
    const marked = [0, 0], beyond = [];                              // what is said of the edge stands above all lines
    ctx.save();
    ctx.beginPath(); ctx.rect(left, top, width, height); ctx.clip();
    ctx.lineJoin = "round";
    const pictured = this.shown().some((i) => i.is === "picture");
    const border = () => { ctx.save(); ctx.strokeStyle = theme.back; ctx.lineWidth = 5 * ratio; ctx.setLineDash([]); ctx.stroke(); ctx.restore(); };      // seen on any colour
    for (const i of this.shown()) {
      if (i.is === "picture") {
        const [l, r, b, t] = i.extent;
        ctx.imageSmoothingEnabled = false;
        ctx.drawImage(i.canvas, px(l), py(t), px(r) - px(l), py(b) - py(t));
        continue;
      }
      if (i.is === "words") {
        ctx.font = `${11 * ratio}px system-ui, sans-serif`; ctx.fillStyle = theme.text; ctx.textBaseline = "middle";
        ctx.textAlign = "left"; ctx.strokeStyle = theme.back; ctx.lineWidth = 3 * ratio;                       // legible on a picture too
        i.texts.forEach((text, k) => { ctx.strokeText(text, px(i.x[k]), py(i.y[k])); ctx.fillText(text, px(i.x[k]), py(i.y[k])); });
        continue;
      }
      const { color, dash } = this.board.look(i.key), n = i.x.length;
      if (i.low) {
        ctx.fillStyle = color; ctx.globalAlpha = 0.2;
        let begin = 0;
        for (let k = 0; k <= n; k++) if (k === n || Number.isNaN(i.low[k]) || Number.isNaN(i.high[k]) || (xlog && i.x[k] <= 0)) {
          if (k - begin > 1) {
            ctx.beginPath();
            for (let j = begin; j < k; j++) ctx.lineTo(px(i.x[j]), clipped(i.high[j]));
            for (let j = k - 1; j >= begin; j--) ctx.lineTo(px(i.x[j]), clipped(i.low[j]));
            ctx.fill();
          }
          begin = k + 1;
        }
      }
      ctx.globalAlpha = i.faint ? 0.35 : 1;
      ctx.strokeStyle = ctx.fillStyle = color;
      ctx.lineWidth = (i.style === "dashed" || i.style === "edge" || i.faint ? 1 : pictured ? 2 : 1.5) * ratio;
      ctx.setLineDash((i.style === "dashed" || i.style === "edge" ? [5, 3] : dash).map((v) => v * ratio));
      ctx.beginPath();
      if (i.style === "bars") {                                    // x are the left edges, the last one closes
        const floor = py(ylog ? this.limits.y[0] : 0);
        for (let k = 0; k + 1 < n; k++) if (ok(i.y[k])) ctx.rect(px(i.x[k]), py(i.y[k]), px(i.x[k + 1]) - px(i.x[k]), floor - py(i.y[k]));
        ctx.globalAlpha = 0.45; ctx.fill(); ctx.globalAlpha = 1;
      } else if (i.style === "points") {
        for (let k = 0; k < n; k++) if (ok(i.y[k])) { const X = px(i.x[k]), Y = py(i.y[k]); ctx.moveTo(X + 2 * ratio, Y); ctx.arc(X, Y, 2 * ratio, 0, 7); }
        if (pictured) border();
        ctx.fill(); ctx.beginPath();
        ctx.setLineDash([]);
        if (i.low) for (let k = 0; k < n; k++) if (i.low[k] <= i.high[k]) { ctx.moveTo(px(i.x[k]), clipped(i.low[k])); ctx.lineTo(px(i.x[k]), clipped(i.high[k])); }
      } else {
        let before = false;
        for (let k = 0; k < n; k++) {
          const good = ok(i.y[k]) && !(xlog && i.x[k] <= 0);
          if (good) {
            const X = px(i.x[k]), Y = py(i.y[k]);
            if (!before) ctx.moveTo(X, Y);
            else { if (i.style === "steps" || i.style === "edge") ctx.lineTo(X, py(i.y[k - 1])); ctx.lineTo(X, Y); }
            if (i.style !== "edge" && !before && !(k + 1 < n && ok(i.y[k + 1]))) { ctx.moveTo(X + 2 * ratio, Y); ctx.arc(X, Y, 2 * ratio, 0, 7); }     // a point by itself
          }
          before = good;
        }
        if (pictured && !i.faint) border();
      }
      ctx.stroke();
      ctx.setLineDash([]); ctx.globalAlpha = 1;
      if (i.style === "edge" || (i.low && i.y.some(Number.isFinite))) beyond.push([i, color]);
    }
    for (const [i, color] of beyond) [0, 1].forEach((up) => this.markBeyond(ctx, i, up, color, px, marked));
    ctx.restore();
    this.mark();
  }

  markBeyond(ctx, i, up, color, px, marked) {                      // a band or a threshold goes on beyond the edge
    const v = i.style === "edge" ? i.y : up ? i.high : i.low, { x, y } = this.limits, { left, top, width, height } = this.plot.bbox, r = devicePixelRatio;
    let worst = -1;
    for (let k = 0; k < i.x.length; k++) {
      if (i.x[k] > x[1] || (i.x[k] < x[0] && !(i.x[k + 1] > x[0]))) continue;
      if ((up ? v[k] > y[1] : v[k] < y[0]) && (worst < 0 || (up ? v[k] > v[worst] : v[k] < v[worst]))) worst = k;
    }
    if (worst < 0) return;
    const text = i.style === "edge" ? `${brief(v[worst])} ` : "", at = Math.min(Math.max(px(i.x[worst]), left + 6 * r), left + width - 6 * r), row = (7 + 12 * marked[up]) * r;
    if (text) marked[up] += 1;
    this.el.dataset.beyond = [this.el.dataset.beyond, `${up ? "above" : "below"} ${text || "band"}`.trim()].filter(Boolean).join(", ");
    const tip = up ? top : top + height, back = up ? 6 * r : -6 * r, X = text ? left + width - 6 * r : at, Y = up ? top + row : top + height - row;
    ctx.fillStyle = color;
    ctx.beginPath(); ctx.moveTo(X, text ? Y - back / 2 : tip); ctx.lineTo(X - 5 * r, text ? Y + back / 2 : tip + back); ctx.lineTo(X + 5 * r, text ? Y + back / 2 : tip + back); ctx.fill();
    ctx.font = `${11 * r}px system-ui, sans-serif`; ctx.textAlign = "right"; ctx.textBaseline = "middle";
    ctx.strokeStyle = this.board.theme.back; ctx.lineWidth = 3 * r;
    ctx.strokeText(text, X - 5 * r, Y); ctx.fillText(text, X - 5 * r, Y);
  }

  readAt(at) {                                                     // values of all lines at the pointer, the largest first
    const found = [];
    if (at !== null && this.plot && this.panel.linked) for (const i of this.shown()) {
      const k = i.is === "line" && !i.faint ? upTo(i.x, at) : -1;
      if (k < 0 || !Number.isFinite(i.y[k])) continue;
      const half = i.low ? (i.high[k] - i.low[k]) / 2 : NaN;
      found.push([i.y[k], `${[this.board.nameOf(i.key), i.label].filter(Boolean).join(" ")} ${i.thinned ? "≈ " : ""}${brief(i.y[k])}${Number.isFinite(half) ? ` ± ${+half.toPrecision(2)}` : ""}`, i.key]);
    }
    const most = 12, rows = found.sort((a, b) => b[0] - a[0]).slice(0, most).map(([, textContent, key]) => tag("div", { textContent, style: `color:${this.board.ink(key)}` }));
    if (found.length > most) rows.push(tag("div", { textContent: `… and ${found.length - most} more` }));
    this.readout.replaceChildren(...rows);
    this.readout.style.display = rows.length ? "" : "none";
    if (rows.length) { const X = this.plot.valToPos(at, "x"), right = X < this.plot.over.clientWidth / 2; Object.assign(this.readout.style, { left: right ? `${X + 8}px` : "", right: right ? "" : `${this.plot.over.clientWidth - X + 8}px` }); }
  }

  mark() {                                                         // the marker of the step
    if (!this.plot) return;
    const at = this.panel.linked && this.panel.axes && this.board.stops ? this.plot.valToPos(this.board.step, "x") : -1;
    this.marker.style.display = at >= 0 && at <= this.plot.bbox.width / devicePixelRatio ? "" : "none";       // of the plot itself: an element that is out of sight has no width
    this.marker.style.transform = `translateX(${at}px)`;
  }

  moveTo(step) {                                                   // the slider has moved: true where a frame is still to come
    const { panel } = this;
    let missing = false;
    if (panel.frames) {
      const i = upTo(panel.steps, step), wanted = i < 0 ? undefined : panel.steps[i];
      let have = wanted;
      if (wanted !== undefined && !panel.frames.has(wanted)) {     // the newest one before it stands in
        missing = true;
        have = Math.max(...[...panel.frames.keys()].filter((k) => k <= wanted));
      }
      if (have !== this.frameStep) {
        this.frameStep = have;
        this.frame = panel.frames.get(have) ?? [];
        if (this.plot) this.plot.redraw(false);
      }
      this.reading.textContent = have === undefined || have === -Infinity ? "not measured yet" : `step ${have}${missing ? " …" : ""}`;
    } else if (panel.linked) {
      const parts = [], all = [], several = this.board.head.keys.length > 1;
      for (const i of this.shown()) {
        if (i.is !== "line" || i.faint) continue;
        const k = upTo(i.x, step), none = k >= 0 && !Number.isFinite(i.y[k]), value = k < 0 ? "" : none ? "–" : (i.thinned ? "≈ " : "") + brief(i.y[k]);
        const aside = i.style === "dashed" || i.style === "edge";
        if (!value || (aside && none)) continue;
        all.push([several ? this.board.nameOf(i.key) : "", i.label, none ? "undefined: no finite value was measured at this step" : value].filter(Boolean).join(" "));
        if (parts.length < 8 && !(several && aside))                        // of several runs only the values have room
          parts.push(tag("span", { textContent: several ? value : [i.label, value].filter(Boolean).join(" "), style: `color:${this.board.ink(i.key)}` }));
      }
      this.reading.replaceChildren(...parts);
      this.reading.title = all.join("\n");
    } else this.reading.textContent = "";
    this.mark();
    this.host.setAttribute("aria-label", `${panel.name}: ${(panel.linked && this.reading.title) || this.reading.textContent || panel.ylabel}`);
    return missing;
  }
}

class Board {                                                      // all panels of a canvas
  constructor(model, el) {
    this.model = model;
    this.plots = new Map();
    this.detail = null; this.asked = 0; this.hovering = false;
    this.said = tag("div", { className: "gradnb-said", attrs: { role: "status", "aria-live": "polite" } });
    this.legend = tag("div", { className: "gradnb-legend", attrs: { role: "group", "aria-label": "legend" } });
    this.where = tag("output", { className: "gradnb-step", attrs: { "aria-label": "step" } });
    this.grid = tag("div", { className: "gradnb-grid" });
    const button = (text, title, onclick, className = "") => tag("button", { textContent: text, title, onclick, className, type: "button", attrs: { "aria-label": title } });
    const flag = (text, title, onclick) => {
      const b = button(text, title, () => b.setAttribute("aria-pressed", onclick()));
      b.setAttribute("aria-pressed", false);
      return b;
    };
    this.spaced = flag("log steps", "slider in logarithmic steps", () => this.setSpacing(!this.logSpaced));
    this.logx = flag("log x", "logarithmic step axis", () => this.toggleLog("step"));
    this.latest = tag("input", { type: "number", min: 0, placeholder: "all", className: "gradnb-latest", attrs: { "aria-label": "latest steps" }, onchange: () => this.setWindow(+this.latest.value >= 1 ? [Math.round(+this.latest.value)] : null) });
    this.bar = tag("div", { className: "gradnb-bar", attrs: { role: "toolbar", "aria-label": "view" } },
      this.where, this.spaced, flag("hover", "the step follows the mouse", () => (this.hovering = !this.hovering)),
      this.logx,
      button("+", "zoom in", () => this.zoomBy(0.5)), button("−", "zoom out", () => this.zoomBy(2)), button("⟷", "whole range", () => this.setWindow(null)),
      tag("label", { title: "steps before the newest that are shown, also as more come" }, "latest ", this.latest), button("▢−", "smaller panels", () => this.resize(0.8), "gradnb-always"), button("▢+", "larger panels", () => this.resize(1.25), "gradnb-always"));
    this.text = tag("textarea", { className: "gradnb-code", readOnly: true, rows: 4, attrs: { "aria-label": "code that redraws this view" } });
    this.text.style.display = "none";
    this.bar.prepend(this.player());
    if (model.get("alone")) this.bar.prepend(this.ownSlider());
    else for (const kind of ["png", "svg", "html", "csv", "code"]) this.bar.append(button(kind, kind === "code" ? "code that redraws this view" : `save as ${kind.toUpperCase()}`, () => this.ask({ kind: "save", format: kind }), "gradnb-always"));
    this.about = tag("table");
    this.below = tag("details", { className: "gradnb-about" }, tag("summary", { textContent: "what is shown" }), tag("div", {}, this.about));
    this.el = tag("div", { className: "gradnb-canvas" }, this.bar, this.said, this.legend, this.grid, this.text, this.below);
    el.append(this.el);
    this.readTheme();
    const on = (event, handler) => { model.on(event, handler); this.off.push(() => model.off(event, handler)); };
    this.off = [];
    on("change:scene", () => this.load());
    on("change:position", () => this.follow());
    on("change:step", () => this.place());
    on("change:window", () => this.rewindow());
    on("change:hidden", () => { this.hidden = new Set(model.get("hidden")); this.redraw(); });
    on("change:log", () => this.relog());
    for (const name of ["large", "order", "size"]) on(`change:${name}`, () => this.arrange());
    on("change:about", () => this.describe());
    on("change:message", () => this.answered());
    on("msg:custom", (content, buffers) => this.receive(content, buffers ?? []));
    this.resized = new ResizeObserver(() => this.plots.forEach((p) => p.resize()));      // of every panel, also of one that comes later
    const themed = new MutationObserver(() => { this.readTheme(); this.redraw(); });
    themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light", "class"] });
    const dark = matchMedia("(prefers-color-scheme: dark)"), change = () => { this.readTheme(); this.redraw(); };
    dark.addEventListener("change", change);
    const touch = (e) => { if (this.touched(e.target)) this.ask(); };
    const stop = (e) => e.stopPropagation();                             // the notebook's own keys stay out of it and of the controls beside it, Ctrl+A in a list
    const keep = () => this.el.closest(".widget-vbox")?.addEventListener("keydown", stop);
    for (const [name, heard] of [["pointerdown", touch], ["keydown", touch], ["change", touch], ["keydown", keep]]) {
      document.addEventListener(name, heard, true);
      this.off.push(() => document.removeEventListener(name, heard, true));
    }
    this.off.push(() => this.resized.disconnect(), () => themed.disconnect(), () => dark.removeEventListener("change", change));
    this.load();
    this.say();
    this.describe();
  }

  close() {
    this.off.forEach((f) => f());
    clearInterval(this.playing); clearTimeout(this.later); clearTimeout(this.waiting); cancelAnimationFrame(this.reading);
    this.plots.forEach((p) => p.plot?.destroy());
    this.el.remove();
  }

  send(content) { if (!this.model.get("alone")) this.model.send(content); }

  ask(content) {                                                   // and say so where no answer comes
    const knock = !this.waiting;
    if (knock) this.waiting = setTimeout(() => this.say("The kernel does not answer: it is busy, or was restarted; then run the cell again."), 500);
    try { for (const c of [knock && { kind: "ping" }, content]) if (c) this.send(c); } catch (e) { this.say(`The kernel is gone (${e.message}); run the cell again.`); }
  }

  answered() { clearTimeout(this.waiting); this.waiting = null; this.say(); }

  touched(target) {                                                // does this control need the kernel?
    const box = this.el.closest(".widget-vbox"), control = target.closest?.(".widget-hbox");
    return box?.contains(control) && !target.closest(".gradnb-table :is([type=search], th)");
  }

  set(values) {
    for (const [k, v] of Object.entries(values)) this.model.set(k, v);
    this.model.save_changes();
  }

  ownSlider() {                                                    // where there is no kernel, and so no ipywidgets
    this.slider = tag("input", { type: "range", min: 0, className: "gradnb-slider", attrs: { "aria-label": "step" } });
    this.slider.oninput = () => this.set({ position: +this.slider.value });
    return this.slider;
  }

  player() {                                                       // the whole range in ten seconds, over and over
    const play = tag("button", { type: "button", textContent: "▶", attrs: { "aria-label": "play", "aria-pressed": "false" } });
    play.onclick = () => {
      this.playing = this.playing ? clearInterval(this.playing) : setInterval(() => {
        const last = this.model.get("last"), next = this.model.get("position") + Math.max(1, Math.round(last / 200));
        this.set({ position: next > last ? 0 : next });
      }, 50);
      play.setAttribute("aria-pressed", !!this.playing);
    };
    return play;
  }

  readTheme() {
    const light = document.body.dataset.jpThemeLight, dark = light ? light === "false" : matchMedia("(prefers-color-scheme: dark)").matches;
    this.el.classList.toggle("gradnb-dark", dark);
    this.theme = { ...(dark ? DARK : LIGHT), colors: dark ? ON_DARK : ON_LIGHT };
    for (const name of ["text", "grey", "back"]) this.el.style.setProperty(`--gradnb-${name}`, this.theme[name]);
  }

  look(key) {
    const slot = this.head.keys.find((k) => k[0] === key)?.[2];
    return slot === undefined ? { color: this.theme.grey, dash: [] } : { color: this.theme.colors[slot % 8], dash: DASH[Math.floor(slot / 8) % 4] };
  }

  ink(key) { return `color-mix(in srgb, ${this.look(key).color} 55%, ${this.theme.text})`; }      // of text: readable on the background

  readOut(at) {                                                    // at most once a frame
    this.pointed = at;
    this.reading ??= requestAnimationFrame(() => { this.reading = null; this.plots.forEach((p) => p.readAt(this.pointed)); });
  }

  nameOf(key) { return this.head.keys.find((k) => k[0] === key)?.[1] ?? key; }

  load() {                                                         // a new scene
    const atEnd = this.stops && this.model.get("position") >= this.model.get("last");
    this.head = readScene(this.model.get("scene"));
    this.detail = null;
    this.hidden = new Set(this.model.get("hidden"));
    this.stops = this.head.stops;
    this.bar.classList.toggle("gradnb-stepless", !this.stops);
    const wanted = this.model.get("step");
    this.step = this.stops ? (atEnd || wanted < 0 ? this.stops[0] + this.stops[1] * (this.stops[2] - 1) : this.nearest(wanted)) : 0;
    this.setStops();
    const names = this.head.panels.map((p) => p.name);
    for (const [name, plot] of this.plots) if (!names.includes(name)) { plot.plot?.destroy(); plot.el.remove(); this.plots.delete(name); }
    for (const p of this.head.panels) {
      if (this.plots.has(p.name)) { this.plots.get(p.name).set(p); continue; }
      const plot = new Plot(this, p);
      this.plots.set(p.name, plot);
      this.grid.append(plot.el);
      this.resized.observe(plot.host);
    }
    this.arrange();
    this.redraw();
    this.refine();
    this.el.dataset.loaded = +(this.el.dataset.loaded ?? 0) + 1;
  }

  // --- panels ---

  get large() { const name = this.model.get("large"); return this.head.panels.some((p) => p.name === name && !p.note) ? name : ""; }      // the panel that is shown alone

  get size() { return Math.min(Math.max(+this.model.get("size") || 1, 0.5), 4); }

  get height() { return Math.round(this.size * (this.large ? 480 : 210)); }

  arranged() {                                                     // names of all panels, as they stand
    const names = this.head.panels.map((p) => p.name), first = this.model.get("order").filter((n) => names.includes(n));
    return [...first, ...names.filter((n) => !first.includes(n))];
  }

  arrange() {
    const { large } = this, focus = document.activeElement;
    this.grid.style.setProperty("--gradnb-wide", `${Math.round(420 * this.size)}px`);
    this.arranged().forEach((name, i) => {
      const { el, alone } = this.plots.get(name);
      el.style.display = large && name !== large ? "none" : "";
      alone.setAttribute("aria-pressed", name === large);
      if (this.grid.children[i] !== el) this.grid.insertBefore(el, this.grid.children[i]);
    });
    if (document.activeElement !== focus) focus.focus();           // what is moved loses it
    this.plots.forEach((p) => p.resize());
  }

  enlarge(name) { this.set({ large: this.large === name ? "" : name }); }

  resize(factor) { this.set({ size: Math.min(Math.max(+(this.size * factor).toFixed(2), 0.5), 4) }); }

  put(name, at) {                                                  // a panel to another place
    const names = this.arranged(), from = names.indexOf(name);
    if (from < 0 || at < 0 || at >= names.length) return;
    names.splice(at, 0, ...names.splice(from, 1));
    this.set({ order: names });
  }

  pick(key, e) {                                                   // show or hide; with Shift, or the second of two clicks: this one alone, and again what was there
    if (e.detail !== 2) this.unclicked = this.model.get("hidden");
    const hidden = new Set(this.unclicked), others = this.head.keys.map((k) => k[0]).filter((k) => k !== key);
    if (!e.shiftKey && !e.altKey && e.detail !== 2) hidden.has(key) ? hidden.delete(key) : hidden.add(key);
    else if (!hidden.has(key) && others.every((k) => hidden.has(k))) { others.forEach((k) => hidden.delete(k)); this.together?.forEach((k) => hidden.add(k)); }
    else { this.together = this.unclicked; others.forEach((k) => hidden.add(k)); hidden.delete(key); }
    this.set({ hidden: [...hidden] });
  }

  describe() {                                                     // the table below: what differs stands out
    const [head, ...rows] = this.model.get("about"), cell = (name) => (v) => tag(name, { textContent: v ?? "" });
    this.below.style.display = head ? "" : "none";
    if (head) this.about.replaceChildren(tag("thead", {}, tag("tr", {}, ...head.map(cell("th")))),
      tag("tbody", {}, ...rows.map(([field, ...values]) => tag("tr", { className: new Set(values).size > 1 ? "gradnb-differs" : "" }, tag("th", { textContent: field }), ...values.map(cell("td"))))));
  }

  redraw() {
    const { keys } = this.head;
    this.legend.style.display = keys.length ? "" : "none";
    this.legend.replaceChildren(...keys.map(([key, name], at) => {
      const { color, dash } = this.look(key), b = tag("button", { type: "button", title: "show or hide; twice, or with Shift: this one alone, and again all", attrs: { "aria-pressed": !this.hidden.has(key) } },
        tag("i", { style: `border-top: 3px ${dash.length ? "dashed" : "solid"} ${color}` }), name);
      b.onclick = (e) => { this.pick(key, e); this.legend.children[at].focus(); };
      return b;
    }));
    this.latest.value = this.model.get("window")?.length === 1 ? this.model.get("window")[0] : "";
    this.logx.setAttribute("aria-pressed", this.head.panels.some((p) => p.linked && p.xlog));
    this.plots.forEach((p) => { p.draw(); p.plot?.redraw(false); });
    this.show();
  }

  // --- steps ---

  setStops() {                                                     // positions of the slider
    if (!this.stops) { this.set({ last: 0, position: 0 }); return; }
    const [first, width, count] = this.stops;
    this.log = null;
    if (this.logSpaced) {
      const all = new Set([0]);
      for (let i = 0; i <= 240; i++) all.add(Math.round(count ** (i / 240)) - 1);
      this.log = Float64Array.from([...all].sort((a, b) => a - b), (i) => first + width * i);
    }
    const last = (this.log ? this.log.length : count) - 1;
    this.quiet = true;
    this.set({ last });
    this.set({ position: this.positionOf(this.step), step: this.step });
    this.quiet = false;
    if (this.slider) { this.slider.max = last; this.slider.value = this.model.get("position"); }
  }

  setSpacing(on) { this.logSpaced = on; this.setStops(); this.show(); return on; }

  nearest(step) {
    const [first, width, count] = this.stops;
    return first + width * Math.min(Math.max(Math.round((step - first) / width), 0), count - 1);
  }

  positionOf(step) { return this.log ? Math.max(upTo(this.log, step), 0) : Math.round((step - this.stops[0]) / this.stops[1]); }

  stepAt(position) { return this.log ? this.log[Math.min(position, this.log.length - 1)] : this.nearest(this.stops[0] + this.stops[1] * position); }

  follow() {                                                       // the slider has moved
    if (this.quiet || !this.stops) return;
    this.step = this.stepAt(this.model.get("position"));
    this.show();
    this.quiet = true; this.set({ step: this.step }); this.quiet = false;
  }

  place() {                                                        // the kernel, or another view, has set the step
    if (this.quiet || !this.stops) return;
    const step = this.model.get("step"), [first, width, count] = this.stops;
    this.setStep(step < 0 ? first + width * (count - 1) : step);
  }

  setStep(value) {
    if (!this.stops) return;
    this.step = this.nearest(value);
    this.quiet = true; this.set({ step: this.step, position: this.positionOf(this.step) }); this.quiet = false;
    this.show();
  }

  show() {
    this.where.textContent = this.stops ? `step ${this.step}` : "";
    let missing = false;
    this.plots.forEach((p) => { missing = p.moveTo(this.step) || missing; });
    if (this.slider) this.slider.value = this.model.get("position");
    this.speak();
    this.el.dataset.step = this.step;
    clearTimeout(this.later);
    if (missing) this.later = setTimeout(() => this.send({ kind: "frames", step: this.step }), 60);
  }

  speak() {                                                        // sliders say what stands beside them; the step's, the step
    for (const s of this.el.closest(".widget-vbox")?.querySelectorAll(".widget-slider") ?? [])
      s.querySelector("[role=slider]")?.setAttribute("aria-valuetext", s.querySelector(".widget-readout")?.textContent || this.where.textContent);
    this.slider?.setAttribute("aria-valuetext", this.where.textContent);
  }

  // --- window ---

  whole(log) {
    let low = Infinity, high = -Infinity;
    for (const p of this.head.panels) if (p.linked) for (const i of p.items) if (i.is === "line") {
      let k = 0;
      while (log && k < i.x.length && i.x[k] <= 0) k++;
      if (k < i.x.length) { low = Math.min(low, i.x[k]); high = Math.max(high, i.x[i.x.length - 1]); }
    }
    if (!(low <= high)) return log ? [1, 10] : [0, 1];
    return log ? [low / 1.02, high === low ? low * 10 : high * 1.02] : [low - 0.01 * (high - low || 1), high + 0.01 * (high - low || 1)];
  }

  range(log) {
    const all = this.whole(log), { window } = this;
    return window && !(log && window[1] <= all[0]) ? [log ? Math.max(window[0], all[0]) : window[0], window[1]] : all;
  }

  get window() {                                                   // first and last step, or null; [n]: the latest n
    const window = this.model.get("window");
    if (window?.length !== 1) return this.opened(window);
    if (!this.stops) return null;
    const [first, width, count] = this.stops, end = first + width * (count - 1);
    return this.opened([end - window[0], end]);
  }

  opened(window) {                                                 // at least one step wide
    const least = this.stops?.[1] ?? 0;
    if (!window || window[1] - window[0] >= least) return window;
    const middle = (window[0] + window[1]) / 2;
    return [middle - least / 2, middle + least / 2];
  }

  setWindow(range) {
    if (range?.length === 2 && !(range[1] > range[0])) return;
    this.set({ window: range?.length === 2 ? this.opened(range.map(Number)) : range });
  }

  zoomBy(factor) {
    const log = this.head.panels.some((p) => p.linked && p.xlog), [a, b] = this.range(log), all = this.whole(log), half = ((b - a) * factor) / 2;
    const mid = this.step >= a && this.step <= b ? this.step : (a + b) / 2;
    const next = [Math.max(mid - half, all[0]), Math.min(mid + half, all[1])];
    this.setWindow(next[0] <= all[0] && next[1] >= all[1] ? null : next);
  }

  rewindow() { this.detail = null; this.redraw(); this.refine(); }

  refine() {                                                       // ask for the points that were left out
    const { window } = this, coarse = this.head.panels.some((p) => p.linked && p.items.some((i) => i.thinned));
    if (coarse && (window || this.model.get("log").includes("step"))) this.send({ kind: "window", window, asked: ++this.asked });
  }

  toggleLog(name) {
    const log = new Set(this.model.get("log")), on = !log.has(name);
    on ? log.add(name) : log.delete(name);
    this.set({ log: [...log] });
    return on;
  }

  relog() {                                                        // the axes that are logarithmic are others
    const log = new Set(this.model.get("log"));
    for (const p of this.head.panels) { p.ylog = log.has(p.name); if (p.linked) p.xlog = log.has("step"); }
    this.plots.forEach((p) => p.set(p.panel));
    this.redraw();
    this.refine();
  }

  key(e, plot) {
    const jump = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10 }[e.key];
    const acts = { "+": () => this.zoomBy(0.5), "-": () => this.zoomBy(2), 0: () => this.setWindow(null), l: () => this.toggleLog(plot.panel.name), m: () => this.enlarge(plot.panel.name), Escape: () => this.set({ large: "" }),
      Home: () => this.set({ position: 0 }), End: () => this.set({ position: this.model.get("last") }) };
    if (jump && e.shiftKey) this.put(plot.panel.name, this.arranged().indexOf(plot.panel.name) + jump);
    else if (jump) this.set({ position: Math.min(Math.max(this.model.get("position") + jump, 0), this.model.get("last")) });
    else if (acts[e.key] && !e.ctrlKey && !e.metaKey) acts[e.key]();
    else return;
    e.preventDefault();
  }

  // --- kernel ---

  say(text = this.model.get("message")) { this.said.textContent = text; this.said.style.display = text ? "" : "none"; }

  receive(content, buffers) {
    if (content.kind === "pong") this.answered();
    if (content.kind === "window" && content.asked === this.asked) { this.detail = readScene(view(buffers[0])); this.redraw(); this.el.dataset.refined = content.asked; }
    if (content.kind === "frames") {
      for (const p of readScene(view(buffers[0])).panels) {
        const plot = this.plots.get(p.name), late = (plot.late ??= []);
        if (!plot.panel.frames || !p.frames) continue;
        for (const [k, items] of p.frames) if (!plot.panel.frames.has(k)) { plot.panel.frames.set(k, items); late.push(k); }
        while (late.length > 300) plot.panel.frames.delete(late.shift());                  // memory does not grow as the slider moves
        plot.draw();
      }
      this.show();
    }
    if (content.kind === "code") { this.text.value = content.text; this.text.style.display = ""; this.text.focus(); this.text.select(); }
    if (content.kind === "file") {
      const link = tag("a", { href: URL.createObjectURL(new Blob([view(buffers[0])], { type: content.type })), download: content.name });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    }
  }
}

const view = (b) => (b instanceof DataView ? b : new DataView(b.buffer ?? b, b.byteOffset ?? 0, b.byteLength));

export default {
  logTicks, tickLabel, yLimits,
  render({ model, el }) {
    const board = new Board(model, el);
    return () => board.close();
  },
};
