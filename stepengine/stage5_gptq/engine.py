"""Stage 5: GPTQ. One thing changes: what the decoder's matrix products hold."""

from dataclasses import replace

from stepengine.stage4_chunked_prefix import engine as stage4
from stepengine.stage5_gptq.loader import load_quantized

PARTS = replace(stage4.PARTS, prepare_model=load_quantized)
