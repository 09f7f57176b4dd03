"""What a codec is: how many bits keys and values have, and how the keys' bits are cut into planes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Codec:
    """Keys are nested codes per channel of a block, values codes per token (KIVI, arXiv 2402.02750).

    key_planes: bits of the high plane, which selection reads alone, and of the low one (0: there is none). value_bits:
    bits of a value. raw: keys and values are kept as they come; key_planes are those of an index beside the keys then.
    """

    key_planes: tuple[int, int]
    value_bits: int
    raw: bool = False
