// What a node did in its last run: one plain line on the node, the rest in a panel on request, and a button that copies all of it.
// The server sends it as an output of the node under "flexip_report", so it lives as long as the node's pictures do; nothing of it,
// and no size that depends on it, goes into the workflow. Words of the server are set as text, never as markup.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { GATED, allNodes, kindOf } from "./graph.js";
import { word } from "./words.js";

const KEY = "flexip_report";
const HEIGHT = 56; // of the widget, with and without a report: a run must not change the node's size
const HEAD = 18; // above the report of a node with a gate: see gate.js
const REPORTING = new Set([
  "ApplyFlexIPGate",
  "FlexIPStart",
  "FlexIPSampler",
  "FlexIPAutoGate",
  "FlexIPScore",
  "FlexIPAttentionMaps",
  "FlexIPBlocks",
  "FlexIPSaveReference",
  "FlexIPTrain",
  "FlexIPTrainingStatus",
]);
const STYLE = `
.flexip-report { display: flex; flex-direction: column; gap: 2px; box-sizing: border-box; 
  padding: 4px 8px; border-radius: 6px; background: var(--comfy-input-bg); color: var(--input-text); font: 12px/1.3 sans-serif; overflow: hidden; }
.flexip-report-head { height: ${HEAD}px; font-size: 11px; opacity: 0.85; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.flexip-live { display: flex; align-items: center; gap: 3px; margin-right: auto; cursor: pointer; font-size: 11px; }
.flexip-live input { margin: 0; width: 11px; height: 11px; }
.flexip-report-line { flex: 1; overflow: hidden; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow-wrap: anywhere; }
.flexip-report-line.empty { opacity: 0.55; }
.flexip-report-buttons { display: flex; justify-content: flex-end; gap: 10px; }
.flexip-report-buttons:not(.ready) button { visibility: hidden; }
.flexip-report-buttons button, .flexip-report-panel button { all: unset; cursor: pointer; font: 11px/1.2 sans-serif; opacity: 0.75; text-decoration: underline; }
.flexip-report button:hover, .flexip-report-panel button:hover, .flexip-report button:focus-visible { opacity: 1; }
.flexip-report-panel { position: fixed; z-index: 1100; box-sizing: border-box; width: 440px; max-width: calc(100vw - 16px); max-height: 50vh; overflow: auto;
  padding: 10px 12px; border: 1px solid var(--border-color, #555); border-radius: 8px; background: var(--comfy-menu-bg, #222); color: var(--input-text, #ddd);
  font: 12px/1.45 sans-serif; box-shadow: 0 6px 24px #0008; }
.flexip-report-panel p { margin: 0 0 6px; overflow-wrap: anywhere; }
.flexip-report-panel .warning { color: #f5b400; }
.flexip-report-panel .versions { opacity: 0.6; }`;

/** The outputs of a node, as the page keeps them: by its id, in a subgraph behind the subgraph's. */
export function outputsOf(node) {
  const inside = node.graph && node.graph !== app.rootGraph;
  return app.nodeOutputs?.[inside ? `${node.graph.id}:${node.id}` : String(node.id)];
}

/** What the server said of the node last. */
export function reportOf(node) {
  const value = outputsOf(node)?.[KEY]; // a list from the node's own run, an object from another node's
  return Array.isArray(value) ? value.at(-1) : value;
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function button(name, onClick) {
  const made = element("button", "", word(name));
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

function asText(node, report) {
  const lines = [`${node.title} (${node.type})`, ...report.warnings.map((text) => `⚠ ${text}`), report.line, ...report.details];
  return [...lines, `${report.versions}, page ${window.__COMFYUI_FRONTEND_VERSION__ ?? "?"}`].join("\n");
}

async function copy(node, event) {
  const report = reportOf(node);
  if (!report) return;
  const pressed = event.currentTarget;
  const text = asText(node, report);
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", "", ""); // pages without https have no clipboard
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  pressed.textContent = word("copied");
  setTimeout(() => (pressed.textContent = word("copy")), 1500);
}

let panel; // one at a time

function closePanel() {
  panel?.remove();
  panel = undefined;
}

function togglePanel(node, anchor) {
  const wasOpen = panel?.owner === anchor;
  closePanel();
  const report = reportOf(node);
  if (wasOpen || !report) return;
  panel = element("div", "flexip-report-panel");
  panel.owner = anchor;
  panel.append(
    ...report.warnings.map((text) => element("p", "warning", `⚠ ${text}`)),
    element("p", "", report.line),
    ...report.details.map((text) => element("p", "", text)),
    element("p", "versions", report.versions),
    button("copy", (event) => copy(node, event)),
  );
  document.body.append(panel);
  const at = anchor.getBoundingClientRect();
  panel.style.left = `${Math.max(8, Math.min(at.left, innerWidth - panel.offsetWidth - 8))}px`;
  panel.style.top = `${Math.max(8, Math.min(at.bottom + 4, innerHeight - panel.offsetHeight - 8))}px`;
}

const drawn = new WeakMap(); // node -> draws its report
const rows = new WeakMap();

/** Of a node with a gate: the row above its report, and the one with its buttons. */
export function rowsOf(node) {
  return rows.get(node);
}

function addWidget(node) {
  const box = element("div", "flexip-report");
  const line = element("div", "flexip-report-line");
  const buttons = element("div", "flexip-report-buttons");
  buttons.append(
    button("details", () => togglePanel(node, box)),
    button("copy", (event) => copy(node, event)),
  );
  const height = HEIGHT + (GATED.has(kindOf(node)) ? HEAD : 0);
  if (GATED.has(kindOf(node))) {
    const head = element("div", "flexip-report-head");
    box.append(head);
    rows.set(node, { head, buttons });
  }
  box.append(line, buttons);
  box.style.minHeight = box.style.maxHeight = `${height - 8}px`;
  const widget = node.addDOMWidget("flexip_report", "flexip_report", box, {
    serialize: false, // not into the prompt
    hideOnZoom: true,
    margin: 4,
    getMinHeight: () => height,
    getMaxHeight: () => height,
  });
  widget.serialize = false; // not into the workflow
  drawn.set(node, () => {
    const report = reportOf(node);
    const text = report ? (report.warnings.length ? "⚠ " : "") + report.line : word("no run yet");
    line.textContent = text;
    line.title = text;
    line.classList.toggle("empty", !report);
    buttons.classList.toggle("ready", Boolean(report));
  });
  drawn.get(node)();
  const { onExecuted } = node;
  node.onExecuted = function (output) {
    onExecuted?.call(this, output);
    drawn.get(node)();
  };
}

function drawAll() {
  for (const node of allNodes()) drawn.get(node)?.();
}

app.registerExtension({
  name: "flexip.report",
  init() {
    document.head.append(element("style", "", STYLE));
    window.addEventListener("pointerdown", (event) => {
      if (panel && !panel.contains(event.target) && !panel.owner.contains(event.target)) closePanel();
    }, true);
    window.addEventListener("keydown", (event) => event.key === "Escape" && closePanel(), true);
    window.addEventListener("wheel", (event) => panel && !panel.contains(event.target) && closePanel(), true);
  },
  setup() {
    api.addEventListener("execution_start", closePanel);
  },
  nodeCreated(node) {
    if (REPORTING.has(kindOf(node))) addWidget(node);
  },
  afterConfigureGraph: drawAll, // undo, paste of a workflow, another tab
  onNodeOutputsUpdated: drawAll, // another tab's outputs are back
});
