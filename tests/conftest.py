"""One thread: the models are tiny, and results must not depend on the number of cores. Laws are tried on the same examples each time."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
