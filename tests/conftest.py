"""One thread: the models here are tiny, and results must not depend on the number of cores."""

import torch

torch.set_num_threads(1)
