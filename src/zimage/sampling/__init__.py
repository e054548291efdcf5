"""The mathematics of sampling: schedules, samplers, guidance and noise, as functions over tensors and callables."""
