"""The two templates for public IP-Adapter files: the page lists what is missing, and where it can be had."""

from __future__ import annotations

from template_parts import NARROW, RESULT, Files, Template, note

HUB = "https://huggingface.co"
ADAPTERS = f"{HUB}/h94/IP-Adapter/resolve/main"
CHECKPOINTS = {
    "v1-5-pruned-emaonly-fp16.safetensors": f"{HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main",
    "sd_xl_base_1.0.safetensors": f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main",
}
ENCODER = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"  # the name that IP-Adapter packs agreed on
ENCODER_URL = f"{ADAPTERS}/models/image_encoder/model.safetensors"
PORTRAIT = "a portrait in a sunlit garden, oil painting"


def with_ip_adapter_sd15() -> Template:
    return pair(
        "sd15",
        "an SD1.5 checkpoint",
        "v1-5-pruned-emaonly-fp16.safetensors",
        512,
        "models",
        ("ip-adapter-plus_sd15.safetensors", "ip-adapter_sd15.safetensors"),
    )


def with_ip_adapter_sdxl() -> Template:
    return pair(
        "sdxl",
        "an SDXL checkpoint",
        "sd_xl_base_1.0.safetensors",
        1024,
        "sdxl_models",
        ("ip-adapter-plus_sdxl_vit-h.safetensors", "ip-adapter_sdxl_vit-h.safetensors"),
    )


def pair(name: str, what: str, checkpoint: str, size: int, folder: str, files: tuple[str, str]) -> Template:
    base = Files(checkpoint, preservation=files[0], personalization=files[1], clip_vision=ENCODER)
    base.size = size
    base.checkpoint.models = [model(checkpoint, f"{CHECKPOINTS[checkpoint]}/{checkpoint}", "checkpoints")]
    base.loader.models = [
        *(model(file, f"{ADAPTERS}/{folder}/{file}", "ipadapter") for file in files),
        model(ENCODER, ENCODER_URL, "clip_vision"),
    ]
    picture, latent = base.picture(), base.latent()
    prompt, negative = base.prompt(PORTRAIT), base.negative()
    encode = base.encode(picture[0])
    apply = base.apply(encode[0])
    sample = base.sampler(apply, prompt, negative, latent)
    read_me = note(
        "FlexIP with IP-Adapter files",
        "Two public IP-Adapter files as the two adapters: the first keeps the subject (preservation), the second leaves room for "
        "the prompt (personalization).\n\n"
        "**Turn** gate of *Apply FlexIP Gate*. 1: only the first file. 0: only the second. Between: both, weighed.\n\n"
        "**Choose** the composition or the plus-face adapter in place of the second file, or *auto* for none.",
        640,
        f"""
| file | folder |
| --- | --- |
| {what}, such as {checkpoint} | models/checkpoints |
| {files[0]} | models/ipadapter |
| {files[1]} | models/ipadapter |
| {ENCODER} (CLIP ViT-H/14, 2.5 GB) | models/clip_vision |

The last three come from [h94/IP-Adapter]({HUB}/h94/IP-Adapter). The encoder is called [model.safetensors]({ENCODER_URL}) there: give it the name above. Do you have it under another name? Choose that, or *auto* at clip_vision (one of the advanced inputs): files are recognised by their contents.""",
    )
    return Template(
        [
            (NARROW, [base.checkpoint, base.loader, picture]),
            (NARROW, [prompt, negative, latent, encode]),
            (NARROW, [apply, sample]),
            (RESULT, [*base.result(sample[0], f"ip_adapter_{name}", 320), read_me]),
        ]
    )


def model(name: str, url: str, directory: str) -> dict[str, str]:
    """As the page reads it from a node's properties."""
    return {"name": name, "url": url, "directory": directory}
