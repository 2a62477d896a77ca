"""Whole models: tokens per second, and packing itself."""
