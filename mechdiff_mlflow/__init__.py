"""What did this fine-tune change, and where? Maps, causal patching and low-rank control, in MLflow."""

__version__ = "0.1.0"
