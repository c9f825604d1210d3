"""The command line: the only door for people."""
