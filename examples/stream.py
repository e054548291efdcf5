"""Show each step of a picture as it is made, and stop after a time limit: python examples/stream.py [MODEL]."""

import sys
import threading

from zimage import Cancelled, GenerationRequest, ZImagePipeline

pipe = ZImagePipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "turbo")
deadline = threading.Event()
timer = threading.Timer(120.0, deadline.set)
timer.start()
request = GenerationRequest("a lighthouse in a storm", height=512, width=512, seed=3)
try:
    for step in pipe.stream(request, cancel=deadline):
        print(f"step {step.index + 1}/{step.total}  sigma {step.sigma:.3f} -> {step.sigma_next:.3f}")
        if step.image is not None:
            step.image.save("lighthouse.png")
except Cancelled as stopped:
    print(stopped)
finally:
    timer.cancel()
