"""Random numbers as a function of what they are for.

Every draw of a run comes from a generator made of `(seed, purpose, keys)`. There is no generator state to save, a
batch can be rebuilt from its cursor, and nothing that watches a run (evaluation, progress) can shift what it watches.
"""

from hashlib import blake2b

import torch

__all__ = ["derive_seed", "generator"]


def derive_seed(seed: int, purpose: str, *keys: int | str) -> int:
    """Return a 63-bit seed that depends on the arguments alone, on every machine and Python version.

    >>> derive_seed(0, "shuffle", 1, 2) == derive_seed(0, "shuffle", 1, 2)
    True
    >>> derive_seed(0, "shuffle", 1, 2) == derive_seed(0, "shuffle", 12)
    False
    """
    text = "/".join((str(seed), purpose, *map(str, keys)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator on `device`, seeded by `derive_seed(seed, purpose, *keys)`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *keys))
