"""Seeds: pure functions of what they are for, the same on every machine and in every process."""

import hashlib


def derive_seed(*parts: int | str, bits: int = 62) -> int:
    """A number in [0, 2**bits) that depends on all parts and their order."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & ((1 << bits) - 1)
