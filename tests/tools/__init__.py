"""Programs for maintainers, each started by a target of the Makefile. None of them is a test."""
