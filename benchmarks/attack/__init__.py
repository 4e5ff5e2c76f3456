"""The stability attack: what it accepts and rejects of layers whose worth is known."""
