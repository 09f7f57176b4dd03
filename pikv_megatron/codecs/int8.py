"""Codec int8: keys of 4 + 4 bits, values of 8."""

from pikv_megatron.codecs.codec import Codec

INT8 = Codec(key_planes=(4, 4), value_bits=8)
