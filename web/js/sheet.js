// Compare in place: FlexIP Sampler's sweep as pictures on the node. A click writes a picture's gate and strength into the node that
// was swept, and lays the picture over the one with strength 0, under a wipe. Like the report (report.js) it is an output of the node.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { allNodes, kindOf, nodeOf, widgetOf } from "./graph.js";
import { outputsOf } from "./report.js";
import { word } from "./words.js";

const KEY = "flexip_sheet";
const HEIGHT = 200; // at least; what the node has to spare goes to the pictures
const STYLE = `
.flexip-sheet { display: flex; flex-direction: column; gap: 4px; box-sizing: border-box; min-height: ${HEIGHT - 8}px; overflow: hidden; font: 11px/1.2 sans-serif; color: var(--input-text); }
.flexip-sheet-empty { opacity: 0.55; padding: 4px 8px; }
.flexip-sheet-wipe { position: relative; flex: 2 1 0; min-height: 0; overflow: hidden; cursor: ew-resize; touch-action: none; }
.flexip-sheet-wipe img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; user-select: none; -webkit-user-drag: none; }
.flexip-sheet-wipe span { position: absolute; top: 4px; padding: 1px 5px; border-radius: 4px; background: #000a; color: #fff; pointer-events: none; }
.flexip-sheet-wipe i { position: absolute; top: 0; bottom: 0; width: 2px; background: #fffc; pointer-events: none; }
.flexip-sheet-cells { display: grid; gap: 3px; flex: 1 1 0; min-height: 0; overflow: auto; }
.flexip-sheet-cells button { all: unset; position: relative; cursor: pointer; display: flex; min-width: 0; min-height: 40px; border-radius: 4px; }
.flexip-sheet-cells button.chosen, .flexip-sheet-cells button:focus-visible { outline: 2px solid #f5b400; outline-offset: -2px; }
.flexip-sheet-cells img { width: 100%; min-height: 0; object-fit: contain; }
.flexip-sheet-cells span { position: absolute; left: 0; right: 0; bottom: 0; background: #000a; color: #fff; text-align: center; }`;

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function picture(file) {
  const image = new Image();
  image.src = api.apiURL(`/view?${new URLSearchParams({ filename: file.filename, subfolder: file.subfolder, type: file.type })}`);
  image.draggable = false;
  return image;
}

function nameOf({ gate, strength }) {
  const parts = [gate != null && `${word("gate")} ${gate}`, strength != null && `${word("strength")} ${strength}`];
  return parts.filter(Boolean).join(", ");
}

/** Into the node whose gate was swept, where it is still there; the sampler's own list stays for the next comparison. */
function write(sheet, cell) {
  const target = nodeOf(sheet.node);
  for (const name of target ? ["gate", "strength"] : []) {
    const widget = widgetOf(target, name);
    if (cell[name] == null || !widget || widget.value === cell[name]) continue;
    widget.value = cell[name];
    widget.callback?.(widget.value);
  }
  app.canvas?.setDirty(true, true);
}

function wipe(cell, bare) {
  const box = element("div", "flexip-sheet-wipe");
  const above = picture(cell), line = element("i", "");
  const right = element("span", "", nameOf(cell));
  right.style.right = "4px";
  box.append(...(bare ? [picture(bare)] : []), above, right);
  if (bare) {
    const left = element("span", "", `${word("strength")} 0`);
    left.style.left = "4px";
    box.append(left, line);
    const put = (share) => {
      above.style.clipPath = `inset(0 0 0 ${share * 100}%)`;
      line.style.left = `calc(${share * 100}% - 1px)`;
    };
    put(0.5);
    box.addEventListener("pointermove", (event) => {
      const { left: edge, width } = box.getBoundingClientRect();
      put(Math.min(1, Math.max(0, (event.clientX - edge) / width)));
    });
  }
  return box;
}

const drawn = new WeakMap(); // node -> draws its sheet

function addWidget(node) {
  const box = element("div", "flexip-sheet");
  let shown, chosen;

  function choose(sheet, number) {
    chosen = number;
    draw();
    write(sheet, sheet.cells[number]);
  }

  function draw() {
    const sheet = outputsOf(node)?.[KEY]?.at(-1);
    if (sheet?.cells[0]?.filename !== shown) chosen = undefined; // another run's
    shown = sheet?.cells[0]?.filename;
    if (!sheet) {
      box.replaceChildren(element("div", "flexip-sheet-empty", word("Wire a VAE: the pictures appear here.")));
      return;
    }
    const cells = element("div", "flexip-sheet-cells");
    cells.style.gridTemplateColumns = `repeat(${sheet.columns}, minmax(0, 1fr))`;
    sheet.cells.forEach((cell, number) => {
      const made = element("button", number === chosen ? "chosen" : "");
      made.type = "button";
      made.title = word("Click: use this gate");
      made.append(picture(cell), element("span", "", nameOf(cell)));
      made.addEventListener("click", () => choose(sheet, number));
      cells.append(made);
    });
    const one = sheet.cells.length === 1 ? 0 : chosen;
    const large = one === undefined ? [] : [wipe(sheet.cells[one], sheet.bare[sheet.cells[one].latent])];
    box.replaceChildren(...large, ...(sheet.cells.length > 1 ? [cells] : []));
  }

  const widget = node.addDOMWidget("flexip_sheet", "flexip_sheet", box, {
    serialize: false,
    hideOnZoom: true,
    margin: 4,
    getMinHeight: () => HEIGHT,
  });
  widget.serialize = false;
  drawn.set(node, draw);
  draw();
  const { onExecuted } = node;
  node.onExecuted = function (output) {
    onExecuted?.call(this, output);
    draw();
  };
}

function drawAll() {
  for (const node of allNodes()) drawn.get(node)?.();
}

app.registerExtension({
  name: "flexip.sheet",
  init() {
    document.head.append(element("style", "", STYLE));
  },
  nodeCreated(node) {
    if (kindOf(node) === "FlexIPSampler") addWidget(node);
  },
  afterConfigureGraph: drawAll,
  onNodeOutputsUpdated: drawAll,
});
