"""A sheet of pictures by the small model that comes along, nothing to download: python examples/shapes.py [MODEL]."""

import sys

from PIL import Image

from zimage import ZImagePipeline

CAPTIONS = [
    "a large red circle on a white background",
    "a blue star left of a yellow ring",
    "a small green triangle inside a pink square",
    "a purple square above an orange star",
    "绿色的五角星在青色的圆环上面",
    "红色的三角形在蓝色的圆形左边",
]
EACH = 2

pipe = ZImagePipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "demo")
images = pipe(CAPTIONS, num_images_per_prompt=EACH, seed=1).images
width, height = images[0].size
sheet = Image.new("RGB", (width * len(CAPTIONS), height * EACH))
for place, image in enumerate(images):
    column, row = divmod(place, EACH)
    sheet.paste(image, (column * width, row * height))
sheet.save("shapes.png")
