"""Plugins of engines."""
