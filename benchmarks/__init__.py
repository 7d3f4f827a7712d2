"""What the plugin costs, measured beside what one would do without it."""
