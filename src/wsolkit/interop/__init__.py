"""Exchange models, predictions and score maps with other programs."""

from wsolkit.interop.official import from_official

__all__ = ["from_official"]
