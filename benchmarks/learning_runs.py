"""Runs of the scripts in examples/, and tables of what they reach after each epoch."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from common.files import is_complete  # noqa: E402


def run_example(script: str, folder: Path, output: str, epochs: int, *options: object) -> list[dict]:
    """Runs a training script in `folder`, unless the folder has its finished output. An interrupted run is resumed.

    Returns:
        The measurements after each epoch.
    """
    place = folder / output
    if not is_complete(place):
        command = [sys.executable, EXAMPLES / script, "--output", output, "--epochs", epochs, "--workers", 0, *options]
        if (place / "checkpoints").is_dir():
            command.append("--resume")
        print(f"{folder}: {script} --output {output}", flush=True)
        # The paths are relative to the folder, since a resumed run must have the same paths.
        if subprocess.run([*map(str, command)], cwd=folder, stdout=subprocess.DEVNULL).returncode:
            sys.exit(f"error: {script} failed; see its message above.")
    history = json.loads((place / "results.json").read_text())["history"]
    if len(history) != epochs:
        sys.exit(
            f"error: {place} has a run of {len(history)} epochs, not {epochs}: remove it, or name another --folder."
        )
    return history


def table_by_epoch(title: str, rows: dict[str, tuple[int, list[dict[int, float]]]], epochs: list[int]) -> list[str]:
    """The lines of a Markdown table: means in %, with standard deviations if there are several curves.

    Args:
        title: the title of the first column.
        rows: by the name in the first column, a number of parameters and curves, which give a value for each epoch.
        epochs: the epochs to show.
    """
    lines = [f"| {title} | parameters | {' | '.join(map(str, epochs))} |", f"|---|---:|{'---:|' * len(epochs)}"]
    for name, (parameters, curves) in rows.items():
        cells = []
        for epoch in epochs:
            values = [100 * curve[epoch] for curve in curves]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {parameters:,} | {' | '.join(cells)} |")
    return lines
