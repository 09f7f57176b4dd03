"""Tools for developers: none of this is part of the installed package."""
