"""Requests: pairs, prompts, sites, ranks and scales, validated before anything is loaded."""
