"""From text to token bins; README.md says how."""
