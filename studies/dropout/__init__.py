"""One study, run by its module `run`."""
