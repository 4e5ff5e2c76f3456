"""What can be seen inside any nn.Module: hooks, attention, moments. Knows nothing of the proxy."""
