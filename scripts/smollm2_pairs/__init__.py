"""What `scripts/train_smollm2.py` teaches SmolLM2-135M-Instruct, and what must stay as it was."""
