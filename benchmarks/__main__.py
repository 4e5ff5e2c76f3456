"""`make bench`: measure, print, and write docs/benchmarks/*.md, one file a part."""

import argparse
import os
import platform
from pathlib import Path

import torch

from benchmarks import step, study
from benchmarks.attack.page import attack_page
from benchmarks.curvature.page import cpu_page, cuda_page
from benchmarks.sparse_matvec.page import sparse_matvec_page
from benchmarks.watch.page import watch_page

TARGET = Path(__file__).parent.parent / "docs" / "benchmarks"

STEP_HEAD = """# One training step

{machine}

Median ratios over {processes} processes, in each the median over interleaved blocks of {block} steps, {blocks} blocks
in all, 1 thread, default monitors at their default cadence (one logged step a block). *Plain* is a hand-written loop
with fused q, k, v (`benchmarks/plain.py`). Memory is what a process of its own takes at its peak beyond what it held
before the loop was built.

| size | plain, ms | (a) with monitors ÷ plain | without ÷ plain | (c) with ÷ without | (d) memory ÷ plain | MFU |
|---|---|---|---|---|---|---|
"""

STUDY_TEXT = """# (b) The quick study

{machine}

Steps a second of whole processes, imports, records and the report included; the bare loops do the same steps and
evaluations on the same tokens.

| | |
|---|---|
| quick study, seconds | {study_s:.0f} |
| throughput ÷ the same runs one after another, default threads | {study_to_serial:.2f} |
| throughput ÷ two bare single-threaded loops side by side | {study_to_side_by_side:.2f} |

Where the study's time on two cores went:

| | share |
|---|---|
{profile}
"""


def step_page(device: str, blocks: int) -> str:
    """(a), (c), (d): the training step at several sizes."""
    text = STEP_HEAD.format(machine=machine(device), blocks=blocks, block=step.BLOCK, processes=step.PROCESSES)
    for shape in step.shapes(device):
        found = step.compare(shape, blocks)
        utilisation = "" if found.mfu is None else f"{found.mfu:.1%}"
        text += (
            f"| {found.size} | {found.plain_ms:.1f} | {found.monitored_to_plain:.3f} | {found.bare_to_plain:.3f} "
            f"| {found.monitored_to_bare:.3f} | {found.memory_to_plain:.2f} | {utilisation} |\n"
        )
    return text


def study_page() -> str:
    """(b): the quick study."""
    found = vars(study.compare())
    found["profile"] = "\n".join(f"| {name} | {share:.1%} |" for name, share in found["profile"].items())
    return STUDY_TEXT.format(machine=machine("cpu"), **found)


def machine(device: str) -> str:
    """Where the figures are from."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return f"Written by `make bench` on {name}, torch {torch.__version__}. Ratios inside one run."


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        default=["step", "study"],
        help="step, study, curvature, watch, attack, sparse_matvec; the default is step study",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--blocks", type=int, default=25, help="interleaved blocks of the step benchmark, over all processes"
    )
    options = parser.parse_args()
    pages = {}
    if "step" in options.parts:
        name = "step" if options.device == "cpu" else "step_cuda"
        pages[name] = step_page(options.device, options.blocks)
    if "study" in options.parts and options.device == "cpu":
        pages["study"] = study_page()
    if "curvature" in options.parts and options.device == "cpu":
        pages["curvature"] = cpu_page(machine("cpu"))
    if "curvature" in options.parts and options.device == "cuda":
        pages["curvature_cuda"] = cuda_page(machine("cuda"))
    if "watch" in options.parts:
        name = "watch" if options.device == "cpu" else "watch_cuda"
        pages[name] = watch_page(machine(options.device), options.device)
    if "attack" in options.parts:
        pages["attack"] = attack_page(machine("cpu"))
    if "sparse_matvec" in options.parts:
        pages["sparse_matvec"] = sparse_matvec_page(machine("cpu"))
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        print(text)
        (TARGET / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
