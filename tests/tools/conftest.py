"""The tools are scripts, not an installed package: their tests find them from the repository's root."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# and the generated releases beside the tests
for folder in (HERE, HERE.parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
