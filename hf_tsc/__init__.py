"""Remove backdoors from Hugging Face vision models with Two-stage Symmetry Connectivity (hf.co/papers/2506.07467)."""

__version__ = "0.1.0"
