"""Turn score maps into boxes: normalisation, box extraction, and the papers' rules as data."""

from wsolkit.localization.boxes import boxes_at_thresholds

__all__ = ["boxes_at_thresholds"]
