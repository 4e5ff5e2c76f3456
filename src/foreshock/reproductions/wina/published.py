"""The paper's own averages over tasks."""

from foreshock.reproductions._paper import Reference

AVERAGES = {
    "Qwen2.5-7B": (72.98, ((72.83, 72.99, 73.02), (71.66, 71.52, 71.38), (68.93, 68.62, 69.26), (55.40, 56.93, 58.34))),
    "Llama-2-7B": (54.34, ((54.11, 54.19, 54.42), (52.49, 52.84, 52.83), (50.51, 51.40, 51.76), (44.21, 45.51, 45.82))),
    "Llama-3-8B": (66.38, ((65.58, 65.99, 66.00), (62.65, 62.94, 63.20), (58.51, 59.19, 59.57), (45.36, 47.28, 47.77))),
    "Phi-4-14B": (77.21, ((76.86, 76.56, 77.57), (75.98, 76.50, 76.71), (74.36, 74.74, 75.91), (68.71, 69.86, 70.72))),
}
"""Of the dense model, and at 25, 40, 50 and 65 % sparsity of TEAL, TEAL on the rotated model, and WINA."""


def published() -> Reference:
    """A table of them."""
    rows = tuple(
        (model, f"{dense:.2f}", *(" / ".join(f"{value:.2f}" for value in three) for three in shares))
        for model, (dense, shares) in AVERAGES.items()
    )
    return Reference(
        title="Published averages",
        caption="Mean score over PIQA, WinoGrande, HellaSwag, ARC-c, MMLU and GSM8K as printed: TEAL / TEAL on the "
        "rotated model / WINA. 13 of the 52 are not the mean of their own row, by 0.16 to 0.67: of Llama-2-7B at 65 % "
        "the row of the rotated TEAL gives 45.84, and no lead for WINA. The models were not run here. What the tables "
        "print as GFLOPs leaves out the rotations: docs/sparsify.md counts them.",
        columns=("model", "dense", "25 %", "40 %", "50 %", "65 %"),
        rows=rows,
    )
