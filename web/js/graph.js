// Looking through the open graph: what a node's inputs come from and where its outputs go.
import { app } from "../../../scripts/app.js";

export const GATED = new Set(["ApplyFlexIPGate", "FlexIPStart"]); // nodes with a gate of their own

export function kindOf(node) {
  return String(node?.constructor.comfyClass ?? "");
}

export function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

/** Neither muted nor bypassed. */
export function runs(node) {
  return (node?.mode ?? 0) === 0;
}

function linkOf(graph, id) {
  return graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id];
}

/** The node at the other end of an input's wire. */
export function sourceOf(node, name) {
  const link = linkOf(node.graph, node.inputs?.find((input) => input.name === name)?.link);
  return link && node.graph.getNodeById(link.origin_id);
}

/** [node, name of its input] for everything that an output is wired to. */
export function targetsOf(node, name) {
  const links = node.outputs?.find((output) => output.name === name)?.links ?? [];
  return links.map((id) => {
    const link = linkOf(node.graph, id);
    const target = link && node.graph.getNodeById(link.target_id);
    return [target, target?.inputs?.[link.target_slot]?.name];
  });
}

/** What the model of a node ends up at: samplers and others, and the next node with a gate, past LoRAs and the like. */
export function consumersOf(node, seen = new Set()) {
  const found = [];
  for (const [target] of targetsOf(node, node.outputs?.find((output) => output.type === "MODEL")?.name)) {
    if (!target) found.push(target); // out of a subgraph: unknown
    else if (!seen.has(target)) {
      seen.add(target);
      const passesOn = target.outputs?.some((output) => output.type === "MODEL" && output.links?.length);
      const stops = runs(target) && (GATED.has(kindOf(target)) || kindOf(target) === "FlexIPAutoGate");
      if (target.mode !== 2) found.push(...(passesOn && !stops ? consumersOf(target, seen) : [target]));
    }
  }
  return found;
}

/** The node of an execution id such as "3:7": node 7 in the subgraph of node 3. */
export function nodeOf(executionId) {
  let graph = app.rootGraph ?? app.graph, node;
  for (const id of String(executionId ?? "").split(":")) {
    node = graph?.getNodeById(id);
    graph = node?.subgraph;
  }
  return node;
}

export function allNodes() {
  const graphs = [app.rootGraph ?? app.graph, ...((app.rootGraph ?? app.graph)?.subgraphs?.values() ?? [])];
  return graphs.flatMap((graph) => graph?.nodes ?? []);
}
