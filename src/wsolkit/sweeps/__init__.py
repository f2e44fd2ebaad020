"""Summarise the runs of a sweep in tables, charts and a comparison."""
