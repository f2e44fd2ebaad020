"""Serve a trained model as a page in the browser."""
