"""Tests that need a CUDA device; without one there is nothing here to collect. `make gpu` runs them."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
