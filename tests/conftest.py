import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Like running `python convert/….py`: the scripts there import each other by name.
sys.path.insert(0, str(ROOT / "convert"))
