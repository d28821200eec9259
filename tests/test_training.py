"""Training one layer: it learns, resumes exactly, and never ends worse than it began."""
