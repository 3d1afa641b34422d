import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Like running `python convert/….py` or `python examples/….py`: the scripts there import each other by name.
sys.path[:0] = [str(ROOT / "convert"), str(ROOT / "examples")]
