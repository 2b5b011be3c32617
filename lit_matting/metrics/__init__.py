"""Judging: the matting errors as pure functions, the classes that collect them, and the referring score card."""
