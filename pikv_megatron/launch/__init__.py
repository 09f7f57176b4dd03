"""From a bare process or a rank of torchrun, `deepspeed`, `mpirun` or `srun` to initialised process groups.

`environment` reads the launcher's variables, `address` finds where rank 0 listens, `rendezvous` is where they meet,
`peers` names one that is lost, `parent` says whether the launcher lives, `binding` on which CPUs a rank runs,
`bootstrap` puts them together. docs/launching.md has the variables and the rules. `init_megatron`, which goes on
to Megatron's parallel state, is the integrations', and is had here by name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pikv_megatron.launch.bootstrap import init_process_group
from pikv_megatron.launch.environment import Launch, LaunchError, read_launch
from pikv_megatron.launch.peers import PeerLostError, lost_peer

if TYPE_CHECKING:
    from pikv_megatron.integrations.start import init_megatron

__all__ = [
    "Launch",
    "LaunchError",
    "PeerLostError",
    "init_megatron",
    "init_process_group",
    "lost_peer",
    "read_launch",
]


def __getattr__(name: str) -> Any:
    if name != "init_megatron":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("pikv_megatron.integrations.start").init_megatron
