"""One run of a verb: output folder, finished parts, processes, progress, memory. Knows no model."""
