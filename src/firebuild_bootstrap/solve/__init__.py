"""What of a graph has to run, and in which order."""
