"""Shared fixtures: one thread is fastest on tiny tensors; hypothesis must not time torch's first call."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("mechdiff", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("mechdiff")
