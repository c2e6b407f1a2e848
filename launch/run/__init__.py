"""Running a recipe: starting points, stages in order, resuming, measuring, publishing."""
