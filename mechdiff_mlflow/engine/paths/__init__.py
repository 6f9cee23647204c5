"""The ways to score patched runs, from plain hooks to one sweep up the layers."""
