"""Runs become findings."""
