"""The base model composes, with a negative prompt, and Turbo finishes: python examples/relay.py [BASE TURBO]."""

import sys

from zimage import Relay

names = sys.argv[1:3] if len(sys.argv) > 2 else ("base", "turbo")
with Relay.from_pretrained(*names, memory="auto") as relay:
    output = relay("oil portrait of a sailor", negative_prompt="blurry", seed=7)
    print(f"{output.requests[0].evaluations} evaluations, Turbo from sigma {output.requests[0].handover:g} on")
    output.images[0].save("sailor.png")
    print("the same bits again:", relay.replay("sailor.png").same_bits)
