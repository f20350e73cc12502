"""The built-in observers, plugins like any other."""
