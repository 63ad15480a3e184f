"""Seeds: pure functions of what they are for, the same on every machine and in every process."""

import hashlib

HELD_OUT_SHARE = 8


def derive_seed(*parts: int | str, bits: int = 62) -> int:
    """A number in [0, 2**bits) that depends on all parts and their order."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & ((1 << bits) - 1)


def held_out(identity: str) -> bool:
    """Whether a prompt belongs to evaluation: one in HELD_OUT_SHARE does, by what it says."""
    digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_SHARE == 0
