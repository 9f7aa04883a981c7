// The table of places.
{
  const columns = [["calls", CALLS, count], ["range", RANGE, size], ["resident", RESIDENT, size], ["longest", LONGEST, time], ["time", TIME, time]];
  const rows = D.places.map(([label, sum, causes, sites], i) => ({ i, label: S[label], sum, causes: causes.map(c => S[c]).join(", "), sites: new Set(sites) }));
  let by = TIME, down = true, shown = 15, find = "", chosen = null;

  const head = document.querySelector("#sites thead tr");
  const header = (title, key) => {
    const th = make("th", { scope: "col" }), button = make("button", { type: "button" }, title);
    button.addEventListener("click", () => {
      down = by === key ? !down : key !== "where";
      by = key;
      fill();
    });
    th.append(button);
    th.dataset.key = key;
    head.append(th);
  };
  columns.forEach(([title, key]) => header(title, key));
  header("where", "where");

  const fill = () => {
    for (const th of head.children) {
      if (th.dataset.key === String(by)) th.setAttribute("aria-sort", down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    }
    const word = find.toLowerCase();
    const found = rows.filter(row => !word || (row.label + " " + row.causes).toLowerCase().includes(word));
    found.sort((a, b) => {
      const order = by === "where" ? a.label.localeCompare(b.label) : a.sum[by] - b.sum[by];
      return (down ? -order : order) || a.i - b.i;
    });
    const most = Math.max(1, ...rows.map(row => row.sum[TIME]));
    document.querySelector("#sites tbody").replaceChildren(...found.slice(0, shown).map(row => {
      const tr = make("tr", { "aria-selected": chosen === row.i });
      for (const [, key, text] of columns) {
        const td = make("td", {}, key === RESIDENT && !isSized ? "?" : text(row.sum[key]));
        if (key === TIME) td.append(make("meter", { min: 0, max: most, value: row.sum[TIME], "aria-hidden": true }));
        tr.append(td);
      }
      const button = make("button", { type: "button", title: "Show only these in the picture" }, row.label);
      tr.append(make("td", {}, button, make("span", { class: "dim small" }, "  " + row.causes)));
      tr.addEventListener("click", () => choose(chosen === row.i ? null : row.i));
      return tr;
    }));
    const more = $("sites-more");
    more.hidden = found.length <= shown;
    more.textContent = `Show ${count(found.length - shown)} more`;
    $("sites-note").textContent = word ? `${many(found.length, "place")} found` : D.has_stacks ? "Range and resident count unmaps and clears only. A click on a place shows only its changes in the picture above." : "";
  };
  var choose = i => {
    chosen = i;
    highlight(i === null ? null : rows[i].sites, i === null ? "" : rows[i].label);
    fill();
  };
  $("sites-more").addEventListener("click", () => { shown = Infinity; fill(); });
  $("sites-find").addEventListener("input", e => { find = e.target.value; fill(); });
  if (!D.has_stacks) document.querySelector("[aria-labelledby=sites-title]").hidden = true;
  addEventListener("beforeprint", () => { shown = Math.max(shown, 40); fill(); });
  fill();
}

// How long calls took.
{
  const svg = $("times"), LOW = 5, W = 640, H = 210, BASE = 182;
  const bars = new Map();
  for (const [power, event, n] of D.times) {
    const at = Math.max(LOW, power), bar = bars.get(at) || { unmap: 0, clear: 0, prot: 0, other: 0, all: 0 };
    bar[group(event)] += n; bar.all += n;
    bars.set(at, bar);
  }
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  $("times-note").textContent = (D.is_own ? "Calls by the time in the call itself, the tracer's stops taken off." : "Calls by the time between start and end, the tracer's stops included.") + " Each bar is twice as long as the one before.";
  const first = Math.min(...bars.keys()), last = Math.max(...bars.keys()), most = Math.max(...[...bars.values()].map(b => b.all));
  const step = Math.min(60, (W - 20) / (last - first + 1));
  for (let at = first; at <= last; at++) {
    const bar = bars.get(at), x = 10 + (at - first) * step, from = at === LOW ? 0 : 2 ** (at - 1);
    const label = at === LOW ? "< " + time(2 ** LOW) : time(from);
    if ((at - first) % Math.ceil(44 / step) === 0) draw(svg, "text", { x: x + 2, y: BASE + 16, class: "axis" }, label);
    if (!bar) continue;
    const text = `${many(bar.all, "call")} of ${time(from)} to ${time(2 ** at)}: ` + Object.entries(groups).filter(([k]) => bar[k]).map(([k, name]) => `${count(bar[k])} ${name}`).join(", ");
    const g = draw(svg, "g", { tabindex: 0, role: "img", "aria-label": text });
    let y = BASE;
    for (const kind of ["unmap", "clear", "prot", "other"]) {
      const h = bar[kind] / most * (BASE - 24);
      if (h) draw(g, "rect", { x: x + 1, y: y - h, width: step - 3, height: h, class: "f-" + kind });
      y -= h;
    }
    draw(g, "text", { x: x + step / 2 - .5, y: y - 4, "text-anchor": "middle" }, bar.all < 1e4 || step > 44 ? count(bar.all) : Math.round(bar.all / 1e3) + "k");
    explain(g, () => text);
  }
  draw(svg, "line", { x1: 8, x2: W - 8, y1: BASE + .5, y2: BASE + .5, class: "rule" });
}

// How much of a range was in memory.
{
  const svg = $("sizes"), W = 640, H = 210, LEFT = 56, BASE = 168;
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  const real = half => half ? 2 ** Math.floor(half / 2 - 1) * (half % 2 ? 1.5 : 1) : 0;
  const cells = D.sizes.map(([event, range, bytes, sum]) => ({ event, range, bytes, sum }));
  const low = Math.min(26, ...cells.map(c => c.range)), high = Math.max(low + 8, ...cells.map(c => c.range)) + 1;
  const x = half => LEFT + (half - low + .5) / (high - low + 1) * (W - LEFT - 16);
  const y = half => half ? BASE - 26 - (Math.max(half, low) - low) / (high - low) * (BASE - 46) : BASE - 6;
  draw(svg, "line", { x1: x(low), y1: y(low), x2: x(high), y2: y(high), class: "rule" });
  draw(svg, "line", { x1: LEFT, x2: W - 8, y1: BASE + 6, y2: BASE + 6, class: "rule" });
  draw(svg, "text", { x: LEFT - 8, y: y(0) + 4, "text-anchor": "end", class: "axis" }, "nothing");
  for (let half = 2 + 8 * Math.ceil((low - 2) / 8); half <= high; half += 8) {
    draw(svg, "text", { x: x(half), y: BASE + 22, "text-anchor": "middle", class: "axis" }, size(real(half)));
    draw(svg, "text", { x: LEFT - 8, y: y(half) + 4, "text-anchor": "end", class: "axis" }, size(real(half)));
  }
  draw(svg, "text", { x: W - 8, y: H - 6, "text-anchor": "end", class: "axis" }, "range →");
  draw(svg, "text", { x: 4, y: 11, class: "axis" }, "↑ resident");
  const most = Math.max(1, ...cells.map(c => c.sum[CALLS]));
  cells.sort((a, b) => b.sum[CALLS] - a.sum[CALLS]);
  for (const c of cells) {
    const r = Math.max(2.5, 17 * Math.sqrt(c.sum[CALLS] / most));
    const circle = draw(svg, "circle", { cx: x(c.range), cy: y(c.bytes), r, class: "f-" + group(c.event) });
    explain(circle, () => `${many(c.sum[CALLS], D.events[c.event])} of ${size(real(c.range))} and more\nrange ${size(c.sum[RANGE])}, resident ${size(c.sum[RESIDENT])}, time ${time(c.sum[TIME])}`);
  }
  const nothing = cells.filter(c => !c.bytes).reduce((n, c) => n + c.sum[CALLS], 0), known = cells.reduce((n, c) => n + c.sum[CALLS], 0);
  svg.setAttribute("aria-label", `${count(nothing)} of ${count(known)} unmaps and clears found nothing in memory`);
  if (!cells.length) draw(svg, "text", { x: W / 2, y: H / 2, "text-anchor": "middle", class: "axis" }, D.all[RANGE] ? "Not known: recorded without --details." : "No unmap or clear was recorded.");
}
