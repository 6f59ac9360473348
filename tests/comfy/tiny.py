"""A small SD1.5-class model straight from ComfyUI's own classes, a small FlexIP network for it, and a naive reference.

The naive reference knows nothing of tags, runs or caches: at every call of every block it finds out from the projected keys
which text a row carries, recomputes tokens, K and V, and does both softmaxes by hand.
"""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from flexip_pack.flexip_core.network.adapters import FlexIPNetwork
from flexip_pack.flexip_core.network.blocks import block_of, block_widths, cross_attentions
from flexip_pack.flexip_core.network.config import ClipConfig, DinoConfig, FlexIPConfig, ResamplerConfig
from flexip_pack.flexip_core.run.chain import Link
from flexip_pack.flexip_core.run.reference import Reference

TEXT_WIDTH = 64
CPU = torch.device("cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_model(
    dtype: torch.dtype = torch.float32, seed: int = 0, compute: torch.dtype | None = None, heads: int = 8, **layout: Any
) -> comfy.model_patcher.ModelPatcher:
    """`compute`: another dtype to calculate in than the weights are stored in. `layout`: other values for the UNet's config."""
    config = comfy.supported_models.SD15(
        dict(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            num_res_blocks=[1, 1],
            channel_mult=[1, 2],
            transformer_depth=[1, 2],
            transformer_depth_middle=1,
            transformer_depth_output=[2, 1, 1, 1],
            context_dim=TEXT_WIDTH,
            use_linear_in_transformer=False,
            adm_in_channels=None,
            use_spatial_transformer=True,
            legacy=False,
            use_temporal_attention=False,
            dtype=dtype,
        )
        | layout
    )
    config.unet_config["num_heads"] = heads
    config.set_inference_dtype(dtype, compute)
    model = config.get_model({}, "", device=CPU)
    g = generator(seed)
    with torch.no_grad():
        for name, p in model.diffusion_model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=g) * 0.5 / p[0].numel() ** 0.5)
            else:
                p.fill_(float(name.endswith("weight")))
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def config_for(model: comfy.model_patcher.ModelPatcher, mode: str = "outputs") -> FlexIPConfig:
    widths, text_width = block_widths(model.model.diffusion_model)
    return FlexIPConfig(
        base="tiny",
        text_width=text_width,
        blocks=widths,
        gate_mode=mode,
        clip=ClipConfig("tiny", 24),
        dino=DinoConfig("tiny", 40, 56),
        resampler=ResamplerConfig(width=32, depth=2, heads=2, dim_head=16, ff_mult=2),
        detail_tokens=5,
        semantic_tokens=2,
        cls_tokens=3,
    )


def tiny_network(model: comfy.model_patcher.ModelPatcher, mode: str = "outputs", seed: int = 3) -> FlexIPNetwork:
    network = FlexIPNetwork(config_for(model, mode))
    g = generator(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(
                torch.randn(p.shape, generator=g) * (0.7 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.5)
                + (p.dim() == 1) * 0.5
            )
    return network.eval().requires_grad_(False)


def tiny_reference(seed: int = 9, pictures: int = 1) -> Reference:
    g = generator(seed)
    features = {"cls": torch.randn(pictures, 24, generator=g), "patches": torch.randn(pictures, 16, 40, generator=g)}
    return Reference(features, {name: torch.zeros_like(value) for name, value in features.items()}, "tiny encoders")


def link_for(network: FlexIPNetwork, reference: Reference, gate: float | tuple[float, ...] = 0.6, **kwargs) -> Link:
    if not hasattr(network, "test_patcher"):  # one patcher per network, as the loader makes it
        network.test_patcher = comfy.model_patcher.ModelPatcher(network, load_device=CPU, offload_device=CPU)
    patcher = network.test_patcher
    return Link(network, patcher, reference, gate if isinstance(gate, tuple) else (gate,), **kwargs)


def cond(seed: int, tokens: int = 77, batch: int = 1, **extra) -> list:
    return [[torch.randn(batch, tokens, TEXT_WIDTH, generator=generator(seed)), dict(extra)]]


def noise_for(batch: int = 1, height: int = 8, width: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, height, width, generator=generator(seed))


def ksample(
    model,
    positive,
    negative,
    steps: int = 2,
    cfg: float = 7.0,
    noise: torch.Tensor | None = None,
    sampler: str = "euler",
    seed: int = 0,
    mask: torch.Tensor | None = None,
    latent: torch.Tensor | None = None,
    callback=None,
    denoise: float = 1.0,
) -> torch.Tensor:
    noise = noise_for() if noise is None else noise
    latent = torch.zeros_like(noise) if latent is None else latent
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        "normal",
        positive,
        negative,
        latent,
        denoise=denoise,
        disable_pbar=True,
        seed=seed,
        noise_mask=mask,
        callback=callback,
    )


def guide(guider, steps: int = 2, noise: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    noise = noise_for() if noise is None else noise
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", steps)
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=seed
    )


class NaiveBlock:
    """attn2 replacement of one block: base + strength * (gate * Attn(preservation) + (1 - gate) * Attn(personalization))."""

    def __init__(
        self,
        address: str,
        attn2: torch.nn.Module,
        links: list[Link],
        texts: list[tuple[torch.Tensor, bool]],
        previous=None,
    ):
        self.address, self.attn2, self.links, self.texts, self.previous = address, attn2, links, texts, previous

    def __call__(self, q, k, v, extra_options):
        heads = extra_options["n_heads"]
        if self.previous:
            out = self.previous(q, k, v, extra_options)
        else:
            out = comfy.ldm.modules.attention.optimized_attention(q, k, v, heads)
        sigma = float(extra_options["sigmas"][0])
        chunk = q.shape[0] // len(extra_options["cond_or_uncond"])
        added = torch.zeros_like(out)
        for row in range(q.shape[0]):
            text, null = self.match(k[row], row % chunk)
            for link, (first, last) in self.links:
                if last <= sigma <= first:
                    gate = link.gates[row % chunk % len(link.gates)]
                    added[row] += naive_addition(link, self.address, q[row], heads, text, null, gate)
        return out + added

    def match(self, key: torch.Tensor, row: int) -> tuple[torch.Tensor, bool]:
        for text, null in self.texts:
            own = text[row % text.shape[0]]
            if key.shape[0] % own.shape[0] == 0 and torch.allclose(
                self.attn2.to_k(own), key[: own.shape[0]], atol=1e-4
            ):
                return own, null
        raise AssertionError("a row carries a text that the test did not declare")


def naive_addition(
    link: Link, address: str, q: torch.Tensor, heads: int, text: torch.Tensor, null: bool, gate: float
) -> torch.Tensor:
    """q (n, c) of one row -> what FlexIP adds to it, everything recomputed."""
    network, features = link.network, link.reference.null if null else link.reference.features
    tokens = {name: network.tokens(name, features, text[None])[0] for name in network.adapters}
    kv = {name: network.projection(address, name) for name in network.adapters}
    k = {name: tokens[name] @ kv[name].to_k.weight.T for name in tokens}
    v = {name: tokens[name] @ kv[name].to_v.weight.T for name in tokens}
    if network.gate_mode == "outputs":
        return link.strength * (
            gate * naive_softmax(q, k["preservation"], v["preservation"], heads)
            + (1 - gate) * naive_softmax(q, k["personalization"], v["personalization"], heads)
        )
    scales = (("preservation", gate), ("personalization", 1 - gate))
    return link.strength * naive_softmax(
        q, torch.cat([g * k[n] for n, g in scales]), torch.cat([g * v[n] for n, g in scales]), heads
    )


def naive_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    d = q.shape[1] // heads
    out = torch.empty_like(q)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        out[:, part] = torch.softmax(q[:, part] @ k[:, part].T / d**0.5, dim=1) @ v[:, part]
    return out


def naive_attach(model, links: list[Link], texts: list[tuple[torch.Tensor, bool]]):
    """`texts`: every text of the run with whether it is to get the null reference."""
    model = model.clone()
    sampling = model.get_model_object("model_sampling")
    windowed = [
        (link, (sampling.percent_to_sigma(link.start_percent), sampling.percent_to_sigma(link.end_percent)))
        for link in links
    ]
    slots = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for address, attn2 in cross_attentions(model.model.diffusion_model).items():
        kind, number, index = block_of(address)
        previous = slots.get((kind, number, index), slots.get((kind, number)))
        model.set_model_attn2_replace(
            NaiveBlock(address, attn2, windowed, texts, previous), kind, number, transformer_index=index
        )
    return model


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()
