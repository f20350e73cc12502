"""What has to run: keys of operations, and the cache of their results."""
