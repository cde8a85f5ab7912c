"""Cache-then-train pipeline for diffusion transformers."""
