"""What has to run, and in which order; keys of operations, and the cache of their results."""
