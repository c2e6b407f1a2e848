"""Several models in one table: sizes, figures on the same text with their errors, speed here, scores on tasks."""
