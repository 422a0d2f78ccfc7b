"""Detector events: reader, writer, generator and displays."""
