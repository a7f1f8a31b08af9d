"""Studies that reproduce the papers; each is one command."""
