"""Models of other programs, brought into wsolkit."""

from wsolkit.interop.official import from_official

__all__ = ["from_official"]
