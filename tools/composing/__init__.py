"""The parts of ``tools/compose_shards.py``: cut-outs, where they go, and what they are called."""
