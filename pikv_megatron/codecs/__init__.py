"""Codecs: how sealed blocks are stored."""
