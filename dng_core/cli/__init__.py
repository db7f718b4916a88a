"""The command line: `dng`, and a module for each of its commands."""
