"""Faster forms of norms, attention and MLPs for CPU and GPU."""
