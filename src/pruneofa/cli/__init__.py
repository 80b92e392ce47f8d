"""The command line: `main` has the table of verbs, one file for each, and `show` prints."""
