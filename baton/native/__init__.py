"""The CPU's forward pass in C++: products with AMX or AVX-512 BF16, paged attention, one team of
threads.

Optional: `unavailable()` says why it cannot be used here, and then everything runs through torch.
Torch-free.
"""

from baton.native.library import unavailable, variant
from baton.native.model import Logits, NativeBatch, NativeModel, Pool, Profile, unfit

__all__ = [
    "Logits",
    "NativeBatch",
    "NativeModel",
    "Pool",
    "Profile",
    "unavailable",
    "unfit",
    "variant",
]
