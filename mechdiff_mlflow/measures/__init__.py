"""Divergences, moments, similarities and the statistics of what is reported."""
