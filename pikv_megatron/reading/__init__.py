"""Reading: which sealed tokens a decode query attends to, and what it misses. One file a mode, one row here; exact has
none, since it reads everything.
"""

from __future__ import annotations

from pikv_megatron.config.table import Table
from pikv_megatron.reading.mass import Mass
from pikv_megatron.reading.reader import Reader
from pikv_megatron.reading.top_k import TopK

READERS: Table[type[Reader] | None] = Table(("runtime.attention.mode",), {"exact": None, "top_k": TopK, "mass": Mass})
