"""Affine maps from base to tuned activations, and the files that hold them."""
