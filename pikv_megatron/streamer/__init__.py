"""Streaming of a cache's state out of the process."""
