"""Pictures of a run's tables, as matplotlib figures without a display."""
