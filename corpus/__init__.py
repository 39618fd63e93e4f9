"""Text becomes token bins."""
