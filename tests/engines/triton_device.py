"""Where tests run Triton kernels: on the GPU if there is one, else in Triton's interpreter.

Imported before any kernel: Triton decides between the two when a kernel is defined.
"""

from __future__ import annotations

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
