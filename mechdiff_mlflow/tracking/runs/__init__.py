"""Runs from their first write to their end: owned, resumed, repaired, searched."""
