"""Codec int4: keys of 2 + 2 bits, values of 4."""

from pikv_megatron.codecs.codec import Codec

INT4 = Codec(key_planes=(2, 2), value_bits=4)
