"""What a Stable Diffusion checkpoint in ComfyUI's (LDM's) layout contains, told from names and shapes alone, in the words of
diffusers and transformers. Nothing is looked up by a file's name and nothing is downloaded.

Read from the shapes: widths, levels, residual blocks, transformer layers, text width, the layers of text encoders and VAE.
NOT in the shapes, so decided here for the two families, which are told apart by SDXL's `label_emb`:

    what                             SD1.5                          SDXL
    heads of the UNet                8 in every block               64 channels each
    latent scale                     0.18215                        0.13025
    noise schedule, prediction       scaled linear, 1000, noise     the same
                                     (a file that carries "v_pred", or says "v" in modelspec.prediction_type, predicts v; with "ztsnr"
                                     its last timestep is pure noise, both as in ComfyUI's supported_models.py)
    heads of the text encoders       64 channels each               64 channels each
    activation of the text encoders  QuickGELU (CLIP-L)             QuickGELU (CLIP-L), GELU (OpenCLIP bigG)
    layer that is read               the last one, normed           the last but one of both, not normed
    padding of the tokens            end token                      end token (CLIP-L), 0 (bigG)

The latter three are as in ComfyUI's comfy/sd1_clip.py and comfy/sdxl_clip.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..encoders.text_tower import HEAD_WIDTH, VOCABULARY
from ..files.weights import Header, name_of, read_header

Shapes = Mapping[str, tuple[int, ...]]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
END_TOKEN = 49407
LATENT_CHANNELS = 4
SIDE = 8  # pixels of a latent's side
SD15_HEADS, SDXL_HEAD_WIDTH = 8, 64
_BY_FAMILY = {"SD1.5": 0.18215, "SDXL": 0.13025}  # latent scale
_CHOOSE = "choose a full SD1.5 or SDXL checkpoint"


@dataclass(frozen=True)
class TextEncoder:
    """`layout`: "transformers" (CLIP-L) or "open_clip" (bigG); `config`: arguments of transformers' CLIPTextConfig."""

    prefix: str  # before the encoder's keys
    layout: str
    config: dict[str, Any]
    padding: int
    projected: bool  # has a projection, whose output is SDXL's pooled text


@dataclass(frozen=True)
class Checkpoint:
    """All that is known before a tensor is read."""

    path: Path
    family: str  # "SD1.5" or "SDXL"
    unet: dict[str, Any]  # arguments of diffusers' UNet2DConditionModel
    texts: tuple[TextEncoder, ...]
    vae: dict[str, Any]  # arguments of diffusers' AutoencoderKL, or of AutoencoderTiny
    tiny_vae: bool
    latent_scale: float
    prediction: str  # "epsilon" (the noise) or "v"
    zero_snr: bool  # the last timestep is pure noise
    shapes: Shapes

    def keys(self, prefix: str) -> list[str]:
        return [key for key in self.shapes if key.startswith(prefix)]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """ValueError, one sentence naming the file, for anything that cannot be trained on."""
    header = read_header(path)
    try:
        return _describe(header)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{name_of(path)} looks like Stable Diffusion but lacks the tensor {error.args[0]!r}; {_CHOOSE}."
        ) from None
    except ValueError as error:
        raise ValueError(f"{name_of(path)} {error}.") from None


def _describe(header: Header) -> Checkpoint:
    shapes = header.shapes
    if f"{UNET}input_blocks.0.0.weight" not in shapes:
        raise ValueError(f"is not a Stable Diffusion checkpoint in ComfyUI's layout;  {_CHOOSE}")
    family = _family(header)
    texts = _texts(shapes, family)
    unet = _unet(shapes, family)
    width = sum(text.config["hidden_size"] for text in texts)
    if unet["cross_attention_dim"] != width:
        raise ValueError(
            f"has a UNet that reads text of width {unet['cross_attention_dim']}, but its text encoders give {width}; {_CHOOSE}"
        )
    vae, tiny = _vae(shapes)
    return Checkpoint(header.path, family, unet, texts, vae, tiny, _BY_FAMILY[family], *prediction(header), shapes)


def prediction(header: Header) -> tuple[str, bool]:
    """What the file says that its UNet predicts, "epsilon" or "v", and whether its last timestep is pure noise."""
    velocity = "v_pred" in header.shapes or header.metadata.get("modelspec.prediction_type") == "v"
    return ("v" if velocity else "epsilon"), velocity and "ztsnr" in header.shapes


def _family(header: Header) -> str:
    shapes = header.shapes
    channels = shapes[f"{UNET}input_blocks.0.0.weight"][1]
    if channels == 9:
        raise ValueError(
            "is an inpainting model (9 input channels), but adapters are trained on the plain one; " + _CHOOSE
        )
    if channels != LATENT_CHANNELS:
        raise ValueError(f"has a UNet with {channels} input channels instead of {LATENT_CHANNELS}; {_CHOOSE}")
    if "edm_vpred.sigma_max" in shapes:
        raise ValueError(f"has EDM's noise schedule, which the trainer does not know; {_CHOOSE}")
    if "edm_mean" in shapes:
        raise ValueError(f"is a Playground model with a noise schedule of its own; {_CHOOSE}")
    if f"{UNET}label_emb.0.0.weight" not in shapes:
        if any(key.startswith("cond_stage_model.model.") for key in shapes):
            raise ValueError(f"is a Stable Diffusion 2, which is not supported; {_CHOOSE}")
        return "SD1.5"
    if not any(key.startswith("conditioner.embedders.1.") for key in shapes) and any(
        key.startswith("conditioner.embedders.0.model.") for key in shapes
    ):
        raise ValueError("is the SDXL refiner, but adapters are trained on the SDXL base; choose that")
    return "SDXL"


# --- UNet


def _unet(shapes: Shapes, family: str) -> dict[str, Any]:
    levels = _levels(shapes)
    widths, depths = [level[0][0] for level in levels], [level[0][1] for level in levels]
    layers = len(levels[0])
    middle = _depth(shapes, f"{UNET}middle_block.1.")
    # diffusers gives the middle the depth of the last level that has any; the way up mirrors the way down
    expected = [[pair] * layers for pair in zip(widths, depths)]
    outputs = [depth for depth in reversed(depths) for _ in range(layers + 1)]
    found = [_depth(shapes, f"{UNET}output_blocks.{n}.1.") for n in range(_count(shapes, f"{UNET}output_blocks."))]
    deepest = next((depth for depth in reversed(depths) if depth), 0)
    if levels != expected or found != outputs or not middle or (depths[-1] or deepest) != middle:
        raise ValueError(
            "has a UNet whose blocks are not laid out evenly, as a pruned or distilled model's are, which diffusers' UNet "
            f"cannot hold; {_CHOOSE}"
        )
    text = shapes[next(key for key in shapes if key.startswith(UNET) and key.endswith(".attn2.to_k.weight"))][1]
    heads = SD15_HEADS if family == "SD1.5" else tuple(width // SDXL_HEAD_WIDTH for width in widths)
    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths)
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths))
    config = {
        "in_channels": LATENT_CHANNELS,
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "transformer_layers_per_block": tuple(depth or middle for depth in depths),
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": heads,  # diffusers' name for the NUMBER of heads
        "cross_attention_dim": text,
        "use_linear_projection": len(shapes[f"{UNET}middle_block.1.proj_in.weight"]) == 2,
    }
    if family == "SDXL":
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes[f"{UNET}label_emb.0.0.weight"][1],
        }
    return config


def _levels(shapes: Shapes) -> list[list[tuple[int, int]]]:
    """Per level (width, transformer layers) of each residual block on the way down."""
    levels: list[list[tuple[int, int]]] = [[]]
    for number in range(1, _count(shapes, f"{UNET}input_blocks.")):
        block = f"{UNET}input_blocks.{number}."
        if f"{block}0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append((shapes[f"{block}0.out_layers.3.weight"][0], _depth(shapes, f"{block}1.")))
    return levels


def _depth(shapes: Shapes, transformer: str) -> int:
    return _count(shapes, f"{transformer}transformer_blocks.")


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow the prefix, which must count from 0."""
    return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})


# --- text encoders


def _texts(shapes: Shapes, family: str) -> tuple[TextEncoder, ...]:
    if family == "SD1.5":
        return (_transformers_text(shapes, "cond_stage_model.transformer."),)
    return (
        _transformers_text(shapes, "conditioner.embedders.0.transformer."),
        _open_clip_text(shapes, "conditioner.embedders.1.model."),
    )


def _transformers_text(shapes: Shapes, prefix: str) -> TextEncoder:
    """CLIP-L, under the names of Hugging Face transformers; old files leave "text_model." out."""
    _need_text(shapes, prefix)
    inner = f"{prefix}text_model." if any(key.startswith(f"{prefix}text_model.") for key in shapes) else prefix
    config = _text_config(
        shapes[f"{inner}embeddings.token_embedding.weight"],
        shapes[f"{inner}embeddings.position_embedding.weight"][0],
        _count(shapes, f"{inner}encoder.layers."),
        shapes[f"{inner}encoder.layers.0.mlp.fc1.weight"][0],
    )
    return TextEncoder(prefix, "transformers", {**config, "hidden_act": "quick_gelu"}, END_TOKEN, projected=False)


def _open_clip_text(shapes: Shapes, prefix: str) -> TextEncoder:
    _need_text(shapes, prefix)
    config = _text_config(
        shapes[f"{prefix}token_embedding.weight"],
        shapes[f"{prefix}positional_embedding"][0],
        _count(shapes, f"{prefix}transformer.resblocks."),
        shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0],
    )
    config |= {"hidden_act": "gelu", "projection_dim": shapes[f"{prefix}text_projection"][1]}
    return TextEncoder(prefix, "open_clip", config, padding=0, projected=True)


def _need_text(shapes: Shapes, prefix: str) -> None:
    if not any(key.startswith(prefix) for key in shapes):
        raise ValueError(f"holds no text encoder ({prefix}...); choose a checkpoint with UNet, text encoder and VAE")


def _text_config(embedding: tuple[int, ...], positions: int, layers: int, mlp: int) -> dict[str, Any]:
    words, width = embedding
    if words != VOCABULARY or width % HEAD_WIDTH:
        raise ValueError(f"has a text encoder for {words} tokens, {width} wide, which is not CLIP's; {_CHOOSE}")
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": positions,
        "bos_token_id": END_TOKEN - 1,
        "eos_token_id": END_TOKEN,
    }


# --- VAE


def _vae(shapes: Shapes) -> tuple[dict[str, Any], bool]:
    if f"{VAE}taesd_encoder.0.weight" in shapes:
        width = shapes[f"{VAE}taesd_encoder.0.weight"][0]
        return {"encoder_block_out_channels": (width,) * 4, "decoder_block_out_channels": (width,) * 4}, True
    if f"{VAE}encoder.conv_in.weight" not in shapes:
        raise ValueError("holds no VAE; choose a checkpoint with UNet, text encoder and VAE")
    down = re.compile(re.escape(f"{VAE}encoder.down.") + r"(\d+)\.block\.(\d+)\.conv2\.weight")
    blocks = {tuple(map(int, match.groups())): shapes[key][0] for key in shapes if (match := down.fullmatch(key))}
    levels = max(level for level, _ in blocks) + 1
    return {
        "block_out_channels": tuple(blocks[level, 0] for level in range(levels)),
        "layers_per_block": max(number for _, number in blocks) + 1,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": shapes[f"{VAE}post_quant_conv.weight"][1],
    }, False
