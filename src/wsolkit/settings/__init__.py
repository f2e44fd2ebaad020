"""Compose, check and explain settings, restore those of a checkpoint, and run a command."""
