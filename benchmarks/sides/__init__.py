"""The same federated run by four different codes; each is a process of its own.

    python -m benchmarks.sides.NAME WORK OUT

reads the work from the folder WORK and leaves ``final.safetensors`` and ``first_session`` in the folder OUT.
The peers import nothing of polyrank.
"""
