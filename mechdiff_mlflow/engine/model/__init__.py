"""The transformer as hooks see it: its blocks, and forwards over prompts cut into chunks."""
