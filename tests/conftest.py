import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# Like running `python convert/….py` or `python examples/….py`: the scripts there import each other by name.
sys.path[:0] = [str(ROOT / "convert"), str(ROOT / "examples")]

# Before anything imports Triton: where there is no GPU, its kernels are interpreted. Nothing else here asks for Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
