"""What can be known to be wrong with a text-to-image recipe before anything loads."""

from lorakit.errors import RecipeError
from lorakit.methods.lora import LoRA
from lorakit.run.diffusion.config import TEXT_TO_IMAGE
from lorakit.run.recipe import Recipe

NO_PLACE = ("bias", "modules_to_save", "use_dora", "lora_bias", "target_parameters", "trainable_token_indices")
"""Fields of LoRA that add tensors for which pytorch_lora_weights.safetensors has no keys."""


def check_text_to_image(recipe: Recipe) -> None:
    """Raise RecipeError for settings that would do nothing here, and for an adapter that diffusers' file cannot hold."""
    data, method = recipe.data, recipe.method
    faults = []
    if data.format not in ("auto", "imagefolder"):
        faults.append(f"data.format: expected imagefolder, got {data.format!r}")
    if recipe.evaluate.metrics is not None:
        faults.append(f"evaluate.metrics: {TEXT_TO_IMAGE} is measured by its loss; leave it out")
    if recipe.train.label_smoothing:
        faults.append("train.label_smoothing needs classes; leave it out")
    if recipe.base.quantize is not None:
        faults.append("base.quantize: not supported for a denoiser; leave it out")
    if not isinstance(method, LoRA):
        faults.append(f"method: expected lora, got {method.name}")
    else:
        foreign = [key for key in NO_PLACE if getattr(method, key) != getattr(LoRA(), key)]
        faults += [f"method.{key} has no place in diffusers' file of an adapter; leave it out" for key in foreign]
    if faults:
        raise RecipeError(f"{TEXT_TO_IMAGE} cannot be run like this:\n" + "\n".join(f"  - {fault}" for fault in faults))
