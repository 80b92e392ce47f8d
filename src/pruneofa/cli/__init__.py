"""The command line: `main` has the table of verbs, each verb has its own file, and `show` prints results."""
