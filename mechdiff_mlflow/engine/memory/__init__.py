"""How much goes into memory at a time, and what is done when it runs out."""
