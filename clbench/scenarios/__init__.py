"""Scenarios: presets and builders of index tables. Nothing is imported here, so that listing them needs no torch."""
