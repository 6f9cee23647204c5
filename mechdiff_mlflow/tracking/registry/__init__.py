"""Registered maps: promotion, policies, aliases, comparison, fetching."""
