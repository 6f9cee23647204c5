"""Checkpoints and adapters made ready: tokenizers, chat templates, loaded pairs, maps in live models."""
