"""From a bare process or a rank of torchrun, `deepspeed`, `mpirun` or `srun` to initialised process groups.

`environment` reads the launcher's variables, `address` finds where rank 0 listens, `binding` says on which CPUs a rank
runs, `bootstrap` puts them together. docs/launching.md has the variables and the rules.
"""

from pikv_megatron.launch.bootstrap import init_megatron, init_process_group
from pikv_megatron.launch.environment import Launch, LaunchError, read_launch

__all__ = ["Launch", "LaunchError", "init_megatron", "init_process_group", "read_launch"]
