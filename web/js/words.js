// The words on FlexIP's own widgets, which ComfyUI's translations of nodes do not reach.
import { app } from "../../../scripts/app.js";

const CHINESE = {
  "no run yet": "尚未运行",
  details: "详情",
  copy: "复制",
  copied: "已复制",
  gate: "门控",
  strength: "强度",
  "Wire a VAE: the pictures appear here.": "连接 VAE 后，图片显示在这里。",
  "Click: use this gate": "点击：使用此门控",
  "queue on change": "改动即运行",
  "gate is set by": "门控由此决定：",
  "pin files": "固定文件",
  "Run it once first.": "请先运行一次。",
  prompt: "提示词",
  subject: "主体",
  "this subject": "此主体",
  "this face": "此面孔",
  "look, loosely": "大致外观",
  "look, closely": "完整外观",
  off: "关",
  reference: "参考",
  "its style": "其风格",
  "its layout": "其构图",
  preservation: "保持",
  personalization: "个性化",
};

/** In the page's language; English where there is no translation. */
export function word(text) {
  const locale = String(app.extensionManager?.setting.get("Comfy.Locale") ?? "");
  return (locale === "zh" && CHINESE[text]) || text;
}
