"""Codec none: keys and values as they come; where selection needs an index, it is a 2-bit plane beside the keys."""

from pikv_megatron.codecs.codec import Codec

NONE = Codec(key_planes=(2, 0), value_bits=0, raw=True)
