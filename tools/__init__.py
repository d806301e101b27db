"""Builds and publishes the book. Knows its files; imports neither torch nor qft_utils."""
