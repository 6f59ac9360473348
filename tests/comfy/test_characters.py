"""The base of the characters in ComfyUI's own classes."""

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import comfy.utils
import torch
from flexip_pack.flexip_core.characters import architecture, base
from flexip_pack.flexip_core.training.losses import stable_diffusion_schedule


class Config(comfy.supported_models.SD15):
    unet_config = architecture.COMFYUI_UNET
    unet_extra_config = {"num_heads": architecture.HEADS, "num_head_channels": -1}
    latent_format = comfy.latent_formats.LatentFormat
    supported_inference_dtypes = [torch.float32]

    def inpaint_model(self):
        return False

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION


def test_comfyui_computes_the_same_v_and_has_the_same_schedule():
    config = Config(architecture.COMFYUI_UNET)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    generator = base.new_generator(0).eval()
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    tensors = generator.unet.state_dict()
    model.diffusion_model.load_state_dict({names[key]: value for key, value in tensors.items()})
    latents, times = base.noise_for(2, 0), torch.tensor([10, 900])
    with torch.no_grad():
        tokens = generator.text(torch.ones(2, 12, dtype=torch.long))
        ours = generator(latents, times, tokens)
        theirs = model.diffusion_model(latents, times, context=tokens)
    assert ours.std() > 0.1 and torch.allclose(theirs, ours, atol=1e-5)
    kept = 1 / (1 + model.model_sampling.sigmas.square())
    assert torch.allclose(kept, stable_diffusion_schedule().float(), rtol=1e-4)
