"""Room: GS-LoRA and GS-LoRA++."""

from maskwright.updates.gs_lora.forget import Forgotten as Forgotten
from maskwright.updates.gs_lora.forget import forget as forget
from maskwright.updates.gs_lora.losses import harmonic as harmonic
from maskwright.updates.gs_lora.losses import prototypes as prototypes
from maskwright.updates.gs_lora.method import GsLora as GsLora
