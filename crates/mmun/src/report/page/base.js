"use strict";
// The data, and what all pictures share. Texts of the traced program go in as text, never as HTML.
const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const S = D.strings;
const [CALLS, RANGE, RESIDENT, TIME, LONGEST] = [0, 1, 2, 3, 4];

const size = bytes => {
  if (!bytes) return "0";
  let unit = 0;
  const names = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  while (bytes >= 1024 && unit < 6) { bytes /= 1024; unit++; }
  return (bytes < 10 && unit > 0 ? bytes.toFixed(1) : Math.round(bytes)) + " " + names[unit];
};
const time = ns => {
  let unit = 0;
  while (ns >= 1000 && unit < 3) { ns /= 1000; unit++; }
  return (ns < 10 && unit > 0 ? ns.toFixed(1) : Math.round(ns)) + " " + ["ns", "µs", "ms", "s"][unit];
};
const count = n => n.toLocaleString("en");
const percent = (part, whole) => whole ? (100 * part / whole).toFixed(part / whole < .1 ? 1 : 0) + " %" : "0 %";
const many = (n, one, more) => count(n) + " " + (n === 1 ? one : more || one + "s");
const hex = page => "0x" + (BigInt(page) * 4096n).toString(16);
// Whether the trace says of at least one removal how much was in memory, or has no removal.
const isSized = D.removals[0] > 0 || !D.all[RANGE];
const short = path => path.replace(/ \(deleted\)$/, "").split("/").pop() || path;

// A kind of event, for colours.
const group = event => ({ unmap: "unmap", clear: "clear", protection_vma: "prot", protection_page: "prot" })[D.events[event]] || "other";
const groups = { unmap: "unmap", clear: "clear", prot: "protection", other: "other change" };
const isFile = what => S[what].startsWith("/") && !S[what].startsWith("/dev/zero") && !S[what].startsWith("/memfd:");

const frame = i => {
  const [name, module, line, named] = D.frames[i];
  return S[name] + (named ? ` (${[S[module], S[line]].filter(Boolean).join(" ")})` : S[line] ? ` (${S[line]})` : "");
};
const stackLines = (site, most) => {
  const stack = D.stacks[site];
  if (!stack) return [];
  const lines = stack[1].map((f, i) => (i === stack[0] ? "* " : "  ") + frame(f));
  return lines.length > most ? [...lines.slice(0, most), `  ${lines.length - most} more frames`] : lines;
};

const make = (tag, attributes, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const draw = (parent, tag, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
};

const tip = $("tip");
const showTip = (x, y, text) => {
  tip.hidden = !text;
  if (!text) return;
  if (tip.textContent !== text) tip.textContent = text;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth - 8 ? x - 16 - box.width : x + 16;
  const top = y + 16 + box.height > innerHeight - 8 ? y - 12 - box.height : y + 16;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = Math.max(8, top) + "px";
};
const say = text => { $("say").textContent = text; };
// A tip for a node, at the pointer or at the focus.
const explain = (node, text) => {
  node.addEventListener("pointermove", e => showTip(e.clientX, e.clientY, text()));
  node.addEventListener("pointerleave", () => showTip(0, 0, ""));
  node.addEventListener("focus", () => {
    const box = node.getBoundingClientRect();
    showTip(box.right, box.top, text());
  });
  node.addEventListener("blur", () => showTip(0, 0, ""));
};

// Functions that draw a picture again, for a change of the colours or of the width.
const redraws = [];
const redraw = () => redraws.forEach(f => f());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
addEventListener("beforeprint", () => { document.documentElement.dataset.print = ""; redraw(); });
addEventListener("afterprint", () => { delete document.documentElement.dataset.print; redraw(); });
addEventListener("keydown", e => { if (e.key === "Escape") showTip(0, 0, ""); });

$("title").textContent = "mmun trace: " + D.title;
// No event that -e selects was recorded: hide the pictures, because they would be empty.
const isEmpty = !D.all[CALLS];
$("about").textContent = [time(D.end) + " traced", isEmpty ? "no change was recorded of the events that were asked for" : many(D.tasks, "task") + " changed " + many(D.spaces, "address space")].join(" · ");
if (isEmpty) document.querySelectorAll("main > *").forEach(part => { part.hidden = true; });
const tile = (value, label) => $("tiles").append(make("div", {}, make("dt", {}, label), make("dd", {}, value)));
tile(count(D.all[CALLS]), "calls that change translations");
tile(size(D.all[RANGE]), "address range given up, by unmaps and clears");
if (D.all[RANGE] && isSized) tile(size(D.all[RESIDENT]), "of it in memory: " + percent(D.all[RESIDENT], D.all[RANGE]));
else if (!isSized) tile("not known", "how much of it was in memory");
tile(time(D.all[TIME]), (D.is_own ? "in the calls themselves" : "between start and end, stops of the tracer included") + ": " + percent(D.all[TIME], D.end) + " of the run");
tile(time(D.all[LONGEST]), "the longest call");
if (D.removals[0]) tile(percent(D.removals[1], D.removals[0]), `of ${count(D.removals[0])} unmaps and clears removed nothing`);

const notes = isEmpty ? [] : [
  D.is_own ? "Time is what the kernel counted for the task in the call, less what a call that does nothing takes: wrong by up to 0.5 µs for a small call, by 1 to 4 % for a large one." : "Time is that on the clock, the stops of the tracer included. Recorded with --details, it is that of the call itself.",
  isSized ? "Resident is what was in memory before the call; pages of zeros that were only read do not count." : "How much was in memory is not known: recorded without --details, or /proc did not say.",
  "Range and resident count unmaps and clears only, in every total, table and diagram; calls, time and the picture count every change.",
];
const left = D.left_out;
if (left.changes) notes.push(`${count(left.changes)} lighter changes are not shown one by one: they are a haze in the picture, and are in every total, table and diagram.`);
if (left.lives) notes.push(`${count(left.lives)} smaller or shorter lives of mappings are a shade in the picture.`);
if (left.lanes) notes.push(`${many(left.lanes, "address space")} with fewer changes ${left.lanes === 1 ? "has" : "have"} no picture; their changes are in every total.`);
if (left.places) notes.push(`${count(left.places)} places with less time are not in the table.`);
if (left.leaves) notes.push(`${count(left.leaves)} lighter stacks are not in the picture by stack.`);
if (D.partial) notes.push(`${many(D.partial, "stack")} may lack frames: deeper than 256 frames, or the unwind tables of a file were too large to be read.`);
if (D.unfinished) notes.push(`${many(D.unfinished, "change")} had not ended when the trace did: left out.`);
if (!isEmpty && !D.has_births) notes.push("Recorded without --births: a mapping begins with its address space, or where it is first changed.");
if (!isEmpty && !D.has_stacks) notes.push("Recorded without -k: no places in the code, no stacks.");
$("notes").append(...notes.map(note => make("li", {}, note)));
