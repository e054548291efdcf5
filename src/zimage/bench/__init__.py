"""Speed, measured: zimage and diffusers in turn in one process on the same weights, stage by stage.

`settings` says what is measured, `sides` are the two ways to do each stage, `measure` takes turns and refuses unequal
work, `flops` counts what a stage asks for, `machine` measures what this machine can do at best, and `report` is
what comes out. `zimage bench` and benchmarks/against_diffusers.py both call `measure.run`. Importing it loads no torch.
"""
