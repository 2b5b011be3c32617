"""The parts of tools/plan.py."""
