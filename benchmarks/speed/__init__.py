"""How long the surgery takes, and how fast what it gives is."""
