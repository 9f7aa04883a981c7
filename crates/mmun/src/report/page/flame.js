// Stacks, by the total that the user selects.
{
  const svg = $("flame"), ROW = 18, DEEPEST = 80;
  const kinds = [["resident", RESIDENT, size], ["range", RANGE, size], ["time", TIME, time], ["calls", CALLS, count]];
  let kind = kinds.find(([, key]) => D.all[key] && key !== RANGE) || kinds[3];
  let root, focus, word = "", at = null;

  const build = () => {
    const node = (name, up) => ({ name, value: 0, up, below: new Map(), isLeaf: false });
    root = node("all", null);
    for (const [site, cause, what, sum] of D.leaves) {
      const value = sum[kind[1]];
      if (!value) continue;
      let on = root;
      root.value += value;
      const stack = D.stacks[site], lines = stack ? stack[1].map(frameName).reverse() : [];
      for (const name of [...fold(lines), S[cause] + (what ? "  " + short(S[what]) : "")]) {
        if (!on.below.has(name)) on.below.set(name, node(name, on));
        on = on.below.get(name);
        on.value += value;
      }
      on.isLeaf = true;
    }
    focus = root;
    at = null;
  };
  // Keeps one round of a cycle of callers that repeats (recursion).
  const fold = lines => {
    const path = [];
    for (const line of lines) {
      path.push(line);
      for (let length = 1; 2 * length <= path.length && length <= 24; length++) {
        const from = path.length - length;
        if (path.slice(from).every((line, i) => line === path[from - length + i])) { path.length = from; break; }
      }
    }
    return path.length > DEEPEST ? [...path.slice(0, DEEPEST - 1), `(${path.length - DEEPEST + 1} frames left out)`] : path;
  };
  // Lines of one function share a frame.
  const frameName = i => {
    const [name, module] = D.frames[i];
    return S[name] + (D.frames[i][3] && S[module] ? ` (${S[module]})` : "");
  };
  const hue = name => {
    let hash = 7;
    for (const c of name.split(" (")[0]) hash = hash * 31 + c.charCodeAt(0) | 0;
    return `hsl(${18 + Math.abs(hash) % 40} 85% ${64 + Math.abs(hash >> 6) % 12}%)`;
  };
  const isFound = n => word && n.name.toLowerCase().includes(word);
  const about = n => `${n.name}\n${kind[2](n.value)} ${kind[0]}, ${percent(n.value, root.value)} of all`;

  const paint = () => {
    const W = Math.max(300, svg.clientWidth);
    svg.replaceChildren();
    svg.classList.toggle("searching", word !== "");
    let depth = 0, found = 0;
    const put = (n, x, w, row, isIn, width) => {
      const hits = isFound(n);
      if (hits && !isIn) found += n.value;
      n.drawn = w >= .8;
      if (n.drawn) {
        depth = Math.max(depth, row);
        const g = draw(svg, "g", { class: (n.isLeaf ? "leaf" : "") + (hits ? " found" : "") + (n === at ? " at" : ""), role: "img", "aria-label": about(n) });
        draw(g, "rect", { x, y: row * ROW, width: w, height: ROW - 1, rx: 2, ...(hits ? {} : { fill: n.isLeaf ? "#b3261e" : hue(n.name) }) });
        if (w > 36) {
          const room = Math.floor((w - 6) / 6.1);
          draw(g, "text", { x: x + 4, y: row * ROW + 12.5 }, n.name.length > room ? n.name.slice(0, room - 1) + "…" : n.name);
        }
        g.addEventListener("pointermove", e => showTip(e.clientX, e.clientY, about(n)));
        g.addEventListener("click", () => go(n));
        n.row = row; n.x = x; n.w = w;
      } else if (!word) return;
      let left = x;
      for (const child of sorted(n)) {
        const part = w * child.value / (width || n.value);
        put(child, left, part, row + 1, isIn || hits);
        left += part;
      }
    };
    // The callers of the frame that is shown at full width.
    let line = [];
    for (let n = focus.up; n; n = n.up) line.unshift(n);
    line.forEach((n, row) => {
      const g = draw(svg, "g", { class: n === at ? "at" : "", opacity: .6, role: "img", "aria-label": about(n) });
      draw(g, "rect", { x: 0, y: row * ROW, width: W, height: ROW - 1, rx: 2, fill: hue(n.name) });
      draw(g, "text", { x: 4, y: row * ROW + 12.5 }, n.name);
      g.addEventListener("click", () => go(n));
      g.addEventListener("pointermove", e => showTip(e.clientX, e.clientY, about(n)));
      n.drawn = true; n.row = row; n.x = 0; n.w = W;
    });
    put(focus, 0, W, line.length, false);
    const height = (depth + 1) * ROW;
    svg.setAttribute("viewBox", `0 0 ${W} ${height}`);
    svg.style.height = height + "px";
    $("flame-all").hidden = focus === root;
    $("flame-found").textContent = word ? `found in ${percent(found, focus.value)}: ${kind[2](found)}` : "";
  };
  const sorted = n => n.order ||= [...n.below.values()].sort((a, b) => b.value - a.value);
  const go = n => { focus = n; at = n; paint(); };
  const move = to => {
    if (!to || !to.drawn) return;
    at = to;
    paint();
    const edge = svg.getBoundingClientRect();
    showTip(edge.left + to.x + Math.min(to.w, 80), edge.top + to.row * ROW, about(to));
    say(about(to));
  };
  const beside = by => {
    if (!at || !at.up) return at;
    const row = sorted(at.up).filter(n => n.drawn);
    return row[row.indexOf(at) + by];
  };
  const keys = {
    ArrowDown: () => move(at ? sorted(at)[0] : focus), ArrowUp: () => at && move(at.up), ArrowLeft: () => move(beside(-1)),
    ArrowRight: () => move(beside(1)), Enter: () => at && go(at), Escape: () => go(root),
  };
  svg.addEventListener("keydown", e => {
    if (e.ctrlKey || e.metaKey || e.altKey || !keys[e.key]) return;
    e.preventDefault();
    keys[e.key]();
  });
  svg.addEventListener("pointerleave", () => showTip(0, 0, ""));
  svg.addEventListener("blur", () => showTip(0, 0, ""));
  $("flame-all").addEventListener("click", () => go(root));
  $("flame-find").addEventListener("input", e => { word = e.target.value.toLowerCase(); paint(); });
  for (const entry of kinds) {
    const input = make("input", { type: "radio", name: "flame-by", value: entry[0] });
    input.checked = entry === kind;
    input.addEventListener("change", () => { kind = entry; build(); paint(); });
    $("flame-by").append(make("label", {}, input, " " + entry[0]));
  }
  build();
  paint();
  redraws.push(paint);
}
