"""Rules by which a sub-layer's output joins the residual stream."""
