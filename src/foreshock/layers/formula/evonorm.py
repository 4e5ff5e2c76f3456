"""The published EvoNorm layers as formulas (2004.02967)."""

EVONORM = {
    "evonorm_b0": "x / max(std_bwh(x), x * v1 + std_wh(x))",
    "evonorm_b1": "a = rms_wh(x); x / max(std_bwh(x), a + x * a)",
    "evonorm_b2": "x / max(std_bwh(x), rms_wh(x) - x)",
    "evonorm_s0": "x * sigmoid(x * v1) / std_whg(x)",
    "evonorm_s1": "x * sigmoid(x) / std_whg(x)",
    "evonorm_s2": "x * sigmoid(x) / rms_whg(x)",
}
"""Formulas by name. B1's (x + 1) · rms is written rms + x · rms: formulas have no number but 0."""
