"""Triton device code and its configurations; imports triton, never torch."""
