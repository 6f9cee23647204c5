"""Shared fixtures: tiny tensors are fastest on one thread, and hypothesis must not time torch's first call."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("mechdiff", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("mechdiff")
