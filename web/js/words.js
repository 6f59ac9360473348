// The words of FlexIP's own widgets, which ComfyUI's translations of nodes do not reach.
import { app } from "../../../scripts/app.js";

const CHINESE = {
  "no run yet": "尚未运行",
  details: "详情",
  copy: "复制",
  copied: "已复制",
};

/** In the page's language; English where there is no translation. */
export function word(text) {
  const locale = String(app.extensionManager?.setting.get("Comfy.Locale") ?? "");
  return (locale === "zh" && CHINESE[text]) || text;
}
