"""The one seam of attention: every attention is an AttentionCall, and every consumer reads that."""

from foreshock.probes.attention.capture import Capture
from foreshock.probes.attention.core import AttentionCore, tap_cores
from foreshock.probes.attention.edit import edit_attention, editable_attention
from foreshock.probes.attention.editing import Change
from foreshock.probes.attention.plan import attention_plan
from foreshock.probes.attention.scores import (
    AttentionStatistics,
    allowed,
    keys_per_query_head,
    largest_logits,
    logits,
    probabilities,
    statistics,
    vector_norms,
)
from foreshock.probes.attention.taps import AttentionObserver, AttentionTaps, observe_attention, tap_attention

__all__ = [
    "AttentionCore",
    "AttentionObserver",
    "AttentionStatistics",
    "AttentionTaps",
    "Capture",
    "Change",
    "allowed",
    "attention_plan",
    "edit_attention",
    "editable_attention",
    "keys_per_query_head",
    "largest_logits",
    "logits",
    "observe_attention",
    "probabilities",
    "statistics",
    "tap_attention",
    "tap_cores",
    "vector_norms",
]
