"""Use zimage on a pipeline that diffusers loaded, without a second copy: python examples/from_diffusers.py [MODEL]."""

import sys

import torch
from diffusers import ZImagePipeline as DiffusersPipeline

from zimage import ZImagePipeline

model = sys.argv[1] if len(sys.argv) > 1 else "Tongyi-MAI/Z-Image-Turbo"
theirs = DiffusersPipeline.from_pretrained(model, dtype=torch.bfloat16)
pipe = ZImagePipeline.from_diffusers(theirs)
pipe("a red fox in snow", height=512, width=512, seed=7).images[0].save("fox.png")
