// Address space over time.
{
  const canvas = $("map"), GUTTER = 176, STRIP = 54, AXIS = 20, GAP = .35, DENSE = 3000;
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const [T, WALL, OWN, TID, COMM, CAUSE, EVENT, PAGES, BYTES, WHAT, SITE, RESULT] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
  let lane, tops, heights, total, view, only = null, at = -1, drag = null;

  const name = l => {
    const program = short(S[l.program]), comm = S[l.comm];
    return `${comm || program || "?"}${program && program !== comm ? ` (${program})` : ""}, process ${l.pid}, mm ${l.mm}: ${many(l.changes, "change")}`;
  };
  D.lanes.forEach((l, i) => $("lane").append(make("option", { value: i }, name(l))));

  const open = i => {
    lane = D.lanes[i];
    if (lane) $("lane").title = name(lane);
    tops = []; heights = []; total = 0;
    if (lane) lane.bands.forEach(([page, pages], i) => {
      const before = lane.bands[i - 1];
      if (before && before[0] + before[1] < page) total += GAP;
      tops.push(total);
      heights.push(.6 + Math.log2(pages + 1));
      total += heights[i];
    });
    all();
  };
  const all = () => {
    view = { t0: 0, t1: lane ? lane.ended - lane.began : 1, v0: 0, v1: total || 1 };
    at = -1;
    paint();
  };
  // The height of an address in the pile of bands; of the end of a range, the lower edge of its band.
  const place = (page, isEnd) => {
    let low = 0, high = lane.bands.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1, [start, pages] = lane.bands[middle];
      if (isEnd ? page <= start + pages : page < start + pages) high = middle; else low = middle + 1;
    }
    const [start, pages] = lane.bands[low];
    return tops[low] + heights[low] * Math.min(1, Math.max(0, (page - start) / pages));
  };
  // The size of the canvas, read once for each picture, because reading it is slow.
  let area = { w: 1, h: 1 };
  const box = () => area;
  const X = t => GUTTER + (t - view.t0) / (view.t1 - view.t0) * box().w;
  const Y = v => STRIP + (v - view.v0) / (view.v1 - view.v0) * box().h;
  const inView = m => {
    const t = m[T] - lane.began;
    return t >= view.t0 && t <= view.t1 && (!only || only.has(m[SITE]));
  };
  const spot = m => {
    const [page, pages] = m[PAGES], x = X(m[T] - lane.began), y0 = Y(place(page)), y1 = Y(place(page + pages, true));
    return { x, y0, h: Math.max(3, y1 - y0) };
  };
  const isOut = s => s.y0 + s.h < STRIP || s.y0 > STRIP + box().h;

  let seen = [], seenLives = [];
  const paint = () => {
    const k = devicePixelRatio || 1, W = canvas.clientWidth, H = canvas.clientHeight;
    canvas.width = W * k; canvas.height = H * k;
    const g = canvas.getContext("2d");
    g.scale(k, k);
    seen = [];
    seenLives = [];
    area = { w: W - GUTTER - 8, h: H - STRIP - AXIS };
    if (!lane) return;
    const c = Object.fromEntries(["fg", "dim", "line", "band", "anon", "file", "unmap", "clear", "prot", "other", "haze", "bg"].map(n => [n, colour(n)]));
    const { w, h } = box();
    g.font = "11px system-ui, sans-serif";
    g.save();
    g.beginPath(); g.rect(0, STRIP, W, h); g.clip();
    // Bands, and what lies in each: neighbours of one name share a label.
    let label = null, lastY = -99;
    const put = () => {
      if (!label) return;
      const y0 = Math.max(STRIP, label.y0), y1 = Math.min(STRIP + h, label.y1), y = (y0 + y1) / 2 + 4;
      if (y1 - y0 < 7 || y - lastY < 12) return;
      lastY = y;
      g.fillStyle = c.fg; g.textAlign = "right";
      const text = short(S[label.what]) || "?";
      g.fillText((text.length > 17 ? text.slice(0, 16) + "…" : text) + "  " + size(label.pages * 4096), GUTTER - 8, y);
    };
    lane.bands.forEach(([page, pages, what], i) => {
      const y0 = Y(tops[i]), y1 = Y(tops[i] + heights[i]);
      g.fillStyle = c.band;
      g.fillRect(GUTTER, y0, w, y1 - y0);
      if (label && label.what === what && label.end === page) { label.end += pages; label.pages += pages; label.y1 = y1; }
      else { put(); label = { what, end: page + pages, pages, y0, y1 }; }
    });
    put();
    g.beginPath(); g.rect(GUTTER, STRIP, w + 8, h); g.clip();
    const cells = (lines, fill, least, most) => lines.forEach((digits, i) => {
      const y0 = Y(tops[i]), y1 = Y(tops[i] + heights[i]), part = (lane.ended - lane.began) / 200;
      for (let j = 0; j < digits.length; j++) if (digits[j] !== "0") {
        const x0 = X(j * part);
        g.globalAlpha = least + digits[j] / 9 * (most - least);
        g.fillStyle = fill;
        g.fillRect(x0, y0, X((j + 1) * part) - x0, y1 - y0);
      }
    });
    cells(lane.shade, c.anon, 0, .8);
    g.globalAlpha = 1;
    for (const life of lane.lives) {
      const [page, pages, began, ended, what] = life;
      const x0 = X(began - lane.began), x1 = X(ended - lane.began);
      if (x1 < GUTTER || x0 > GUTTER + w) continue;
      const y0 = Y(place(page)), y1 = Y(place(page + pages, true));
      if (y1 < STRIP || y0 > STRIP + h) continue;
      g.fillStyle = isFile(what) ? c.file : c.anon;
      g.fillRect(x0, y0, Math.max(1, x1 - x0), Math.max(.7, y1 - y0 - .5));
      seenLives.push({ life, x0, x1: Math.max(x0 + 1, x1), y0, y1 });
    }
    cells(lane.haze, c.haze, .18, .7);
    g.globalAlpha = 1;
    const visible = lane.marks.filter(inView);
    const spots = visible.map(m => ({ m, ...spot(m) })).filter(s => !isOut(s));
    if (spots.length > DENSE) {
      const dense = new Map();
      for (const s of spots) {
        const key = `${Math.round(s.x / 3)} ${Math.round((s.y0 + s.h / 2) / 3)} ${group(s.m[EVENT])}`;
        const cell = dense.get(key);
        if (cell) { cell.n++; cell.y0 = Math.min(cell.y0, s.y0); cell.y1 = Math.max(cell.y1, s.y0 + s.h); }
        else dense.set(key, { n: 1, x: Math.round(s.x / 3) * 3, y0: s.y0, y1: s.y0 + s.h, fill: c[group(s.m[EVENT])] });
      }
      for (const cell of dense.values()) {
        g.globalAlpha = Math.min(1, .3 + .12 * Math.log2(cell.n));
        g.fillStyle = cell.fill;
        g.fillRect(cell.x - 1.5, cell.y0, 3, cell.y1 - cell.y0);
      }
      g.globalAlpha = 1;
    } else for (const s of spots) {
      g.fillStyle = c[group(s.m[EVENT])];
      g.fillRect(s.x - 1, s.y0, 2.5, s.h);
    }
    seen = spots;
    if (at >= 0 && spots[at]) {
      g.strokeStyle = c.fg; g.lineWidth = 2;
      g.strokeRect(spots[at].x - 5, spots[at].y0 - 4, 10, spots[at].h + 8);
    }
    if (drag && drag.to) {
      g.globalAlpha = .15; g.fillStyle = c.fg;
      g.fillRect(Math.min(drag.x, drag.to.x), Math.min(drag.y, drag.to.y), Math.abs(drag.x - drag.to.x), Math.abs(drag.y - drag.to.y));
      g.globalAlpha = 1;
    }
    g.restore();
    strip(g, c, w);
    g.fillStyle = c.dim; g.textAlign = "center";
    const span = view.t1 - view.t0, step = nice(span / Math.max(2, w / 110));
    for (let t = Math.ceil((view.t0 + lane.began) / step) * step; t <= view.t1 + lane.began; t += step) {
      const x = X(t - lane.began);
      g.fillRect(x, H - AXIS, 1, 4);
      g.fillText(time(t), Math.min(x, W - 22), H - 5);
    }
    const shown = many(spots.length, "change") + " in view" + (spots.length > DENSE ? ", as density: zoom in to see each" : "");
    const hidden = lane.left_out[0] ? `; ${count(lane.left_out[0])} lighter ones are the haze` : "";
    $("map-note").textContent = shown + hidden + ".";
  };
  const nice = x => {
    const power = 10 ** Math.floor(Math.log10(Math.max(1, x)));
    return [1, 2, 5, 10].find(n => n * power >= x) * power;
  };
  // The strip above the picture: the count of calls in each part of the time.
  const strip = (g, c, w) => {
    const parts = {}, part = (lane.ended - lane.began) / 200;
    let most = 1;
    for (const [at, event, n] of lane.strip) {
      const row = parts[at] ||= { unmap: 0, clear: 0, prot: 0, other: 0, all: 0 };
      row[group(event)] += n; row.all += n;
      most = Math.max(most, row.all);
    }
    g.save();
    g.beginPath(); g.rect(GUTTER, 0, w, STRIP); g.clip();
    for (const [at, row] of Object.entries(parts)) {
      const x0 = X(at * part), x1 = X((+at + 1) * part);
      let y = STRIP - 8;
      for (const kind of ["unmap", "clear", "prot", "other"]) {
        const h = row[kind] / most * (STRIP - 14);
        g.fillStyle = c[kind];
        g.fillRect(x0, y - h, Math.max(1, x1 - x0 - 1), h);
        y -= h;
      }
    }
    g.restore();
    g.fillStyle = c.dim; g.textAlign = "right";
    g.fillText("calls, at most " + count(most), GUTTER - 8, 16);
    g.fillText("in " + time(part), GUTTER - 8, 30);
  };

  const about = m => {
    const [page, pages] = m[PAGES], failed = m[RESULT] < 0 && m[RESULT] > -4096;
    const result = m[RESULT] === null ? "the task died in it" : failed ? "failed, error " + -m[RESULT] : m[RESULT] > 4096 ? "0x" + BigInt(m[RESULT]).toString(16) : m[RESULT];
    const lines = [
      `${S[m[CAUSE]]} = ${result}   ${D.events[m[EVENT]]}`,
      `at ${(m[T] / 1e6).toFixed(3)} ms, ${S[m[COMM]]} ${m[TID]}`,
      `${hex(page)}-${hex(page + pages)}`,
      `range ${size(pages * 4096)}` + (m[BYTES] === null ? "" : `, resident ${size(m[BYTES])}`),
      `time ${time(m[OWN])}` + (D.is_own ? ` in the call, ${time(m[WALL])} with the tracer's stops` : ""),
    ];
    if (m[WHAT]) lines.push(S[m[WHAT]]);
    return [...lines, ...stackLines(m[SITE], 14)].join("\n");
  };
  const aboutLife = ([page, pages, began, ended, what, site, birth, fate]) => {
    const born = ["there since the trace first saw it", "mapped", "copied by a fork"][birth] + (birth ? ` at ${(began / 1e6).toFixed(3)} ms` : "");
    const gone = fate ? `unmapped at ${(ended / 1e6).toFixed(3)} ms, after ${time(ended - began)}` : "kept to the end";
    return [S[what] || "?", `${hex(page)}-${hex(page + pages)}  ${size(pages * 4096)}`, born, gone, ...stackLines(site, 10)].join("\n");
  };
  const hit = (x, y) => {
    let best = null, least = 6;
    for (const s of seen) {
      if (Math.abs(x - s.x) > 8) continue;
      const far = Math.hypot(Math.max(0, Math.abs(x - s.x) - 1), Math.max(s.y0 - y, 0, y - s.y0 - s.h));
      if (far < least || (far === least && best && s.h < best.h)) { least = far; best = s; }
    }
    if (best) return about(best.m);
    if (y < STRIP || x < GUTTER) return "";
    const found = seenLives.findLast(s => s.x0 <= x && x <= s.x1 && s.y0 <= y && y <= s.y1);
    return found ? aboutLife(found.life) : "";
  };
  const zoom = (factor, x, y) => {
    if (!lane) return;
    const { w, h } = box(), span = lane.ended - lane.began;
    const move = (from, to, low, high, at, least) => {
      const length = Math.min(high - low, Math.max(least, (to - from) * factor)), fixed = from + (to - from) * at;
      const begin = Math.min(high - length, Math.max(low, fixed - length * at));
      return [begin, begin + length];
    };
    const ax = x === undefined ? .5 : Math.min(1, Math.max(0, (x - GUTTER) / w)), ay = y === undefined ? .5 : Math.min(1, Math.max(0, (y - STRIP) / h));
    [view.t0, view.t1] = move(view.t0, view.t1, 0, span, ax, 100);
    [view.v0, view.v1] = move(view.v0, view.v1, 0, total, ay, total / 5000);
    at = -1;
    paint();
  };
  const shift = (dt, dv) => {
    if (!lane) return;
    const t = view.t1 - view.t0, v = view.v1 - view.v0;
    view.t0 = Math.min(lane.ended - lane.began - t, Math.max(0, view.t0 + dt * t)); view.t1 = view.t0 + t;
    view.v0 = Math.min(total - v, Math.max(0, view.v0 + dv * v)); view.v1 = view.v0 + v;
    at = -1;
    paint();
  };
  const step = by => {
    if (!seen.length) return say("no change in view");
    at = (at + by + seen.length) % seen.length;
    paint();
    const spot = seen[at], edge = canvas.getBoundingClientRect(), text = about(spot.m);
    showTip(edge.left + spot.x, edge.top + spot.y0 + Math.min(spot.h, 40), text);
    say(text);
  };
  const point = e => {
    const edge = canvas.getBoundingClientRect();
    return { x: e.clientX - edge.left, y: e.clientY - edge.top };
  };
  canvas.addEventListener("pointerdown", e => {
    if (e.button || !lane) return;
    drag = { ...point(e), pan: e.shiftKey, view: { ...view } };
    canvas.setPointerCapture(e.pointerId);
    showTip(0, 0, "");
  });
  canvas.addEventListener("pointermove", e => {
    if (!lane) return;
    const p = point(e);
    if (!drag) return showTip(e.clientX, e.clientY, hit(p.x, p.y));
    if (drag.pan) {
      const { w, h } = box();
      view = { ...drag.view };
      shift((drag.x - p.x) / w, (drag.y - p.y) / h);
    } else { drag.to = p; paint(); }
  });
  const drop = () => {
    const d = drag;
    drag = null;
    if (!d || d.pan || !d.to) return paint();
    const { w, h } = box(), [x0, x1] = [d.x, d.to.x].sort((a, b) => a - b), [y0, y1] = [d.y, d.to.y].sort((a, b) => a - b);
    const part = (x, from, length) => Math.min(1, Math.max(0, (x - from) / length)), { t0, t1, v0, v1 } = view;
    if (x1 - x0 > 8) { view.t0 = t0 + (t1 - t0) * part(x0, GUTTER, w); view.t1 = Math.max(view.t0 + 100, t0 + (t1 - t0) * part(x1, GUTTER, w)); }
    if (y1 - y0 > 24) { view.v0 = v0 + (v1 - v0) * part(y0, STRIP, h); view.v1 = v0 + (v1 - v0) * part(y1, STRIP, h); }
    at = -1;
    paint();
  };
  canvas.addEventListener("pointerup", drop);
  canvas.addEventListener("pointercancel", () => { drag = null; paint(); });
  canvas.addEventListener("pointerleave", () => showTip(0, 0, ""));
  canvas.addEventListener("dblclick", () => lane && all());
  canvas.addEventListener("wheel", e => {
    if (!e.ctrlKey && !e.metaKey) return;
    e.preventDefault();
    const p = point(e);
    zoom(e.deltaY > 0 ? 1.25 : .8, p.x, p.y);
  }, { passive: false });
  const keys = {
    ArrowLeft: () => shift(-.2, 0), ArrowRight: () => shift(.2, 0), ArrowUp: () => shift(0, -.2), ArrowDown: () => shift(0, .2),
    "+": () => zoom(.5), "=": () => zoom(.5), "-": () => zoom(2), "0": () => lane && all(), n: () => step(1), p: () => step(-1),
  };
  canvas.addEventListener("keydown", e => {
    if (e.ctrlKey || e.metaKey || e.altKey || !keys[e.key]) return;
    e.preventDefault();
    keys[e.key]();
  });
  canvas.addEventListener("blur", () => { if (at >= 0) { at = -1; paint(); showTip(0, 0, ""); } });
  $("zoom-in").addEventListener("click", () => zoom(.5));
  $("zoom-out").addEventListener("click", () => zoom(2));
  $("zoom-all").addEventListener("click", () => lane && all());
  $("lane").addEventListener("change", e => open(+e.target.value));
  const haze = D.left_out.changes ? [["haze", "haze: lighter changes"]] : [];
  for (const [kind, text] of [["anon", "anonymous"], ["file", "of a file"], ...Object.entries(groups), ...haze])
    $("map-key").append(make("li", {}, make("i", { class: "k-" + kind }), text));
  // Shows only the changes with these stacks; null: all changes.
  var highlight = (sites, label) => {
    only = sites;
    const box = $("mark-filter");
    box.hidden = !sites;
    box.replaceChildren();
    if (sites) {
      const clear = make("button", { type: "button" }, "Only " + label.slice(0, 60) + " ✕");
      clear.setAttribute("aria-label", "Show the changes of all places again");
      clear.addEventListener("click", () => choose(null));
      box.append(clear);
    }
    at = -1;
    paint();
  };
  if (!D.lanes.length) { canvas.hidden = true; $("map-note").textContent = "No change was recorded."; }
  open(0);
  redraws.push(paint);
}
