"""One thread for every test: tensors here are small, and several workers share the cores."""

from __future__ import annotations

import os

# Before torch is imported, and for the subprocesses that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
