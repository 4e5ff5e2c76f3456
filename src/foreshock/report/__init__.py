"""From tables to charts and one self-contained page. No torch."""
