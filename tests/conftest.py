"""What every test process needs before its first import."""

from __future__ import annotations

import os
from pathlib import Path

# Triton decides between compiling and interpreting when it is first imported, wherever that
# happens to be. Without a GPU driver only its interpreter can run.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:  # tests/gpu also runs where nobody installed anything
    from hypothesis import settings
except ImportError:
    pass
else:
    # How long an example takes says how busy the machine is. The suite tries the same examples
    # on every run; `pytest --hypothesis-profile=search` looks for new ones.
    settings.register_profile("baton", deadline=None, derandomize=True)
    settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
    settings.load_profile("baton")
