"""Speed and memory, side by side with plain code and with peers; ``python -m benchmarks.NAME`` runs one."""
