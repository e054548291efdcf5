"""Several prompts, several seeds each, with the recipe of every picture: python examples/many.py [MODEL]."""

import sys

from zimage import ZImagePipeline

pipe = ZImagePipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "turbo")
out = pipe(["a red fox in snow", "雪地里的红狐狸"], num_images_per_prompt=2, height=512, width=512, seed=10)
for image, request in zip(out.images, out.requests, strict=True):
    path = f"{request.seed}.png"
    image.save(path)
    print(path, request.prompt, "seed", request.seed, "steps", request.num_inference_steps)
