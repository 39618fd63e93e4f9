"""From studies to runs, and from runs to findings; see README.md beside this file."""
