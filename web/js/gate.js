// A slider that tells the truth: what its ends are, what else decides where it does not, and a switch that makes it a live dial.
// All of it is read from the graph again now and then, so that no way of changing a graph is missed; nothing is kept in the workflow.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { GATED, allNodes, consumersOf, kindOf, runs, sourceOf, widgetOf } from "./graph.js";
import { reportOf, rowsOf } from "./report.js";
import { word } from "./words.js";

const OFTEN_MS = 400;
const ENDS = { // of FlexIPStart: gate 0, gate 1
  subject: ["prompt", "this subject"],
  portrait: ["prompt", "this face"],
  "whole look": ["look, loosely", "look, closely"],
  "style only": ["off", "its style"],
  layout: ["off", "its layout"],
  "FlexIP file": ["prompt", "subject"],
};
const ONE_FILE = new Set(["portrait", "style only", "layout"]); // there strength and gate are one thing

/** The title of the node that decides in place of a node's slider, if any does. */
function overriderOf(node) {
  const schedule = sourceOf(node, "gate_schedule");
  if (runs(schedule) && schedule) return schedule.title;
  const consumers = consumersOf(node);
  const deciding = consumers.map((consumer) => {
    if (kindOf(consumer) === "FlexIPAutoGate") return consumer.title;
    if (kindOf(consumer) !== "FlexIPSampler") return undefined;
    const wired = consumer.inputs?.some((input) => input.name === "gates" && input.link != null);
    return wired || String(widgetOf(consumer, "gates")?.value ?? "").trim() ? consumer.title : undefined;
  });
  return deciding.length && deciding.every(Boolean) ? deciding[0] : undefined;
}

function endsOf(node) {
  if (kindOf(node) === "FlexIPStart") return ENDS[widgetOf(node, "preset")?.value];
  return reportOf(node)?.ends;
}

function setDisabled(widget, disabled) {
  if (Boolean(widget.disabled) !== disabled) {
    widget.disabled = disabled;
    app.canvas?.setDirty(true, true);
  }
}

/** Hidden in canvas nodes and in Vue nodes; the node becomes as high as what is left, but never on its own when a workflow is opened. */
function setHidden(node, widget, hidden) {
  if (!widget || Boolean(widget.hidden) === hidden) return;
  widget.hidden = hidden;
  widget.options.hidden = hidden;
  node.widgets = [...node.widgets]; // Vue nodes look at the list
  app.canvas?.setDirty(true, true);
}

const dials = new WeakMap(); // node -> the values that were queued last, while "queue on change" is on
let running = false;

async function turn(node) {
  const values = ["gate", "strength"].map((name) => widgetOf(node, name)?.value).join();
  if (dials.get(node) === values || running) return;
  dials.set(node, values);
  running = true; // until its end arrives
  if (!(await app.queuePrompt(0))) running = false;
}

function addSwitch(node, { buttons }) {
  const label = document.createElement("label");
  const box = document.createElement("input");
  box.type = "checkbox";
  box.addEventListener("change", () => {
    if (box.checked) dials.set(node, undefined);
    else dials.delete(node);
  });
  label.className = "flexip-live";
  label.append(box, word("queue on change"));
  buttons.prepend(label);
}

function update(node) {
  const head = rowsOf(node)?.head, gate = widgetOf(node, "gate");
  if (!head || !gate) return;
  const overrider = overriderOf(node), ends = endsOf(node);
  setDisabled(gate, Boolean(overrider));
  const scale = ends?.length ? `0 ${word(ends[0])} ↔ 1 ${word(ends[1])}` : "";
  const text = overrider ? `${word("gate is set by")} ${overrider}` : scale;
  if (head.textContent !== text) head.textContent = head.title = text;
  if (kindOf(node) === "FlexIPStart") {
    const preset = widgetOf(node, "preset")?.value;
    const one = ONE_FILE.has(preset) || (preset === "subject" && reportOf(node)?.files.length === 1);
    setHidden(node, widgetOf(node, "strength"), one);
  }
  if (dials.has(node)) turn(node);
}

function updateAll() {
  for (const node of allNodes()) {
    if (GATED.has(kindOf(node))) update(node);
    if (kindOf(node) === "FlexIPGateSchedule") {
      setHidden(node, widgetOf(node, "curve"), widgetOf(node, "preset")?.value !== "curve");
    }
  }
}

/** Writes the files that the last run took into the advanced widgets, so that a shared workflow names them. */
function pinFiles(node) {
  const files = reportOf(node)?.files ?? [];
  if (!files.length) {
    app.extensionManager.toast.add({ severity: "info", summary: node.title, detail: word("Run it once first."), life: 5000 });
    return;
  }
  ["preservation", "personalization"].forEach((name, side) => {
    const widget = widgetOf(node, name);
    widget.value = files[side] ?? "auto";
    widget.callback?.(widget.value);
  });
  app.canvas?.setDirty(true, true);
}

app.registerExtension({
  name: "flexip.gate",
  setup() {
    setInterval(updateAll, OFTEN_MS);
    api.addEventListener("execution_start", () => (running = true));
    for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(end, () => (running = false));
    }
  },
  nodeCreated(node) {
    if (kindOf(node) === "FlexIPStart") {
      const button = node.addWidget("button", "pin files", null, () => pinFiles(node), { serialize: false });
      button.label = word("pin files");
      button.serialize = false;
    }
    if (GATED.has(kindOf(node))) setTimeout(() => rowsOf(node) && addSwitch(node, rowsOf(node)));
  },
});
