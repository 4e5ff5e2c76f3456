"""`make bench`: measure, print, and write docs/benchmarks.md."""

import argparse
import platform
from pathlib import Path

import torch

from benchmarks import step, study

TARGET = Path(__file__).parent.parent / "docs" / "benchmarks.md"

STEP_HEAD = """## One training step

Median ratios over {blocks} interleaved blocks of 10 steps, 1 thread, default monitors at their default cadence.
*Plain* is a hand-written loop with fused q, k, v (`benchmarks/plain.py`); memory is the peak of a process of its own.

| size | plain, ms | (a) with monitors ÷ plain | without ÷ plain | (c) with ÷ without | (d) memory ÷ plain | MFU |
|---|---|---|---|---|---|---|
"""

STUDY_TEXT = """
## (b) The quick study

Steps a second of whole processes, imports, records and the report included; the bare loops do the same steps and
evaluations on the same tokens.

| | |
|---|---|
| quick study, seconds | {study_s:.0f} |
| throughput ÷ the same runs one after another, default threads | {study_to_serial:.2f} |
| throughput ÷ two bare single-threaded loops side by side | {study_to_side_by_side:.2f} |
"""


def main() -> None:
    """Run the benchmarks that this machine can run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--blocks", type=int, default=30, help="interleaved blocks of 10 steps")
    parser.add_argument("--skip-study", action="store_true", help="only the training step")
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    text = f"# Benchmarks\n\nWritten by `make bench` on {device}, torch {torch.__version__}. Ratios inside one run.\n\n"
    text += STEP_HEAD.format(blocks=options.blocks)
    for shape in step.shapes(options.device):
        found = step.compare(shape, options.blocks)
        utilisation = "" if found.mfu is None else f"{found.mfu:.1%}"
        text += (
            f"| {found.size} | {found.plain_ms:.1f} | {found.monitored_to_plain:.3f} | {found.bare_to_plain:.3f} "
            f"| {found.monitored_to_bare:.3f} | {found.memory_to_plain:.3f} | {utilisation} |\n"
        )
    if not options.skip_study and options.device == "cpu":
        text += STUDY_TEXT.format(**vars(study.compare()))
    print(text)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
