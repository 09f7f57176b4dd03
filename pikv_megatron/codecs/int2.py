"""Codec int2: keys of 2 bits without a low plane, values of 2."""

from pikv_megatron.codecs.codec import Codec

INT2 = Codec(key_planes=(2, 0), value_bits=2)
