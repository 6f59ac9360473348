"""The forms in which IP-Adapter files exist: their keys under the published names, and files that need another pack.

The published names are `image_proj.*` and `ip_adapter.<1, 3, 5, ...>.to_k_ip.weight`, `to_v_ip.weight`. Sources of the others:
tencent-ailab/IP-Adapter, tutorial_train.py (`image_proj_model`, `adapter_modules` and `unet` side by side; accelerate's
safetensors keep one name of a shared tensor, the UNet's); diffusers, models/embeddings.py and attention_processor.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .weights import one_line

Shapes = Mapping[str, tuple[int, ...]]
PROJECTION, ATTENTION = "image_proj.", "ip_adapter."

# what DataParallel, torch.compile and FSDP put between the names of modules
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module"}
_PROJECTION = re.compile(r"(?:^|\.)(?:image_proj|image_proj_model|encoder_hid_proj\.image_projection_layers\.0)\.(.+)")
_NUMBERED = re.compile(r"(?:^|\.)(?:ip_adapter|adapter_modules)\.(\d{1,4})\.(.+)")
_PROCESSOR = re.compile(
    r"(?:^|\.)(down_blocks|up_blocks|mid_block)\.((?:\w+\.)*?)attentions\.(\d{1,4})\.transformer_blocks\.(\d{1,4})"
    r"\.attn([12])\.processor\.(.+)"
)
_ORDER = ("down_blocks", "up_blocks", "mid_block")  # diffusers' UNet2DConditionModel.attn_processors
_OTHER = re.compile(r"(?:^|\.)ip_adapter\.(?!unet\.)(.+)")
_IN_A_LIST = re.compile(r"^(to_[kv]_ip)\.0\.")  # diffusers keeps a list, one for each adapter
_DIFFUSERS_PROJECTION = (
    (r"^image_embeds\.", "proj."),
    (r"^layers\.(\d+)\.ln0\.", r"layers.\1.0.norm1."),
    (r"^layers\.(\d+)\.ln1\.", r"layers.\1.0.norm2."),
    (r"^layers\.(\d+)\.attn\.to_out\.0\.", r"layers.\1.0.to_out."),
    (r"^layers\.(\d+)\.attn\.", r"layers.\1.0."),
    (r"^layers\.(\d+)\.ff\.0\.", r"layers.\1.1.0."),
    (r"^layers\.(\d+)\.ff\.1\.net\.0\.proj\.", r"layers.\1.1.1."),
    (r"^layers\.(\d+)\.ff\.1\.net\.2\.", r"layers.\1.1.3."),
)
_DIFFUSERS_FULL = ((r"^ff\.net\.0\.proj\.", "proj.0."), (r"^ff\.net\.2\.", "proj.2."), (r"^norm\.", "proj.3."))


class Unsupported(ValueError):
    """A whole file, but of a kind that FlexIP does not run."""


@dataclass(frozen=True)
class Unwrapped:
    """`names`: published name -> the file's key. `wrapping` is "" for a published file, otherwise a description for people."""

    names: dict[str, str]
    wrapping: str


def unwrap(keys: Iterable[str]) -> Unwrapped:
    """The tensors of an IP-Adapter among `keys`; no names where there is none. Unsupported if a file holds several."""
    plain = {key: ".".join(part for part in key.split(".") if part not in _WRAPPERS) for key in keys}
    projection = {key: match[1] for key, name in plain.items() if (match := _PROJECTION.search(name))}
    rules = _DIFFUSERS_PROJECTION
    if any(name.startswith("ff.net.") for name in projection.values()):
        rules += _DIFFUSERS_FULL
    parts = [{key: PROJECTION + _rewritten(name, rules) for key, name in projection.items()}]
    rest = {key: name for key, name in plain.items() if key not in projection}
    numbered = {key: match.groups() for key, name in rest.items() if (match := _NUMBERED.search(name))}
    parts.append({key: _attention(number, name) for key, (number, name) in numbered.items()})
    parts.append(_by_block({key: name for key, name in rest.items() if key not in numbered}))
    taken = {key for part in parts for key in part}
    others = {key: _OTHER.search(name) for key, name in rest.items() if key not in taken}
    parts.append({key: ATTENTION + match[1] for key, match in others.items() if match})

    names: dict[str, str] = {}
    for part in parts:
        found: dict[str, str] = {}
        for key, name in part.items():
            if name in found:
                two = " and ".join(one_line(one, 80) for one in (found[name], key))
                raise Unsupported(f"holds more than one IP-Adapter ({two}); save one in a file")
            found[name] = key
        names = found | names  # the same tensor under the UNet's name: that of the list counts
    return Unwrapped(names, _words(plain) if any(name != key for name, key in names.items()) else "")


def _attention(number: int | str, name: str) -> str:
    return f"{ATTENTION}{number}." + _IN_A_LIST.sub(r"\1.", name)


def _rewritten(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def _by_block(names: Mapping[str, str]) -> dict[str, str]:
    """Key -> published name for the UNet's own names; they give every block, so their order gives the numbers."""
    found = {key: match for key, name in names.items() if (match := _PROCESSOR.search(name))}

    def place(match: re.Match) -> tuple:
        kind, inside, attention, layer = match.groups()[:4]
        return (
            _ORDER.index(kind),
            [int(part) for part in inside.split(".") if part.isdigit()],
            int(attention),
            int(layer),
        )

    blocks: list[tuple] = []
    for block in sorted(map(place, found.values())):
        if block not in blocks:
            blocks.append(block)
    return {
        key: _attention(2 * blocks.index(place(match)) + (match[5] == "2"), match[6]) for key, match in found.items()
    }


def _words(plain: Mapping[str, str]) -> str:
    """`plain`: key -> the key without wrappers."""
    names = " ".join(plain.values())
    if "adapter_modules." in names or "image_proj_model." in names:
        return "a training checkpoint"
    if "image_projection_layers." in names or ".processor." in names:
        return "diffusers' names"
    return "a wrapped file"


def check_all_used(unwrapped: Unwrapped, used: Iterable[str]) -> None:
    """Every tensor of the attention part must be one of `used`: what is left out would change the pictures."""
    left = sorted(name for name in unwrapped.names.keys() - set(used) if name.startswith(ATTENTION))
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise Unsupported(
            f"has the tensor {one_line(unwrapped.names[left[0]], 160)}{more} in its attention part, which FlexIP does not use, so "
            "its pictures would differ from those that it was trained for"
        )


def check_not_empty(unwrapped: Unwrapped, keys: Iterable[str]) -> None:
    """For a file without any to_k_ip: if it holds nothing else, it is an IP-Adapter whose conversion failed."""
    taken = set(unwrapped.names.values())
    if taken and all(key in taken or key.startswith(("unet.", "module.unet.")) for key in keys):
        raise Unsupported(
            "has the image projection of an IP-Adapter, but its ip_adapter part is empty: no to_k_ip and to_v_ip are in it. "
            "Convert the training checkpoint again, or choose that checkpoint itself"
        )


def foreign(shapes: Shapes, unwrapped: Unwrapped) -> str | None:
    """What a file is that looks like an IP-Adapter but needs another pack. The face embedding of insightface is 512 wide."""
    named = {name: shapes[key] for name, key in unwrapped.names.items()}
    if named.get("image_proj.proj_in.weight", (0, 0))[1] == 512:
        return "is an InstantID adapter: it reads a face recognition embedding; ComfyUI_InstantID runs it"
    if (
        any("_lora." in name for name in named)
        and any(name.endswith("to_k_ip.weight") for name in named)
        or "image_proj.perceiver_resampler.proj_in.weight" in named
        or named.get("image_proj.proj.0.weight", (0, 0))[1] == 512
    ):
        return "is a FaceID adapter: it reads a face recognition embedding, which only packs with insightface make; ComfyUI_IPAdapter_plus runs it"
    if _is_face_lora(shapes):
        return (
            "looks like the LoRA of a FaceID adapter, which is no adapter by itself: it goes into models/loras, and "
            "ComfyUI_IPAdapter_plus runs the FaceID adapter that it belongs to"
        )
    # MS-Diffusion: msdiffusion/models/projection.py and model.py; CSGO: ip_adapter/ip_adapter.py, load_ip_adapter
    if named.keys() & {"image_proj.grounding_latents", "image_proj.latent_proj.0.weight"} or any(
        key.split(".")[-1] == "dummy_image_tokens" for key in shapes
    ):
        return (
            "is an MS-Diffusion adapter: it reads boxes and phrases beside the pictures; ComfyUI_StoryDiffusion runs it"
        )
    if any(key.startswith(("content_image_proj", "style_image_proj")) for key in shapes):
        return "is a CSGO adapter: it has one projection for content and one for style; ComfyUI_CSGO_Wrapper runs it"
    if named.get("image_proj.latents", (0, 0, 0))[2] == 2048:
        return "is an IP-Adapter for Kolors; ComfyUI_IPAdapter_plus runs it"
    if any("double_blocks." in key or key.startswith("ip_adapter_proj_model.") for key in shapes) or any(
        name.endswith("to_k_ip.weight") and shape[0] == 3072 for name, shape in named.items()
    ):
        return "is an IP-Adapter for Flux; x-flux-comfyui (XLabs) or ComfyUI-IPAdapter-Flux (InstantX) runs it"
    return None


_FACE_LORA = re.compile(
    r"attn[12](?:_|\.|\.processor\.)to_(?:q|k|v|out(?:[_.]0)?)(?:_lora)?[._](?:lora[._])?(down|up)\.weight$"
)


def _is_face_lora(shapes: Shapes) -> bool:
    """FaceID's LoRAs have rank 128 on every projection of every attention, and nothing else."""
    tensors = {key: shape for key, shape in shapes.items() if not key.endswith("alpha")}
    ranks = {
        shape[0] if match[1] == "down" else shape[-1]
        for key, shape in tensors.items()
        if shape and (match := _FACE_LORA.search(key))
    }
    return ranks == {128} and all(_FACE_LORA.search(key) for key in tensors)
