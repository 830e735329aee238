"""The methods by name: what a recipe's `method: {name: ...}` and a saved adapter's lorakit.json may say."""

from lorakit.attach.method import Method
from lorakit.methods.adapter_drop import AdapterDrop
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import FullFineTuning
from lorakit.methods.houlsby import HoulsbyAdapter
from lorakit.methods.lin import LinAdapter
from lorakit.methods.lora import LoRA
from lorakit.methods.p_tuning import PTuning
from lorakit.methods.pfeiffer import PfeifferAdapter
from lorakit.methods.prefix_tuning import PrefixTuning
from lorakit.methods.prompt_embedding import PromptEmbedding
from lorakit.methods.prompt_tuning import PromptTuning
from lorakit.methods.residual_adapter import ResidualAdapter
from lorakit.methods.warp import Warp

ALL: tuple[type[Method], ...] = (
    LoRA,
    FullFineTuning,
    BitFit,
    HoulsbyAdapter,
    LinAdapter,
    PfeifferAdapter,
    AdapterDrop,
    ResidualAdapter,
    PrefixTuning,
    PromptEmbedding,
    PromptTuning,
    PTuning,
    Warp,
)
METHODS: dict[str, type[Method]] = {one.name: one for one in ALL}
