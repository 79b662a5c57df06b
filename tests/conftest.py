"""Two threads at most: tests run beside other work, and OpenMP threads that wait are slower than none."""

import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
