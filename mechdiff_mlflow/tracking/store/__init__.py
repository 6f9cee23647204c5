"""Stores and servers: opening, checking, retrying, and what this machine keeps of them."""
