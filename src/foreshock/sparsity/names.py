"""What linears are called that make keys and gates, alone or fused with others: last parts of their paths. No torch."""

KEYS = frozenset({"k", "k_proj", "key", "wk", "to_k"})
"""Names of linears that make keys."""
GATES = frozenset({"gate", "gate_proj", "w1"})
"""Names of gates of gated MLPs; decisive where they have a sibling."""
FUSED_QKV = frozenset({"qkv", "qkv_proj", "c_attn", "in_proj", "wqkv", "Wqkv"})
"""Names of linears that make queries, keys and values, one after the other."""
FUSED_GATE_UP = frozenset({"gate_up", "gate_up_proj"})
"""Names of linears that make gates, then what is gated."""
INTERLEAVED = frozenset({"query_key_value"})
"""Names of linears that make queries, keys and values in an order that differs between models."""
