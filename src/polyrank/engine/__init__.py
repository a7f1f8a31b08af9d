"""Engines carry bytes between the server and its clients, and know no message."""
