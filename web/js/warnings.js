// A run's warnings on the page: a badge on the node that they are about, and a notice.
// The server sends "flexip.warnings" with {node, warnings: [sentences]} after every sampling; an empty list clears them.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const NAME = "flexip.warnings"; // of the extension, its setting and its message
const NOTICE_MS = 10_000;
const COLORS = { fgColor: "#1a1200", bgColor: "#f5b400" };
const warned = new Map(); // node -> {badge, notice, sentences: Map(execution id -> [sentence])}
let noBadge;

/** A new node has no type yet, but its class has. */
function isOurs(node) {
  const id = String(node.constructor.comfyClass);
  return id === "EncodeReference" || id.includes("FlexIP");
}

/** The nodes that show the warnings of an execution id such as "3:7": node 7, and node 3, the subgraph around it. */
function nodesOf(executionId) {
  const nodes = [];
  let graph = app.rootGraph;
  for (const id of executionId.split(":")) {
    const node = graph?.getNodeById(id);
    if (!node) return []; // another workflow is open
    nodes.push(node);
    graph = node.subgraph;
  }
  return isOurs(nodes.at(-1)) ? nodes : [];
}

/** Vue nodes draw a badge again when something reactive changes that it read. The definition of a setting is reactive. */
function watched() {
  return app.extensionManager?.setting.settings[NAME];
}

function badgeOf(node) {
  void watched()?.changes;
  noBadge ??= new LGraphBadge({ text: "" }); // the page defines the class after it has loaded extensions
  return warned.get(node)?.badge ?? noBadge;
}

function redraw() {
  const setting = watched();
  if (setting) setting.changes = (setting.changes ?? 0) + 1;
  app.canvas?.setDirty(true, true);
}

function setSentences(node, executionId, sentences) {
  const entry = warned.get(node) ?? {
    badge: new LGraphBadge({ text: "⚠ FlexIP", ...COLORS, onClick: () => notify(node) }),
    sentences: new Map(), // a node in a subgraph that is used twice has two execution ids
  };
  closeNotice(entry);
  if (sentences.length) entry.sentences.set(executionId, sentences);
  else entry.sentences.delete(executionId);
  if (entry.sentences.size) warned.set(node, entry);
  else warned.delete(node);
}

function closeNotice(entry) {
  if (entry.notice) app.extensionManager.toast.remove?.(entry.notice); // newer pages let it run out
  entry.notice = undefined;
}

/** A node's warnings as a notice, in place of the one before. */
function notify(node) {
  const entry = warned.get(node);
  if (!entry) return;
  closeNotice(entry);
  const detail = [...new Set([...entry.sentences.values()].flat())].join("\n");
  entry.notice = { severity: "warn", summary: `FlexIP: ${node.title}`, detail, life: NOTICE_MS };
  app.extensionManager.toast.add(entry.notice);
}

function onWarnings({ detail }) {
  const executionId = String(detail.node);
  const nodes = nodesOf(executionId);
  for (const node of nodes) setSentences(node, executionId, detail.warnings);
  redraw();
  if (nodes.length && detail.warnings.length) notify(nodes.at(-1));
}

// A node that is cut off or bypassed sends no more messages, so every run begins without warnings. A run in which
// everything is cached says nothing new: no node is executed.
let begins = false;

function onExecuting({ detail: node }) {
  if (!node || !begins) return;
  begins = false;
  warned.forEach(closeNotice);
  warned.clear();
  redraw();
}

app.registerExtension({
  name: NAME,
  settings: [{ id: NAME, name: "FlexIP warnings", type: "hidden", defaultValue: 0 }],
  setup() {
    api.addEventListener(NAME, onWarnings);
    api.addEventListener("execution_start", () => (begins = true));
    api.addEventListener("executing", onExecuting);
  },
  nodeCreated(node) {
    if (isOurs(node) || node.isSubgraphNode?.()) node.badges.push(() => badgeOf(node));
  },
});
