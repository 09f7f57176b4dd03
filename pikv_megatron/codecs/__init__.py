"""Codecs: how sealed blocks are stored. One file a codec, one row here."""

from pikv_megatron.codecs.codec import Codec
from pikv_megatron.codecs.int2 import INT2
from pikv_megatron.codecs.int4 import INT4
from pikv_megatron.codecs.int8 import INT8
from pikv_megatron.codecs.none import NONE
from pikv_megatron.config.table import Table

CODECS: Table[Codec] = Table(
    ("runtime.codec.keys", "runtime.codec.values"),
    {"none": NONE, "int8": INT8, "int4": INT4, "int2": INT2},
)
