"""LoRA adapters, read from any of the usual ways of naming, computed beside the weights and taken off without a trace;
and ControlNets.

`naming` and `origin` say what a file's keys and metadata mean, `source` finds and reads it, `adapter` makes layers of
it, and `loading` does all of that; `layers` computes with them, `attaching` puts them on a transformer and takes them
off, `writing` saves them. `controlsource` finds and describes a ControlNet's files, `controlnet` loads them.
"""
