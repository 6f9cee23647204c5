"""Requests carried out and tracked in MLflow, one function each; the command line prints what they return."""
